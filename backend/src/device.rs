//! The virtio-net device as the frontend sees it: features, configuration space, and the hand-over of its rings.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, Once, OnceLock, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::VhostUserBackend;
use virtio_bindings::bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_VERSION_1};
use virtio_bindings::bindings::virtio_net::*;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use crate::cli::MacAddress;
use crate::port::LEAST_MTU;
use crate::sandbox::{Role, Sandbox};
use crate::stats::Direction;
use crate::uplink::Offloads;
use crate::vring::Vring;

/// Virtio features offered. Frontends intersect them with their own, so the bits of the control queue must be here
/// although the control queue itself is always the frontend's.
const FEATURES: &[u32] = &[
    VIRTIO_F_VERSION_1,
    VIRTIO_F_IN_ORDER,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
];

/// Those of them that need the control queue, besides MQ.
const CONTROL_QUEUE_FEATURES: &[u32] =
    &[VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_GUEST_ANNOUNCE];

/// Features offered when the uplink understands the virtio header (checksum and segmentation left to somebody else).
const OFFLOAD_FEATURES: &[u32] = &[
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
];

/// Bytes of configuration space that can be asked for.
const CONFIG_SPACE: usize = 256;

/// Entries a ring can have at most (the largest a split ring can have).
const MAX_QUEUE_SIZE: usize = 32_768;

/// Bytes of the virtio header before each frame: it grew by `num_buffers` with mergeable buffers and virtio 1.0.
pub fn header_length(features: u64) -> usize {
    let modern = (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_NET_F_MRG_RXBUF);
    if features & modern != 0 { 12 } else { 10 }
}

/// The two rings of one queue pair.
#[derive(Clone)]
pub struct QueuePair {
    /// Which pair.
    pub index: usize,
    /// Ring `2 * index`: frames to the guest (the driver's receive queue).
    pub to_guest: Vring,
    /// Ring `2 * index + 1`: frames from the guest (the driver's transmit queue).
    pub from_guest: Vring,
}

impl QueuePair {
    /// The ring of this direction.
    pub fn ring(&self, direction: Direction) -> &Vring {
        match direction {
            Direction::ToGuest => &self.to_guest,
            Direction::FromGuest => &self.from_guest,
        }
    }
}

/// The MTU a driver is offered, which messages can set.
#[derive(Debug)]
pub struct Mtu {
    offered: Option<u16>,
    /// 0 = none.
    now: AtomicU16,
}

impl Mtu {
    /// What the options say.
    pub fn new(offered: Option<u16>) -> Self {
        Mtu { offered, now: AtomicU16::new(offered.unwrap_or(0)) }
    }

    /// Takes the frontend's, unless it is less than any or more than was offered; tells whether it was taken.
    pub fn set(&self, mtu: u16) -> bool {
        let fits = mtu >= LEAST_MTU && mtu <= self.offered.unwrap_or(u16::MAX);
        if fits {
            self.now.store(mtu, Ordering::Relaxed);
        }
        fits
    }

    /// The one of now, if there is one.
    pub fn now(&self) -> Option<u16> {
        Some(self.now.load(Ordering::Relaxed)).filter(|mtu| *mtu != 0)
    }
}

/// What a session's device is like.
#[derive(Clone)]
pub struct Model {
    /// Queue pairs.
    pub queue_pairs: usize,
    /// MAC address to offer.
    pub mac: Option<MacAddress>,
    /// MTU to offer.
    pub mtu: Arc<Mtu>,
    /// Whether the frontend has a control queue.
    pub control_queue: bool,
    /// The device-wide side of the uplink.
    pub offloads: Offloads,
    /// How the crate's threads are confined.
    pub sandbox: Sandbox,
}

/// One session's device.
pub struct Device {
    model: Model,
    /// Set once the crate's thread for messages is confined.
    is_confined: Once,
    /// Signalled from the start, one a worker: the crate gives a backend its rings only together with an event.
    births: Vec<EventFd>,
    born: Mutex<Sender<QueuePair>>,
    rings: Vec<OnceLock<QueuePair>>,
    /// Exit eventfds given to the crate's workers, which let go of them without closing.
    exits: Mutex<Vec<RawFd>>,
}

impl Device {
    /// A device whose rings arrive on `born` once the crate's workers run.
    pub fn new(model: Model, born: Sender<QueuePair>) -> nix::Result<Self> {
        let signalled = || EventFd::from_value_and_flags(1, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let queue_pairs = model.queue_pairs;
        Ok(Device {
            model,
            is_confined: Once::new(),
            births: (0..queue_pairs).map(|_| signalled()).collect::<Result<_, _>>()?,
            born: Mutex::new(born),
            rings: (0..queue_pairs).map(|_| OnceLock::new()).collect(),
            exits: Mutex::new(Vec::new()),
        })
    }

    /// The event number of a birth; the numbers up to the queues' count belong to the crate.
    pub fn birth_event(&self) -> u64 {
        2 * self.model.queue_pairs as u64 + 1
    }

    /// For each worker, the eventfd to register with it under [`Self::birth_event`].
    pub fn births(&self) -> &[EventFd] {
        &self.births
    }

    fn is_offered(&self, feature: u32) -> bool {
        match feature {
            VIRTIO_NET_F_MQ => self.model.queue_pairs > 1 && self.model.control_queue,
            _ if CONTROL_QUEUE_FEATURES.contains(&feature) => self.model.control_queue,
            _ => true,
        }
    }

    /// The configuration space, virtio 1.2, 5.1.4: mac, status, max_virtqueue_pairs, mtu.
    fn config(&self) -> Vec<u8> {
        let Model { mac, mtu, queue_pairs, .. } = &self.model;
        let words = [VIRTIO_NET_S_LINK_UP as u16, *queue_pairs as u16, mtu.now().unwrap_or(0)];
        [mac.unwrap_or_default().0.as_slice(), words.map(u16::to_le_bytes).as_flattened()].concat()
    }

    fn pairs(&self) -> impl Iterator<Item = &QueuePair> {
        self.rings.iter().filter_map(OnceLock::get)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        for fd in self.exits.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // SAFETY: the worker took this descriptor out of its owner (`into_raw_fd`) to register it and forgot it;
            // the device is dropped after the workers have ended, so nobody uses or closes it but us.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        2 * self.model.queue_pairs
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        let offloads: &[u32] = if self.model.offloads.is_supported() { OFFLOAD_FEATURES } else { &[] };
        let mac: &[u32] = if self.model.mac.is_some() { &[VIRTIO_NET_F_MAC] } else { &[] };
        let mtu: &[u32] = if self.model.mtu.offered.is_some() { &[VIRTIO_NET_F_MTU] } else { &[] };
        [FEATURES, offloads, mac, mtu]
            .into_iter()
            .flatten()
            .filter(|&&bit| self.is_offered(bit))
            .fold(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), |all, bit| all | 1 << bit)
    }

    /// Called on the crate's thread for messages, for the first time by the message the door begins each session with.
    fn acked_features(&self, features: u64) {
        self.is_confined.call_once(|| self.model.sandbox.tighten(Role::Messages));
        self.model.offloads.negotiated(features);
        for pair in self.pairs() {
            pair.to_guest.control(|ring| ring.set_features(features));
            pair.from_guest.control(|ring| ring.set_features(features));
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::MTU
    }

    /// EVENT_IDX comes with all the other features.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        // Frontends may ask for more than we have; virtio says the rest does not exist, QEMU wants full length.
        let mut config = self.config();
        let (start, end) = (offset as usize, offset as usize + size as usize);
        config.resize(end.max(config.len()).min(CONFIG_SPACE), 0);
        config.get(start..end).map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        for pair in self.pairs() {
            pair.to_guest.control(|ring| ring.set_memory(memory.memory().into_inner()));
            pair.from_guest.control(|ring| ring.set_memory(memory.memory().into_inner()));
        }
        Ok(())
    }

    /// One worker a queue pair.
    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.model.queue_pairs).map(|pair| 0b11 << (2 * pair)).collect()
    }

    fn exit_event(&self, _worker: usize) -> Option<(EventConsumer, EventNotifier)> {
        let (consumer, notifier) =
            new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()?;
        let fd = consumer.into_raw_fd();
        self.exits.lock().unwrap_or_else(PoisonError::into_inner).push(fd);
        // SAFETY: `fd` was just taken out of its owner; it is passed on as the owner the crate expects.
        Some((unsafe { EventConsumer::from_raw_fd(fd) }, notifier))
    }

    /// Never fails: an error would end the crate's worker silently.
    fn handle_event(&self, event: u16, _set: EventSet, vrings: &[Vring], worker: usize) -> io::Result<()> {
        if u64::from(event) != self.birth_event() {
            if let Some(vring) = vrings.get(usize::from(event)) {
                vring.wake();
            }
            return Ok(());
        }
        if let Some(birth) = self.births.get(worker) {
            let _ = birth.read();
        }
        self.model.sandbox.tighten(Role::Rings);
        if let (Some(cell), [to_guest, from_guest]) = (self.rings.get(worker), vrings) {
            let pair =
                QueuePair { index: worker, to_guest: to_guest.clone(), from_guest: from_guest.clone() };
            if cell.set(pair.clone()).is_ok() {
                // Nobody listening means the session ended before it began.
                let _ = self.born.lock().unwrap_or_else(PoisonError::into_inner).send(pair);
            }
        }
        Ok(())
    }
}

/// A device shared by the crate's handler and its workers.
pub type SharedDevice = Arc<Device>;

/// The raw descriptor of a birth event, as the crate wants it.
pub fn birth_fd(birth: &EventFd) -> RawFd {
    birth.as_raw_fd()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(control_queue: bool, mac: Option<MacAddress>, mtu: Option<u16>) -> Device {
        let (born, _births) = std::sync::mpsc::channel();
        let (offloads, _) = crate::uplink::open(&crate::cli::UplinkKind::Null, 2).unwrap();
        let mtu = Arc::new(Mtu::new(mtu));
        let sandbox = Sandbox::default();
        let model = Model { queue_pairs: 2, mac, mtu, control_queue, offloads, sandbox };
        Device::new(model, born).unwrap()
    }

    #[test]
    fn without_a_control_queue_nothing_of_it_is_offered() {
        let offered = |control_queue| device(control_queue, None, None).features();
        let of_the_queue =
            CONTROL_QUEUE_FEATURES.iter().fold(1 << VIRTIO_NET_F_MQ, |all, bit| all | 1 << bit);
        assert_eq!(offered(true) & of_the_queue, of_the_queue);
        assert_eq!(offered(false), offered(true) & !of_the_queue);
    }

    #[test]
    fn configuration_space_is_as_long_as_it_is_asked_for_and_no_longer_than_it_can_be() {
        let device = device(true, Some(MacAddress([2, 0, 0, 0, 0, 1])), Some(9000));
        let whole = [2, 0, 0, 0, 0, 1, 1, 0, 2, 0, 0x28, 0x23];
        assert_eq!(device.get_config(0, 12), whole);
        assert_eq!(device.get_config(6, 6), whole[6..]);
        assert_eq!(device.get_config(10, 4), [0x28, 0x23, 0, 0]);
        assert_eq!(device.get_config(0, 256).len(), 256);
        for (offset, size) in [(0, 257), (256, 1), (u32::MAX, u32::MAX)] {
            assert!(device.get_config(offset, size).is_empty());
        }
    }
}
