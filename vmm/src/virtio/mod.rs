//! Virtio 1.2 devices behind the PCI transport.
//!
//! [`registers`] is what the driver programs, [`transport`] the PCI function around it. The rings of [`vhost_user_net`] are
//! served by another process over a [`session`], its [`control_queue`] here; those of [`block`] by a thread of its own, those of [`rng`] and [`console`]
//! by the vCPUs.

pub mod block;
pub mod console;
pub mod control_queue;
pub mod deadline;
pub mod device_status;
pub mod net_options;
pub mod reconnect;
pub mod registers;
pub mod ring;
pub mod rng;
#[cfg(test)]
mod scripted_backend;
pub mod session;
pub mod transport;
pub mod vhost_user_net;

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// A queue as the driver set it up when it said DRIVER_OK. A copy: what the driver writes to the registers afterwards
/// changes nothing here. Addresses are guest-physical and were inside RAM when checked.
#[derive(Debug)]
pub struct Queue {
    /// Number of the queue in the device.
    pub index: u16,
    /// Entries, a power of two.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring, which the driver writes.
    pub available: u64,
    /// Used ring, which the device writes.
    pub used: u64,
    /// Written when the driver has made buffers available.
    pub kick: EventFd,
    /// To be written when buffers were used.
    pub call: EventFd,
    /// To be told when the queue makes no sense.
    pub config_change: Arc<ConfigChange>,
}

/// What a device gets when the driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// Features that driver and device agreed on.
    pub features: u64,
    /// The queues the driver enabled.
    pub queues: Vec<Queue>,
    /// How to tell the driver of a change of the configuration.
    pub config_change: Arc<ConfigChange>,
}

/// A virtio device behind a transport. The guest chooses all offsets and lengths.
pub trait Device: Send {
    /// Virtio device id.
    fn id(&self) -> u16;
    /// PCI class code.
    fn class(&self) -> u32;
    /// Features the device offers.
    fn features(&self) -> u64;
    /// Largest size of each queue.
    fn queue_sizes(&self) -> Vec<u16>;
    /// MSI-X vectors: one for the configuration and one for each queue, unless queues are to share one.
    fn vectors(&self) -> u16 {
        self.queue_sizes().len() as u16 + 1
    }
    /// A read of the device's configuration; what is not there reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// The driver is ready. A device that cannot go on says so in its own way; the driver cannot.
    fn activate(&mut self, activation: Activation);
    /// Whether [`Device::kicked`] serves this queue; all others are kicked through their eventfd.
    fn serves(&self, queue: u16) -> bool;
    /// The driver kicked a queue that the device serves on the vCPU's own thread.
    fn kicked(&mut self, queue: u16);
    /// The driver gave up the device. When this returns nobody touches the queues any more.
    fn reset(&mut self);
}

/// Reads a structure of the device as a driver does: what is not there is zero.
fn read_bytes(structure: &[u8], offset: u64, data: &mut [u8]) {
    for (index, byte) in data.iter_mut().enumerate() {
        let at = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(index));
        *byte = at.and_then(|at| structure.get(at)).copied().unwrap_or(0);
    }
}

/// How a device tells its driver that the configuration changed, or that it cannot go on.
#[derive(Debug, Default)]
pub struct ConfigChange {
    needs_reset: AtomicBool,
    generation: AtomicU8,
    status: AtomicU8,
    call: Mutex<Option<EventFd>>,
}

const ISR_CONFIG: u8 = 1 << 1;

impl ConfigChange {
    /// The configuration changed: a new generation, and an interrupt if the driver wants one.
    pub fn announce(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.status.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        if let Some(call) = &*self.call.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = call.write(1);
        }
    }

    /// The device cannot go on with what the driver set up or wrote. DEVICE_NEEDS_RESET shows in its status, with an interrupt
    /// (virtio 1.2, 2.1.2), until the driver resets it.
    pub fn ask_for_reset(&self) {
        if !self.needs_reset.swap(true, Ordering::SeqCst) {
            self.announce();
        }
    }

    /// Whether the device waits for a reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// The driver reset the device: changes interrupt nobody.
    fn reset(&self) {
        self.set_call(None);
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    /// The generation as the driver reads it.
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    /// The interrupt status register: reading clears it.
    fn take_status(&self) -> u8 {
        self.status.swap(0, Ordering::SeqCst)
    }

    /// From now on changes interrupt through this eventfd, or not at all.
    fn set_call(&self, call: Option<EventFd>) {
        *self.call.lock().unwrap_or_else(PoisonError::into_inner) = call;
    }
}
