//! What the door lets in, and what it answers itself.
//!
//! The crate's message handler ends a connection over everything it does not know or does not want. Three messages
//! are therefore answered here: `NET_SET_MTU`, which it does not know; `SET_CONFIG`, which is refused and nothing else
//! happens; and `GET_MAX_MEM_SLOTS`, to which its answer is more than a port is given. Memory regions are counted on
//! their way in, so that no frontend can take so many descriptors, or so much address space, that another port's
//! frontends find none.

use std::io;
use std::sync::Arc;

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as Protocol};

use crate::device::Mtu;

/// Bytes of a message's header: request, flags, size of the payload.
pub(super) const HEADER: usize = 12;

/// Flags of a message: its version in the lowest two bits, then these.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Answers of a request that has no answer of its own.
const DONE: u64 = 0;
const REFUSED: u64 = 1;

/// Memory regions a port's frontend can have: each costs a descriptor and a mapping. Virtual machines have a handful,
/// and some more with every hot-plugged piece of memory.
pub const MAX_REGIONS: usize = 64;

/// How much of guest memory is let in.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Regions.
    pub regions: usize,
    /// Bytes of all regions together.
    pub bytes: u64,
}

impl Budget {
    /// The share of each of `ports` in a quarter of what a process can map at all: a table is replaced by another while
    /// it is still in use, and there is more to map than guest memory.
    pub fn of(ports: usize) -> Self {
        const MAPPABLE: u64 = 1 << 47;
        Budget { regions: MAX_REGIONS, bytes: MAPPABLE / 4 / ports.max(1) as u64 }
    }
}

/// What becomes of a message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It goes on to the crate.
    Pass,
    /// It is answered by this message, and the crate never sees it.
    Answer(Vec<u8>),
    /// It is forgotten: it has no effect, and no answer is wanted.
    Ignore,
}

/// A session's gate.
pub(super) struct Gate {
    budget: Budget,
    mtu: Arc<Mtu>,
    /// Protocol features acked by the frontend; the crate acks messages only once it was asked for its features.
    protocol: Protocol,
    was_asked: bool,
    /// Answers of the crate that are still to come.
    awaited: usize,
    /// Address and size of each region let in.
    regions: Vec<(u64, u64)>,
}

impl Gate {
    pub(super) fn new(budget: Budget, mtu: Arc<Mtu>) -> Self {
        Gate { budget, mtu, protocol: Protocol::empty(), was_asked: false, awaited: 0, regions: Vec::new() }
    }

    /// Whether the crate has answered everything it was asked: only then may an answer be put in between.
    pub(super) fn is_quiet(&self) -> bool {
        self.awaited == 0
    }

    /// An answer of the crate passed.
    pub(super) fn answered(&mut self) {
        self.awaited = self.awaited.saturating_sub(1);
    }

    /// Looks at a frontend's message. An error ends the connection.
    pub(super) fn judge(&mut self, message: &[u8], descriptors: usize) -> io::Result<Verdict> {
        let (Some(code), Some(flags)) = (word(message, 0), word(message, 4)) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let payload = message.get(HEADER..).unwrap_or_default();
        let request = FrontendReq::try_from(code).ok();
        let is_ours = matches!(
            request,
            Some(FrontendReq::NET_SET_MTU | FrontendReq::SET_CONFIG | FrontendReq::GET_MAX_MEM_SLOTS)
        );
        // Descriptors on their way count as this user's, for all ports together: none may pile up.
        let most = match request {
            Some(FrontendReq::SET_MEM_TABLE) => super::MAX_DESCRIPTORS,
            _ if is_ours => 0,
            _ => 1,
        };
        if descriptors > most {
            return Err(io::Error::other("descriptors came with a message that has none, or fewer"));
        }
        let verdict = match request {
            Some(FrontendReq::NET_SET_MTU) => {
                self.wants(Protocol::MTU, "NET_SET_MTU")?;
                let taken = payload.len() == size_of::<u64>()
                    && u16::try_from(quad(payload, 0).unwrap_or(u64::MAX)).is_ok_and(|mtu| self.mtu.set(mtu));
                return Ok(self.ack(code, flags, if taken { DONE } else { REFUSED }));
            }
            Some(FrontendReq::SET_CONFIG) => {
                self.wants(Protocol::CONFIG, "SET_CONFIG")?;
                tracing::info!(
                    "a frontend's SET_CONFIG is refused: nothing in the configuration space can be written"
                );
                return Ok(self.ack(code, flags, REFUSED));
            }
            Some(FrontendReq::GET_MAX_MEM_SLOTS) => {
                self.wants(Protocol::CONFIGURE_MEM_SLOTS, "GET_MAX_MEM_SLOTS")?;
                return Ok(Verdict::Answer(answer(code, self.budget.regions as u64)));
            }
            Some(FrontendReq::SET_MEM_TABLE) => {
                let count = word(payload, 0).unwrap_or(0) as usize;
                let regions =
                    (0..count.min(payload.len() / REGION)).filter_map(|i| region(payload, 8 + i * REGION));
                self.admit(regions.collect(), code, flags)?
            }
            Some(FrontendReq::ADD_MEM_REG) => {
                let more = self.regions.iter().copied().chain(region(payload, 8));
                self.admit(more.collect(), code, flags)?
            }
            Some(FrontendReq::REM_MEM_REG) => {
                let gone = region(payload, 8);
                self.regions.retain(|region| Some(*region) != gone);
                Verdict::Pass
            }
            Some(FrontendReq::SET_PROTOCOL_FEATURES) => {
                self.protocol = Protocol::from_bits_truncate(quad(payload, 0).unwrap_or(0));
                Verdict::Pass
            }
            _ => Verdict::Pass,
        };
        if verdict == Verdict::Pass && (has_answer(request) || self.wants_ack(flags)) {
            self.awaited += 1;
        }
        self.was_asked |= request == Some(FrontendReq::GET_FEATURES);
        Ok(verdict)
    }

    /// Lets `regions` in, all there are then, or refuses the message that brings them.
    fn admit(&mut self, regions: Vec<(u64, u64)>, code: u32, flags: u32) -> io::Result<Verdict> {
        let bytes = regions.iter().fold(0u64, |all, (_, size)| all.saturating_add(*size));
        if regions.len() <= self.budget.regions && bytes <= self.budget.bytes {
            self.regions = regions;
            return Ok(Verdict::Pass);
        }
        let Budget { regions: most, bytes: largest } = self.budget;
        let what = format!(
            "a frontend's {} memory regions of {bytes} bytes are more than a port is given: {most} regions, {largest} bytes",
            regions.len()
        );
        // Without an answer the frontend would take it for done.
        if !self.wants_ack(flags) {
            return Err(io::Error::other(what));
        }
        tracing::warn!("{what}; the message is refused");
        Ok(Verdict::Answer(answer(code, REFUSED)))
    }

    fn wants_ack(&self, flags: u32) -> bool {
        flags & NEED_REPLY != 0 && self.was_asked && self.protocol.contains(Protocol::REPLY_ACK)
    }

    /// The answer of a message that has none of its own, if one is wanted.
    fn ack(&self, code: u32, flags: u32, value: u64) -> Verdict {
        if self.wants_ack(flags) { Verdict::Answer(answer(code, value)) } else { Verdict::Ignore }
    }

    /// Ends the connection over a message that belongs to a feature which was not agreed on.
    fn wants(&self, feature: Protocol, message: &str) -> io::Result<()> {
        if self.protocol.contains(feature) {
            return Ok(());
        }
        Err(io::Error::other(format!("{message} came without its protocol feature")))
    }
}

/// Requests that the crate answers in any case.
fn has_answer(request: Option<FrontendReq>) -> bool {
    matches!(
        request,
        Some(
            FrontendReq::GET_FEATURES
                | FrontendReq::GET_PROTOCOL_FEATURES
                | FrontendReq::GET_QUEUE_NUM
                | FrontendReq::GET_CONFIG
                | FrontendReq::GET_VRING_BASE
        )
    )
}

/// A message that answers request `code` with one number.
fn answer(code: u32, value: u64) -> Vec<u8> {
    message(code, VERSION | REPLY, value)
}

/// A message with a number as its payload.
pub(super) fn message(code: u32, flags: u32, value: u64) -> Vec<u8> {
    let header = [code, flags, size_of::<u64>() as u32];
    header.into_iter().flat_map(u32::to_ne_bytes).chain(value.to_ne_bytes()).collect()
}

/// A frontend's request with a number as its payload.
pub(super) fn request(request: FrontendReq, value: u64) -> Vec<u8> {
    message(request.into(), VERSION, value)
}

/// Bytes of a memory region in a message: guest address, size, the frontend's address, offset in the file.
const REGION: usize = 32;

/// Guest address and size of the region at `offset`.
fn region(payload: &[u8], offset: usize) -> Option<(u64, u64)> {
    Some((quad(payload, offset)?, quad(payload, offset + 8)?))
}

fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

fn quad(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes.get(offset..)?.first_chunk().copied().map(u64::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(regions: usize, bytes: u64, mtu: Option<u16>) -> Gate {
        Gate::new(Budget { regions, bytes }, Arc::new(Mtu::new(mtu)))
    }

    /// A gate past the agreement on every feature that it looks at.
    fn agreed(regions: usize, bytes: u64, mtu: Option<u16>) -> Gate {
        let mut gate = gate(regions, bytes, mtu);
        let get = [1u32, VERSION, 0].map(u32::to_ne_bytes).concat();
        assert_eq!(gate.judge(&get, 0).unwrap(), Verdict::Pass);
        let features = Protocol::MTU | Protocol::CONFIG | Protocol::CONFIGURE_MEM_SLOTS | Protocol::REPLY_ACK;
        let set = message(16, VERSION | NEED_REPLY, features.bits());
        assert_eq!(gate.judge(&set, 0).unwrap(), Verdict::Pass);
        assert_eq!(gate.awaited, 2);
        gate.answered();
        gate.answered();
        assert!(gate.is_quiet());
        gate
    }

    fn add(address: u64, size: u64) -> Vec<u8> {
        let header = [37u32, VERSION | NEED_REPLY, 40].map(u32::to_ne_bytes).concat();
        [header, [0u64, address, size, 0, 0].map(u64::to_ne_bytes).concat()].concat()
    }

    #[test]
    fn an_mtu_is_taken_as_far_as_one_was_offered() {
        for (offered, mtu, taken) in [
            (None, 1500, true),
            (None, 67, false),
            (None, 65_535, true),
            (None, 65_536, false),
            (Some(1500), 1500, true),
            (Some(1500), 1501, false),
        ] {
            let mut gate = agreed(8, 1 << 40, offered);
            let verdict = gate.judge(&message(20, VERSION | NEED_REPLY, mtu), 0).unwrap();
            assert_eq!(verdict, Verdict::Answer(answer(20, u64::from(!taken))), "{offered:?} {mtu}");
            assert_eq!(gate.mtu.now(), if taken { Some(mtu as u16) } else { offered });
            assert_eq!(gate.judge(&message(20, VERSION, mtu), 0).unwrap(), Verdict::Ignore);
            assert!(gate.judge(&message(20, VERSION, mtu), 1).is_err(), "with a descriptor");
        }
    }

    #[test]
    fn messages_of_features_that_were_not_agreed_on_end_the_connection() {
        for code in [20, 25, 36] {
            assert!(gate(8, 1 << 40, None).judge(&message(code, VERSION, 0), 0).is_err(), "{code}");
        }
    }

    #[test]
    fn configuration_is_refused_and_slots_are_told() {
        let mut gate = agreed(8, 1 << 40, None);
        let set = message(25, VERSION | NEED_REPLY, 0);
        assert_eq!(gate.judge(&set, 0).unwrap(), Verdict::Answer(answer(25, 1)));
        assert_eq!(gate.judge(&message(36, VERSION, 0), 0).unwrap(), Verdict::Answer(answer(36, 8)));
    }

    #[test]
    fn regions_are_counted_in_and_out() {
        let mut gate = agreed(2, 100, None);
        assert_eq!(gate.judge(&add(0, 50), 1).unwrap(), Verdict::Pass);
        assert_eq!(gate.judge(&add(100, 51), 1).unwrap(), Verdict::Answer(answer(37, 1)), "too many bytes");
        assert_eq!(gate.judge(&add(100, u64::MAX), 1).unwrap(), Verdict::Answer(answer(37, 1)), "wraps");
        assert_eq!(gate.judge(&add(100, 10), 1).unwrap(), Verdict::Pass);
        assert_eq!(gate.judge(&add(200, 10), 1).unwrap(), Verdict::Answer(answer(37, 1)), "too many");
        let mut remove = add(100, 10);
        remove[0] = 38;
        assert_eq!(gate.judge(&remove, 0).unwrap(), Verdict::Pass);
        assert_eq!(gate.judge(&add(200, 10), 1).unwrap(), Verdict::Pass);
        // A frontend that takes no answers is cut off instead.
        let mut silent = add(300, 10);
        silent[4] = VERSION as u8;
        assert!(gate.judge(&silent, 1).is_err());
        // A table replaces everything.
        let header = [5u32, VERSION, 8 + 32].map(u32::to_ne_bytes).concat();
        let table = [header, [1u64, 0, 60, 0, 0].map(u64::to_ne_bytes).concat()].concat();
        assert_eq!(gate.judge(&table, 1).unwrap(), Verdict::Pass);
        assert_eq!(gate.regions, [(0, 60)]);
    }

    #[test]
    fn any_bytes_are_a_message_or_the_end() {
        let mut gate = agreed(8, 100, None);
        for length in 0..64 {
            for code in 0..48u8 {
                let mut message = vec![0xff; length];
                if let Some(first) = message.first_chunk_mut::<4>() {
                    *first = [code, 0, 0, 0];
                }
                let _ = gate.judge(&message, 0);
            }
        }
    }
}
