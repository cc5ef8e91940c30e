//! A stretch of guest memory, looked up once and then used many times: the parts of a ring, an indirect table.
//!
//! Looking an address up in the memory map costs more than all the rest of handling a descriptor. So the parts of a
//! ring are looked up when the frontend sets them, and again with every change of the memory map.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// A stretch of guest memory inside of one region. It keeps the memory map, and so the mapping, alive.
pub struct Mapped {
    start: GuestAddress,
    base: *mut u8,
    length: usize,
    _memory: Arc<GuestMemoryMmap>,
}

// SAFETY: `base` points into a mapping that `_memory` keeps alive and that belongs to the whole process.
unsafe impl Send for Mapped {}

impl Mapped {
    /// The `length` bytes at `start`; `None` where they do not lie in one region, or do not start at an even address
    /// of ours (a frontend can map a region anyhow).
    pub fn new(memory: &Arc<GuestMemoryMmap>, start: GuestAddress, length: usize) -> Option<Self> {
        let slice = GuestMemoryBackend::get_slice(&**memory, start, length).ok()?;
        let base = slice.ptr_guard_mut().as_ptr();
        base.cast::<AtomicU16>().is_aligned().then(|| Mapped { start, base, length, _memory: memory.clone() })
    }

    /// Its length.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The buffer of `length` bytes at `address`, if it lies in here.
    pub fn vector(&self, address: GuestAddress, length: usize) -> Option<libc::iovec> {
        let offset = usize::try_from(address.0.checked_sub(self.start.0)?).ok()?;
        let base = self.at(offset, length)?;
        Some(libc::iovec { iov_base: base.cast(), iov_len: length })
    }

    /// A pointer to the `length` bytes at `offset`, if they lie in here.
    fn at(&self, offset: usize, length: usize) -> Option<*mut u8> {
        (offset.checked_add(length)? <= self.length).then(|| self.base.wrapping_add(offset))
    }

    /// The 16-bit word at `offset`, for atomic use.
    fn word(&self, offset: usize) -> Option<&AtomicU16> {
        let word = self.at(offset, size_of::<u16>())?.cast::<u16>();
        // SAFETY: `at` keeps it inside of the mapping, which lives as long as `self`; alignment is checked here; the
        // driver, who is not of our program, uses the word atomically too.
        word.is_aligned().then(|| unsafe { AtomicU16::from_ptr(word) })
    }

    /// Loads the little-endian 16-bit word at `offset`.
    pub fn load(&self, offset: usize, ordering: Ordering) -> Option<u16> {
        self.word(offset).map(|word| u16::from_le(word.load(ordering)))
    }

    /// Stores a little-endian 16-bit word at `offset`; tells whether it lies in here.
    pub fn store(&self, offset: usize, value: u16, ordering: Ordering) -> bool {
        self.word(offset).map(|word| word.store(value.to_le(), ordering)).is_some()
    }

    /// Reads `N` bytes at `offset`, once: what is checked later is what was read, whatever the driver does meanwhile.
    pub fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let from = self.at(offset, N)?;
        // SAFETY: `at` keeps it inside of the mapping; any bytes are a value, and no alignment is needed.
        Some(unsafe { from.cast::<[u8; N]>().read_volatile() })
    }

    /// Writes `N` bytes at `offset`; tells whether they lie in here.
    pub fn write<const N: usize>(&self, offset: usize, bytes: [u8; N]) -> bool {
        // SAFETY: as in `read`.
        self.at(offset, N).map(|to| unsafe { to.cast::<[u8; N]>().write_volatile(bytes) }).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn nothing_outside_can_be_reached() {
        let regions = [(GuestAddress(0x1000), 0x1000), (GuestAddress(0x2000), 0x1000)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap());
        memory.write_obj(0x1234u16.to_le(), GuestAddress(0x1ffe)).unwrap();
        let part = Mapped::new(&memory, GuestAddress(0x1f00), 0x100).unwrap();
        assert_eq!(part.load(0xfe, Ordering::Relaxed), Some(0x1234));
        assert_eq!(part.read(0xfe), Some([0x34, 0x12]));
        assert_eq!(part.load(0xff, Ordering::Relaxed), None);
        assert_eq!(part.load(0x100, Ordering::Relaxed), None);
        assert_eq!(part.read::<16>(0xf1), None);
        assert_eq!(part.read::<16>(usize::MAX - 3), None);
        assert!(!part.store(0x100, 1, Ordering::Relaxed) && !part.write(0xf9, [0; 8]));
        assert!(part.vector(GuestAddress(0x1eff), 1).is_none());
        assert!(part.vector(GuestAddress(0x1fff), 2).is_none());
        assert_eq!(part.vector(GuestAddress(0x1fff), 1).unwrap().iov_len, 1);
        // Over the border of two regions, past the end, and at an odd address.
        assert!(Mapped::new(&memory, GuestAddress(0x1fff), 2).is_none());
        assert!(Mapped::new(&memory, GuestAddress(0x2f00), 0x101).is_none());
        assert!(Mapped::new(&memory, GuestAddress(0x1001), 2).is_none());
    }
}
