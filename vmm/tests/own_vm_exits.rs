//! The exit counter on a VM of this very process: a guest of two instructions whose exits are known in advance.

use ivcpu_vmm::exits::{Counter, Row};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// `mov dx, 0x3f8; out: out dx, al; jmp out`, in real mode.
const WRITES_A_PORT_FOREVER: [u8; 6] = [0xba, 0xf8, 0x03, 0xee, 0xeb, 0xfd];
const LOADED_AT: u64 = 0x1000;

/// A VM with one vCPU at the guest's first instruction; memory is unmapped only after the VM is closed.
struct Guest {
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

impl Guest {
    fn new(kvm: &Kvm) -> Guest {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        memory.write_slice(&WRITES_A_PORT_FOREVER, GuestAddress(LOADED_AT)).unwrap();
        let vm = kvm.create_vm().unwrap();
        let region = memory.iter().next().unwrap();
        let slot = kvm_bindings::kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: 0,
            memory_size: region.len(),
            userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
            flags: 0,
        };
        // SAFETY: the slot covers exactly the mapping in `memory`, which `Guest` keeps longer than the VM.
        unsafe { vm.set_user_memory_region(slot) }.unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        regs.rip = LOADED_AT;
        regs.rflags = 2;
        vcpu.set_regs(&regs).unwrap();
        Guest { vcpu, _vm: vm, _memory: memory }
    }

    fn run(&mut self, port_writes: usize) {
        for _ in 0..port_writes {
            match self.vcpu.run().unwrap() {
                VcpuExit::IoOut(0x3f8, _) => {}
                other => panic!("unexpected exit {other:?}"),
            }
        }
    }
}

#[test]
fn port_writes_of_the_own_vm_are_counted() {
    let Ok(kvm) = Kvm::new() else {
        eprintln!("skipped: no usable /dev/kvm here");
        return;
    };
    let mut guest = Guest::new(&kvm);
    let counter = Counter::start(std::process::id() as i32).unwrap();
    guest.run(10);
    let before = counter.snapshot().unwrap();
    guest.run(500);
    let report = (&counter.snapshot().unwrap() - &before).report();

    // A port write is an exit; the host's own interrupts may add some.
    assert!((500..1000).contains(&report.kvm_exits.unwrap()), "{report}");
    match &report.total {
        Some(rows) => {
            assert_eq!(rows.count(Row::IoInstruction), 500, "{report}");
            assert_eq!(report.agrees(), Some(true), "{report}");
        }
        None => eprintln!("not traced here: {:?}", report.notes),
    }
}
