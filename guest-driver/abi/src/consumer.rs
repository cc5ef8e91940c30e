//! The IVCPU's side: one consumer for all rings of a region.
//!
//! A look costs one load of the summary and one load for each ring whose bit is set there, whatever the number
//! of sources. A ring that stays empty beside a busy one loses its bit; the last one keeps it, so that with one
//! active ring a hand-over is a matter of the slot's line and the pending word's.

use core::sync::atomic::Ordering;

use crate::layout::{Binding, HINT_CONTENDED, MAX_RINGS, State};
use crate::region::Region;
use crate::sleep;
use crate::spsc::{Next, ReadEnd};

/// A completion handed out: look at the source's used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The ring it came from.
    pub ring: usize,
    /// The source within that ring.
    pub source: u32,
    /// The virtqueue the source stands for. One kept for this source is still the same if the binding is.
    pub binding: Binding,
}

/// What to do after [`Consumer::prepare_sleep`].
#[must_use = "the consumer has to go to sleep, to poll on or to stop"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sleep {
    /// Sleep until called, then [`Consumer::wake`]. The means of sleeping must remember a call that comes first.
    Now,
    /// Stay awake: there is something to poll.
    NotYet,
    /// Another consumer attached to the region: stop, and touch it no more.
    Replaced,
}

/// The consumer of all rings.
#[derive(Debug)]
pub struct Consumer {
    region: Region,
    owner: u32,
    cool_after: u32,
    ends: [Option<ReadEnd>; MAX_RINGS],
    /// Looks in a row that found the ring empty beside others.
    empty: [u32; MAX_RINGS],
    /// The ring to look at first.
    turn: u32,
    /// Rings whose pending words are being looked at, the lowest one from source `scan_at` on.
    scan: u64,
    scan_at: u32,
    rescans: u64,
}

impl Consumer {
    /// Attaches to the region, in the place of any other consumer. `owner` is a number, not 0, that no other
    /// consumer has. A ring leaves the polled set after `cool_after` empty looks (64 is a good value).
    ///
    /// Completions announced before are handed out too.
    pub fn attach(region: Region, owner: u32, cool_after: u32) -> Self {
        region.owner().store(owner, Ordering::Relaxed);
        sleep::publish(&region, State::Awake);
        let mut consumer = Self {
            region,
            owner,
            cool_after,
            ends: [None; MAX_RINGS],
            empty: [0; MAX_RINGS],
            turn: 0,
            scan: 0,
            scan_at: 0,
            rescans: 0,
        };
        consumer.rescan();
        consumer.rescans = 0;
        consumer
    }

    /// The next completion, if there is any.
    #[inline]
    pub fn poll(&mut self) -> Option<Completion> {
        if self.scan != 0
            && let Some(completion) = self.scan()
        {
            return Some(completion);
        }
        let mut hot = sleep::hot_rings(&self.region);
        let mut left = hot.rotate_right(self.turn);
        while left != 0 {
            let ring = (left.trailing_zeros() + self.turn) % u64::BITS;
            left &= left - 1;
            if let Some(completion) = self.take_from(ring as usize, &mut hot) {
                self.turn = (ring + 1) % u64::BITS;
                return Some(completion);
            }
        }
        None
    }

    #[inline]
    fn take_from(&mut self, ring: usize, hot: &mut u64) -> Option<Completion> {
        let sources = self.region.geometry().sources();
        let end = self.ends[ring].as_mut()?;
        // An entry whose pending word is clear was served before, one whose source is free is dropped; there are
        // at most as many as slots.
        for _ in 0..sources {
            match end.peek() {
                Next::Ready(entry) => {
                    end.advance();
                    self.empty[ring] = 0;
                    let source = entry.source;
                    if (source as usize) < sources
                        && let Some(binding) = end.take(source)
                    {
                        return Some(Completion { ring, source, binding });
                    }
                }
                Next::Empty => {
                    // The last ring stays.
                    if hot.count_ones() > 1 && self.has_cooled(ring) {
                        *hot &= !(1 << ring);
                    }
                    return None;
                }
                Next::Gap => {
                    self.resync(ring);
                    return self.scan();
                }
            }
        }
        None
    }

    /// Takes a ring out of the polled set once it has been empty for long.
    fn has_cooled(&mut self, ring: usize) -> bool {
        self.empty[ring] += 1;
        if self.empty[ring] < self.cool_after {
            return false;
        }
        self.empty[ring] = 0;
        sleep::cool(&self.region, 1 << ring);
        let is_empty = self.ends[ring].is_none_or(|end| end.peek() == Next::Empty);
        if !is_empty {
            sleep::warm(&self.region, 1 << ring);
        }
        is_empty
    }

    /// Looks at every pending word of every ring once, during the next polls. For a consumer that is called
    /// although it is awake: the producer found it too slow, or something is wrong with the rings.
    pub fn rescan(&mut self) {
        for ring in 0..self.region.geometry().rings() {
            self.resync(ring);
        }
    }

    fn resync(&mut self, ring: usize) {
        self.ends[ring] = self.region.ring(ring).map(ReadEnd::at_head);
        self.scan |= 1 << ring;
        self.scan_at = 0;
        self.rescans += 1;
    }

    fn scan(&mut self) -> Option<Completion> {
        while self.scan != 0 {
            let ring = self.scan.trailing_zeros() as usize;
            if let Some(end) = self.ends[ring] {
                while (self.scan_at as usize) < self.region.geometry().sources() {
                    let source = self.scan_at;
                    self.scan_at += 1;
                    if let Some(binding) = end.take_if_announced(source) {
                        return Some(Completion { ring, source, binding });
                    }
                }
            }
            self.scan &= self.scan - 1;
            self.scan_at = 0;
        }
        None
    }

    /// How often the pending words of a ring were looked at because its entries made no sense, or by `rescan`.
    pub fn rescans(&self) -> u64 {
        self.rescans
    }

    /// Whether the host asks to sleep at once rather than to poll without work.
    pub fn is_contended(&self) -> bool {
        self.region.hints().load(Ordering::Relaxed) & HINT_CONTENDED != 0
    }

    /// Says that the consumer sleeps and looks at the rings once more. Only after [`Sleep::Now`] it does.
    pub fn prepare_sleep(&mut self) -> Sleep {
        if self.region.owner().load(Ordering::Relaxed) != self.owner {
            return Sleep::Replaced;
        }
        sleep::publish(&self.region, State::Sleeping);
        if self.has_work() {
            self.wake();
            return Sleep::NotYet;
        }
        Sleep::Now
    }

    fn has_work(&mut self) -> bool {
        if self.scan != 0 {
            return true;
        }
        let hot = sleep::hot_rings(&self.region);
        for (ring, end) in self.ends.iter().enumerate() {
            if hot >> ring & 1 == 0 {
                continue;
            }
            match end.map(|end| end.peek_in_step()) {
                None | Some(Next::Empty) => {}
                Some(Next::Ready(_)) => return true,
                Some(Next::Gap) => {
                    self.resync(ring);
                    return true;
                }
            }
        }
        false
    }

    /// Says that the consumer is awake. Poll afterwards.
    pub fn wake(&mut self) {
        sleep::publish(&self.region, State::Awake);
    }

    /// Leaves the region: from now on completions come as interrupts. Those announced before are handed to
    /// `last`.
    pub fn detach(mut self, mut last: impl FnMut(Completion)) {
        sleep::publish(&self.region, State::Absent);
        self.rescan();
        while let Some(completion) = self.scan() {
            last(completion);
        }
    }
}
