//! Completions without interrupts: a poll thread's end of the FIFO region that the guest's IVCPU polls.
//!
//! `ivcpu_abi` has the protocol (`docs/fifo-abi.md` specifies it); here is what a backend adds. For the time of a
//! session each poll thread owns one ring of the region ([`claim`]) and registers the two virtqueues of its pair by
//! the guest-physical addresses of their used rings, the one name that guest and backend both know ([`Fifo::follow`]).
//! [`crate::completion`] pushes; the thread looks at the clocks now and then and before it sleeps
//! ([`Fifo::waiting`]), so that a consumer that says it is awake and is not costs a bounded delay.
//!
//! A push is a few loads and stores in shared memory and one look at the clock: no system call, no allocation.

mod options;
mod region_file;

use std::sync::Arc;
use std::time::{Duration, Instant};

use ivcpu_abi::{Overdue, Producer, Push, Source};

pub use options::{CreateOptions, FifoCommand, FifoOptions, FileSize, Place};
pub use region_file::{Error, RegionFile};

use crate::ring::UsedRing;
use crate::stats::Direction;

/// Claims up to `count` free rings of the region that `options` name, one for each poll thread.
pub fn claim(options: &FifoOptions, count: usize) -> Result<Vec<Fifo>, Error> {
    let file = Arc::new(RegionFile::open(&options.place)?);
    let mut claimed = Vec::new();
    for ring in 0..file.rings() {
        if claimed.len() == count {
            break;
        }
        if let Some(producer) = file.claim(ring)? {
            claimed.push(Fifo::new(producer, file.clone(), options));
        }
    }
    Ok(claimed)
}

/// One ring of the region, and the virtqueues registered there.
pub struct Fifo {
    producer: Producer,
    /// By direction.
    registered: [Option<Registered>; 2],
    /// A virtqueue that has to be called because it is overdue.
    owed: Option<Direction>,
    /// A clock may be running: otherwise there is nothing to look at.
    is_ticking: bool,
    started: Instant,
    bound: Duration,
    lose_entries: bool,
    /// The producer's memory and its lock. Private together with the producer, and so never parted from it.
    _file: Arc<RegionFile>,
}

/// A virtqueue that was offered to the ring's directory.
#[derive(Clone, Copy)]
struct Registered {
    used_ring: UsedRing,
    /// `None`: the directory had no room for it.
    source: Option<Source>,
}

/// Whether the consumer leaves something waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// No.
    Nothing,
    /// Yes, and for this long it may.
    Within(Duration),
    /// Yes, for too long: this virtqueue has to be called, see [`Fifo::called`].
    TooLong(Direction),
}

impl Fifo {
    fn new(producer: Producer, file: Arc<RegionFile>, options: &FifoOptions) -> Self {
        Fifo {
            producer,
            registered: [None; 2],
            owed: None,
            is_ticking: false,
            started: Instant::now(),
            bound: options.bound,
            lose_entries: options.lose_entries,
            _file: file,
        }
    }

    /// Keeps the directory true: `used_ring` is that of the virtqueue of this direction, `None` while it is stopped.
    /// Tells whether the virtqueue is new there and has to be announced (pushed) once: so nothing is lost that was
    /// announced under its old name, or by a producer before us.
    #[inline]
    pub fn follow(&mut self, direction: Direction, used_ring: Option<UsedRing>) -> bool {
        let known = self.registered[direction.index()];
        known.map(|known| known.used_ring) != used_ring && self.register(direction, used_ring)
    }

    fn register(&mut self, direction: Direction, used_ring: Option<UsedRing>) -> bool {
        if self.owed == Some(direction) {
            self.owed = None;
        }
        let known = &mut self.registered[direction.index()];
        if let Some(Registered { source: Some(source), .. }) = known.take() {
            self.producer.unregister(source);
        }
        let Some(used_ring) = used_ring else { return false };
        let source = self.producer.register(used_ring.address);
        if source.is_none() {
            tracing::warn!(
                "the FIFO has no room for a virtqueue whose used ring is at {:#x}; its completions are calls",
                used_ring.address
            );
        }
        *known = Some(Registered { used_ring, source });
        source.is_some()
    }

    /// Announces a completion. `None`: the virtqueue is not in the directory, so it has to be called.
    #[inline]
    pub fn push(&mut self, direction: Direction) -> Option<Push> {
        let source = self.registered[direction.index()]?.source?;
        let now = self.now();
        let push =
            if self.lose_entries { self.producer.lose(source, now) } else { self.producer.push(source, now) };
        self.is_ticking |= !matches!(push, Push::Signal(_));
        Some(push)
    }

    /// Looks at the clocks. To be asked every now and then, and before the thread sleeps.
    #[inline]
    pub fn waiting(&mut self) -> Waiting {
        if let Some(direction) = self.owed {
            return Waiting::TooLong(direction);
        }
        if !self.is_ticking {
            return Waiting::Nothing;
        }
        let now = self.now();
        match self.producer.overdue(now, self.bound.as_nanos() as u64) {
            Overdue::Nothing => {
                self.is_ticking = false;
                Waiting::Nothing
            }
            Overdue::NotBefore(then) => Waiting::Within(Duration::from_nanos(then.saturating_sub(now))),
            Overdue::Source(source) => {
                let is_it = |known: &Option<Registered>| known.and_then(|known| known.source) == Some(source);
                let [to_guest, _] = &self.registered;
                let direction = if is_it(to_guest) { Direction::ToGuest } else { Direction::FromGuest };
                self.owed = Some(direction);
                Waiting::TooLong(direction)
            }
        }
    }

    /// The virtqueue of which [`Self::waiting`] told was called.
    pub fn called(&mut self) {
        self.owed = None;
    }

    /// Nanoseconds, for the clocks.
    fn now(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }
}

impl Drop for Fifo {
    fn drop(&mut self) {
        for known in self.registered.iter_mut().filter_map(Option::take) {
            if let Some(source) = known.source {
                self.producer.unregister(source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::Wrapping;

    use ivcpu_abi::{Consumer, Reason};

    use super::*;

    const RING: Option<UsedRing> = Some(UsedRing { address: 0x18000, start: Wrapping(1) });

    /// A ring claimed with this bound, and the guest's consumer.
    fn awake(bound: Duration) -> (Fifo, Consumer) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        let create = CreateOptions { path: path.clone(), size: FileSize(2 << 20), rings: 1, anew: false };
        drop(RegionFile::create(&create).unwrap());
        let options = FifoOptions { place: Place::Path(path), bound, lose_entries: false };
        let fifo = claim(&options, 2).unwrap().pop().unwrap();
        assert!(claim(&options, 2).unwrap().is_empty(), "claimed twice");
        let consumer = Consumer::attach(fifo._file.region(), 1, 64);
        (fifo, consumer)
    }

    #[test]
    fn a_virtqueue_is_new_once_a_start() {
        let (mut fifo, mut consumer) = awake(Duration::from_secs(1));
        assert_eq!(fifo.push(Direction::FromGuest), None);
        for start in 1..4 {
            let ring = Some(UsedRing { address: 0x18000, start: Wrapping(start) });
            assert!(fifo.follow(Direction::FromGuest, ring));
            assert!(!fifo.follow(Direction::FromGuest, ring));
            assert!(!fifo.follow(Direction::ToGuest, None));
            assert_eq!(fifo.push(Direction::FromGuest), Some(Push::Queued));
            let binding = consumer.poll().unwrap().binding;
            assert_eq!(binding.used_ring, 0x18000);
        }
        assert!(!fifo.follow(Direction::FromGuest, None));
        assert_eq!(fifo.push(Direction::FromGuest), None);
        // An address that has no place in the directory.
        assert!(!fifo.follow(Direction::FromGuest, Some(UsedRing { address: 1 << 52, start: Wrapping(1) })));
        assert_eq!(fifo.push(Direction::FromGuest), None);
    }

    #[test]
    fn an_overdue_virtqueue_is_owed_a_call_until_it_is_called_or_stops() {
        let (mut fifo, _consumer) = awake(Duration::from_nanos(1));
        for stops in [false, true] {
            for direction in [Direction::ToGuest, Direction::FromGuest] {
                assert!(fifo.follow(direction, RING));
                assert_eq!(fifo.waiting(), Waiting::Nothing);
                assert!(matches!(fifo.push(direction), Some(Push::Queued | Push::Merged)));
                std::thread::sleep(Duration::from_micros(1));
                for _ in 0..3 {
                    assert_eq!(fifo.waiting(), Waiting::TooLong(direction));
                }
                if stops {
                    assert!(!fifo.follow(direction, None));
                } else {
                    fifo.called();
                    assert_eq!(fifo.push(direction), Some(Push::Signal(Reason::Overdue)));
                }
                assert_eq!(fifo.waiting(), Waiting::Nothing);
                assert!(!fifo.follow(direction, None));
            }
        }
    }

    #[test]
    fn what_may_wait_tells_for_how_long() {
        let (mut fifo, mut consumer) = awake(Duration::from_secs(100));
        assert!(fifo.follow(Direction::ToGuest, RING));
        assert_eq!(fifo.push(Direction::ToGuest), Some(Push::Queued));
        let Waiting::Within(time) = fifo.waiting() else { panic!("nothing waits") };
        assert!(time > Duration::from_secs(50) && time <= Duration::from_secs(100), "{time:?}");
        assert!(consumer.poll().is_some());
    }
}
