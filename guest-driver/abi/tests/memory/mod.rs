//! Memory for a region: a memfd, which a child process can map too, between two pages that nobody may touch.

use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use ivcpu_abi::{Error, Geometry, Region};

const PAGE: usize = 4096;

pub(crate) struct Memory {
    pub(crate) file: OwnedFd,
    pub(crate) base: NonNull<u8>,
    pub(crate) len: usize,
}

// SAFETY: the pointer is to memory accessed by atomics only, from any thread.
unsafe impl Sync for Memory {}

impl Memory {
    pub(crate) fn new(len: usize) -> Self {
        // Inherited by children on purpose: no close-on-exec flag.
        let file = memfd_create(c"fifo", MFdFlags::empty()).unwrap();
        nix::unistd::ftruncate(&file, len as i64).unwrap();
        let none = ProtFlags::PROT_NONE;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let around = NonZeroUsize::new(PAGE + len + PAGE).unwrap();
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let outer = unsafe { mmap_anonymous(None, around, none, MapFlags::MAP_PRIVATE) }.unwrap();
        let size = NonZeroUsize::new(len).unwrap();
        let within = outer.addr().checked_add(PAGE).unwrap();
        // SAFETY: replaces the inside of the mapping just made.
        let base =
            unsafe { mmap(Some(within), size, access, MapFlags::MAP_SHARED | MapFlags::MAP_FIXED, &file, 0) };
        Self { file, base: base.unwrap().cast(), len }
    }

    /// Memory with a region created in it.
    pub(crate) fn with_region(geometry: Geometry) -> (Self, Region) {
        let memory = Self::new(geometry.used_size());
        // SAFETY: the mapping is only unmapped with `memory`, which the callers keep until they are done.
        let region = unsafe { Region::create(memory.base, memory.len, geometry) }.unwrap();
        (memory, region)
    }

    pub(crate) fn open(&self) -> Result<Region, Error> {
        // SAFETY: as in `with_region`.
        unsafe { Region::open(self.base, self.len) }
    }

    /// The 32-bit word at `offset`, as the other side sees it.
    pub(crate) fn word(&self, offset: usize) -> &std::sync::atomic::AtomicU32 {
        assert!(offset + 4 <= self.len && offset.is_multiple_of(4));
        // SAFETY: within the mapping, aligned, and accessed by atomics only.
        unsafe { std::sync::atomic::AtomicU32::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, its surroundings included; the test is done with the region.
        unsafe { munmap(self.base.sub(PAGE).cast(), PAGE + self.len + PAGE) }.unwrap();
    }
}
