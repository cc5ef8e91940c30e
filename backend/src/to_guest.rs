//! The way back: frames from the uplink to the guest.
//!
//! A TAP device does not tell how long the next frame is, so every read offers room for the largest. Buffers are
//! taken from the ring ahead of need and kept from one frame to the next: each is checked and translated once, and a
//! read just names the next ones. Where the ring has less room than the largest frame, a buffer of our own stands
//! behind it. If a frame really runs into that one, it waits there until the driver gives more buffers: nothing is
//! lost because the ring was nearly empty for a moment.

use crate::completion;
use crate::fifo::Fifo;
use crate::memory::MAX_FRAME;
use crate::ring::Ring;
use crate::stats::RingStats;
use crate::uplink::Pair;

/// Frames in one burst.
const BURST: usize = 64;

/// Where `num_buffers` lies in the virtio header, for drivers that have it.
const NUM_BUFFERS: usize = 10;

/// The state of one direction between bursts.
pub struct ToGuest {
    /// What a frame had over the ring's room.
    overflow: Vec<u8>,
    waiting: Option<Waiting>,
    vectors: Vec<libc::iovec>,
}

/// A frame that has been read and has too few buffers yet.
struct Waiting {
    /// Bytes of it that lie in the held chains, and that lie in `overflow`.
    placed: usize,
    overflowed: usize,
    /// The chains it was read into are gone when this is not the chains' epoch any more.
    epoch: u64,
}

/// What a burst did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Frames moved, or something else was done.
    pub moved: bool,
    /// Only buffers from the driver let it go on: frames may wait, but looking for them is useless.
    pub starved: bool,
}

impl Default for ToGuest {
    fn default() -> Self {
        ToGuest { overflow: vec![0; MAX_FRAME], waiting: None, vectors: Vec::new() }
    }
}

impl ToGuest {
    /// Moves up to a burst of frames from the uplink to the guest.
    pub fn burst(
        &mut self,
        ring: &mut Ring,
        pair: &mut Pair,
        fifo: Option<&mut Fifo>,
        stats: &RingStats,
    ) -> Outcome {
        let mut outcome = Outcome::default();
        if !ring.is_running() || !ring.is_enabled() {
            return outcome;
        }
        ring.refuse_kicks();
        let mut frames = 0;
        for _ in 0..BURST {
            ring.take(usize::MAX, MAX_FRAME);
            // Malformed chains go back unused when it is their turn.
            while ring.chains().front().is_some_and(|chain| chain.bytes == 0) {
                ring.give_back(0);
                stats.dropped.malformed.add(1);
                outcome.moved = true;
            }
            if ring.chains().is_empty() {
                outcome.starved = ring.is_running();
                break;
            }
            let Some(waiting) = self.waiting.take().or_else(|| self.receive(ring, pair)) else { break };
            if waiting.epoch != ring.chains().epoch() {
                stats.dropped.disabled.add(1);
                continue;
            }
            match self.place(ring, &waiting) {
                Placed::Whole { bytes } => {
                    stats.packets.add(1);
                    stats.bytes.add(bytes as u64);
                    frames += 1;
                    outcome.moved = true;
                }
                Placed::TooLarge => {
                    stats.dropped.too_large.add(1);
                    outcome.moved = true;
                }
                Placed::NotYet => {
                    self.waiting = Some(waiting);
                    outcome.starved = true;
                    break;
                }
            }
        }
        stats.bursts.count(frames);
        completion::deliver(ring, fifo, stats);
        outcome
    }

    /// Reads one frame into the oldest chains, and into `overflow` what does not fit.
    fn receive(&mut self, ring: &Ring, pair: &mut Pair) -> Option<Waiting> {
        let chains = if ring.is_mergeable() { usize::MAX } else { 1 };
        if let (true, Some(vectors)) = (ring.is_mergeable(), ring.chains().whole()) {
            let placed = pair.receive(vectors, ring.header())?;
            return Some(Waiting { placed, overflowed: 0, epoch: ring.chains().epoch() });
        }
        self.vectors.clear();
        let room = ring.chains().gather(chains, &mut self.vectors);
        if room < MAX_FRAME {
            self.vectors.push(libc::iovec {
                iov_base: self.overflow.as_mut_ptr().cast(),
                iov_len: self.overflow.len(),
            });
        }
        let length = pair.receive(&self.vectors, ring.header())?;
        let placed = length.min(room);
        Some(Waiting { placed, overflowed: length - placed, epoch: ring.chains().epoch() })
    }

    /// Gives a frame to the driver in as many chains as it takes.
    fn place(&self, ring: &mut Ring, frame: &Waiting) -> Placed {
        let length = frame.placed + frame.overflowed;
        let (header, limit) = (ring.header(), if ring.is_mergeable() { usize::MAX } else { 1 });
        let (mut count, mut room) = (0, 0);
        for (chain, _) in ring.chains().iter().take(limit) {
            if room >= length || chain.bytes == 0 {
                break;
            }
            count += 1;
            room += chain.bytes;
        }
        if room < length {
            let no_more_can_come = count >= limit || ring.chains().len() >= usize::from(ring.size());
            return if no_more_can_come || count < ring.chains().len() {
                Placed::TooLarge
            } else {
                Placed::NotYet
            };
        }
        if length < header {
            return Placed::TooLarge;
        }
        let overflowed = self.overflow.get(..frame.overflowed).unwrap_or_default();
        if !ring.chains().write_at(frame.placed, overflowed) {
            return Placed::TooLarge;
        }
        if header > NUM_BUFFERS {
            ring.chains().write_at(NUM_BUFFERS, &(count as u16).to_le_bytes());
        }
        let mut left = length;
        for _ in 0..count {
            let Some(written) = ring.chains().front().map(|chain| chain.bytes.min(left)) else { break };
            ring.give_back(written);
            left -= written;
        }
        Placed::Whole { bytes: length - header }
    }
}

/// What became of a frame.
enum Placed {
    /// The driver has it.
    Whole {
        /// Its bytes without the virtio header.
        bytes: usize,
    },
    /// It fits no buffers this driver can give.
    TooLarge,
    /// It needs more buffers.
    NotYet,
}
