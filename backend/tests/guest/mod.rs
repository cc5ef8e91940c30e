//! A tiny frontend and driver: enough of both to move frames through a backend that runs as a process of its own.

#![allow(dead_code, reason = "every test executable uses a part of it")]

use std::fs::File;
use std::num::Wrapping;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Entries of each ring.
pub(crate) const SIZE: u16 = 64;
/// Bytes of each receive buffer.
pub(crate) const BUFFER: u32 = 2048;
/// Bytes of the virtio header.
pub(crate) const HEADER: usize = 12;
const MEMORY: u64 = 16 << 20;

/// A running ivcpu-backend.
pub(crate) struct Backend {
    pub(crate) child: Child,
    pub(crate) dir: tempfile::TempDir,
    arguments: Vec<String>,
    /// What it says on stderr.
    log: File,
}

impl Backend {
    /// Starts one with `arguments` besides its sockets.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vu");
        let own = ["--socket-path", socket.to_str().unwrap()];
        let arguments = [&own, arguments].concat();
        Self::start_in(dir, &arguments)
    }

    /// Starts one with a port of each of `ports`, which say everything but the socket, and `arguments`.
    pub(crate) fn with_ports(ports: &[&str], arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let word = |(index, words)| format!("--port=socket={}/{index},{words}", dir.path().display());
        let ports: Vec<_> = ports.iter().enumerate().map(word).collect();
        let arguments: Vec<_> = ports.iter().map(String::as_str).chain(arguments.iter().copied()).collect();
        Self::start_in(dir, &arguments)
    }

    /// Starts one with `arguments` and a socket for its counters, and waits for that.
    pub(crate) fn start_in(dir: tempfile::TempDir, arguments: &[&str]) -> Self {
        let arguments: Vec<String> = arguments.iter().map(|&word| word.to_owned()).collect();
        let log = tempfile::tempfile().unwrap();
        let child = Self::spawn(dir.path(), &arguments, &log);
        Backend { child, dir, arguments, log }
    }

    fn spawn(dir: &Path, arguments: &[String], log: &File) -> Child {
        let child = Command::new(env!("CARGO_BIN_EXE_ivcpu-backend"))
            .arg("--stats-socket")
            .arg(dir.join("stats"))
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(log.try_clone().unwrap())
            .spawn()
            .unwrap();
        until("the backend answers", || {
            let stats = std::os::unix::net::UnixStream::connect(dir.join("stats"));
            stats.is_ok_and(|stats| serde_json::from_reader::<_, serde_json::Value>(stats).is_ok())
        });
        child
    }

    /// Kills it without warning and starts it again.
    pub(crate) fn kill_and_restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = Self::spawn(self.dir.path(), &self.arguments, &self.log);
    }

    /// What it has said on stderr.
    pub(crate) fn said(&self) -> String {
        let mut said = vec![0; self.log.metadata().unwrap().len() as usize];
        self.log.read_exact_at(&mut said, 0).unwrap();
        String::from_utf8(said).unwrap()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("vu")
    }

    /// The socket of a port of [`Self::with_ports`].
    pub(crate) fn port(&self, index: usize) -> PathBuf {
        self.dir.path().join(index.to_string())
    }

    /// The counters.
    pub(crate) fn stats(&self) -> serde_json::Value {
        let stream = std::os::unix::net::UnixStream::connect(self.dir.path().join("stats")).unwrap();
        serde_json::from_reader(stream).unwrap()
    }

    /// One counter of one ring.
    pub(crate) fn count(&self, ring: usize, counter: &str) -> u64 {
        self.stats()["queues"][ring][counter].as_u64().unwrap()
    }

    /// How many entries `/proc/PID/what` has: `fd` or `task`.
    pub(crate) fn entries(&self, what: &str) -> usize {
        std::fs::read_dir(format!("/proc/{}/{what}", self.child.id())).unwrap().count()
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprint!("{}", self.said());
        }
    }
}

/// Waits for `condition`, at most ten seconds.
#[track_caller]
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One virtqueue, from the driver's side.
pub(crate) struct Queue {
    pub(crate) table: u64,
    pub(crate) available: Wrapping<u16>,
    pub(crate) used: Wrapping<u16>,
    pub(crate) kick: EventFd,
    /// How often the driver has kicked.
    pub(crate) kicks: u64,
    pub(crate) call: EventFd,
}

/// A guest: memory, rings and the frontend's connection. Memory outlives a connection, as a VM's does.
pub(crate) struct Guest {
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) frontend: Option<Frontend>,
    pub(crate) queues: Vec<Queue>,
    pub(crate) features: u64,
    /// A ring that is set up again starts at index 0 and not at its used index, as DPDK's virtio-user says it.
    pub(crate) forgets_base: bool,
}

impl Guest {
    /// A guest with `pairs` queue pairs that will ack `features` (as far as they are offered).
    pub(crate) fn new(pairs: usize, features: u64) -> Self {
        let fd = nix::sys::memfd::memfd_create("guest", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(MEMORY).unwrap();
        let memory = GuestMemoryMmap::from_ranges_with_files([(
            GuestAddress(0),
            MEMORY as usize,
            Some(FileOffset::new(file, 0)),
        )])
        .unwrap();
        let queue = |index| Queue {
            table: 0x10000 * (index as u64 + 1),
            available: Wrapping(0),
            used: Wrapping(0),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            kicks: 0,
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
        };
        Guest {
            memory,
            frontend: None,
            queues: (0..2 * pairs).map(queue).collect(),
            features,
            forgets_base: false,
        }
    }

    pub(crate) fn region(&self) -> &GuestRegionMmap {
        self.memory.iter().next().unwrap()
    }

    /// Sets up a session up to step `steps`.
    pub(crate) fn connect_until(&mut self, socket: &Path, steps: usize) {
        self.set_up(Frontend::connect(socket, self.queues.len() as u64).unwrap(), steps);
    }

    /// Sets up a whole session over a connection that there is already.
    pub(crate) fn connect_stream(&mut self, stream: std::os::unix::net::UnixStream) {
        self.set_up(Frontend::from_stream(stream, self.queues.len() as u64), usize::MAX);
    }

    fn set_up(&mut self, mut frontend: Frontend, steps: usize) {
        let mut step = 0;
        let mut go_on = || {
            step += 1;
            step <= steps
        };
        let count = self.queues.len();
        let mut set_up = || -> Result<(), vhost::Error> {
            frontend.set_owner()?;
            if !go_on() {
                return Ok(());
            }
            let offered = frontend.get_features()?;
            if !go_on() {
                return Ok(());
            }
            let protocol = frontend.get_protocol_features().unwrap();
            frontend
                .set_protocol_features(
                    protocol
                        & (VhostUserProtocolFeatures::MQ
                            | VhostUserProtocolFeatures::CONFIG
                            | VhostUserProtocolFeatures::REPLY_ACK),
                )
                .unwrap();
            // Every message answered: what failed, failed here.
            frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
            if !go_on() {
                return Ok(());
            }
            let wanted = self.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
            frontend.set_features(offered & wanted)?;
            if !go_on() {
                return Ok(());
            }
            frontend.set_mem_table(&[VhostUserMemoryRegionInfo::from_guest_region(self.region())?])?;
            for index in 0..count {
                if !go_on() {
                    return Ok(());
                }
                self.start_queue(&frontend, index)?;
            }
            for index in 0..count {
                if !go_on() {
                    return Ok(());
                }
                frontend.set_vring_enable(index, true).unwrap();
            }
            Ok(())
        };
        set_up().unwrap();
        self.frontend = Some(frontend);
    }

    /// Sets up a whole session.
    pub(crate) fn connect(&mut self, socket: &Path) {
        self.connect_until(socket, usize::MAX);
    }

    /// Leaves without a word.
    pub(crate) fn disconnect(&mut self) {
        self.frontend = None;
    }

    /// The messages that start one ring, resuming it at the used index if it is not forgotten.
    pub(crate) fn start_queue(&self, frontend: &Frontend, index: usize) -> Result<(), vhost::Error> {
        let queue = &self.queues[index];
        let host =
            |offset: u64| self.memory.get_host_address(GuestAddress(queue.table + offset)).unwrap() as u64;
        let used: u16 = self.memory.load(GuestAddress(queue.table + USED + 2), Ordering::Acquire).unwrap();
        frontend.set_vring_num(index, SIZE)?;
        frontend.set_vring_base(index, if self.forgets_base { 0 } else { used })?;
        frontend.set_vring_addr(
            index,
            &VringConfigData {
                queue_max_size: SIZE,
                queue_size: SIZE,
                flags: 0,
                desc_table_addr: host(0),
                used_ring_addr: host(USED),
                avail_ring_addr: host(AVAILABLE),
                log_addr: None,
            },
        )?;
        frontend.set_vring_call(index, &queue.call)?;
        frontend.set_vring_kick(index, &queue.kick)
    }

    /// Writes descriptor `index` of a ring's table.
    pub(crate) fn describe(
        &self,
        queue: usize,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) {
        let at = GuestAddress(self.queues[queue].table + 16 * u64::from(index));
        let word = u128::from(address)
            | u128::from(length) << 64
            | u128::from(flags) << 96
            | u128::from(next) << 112;
        self.memory.write_slice(&word.to_le_bytes(), at).unwrap();
    }

    /// Makes the chain at `head` available and kicks if the backend asks for it.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        self.offer_all(queue, [head]);
    }

    /// Makes chains available all at once and kicks if the backend asks for it.
    pub(crate) fn offer_all(&mut self, queue: usize, heads: impl IntoIterator<Item = u16>) {
        let ring = &mut self.queues[queue];
        let base = ring.table + AVAILABLE;
        let before = ring.available;
        for head in heads {
            let slot = u64::from(ring.available.0 % SIZE);
            self.memory.store(head.to_le(), GuestAddress(base + 4 + 2 * slot), Ordering::Relaxed).unwrap();
            ring.available += 1;
        }
        self.memory.store(ring.available.0.to_le(), GuestAddress(base + 2), Ordering::Release).unwrap();
        fence(Ordering::SeqCst);
        let event_index = self.features & (1 << 29) != 0;
        let asked = if event_index {
            let at = ring.table + USED + 4 + 8 * u64::from(SIZE);
            let event: u16 = self.memory.load(GuestAddress(at), Ordering::Relaxed).unwrap();
            Wrapping(event) - before < ring.available - before
        } else {
            let flags: u16 = self.memory.load(GuestAddress(ring.table + USED), Ordering::Relaxed).unwrap();
            flags & 1 == 0
        };
        if asked {
            self.kick(queue);
        }
    }

    /// Kicks, asked or not.
    pub(crate) fn kick(&mut self, queue: usize) {
        let ring = &mut self.queues[queue];
        ring.kick.write(1).unwrap();
        ring.kicks += 1;
    }

    /// The next used entry, if there is one: head and length.
    pub(crate) fn take_used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let ring = &mut self.queues[queue];
        let base = ring.table + USED;
        let index: u16 = self.memory.load(GuestAddress(base + 2), Ordering::Acquire).unwrap();
        if index == ring.used.0 {
            return None;
        }
        let slot = base + 4 + 8 * u64::from(ring.used.0 % SIZE);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        ring.used += 1;
        // Ask to be told of the next one.
        let event = ring.table + AVAILABLE + 4 + 2 * u64::from(SIZE);
        self.memory.store(ring.used.0.to_le(), GuestAddress(event), Ordering::Relaxed).unwrap();
        Some((head, length))
    }

    /// Where buffer `index` of a ring lies.
    pub(crate) fn buffer(queue: usize, index: u16) -> u64 {
        (1 << 20) + (queue as u64) * (1 << 20) + u64::from(index) * u64::from(BUFFER)
    }

    /// Fills a receive ring with single buffers.
    pub(crate) fn fill(&mut self, queue: usize) {
        for index in 0..SIZE {
            self.describe(queue, index, Self::buffer(queue, index), BUFFER, WRITE, 0);
            self.offer(queue, index);
        }
    }

    /// Offers a frame on a transmit ring, a zeroed header and `frame` in one buffer.
    pub(crate) fn send(&mut self, queue: usize, index: u16, frame: &[u8]) {
        self.prepare(queue, index, frame);
        self.offer(queue, index);
    }

    /// Writes a frame and its descriptor, and offers nothing yet.
    pub(crate) fn prepare(&mut self, queue: usize, index: u16, frame: &[u8]) {
        let at = Self::buffer(queue, index);
        let bytes = [&[0; HEADER], frame].concat();
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
        self.describe(queue, index, at, bytes.len() as u32, 0, 0);
    }

    /// Waits for a used entry.
    #[track_caller]
    pub(crate) fn wait_used(&mut self, queue: usize) -> (u32, u32) {
        let mut entry = None;
        until("an entry is used", || {
            entry = self.take_used(queue);
            entry.is_some()
        });
        entry.unwrap()
    }
}

/// A frame of `length` bytes with distinct addresses and a pattern.
pub(crate) fn frame(length: usize) -> Vec<u8> {
    (0..length).map(|i| i as u8).collect()
}

/// Sends `frame` on ring 1 through a `loop` backend and checks what comes back on ring 0.
#[track_caller]
pub(crate) fn loop_once(guest: &mut Guest, index: u16, frame: &[u8]) {
    guest.send(1, index % SIZE, frame);
    assert_eq!(guest.wait_used(1), (u32::from(index % SIZE), 0));
    let mut got = Vec::new();
    let mut buffers = 0;
    while got.len() < frame.len() + HEADER {
        let (head, length) = guest.wait_used(0);
        let mut part = vec![0; length as usize];
        guest.memory.read_slice(&mut part, GuestAddress(Guest::buffer(0, head as u16))).unwrap();
        got.extend(part);
        buffers += 1;
        guest.offer(0, head as u16);
    }
    let (header, ethernet) = got.split_at(HEADER);
    assert_eq!(header[10..12], u16::to_le_bytes(buffers));
    let swapped = [&frame[6..12], &frame[..6], &frame[12..]].concat();
    assert!(ethernet == swapped, "the frame came back changed");
}

/// Offsets of a ring's parts behind its descriptor table.
pub(crate) const AVAILABLE: u64 = 0x4000;
pub(crate) const USED: u64 = 0x8000;

/// Descriptor flags.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Feature bits.
pub(crate) const MRG_RXBUF: u64 = 1 << 15;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const VERSION_1: u64 = 1 << 32;
