//! A packet enters here from the guest.

use crate::completion;
use crate::fifo::Fifo;
use crate::ring::Ring;
use crate::stats::RingStats;
use crate::uplink::Pair;

/// Frames in one burst: enough to pay for a notification, few enough to serve the other direction soon.
const BURST: usize = 64;

/// Moves up to a burst of frames from the guest to the uplink; tells whether there was anything.
///
/// A ring that is started but not enabled is consumed all the same and its frames are dropped, as the vhost-user
/// specification asks of network devices: a driver that waits for its frames to be sent must not wait for ever.
pub fn burst(ring: &mut Ring, pair: &mut Pair, fifo: Option<&mut Fifo>, stats: &RingStats) -> bool {
    if !ring.is_running() {
        return false;
    }
    ring.refuse_kicks();
    ring.take(BURST, usize::MAX);
    let taken = ring.chains().len();
    if taken == 0 {
        return false;
    }
    let header = ring.header();
    stats.bursts.count(taken);
    if ring.is_enabled() {
        let (mut packets, mut bytes, mut malformed, mut refused) = (0, 0, 0, 0);
        pair.send(ring.chains(), header, |chain, sent| {
            if sent {
                packets += 1;
                bytes += chain.bytes.saturating_sub(header) as u64;
            } else if chain.bytes == 0 {
                malformed += 1;
            } else {
                refused += 1;
            }
        });
        stats.packets.add(packets);
        stats.bytes.add(bytes);
        stats.dropped.malformed.add(malformed);
        stats.dropped.refused.add(refused);
    } else {
        stats.dropped.disabled.add(taken as u64);
    }
    for _ in 0..taken {
        ring.give_back(0);
    }
    completion::deliver(ring, fifo, stats);
    true
}
