//! The control queue of a network device, served by the VMM: the backend has the packets only.
//!
//! A request is a class, a command, its data, and one byte to be answered. Chains come from the guest: they are walked by the
//! queue crate with its bounds, their content is copied out before it is looked at, and one kick serves no more chains than the
//! queue has entries.

use std::io::{Read, Write};
use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI,
    VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::{Queue as SplitQueue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::ring::split_queue;
use super::{ConfigChange, Queue};
use crate::memory::GuestMemory;

/// Entries of the queue.
pub const SIZE: u16 = 64;
/// Longest request looked at: commands beyond (a long MAC table) are acknowledged by their first bytes.
const LONGEST: u64 = 64;

/// What the driver asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Use this many queue pairs.
    Pairs(u16),
    /// From now on the device has this address.
    Mac([u8; 6]),
    /// The driver announced itself after a change of the link.
    AnnounceAck,
    /// Which frames to receive. The device passes all to the driver, so every such wish is granted.
    ReceiveMode,
    /// Anything else, or a command cut short.
    Unknown,
}

impl Command {
    /// Reads a request.
    fn parse(request: &[u8]) -> Self {
        let [class, command, data @ ..] = request else { return Self::Unknown };
        match (u32::from(*class), u32::from(*command), data) {
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, [low, high, ..]) => {
                Self::Pairs(u16::from_le_bytes([*low, *high]))
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, data) => match data.first_chunk() {
                Some(address) => Self::Mac(*address),
                None => Self::Unknown,
            },
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, _) => Self::ReceiveMode,
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC | VIRTIO_NET_CTRL_RX_ALLMULTI, [_, ..]) => {
                Self::ReceiveMode
            }
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, _) => Self::AnnounceAck,
            _ => Self::Unknown,
        }
    }
}

/// The queue, while the driver runs it.
#[derive(Debug)]
pub struct ControlQueue {
    queue: SplitQueue,
    call: EventFd,
    config_change: Arc<ConfigChange>,
}

impl ControlQueue {
    /// Serves the queue that the driver set up.
    pub fn new(set_up: &Queue, features: u64) -> Result<Self, virtio_queue::Error> {
        let queue = split_queue(SIZE, set_up, features)?;
        let call = set_up.call.try_clone().map_err(|_| virtio_queue::Error::QueueNotReady)?;
        Ok(Self { queue, call, config_change: Arc::clone(&set_up.config_change) })
    }

    /// Answers what is in the queue: `serve` says whether a command was carried out. After an error the queue is to be left alone until
    /// the driver resets the device, as it is asked to.
    pub fn process(
        &mut self,
        memory: &GuestMemory,
        serve: impl FnMut(Command) -> bool,
    ) -> Result<(), virtio_queue::Error> {
        self.answer_all(memory, serve).inspect_err(|_| self.config_change.ask_for_reset())
    }

    fn answer_all(
        &mut self,
        memory: &GuestMemory,
        mut serve: impl FnMut(Command) -> bool,
    ) -> Result<(), virtio_queue::Error> {
        for _ in 0..self.queue.size() {
            let Some(chain) = self.queue.pop_descriptor_chain(memory) else {
                // With EVENT_IDX the driver kicks only past the index it is told here; what came meanwhile is seen now.
                if self.queue.enable_notification(memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let mut request = Vec::new();
            let read =
                chain.clone().reader(memory).map(|reader| reader.take(LONGEST).read_to_end(&mut request));
            let command = if matches!(read, Ok(Ok(_))) { Command::parse(&request) } else { Command::Unknown };
            let answer =
                if command != Command::Unknown && serve(command) { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            let written = match chain.writer(memory) {
                Ok(mut writer) => writer.write(&[answer as u8]).unwrap_or(0),
                Err(_) => 0,
            };
            self.queue.add_used(memory, head, written as u32)?;
        }
        if self.queue.needs_notification(memory)? {
            let _ = self.call.write(1);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const DESCRIPTORS: u64 = 0x1000;
    const AVAILABLE: u64 = 0x2000;
    const USED: u64 = 0x3000;
    const BUFFERS: u64 = 0x4000;

    struct Driver {
        memory: GuestMemory,
        queue: ControlQueue,
        call: EventFd,
        next: u16,
    }

    impl Driver {
        fn new() -> Self {
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x8000)]).unwrap();
            let call = EventFd::new(libc::EFD_NONBLOCK).unwrap();
            let set_up = Queue {
                index: 2,
                size: 16,
                descriptors: DESCRIPTORS,
                available: AVAILABLE,
                used: USED,
                kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
                call: call.try_clone().unwrap(),
                config_change: Arc::default(),
            };
            let queue = ControlQueue::new(&set_up, 0).unwrap();
            Self { memory, queue, call, next: 0 }
        }

        fn descriptor(&self, index: u64, address: u64, length: u32, flags: u16, next: u16) {
            let at = GuestAddress(DESCRIPTORS + 16 * index);
            self.memory.write_obj(address, at).unwrap();
            self.memory.write_obj(length, GuestAddress(at.0 + 8)).unwrap();
            self.memory.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
            self.memory.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
        }

        /// Makes the chain at descriptor 0 available and lets the device run; returns the commands it saw.
        fn kick(&mut self) -> Vec<Command> {
            let slot = AVAILABLE + 4 + 2 * u64::from(self.next % 16);
            self.memory.write_obj(0u16, GuestAddress(slot)).unwrap();
            self.next += 1;
            self.memory.write_obj(self.next, GuestAddress(AVAILABLE + 2)).unwrap();
            let mut seen = Vec::new();
            let _ = self.queue.process(&self.memory, |command| {
                seen.push(command);
                true
            });
            seen
        }

        /// Sends one request as Linux does: header, data, and a byte for the answer.
        fn send(&mut self, header: [u8; 2], data: &[u8]) -> (Vec<Command>, u8) {
            self.memory.write_slice(&header, GuestAddress(BUFFERS)).unwrap();
            self.memory.write_slice(data, GuestAddress(BUFFERS + 0x100)).unwrap();
            self.memory.write_obj(0xffu8, GuestAddress(BUFFERS + 0x800)).unwrap();
            self.descriptor(0, BUFFERS, 2, 1, 1);
            self.descriptor(1, BUFFERS + 0x100, data.len() as u32, 1, 2);
            self.descriptor(2, BUFFERS + 0x800, 1, 2, 0);
            let seen = self.kick();
            (seen, self.memory.read_obj(GuestAddress(BUFFERS + 0x800)).unwrap())
        }

        fn used(&self) -> u16 {
            self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
        }
    }

    #[test]
    fn commands_of_a_linux_driver_are_understood_and_acknowledged() {
        let mut driver = Driver::new();
        assert_eq!(driver.send([4, 0], &[2, 0]), (vec![Command::Pairs(2)], 0));
        assert_eq!(driver.send([1, 1], &[2, 0, 0, 0, 0, 9]), (vec![Command::Mac([2, 0, 0, 0, 0, 9])], 0));
        assert_eq!(driver.send([1, 0], &[0; 200]), (vec![Command::ReceiveMode], 0));
        assert_eq!(driver.send([0, 1], &[1]), (vec![Command::ReceiveMode], 0));
        assert_eq!(driver.used(), 4);
        assert_eq!(driver.call.read().unwrap(), 4);
    }

    #[test]
    fn what_is_unknown_or_cut_short_is_answered_with_an_error() {
        let mut driver = Driver::new();
        for (header, data) in [([4, 0], &[2][..]), ([1, 1], &[0; 5]), ([9, 9], &[0; 8]), ([0, 0], &[])] {
            assert_eq!(driver.send(header, data), (vec![], 1), "{header:?}");
        }
        assert_eq!(driver.used(), 4, "each came back");
    }

    #[test]
    fn a_chain_without_room_for_the_answer_still_comes_back() {
        let mut driver = Driver::new();
        driver.memory.write_slice(&[4, 0, 1, 0], GuestAddress(BUFFERS)).unwrap();
        driver.descriptor(0, BUFFERS, 4, 0, 0);
        assert_eq!(driver.kick(), [Command::Pairs(1)]);
        assert_eq!(driver.used(), 1);
    }

    #[test]
    fn a_chain_that_bites_its_tail_ends() {
        let mut driver = Driver::new();
        driver.descriptor(0, BUFFERS, 2, 1, 1);
        driver.descriptor(1, BUFFERS, 2, 1, 0);
        driver.kick();
        assert_eq!(driver.used(), 1);
    }

    proptest! {
        #[test]
        fn any_ring_content_is_survived(
            descriptors in proptest::collection::vec((0u64..0x9000, 0u32..0x3000, 0u16..8, 0u16..20), 16),
            content in proptest::collection::vec(any::<u8>(), 64),
            jump in any::<u16>(),
        ) {
            let mut driver = Driver::new();
            driver.memory.write_slice(&content, GuestAddress(BUFFERS)).unwrap();
            for (index, (address, length, flags, next)) in descriptors.into_iter().enumerate() {
                driver.descriptor(index as u64, address, length, flags, next);
            }
            driver.kick();
            driver.next = jump;
            driver.kick();
        }
    }
}
