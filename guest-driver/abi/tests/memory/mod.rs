//! Memory for a region: a memfd, which a child process can map too.

use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use ivcpu_abi::{Error, Geometry, Region};

pub struct Memory {
    pub file: OwnedFd,
    pub base: NonNull<u8>,
    pub len: usize,
}

impl Memory {
    pub fn new(len: usize) -> Self {
        // Inherited by children on purpose: no close-on-exec flag.
        let file = memfd_create(c"fifo", MFdFlags::empty()).unwrap();
        nix::unistd::ftruncate(&file, len as i64).unwrap();
        let size = NonZeroUsize::new(len).unwrap();
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe { mmap(None, size, access, MapFlags::MAP_SHARED, &file, 0) }.unwrap();
        Self { file, base: base.cast(), len }
    }

    /// Memory with a region created in it.
    pub fn with_region(geometry: Geometry) -> (Self, Region) {
        let memory = Self::new(geometry.used_size());
        // SAFETY: the mapping is only unmapped with `memory`, which the callers keep until they are done.
        let region = unsafe { Region::create(memory.base, memory.len, geometry) }.unwrap();
        (memory, region)
    }

    pub fn open(&self) -> Result<Region, Error> {
        // SAFETY: as in `with_region`.
        unsafe { Region::open(self.base, self.len) }
    }

    /// The 32-bit word at `offset`, as the other side sees it.
    pub fn word(&self, offset: usize) -> &std::sync::atomic::AtomicU32 {
        assert!(offset + 4 <= self.len && offset.is_multiple_of(4));
        // SAFETY: within the mapping, aligned, and accessed by atomics only.
        unsafe { std::sync::atomic::AtomicU32::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; the test is done with the region.
        unsafe { munmap(self.base.cast(), self.len) }.unwrap();
    }
}
