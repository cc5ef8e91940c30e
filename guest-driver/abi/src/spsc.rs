//! One ring: a single producer writes entries, a single consumer takes them.
//!
//! A slot's word carries its own sequence, so the consumer looks at nothing but the slot it will take next. The
//! **pending word is the truth**, the ring only says where to look: the producer sets the word before it writes
//! an entry and writes none while the word is set; the consumer clears it before it hands the source out. Thus
//! a source is in the ring at most once and the ring, with a slot for every source, cannot overflow; and if
//! ever the slots do not make sense (a producer was killed, somebody wrote into the region), looking at every
//! pending word once finds everything that was announced.
//!
//! Both sides change the pending word by an atomic swap, with which a completion is never between them: the
//! producer's swap either precedes the consumer's, which then acquires all that the producer wrote before it,
//! or finds the 0 and writes a new entry.

use core::sync::atomic::Ordering;

use crate::layout::{Binding, Entry};
use crate::region::Ring;

/// The producer's end.
#[derive(Debug)]
pub(crate) struct WriteEnd {
    ring: Ring,
    /// Sequence of the next entry. Private: the head in the region is written from it and read only by `claim`.
    next: u32,
}

impl WriteEnd {
    /// Continues the ring where the previous producer left it, which may have died after it wrote a slot and
    /// before it wrote the head. Whatever the region holds, the result is a usable end.
    pub(crate) fn claim(ring: Ring, slots: usize) -> Self {
        let head = ring.head().load(Ordering::Acquire);
        let written =
            |next: &u32| Entry::from_word(ring.slot(*next).load(Ordering::Acquire)).sequence == *next;
        let skip = (0..slots as u32).take_while(|step| written(&head.wrapping_add(*step))).count();
        let next = head.wrapping_add(skip as u32);
        ring.head().store(next, Ordering::Release);
        Self { ring, next }
    }

    /// Sets the source's pending word and says whether it was set before. Release: the consumer's swap sees
    /// what was written before this call.
    #[inline]
    pub(crate) fn announce(&self, source: u8) -> bool {
        self.ring.pending(source.into()).swap(1, Ordering::AcqRel) != 0
    }

    /// Whether the consumer has not yet taken what was announced.
    pub(crate) fn is_announced(&self, source: u8) -> bool {
        self.ring.pending(source.into()).load(Ordering::Acquire) != 0
    }

    /// Writes the next entry. The head follows the slot: a consumer that reads the head finds the pending word
    /// of every entry before it set, or already cleared by itself.
    #[inline]
    pub(crate) fn write(&mut self, source: u8) {
        let entry = Entry { sequence: self.next, source: source.into() };
        self.ring.slot(self.next).store(entry.to_word(), Ordering::Release);
        self.next = self.next.wrapping_add(1);
        self.ring.head().store(self.next, Ordering::Release);
    }

    pub(crate) fn binding(&self, source: u8) -> Binding {
        Binding::from_word(self.ring.binding(source.into()).load(Ordering::Relaxed))
    }

    /// Release: who reads the binding reads a virtqueue that was set up before.
    pub(crate) fn bind(&self, source: u8, binding: Binding) {
        self.ring.binding(source.into()).store(binding.to_word(), Ordering::Release);
    }
}

/// What the next slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// An old entry: nothing new.
    Empty,
    /// The entry that is due.
    Ready(Entry),
    /// An entry that is not due yet, or no entry: the consumer missed some or the ring was damaged.
    Gap,
}

/// The consumer's end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReadEnd {
    ring: Ring,
    next: u32,
    /// The head this end started at. While the head stays there, starting again would repair nothing.
    started_at: u32,
}

impl ReadEnd {
    /// Starts at the producer's head. Every pending word must be looked at afterwards: entries before the
    /// head are not read.
    pub(crate) fn at_head(ring: Ring) -> Self {
        let head = ring.head().load(Ordering::Acquire);
        Self { ring, next: head, started_at: head }
    }

    #[inline]
    pub(crate) fn peek(&self) -> Next {
        let entry = Entry::from_word(self.ring.slot(self.next).load(Ordering::Acquire));
        match entry.sequence.wrapping_sub(self.next) as i32 {
            0 => Next::Ready(entry),
            ..0 => Next::Empty,
            _ => self.gap_at(self.ring.head().load(Ordering::Acquire)),
        }
    }

    /// A gap, once a head: a ring damaged for good must not keep its consumer from sleeping.
    fn gap_at(&self, head: u32) -> Next {
        if head == self.started_at { Next::Empty } else { Next::Gap }
    }

    /// Leaves the entry that `peek` showed behind.
    #[inline]
    pub(crate) fn advance(&mut self) {
        self.next = self.next.wrapping_add(1);
    }

    /// As `peek`, and an empty slot counts only where the producer writes next. The head is read first: were it
    /// past this end, its slot could no longer be empty. It may be one behind, as the slot is written before it.
    pub(crate) fn peek_in_step(&self) -> Next {
        let head = self.ring.head().load(Ordering::Acquire);
        match self.peek() {
            Next::Empty if self.next.wrapping_sub(head) > 1 => self.gap_at(head),
            next => next,
        }
    }

    /// Takes what is announced for the source, if anything is, and says for which virtqueue: the one bound now,
    /// because the announcement may be newer than the entry that led here. Acquire: see [`WriteEnd::announce`].
    #[inline]
    pub(crate) fn take(&self, source: u32) -> Option<Binding> {
        if self.ring.pending(source).swap(0, Ordering::AcqRel) == 0 {
            return None;
        }
        let binding = Binding::from_word(self.ring.binding(source).load(Ordering::Acquire));
        (binding.used_ring != 0).then_some(binding)
    }

    /// As `take`, without writing to words that are not set.
    pub(crate) fn take_if_announced(&self, source: u32) -> Option<Binding> {
        if self.ring.pending(source).load(Ordering::Relaxed) == 0 { None } else { self.take(source) }
    }
}
