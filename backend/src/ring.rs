//! One virtqueue as the data path sees it: take chains, give them back, ask whether to notify.
//!
//! Who writes what: the driver writes the descriptor table and the available ring, we write the used ring. Everything
//! in the driver's half may change at any moment and is hostile. `virtio-queue` keeps the ring's state and asks for
//! kicks; taking and giving back is here, on parts of the ring that are looked up once, and because several buffers
//! of one mergeable frame must be published by one index update: a driver that saw the first without the others would
//! count a broken frame.
//!
//! Chains are given back strictly in the order they were made available, so the ring can be resumed from the used
//! index alone when this process dies.
//!
//! A ring that the driver (or the frontend) broke is *stopped with one log line*: nothing is taken from it until the
//! frontend sets it up anew.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::mapped::Mapped;
use crate::memory::{Access, Chains};
use crate::stats::Counter;

/// Why a ring was stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The rings' addresses do not lie in the guest's memory.
    #[error("its descriptor table, available ring or used ring is not in guest memory")]
    Addresses,
    /// The size the frontend set is unusable.
    #[error("size {0} is not a power of two")]
    Size(u16),
    /// The index jumped.
    #[error("the driver made {0} chains available at once, more than the ring holds")]
    Index(u16),
    /// Kicks cannot be asked for or refused.
    #[error("cannot write the driver's kick suppression: {0}")]
    Suppression(#[source] virtio_queue::Error),
    /// A head that is not in the descriptor table.
    #[error("the driver made descriptor {0} available, which does not exist")]
    Head(u16),
    /// The eventfd for kicks cannot be read.
    #[error("cannot read the kick eventfd: {0}")]
    Kick(#[source] std::io::Error),
}

/// Where things lie in the available and the used ring, and the bytes of their entries (virtio 1.2, 2.7.6 and 2.7.8).
const FLAGS: usize = 0;
const INDEX: usize = 2;
const ENTRIES: usize = 4;
const AVAILABLE_ENTRY: usize = 2;
const USED_ENTRY: usize = 8;
const DESCRIPTOR: usize = 16;

/// The three parts of a ring in guest memory.
struct Parts {
    table: Mapped,
    available: Mapped,
    used: Mapped,
}

impl Parts {
    /// Looks them up; `None` when one of them does not lie in guest memory.
    fn find(queue: &Queue, memory: &Arc<GuestMemoryMmap>) -> Option<Self> {
        let size = usize::from(queue.size());
        // Behind the entries there is one more word in each ring, for the event index.
        let part = |address, length| Mapped::new(memory, GuestAddress(address), length);
        Some(Parts {
            table: part(queue.desc_table(), DESCRIPTOR * size)?,
            available: part(queue.avail_ring(), ENTRIES + AVAILABLE_ENTRY * size + 2)?,
            used: part(queue.used_ring(), ENTRIES + USED_ENTRY * size + 2)?,
        })
    }
}

/// What a running ring is known by outside of this program: the guest-physical address of its used ring. Another
/// start is another one, although the address may be the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedRing {
    /// The address.
    pub address: u64,
    /// Which start of the ring this is.
    pub start: Wrapping<u32>,
}

/// One virtqueue.
pub struct Ring {
    /// Which of the device's rings this is, and whose, for messages.
    name: String,
    port: tracing::Span,
    queue: Queue,
    /// Counts how often the ring was started.
    start: Wrapping<u32>,
    chains: Chains,
    /// Index behind the last used entry written, and the part of them that the driver can see already.
    next_used: Wrapping<u16>,
    published: Wrapping<u16>,
    /// Used index at the last decision whether to notify.
    decided: Wrapping<u16>,
    kick: Option<Arc<File>>,
    /// Kicks taken out of eventfds that have been replaced since, for [`Self::drain_kick`] to tell of.
    uncounted: u64,
    call: Option<File>,
    error: Option<File>,
    enabled: bool,
    /// The started ring's parts, while its size and addresses are usable with the memory map of now. A frontend may take
    /// a region away and put it back, so they are looked up again with every change.
    parts: Option<Parts>,
    broken: bool,
    bad_size: Option<u16>,
    mergeable: bool,
    header: usize,
    kicks_wanted: bool,
    /// How often the ring was stopped for good.
    stopped: Arc<Counter>,
}

impl Ring {
    /// A stopped ring over `memory`, of at most `max_size` entries.
    pub fn new(memory: Arc<GuestMemoryMmap>, max_size: u16) -> Result<Self, virtio_queue::Error> {
        Ok(Ring {
            name: String::new(),
            port: tracing::Span::none(),
            queue: Queue::new(max_size)?,
            start: Wrapping(0),
            chains: Chains::new(memory, Access::Read),
            next_used: Wrapping(0),
            published: Wrapping(0),
            decided: Wrapping(0),
            kick: None,
            uncounted: 0,
            call: None,
            error: None,
            enabled: false,
            parts: None,
            broken: false,
            bad_size: None,
            mergeable: false,
            header: 12,
            kicks_wanted: true,
            stopped: Arc::default(),
        })
    }

    /// Names the ring in messages, sets which way its buffers are used, and where it is counted that it had to be
    /// stopped.
    pub fn set_role(&mut self, name: String, access: Access, stopped: Arc<Counter>) {
        self.name = name;
        self.port = tracing::Span::current();
        self.stopped = stopped;
        self.chains.set_access(access);
    }

    // --- What the frontend sets -------------------------------------------------------------------------------

    /// Another memory map. What was taken from the ring and not given back is taken again, from the new map.
    pub fn set_memory(&mut self, memory: Arc<GuestMemoryMmap>) {
        self.untake();
        self.chains.set_memory(memory);
        self.check();
    }

    /// Features that change the layout of the ring or of its buffers.
    pub fn set_features(&mut self, features: u64) {
        let has = |bit: u32| features & (1 << bit) != 0;
        self.untake();
        self.queue.set_event_idx(has(VIRTIO_RING_F_EVENT_IDX));
        self.mergeable = has(VIRTIO_NET_F_MRG_RXBUF);
        self.header = crate::device::header_length(features);
        self.kicks_wanted = true;
    }

    /// Addresses of the three parts, as guest-physical addresses.
    pub fn set_addresses(
        &mut self,
        table: u64,
        available: u64,
        used: u64,
    ) -> Result<(), virtio_queue::Error> {
        self.queue.try_set_desc_table_address(GuestAddress(table))?;
        self.queue.try_set_avail_ring_address(GuestAddress(available))?;
        self.queue.try_set_used_ring_address(GuestAddress(used))?;
        self.untake();
        self.check();
        Ok(())
    }

    /// Number of entries.
    pub fn set_size(&mut self, size: u16) {
        self.untake();
        self.bad_size = self.queue.try_set_size(size).is_err().then_some(size);
        self.check();
    }

    /// Index of the next chain to take.
    pub fn set_base(&mut self, base: u16) {
        self.chains.clear();
        self.queue.set_next_avail(base);
        self.broken = false;
    }

    /// Index of the next chain to take: what `GET_VRING_BASE` answers.
    pub fn base(&self) -> u16 {
        self.queue.next_avail().wrapping_sub(self.chains.len() as u16)
    }

    /// Index of the next entry to give back.
    pub fn set_next_used(&mut self, index: u16) {
        self.next_used = Wrapping(index);
        self.published = self.next_used;
        self.decided = self.next_used;
    }

    /// The used index in guest memory.
    pub fn used_index(&self) -> Result<u16, virtio_queue::Error> {
        self.queue.used_idx(&**self.chains.memory(), Ordering::Relaxed).map(|index| index.0)
    }

    /// Starts or stops the ring.
    pub fn set_started(&mut self, started: bool) {
        self.untake();
        let begins = started && !self.queue.ready();
        self.queue.set_ready(started);
        self.start += Wrapping(u32::from(started));
        self.broken = false;
        self.kicks_wanted = true;
        self.check();
        if begins {
            self.begin_at_used_index();
        }
    }

    /// Chains are given back in the order they were made available, so a ring begins where its used index says. The
    /// frontend's base is the same, but for one that had no backend left to ask for it and says 0, as DPDK's virtio-user in
    /// server mode does. (DPDK's own backend corrects it in the same way: `lib/vhost/vhost_user.c`,
    /// `translate_ring_addresses`.)
    fn begin_at_used_index(&mut self) {
        let Some(Parts { used, .. }) = &self.parts else { return };
        let Some(index) = used.load(INDEX, Ordering::Acquire) else { return };
        let base = self.queue.next_avail();
        if index != base {
            tracing::info!("{}: the frontend starts it at index {base}, the ring is at {index}", self.name);
            self.queue.set_next_avail(index);
        }
        self.set_next_used(index);
    }

    /// Enables or disables the ring. A started ring from the guest is consumed even when it is disabled.
    pub fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// The eventfd the driver kicks.
    pub fn set_kick(&mut self, file: Option<File>) {
        self.uncounted = self.drain_kick();
        self.kick = file.map(Arc::new);
    }

    /// The eventfd that notifies the driver.
    pub fn set_call(&mut self, file: Option<File>) {
        self.call = file;
    }

    /// The eventfd that tells the frontend of a broken ring.
    pub fn set_error(&mut self, file: Option<File>) {
        self.error = file;
    }

    /// Returns what is held to the available side, to be taken again.
    fn untake(&mut self) {
        let base = self.base();
        self.chains.clear();
        self.queue.set_next_avail(base);
    }

    /// Looks up a started ring's parts; it pauses while they cannot be found.
    fn check(&mut self) {
        self.parts = None;
        if !self.queue.ready() {
            return;
        }
        let parts = match self.bad_size {
            Some(size) => Err(Error::Size(size)),
            None => Parts::find(&self.queue, self.chains.memory()).ok_or(Error::Addresses),
        };
        match parts {
            Ok(parts) => self.parts = Some(parts),
            Err(problem) => {
                tracing::warn!(parent: &self.port, "{}: {problem}; the ring pauses until that changes", self.name)
            }
        }
    }

    // --- What the data path does ------------------------------------------------------------------------------

    /// Whether chains may be taken: started, its parts found, and not broken.
    pub fn is_running(&self) -> bool {
        self.parts.is_some() && !self.broken
    }

    /// What the ring is known by, while it is running.
    pub fn used_ring(&self) -> Option<UsedRing> {
        self.is_running().then(|| UsedRing { address: self.queue.used_ring(), start: self.start })
    }

    /// Whether frames may pass.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Whether a frame may span several chains.
    pub fn is_mergeable(&self) -> bool {
        self.mergeable
    }

    /// Bytes of the virtio header before each frame.
    pub fn header(&self) -> usize {
        self.header
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The kick eventfd, to sleep on.
    pub fn kick(&self) -> Option<Arc<File>> {
        self.kick.clone()
    }

    /// The chains taken and not given back.
    pub fn chains(&self) -> &Chains {
        &self.chains
    }

    /// Takes chains until `count` chains or `bytes` bytes are held, or none is available.
    pub fn take(&mut self, count: usize, bytes: usize) {
        if self.chains.len() >= count || self.chains.bytes() >= bytes {
            return;
        }
        if let Err(error) = self.try_take(count, bytes) {
            self.stop(error);
        }
    }

    fn try_take(&mut self, count: usize, bytes: usize) -> Result<(), Error> {
        let Some(Parts { table, available, .. }) = &self.parts else { return Ok(()) };
        let size = self.queue.size();
        // Acquire: whoever sees the index sees the entries and descriptors before it.
        let index = available.load(INDEX, Ordering::Acquire).ok_or(Error::Addresses)?;
        let mut next = self.queue.next_avail();
        // What is held has not been given back, so the driver cannot have offered more than the rest of the ring.
        let offered = index.wrapping_sub(self.base());
        if offered > size {
            return Err(Error::Index(offered));
        }
        while next != index && self.chains.len() < count && self.chains.bytes() < bytes {
            let entry = ENTRIES + AVAILABLE_ENTRY * usize::from(next % size);
            let head = available.load(entry, Ordering::Relaxed).ok_or(Error::Addresses)?;
            if head >= size {
                return Err(Error::Head(head));
            }
            self.chains.push(table, head, self.header);
            next = next.wrapping_add(1);
            self.queue.set_next_avail(next);
        }
        Ok(())
    }

    /// Gives the oldest chain back with `written` bytes in it. The driver sees it after [`Self::publish`].
    pub fn give_back(&mut self, written: usize) {
        let (Some(Parts { used, .. }), Some(chain)) = (&self.parts, self.chains.pop()) else { return };
        // An entry is two 32-bit words, id and length, each little-endian.
        let element = u64::from(chain.head) | (written as u64) << 32;
        let entry = ENTRIES + USED_ENTRY * usize::from(self.next_used.0 % self.queue.size());
        used.write(entry, element.to_le_bytes());
        self.next_used += Wrapping(1);
    }

    /// Whether entries were given back that the driver cannot see yet.
    pub fn is_unpublished(&self) -> bool {
        self.next_used != self.published
    }

    /// Makes all entries given back visible to the driver.
    pub fn publish(&mut self) {
        if let Some(Parts { used, .. }) = &self.parts {
            // Release: whoever sees the index sees the entries and the frames in the buffers.
            used.store(INDEX, self.next_used.0, Ordering::Release);
            self.published = self.next_used;
        }
    }

    /// Whether the driver asks to be notified of what was published since the last time this was asked.
    ///
    /// The full fence orders our store of the used index before our load of the driver's event word. Its partner is
    /// the full barrier in the driver between its store of the event word and its re-check of the used index (Linux:
    /// `virtqueue_enable_cb`, `virtio_store_mb` in `drivers/virtio/virtio_ring.c`). Without it both could read the
    /// old value, and a completion would wait for the next one.
    pub fn wants_call(&mut self) -> bool {
        if self.published == self.decided {
            return false;
        }
        let old = std::mem::replace(&mut self.decided, self.published);
        fence(Ordering::SeqCst);
        let Some(Parts { available, .. }) = &self.parts else { return true };
        if self.queue.event_idx_enabled() {
            let event = ENTRIES + AVAILABLE_ENTRY * usize::from(self.queue.size());
            available
                .load(event, Ordering::Relaxed)
                .is_none_or(|event| event_crossed(Wrapping(event), self.published, old))
        } else {
            available
                .load(FLAGS, Ordering::Relaxed)
                .is_none_or(|flags| u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    /// Signals the call eventfd; tells whether there was one.
    pub fn call(&self) -> bool {
        // A full counter (`WouldBlock`) is a notification the driver has not fetched yet: nothing is lost.
        self.call.as_ref().map(|mut file| file.write(&1u64.to_ne_bytes())).is_some()
    }

    /// Asks the driver for kicks and re-checks: `true` = chains came meanwhile, do not sleep.
    ///
    /// `virtio-queue` puts a full fence between our store of the event word and the re-check. Its partner is the
    /// driver's full barrier between its store of the available index and its load of our event word (Linux:
    /// `virtqueue_kick_prepare`, `virtio_mb`).
    pub fn want_kicks(&mut self) -> bool {
        self.kicks_wanted = true;
        match self.queue.enable_notification(&**self.chains.memory()) {
            Ok(more) => more,
            Err(error) => {
                self.stop(Error::Suppression(error));
                true
            }
        }
    }

    /// Tells the driver not to kick while we poll. With EVENT_IDX nothing is written: one kick has been sent for the
    /// event index we left there, and there will be no other before the index comes round again.
    pub fn refuse_kicks(&mut self) {
        if self.kicks_wanted && !self.queue.event_idx_enabled() {
            let result = self.queue.disable_notification(&**self.chains.memory());
            if let Err(error) = result {
                self.stop(Error::Suppression(error));
            }
        }
        self.kicks_wanted = false;
    }

    /// Empties the kick eventfd; tells how many kicks came since the last time.
    pub fn drain_kick(&mut self) -> u64 {
        let earlier = std::mem::take(&mut self.uncounted);
        let now = self.kick.as_deref().map_or(Ok(0), read_kicks).unwrap_or_else(|error| {
            // Not an eventfd: it would be readable for ever and keep us from sleeping.
            self.stop(Error::Kick(error));
            self.kick = None;
            0
        });
        earlier.wrapping_add(now)
    }

    /// Stops the ring for good: one line in the log, a signal to the frontend.
    fn stop(&mut self, error: Error) {
        if std::mem::replace(&mut self.broken, true) {
            return;
        }
        // Whoever is here holds the ring, so there is one writer at a time.
        self.stopped.add(1);
        tracing::error!(parent: &self.port, "{}: {error}; the ring is stopped until the frontend sets it up anew", self.name);
        self.untake();
        if let Some(mut file) = self.error.as_ref() {
            let _ = file.write(&1u64.to_ne_bytes());
        }
    }
}

/// Takes the kicks so far out of an eventfd.
fn read_kicks(mut kick: &File) -> std::io::Result<u64> {
    let mut count = [0; 8];
    match kick.read(&mut count) {
        Ok(8) => Ok(u64::from_ne_bytes(count)),
        Ok(_) => Err(ErrorKind::InvalidData.into()),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
        Err(error) => Err(error),
    }
}

/// virtio 1.2, 2.7.7.2: the driver asked to be told when the used index passes `event`; it moved from `old` to `new`.
fn event_crossed(event: Wrapping<u16>, new: Wrapping<u16>, old: Wrapping<u16>) -> bool {
    new - event - Wrapping(1) < new - old
}
