//! Where everything lies in the region, and how the words that carry more than one value are packed.
//!
//! Nothing here touches memory. The C header is printed from this file by `examples/c_header.rs`.
//! Fields that different sides write are [`LINE`] bytes apart, two cache lines, because hardware prefetchers
//! fetch lines in pairs. All words are little-endian and naturally aligned.

/// Distance between fields that different sides write, bytes.
pub const LINE: usize = 128;

/// First eight bytes of a region: `IVCPUFIF` read as a little-endian word.
pub const MAGIC: u64 = u64::from_le_bytes(*b"IVCPUFIF");
/// Version of this layout and protocol. A reader rejects any other.
pub const VERSION: u32 = 1;
/// Feature bits this version defines: none. A reader rejects a region with bits it does not know.
pub const FEATURES: u32 = 0;

/// u64: [`MAGIC`], written last when a region is created.
pub const MAGIC_AT: usize = 0x00;
/// u32: [`VERSION`].
pub const VERSION_AT: usize = 0x08;
/// u32: feature bits, see [`FEATURES`].
pub const FEATURES_AT: usize = 0x0c;
/// u64: bytes in the region that this layout accounts for; the carrier may be larger.
pub const REGION_SIZE_AT: usize = 0x10;
/// u32: number of rings, 1 to [`MAX_RINGS`].
pub const RINGS_AT: usize = 0x18;
/// u32: sources a ring, and slots a ring: a power of two, 1 to [`MAX_SOURCES`].
pub const SOURCES_AT: usize = 0x1c;
/// u32: offset of ring 0, [`HEADER_SIZE`] in this version.
pub const RING_OFFSET_AT: usize = 0x20;
/// u32: bytes from one ring to the next, [`RING_STRIDE`] in this version.
pub const RING_STRIDE_AT: usize = 0x24;
/// u32, consumer writes: what it is doing, see [`State`].
pub const STATE_AT: usize = LINE;
/// u32, consumer writes: the token of the consumer that attached last; 0 = nobody yet.
pub const OWNER_AT: usize = LINE + 4;
/// u32, host writes: advice to the consumer, see [`HINT_CONTENDED`].
pub const HINTS_AT: usize = 2 * LINE;
/// u64, both write: bit r = ring r may hold entries and is looked at by the consumer.
pub const SUMMARY_AT: usize = 3 * LINE;
/// Bytes before ring 0: one page.
pub const HEADER_SIZE: usize = 4096;

/// u32, producer writes: sequence of the entry it will write next.
pub const RING_HEAD_AT: usize = 0x000;
/// u32 a source, both write: not 0 = a completion of this source is announced and not yet taken.
pub const RING_PENDING_AT: usize = 0x400;
/// u64 a source, producer writes: which virtqueue it is, see [`Binding`].
pub const RING_DIRECTORY_AT: usize = 0x800;
/// u64 a slot, producer writes: see [`Entry`].
pub const RING_SLOTS_AT: usize = 0x1000;
/// Bytes from one ring to the next; also the bytes a producer locks to own the ring.
pub const RING_STRIDE: usize = 0x2000;

/// Most rings a region can have: the bits of the summary word.
pub const MAX_RINGS: usize = 64;
/// Most sources, and so slots, a ring can have.
pub const MAX_SOURCES: usize = 256;
/// Regions are created in multiples of this, because virtio-pmem asks for it.
pub const REGION_ALIGN: usize = 2 << 20;

/// Hint bit: the host runs more on the IVCPU's core than the IVCPU; sleep as soon as there is no work.
pub const HINT_CONTENDED: u32 = 1;

/// State word, low two bits: no consumer; complete by interrupt, leave the rings alone.
pub const STATE_ABSENT: u32 = 0;
/// State word, low two bits: the consumer polls.
pub const STATE_AWAKE: u32 = 1;
/// State word, low two bits: the consumer sleeps or is about to; a new entry needs the source's `call`.
pub const STATE_SLEEPING: u32 = 2;
/// Which bits of the state word are the state; the rest is the epoch, +1 at every change.
pub const STATE_MASK: u32 = 3;

/// Binding word: bits that are the guest-physical address.
pub const BINDING_ADDRESS_MASK: u64 = (1 << BINDING_GENERATION_SHIFT) - 1;
/// Binding word: lowest bit of the generation.
pub const BINDING_GENERATION_SHIFT: u32 = 52;
/// Values a generation can take before it wraps.
pub const GENERATION_MASK: u16 = 0xfff;

/// Entry word: lowest bit of the sequence.
pub const ENTRY_SEQUENCE_SHIFT: u32 = 32;

/// Sequence of the first entry ever written to a ring, so that a zeroed slot is an old one.
pub const FIRST_SEQUENCE: u32 = 1;

// Every offset and size above, checked against its neighbours.
const _: () = {
    assert!(MAGIC_AT == 0 && VERSION_AT == MAGIC_AT + 8 && FEATURES_AT == VERSION_AT + 4);
    assert!(REGION_SIZE_AT == FEATURES_AT + 4 && REGION_SIZE_AT.is_multiple_of(8));
    assert!(RINGS_AT == REGION_SIZE_AT + 8 && SOURCES_AT == RINGS_AT + 4);
    assert!(RING_OFFSET_AT == SOURCES_AT + 4 && RING_STRIDE_AT == RING_OFFSET_AT + 4);
    assert!(RING_STRIDE_AT + 4 <= STATE_AT);
    assert!(STATE_AT == 0x80 && OWNER_AT == 0x84 && HINTS_AT == 0x100 && SUMMARY_AT == 0x180);
    assert!(SUMMARY_AT + LINE <= HEADER_SIZE && HEADER_SIZE == 0x1000);
    assert!(RING_HEAD_AT + LINE <= RING_PENDING_AT);
    assert!(RING_PENDING_AT + 4 * MAX_SOURCES == RING_DIRECTORY_AT);
    assert!(RING_DIRECTORY_AT + 8 * MAX_SOURCES == RING_SLOTS_AT);
    assert!(RING_SLOTS_AT + 8 * MAX_SOURCES <= RING_STRIDE && RING_STRIDE.is_multiple_of(4096));
    assert!(MAX_RINGS == u64::BITS as usize && MAX_SOURCES == u8::MAX as usize + 1);
    assert!(Geometry::DEFAULT.region_size() == REGION_ALIGN);
};

/// How many rings a region has and how many sources each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    rings: u8,
    sources: u16,
}

impl Geometry {
    /// Sixteen producer threads with 256 virtqueues each.
    pub const DEFAULT: Self = Self { rings: 16, sources: 256 };

    /// `None` unless 1 <= `rings` <= [`MAX_RINGS`] and `sources` is a power of two up to [`MAX_SOURCES`].
    pub const fn new(rings: u32, sources: u32) -> Option<Self> {
        let fits = rings >= 1 && rings as usize <= MAX_RINGS && sources as usize <= MAX_SOURCES;
        if fits && sources.is_power_of_two() {
            Some(Self { rings: rings as u8, sources: sources as u16 })
        } else {
            None
        }
    }

    /// Number of rings, 1 to 64.
    pub const fn rings(self) -> usize {
        self.rings as usize
    }

    /// Sources, and slots, of each ring: a power of two, 1 to 256.
    pub const fn sources(self) -> usize {
        self.sources as usize
    }

    /// Bytes the header and the rings take.
    pub const fn used_size(self) -> usize {
        HEADER_SIZE + self.rings() * RING_STRIDE
    }

    /// Bytes a region of this geometry is created with.
    pub const fn region_size(self) -> usize {
        self.used_size().next_multiple_of(REGION_ALIGN)
    }

    /// Offset and length of the bytes of ring `ring`: what its producer locks in the region's file.
    pub const fn lock_range(self, ring: usize) -> Option<(usize, usize)> {
        if ring < self.rings() { Some((HEADER_SIZE + ring * RING_STRIDE, RING_STRIDE)) } else { None }
    }
}

/// What the consumer is doing, as the state word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No consumer, or a word that makes no sense.
    Absent,
    /// It polls.
    Awake,
    /// It sleeps or is about to.
    Sleeping,
}

impl State {
    /// Reads a state word; anything unknown is [`State::Absent`], with which a producer is always right.
    pub const fn from_word(word: u32) -> Self {
        match word & STATE_MASK {
            STATE_AWAKE => Self::Awake,
            STATE_SLEEPING => Self::Sleeping,
            _ => Self::Absent,
        }
    }

    /// The word that follows `previous`: this state, and the next epoch.
    pub const fn after(self, previous: u32) -> u32 {
        let state = match self {
            Self::Absent => STATE_ABSENT,
            Self::Awake => STATE_AWAKE,
            Self::Sleeping => STATE_SLEEPING,
        };
        (previous & !STATE_MASK).wrapping_add(STATE_MASK + 1) | state
    }
}

/// A directory word: the virtqueue a source stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Guest-physical address of the virtqueue's used ring (of its device area if the ring is packed), below
    /// 2^52; 0 = the source is free.
    pub used_ring: u64,
    /// +1 at every change of this source's binding, modulo 4096.
    pub generation: u16,
}

impl Binding {
    /// Unpacks a directory word.
    pub const fn from_word(word: u64) -> Self {
        Self {
            used_ring: word & BINDING_ADDRESS_MASK,
            generation: (word >> BINDING_GENERATION_SHIFT) as u16 & GENERATION_MASK,
        }
    }

    /// Packs a directory word.
    pub const fn to_word(self) -> u64 {
        (self.used_ring & BINDING_ADDRESS_MASK)
            | ((self.generation & GENERATION_MASK) as u64) << BINDING_GENERATION_SHIFT
    }
}

/// A slot's word: one completion, and by its sequence the proof that the slot holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Position in the ring's endless stream; the slot is the sequence modulo the number of slots.
    pub sequence: u32,
    /// The source, below the ring's number of sources.
    pub source: u32,
}

impl Entry {
    /// Unpacks a slot's word.
    pub const fn from_word(word: u64) -> Self {
        Self { sequence: (word >> ENTRY_SEQUENCE_SHIFT) as u32, source: word as u32 }
    }

    /// Packs a slot's word.
    pub const fn to_word(self) -> u64 {
        (self.sequence as u64) << ENTRY_SEQUENCE_SHIFT | self.source as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometry_rejects_what_does_not_fit() {
        for (rings, sources) in [(0, 2), (65, 2), (1, 0), (1, 3), (1, 512), (u32::MAX, 1), (257, 256)] {
            assert_eq!(Geometry::new(rings, sources), None, "{rings} rings, {sources} sources");
        }
        assert_eq!(Geometry::new(64, 256).unwrap().used_size(), 0x1000 + 64 * 0x2000);
        assert_eq!(Geometry::DEFAULT.lock_range(15), Some((0x1000 + 15 * 0x2000, 0x2000)));
        assert_eq!(Geometry::DEFAULT.lock_range(16), None);
    }

    #[test]
    fn words_pack_and_unpack() {
        let entry = Entry { sequence: 0xfedc_ba98, source: 0xff };
        assert_eq!(entry.to_word(), 0xfedc_ba98_0000_00ff);
        assert_eq!(Entry::from_word(entry.to_word()), entry);
        let binding = Binding { used_ring: 0xf_ffff_ffff_fffc, generation: 0xabc };
        assert_eq!(binding.to_word(), 0xabcf_ffff_ffff_fffc);
        assert_eq!(Binding::from_word(binding.to_word()), binding);
    }

    #[test]
    fn state_changes_keep_counting_and_nonsense_is_absent() {
        let awake = State::Awake.after(0);
        let sleeping = State::Sleeping.after(awake);
        assert_eq!((awake, sleeping), (5, 10));
        assert_eq!(State::from_word(sleeping), State::Sleeping);
        assert_eq!(State::Absent.after(u32::MAX), 0);
        assert_eq!(State::from_word(3), State::Absent);
    }
}
