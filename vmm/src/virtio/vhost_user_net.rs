//! The network device: a virtio-net device whose packets a vhost-user backend moves.
//!
//! The VMM has the configuration space and the control queue; the backend has the rings of packets, their kicks come to
//! it from KVM and its calls go to the guest through KVM. So while packets flow nothing of them passes through here.
//!
//! When the backend hangs up, the link goes down and a thread ([`reconnect`]) tries the socket, less often where somebody
//! listens but does not answer. It waits for answers without the device, which the guest goes on to use. When a backend
//! answers again it gets everything anew, each ring from the used index the lost one left in guest memory, and a kick on
//! each, because the driver may have suppressed its own on the word of the lost backend; each call is given once as well,
//! for what the lost backend returned and did not tell. The device never changes what it offers: a backend that comes
//! back with less than the driver negotiated is not taken.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use super::control_queue::{self, Command, ControlQueue};
use super::net_options::NetOptions;
use super::reconnect;
use super::session::{Base, Error, Session};
use super::{Activation, ConfigChange, Device, Queue, read_bytes};
use crate::chain::Chain;
use crate::events;
use crate::memory::GuestMemory;
use crate::pause::Pausable;

const CLASS_ETHERNET: u32 = 0x02_0000;
const VIRTIO_F_IN_ORDER: u32 = 35;

/// Features that only the backend can provide: offered if it does.
const FROM_BACKEND: &[u32] = &[
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_F_VERSION_1,
    VIRTIO_F_IN_ORDER,
];
/// Features of the configuration space and the control queue, which are here.
const FROM_VMM: &[u32] = &[
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
];

/// What the driver has set up.
struct Running {
    features: u64,
    rings: Vec<Queue>,
    control: Option<ControlQueue>,
    pairs: u16,
    config_change: Arc<ConfigChange>,
}

impl Running {
    fn is_enabled(&self, ring: u16) -> bool {
        ring < 2 * self.pairs
    }
}

/// The device.
struct Net {
    options: NetOptions,
    memory: GuestMemory,
    offered: u64,
    mac: [u8; 6],
    announce: bool,
    /// Whether the VM is paused: the backend has no ring.
    paused: bool,
    session: Option<Session>,
    running: Option<Running>,
    /// Written when a backend is there again.
    back: EventFd,
    /// Never written: for a backend's own control queue.
    no_kick: EventFd,
}

impl Net {
    /// Number of the control queue: after the pairs in use, which are one if the driver does not know of more.
    fn control_index(&self, features: u64) -> u16 {
        if features & (1 << VIRTIO_NET_F_MQ) != 0 { 2 * self.options.pairs } else { 2 }
    }

    /// The link, and whether the driver is asked to announce itself.
    fn status(&self) -> u16 {
        let up = if self.session.is_some() { VIRTIO_NET_S_LINK_UP } else { 0 };
        let announce = if self.announce { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        (up | announce) as u16
    }

    fn changed(&self) {
        if let Some(running) = &self.running {
            running.config_change.announce();
        }
    }

    /// A call to the backend failed. The hang-up that follows is met in the event loop, where the rest is done.
    fn give_up(&self, error: &Error) {
        tracing::warn!("{}", Chain(error));
        if let Some(session) = &self.session {
            session.abandon();
        }
    }

    fn activate(&mut self, activation: Activation) {
        let Activation { features, queues, config_change } = activation;
        let control_index = self.control_index(features);
        let (control, mut rings): (Vec<_>, Vec<_>) =
            queues.into_iter().partition(|queue| queue.index == control_index);
        rings.retain(|queue| queue.index < control_index);
        let control = control.first().and_then(|queue| match ControlQueue::new(queue, features) {
            Ok(queue) => Some(queue),
            Err(error) => {
                tracing::info!("the driver set up a control queue that does not work: {error}");
                None
            }
        });
        self.running = Some(Running { features, rings, control, pairs: 1, config_change });
        if let Err(error) = self.start(Base::Fresh) {
            self.give_up(&error);
        }
    }

    /// Gives the rings to the backend, if both are there.
    fn start(&mut self, base: Base) -> Result<(), Error> {
        match (&mut self.session, &self.running) {
            // They are started at the end of the pause.
            (Some(session), _) if self.paused && session.can_rest() => Ok(()),
            (Some(session), Some(running)) => {
                session.start(&self.memory, running.features, &running.rings, base, |ring| {
                    running.is_enabled(ring)
                })
            }
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.running = None;
        self.announce = false;
        if let Some(Err(error)) = self.session.as_mut().map(Session::stop) {
            self.give_up(&error);
        }
    }

    fn serve_control_queue(&mut self) {
        let Some(mut control) = self.running.as_mut().and_then(|running| running.control.take()) else {
            return;
        };
        let memory = self.memory.clone();
        if let Err(error) = control.process(&memory, |command| self.command(command)) {
            // The ring is not usable; leave it alone until the driver resets the device.
            tracing::info!("the control queue stops: {error}");
            return;
        }
        if let Some(running) = &mut self.running {
            running.control = Some(control);
        }
    }

    fn command(&mut self, command: Command) -> bool {
        match command {
            Command::Pairs(pairs) => self.set_pairs(pairs),
            Command::Mac(mac) => {
                self.mac = mac;
                true
            }
            Command::AnnounceAck => {
                self.announce = false;
                true
            }
            Command::ReceiveMode => true,
            Command::Unknown => false,
        }
    }

    fn set_pairs(&mut self, pairs: u16) -> bool {
        let Some(running) = &mut self.running else { return false };
        if running.features & (1 << VIRTIO_NET_F_MQ) == 0 || !(1..=self.options.pairs).contains(&pairs) {
            return false;
        }
        let before = std::mem::replace(&mut running.pairs, pairs);
        let Some(session) = &mut self.session else { return true };
        let result = running
            .rings
            .iter()
            .filter(|ring| (ring.index < 2 * before) != running.is_enabled(ring.index))
            .try_for_each(|ring| session.set_enabled(ring.index, running.is_enabled(ring.index)));
        if let Err(error) = result {
            self.give_up(&error);
        }
        // Where the backend was lost, its successor gets the new number.
        true
    }

    /// Takes the rings from the backend for a pause; whether it gave them back.
    fn rest(&mut self) -> bool {
        self.paused = true;
        let Some(session) = self.session.as_mut().filter(|session| session.can_rest()) else { return true };
        let stopped = session.stop();
        stopped.inspect_err(|error| self.give_up(error)).is_ok()
    }

    /// Gives the rings to the backend again, each from where it left it.
    fn go_on(&mut self) {
        self.paused = false;
        if !self.session.as_ref().is_some_and(Session::can_rest) {
            return;
        }
        if let Err(error) = self.start(Base::UsedIndex) {
            return self.give_up(&error);
        }
        // One that the backend had not seen yet is no more to be seen.
        let rings = self.running.iter().flat_map(|running| &running.rings);
        rings.for_each(|ring| drop(ring.kick.write(1)));
    }

    /// The backend hung up.
    fn lost(&mut self) {
        tracing::warn!(
            "the vhost-user backend at {} is gone; its link is down until one listens there again",
            self.options.socket.display()
        );
        self.session = None;
        self.announce = false;
        self.changed();
    }

    /// Goes on with `session`, if its backend can do what the driver was promised.
    fn resume(&mut self, session: Session) -> Result<(), Error> {
        // Without a driver all that the next one will be offered is needed.
        let needed = self.running.as_ref().map_or(self.offered, |running| running.features) & backend_mask();
        let missing = needed & !session.offered();
        if missing != 0 {
            return Err(Error::Changed { path: self.options.socket.clone(), missing });
        }
        self.session = Some(session);
        if let Err(error) = self.start(Base::UsedIndex) {
            self.session = None;
            return Err(error);
        }
        if let Some(running) = &self.running {
            for ring in &running.rings {
                let _ = ring.kick.write(1);
                let _ = ring.call.write(1);
            }
            self.announce = running.features & (1 << VIRTIO_NET_F_GUEST_ANNOUNCE) != 0;
        }
        tracing::warn!("the vhost-user backend at {} is back", self.options.socket.display());
        self.changed();
        // The counter of an eventfd overflows only after 2^64 - 2 backends.
        let _ = self.back.write(1);
        Ok(())
    }
}

fn mask(bits: &[u32]) -> u64 {
    bits.iter().fold(0, |mask, bit| mask | 1 << bit)
}

/// All features in which the backend has a say.
fn backend_mask() -> u64 {
    mask(FROM_BACKEND) | mask(&[VIRTIO_NET_F_MQ])
}

/// What the device offers with a backend that offers `backend`.
fn offer(backend: u64, pairs: u16) -> u64 {
    let several = if pairs > 1 { backend & mask(&[VIRTIO_NET_F_MQ]) } else { 0 };
    backend & mask(FROM_BACKEND) | mask(FROM_VMM) | several
}

/// The device, shared between the vCPUs that program it and the event loop that watches its backend.
#[derive(Clone)]
pub struct VhostUserNet(Arc<Mutex<Net>>);

impl VhostUserNet {
    /// Connects to the backend, which must be there.
    pub fn new(options: NetOptions, memory: GuestMemory) -> Result<Self, Error> {
        let no_kick = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let session = Session::connect(&options.socket, u64::from(2 * options.pairs), no_kick.try_clone()?)?;
        if session.offered() & (1 << VIRTIO_F_VERSION_1) == 0 {
            return Err(Error::Lacks { path: options.socket, feature: "VIRTIO_F_VERSION_1" });
        }
        let offered = offer(session.offered(), options.pairs);
        if options.pairs > 1 && offered & (1 << VIRTIO_NET_F_MQ) == 0 {
            return Err(Error::Lacks {
                path: options.socket,
                feature: "several queue pairs (VIRTIO_NET_F_MQ)",
            });
        }
        let back = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let mac = options.mac.0;
        let net = Net {
            options,
            memory,
            offered,
            mac,
            announce: false,
            paused: false,
            session: Some(session),
            running: None,
            back,
            no_kick,
        };
        Ok(Self(Arc::new(Mutex::new(net))))
    }

    fn lock(&self) -> MutexGuard<'_, Net> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects to a backend and goes on with it. Only the latter holds the device.
    fn reconnect(&self) -> Result<(), Error> {
        let (path, rings, no_kick) = {
            let net = self.lock();
            (net.options.socket.clone(), u64::from(2 * net.options.pairs), net.no_kick.try_clone()?)
        };
        let session = Session::connect(&path, rings, no_kick)?;
        self.lock().resume(session)
    }

    /// Looks for a backend until there is one or the device is gone.
    fn look_for_backend(&self) {
        let device = Arc::downgrade(&self.0);
        let started = reconnect::start(move || Some(Self(device.upgrade()?).reconnect()));
        if let Err(error) = started {
            tracing::error!("cannot start the thread that looks for the backend: {error}");
        }
    }
}

impl Device for VhostUserNet {
    fn id(&self) -> u16 {
        VIRTIO_ID_NET as u16
    }

    fn class(&self) -> u32 {
        CLASS_ETHERNET
    }

    fn features(&self) -> u64 {
        self.lock().offered
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let net = self.lock();
        let mut sizes = vec![net.options.queue_size; usize::from(2 * net.options.pairs)];
        sizes.push(net.options.queue_size.min(control_queue::SIZE));
        sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let net = self.lock();
        let mut config = [0; 10];
        config[..6].copy_from_slice(&net.mac);
        config[6..8].copy_from_slice(&net.status().to_le_bytes());
        config[8..].copy_from_slice(&net.options.pairs.to_le_bytes());
        read_bytes(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        self.lock().activate(activation);
    }

    fn serves(&self, queue: u16) -> bool {
        let net = self.lock();
        net.running.as_ref().is_some_and(|running| queue == net.control_index(running.features))
    }

    fn kicked(&mut self, _: u16) {
        self.lock().serve_control_queue();
    }

    fn reset(&mut self) {
        self.lock().reset();
    }
}

impl Pausable for VhostUserNet {
    /// The session has a time limit of its own.
    fn pause(&self, _: Duration) -> bool {
        self.lock().rest()
    }

    fn resume(&self) {
        self.lock().go_on();
    }

    fn name(&self) -> String {
        format!("the backend at {}", self.lock().options.socket.display())
    }
}

/// The event loop's side: the hang-up of the backend, and its return.
impl MutEventSubscriber for VhostUserNet {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let mut net = self.lock();
        if events.fd() == net.back.as_raw_fd() {
            let _ = net.back.read();
            watch_hang_up(&net, ops);
        } else if net.session.as_ref().is_some_and(|session| session.as_raw_fd() == events.fd()) {
            let _ = ops.remove(Events::empty_raw(events.fd()));
            net.lost();
            drop(net);
            self.look_for_backend();
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let net = self.lock();
        events::watch(ops, net.back.as_raw_fd());
        watch_hang_up(&net, ops);
    }
}

/// Replies are read by whoever asks; the event loop only wants to know of the end.
fn watch_hang_up(net: &Net, ops: &mut EventOps) {
    if let Some(session) = &net.session
        && let Err(error) =
            ops.add(Events::new_raw(session.as_raw_fd(), EventSet::READ_HANG_UP | EventSet::HANG_UP))
    {
        tracing::error!("cannot watch the connection to the backend: {error:?}");
    }
}

#[cfg(test)]
#[path = "vhost_user_net_test.rs"]
mod tests;
