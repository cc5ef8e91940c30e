//! The virtio PCI transport: a device as a PCI function with one BAR, in it the structures of the standard and MSI-X.
//!
//! ```text
//! 0x0000  common configuration ([`super::registers`])
//! 0x1000  interrupt status
//! 0x2000  device configuration
//! 0x3000  notifications: 4 bytes for each queue
//! 0x4000  MSI-X table
//! 0x5000  MSI-X pending bits
//! ```
//!
//! A kick is a write to the queue's notify address. While the device runs, KVM turns it into a write of the queue's
//! eventfd without leaving the kernel; whatever the width and value, because the address alone names the queue. A call
//! is a write of the eventfd of the queue's MSI-X vector, which KVM turns into an interrupt. So neither passes through here.

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::registers::{Action, NO_VECTOR, Registers};
use super::{Activation, ConfigChange, Device, Queue};
use crate::gsi::{Error as GsiError, MessageRouter};
use crate::memory::GuestMemory;
use crate::pci::bus::Function;
use crate::pci::config::{ConfigSpace, Identity, Mapping};
use crate::pci::msix::{self, Msix};

/// Bytes of the BAR.
pub const BAR_SIZE: u64 = 0x8000;
/// Most queues a device may have: as many vectors, and one for the configuration, fit their place in the BAR.
pub const MAX_QUEUES: usize = 254;

const VIRTIO_VENDOR: u16 = 0x1af4;
const MODERN_DEVICE: u16 = 0x1040;
const CAPABILITY_VENDOR: u8 = 0x09;
const PAGE: u64 = 0x1000;
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
/// Bytes between the notify addresses of two queues.
const NOTIFY_STRIDE: u64 = 4;

/// Kinds of structure a capability can point at.
#[derive(Debug, Clone, Copy)]
#[repr(u8)]
enum Structure {
    Common = 1,
    Notify = 2,
    Isr = 3,
    Device = 4,
    ConfigAccess = 5,
}

/// Where kicks are turned into writes of an eventfd.
pub trait KickRouter: Send + Sync {
    /// From now on a write to `address` writes `event`.
    fn connect(&self, address: u64, event: &EventFd) -> Result<(), kvm_ioctls::Error>;
    /// No longer.
    fn disconnect(&self, address: u64, event: &EventFd) -> Result<(), kvm_ioctls::Error>;
}

impl KickRouter for VmFd {
    fn connect(&self, address: u64, event: &EventFd) -> Result<(), kvm_ioctls::Error> {
        self.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
    }
    fn disconnect(&self, address: u64, event: &EventFd) -> Result<(), kvm_ioctls::Error> {
        self.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
    }
}

/// What a transport needs of the machine.
#[derive(Clone)]
pub struct Wiring {
    /// Guest memory, in which rings must lie.
    pub memory: GuestMemory,
    /// For MSI-X.
    pub messages: Arc<dyn MessageRouter>,
    /// For kicks.
    pub kicks: Arc<dyn KickRouter>,
}

/// What can go wrong while a transport is made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Interrupt vectors.
    #[error(transparent)]
    Gsi(#[from] GsiError),
    /// Kick eventfds.
    #[error("cannot make the eventfd of a queue")]
    EventFd(#[source] std::io::Error),
}

/// A virtio device as a PCI function.
pub struct Transport<D> {
    device: D,
    wiring: Wiring,
    registers: Registers,
    config: ConfigSpace,
    msix: Msix,
    config_change: Arc<ConfigChange>,
    kicks: Vec<EventFd>,
    /// Notify addresses that KVM serves now.
    connected: Vec<(u64, usize)>,
    msix_capability: usize,
    access_capability: usize,
}

impl<D: Device> Transport<D> {
    /// Puts `device` behind a function whose BAR starts out at `bar_address`.
    pub fn new(device: D, wiring: Wiring, bar_address: u64) -> Result<Self, Error> {
        let mut sizes = device.queue_sizes();
        sizes.truncate(MAX_QUEUES);
        let vectors = device.vectors().min(MAX_QUEUES as u16 + 1);
        let msix = Msix::new(Arc::clone(&wiring.messages), vectors)?;
        let mut config = ConfigSpace::new(Identity {
            vendor: VIRTIO_VENDOR,
            device: MODERN_DEVICE + device.id(),
            revision: 1,
            class: device.class(),
            subsystem_vendor: VIRTIO_VENDOR,
            subsystem: MODERN_DEVICE + device.id(),
        });
        config.add_bar(0, BAR_SIZE, bar_address);
        let msix_control = [0, (msix::CONTROL_WRITABLE >> 8) as u8];
        let body = msix.capability(0, MSIX_TABLE as u32, MSIX_PENDING as u32);
        let msix_capability = config.add_capability(msix::CAPABILITY, &body, &msix_control);
        for (structure, start) in
            [(Structure::Common, COMMON), (Structure::Isr, ISR), (Structure::Device, DEVICE)]
        {
            config.add_capability(CAPABILITY_VENDOR, &capability(structure, start, PAGE as u32, &[]), &[]);
        }
        let stride = (NOTIFY_STRIDE as u32).to_le_bytes();
        config.add_capability(
            CAPABILITY_VENDOR,
            &capability(Structure::Notify, NOTIFY, PAGE as u32, &stride),
            &[],
        );
        // Through this one a driver reaches the BAR without memory accesses: it writes where, then reads or writes what.
        let access = capability(Structure::ConfigAccess, 0, 0, &[0; 4]);
        let access_writable = [0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        let access_capability = config.add_capability(CAPABILITY_VENDOR, &access, &access_writable);
        let eventfd = |_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::EventFd);
        Ok(Self {
            registers: Registers::new(device.features(), &sizes, vectors),
            kicks: (0..sizes.len()).map(eventfd).collect::<Result<_, _>>()?,
            device,
            wiring,
            config,
            msix,
            config_change: Arc::default(),
            connected: Vec::new(),
            msix_capability,
            access_capability,
        })
    }

    fn activate(&mut self) {
        let queues: Option<Vec<_>> = (0..self.kicks.len())
            .filter(|&index| self.registers.queues()[index].enabled)
            .map(|i| self.queue(i))
            .collect();
        self.config_change.set_call(self.call(self.registers.config_vector()));
        let Some(queues) = queues else {
            tracing::info!("the driver set up a queue outside its memory; the device waits for a reset");
            self.config_change.ask_for_reset();
            return;
        };
        let config_change = Arc::clone(&self.config_change);
        self.device.activate(Activation { features: self.registers.features(), queues, config_change });
        self.connect_kicks();
    }

    fn reset(&mut self) {
        if self.registers.is_running() {
            self.disconnect_kicks();
            self.device.reset();
        }
        self.config_change.reset();
        self.registers.reset();
    }

    /// The queue as it is now, if its rings lie in guest memory.
    fn queue(&self, index: usize) -> Option<Queue> {
        let registers = &self.registers.queues()[index];
        for (start, length) in registers.areas()? {
            if !self.wiring.memory.check_range(GuestAddress(start), length as usize) {
                return None;
            }
        }
        Some(Queue {
            index: index as u16,
            size: registers.size,
            descriptors: registers.descriptors,
            available: registers.available,
            used: registers.used,
            kick: self.kicks[index].try_clone().ok()?,
            call: self
                .call(registers.vector)
                .or_else(|| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).ok())?,
            config_change: Arc::clone(&self.config_change),
        })
    }

    /// The eventfd behind a vector; nothing if the driver wants no interrupt.
    fn call(&self, vector: u16) -> Option<EventFd> {
        if vector == NO_VECTOR { None } else { self.msix.event(vector)?.try_clone().ok() }
    }

    /// Lets KVM serve the notify addresses where the BAR is now.
    fn connect_kicks(&mut self) {
        let Some(bar) = self.config.mappings().first().copied() else { return };
        for (index, kick) in self.kicks.iter().enumerate() {
            if !self.registers.queues()[index].enabled || self.device.serves(index as u16) {
                continue;
            }
            let address = bar.start + NOTIFY + NOTIFY_STRIDE * index as u64;
            match self.wiring.kicks.connect(address, kick) {
                Ok(()) => self.connected.push((address, index)),
                // Not the end: the kick then comes out to user space, and is served in `notified`.
                Err(error) => {
                    tracing::info!("KVM does not serve kicks of queue {index} at {address:#x}: {error}")
                }
            }
        }
    }

    fn disconnect_kicks(&mut self) {
        for (address, index) in self.connected.drain(..) {
            if let Err(error) = self.wiring.kicks.disconnect(address, &self.kicks[index]) {
                tracing::info!("KVM keeps serving kicks of queue {index} at {address:#x}: {error}");
            }
        }
    }

    /// A kick that KVM did not serve.
    fn notified(&mut self, offset: u64) {
        let index = (offset / NOTIFY_STRIDE) as usize;
        let enabled = self.registers.queues().get(index).is_some_and(|queue| queue.enabled);
        if !enabled || !self.registers.is_running() {
            return;
        }
        if self.device.serves(index as u16) {
            self.device.kicked(index as u16);
        } else {
            let _ = self.kicks[index].write(1);
        }
    }

    /// The place in the BAR that the access capability names, if it is one.
    fn accessed(&self) -> Option<(u64, usize)> {
        let mut window = [0; 12];
        self.config.read(self.access_capability + 4, &mut window);
        let (bar, [offset, length]) = (
            window[0],
            [4, 8].map(|at| window[at..at + 4].iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b))),
        );
        let valid =
            bar == 0 && matches!(length, 1 | 2 | 4) && offset % length == 0 && offset + length <= BAR_SIZE;
        valid.then_some((offset, length as usize))
    }

    /// Whether a configuration access goes to the data of the access capability.
    fn is_access(&self, offset: usize, length: usize) -> bool {
        offset == self.access_capability + 16 && length <= 4
    }
}

/// The body of a virtio capability, which is what follows id and link.
fn capability(structure: Structure, start: u64, length: u32, rest: &[u8]) -> Vec<u8> {
    let size = 16 + rest.len() as u8;
    let mut body = vec![size, structure as u8, 0, 0, 0, 0];
    body.extend((start as u32).to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(rest);
    body
}

impl<D: Device> Function for Transport<D> {
    fn config_read(&mut self, offset: usize, data: &mut [u8]) {
        self.config.read(offset, data);
        if self.is_access(offset, data.len())
            && let Some((at, length)) = self.accessed()
            && length <= data.len()
        {
            self.bar_read(0, at, &mut data[..length]);
        }
    }

    fn config_write(&mut self, offset: usize, data: &[u8]) {
        let before = self.config.mappings();
        self.config.write(offset, data);
        self.msix.set_control(self.config.word(self.msix_capability + 2) & msix::CONTROL_WRITABLE);
        if self.registers.is_running() && self.config.mappings() != before {
            self.disconnect_kicks();
            self.connect_kicks();
        }
        if self.is_access(offset, data.len())
            && let Some((at, length)) = self.accessed()
            && length <= data.len()
        {
            self.bar_write(0, at, &data[..length]);
        }
    }

    fn mappings(&self) -> Vec<Mapping> {
        self.config.mappings()
    }

    fn bar_read(&mut self, _: usize, offset: u64, data: &mut [u8]) {
        let at = offset % PAGE;
        match offset - at {
            COMMON => self.registers.read(at as usize, data, &self.config_change),
            ISR => {
                data.fill(0);
                if let (0, Some(status)) = (at, data.first_mut()) {
                    *status = self.config_change.take_status();
                }
            }
            DEVICE => self.device.read_config(at, data),
            MSIX_TABLE => self.msix.table_read(at, data),
            MSIX_PENDING => self.msix.pending_read(at, data),
            _ => data.fill(0),
        }
    }

    fn bar_write(&mut self, _: usize, offset: u64, data: &[u8]) {
        let at = offset % PAGE;
        match offset - at {
            COMMON => match self.registers.write(at as usize, data) {
                Action::None => {}
                Action::Activate => self.activate(),
                Action::Reset => self.reset(),
            },
            NOTIFY => self.notified(at),
            MSIX_TABLE => self.msix.table_write(at, data),
            _ => {}
        }
    }
}

#[cfg(test)]
#[path = "transport_test.rs"]
mod tests;
