//! The guest's side of a FIFO region: its file, its words, and a driver that learns of used entries through it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use ivcpu_abi::{Binding, Completion, Consumer, Region, State, layout};
use vm_memory::{FileOffset, MmapRegion};

use crate::guest::*;

/// Runs `ivcpu-backend fifo create`.
pub(crate) fn create(path: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ivcpu-backend"));
    command.args(["fifo", "create"]).arg(path).args(arguments).output().unwrap()
}

/// A region, mapped for the rest of the test.
#[derive(Clone, Copy)]
pub(crate) struct Shared {
    mapping: &'static MmapRegion,
}

impl Shared {
    /// Makes a region of `rings` rings in a new file and maps it.
    pub(crate) fn create(directory: &Path, rings: u32) -> (PathBuf, Self) {
        let path = directory.join("fifo");
        let output = create(&path, &["--rings", &rings.to_string()]);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let length = file.metadata().unwrap().len() as usize;
        let mapping = MmapRegion::from_file(FileOffset::new(file, 0), length).unwrap();
        (path, Shared { mapping: Box::leak(Box::new(mapping)) })
    }

    pub(crate) fn region(&self) -> Region {
        let base = NonNull::new(self.mapping.as_ptr()).unwrap();
        // SAFETY: the mapping is never unmapped, and all accesses here are atomic.
        unsafe { Region::open(base, self.mapping.size()) }.unwrap()
    }

    /// A consumer, which says from now on that it is awake.
    pub(crate) fn consumer(&self) -> Consumer {
        Consumer::attach(self.region(), 7, 64)
    }

    pub(crate) fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset + 4 <= self.mapping.size() && offset.is_multiple_of(4));
        // SAFETY: in the mapping, aligned, and accessed by atomics only.
        unsafe { AtomicU32::from_ptr(self.mapping.as_ptr().add(offset).cast()) }
    }

    fn long(&self, offset: usize) -> u64 {
        assert!(offset + 8 <= self.mapping.size() && offset.is_multiple_of(8));
        // SAFETY: as in `word`.
        unsafe { AtomicU64::from_ptr(self.mapping.as_ptr().add(offset).cast()) }.load(Ordering::Acquire)
    }

    pub(crate) fn state(&self) -> State {
        self.region().consumer_state()
    }

    /// The virtqueues in the directory of ring 0.
    pub(crate) fn bindings(&self) -> Vec<Binding> {
        (0..256)
            .map(|source| self.long(layout::HEADER_SIZE + layout::RING_DIRECTORY_AT + 8 * source))
            .map(Binding::from_word)
            .filter(|binding| binding.used_ring != 0)
            .collect()
    }

    /// Whether an entry was ever written to ring 0.
    pub(crate) fn has_entries(&self) -> bool {
        let slots = layout::HEADER_SIZE + layout::RING_SLOTS_AT;
        let head = self.word(layout::HEADER_SIZE + layout::RING_HEAD_AT).load(Ordering::Acquire);
        head != layout::FIRST_SEQUENCE || (0..256).any(|slot| self.long(slots + 8 * slot) != 0)
    }
}

/// A guest whose driver looks at a used ring only when it is told to: by the FIFO or by a call.
pub(crate) struct Ivcpu {
    pub(crate) guest: Guest,
    pub(crate) consumer: Option<Consumer>,
    /// Calls that came, by ring.
    pub(crate) calls: Vec<u64>,
    /// Completions that came through the FIFO, by ring.
    pub(crate) delivered: Vec<u64>,
    /// Used entries taken, by ring.
    pub(crate) used: Vec<Vec<(u32, u32)>>,
}

impl Ivcpu {
    pub(crate) fn new(guest: Guest, consumer: Option<Consumer>) -> Self {
        let rings = guest.queues.len();
        Ivcpu {
            guest,
            consumer,
            calls: vec![0; rings],
            delivered: vec![0; rings],
            used: vec![Vec::new(); rings],
        }
    }

    /// Connects, and waits until the backend has announced each ring once and made its calls at the start.
    pub(crate) fn connect(&mut self, socket: &Path) {
        self.guest.connect(socket);
        if self.consumer.is_some() {
            self.delivered.fill(0);
            until("each ring is announced", || {
                self.poll();
                self.delivered.iter().all(|count| *count != 0)
            });
        }
        self.forget_calls();
    }

    /// What a driver does when it is told of a ring.
    fn look_at(&mut self, ring: usize) {
        loop {
            // The event word that the last step wrote has to be seen before the used index is looked at again.
            fence(Ordering::SeqCst);
            let Some(entry) = self.guest.take_used(ring) else { break };
            self.used[ring].push(entry);
        }
    }

    /// The ring whose used ring has this address.
    fn ring_of(&self, completion: Completion) -> usize {
        let address = completion.binding.used_ring;
        self.guest.queues.iter().position(|queue| queue.table + USED == address).unwrap()
    }

    /// Takes what is in the FIFO.
    pub(crate) fn poll(&mut self) {
        while let Some(completion) = self.consumer.as_mut().and_then(Consumer::poll) {
            let ring = self.ring_of(completion);
            self.delivered[ring] += 1;
            self.look_at(ring);
        }
    }

    /// Takes calls as the IVCPU does: as an interrupt of that ring, and as a hint that entries were overlooked.
    pub(crate) fn take_calls(&mut self) {
        for ring in 0..self.guest.queues.len() {
            if let Ok(count) = self.guest.queues[ring].call.read() {
                self.calls[ring] += count;
                if let Some(consumer) = &mut self.consumer {
                    consumer.rescan();
                }
                self.look_at(ring);
            }
        }
    }

    pub(crate) fn forget_calls(&mut self) {
        self.take_calls();
        self.calls.fill(0);
    }

    /// Sends a frame through a `loop` backend and takes it back, told by the FIFO and, if wanted, by calls.
    #[track_caller]
    pub(crate) fn loop_once(&mut self, index: u16, hear_calls: bool) {
        self.guest.send(1, index % SIZE, &[index as u8; 100]);
        until("a frame came back", || {
            if hear_calls {
                self.take_calls();
            }
            self.poll();
            !self.used[0].is_empty() && !self.used[1].is_empty()
        });
        assert_eq!(self.used[1].pop(), Some((u32::from(index % SIZE), 0)));
        let (head, length) = self.used[0].pop().unwrap();
        assert_eq!(length, 112);
        self.guest.offer(0, head as u16);
    }
}
