//! One queue pair's end of an uplink, and the test uplinks, which live in memory.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use crate::memory::{Chain, Chains, copy_out, scatter};
use crate::uplink::tap::TapPair;

/// One queue pair's end of an uplink.
pub enum Pair {
    /// A queue of a TAP device.
    Tap(Box<TapPair>),
    /// Swallows every frame, gives none.
    Null,
    /// Gives every frame back, the two MAC addresses swapped.
    Loop(Loop),
    /// Swallows every frame, and gives frames as fast as they are taken.
    Generator(Generator),
}

impl Pair {
    /// Sends the frames in `chains` (a virtio header of `header` bytes before each), leaving out malformed ones, and
    /// calls `sent` with each chain in order and whether the uplink took it.
    pub fn send(&mut self, chains: &Chains, header: usize, mut sent: impl FnMut(&Chain, bool)) {
        match self {
            Pair::Tap(tap) => tap.send(chains, sent),
            Pair::Null | Pair::Generator(_) => {
                chains.iter().for_each(|(chain, _)| sent(chain, chain.bytes != 0))
            }
            Pair::Loop(frames) => {
                for (chain, vectors) in chains.iter() {
                    sent(chain, chain.bytes != 0 && frames.send(vectors, header));
                }
            }
        }
    }

    /// Receives one frame, header first, into `vectors`; tells its bytes, or `None` when there is none now.
    pub fn receive(&mut self, vectors: &[libc::iovec], header: usize) -> Option<usize> {
        match self {
            Pair::Tap(tap) => tap.receive(vectors),
            Pair::Null => None,
            Pair::Loop(frames) => frames.receive(vectors),
            Pair::Generator(generator) => Some(generator.receive(vectors, header)),
        }
    }

    /// Becomes readable when a frame can be received; `None` where [`Self::has_frames`] is the whole truth.
    pub fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Pair::Tap(tap) => Some(tap.fd()),
            _ => None,
        }
    }

    /// Whether a frame can be received, as far as memory alone tells.
    pub fn has_frames(&self) -> bool {
        match self {
            Pair::Tap(_) | Pair::Null => false,
            Pair::Loop(frames) => !frames.waiting.is_empty(),
            Pair::Generator(_) => true,
        }
    }

    /// Takes the pair into use or out of it: an uplink of several queues spreads frames over those in use.
    pub fn set_enabled(&mut self, enabled: bool) {
        if let Pair::Tap(tap) = self {
            tap.set_enabled(enabled);
        }
    }
}

/// Frames on their way back to the guest.
#[derive(Default)]
pub struct Loop {
    waiting: VecDeque<Vec<u8>>,
    spare: Vec<Vec<u8>>,
}

impl Loop {
    /// Frames kept for a guest that does not take them; more are refused.
    const DEPTH: usize = 256;

    fn send(&mut self, vectors: &[libc::iovec], header: usize) -> bool {
        if self.waiting.len() >= Self::DEPTH {
            return false;
        }
        let mut frame = self.spare.pop().unwrap_or_default();
        frame.clear();
        copy_out(vectors, &mut frame);
        if let Some([destination, source]) = frame.get_mut(header..).and_then(|ethernet| {
            let (macs, _) = ethernet.split_at_mut_checked(12)?;
            let (destination, source) = macs.split_at_mut(6);
            Some([destination, source])
        }) {
            destination.swap_with_slice(source);
        }
        self.waiting.push_back(frame);
        true
    }

    fn receive(&mut self, vectors: &[libc::iovec]) -> Option<usize> {
        let frame = self.waiting.pop_front()?;
        scatter(vectors, &frame);
        let length = frame.len();
        self.spare.push(frame);
        Some(length)
    }
}

/// A source of equal frames.
pub struct Generator {
    /// A zeroed virtio header of the longest kind, and the frame behind it.
    frame: Vec<u8>,
}

impl Generator {
    const HEADER: usize = 12;

    /// Frames of `size` bytes: broadcast, of the EtherType for local experiments.
    pub fn new(size: usize) -> Self {
        let ethernet = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02, 0, 0, 0, 0, 0x01, 0x88, 0xb5];
        let mut frame = [[0; Self::HEADER].as_slice(), &ethernet].concat();
        frame.resize(Self::HEADER + size.max(ethernet.len()), 0);
        Generator { frame }
    }

    fn receive(&self, vectors: &[libc::iovec], header: usize) -> usize {
        let frame = self.frame.get(Self::HEADER.saturating_sub(header)..).unwrap_or_default();
        scatter(vectors, frame);
        frame.len()
    }
}
