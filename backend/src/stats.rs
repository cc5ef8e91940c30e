//! Counters, and the socket that shows them.

use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

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
    /// Frames that did not pass: malformed, too large, refused by the uplink, or the ring was disabled.
    pub dropped: Counter,
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

impl RingStats {
    fn new(index: usize, direction: Direction) -> Arc<Self> {
        let zero = Counter::default;
        Arc::new(RingStats {
            index,
            direction,
            packets: zero(),
            bytes: zero(),
            dropped: zero(),
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

/// All counters.
#[derive(Debug, Serialize)]
pub struct Stats {
    queues: Vec<Arc<RingStats>>,
    /// Frontends that connected.
    pub sessions: Counter,
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

    /// Answers every connection with one JSON object, for as long as the process lives.
    pub fn serve(&self, listener: &UnixListener) {
        for connection in listener.incoming() {
            let answer = connection.and_then(|mut connection| {
                connection.set_write_timeout(Some(Duration::from_secs(1)))?;
                connection.write_all(serde_json::to_string(self)?.as_bytes())?;
                connection.write_all(b"\n")
            });
            if let Err(error) = answer
                && error.kind() != ErrorKind::BrokenPipe
            {
                tracing::warn!("cannot answer on the stats socket: {error}");
                // Out of descriptors, for one, would come back at once.
                std::thread::sleep(Duration::from_millis(10));
            }
        }
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
        stats.set_fifo(Some(FifoInUse { path: "/dev/shm/f".into(), rings: 1 }));
        let shown: serde_json::Value = serde_json::to_value(&stats).unwrap();
        assert_eq!(shown["fifo"], serde_json::json!({"path": "/dev/shm/f", "rings": 1}));
    }
}
