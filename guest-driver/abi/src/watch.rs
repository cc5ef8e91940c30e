//! The producer's private memory of which sources it waits for, oldest first: what makes a consumer that says
//! "awake" and no longer is cost a bounded delay instead of a lost completion.

use crate::layout::MAX_SOURCES;

/// Not a source: the end of the list, or not on it.
const NONE: u16 = MAX_SOURCES as u16;
/// Index of the list's anchor, beside the sources.
const ANCHOR: usize = MAX_SOURCES;

/// Sources in the order in which their clocks were started: a doubly linked list through fixed arrays.
#[derive(Debug)]
pub(crate) struct Watch {
    since: [u64; MAX_SOURCES],
    /// Next younger source; the anchor's is the oldest. `on` tells whether a source is on the list.
    younger: [u16; MAX_SOURCES + 1],
    older: [u16; MAX_SOURCES + 1],
    on: [bool; MAX_SOURCES],
}

impl Watch {
    pub(crate) const fn new() -> Self {
        Self {
            since: [0; MAX_SOURCES],
            younger: [NONE; MAX_SOURCES + 1],
            older: [NONE; MAX_SOURCES + 1],
            on: [false; MAX_SOURCES],
        }
    }

    /// Starts the source's clock, anew if it was running.
    pub(crate) fn start(&mut self, source: u8, now: u64) {
        self.stop(source);
        let youngest = self.older[ANCHOR];
        self.link(youngest, u16::from(source));
        self.link(u16::from(source), NONE);
        self.since[usize::from(source)] = now;
        self.on[usize::from(source)] = true;
    }

    pub(crate) fn stop(&mut self, source: u8) {
        let index = usize::from(source);
        if core::mem::take(&mut self.on[index]) {
            self.link(self.older[index], self.younger[index]);
        }
    }

    pub(crate) fn is_running(&self, source: u8) -> bool {
        self.on[usize::from(source)]
    }

    /// The source whose clock has run longest, and since when.
    pub(crate) fn oldest(&self) -> Option<(u8, u64)> {
        let source = u8::try_from(self.younger[ANCHOR]).ok()?;
        Some((source, self.since[usize::from(source)]))
    }

    /// Makes `younger` the successor of `older`; [`NONE`], numerically the anchor, stands for both ends.
    fn link(&mut self, older: u16, younger: u16) {
        self.younger[usize::from(older)] = younger;
        self.older[usize::from(younger)] = older;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    proptest! {
        #[test]
        fn the_oldest_running_clock_is_found(steps in proptest::collection::vec((any::<u8>(), any::<bool>()), 0..600)) {
            let (mut watch, mut model) = (Watch::new(), Vec::<(u8, u64)>::new());
            for (now, (source, start)) in steps.into_iter().enumerate() {
                // Few sources, the extremes among them, so that they come again.
                let source = if source % 2 == 0 { source % 8 } else { 255 - source % 4 };
                model.retain(|(other, _)| *other != source);
                if start {
                    watch.start(source, now as u64);
                    model.push((source, now as u64));
                } else {
                    watch.stop(source);
                }
                prop_assert_eq!(watch.oldest(), model.first().copied());
                prop_assert_eq!(watch.is_running(source), start);
            }
        }
    }
}
