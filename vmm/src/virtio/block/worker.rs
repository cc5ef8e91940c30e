//! A disk's thread: requests become io_uring submissions, their completions used entries and interrupts.
//!
//! The thread sleeps in poll(2) on the kicks of all queues, on the io_uring and on word from the device, and in each round looks at
//! everything. What is in flight is bounded ([`DEPTH`] requests, and no new one while 64 MiB are), so a
//! guest cannot make the host hold more. A request stays in `flights` until the kernel has completed it: that keeps
//! alive what its submission points at.
//!
//! A flush is an fdatasync submitted after the writes it covers have been completed: the driver may only rely on those. Where the driver
//! did not accept flushes, each write is made durable before it completes (5.2.6.2 of the standard), and nothing is discarded or zeroed.
//!
//! A request that failed halfway is done for the rest, so a short read or write is nothing the driver sees.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};
use std::thread::{self, JoinHandle};
use std::{io, mem};

use io_uring::IoUring;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::flight::{Flight, Work};
use super::image::Image;
use super::kernel_threads::keep_to_own_pcpus;
use super::request::{Buffers, Limits, Request};
use crate::memory::GuestMemory;
use crate::power::{EndSignal, Ending};
use crate::sandbox::{self, Role};
use crate::virtio::Queue;
use crate::virtio::ring::Ring;

/// Most requests of a disk that the kernel has at once.
pub const DEPTH: usize = 256;
/// Bytes in flight from which on no request is taken.
const IN_FLIGHT: u64 = 64 << 20;
/// How long to wait until the kernel, short of something, is asked again.
const AGAIN_MS: u8 = 1;

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const FAILED: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPPORTED: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// Word from the device.
#[derive(Debug)]
pub enum Command {
    /// The driver is ready: these are its queues and features.
    Start(Vec<Queue>, u64),
    /// Let go of the queues, and say so by dropping this.
    Stop(SyncSender<()>),
    /// Finish what the kernel has, begin nothing new, and say so by dropping this.
    Pause(SyncSender<()>),
    /// Go on.
    Resume,
}

/// A disk's side of the image, before its thread runs.
pub struct Worker {
    image: Arc<Image>,
    memory: GuestMemory,
    uring: IoUring,
    commands: Receiver<Command>,
    wake: EventFd,
    serial: [u8; 20],
}

impl Worker {
    /// Makes the io_uring. `wake` is written after each command.
    pub fn new(
        image: Arc<Image>,
        memory: GuestMemory,
        serial: [u8; 20],
        commands: Receiver<Command>,
        wake: EventFd,
    ) -> io::Result<Self> {
        let uring = IoUring::new(DEPTH as u32)?;
        Ok(Self { image, memory, uring, commands, wake, serial })
    }

    /// Starts the thread, which ends when the device is gone. Should it panic, `end` is told.
    pub fn start(mut self, name: String, end: Arc<EndSignal>) -> io::Result<JoinHandle<()>> {
        thread::Builder::new().name(name.clone()).spawn(move || {
            // Before the sandbox, which has no such call.
            if let Err(error) = keep_to_own_pcpus(&mut self.uring) {
                tracing::warn!(
                    "io_uring's own threads for {name} may run on any pCPU, those of vCPUs too: {error}"
                );
            }
            sandbox::enter_or_exit(Role::Disk);
            let disk = format!("{name} ({})", self.image.path.display());
            let mut service = Service::new(self);
            // Told before the service is dropped, which waits for the kernel.
            end_on_panic(&disk, &end, || service.run());
        })
    }
}

/// A disk that is gone must end the VM, or the guest would wait for it for ever.
fn end_on_panic(disk: &str, end: &EndSignal, serve: impl FnOnce()) {
    if panic::catch_unwind(AssertUnwindSafe(serve)).is_err() {
        end.give(Ending::LostDisk(disk.to_owned()));
    }
}

/// The thread's state.
struct Service {
    worker: Worker,
    limits: Limits,
    rings: Vec<Option<Ring>>,
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    /// The queue that is served first in the next round.
    first: usize,
    bytes: u64,
    /// How writes are made: durable at once where the driver cannot ask for it.
    write_flags: i32,
    /// Whether the kernel was too short of something to take what is pushed.
    unsubmitted: bool,
    /// Whether new requests wait.
    paused: bool,
    complained: bool,
}

impl Service {
    fn new(worker: Worker) -> Self {
        let Image { sectors, readonly, discards, .. } = *worker.image;
        Self {
            worker,
            limits: Limits { sectors, readonly, discards },
            rings: Vec::new(),
            flights: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH).collect(),
            first: 0,
            bytes: 0,
            write_flags: 0,
            unsubmitted: false,
            paused: false,
            complained: false,
        }
    }

    fn run(&mut self) {
        while self.obey() {
            self.reap();
            let more = self.serve();
            self.submit(0);
            self.notify();
            self.wait(more);
        }
    }

    /// Does what the device says; whether to go on.
    fn obey(&mut self) -> bool {
        let _ = self.worker.wake.read();
        loop {
            match self.worker.commands.try_recv() {
                Ok(Command::Start(queues, features)) => self.start(queues, features),
                Ok(Command::Stop(stopped)) => {
                    self.drain();
                    self.rings.clear();
                    drop(stopped);
                }
                Ok(Command::Pause(paused)) => {
                    self.drain();
                    self.paused = true;
                    drop(paused);
                }
                Ok(Command::Resume) => self.paused = false,
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn start(&mut self, queues: Vec<Queue>, features: u64) {
        let flushes = features & (1 << VIRTIO_BLK_F_FLUSH) != 0;
        self.write_flags = if flushes { 0 } else { libc::RWF_DSYNC };
        // Nothing makes these durable on the way.
        self.limits.discards = flushes && self.worker.image.discards;
        let ring = |queue| match Ring::new(queue, features) {
            Ok(ring) => Some(ring),
            Err(error) => {
                tracing::info!("the driver set up a disk queue that does not work: {error}");
                None
            }
        };
        self.rings = queues.into_iter().map(ring).collect();
    }

    /// Sleeps until there is something to do, which there is already if there are `more` requests.
    fn wait(&mut self, more: bool) {
        let watch = |fd: RawFd| {
            // SAFETY: the files belong to `self`, which is not changed before this function returns.
            PollFd::new(unsafe { BorrowedFd::borrow_raw(fd) }, PollFlags::POLLIN)
        };
        let rings = || self.rings.iter().flatten();
        let mut files = vec![watch(self.worker.wake.as_raw_fd()), watch(self.worker.uring.as_raw_fd())];
        files.extend(rings().map(|ring| watch(ring.kick())));
        let timeout = match (more, self.unsubmitted) {
            (true, _) => PollTimeout::ZERO,
            (false, true) => PollTimeout::from(AGAIN_MS),
            (false, false) => PollTimeout::NONE,
        };
        // An error here is a signal, or memory that is short: the next round tries again.
        let _ = poll(&mut files, timeout);
        rings().for_each(Ring::take_kick);
    }

    /// Takes requests out of the queues, as many as may be in flight; whether a queue may hold more that may be.
    fn serve(&mut self) -> bool {
        let mut more = false;
        if self.paused {
            return more;
        }
        // What may be in flight can be used up by one queue, so each is the first one in turn.
        let (first, count) = (self.first, self.rings.len());
        self.first = (first + 1) % count.max(1);
        for index in (0..count).map(|turn| (first + turn) % count) {
            // One round takes no more than a queue can hold, so that each queue has its turn, and commands have theirs.
            let mut turns = self.rings.get(index).and_then(Option::as_ref).map_or(0, Ring::size);
            while !self.free.is_empty() && self.bytes < IN_FLIGHT {
                if turns == 0 {
                    more = true;
                    break;
                }
                turns -= 1;
                let Some(ring) = self.rings.get_mut(index).and_then(Option::as_mut) else { break };
                match ring.pop(&self.worker.memory) {
                    Ok(None) => break,
                    Ok(Some(chain)) => {
                        let head = chain.head_index();
                        let descriptors = chain.map(|d| (d.addr().0, d.len(), d.is_write_only()));
                        let request = Request::parse(descriptors, &self.worker.memory, self.limits);
                        self.begin(index, head, request);
                    }
                    Err(error) => self.give_up(index, &error),
                }
            }
        }
        more
    }

    /// A queue whose content makes no sense is left alone until the driver resets the device.
    fn give_up(&mut self, ring: usize, error: &virtio_queue::Error) {
        tracing::info!("a queue of the disk {} stops: {error}", self.worker.image.path.display());
        if let Some(ring) = self.rings.get_mut(ring) {
            *ring = None;
        }
    }

    /// Starts a request, or answers it at once.
    fn begin(&mut self, ring: usize, head: u16, request: Option<Request>) {
        let Some(Request { operation, status }) = request else {
            // Without a place for the status nothing can be said, but the buffers go back.
            return self.give_back(ring, head, 0);
        };
        let operation = match operation {
            Ok(operation) => operation,
            Err(refusal) => return self.answer(ring, head, status, refusal, 0),
        };
        let (work, bytes) = match Work::of(operation) {
            Ok(work) => work,
            Err(buffers) => {
                let written = self.identify(&buffers);
                return self.answer(ring, head, status, OK, written);
            }
        };
        let Some(slot) = self.free.pop() else {
            return self.answer(ring, head, status, FAILED, 0);
        };
        self.bytes += bytes;
        self.push(slot, Flight { ring, head, status, work, bytes });
    }

    /// Writes the serial number to the guest's buffers; how much of it.
    fn identify(&self, buffers: &Buffers) -> u32 {
        let mut rest = &self.worker.serial[..];
        for piece in &buffers.pieces {
            let (now, later) = rest.split_at(rest.len().min(piece.iov_len));
            // SAFETY: the piece is guest memory that stays mapped as long as `self.worker.memory`, at least as long as `now`, and
            // never borrowed as anything else; a guest that writes it at the same time harms itself only.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), piece.iov_base.cast(), now.len()) };
            rest = later;
        }
        (self.worker.serial.len() - rest.len()) as u32
    }

    /// Hands a request to the io_uring, and keeps it in its slot until it is completed.
    fn push(&mut self, slot: usize, flight: Flight) {
        let entry = flight.work.entry(&self.worker.image, self.write_flags).user_data(slot as u64);
        if let Some(place) = self.flights.get_mut(slot) {
            *place = Some(flight);
        }
        // SAFETY: the pieces lie on the heap, belong to the flight and stay in its slot until the kernel has completed the request, or for
        // ever if the thread ends before; what they point at is guest memory, mapped as long as `self.worker.memory` is. `Drop` waits
        // for all of it. The files are open as long as `self.worker.image` is.
        let pushed = unsafe { self.worker.uring.submission().push(&entry) };
        if pushed.is_err() {
            // There are as many entries as slots, so this is a bug; the guest sees a failed request.
            self.complete(slot, -libc::EIO);
        }
    }

    /// Submits what was pushed and waits for `completions`.
    fn submit(&mut self, completions: usize) {
        if completions == 0 && self.worker.uring.submission().is_empty() {
            return;
        }
        let result = self.worker.uring.submit_and_wait(completions);
        self.unsubmitted = !self.worker.uring.submission().is_empty();
        let Err(error) = result else { return };
        let passing = matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY));
        if !passing && !mem::replace(&mut self.complained, true) {
            tracing::error!(
                "the disk {} does not get on: io_uring: {error}",
                self.worker.image.path.display()
            );
        }
    }

    /// Takes what the kernel has completed.
    fn reap(&mut self) {
        // Not more than there can be: what is submitted anew waits for the next round.
        for _ in 0..DEPTH {
            let Some(entry) = self.worker.uring.completion().next() else { return };
            self.complete(entry.user_data() as usize, entry.result());
        }
    }

    /// The kernel is done with the request in a slot.
    fn complete(&mut self, slot: usize, result: i32) {
        let Some(mut flight) = self.flights.get_mut(slot).and_then(Option::take) else { return };
        let status = match (&mut flight.work, result) {
            (_, error) if error == -libc::EINTR || error == -libc::EAGAIN => return self.push(slot, flight),
            (Work::Allocate { .. }, error) if error == -libc::EOPNOTSUPP => UNSUPPORTED,
            (_, error) if error < 0 => self.failed(io::Error::from_raw_os_error(-error)),
            (Work::Flush | Work::Allocate { .. }, _) => OK,
            (Work::Read(transfer) | Work::Write(transfer), moved) => match moved as u64 {
                all if all >= transfer.left => OK,
                // Behind the end: somebody made the image shorter.
                0 => self.failed(io::ErrorKind::UnexpectedEof.into()),
                part => {
                    transfer.advance(part);
                    return self.push(slot, flight);
                }
            },
        };
        let Flight { ring, head, status: place, work, bytes } = flight;
        let written = if matches!((work, status), (Work::Read(_), OK)) { bytes as u32 } else { 0 };
        self.bytes -= bytes;
        self.free.push(slot);
        self.answer(ring, head, place, status, written);
    }

    /// The status of a request that failed. Said once, because a guest can repeat it.
    fn failed(&mut self, error: io::Error) -> u8 {
        if !mem::replace(&mut self.complained, true) {
            tracing::warn!("I/O error on the disk {}: {error}", self.worker.image.path.display());
        }
        FAILED
    }

    /// Writes the status behind `written` bytes of data and gives the chain back.
    fn answer(&mut self, ring: usize, head: u16, place: GuestAddress, status: u8, written: u32) {
        let there = self.worker.memory.write_obj(status, place).is_ok();
        self.give_back(ring, head, written + u32::from(there));
    }

    fn give_back(&mut self, index: usize, head: u16, written: u32) {
        if let Some(Some(ring)) = self.rings.get_mut(index)
            && let Err(error) = ring.add_used(&self.worker.memory, head, written)
        {
            self.give_up(index, &error);
        }
    }

    /// Interrupts the driver where something was used.
    fn notify(&mut self) {
        for index in 0..self.rings.len() {
            if let Some(Some(ring)) = self.rings.get_mut(index)
                && let Err(error) = ring.notify(&self.worker.memory)
            {
                self.give_up(index, &error);
            }
        }
    }

    /// Waits until the kernel has nothing of ours any more.
    fn drain(&mut self) {
        // Not by what is free: a panic may have come between the two.
        while self.flights.iter().any(Option::is_some) {
            self.submit(1);
            self.reap();
        }
    }
}

/// What the kernel has points into the flights.
impl Drop for Service {
    fn drop(&mut self) {
        self.drain();
    }
}

#[cfg(test)]
#[path = "worker_test.rs"]
mod tests;
