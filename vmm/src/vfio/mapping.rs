//! A part of a function's registers in this process's address space, for a KVM memory slot to show.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::slot::HostMemory;

/// The mapping. Nothing here reads or writes it: registers are the guest's.
#[derive(Debug)]
pub struct RegisterMapping {
    start: NonNull<c_void>,
    size: NonZeroUsize,
}

impl RegisterMapping {
    /// Maps `size` bytes of the VFIO file from `offset` on.
    pub fn new(device: &impl AsRawFd, offset: u64, size: u64) -> nix::Result<Self> {
        let too_large = |_| nix::Error::EOVERFLOW;
        let size = usize::try_from(size).map_err(too_large)?.try_into().map_err(|_| nix::Error::EINVAL)?;
        let offset = offset.try_into().map_err(|_| nix::Error::EOVERFLOW)?;
        // SAFETY: `device` is borrowed and so open until the end of this function.
        let fd = unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) };
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address the kernel chooses touches no memory that is in use, and `drop` is the only one
        // to remove it.
        let start = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, fd, offset) }?;
        Ok(Self { start, size })
    }
}

// SAFETY: `start` and `size` are those of the mapping that `self` owns, which stays until `drop`.
unsafe impl HostMemory for RegisterMapping {
    fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    fn size(&self) -> usize {
        self.size.get()
    }
}

// SAFETY: the pointer is only handed to the kernel; no memory is accessed through it on any thread.
unsafe impl Send for RegisterMapping {}
// SAFETY: as above.
unsafe impl Sync for RegisterMapping {}

impl Drop for RegisterMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is `self`'s own, and the slot that showed it to the guest, which owned `self`, is gone.
        if let Err(error) = unsafe { munmap(self.start, self.size.get()) } {
            tracing::info!("cannot unmap registers: {error}");
        }
    }
}
