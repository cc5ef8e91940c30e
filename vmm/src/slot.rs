//! A memory slot that moves: host memory that the guest sees at an address it may change, or not at all.

use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::MmapRegion;

/// Where the guest sees the memory.
pub trait Slot: Send {
    /// From now on at this guest-physical address, or nowhere. If that fails the guest does not see it.
    fn place(&mut self, address: Option<u64>) -> Result<(), kvm_ioctls::Error>;
}

/// Memory that a slot can show.
///
/// # Safety
/// From `address` on, `size` bytes are mapped in this process until the value is dropped.
pub unsafe trait HostMemory: Send + Sync {
    /// Where it is in this process.
    fn address(&self) -> u64;
    /// Bytes, whole pages.
    fn size(&self) -> usize;
}

// SAFETY: a region owns its mapping and unmaps it when it is dropped.
unsafe impl HostMemory for MmapRegion {
    fn address(&self) -> u64 {
        self.as_ptr() as u64
    }

    fn size(&self) -> usize {
        MmapRegion::size(self)
    }
}

/// A slot of KVM.
///
/// It is no RAM: guest memory as the devices and vhost-user backends have it does not include it, so no virtqueue and
/// no buffer can lie in it. To KVM all slots are alike.
pub struct KvmSlot {
    vm: Arc<VmFd>,
    number: u32,
    memory: Arc<dyn HostMemory>,
    placed: bool,
}

impl KvmSlot {
    /// A slot under a number that no other slot of the VM has; placed nowhere yet.
    pub fn new(vm: Arc<VmFd>, number: u32, memory: Arc<dyn HostMemory>) -> Self {
        Self { vm, number, memory, placed: false }
    }

    fn set(&self, address: u64, size: usize) -> Result<(), kvm_ioctls::Error> {
        let slot = kvm_userspace_memory_region {
            slot: self.number,
            flags: 0,
            guest_phys_addr: address,
            memory_size: size as u64,
            userspace_addr: self.memory.address(),
        };
        // SAFETY: the slot is removed (size 0), or describes the live mapping that `self` keeps; `drop` removes it
        // before that one goes. KVM refuses an address where another slot is, so guest memory stays what it is.
        unsafe { self.vm.set_user_memory_region(slot) }
    }
}

impl Slot for KvmSlot {
    fn place(&mut self, address: Option<u64>) -> Result<(), kvm_ioctls::Error> {
        // KVM would move the slot in one step, but keep it at the old address if it refuses the new one.
        if self.placed {
            self.set(0, 0)?;
            self.placed = false;
        }
        if let Some(address) = address {
            self.set(address, self.memory.size())?;
            self.placed = true;
        }
        Ok(())
    }
}

impl Drop for KvmSlot {
    fn drop(&mut self) {
        if let Err(error) = self.place(None) {
            tracing::info!("KVM keeps memory slot {}: {error}", self.number);
        }
    }
}
