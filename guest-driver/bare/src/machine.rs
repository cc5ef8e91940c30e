//! The VM: guest memory, one vCPU, an irqfd and an ioeventfd.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KVM_MAX_CPUID_ENTRIES, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, KvmIrqRouting,
    kvm_device_attr, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::exits::Exits;
use crate::mailbox::{Job, KICK_AT, REPORT_AT, Report};
use crate::memory::Memory;
use crate::registers::{self, VECTOR};

/// The GSI of the irqfd: the first beyond the pins of the interrupt controllers.
const GSI: u32 = 24;
/// Where a message interrupts the vCPU with APIC id 0.
const LOCAL_APIC: u32 = 0xfee0_0000;
/// Offset of the spurious-interrupt vector register in the local APIC's page, and its enable bit in byte 1.
const SPURIOUS: usize = 0xf0;

/// What can go wrong with the VM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no KVM for this process.
    #[error("/dev/kvm cannot be used: {0}")]
    NoKvm(kvm_ioctls::Error),
    /// KVM refused a step.
    #[error("KVM refuses {step}")]
    Kvm {
        /// Which.
        step: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// KVM's counters are not what they should be.
    #[error("cannot find the vCPU's count of exits")]
    Exits(#[source] io::Error),
    /// An eventfd could not be made.
    #[error("cannot make an eventfd")]
    EventFd(#[source] io::Error),
    /// Guest memory could not be mapped.
    #[error("cannot map guest memory")]
    Map(#[from] vm_memory::mmap::FromRangesError),
    /// The guest's program could not be loaded.
    #[error("cannot load the guest's program")]
    Load(#[from] linux_loader::loader::Error),
    /// Guest memory could not be filled.
    #[error("cannot write to guest memory")]
    Write(#[from] vm_memory::GuestMemoryError),
    /// The FIFO region could not be created.
    #[error(transparent)]
    Region(#[from] ivcpu_abi::Error),
    /// The guest left in a way it should not.
    #[error("the guest broke down at {rip:#x}: {exit}")]
    Guest {
        /// Its instruction.
        rip: u64,
        /// KVM's exit.
        exit: String,
    },
}

impl Error {
    pub(crate) fn kvm(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { step, source }
    }
}

/// A VM with the guest in it.
#[derive(Debug)]
pub struct Machine {
    /// Its vCPU.
    pub vcpu: Vcpu,
    /// Interrupts the vCPU when it is written: the irqfd.
    pub interrupt: EventFd,
    /// Written by KVM when the guest kicks: the ioeventfd.
    pub kick: EventFd,
    // Closed before the memory goes: fields are dropped in this order.
    _vm: VmFd,
    /// Its memory.
    pub memory: Memory,
}

impl Machine {
    /// Makes the VM. [`Error::NoKvm`] where there is none to be had.
    pub fn new() -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(Error::NoKvm)?;
        let vm = kvm.create_vm().map_err(Error::kvm("KVM_CREATE_VM"))?;
        let memory = Memory::new()?;
        memory.show_to(&vm)?;
        vm.create_irq_chip().map_err(Error::kvm("KVM_CREATE_IRQCHIP"))?;
        let [interrupt, kick] = connect(&vm)?;
        let vcpu = Vcpu::new(&kvm, &vm)?;
        Ok(Self { vcpu, interrupt, kick, _vm: vm, memory })
    }

    /// Lets the vCPU begin with a job at its next [`Vcpu::run`].
    pub fn start(&mut self, job: Job, count: u64) -> Result<(), Error> {
        self.memory.clear_mailbox();
        self.vcpu
            .fd
            .set_regs(&registers::of_job(self.memory.entry(), job, count))
            .map_err(Error::kvm("KVM_SET_REGS"))
    }
}

fn connect(vm: &VmFd) -> Result<[EventFd; 2], Error> {
    let message = kvm_irq_routing_msi { address_lo: LOCAL_APIC, data: VECTOR.into(), ..Default::default() };
    let route = kvm_irq_routing_entry {
        gsi: GSI,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi: message },
        ..Default::default()
    };
    let routes = KvmIrqRouting::from_entries(&[route]).expect("one route is not too many");
    vm.set_gsi_routing(&routes).map_err(Error::kvm("KVM_SET_GSI_ROUTING"))?;
    let interrupt = EventFd::new(0).map_err(Error::EventFd)?;
    vm.register_irqfd(&interrupt, GSI).map_err(Error::kvm("KVM_IRQFD"))?;
    let kick = EventFd::new(0).map_err(Error::EventFd)?;
    vm.register_ioevent(&kick, &IoEventAddress::Mmio(KICK_AT), NoDatamatch)
        .map_err(Error::kvm("KVM_IOEVENTFD"))?;
    Ok([interrupt, kick])
}

nix::ioctl_write_ptr!(kvm_set_device_attr, KVMIO, 0xe1, kvm_device_attr);

/// Makes the guest read the host's cycle counter, so that times taken on both sides can be compared.
fn show_host_clock(vcpu: &VcpuFd) -> Result<(), Error> {
    let offset = 0u64;
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: (&raw const offset).addr() as u64,
        ..Default::default()
    };
    // SAFETY: the kernel reads the attribute and the offset it points to, both alive; `vcpu` is open.
    unsafe { kvm_set_device_attr(vcpu.as_raw_fd(), &attribute) }.map_err(|errno| Error::Kvm {
        step: "KVM_VCPU_TSC_OFFSET",
        source: kvm_ioctls::Error::new(errno as i32),
    })?;
    Ok(())
}

/// The vCPU.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
}

impl Vcpu {
    fn new(kvm: &Kvm, vm: &VmFd) -> Result<Self, Error> {
        let fd = vm.create_vcpu(0).map_err(Error::kvm("KVM_CREATE_VCPU"))?;
        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(Error::kvm("KVM_GET_SUPPORTED_CPUID"))?;
        fd.set_cpuid2(&cpuid).map_err(Error::kvm("KVM_SET_CPUID2"))?;
        let mut registers = fd.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
        registers::enter_user_mode(&mut registers);
        fd.set_sregs(&registers).map_err(Error::kvm("KVM_SET_SREGS"))?;
        let mut apic = fd.get_lapic().map_err(Error::kvm("KVM_GET_LAPIC"))?;
        apic.regs[SPURIOUS] = 0xffu8 as _;
        apic.regs[SPURIOUS + 1] = 1;
        fd.set_lapic(&apic).map_err(Error::kvm("KVM_SET_LAPIC"))?;
        show_host_clock(&fd)?;
        Ok(Self { fd })
    }

    /// KVM's counts of this vCPU's exits.
    pub fn exits(&self) -> Result<Exits, Error> {
        Exits::of(&self.fd).map_err(Error::Exits)
    }

    /// Runs the guest until it reports.
    pub fn run(&mut self) -> Result<Report, Error> {
        let broken = match self.fd.run() {
            Ok(VcpuExit::MmioWrite(REPORT_AT, word)) => {
                match word.try_into().ok().map(u64::from_le_bytes).and_then(Report::from_word) {
                    Some(Report::Broken) | None => "its program panicked, or found no FIFO region".to_owned(),
                    Some(report) => return Ok(report),
                }
            }
            Ok(exit) => format!("{exit:?}"),
            Err(error) => error.to_string(),
        };
        let rip = self.fd.get_regs().map_or(0, |registers| registers.rip);
        Err(Error::Guest { rip, exit: broken })
    }
}
