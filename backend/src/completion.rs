//! A completion leaves here, and only here: used entries become visible and the driver is told if it asked.

use crate::ring::Ring;
use crate::stats::RingStats;

/// Publishes what a burst gave back and notifies the driver when virtio's suppression rule asks for it.
pub fn deliver(ring: &mut Ring, stats: &RingStats) {
    if !ring.is_unpublished() {
        return;
    }
    ring.publish();
    if !ring.wants_call() {
        stats.calls_suppressed.add(1);
    } else if ring.call() {
        stats.calls.add(1);
    }
}
