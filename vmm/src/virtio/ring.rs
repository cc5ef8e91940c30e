//! A split ring that the VMM serves itself: chains in, used entries and interrupts out.
//!
//! The driver writes descriptors and indices at any time. The queue crate bounds what it walks; a ring whose indices make no
//! sense is an error, after which it is to be left alone until the driver resets the device.

use std::os::fd::{AsRawFd, RawFd};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{DescriptorChain, Error, Queue as SplitQueue, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::Queue;
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
}

impl Ring {
    /// The ring that the driver set up, with the features it agreed to.
    pub fn new(set_up: Queue, features: u64) -> Result<Self, Error> {
        let mut queue = SplitQueue::new(set_up.size)?;
        queue.try_set_size(set_up.size)?;
        queue.try_set_desc_table_address(GuestAddress(set_up.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(set_up.available))?;
        queue.try_set_used_ring_address(GuestAddress(set_up.used))?;
        queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        queue.set_ready(true);
        Ok(Self { queue, index: set_up.index, kick: set_up.kick, call: set_up.call, used: false })
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
            if let Some(chain) = self.queue.iter(memory)?.next() {
                return Ok(Some(chain));
            }
            if !self.queue.enable_notification(memory)? {
                break;
            }
        }
        Ok(None)
    }

    /// Gives the chain that begins at `head` back, `written` bytes of it written.
    pub fn add_used(&mut self, memory: &GuestMemory, head: u16, written: u32) -> Result<(), Error> {
        self.used = true;
        self.queue.add_used(memory, head, written)
    }

    /// Interrupts the driver if something was used since the last time, and it wants to know.
    pub fn notify(&mut self, memory: &GuestMemory) -> Result<(), Error> {
        if std::mem::take(&mut self.used) && self.queue.needs_notification(memory)? {
            // The counter of an eventfd is full only if nobody has looked for 2^64 - 2 interrupts.
            let _ = self.call.write(1);
        }
        Ok(())
    }
}
