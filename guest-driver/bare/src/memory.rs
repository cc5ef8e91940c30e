//! Guest memory: RAM with the guest's program and the mailbox, and the FIFO region in a slot of its own.

use std::io::Cursor;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::Relaxed;

use ivcpu_abi::{Geometry, Region};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::machine::Error;
use crate::mailbox::{FIFO_AT, MAILBOX_AT, Mailbox};
use crate::registers;

/// The guest's program, compiled by the build script.
const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest"));

const _: () = {
    assert!(MAILBOX_AT.is_multiple_of(align_of::<Mailbox>() as u64));
    assert!(MAILBOX_AT + size_of::<Mailbox>() as u64 <= FIFO_AT);
};

/// Guest memory as the host sees it.
#[derive(Debug)]
pub struct Memory {
    mapped: GuestMemoryMmap,
    region: Region,
    entry: u64,
}

impl Memory {
    /// Memory with the guest's program, its tables, and a new FIFO region.
    pub(crate) fn new() -> Result<Self, Error> {
        let fifo_size = Geometry::DEFAULT.region_size();
        let ranges = [(GuestAddress(0), FIFO_AT as usize), (GuestAddress(FIFO_AT), fifo_size)];
        let mapped = GuestMemoryMmap::from_ranges(&ranges)?;
        let program = Elf::load(&mapped, None, &mut Cursor::new(PROGRAM), None)?;
        registers::write_tables(&mapped)?;
        let base =
            NonNull::new(mapped.get_host_address(GuestAddress(FIFO_AT))?).expect("a mapping is not at 0");
        // SAFETY: `fifo_size` bytes are mapped there as long as `mapped` lives, and nothing but the ABI crate, here
        // and in the guest, accesses them. `region` lends the handle out for no longer than `self`, see there.
        let region = unsafe { Region::create(base, fifo_size, Geometry::DEFAULT)? };
        Ok(Self { mapped, region, entry: program.kernel_load.raw_value() })
    }

    /// Shows the memory to a VM.
    pub(crate) fn show_to(&self, vm: &VmFd) -> Result<(), Error> {
        for (slot, range) in (0..).zip(self.mapped.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: range.start_addr().raw_value(),
                memory_size: range.len(),
                userspace_addr: self.mapped.get_host_address(range.start_addr())? as u64,
            };
            // SAFETY: the range is mapped and used by nothing but the guest and atomics; `Machine` closes the VM before
            // it drops the memory.
            unsafe { vm.set_user_memory_region(slot) }.map_err(Error::kvm("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// The guest-physical address of the program's first instruction.
    pub(crate) fn entry(&self) -> u64 {
        self.entry
    }

    /// The FIFO region. Not to be used after `self` is gone.
    pub fn region(&self) -> Region {
        self.region
    }

    /// The words shared with the guest.
    pub fn mailbox(&self) -> &Mailbox {
        let at = self.mapped.get_host_address(GuestAddress(MAILBOX_AT)).expect("the mailbox is in RAM");
        // SAFETY: a mailbox fits there and is aligned, see above; everything in it is atomic and may hold any
        // bits; the reference does not outlive the mapping.
        unsafe { &*at.cast::<Mailbox>() }
    }

    /// Sets the mailbox to what a job starts with.
    pub(crate) fn clear_mailbox(&self) {
        let mailbox = self.mailbox();
        let lines = [&mailbox.line, &mailbox.stop, &mailbox.ready, &mailbox.received].map(|line| &line.0);
        let others = [&mailbox.interrupts, &mailbox.interrupted_at];
        for word in lines.into_iter().chain(others).chain(&mailbox.at).chain(&mailbox.took) {
            word.store(0, Relaxed);
        }
        for word in mailbox.used.iter().chain(&mailbox.seen).flatten() {
            word.store(0, Relaxed);
        }
    }
}
