//! A ring between two parties: the frontend's messages set it up, a poll thread moves frames through it.
//!
//! The vhost-user-backend crate calls the setters below, each under the ring's lock. The poll thread holds the same
//! lock for one burst at a time, so when a setter returns, the data path works with the new setting: a reply to
//! `GET_VRING_BASE` means that the data path has really stopped, and one to a memory-table message that it holds no
//! pointer into the old memory.
//!
//! Two details make that work:
//! - A lock is not fair, and a poll thread that spins would starve a setter. So setters announce themselves in
//!   `waiting`, and the poll thread steps back while somebody is announced.
//! - The crate's own worker threads read the kick eventfd they are given. Two readers would steal kicks from each
//!   other, so the crate gets a stand-in that never fires, and the poll thread alone reads the real one. The worker
//!   still learns of every ring that gets enabled, and wakes the poll thread.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost_user_backend::{VringMutex, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use crate::lost_memory;
use crate::ring::Ring;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A ring shared by the crate's message handler and a poll thread.
#[derive(Clone)]
pub struct Vring {
    shared: Arc<Shared>,
}

struct Shared {
    /// What the crate itself looks at: whether the ring is ready and enabled, and the stand-in kick.
    face: VringMutex<Memory>,
    ring: Mutex<Ring>,
    waiting: AtomicUsize,
    attention: EventFd,
}

impl Vring {
    /// The ring, for a burst of the data path; `None` while a message handler wants it.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, Ring>> {
        if self.shared.waiting.load(Ordering::Relaxed) != 0 {
            return None;
        }
        match self.shared.ring.try_lock() {
            Ok(ring) => Some(ring),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Changes the ring between two bursts of the data path, then makes the poll thread look.
    pub fn control<R>(&self, change: impl FnOnce(&mut Ring) -> R) -> R {
        self.shared.waiting.fetch_add(1, Ordering::Relaxed);
        let mut ring = self.shared.ring.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
        let result = change(&mut ring);
        drop(ring);
        self.wake();
        result
    }

    /// Wakes the poll thread if it sleeps.
    pub fn wake(&self) {
        // A full counter already wakes it.
        let _ = self.shared.attention.write(1);
    }

    /// Readable when the ring changed since [`Self::drain_attention`].
    pub fn attention(&self) -> BorrowedFd<'_> {
        self.shared.attention.as_fd()
    }

    /// Forgets the wake-ups so far.
    pub fn drain_attention(&self) {
        let _ = self.shared.attention.read();
    }
}

/// Makes an eventfd of the frontend's non-blocking, so that no peer can park a thread of ours in a read or write.
fn non_blocking(file: Option<File>) -> Option<File> {
    let file = file?;
    let flags = fcntl(&file, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
    match flags.and_then(|flags| fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))) {
        Ok(_) => Some(file),
        Err(error) => {
            tracing::warn!("cannot make an eventfd of the frontend non-blocking: {error}; it is ignored");
            None
        }
    }
}

impl<'a> VringStateGuard<'a, Memory> for Vring {
    type G = <VringMutex<Memory> as VringStateGuard<'a, Memory>>::G;
}

impl<'a> VringStateMutGuard<'a, Memory> for Vring {
    type G = <VringMutex<Memory> as VringStateMutGuard<'a, Memory>>::G;
}

impl VringT<Memory> for Vring {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, Error> {
        let attention = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|_| Error::QueueNotReady)?;
        let ring = Ring::new(memory.memory().into_inner(), max_queue_size)?;
        let face = VringMutex::new(memory, max_queue_size)?;
        let shared = Shared { face, ring: Mutex::new(ring), waiting: AtomicUsize::new(0), attention };
        Ok(Vring { shared: Arc::new(shared) })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        self.shared.face.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        self.shared.face.get_mut()
    }

    fn set_enabled(&self, enabled: bool) {
        self.shared.face.set_enabled(enabled);
        self.control(|ring| ring.set_enabled(enabled));
    }

    fn set_queue_info(&self, table: u64, available: u64, used: u64) -> Result<(), Error> {
        self.control(|ring| ring.set_addresses(table, available, used))
    }

    fn queue_next_avail(&self) -> u16 {
        self.control(|ring| ring.base())
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.control(|ring| ring.set_base(base));
    }

    fn set_queue_next_used(&self, index: u16) {
        self.control(|ring| ring.set_next_used(index));
    }

    /// Memory that the frontend took away ends its connection, as the crate does over every error.
    fn queue_used_idx(&self) -> Result<u16, Error> {
        let index = self.control(|ring| ring.used_index());
        if lost_memory::was_met() { Err(Error::QueueNotReady) } else { index }
    }

    fn set_queue_size(&self, size: u16) {
        self.control(|ring| ring.set_size(size));
    }

    /// EVENT_IDX comes with all the other features: see [`Ring::set_features`].
    fn set_queue_event_idx(&self, _enabled: bool) {}

    fn set_queue_ready(&self, ready: bool) {
        self.shared.face.set_queue_ready(ready);
        self.control(|ring| ring.set_started(ready));
    }

    fn set_kick(&self, file: Option<File>) {
        let stand_in = file.as_ref().and_then(|_| {
            EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
                .map(|event| File::from(OwnedFd::from(event)))
                .inspect_err(|error| {
                    tracing::error!("cannot create an eventfd: {error}; the ring does not start")
                })
                .ok()
        });
        self.shared.face.set_kick(stand_in);
        self.control(|ring| ring.set_kick(non_blocking(file)));
    }

    fn set_call(&self, file: Option<File>) {
        // Signalled once unasked: a backend that died may have published entries without notifying.
        self.control(|ring| {
            ring.set_call(non_blocking(file));
            ring.call()
        });
    }

    fn set_err(&self, file: Option<File>) {
        self.control(|ring| ring.set_error(non_blocking(file)));
    }

    // The rest of the trait is for data paths that run on the crate's workers. Ours does not, but the answers are true.

    fn read_kick(&self) -> std::io::Result<bool> {
        Ok(self.get_ref().is_enabled())
    }

    fn add_used(&self, _head: u16, written: u32) -> Result<(), Error> {
        self.control(|ring| {
            ring.give_back(written as usize);
            ring.publish();
        });
        Ok(())
    }

    fn signal_used_queue(&self) -> std::io::Result<()> {
        self.control(|ring| ring.call());
        Ok(())
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        Ok(self.control(|ring| ring.want_kicks()))
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.control(|ring| ring.refuse_kicks());
        Ok(())
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        Ok(self.control(|ring| ring.wants_call()))
    }
}
