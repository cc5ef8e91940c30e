//! A split ring that the VMM serves itself: chains in, used entries and interrupts out.
//!
//! The driver writes descriptors and indices at any time. The queue crate bounds what it walks; a ring whose indices make no
//! sense is an error, after which it is to be left alone until the driver resets the device, as it is asked to.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{DescriptorChain, Error, Queue as SplitQueue, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::{ConfigChange, Queue};
use crate::memory::GuestMemory;

/// A ring, while the driver runs it.
#[derive(Debug)]
pub struct Ring {
    queue: SplitQueue,
    index: u16,
    kick: EventFd,
    call: EventFd,
    /// Whether anything was used since the last interrupt was thought about.
    used: bool,
    config_change: Arc<ConfigChange>,
}

/// The crate's queue for one of at most `largest` entries that the driver set up, with the features it agreed to.
pub(super) fn split_queue(largest: u16, set_up: &Queue, features: u64) -> Result<SplitQueue, Error> {
    let mut queue = SplitQueue::new(largest)?;
    queue.try_set_size(set_up.size)?;
    queue.try_set_desc_table_address(GuestAddress(set_up.descriptors))?;
    queue.try_set_avail_ring_address(GuestAddress(set_up.available))?;
    queue.try_set_used_ring_address(GuestAddress(set_up.used))?;
    queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
    queue.set_ready(true);
    Ok(queue)
}

impl Ring {
    /// The ring that the driver set up, with the features it agreed to.
    pub fn new(set_up: Queue, features: u64) -> Result<Self, Error> {
        let queue = split_queue(set_up.size, &set_up, features)?;
        let Queue { index, kick, call, config_change, .. } = set_up;
        Ok(Self { queue, index, kick, call, used: false, config_change })
    }

    /// Asks the driver for a reset where `result` is an error.
    fn checked<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        result.inspect_err(|_| self.config_change.ask_for_reset())
    }

    /// Its number in the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Readable when the driver has kicked.
    pub fn kick(&self) -> RawFd {
        self.kick.as_raw_fd()
    }

    /// Takes note of a kick.
    pub fn take_kick(&self) {
        let _ = self.kick.read();
    }

    /// The next chain. When there is none, the driver kicks for the next one it makes available.
    pub fn pop<'m>(
        &mut self,
        memory: &'m GuestMemory,
    ) -> Result<Option<DescriptorChain<&'m GuestMemory>>, Error> {
        // What the driver made available before it could know that a kick is wanted is seen the second time.
        for _ in 0..2 {
            let chain = self.queue.iter(memory).map(|mut chains| chains.next());
            if let Some(chain) = self.checked(chain)? {
                return Ok(Some(chain));
            }
            let came = self.queue.enable_notification(memory);
            if !self.checked(came)? {
                break;
            }
        }
        Ok(None)
    }

    /// Gives the chain that begins at `head` back, `written` bytes of it written.
    pub fn add_used(&mut self, memory: &GuestMemory, head: u16, written: u32) -> Result<(), Error> {
        self.used = true;
        let result = self.queue.add_used(memory, head, written);
        self.checked(result)
    }

    /// Interrupts the driver if something was used since the last time, and it wants to know.
    pub fn notify(&mut self, memory: &GuestMemory) -> Result<(), Error> {
        if !std::mem::take(&mut self.used) {
            return Ok(());
        }
        let wanted = self.queue.needs_notification(memory);
        if self.checked(wanted)? {
            // The counter of an eventfd is full only if nobody has looked for 2^64 - 2 interrupts.
            let _ = self.call.write(1);
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::virtio::Activation;

    const RINGS: u64 = 0x1000;
    const STRIDE: u64 = 0x4000;
    const SIZE: u16 = 16;
    /// Guest memory for the buffers of a test, to the end of memory.
    pub(in crate::virtio) const BUFFERS: u64 = 0x1_0000;

    /// A driver of a device with up to three queues.
    pub(in crate::virtio) struct Driver {
        pub(in crate::virtio) memory: GuestMemory,
        calls: Vec<EventFd>,
        /// Descriptors and chains so far, by queue.
        made: [(u16, u16); 3],
    }

    impl Driver {
        pub(in crate::virtio) fn new() -> Self {
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x2_0000)]).unwrap();
            Self { memory, calls: Vec::new(), made: Default::default() }
        }

        /// What the device gets of it.
        pub(in crate::virtio) fn activation(&mut self, queues: u16) -> Activation {
            let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
            self.calls = (0..queues).map(|_| event()).collect();
            let config_change = Arc::<ConfigChange>::default();
            let queue = |index: u16| {
                let start = RINGS + STRIDE * u64::from(index);
                let call = self.calls[usize::from(index)].try_clone().unwrap();
                let (descriptors, available, used) = (start, start + 0x1000, start + 0x2000);
                let config_change = Arc::clone(&config_change);
                Queue { index, size: SIZE, descriptors, available, used, kick: event(), call, config_change }
            };
            Activation {
                features: 0,
                queues: (0..queues).map(queue).collect(),
                config_change: Arc::clone(&config_change),
            }
        }

        /// Makes a chain of these pieces available: address, length, whether the device writes.
        pub(in crate::virtio) fn offer(&mut self, queue: usize, pieces: &[(u64, u32, bool)]) {
            let start = RINGS + STRIDE * queue as u64;
            let (first, chains) = self.made[queue];
            for (index, (address, length, device_writes)) in (first..).zip(pieces) {
                let last = index == first + pieces.len() as u16 - 1;
                let at = start + 16 * u64::from(index);
                self.memory.write_obj(*address, GuestAddress(at)).unwrap();
                self.memory.write_obj(*length, GuestAddress(at + 8)).unwrap();
                let flags = u16::from(!last) | u16::from(*device_writes) << 1;
                self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
                self.memory.write_obj(index + 1, GuestAddress(at + 14)).unwrap();
            }
            let slot = start + 0x1004 + 2 * u64::from(chains % SIZE);
            self.memory.write_obj(first, GuestAddress(slot)).unwrap();
            self.memory.write_obj(chains + 1, GuestAddress(start + 0x1002)).unwrap();
            self.made[queue] = (first + pieces.len() as u16, chains + 1);
        }

        /// The lengths in the used ring.
        pub(in crate::virtio) fn used(&self, queue: usize) -> Vec<u32> {
            let start = RINGS + STRIDE * queue as u64 + 0x2000;
            let count: u16 = self.memory.read_obj(GuestAddress(start + 2)).unwrap();
            let length = |entry: u16| self.memory.read_obj(GuestAddress(start + 8 + 8 * u64::from(entry)));
            (0..count).map(|entry| length(entry).unwrap()).collect()
        }

        pub(in crate::virtio) fn interrupted(&self, queue: usize) -> bool {
            self.calls[queue].read().is_ok()
        }

        pub(in crate::virtio) fn read(&self, address: u64, length: usize) -> Vec<u8> {
            let mut bytes = vec![0; length];
            self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            bytes
        }

        pub(in crate::virtio) fn write(&self, address: u64, bytes: &[u8]) {
            self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        }
    }

    #[test]
    fn an_index_that_jumps_is_an_error_and_no_loop() {
        let mut driver = Driver::new();
        let mut activation = driver.activation(1);
        let mut ring = Ring::new(activation.queues.remove(0), 0).unwrap();
        assert!(ring.pop(&driver.memory).unwrap().is_none());
        driver.offer(0, &[(BUFFERS, 4, true)]);
        let head = ring.pop(&driver.memory).unwrap().unwrap().head_index();
        ring.add_used(&driver.memory, head, 4).unwrap();
        ring.notify(&driver.memory).unwrap();
        ring.notify(&driver.memory).unwrap();
        assert_eq!((driver.used(0), driver.calls[0].read().unwrap()), (vec![4], 1), "one interrupt");
        assert!(ring.add_used(&driver.memory, SIZE, 0).is_err(), "no such descriptor");
        activation.config_change.reset();
        driver.write(RINGS + 0x1002, &(2 + SIZE).to_le_bytes());
        assert!(ring.pop(&driver.memory).is_err());
        assert!(activation.config_change.needs_reset());
    }
}
