//! Counters of a port. A data path writes them with plain atomic stores; whoever shows them never makes it wait.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Serialize, Serializer};

/// A counter that one thread writes and any thread reads.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts `n` more. One writer a counter: no read-modify-write is needed on the data path.
    pub fn add(&self, n: u64) {
        self.0.store(self.get().wrapping_add(n), Ordering::Relaxed);
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Serialize for Counter {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.get())
    }
}

/// Frames that did not pass, by reason.
#[derive(Debug, Default)]
pub struct Drops {
    /// The driver's chain is malformed: an index or address out of range, a loop, the wrong direction, too short.
    pub malformed: Counter,
    /// The frame fits no buffers that the driver can give.
    pub too_large: Counter,
    /// The uplink does not take it.
    pub refused: Counter,
    /// The ring is started and not enabled, or was changed under the frame.
    pub disabled: Counter,
}

impl Drops {
    /// Each reason's name and counter.
    pub fn reasons(&self) -> [(&'static str, &Counter); 4] {
        [
            ("malformed", &self.malformed),
            ("too_large", &self.too_large),
            ("refused", &self.refused),
            ("disabled", &self.disabled),
        ]
    }

    /// Their sum.
    pub fn total(&self) -> u64 {
        self.reasons().iter().map(|(_, counter)| counter.get()).sum()
    }
}

impl Serialize for Drops {
    /// As their sum.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.total())
    }
}

/// How many frames bursts had: a histogram. A burst is what one look at a ring moved.
#[derive(Debug, Default)]
pub struct Bursts {
    counts: [Counter; Self::BOUNDS.len()],
    frames: Counter,
}

impl Bursts {
    /// Frames of the largest burst that counts in each bucket; none is larger than the last.
    pub const BOUNDS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

    /// Counts a burst of `frames`; one of none is no burst.
    pub fn count(&self, frames: usize) {
        let bucket = Self::BOUNDS.iter().position(|bound| frames <= *bound).unwrap_or(Self::BOUNDS.len() - 1);
        if frames > 0
            && let Some(count) = self.counts.get(bucket)
        {
            count.add(1);
            self.frames.add(frames as u64);
        }
    }

    /// Bursts in each bucket, those of the smaller buckets not among them.
    pub fn counts(&self) -> [u64; Self::BOUNDS.len()] {
        self.counts.each_ref().map(Counter::get)
    }

    /// Frames of all bursts.
    pub fn frames(&self) -> u64 {
        self.frames.get()
    }
}

/// Which way frames pass through a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// The driver's receive queue.
    ToGuest,
    /// The driver's transmit queue.
    FromGuest,
}

impl Direction {
    /// Its place in arrays of two.
    pub const fn index(self) -> usize {
        self as usize
    }
}

/// What happened on one ring since the program started.
#[derive(Debug, Serialize)]
pub struct RingStats {
    /// The ring's number: twice the queue pair's, plus one from the guest.
    pub index: usize,
    /// Which way frames pass.
    pub direction: Direction,
    /// Frames that passed.
    pub packets: Counter,
    /// Their bytes, without the virtio header.
    pub bytes: Counter,
    /// Frames that did not pass.
    pub dropped: Drops,
    /// Bursts by their frames.
    #[serde(skip)]
    pub bursts: Bursts,
    /// Times the ring was stopped because its indices, its addresses or its eventfd were of no use.
    pub stopped: Arc<Counter>,
    /// Kick notifications received.
    pub kicks: Counter,
    /// Notifications that virtio's suppression rule asked for. Without a FIFO each is a call.
    pub completions: Counter,
    /// Completions for which an entry was written to the FIFO, and one more at each start of the ring.
    pub fifo_entries: Counter,
    /// Completions covered by an entry that was still there.
    pub fifo_merged: Counter,
    /// Calls although there is a FIFO, because its consumer slept or was absent.
    pub wakeups: Counter,
    /// Calls because the FIFO's consumer said that it was awake and left the ring waiting too long.
    pub fallbacks: Counter,
    /// All calls.
    pub calls: Counter,
    /// Times something was published and the driver did not ask to be told.
    pub calls_suppressed: Counter,
}

impl Direction {
    /// Its name in what is shown.
    pub const fn name(self) -> &'static str {
        match self {
            Direction::ToGuest => "to_guest",
            Direction::FromGuest => "from_guest",
        }
    }
}

impl RingStats {
    fn new(index: usize, direction: Direction) -> Arc<Self> {
        let zero = Counter::default;
        Arc::new(RingStats {
            index,
            direction,
            packets: zero(),
            bytes: zero(),
            dropped: Drops::default(),
            bursts: Bursts::default(),
            stopped: Arc::default(),
            kicks: zero(),
            completions: zero(),
            fifo_entries: zero(),
            fifo_merged: zero(),
            wakeups: zero(),
            fallbacks: zero(),
            calls: zero(),
            calls_suppressed: zero(),
        })
    }
}

/// All counters of a port.
#[derive(Debug, Serialize)]
pub struct Stats {
    queues: Vec<Arc<RingStats>>,
    /// Frontends that connected.
    pub sessions: Counter,
    /// Whether one is connected now.
    #[serde(skip)]
    connected: AtomicBool,
    /// The FIFO region of the session of now; `None` where completions are calls.
    fifo: Mutex<Option<FifoInUse>>,
}

/// A FIFO region in use.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct FifoInUse {
    /// Its file.
    pub path: PathBuf,
    /// Rings claimed: poll threads that complete through it.
    pub rings: usize,
}

impl Stats {
    /// Counters at zero for `queue_pairs` pairs.
    pub fn new(queue_pairs: usize) -> Self {
        let pair =
            |i| [RingStats::new(2 * i, Direction::ToGuest), RingStats::new(2 * i + 1, Direction::FromGuest)];
        Stats {
            queues: (0..queue_pairs).flat_map(pair).collect(),
            sessions: Counter::default(),
            connected: AtomicBool::new(false),
            fifo: Mutex::default(),
        }
    }

    /// Tells which FIFO region is in use.
    pub fn set_fifo(&self, fifo: Option<FifoInUse>) {
        *self.fifo.lock().unwrap_or_else(PoisonError::into_inner) = fifo;
    }

    /// The counters of ring `index`.
    pub fn ring(&self, index: usize) -> Option<&Arc<RingStats>> {
        self.queues.get(index)
    }

    /// The counters of all rings.
    pub fn rings(&self) -> &[Arc<RingStats>] {
        &self.queues
    }

    /// Tells whether a frontend is connected.
    pub fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Relaxed);
    }

    /// Whether a frontend is connected.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_shown_as_documented() {
        let stats = Stats::new(1);
        stats.ring(1).unwrap().packets.add(3);
        stats.sessions.add(1);
        let shown: serde_json::Value = serde_json::to_value(&stats).unwrap();
        assert_eq!(shown["sessions"], 1);
        assert_eq!(shown["fifo"], serde_json::Value::Null);
        assert_eq!(shown["queues"][0]["direction"], "to_guest");
        for counter in ["completions", "fifo_entries", "fifo_merged", "wakeups", "fallbacks", "calls"] {
            assert_eq!(shown["queues"][1][counter], 0, "{counter}");
        }
        assert_eq!(shown["queues"][1]["packets"], 3);
        assert_eq!(shown["queues"][1]["calls_suppressed"], 0);
        stats.ring(0).unwrap().dropped.refused.add(2);
        stats.ring(0).unwrap().dropped.malformed.add(1);
        let shown: serde_json::Value = serde_json::to_value(&stats).unwrap();
        assert_eq!(shown["queues"][0]["dropped"], 3);
        stats.set_fifo(Some(FifoInUse { path: "/dev/shm/f".into(), rings: 1 }));
        let shown: serde_json::Value = serde_json::to_value(&stats).unwrap();
        assert_eq!(shown["fifo"], serde_json::json!({"path": "/dev/shm/f", "rings": 1}));
    }

    #[test]
    fn a_burst_counts_in_the_smallest_bucket_that_holds_it() {
        let bursts = Bursts::default();
        for frames in [0, 1, 1, 2, 3, 4, 5, 63, 64, 1000] {
            bursts.count(frames);
        }
        assert_eq!(bursts.counts(), [2, 1, 2, 1, 0, 0, 3]);
        assert_eq!(bursts.frames(), 1 + 1 + 2 + 3 + 4 + 5 + 63 + 64 + 1000);
    }
}
