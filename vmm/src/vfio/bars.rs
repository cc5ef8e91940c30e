//! BARs: which parts of a function's registers the guest reaches directly, and where they are now.
//!
//! A page can be the guest's own if VFIO can map it and nothing in it is emulated: the MSI-X table is, because what the
//! guest writes there is a message for *its* local APICs. Registers of less than a page, and what shares a page with the
//! table, are read and written on the guest's behalf.

use crate::pci::config::Mapping;
use crate::slot::Slot;

/// Bytes of a page, the unit of what can be mapped.
pub const PAGE: u64 = 4096;

/// A part of a BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Offset in the BAR.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

impl Range {
    /// The offset after it.
    fn end(self) -> u64 {
        self.start.saturating_add(self.size)
    }

    /// Whether `offset` is in it.
    pub fn contains(self, offset: u64) -> bool {
        self.start <= offset && offset < self.end()
    }
}

/// Whole pages of a BAR of `size` bytes that lie in `mappable` and touch nothing of `emulated`.
pub fn direct(size: u64, mappable: &[Range], emulated: &[Range]) -> Vec<Range> {
    let mut ranges: Vec<_> = mappable.iter().map(|range| (range.start, range.end().min(size))).collect();
    for hole in emulated {
        let (from, to) = (hole.start / PAGE * PAGE, hole.end().next_multiple_of(PAGE));
        ranges = ranges
            .into_iter()
            .flat_map(|(start, end)| [(start, end.min(from)), (start.max(to), end)])
            .filter(|(start, end)| start < end)
            .collect();
    }
    let pages = |(start, end): (u64, u64)| {
        let (start, end) = (start.next_multiple_of(PAGE), end / PAGE * PAGE);
        (start < end).then(|| Range { start, size: end - start })
    };
    ranges.into_iter().filter_map(pages).collect()
}

/// A part of a BAR that the guest reaches directly.
struct Direct<S> {
    bar: usize,
    offset: u64,
    slot: S,
    /// Where the guest sees it.
    address: Option<u64>,
}

impl<S: Slot> Direct<S> {
    fn wanted(&self, mappings: &[Mapping]) -> Option<u64> {
        let mapping = mappings.iter().find(|mapping| mapping.bar == self.bar)?;
        mapping.start.checked_add(self.offset)
    }

    fn move_to(&mut self, address: Option<u64>) {
        if self.address == address {
            return;
        }
        self.address = address;
        // The guest can put a BAR where RAM is, or beyond its address width: then nobody answers there.
        if let Err(error) = self.slot.place(address) {
            tracing::info!(
                "BAR {} cannot be at the address {address:#x?} the guest chose: {error}",
                self.bar
            );
        }
    }
}

/// All of them.
pub struct Bars<S>(Vec<Direct<S>>);

impl<S> Default for Bars<S> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<S: Slot> Bars<S> {
    /// Shows `slot`, which is at `offset` in the BAR, wherever the guest puts that.
    pub fn add(&mut self, bar: usize, offset: u64, slot: S) {
        self.0.push(Direct { bar, offset, slot, address: None });
    }

    /// Takes away what is no longer where `mappings` has it. Before the function stops decoding: the kernel answers an access
    /// to what does not decode with a fault that ends the VM.
    pub fn withdraw(&mut self, mappings: &[Mapping]) {
        for direct in &mut self.0 {
            if direct.wanted(mappings) != direct.address {
                direct.move_to(None);
            }
        }
    }

    /// Shows everything where `mappings` has it. After the function has begun to decode.
    pub fn place(&mut self, mappings: &[Mapping]) {
        for direct in &mut self.0 {
            direct.move_to(direct.wanted(mappings));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, size: u64) -> Range {
        Range { start, size }
    }

    #[test]
    fn pages_with_the_msix_table_and_the_pending_bits_are_left_out() {
        let whole = [range(0, 0x4000)];
        assert_eq!(direct(0x4000, &whole, &[]), whole);
        let emulated = [range(0, 48), range(0x2000, 8)];
        assert_eq!(direct(0x4000, &whole, &emulated), [range(0x1000, 0x1000), range(0x3000, 0x1000)]);
        assert_eq!(direct(0x4000, &whole, &[range(0xff8, 16)]), [range(0x2000, 0x2000)], "across two pages");
    }

    #[test]
    fn less_than_a_page_is_not_mapped() {
        assert_eq!(direct(0x200, &[range(0, 0x200)], &[]), []);
        assert_eq!(direct(0x4000, &[], &[]), []);
        assert_eq!(direct(0x4000, &[range(0x800, 0x1800)], &[]), [range(0x1000, 0x1000)]);
    }

    proptest! {
        #[test]
        fn what_is_direct_is_mappable_whole_pages_and_never_emulated(
            size in 0u64..0x8000,
            mappable in proptest::collection::vec((0u64..0x8000, 0u64..0x8000), 0..3),
            emulated in proptest::collection::vec((0u64..0x8000, 0u64..0x3000), 0..3),
        ) {
            let mappable: Vec<_> = mappable.into_iter().map(|(start, size)| range(start, size)).collect();
            let emulated: Vec<_> = emulated.into_iter().filter(|hole| hole.1 > 0).map(|(start, size)| range(start, size)).collect();
            for found in direct(size, &mappable, &emulated) {
                prop_assert!(found.size > 0 && found.start % PAGE == 0 && found.size % PAGE == 0);
                prop_assert!(found.end() <= size);
                prop_assert!(mappable.iter().any(|range| range.start <= found.start && found.end() <= range.end()));
                prop_assert!(emulated.iter().all(|hole| hole.end() <= found.start || found.end() <= hole.start));
            }
        }
    }
}
