//! A completion leaves here, and only here: used entries become visible and the driver is told if it asked.
//!
//! Told through the FIFO where there is one and its consumer polls, by the ring's call otherwise. The FIFO takes the
//! place of the call and not of virtio's rule: what the driver did not ask for does not become an entry either.

use ivcpu_abi::{Push, Reason};

use crate::fifo::Fifo;
use crate::ring::Ring;
use crate::stats::RingStats;

/// Publishes what a burst gave back and notifies the driver when virtio's suppression rule asks for it.
pub fn deliver(ring: &mut Ring, fifo: Option<&mut Fifo>, stats: &RingStats) {
    if !ring.is_unpublished() {
        return;
    }
    ring.publish();
    if !ring.wants_call() {
        stats.calls_suppressed.add(1);
        return;
    }
    stats.completions.add(1);
    match fifo {
        Some(fifo) => announce(ring, fifo, stats),
        None => {
            call(ring, stats);
        }
    }
}

/// Keeps the FIFO told of the ring: whether it runs, and where its used ring is.
#[inline]
pub fn follow(ring: &Ring, fifo: &mut Fifo, stats: &RingStats) {
    if fifo.follow(stats.direction, ring.used_ring()) {
        announce(ring, fifo, stats);
    }
}

/// Calls for a ring that the FIFO's consumer left waiting too long.
pub fn fall_back(ring: &Ring, fifo: &mut Fifo, stats: &RingStats) {
    fifo.called();
    if call(ring, stats) {
        stats.fallbacks.add(1);
    }
}

/// Tells the FIFO's consumer to look at the ring, by a call if need be.
fn announce(ring: &Ring, fifo: &mut Fifo, stats: &RingStats) {
    let reason = match fifo.push(stats.direction) {
        Some(Push::Queued) => return stats.fifo_entries.add(1),
        Some(Push::Merged) => return stats.fifo_merged.add(1),
        Some(Push::Signal(Reason::Asleep | Reason::Absent)) => Some(&stats.wakeups),
        Some(Push::Signal(Reason::Overdue)) => Some(&stats.fallbacks),
        None => None,
    };
    if call(ring, stats)
        && let Some(reason) = reason
    {
        reason.add(1);
    }
}

/// Signals the ring's call; tells whether it has one.
fn call(ring: &Ring, stats: &RingStats) -> bool {
    let called = ring.call();
    stats.calls.add(called.into());
    called
}
