//! The configuration space of one function: what is read-only, what the guest may write, and where its BARs are.
//!
//! Every byte has a mask of the bits a guest may change. Sizing a BAR then works by itself: the bits below its size are
//! read-only zeros.

/// Bytes of conventional configuration space.
pub const SIZE: usize = 256;
/// BAR registers of a function.
pub const BARS: usize = 6;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR_0: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
/// Where the expansion ROM's BAR is.
const ROM: usize = 0x30;
const CAPABILITIES_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const HEADER_TYPE: usize = 0x0e;
const HEADER_TYPE_MULTI_FUNCTION: u8 = 1 << 7;
/// Most capabilities that fit.
const MOST_CAPABILITIES: usize = (SIZE - FIRST_CAPABILITY) / 4;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_WRITABLE: u16 = 0x0406;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const BAR_64_BIT: u32 = 0b100;
const BAR_PREFETCHABLE: u32 = 0b1000;

/// What a function says it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass and programming interface, as in 0xCCSSPP.
    pub class: u32,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// How a memory BAR decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarKind {
    /// 64 bits of address, in two registers.
    pub is_64_bit: bool,
    /// Reads have no side effects.
    pub prefetchable: bool,
}

#[derive(Debug, Clone, Copy)]
struct Bar {
    index: usize,
    kind: BarKind,
    size: u64,
}

/// A place in a BAR of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Which BAR.
    pub bar: usize,
    /// Guest-physical start.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

/// Configuration space of one function.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    bars: Vec<Bar>,
    next_capability: usize,
    last_link: usize,
}

impl ConfigSpace {
    /// A function with this identity, no BAR and no capability.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bars: Vec::new(),
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITIES_POINTER,
        };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &[identity.revision]);
        space.set(0x09, &identity.class.to_le_bytes()[..3]);
        space.set(SUBSYSTEM_VENDOR, &identity.subsystem_vendor.to_le_bytes());
        space.set(SUBSYSTEM_VENDOR + 2, &identity.subsystem.to_le_bytes());
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        // The interrupt line register is a notepad for the guest.
        space.writable[INTERRUPT_LINE] = 0xff;
        space
    }

    /// A function that looks like another one: its identity and capabilities, but no BAR, ROM and interrupt pin, and alone in
    /// its slot. Of it the guest may change what it may of a new one.
    pub fn like(bytes: &[u8; SIZE]) -> Self {
        let mut space = Self::new(Identity::default());
        space.bytes = *bytes;
        space.bytes[COMMAND..COMMAND + 2].fill(0);
        space.bytes[BAR_0..BAR_0 + 4 * BARS].fill(0);
        space.bytes[ROM..ROM + 4].fill(0);
        space.bytes[INTERRUPT_PIN] = 0;
        space.bytes[HEADER_TYPE] &= !HEADER_TYPE_MULTI_FUNCTION;
        space
    }

    /// Where the capability with this id begins.
    pub fn find_capability(&self, id: u8) -> Option<usize> {
        if self.word(STATUS) & STATUS_CAPABILITIES == 0 {
            return None;
        }
        let mut at = CAPABILITIES_POINTER;
        for _ in 0..MOST_CAPABILITIES {
            at = usize::from(self.bytes[at] & !3);
            if at < FIRST_CAPABILITY {
                return None;
            }
            if self.bytes[at] == id {
                return Some(at);
            }
            at += 1;
        }
        None
    }

    /// Lets the guest change these bits from `offset` on, and no others there.
    pub fn allow(&mut self, offset: usize, writable: &[u8]) {
        self.writable[offset..offset + writable.len()].copy_from_slice(writable);
    }

    /// Adds a 64-bit prefetchable memory BAR of `size` bytes (a power of two) at `address`, in registers `index` and
    /// `index + 1`. Configuration by the VMM's own code: a wrong index or size is a bug there.
    pub fn add_bar(&mut self, index: usize, size: u64, address: u64) {
        self.add_bar_of_kind(index, BarKind { is_64_bit: true, prefetchable: true }, size, address);
    }

    /// The same, of any kind.
    pub fn add_bar_of_kind(&mut self, index: usize, kind: BarKind, size: u64, address: u64) {
        let registers = if kind.is_64_bit { 2 } else { 1 };
        assert!(
            index + registers <= BARS && size.is_power_of_two() && size >= 16 && address.is_multiple_of(size)
        );
        let offset = BAR_0 + 4 * index;
        let mut value = address | if kind.prefetchable { u64::from(BAR_PREFETCHABLE) } else { 0 };
        if kind.is_64_bit {
            value |= u64::from(BAR_64_BIT);
        }
        self.writable[offset..offset + 4 * registers]
            .copy_from_slice(&(!(size - 1)).to_le_bytes()[..4 * registers]);
        self.set(offset, &value.to_le_bytes()[..4 * registers]);
        self.bars.push(Bar { index, kind, size });
    }

    /// Appends a capability with this id and body (what follows id and link) and returns where it begins. `writable` are the bits
    /// of the body a guest may change; bytes beyond it are read-only.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let offset = self.next_capability;
        let end = offset + 2 + body.len();
        assert!(end <= SIZE && writable.len() <= body.len());
        self.set(self.last_link, &[offset as u8]);
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        self.writable[offset + 2..offset + 2 + writable.len()].copy_from_slice(writable);
        self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.last_link = offset + 1;
        self.next_capability = end.next_multiple_of(4);
        offset
    }

    fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// The guest reads; what is not there reads as ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = offset.checked_add(index).and_then(|at| self.bytes.get(at)).copied().unwrap_or(0xff);
        }
    }

    /// The guest writes; only bits it may change do.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (index, value) in data.iter().enumerate() {
            let Some(at) = offset.checked_add(index).filter(|&at| at < SIZE) else { return };
            let mask = self.writable[at];
            self.bytes[at] = (self.bytes[at] & !mask) | (value & mask);
        }
    }

    /// The two bytes at `offset`, for the VMM's own use.
    pub fn word(&self, offset: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Where the BARs are now; nothing while memory decoding is off.
    pub fn mappings(&self) -> Vec<Mapping> {
        if self.bytes[COMMAND] & COMMAND_MEMORY == 0 {
            return Vec::new();
        }
        let mapping = |bar: &Bar| {
            let mut bytes = [0; 8];
            let registers = if bar.kind.is_64_bit { 8 } else { 4 };
            self.read(BAR_0 + 4 * bar.index, &mut bytes[..registers]);
            let start = u64::from_le_bytes(bytes) & !(bar.size - 1);
            // A BAR at zero or past the end of the address space decodes nothing.
            (start != 0 && start.checked_add(bar.size).is_some()).then_some(Mapping {
                bar: bar.index,
                start,
                size: bar.size,
            })
        };
        self.bars.iter().filter_map(mapping).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn function() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1041,
            class: 0x02_0000,
            ..Default::default()
        });
        space.add_bar(0, 0x8000, 0x1_0000_0000);
        space.add_capability(0x11, &[0; 10], &[0, 0xc0]);
        space.add_capability(0x09, &[1, 2, 3], &[]);
        space
    }

    fn dword(space: &ConfigSpace, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        space.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn a_bar_is_sized_by_writing_ones() {
        let mut space = function();
        space.write(0x10, &[0xff; 4]);
        space.write(0x14, &[0xff; 4]);
        assert_eq!(dword(&space, 0x10), 0xffff_8000 | 0xc);
        assert_eq!(dword(&space, 0x14), 0xffff_ffff);
        assert_eq!(dword(&space, 0x18), 0, "no BAR there");
    }

    #[test]
    fn a_bar_decodes_only_while_memory_is_on() {
        let mut space = function();
        assert!(space.mappings().is_empty());
        space.write(COMMAND, &[2, 0]);
        assert_eq!(space.mappings(), [Mapping { bar: 0, start: 0x1_0000_0000, size: 0x8000 }]);
        space.write(0x10, &0xffff_8000u32.to_le_bytes());
        space.write(0x14, &0xffff_ffffu32.to_le_bytes());
        assert!(space.mappings().is_empty(), "would wrap");
    }

    #[test]
    fn a_32_bit_bar_leaves_the_next_register_alone() {
        let mut space = function();
        space.add_bar_of_kind(2, BarKind { is_64_bit: false, prefetchable: false }, 0x1000, 0xc000_0000);
        space.write(0x18, &[0xff; 8]);
        assert_eq!((dword(&space, 0x18), dword(&space, 0x1c)), (0xffff_f000, 0));
        space.write(0x18, &0xd000_0000u32.to_le_bytes());
        space.write(COMMAND, &[2, 0]);
        assert_eq!(space.mappings()[1], Mapping { bar: 2, start: 0xd000_0000, size: 0x1000 });
    }

    #[test]
    fn a_lookalike_has_the_capabilities_and_neither_bars_nor_pin() {
        let mut bytes = function().bytes;
        bytes[HEADER_TYPE] = 0x80;
        bytes[INTERRUPT_PIN] = 1;
        let space = ConfigSpace::like(&bytes);
        assert_eq!((dword(&space, 0), dword(&space, 0x10)), (0x1041_1af4, 0));
        assert_eq!((space.bytes[HEADER_TYPE], space.bytes[INTERRUPT_PIN]), (0, 0));
        assert_eq!([0x11, 0x09, 0x05].map(|id| space.find_capability(id)), [Some(0x40), Some(0x4c), None]);
    }

    #[test]
    fn a_list_of_capabilities_that_goes_round_ends() {
        let mut space = function();
        space.set(0x4d, &[0x40]);
        assert_eq!(space.find_capability(0x05), None);
        space.set(0x4d, &[0xff]);
        assert_eq!(space.find_capability(0x05), None);
    }

    #[test]
    fn capabilities_are_linked() {
        let space = function();
        let first = dword(&space, 0x34) as usize & 0xff;
        assert_eq!(first, 0x40);
        assert_eq!(dword(&space, first) & 0xffff, 0x4c11);
        assert_eq!(dword(&space, 0x4c), 0x0201_0009);
        assert_ne!(space.word(STATUS) & STATUS_CAPABILITIES, 0);
    }

    proptest! {
        #[test]
        fn identity_and_links_survive_any_writes(
            writes in proptest::collection::vec((0usize..0x2000, proptest::collection::vec(any::<u8>(), 0..9)), 0..64)
        ) {
            let mut space = function();
            let before: Vec<u32> = [0x00, 0x08, 0x2c, 0x34, 0x40].map(|at| dword(&space, at)).to_vec();
            for (offset, data) in writes {
                space.write(offset, &data);
                space.mappings();
                let mut out = vec![0; data.len()];
                space.read(offset, &mut out);
            }
            let mut after: Vec<u32> = [0x00, 0x08, 0x2c, 0x34, 0x40].map(|at| dword(&space, at)).to_vec();
            after[4] &= 0x3fff_ffff;
            prop_assert_eq!(before, after);
            prop_assert_eq!(dword(&space, 0x10) & 0x7fff, 0xc);
        }
    }
}
