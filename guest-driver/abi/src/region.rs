//! The region's memory: the only file of this crate with unsafe code.
//!
//! The other side can write any byte at any time, so no reference to plain data is ever made into the region:
//! every access is an atomic one at an offset that this file keeps inside the region.

use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{self, AtomicU32, AtomicU64, Ordering};

use crate::layout::*;
use crate::sleep::Fence;

/// Why a region cannot be created or used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The mapping does not start on a page.
    Misaligned,
    /// The mapping is smaller than what it has to hold; both in bytes.
    TooSmall {
        /// Bytes mapped.
        mapped: usize,
        /// Bytes needed.
        needed: usize,
    },
    /// The first eight bytes are not the magic: no FIFO region, or one not completely created.
    Magic(u64),
    /// A version this crate does not speak.
    Version(u32),
    /// Feature bits this crate does not know.
    Features(u32),
    /// Sizes in the header that version 1 cannot have.
    Geometry {
        /// Number of rings.
        rings: u32,
        /// Sources a ring.
        sources: u32,
        /// Offset of ring 0.
        ring_offset: u32,
        /// Bytes from one ring to the next.
        ring_stride: u32,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Misaligned => write!(f, "the FIFO region is not mapped on a page boundary"),
            Self::TooSmall { mapped, needed } => {
                write!(f, "the FIFO region has {mapped} bytes and needs {needed}; create it anew")
            }
            Self::Magic(magic) => {
                write!(f, "no FIFO region: it starts with {magic:#x} instead of {MAGIC:#x}; create it first")
            }
            Self::Version(version) => {
                write!(f, "the FIFO region has version {version}, this program speaks {VERSION}")
            }
            Self::Features(bits) => write!(f, "the FIFO region needs unknown features {bits:#x}"),
            Self::Geometry { rings, sources, ring_offset, ring_stride } => write!(
                f,
                "the FIFO region's header makes no sense: {rings} rings of {sources} sources, \
                 first at {ring_offset:#x}, {ring_stride:#x} bytes each; create it anew"
            ),
        }
    }
}

impl core::error::Error for Error {}

/// A mapped region whose header has been checked. A cheap handle; it does not own the mapping.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    base: NonNull<u8>,
    geometry: Geometry,
}

// SAFETY: the handle is a pointer to memory that is only accessed by atomics, from any number of threads.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Lays out a region in `len` bytes at `base`, whatever they hold: rings empty, no sources, no consumer.
    ///
    /// # Safety
    ///
    /// The bytes must stay mapped, readable and writable, and must be accessed by nothing but atomics in this
    /// program, for as long as the returned handle or anything made from it is used.
    pub unsafe fn create(base: NonNull<u8>, len: usize, geometry: Geometry) -> Result<Self, Error> {
        // SAFETY: promised by the caller.
        let region = unsafe { Self::over(base, len, geometry)? };
        region.u64(MAGIC_AT).store(0, Ordering::SeqCst);
        for offset in (MAGIC_AT + 8..geometry.used_size()).step_by(8) {
            region.u64(offset).store(0, Ordering::Relaxed);
        }
        region.u32(VERSION_AT).store(VERSION, Ordering::Relaxed);
        region.u32(FEATURES_AT).store(FEATURES, Ordering::Relaxed);
        region.u64(REGION_SIZE_AT).store(len as u64, Ordering::Relaxed);
        region.u32(RINGS_AT).store(geometry.rings() as u32, Ordering::Relaxed);
        region.u32(SOURCES_AT).store(geometry.sources() as u32, Ordering::Relaxed);
        region.u32(RING_OFFSET_AT).store(HEADER_SIZE as u32, Ordering::Relaxed);
        region.u32(RING_STRIDE_AT).store(RING_STRIDE as u32, Ordering::Relaxed);
        for ring in (0..geometry.rings()).filter_map(|index| region.ring(index)) {
            ring.head().store(FIRST_SEQUENCE, Ordering::Relaxed);
        }
        region.u64(MAGIC_AT).store(MAGIC, Ordering::Release);
        Ok(region)
    }

    /// Checks the header of the region in `len` bytes at `base`. Its geometry is read once, here.
    ///
    /// # Safety
    ///
    /// As for [`Region::create`].
    pub unsafe fn open(base: NonNull<u8>, len: usize) -> Result<Self, Error> {
        let smallest = Geometry::new(1, 1).expect("one ring of one source is a geometry");
        // SAFETY: promised by the caller.
        let header = unsafe { Self::over(base, len, smallest)? };
        let word = |offset| header.u32(offset).load(Ordering::Relaxed);
        let magic = header.u64(MAGIC_AT).load(Ordering::Acquire);
        if magic != MAGIC {
            return Err(Error::Magic(magic));
        }
        let (version, features) = (word(VERSION_AT), word(FEATURES_AT));
        if version != VERSION {
            return Err(Error::Version(version));
        }
        if features & !FEATURES != 0 {
            return Err(Error::Features(features & !FEATURES));
        }
        let (rings, sources) = (word(RINGS_AT), word(SOURCES_AT));
        let (ring_offset, ring_stride) = (word(RING_OFFSET_AT), word(RING_STRIDE_AT));
        let here = ring_offset as usize == HEADER_SIZE && ring_stride as usize == RING_STRIDE;
        match Geometry::new(rings, sources) {
            // SAFETY: promised by the caller.
            Some(geometry) if here => unsafe { Self::over(base, len, geometry) },
            _ => Err(Error::Geometry { rings, sources, ring_offset, ring_stride }),
        }
    }

    /// # Safety
    ///
    /// As for [`Region::create`].
    unsafe fn over(base: NonNull<u8>, len: usize, geometry: Geometry) -> Result<Self, Error> {
        if !base.addr().get().is_multiple_of(4096) {
            return Err(Error::Misaligned);
        }
        match geometry.used_size() {
            needed if needed > len => Err(Error::TooSmall { mapped: len, needed }),
            _ => Ok(Self { base, geometry }),
        }
    }

    /// How many rings and sources there are.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// What the consumer is doing now.
    pub fn consumer_state(&self) -> State {
        State::from_word(self.state().load(Ordering::Relaxed))
    }

    /// Host: marks the consumer absent, as a VMM does when it resets the guest.
    pub fn forget_consumer(&self) {
        self.state().store(State::Absent.after(self.state().load(Ordering::Relaxed)), Ordering::SeqCst);
    }

    /// Host: sets or clears [`HINT_CONTENDED`].
    pub fn set_contended(&self, contended: bool) {
        self.hints().store(if contended { HINT_CONTENDED } else { 0 }, Ordering::Relaxed);
    }

    pub(crate) fn state(&self) -> &AtomicU32 {
        self.u32(STATE_AT)
    }

    pub(crate) fn owner(&self) -> &AtomicU32 {
        self.u32(OWNER_AT)
    }

    pub(crate) fn hints(&self) -> &AtomicU32 {
        self.u32(HINTS_AT)
    }

    pub(crate) fn summary(&self) -> &AtomicU64 {
        self.u64(SUMMARY_AT)
    }

    pub(crate) fn ring(&self, index: usize) -> Option<Ring> {
        let (offset, _) = self.geometry.lock_range(index)?;
        Some(Ring { region: *self, offset })
    }

    /// A full fence. The name says which one, and its documentation against which.
    #[inline]
    pub(crate) fn fence(&self, _which: Fence) {
        atomic::fence(Ordering::SeqCst);
    }

    #[inline]
    fn u32(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset + 4 <= self.geometry.used_size() && offset.is_multiple_of(4));
        // SAFETY: whoever made the handle promised that the region is mapped and accessed by atomics only;
        // `over` checked that the geometry's bytes fit and are page-aligned; this file's callers pass an
        // aligned offset of the header, or of a ring that `ring` checked plus a masked index.
        unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    #[inline]
    fn u64(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset + 8 <= self.geometry.used_size() && offset.is_multiple_of(8));
        // SAFETY: as in `u32`.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }
}

/// One ring's words. Indices wrap, so none can leave the ring.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ring {
    region: Region,
    offset: usize,
}

impl Ring {
    pub(crate) fn head(&self) -> &AtomicU32 {
        self.region.u32(self.offset + RING_HEAD_AT)
    }

    #[inline]
    pub(crate) fn pending(&self, source: u32) -> &AtomicU32 {
        self.region.u32(self.offset + RING_PENDING_AT + 4 * self.wrap(source as usize))
    }

    #[inline]
    pub(crate) fn binding(&self, source: u32) -> &AtomicU64 {
        self.region.u64(self.offset + RING_DIRECTORY_AT + 8 * self.wrap(source as usize))
    }

    #[inline]
    pub(crate) fn slot(&self, sequence: u32) -> &AtomicU64 {
        self.region.u64(self.offset + RING_SLOTS_AT + 8 * self.wrap(sequence as usize))
    }

    fn wrap(&self, index: usize) -> usize {
        index & (self.region.geometry.sources() - 1)
    }
}
