//! The host's side of one ring: announces completions and says when an interrupt is needed after all.
//!
//! The guest can write every byte of the region. So whatever bounds work or decides what is in the ring is kept
//! here in private memory; from the region a push reads one pending word, the summary and the state, and each
//! of them, if it lies, only makes the guest's own completion come late, twice or not at all.

use core::sync::atomic::Ordering;

use crate::layout::{Binding, GENERATION_MASK, MAX_SOURCES, State};
use crate::region::Region;
use crate::sleep;
use crate::spsc::WriteEnd;
use crate::watch::Watch;

/// A virtqueue known to the ring of the producer that registered it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source(u8);

impl Source {
    /// Its place in the ring's directory.
    pub fn index(self) -> usize {
        self.0.into()
    }
}

/// What became of a completion.
#[must_use = "a completion that is to be signalled is lost otherwise"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Push {
    /// The awake consumer has an entry for it.
    Queued,
    /// An earlier entry of this source, not yet taken, covers it.
    Merged,
    /// Signal the source's `call`.
    Signal(Reason),
}

/// Why a completion needs the source's `call`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It is in the ring, but the consumer sleeps: the interrupt wakes it.
    Asleep,
    /// Nobody consumes: the interrupt is the completion.
    Absent,
    /// The consumer says it is awake but left this source waiting too long.
    Overdue,
}

/// What [`Producer::overdue`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overdue {
    /// Nothing is waiting for the consumer.
    Nothing,
    /// Nothing is overdue; look again at this time, and not later than that if the thread goes to sleep.
    NotBefore(u64),
    /// This source has waited too long: signal its `call` and ask again.
    Source(Source),
}

/// Private state of one source.
#[derive(Clone, Copy, Debug)]
struct Slip {
    bound: bool,
    generation: u16,
    /// An entry of ours is believed to be in the ring.
    queued: bool,
    /// That entry was overdue: until it is taken every completion is called.
    overdue: bool,
}

/// The producer of one ring. Exactly one may exist a ring; whoever makes it holds the lock on
/// [`lock_range`](crate::Geometry::lock_range) of the region's file.
#[derive(Debug)]
pub struct Producer {
    region: Region,
    bit: u64,
    end: WriteEnd,
    slips: [Slip; MAX_SOURCES],
    watch: Watch,
}

impl Producer {
    /// Takes over ring `ring`, whatever its previous producer left: no source is registered afterwards.
    /// `None` if the region has no such ring.
    pub fn claim(region: Region, ring: usize) -> Option<Self> {
        let sources = region.geometry().sources();
        let end = WriteEnd::claim(region.ring(ring)?, sources);
        let mut slips = [Slip { bound: false, generation: 0, queued: false, overdue: false }; MAX_SOURCES];
        for (source, slip) in (0..=u8::MAX).zip(&mut slips).take(sources) {
            let left = end.binding(source);
            slip.generation = left.generation;
            if left.used_ring != 0 {
                slip.generation = left.generation.wrapping_add(1) & GENERATION_MASK;
                end.bind(source, Binding { used_ring: 0, generation: slip.generation });
            }
        }
        Some(Self { region, bit: 1 << ring, end, slips, watch: Watch::new() })
    }

    /// Makes a virtqueue known by the guest-physical address of its used ring (4-byte aligned, below 2^52, not
    /// 0). `None` if the directory is full or the address is not possible.
    ///
    /// Push or call the source once afterwards: a completion that a previous producer announced and did not
    /// deliver is then delivered.
    pub fn register(&mut self, used_ring: u64) -> Option<Source> {
        let possible = Binding { used_ring, generation: 0 };
        if used_ring == 0
            || !used_ring.is_multiple_of(4)
            || Binding::from_word(possible.to_word()) != possible
        {
            return None;
        }
        let sources = self.region.geometry().sources();
        let free = self.slips.iter().take(sources).position(|slip| !slip.bound)?;
        let source = Source(free as u8);
        self.rebind(source, used_ring);
        Some(source)
    }

    /// Forgets a virtqueue. The consumer drops what is still announced for it.
    pub fn unregister(&mut self, source: Source) {
        self.rebind(source, 0);
    }

    fn rebind(&mut self, source: Source, used_ring: u64) {
        let slip = &mut self.slips[source.index()];
        let generation = slip.generation.wrapping_add(1) & GENERATION_MASK;
        *slip = Slip { bound: used_ring != 0, generation, queued: false, overdue: false };
        self.watch.stop(source.0);
        self.end.bind(source.0, Binding { used_ring, generation });
    }

    /// Announces a completion of `source`, whose used ring is already written. `now` is any clock that does not
    /// run backwards, the same for [`Producer::overdue`].
    #[inline]
    pub fn push(&mut self, source: Source, now: u64) -> Push {
        if State::from_word(self.region.state().load(Ordering::Relaxed)) == State::Absent {
            return Push::Signal(Reason::Absent);
        }
        if let Some(covered) = self.announce(source, now) {
            return covered;
        }
        self.end.write(source.0);
        let reason = match sleep::after_push(&self.region, self.bit) {
            State::Awake => {
                self.watch.start(source.0, now);
                return Push::Queued;
            }
            State::Sleeping => Reason::Asleep,
            State::Absent => Reason::Absent,
        };
        self.watch.stop(source.0);
        Push::Signal(reason)
    }

    /// Fault injection, to test what happens to entries that get lost: announces a completion as [`Producer::push`]
    /// does, but writes no entry and wakes nobody. Only [`Producer::overdue`] finds it.
    pub fn lose(&mut self, source: Source, now: u64) -> Push {
        if State::from_word(self.region.state().load(Ordering::Relaxed)) == State::Absent {
            return Push::Signal(Reason::Absent);
        }
        if let Some(covered) = self.announce(source, now) {
            return covered;
        }
        self.watch.start(source.0, now);
        Push::Merged
    }

    /// Sets the source's pending word. `None`: a new entry must follow; otherwise what became of the completion.
    #[inline]
    fn announce(&mut self, source: Source, now: u64) -> Option<Push> {
        let slip = &mut self.slips[source.index()];
        if self.end.announce(source.0) && slip.queued {
            if slip.overdue {
                return Some(Push::Signal(Reason::Overdue));
            }
            // The clock runs from the first completion that no `call` told of.
            if !self.watch.is_running(source.0) {
                self.watch.start(source.0, now);
            }
            return Some(Push::Merged);
        }
        slip.queued = true;
        slip.overdue = false;
        None
    }

    /// Finds a source that an awake consumer has left waiting for `bound` or longer. To be asked regularly by
    /// the thread that pushes; unless something is that old it reads no shared memory.
    pub fn overdue(&mut self, now: u64, bound: u64) -> Overdue {
        while let Some((source, since)) = self.watch.oldest() {
            if now.saturating_sub(since) < bound {
                return Overdue::NotBefore(since.saturating_add(bound));
            }
            self.watch.stop(source);
            let waits = self.end.is_announced(source);
            let slip = &mut self.slips[usize::from(source)];
            slip.queued = waits;
            slip.overdue = waits;
            if waits {
                return Overdue::Source(Source(source));
            }
        }
        Overdue::Nothing
    }
}
