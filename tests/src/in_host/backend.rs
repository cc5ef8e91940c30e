//! A running `ivcpu-backend`.

use std::fs;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::Signal;
use serde::Deserialize;

use super::{FifoRegion, Host, Wire};
use crate::process::Process;

/// Longest until a socket is there.
const DEADLINE: Duration = Duration::from_secs(15);

/// How a backend is started.
#[derive(Clone, Debug)]
pub struct BackendConfig {
    /// `tap:NAME`, `null`, `loop` or `gen[:SIZE]`.
    pub uplink: String,
    /// Queue pairs.
    pub queue_pairs: u16,
    /// What `--poll-us` says: microseconds, or `always`.
    pub poll: String,
    /// Where its poll threads run; anywhere if empty.
    pub pcpus: Vec<usize>,
    /// Whether the frontend has a control queue.
    pub control_queue: bool,
    /// What `--fifo` says.
    pub fifo: Option<String>,
}

/// One queue's counters, as the backend gives them.
#[derive(Clone, Debug, Deserialize)]
pub struct QueueStats {
    /// Number of the queue.
    pub index: usize,
    /// `to_guest` or `from_guest`.
    pub direction: String,
    /// Frames moved.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Frames dropped.
    pub dropped: u64,
    /// Kick notifications received.
    pub kicks: u64,
    /// Call notifications sent because the driver asked for one.
    pub calls: u64,
    /// Call notifications the driver suppressed.
    pub calls_suppressed: u64,
    /// Notifications virtio's suppression rule asked for.
    pub completions: u64,
    /// Those put into the FIFO as entries.
    pub fifo_entries: u64,
    /// Those that an entry already there covers.
    pub fifo_merged: u64,
    /// Calls because the IVCPU slept or was absent although a FIFO is in use.
    pub wakeups: u64,
    /// Calls because the IVCPU left an entry waiting for too long.
    pub fallbacks: u64,
}

/// The backend's counters.
#[derive(Clone, Debug, Deserialize)]
pub struct BackendStats {
    /// One entry a queue.
    pub queues: Vec<QueueStats>,
    /// Frontends served so far, the present one included.
    pub sessions: u64,
}

impl BackendStats {
    /// One counter, over all queues.
    pub fn total(&self, count: impl Fn(&QueueStats) -> u64) -> u64 {
        self.queues.iter().map(count).sum()
    }
}

/// A running backend; ended when dropped.
pub struct Backend {
    process: Process,
    socket: PathBuf,
    stats: PathBuf,
}

impl Backend {
    /// Starts it, in the wire's namespace if it serves a TAP there, and waits until it listens.
    pub fn start(host: &Host, config: &BackendConfig) -> anyhow::Result<Self> {
        let socket = host.scratch().join("backend.sock");
        let listen = ["--socket-path".into(), socket.display().to_string()];
        Self::spawn(host, config, listen, socket)
    }

    /// Starts one that is connected to a frontend which listens at `frontend`, as soon as that does.
    pub fn connect(host: &Host, config: &BackendConfig, frontend: &Path) -> anyhow::Result<Self> {
        let start = Instant::now();
        let connection = loop {
            match UnixStream::connect(frontend) {
                Ok(connection) => break connection,
                Err(e) if start.elapsed() > DEADLINE => {
                    return Err(e).with_context(|| format!("connecting to {}", frontend.display()));
                }
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        };
        // Until the backend has it, and no longer: another child that held it, too, would keep the connection open.
        fcntl(&connection, FcntlArg::F_SETFD(FdFlag::empty()))?;
        let inherit = ["--fd".into(), connection.as_raw_fd().to_string()];
        Self::spawn(host, config, inherit, frontend.into())
    }

    fn spawn(
        host: &Host,
        config: &BackendConfig,
        connection: [String; 2],
        socket: PathBuf,
    ) -> anyhow::Result<Self> {
        let stats = host.scratch().join("backend-stats.sock");
        // One that was killed leaves its own.
        let _ = fs::remove_file(&stats);
        let log = host.log("backend.log")?;
        let affinity: Vec<_> = config.pcpus.iter().map(usize::to_string).collect();
        // Only a TAP has a wire to it.
        let mut words = Vec::new();
        if config.uplink.starts_with("tap:") {
            words.extend(Wire::enter_words());
        }
        words.extend([host.binary("ivcpu-backend").display().to_string()]);
        words.extend(connection);
        words.extend(["--uplink".into(), config.uplink.clone()]);
        words.extend(["--queue-pairs".into(), config.queue_pairs.to_string()]);
        words.extend(["--poll-us".into(), config.poll.clone()]);
        if !affinity.is_empty() {
            words.extend(["--affinity".into(), format!("[{}]", affinity.join(","))]);
        }
        if !config.control_queue {
            words.extend(["--control-queue".into(), "off".into()]);
        }
        words.extend(["--stats-socket".into(), stats.display().to_string()]);
        words.extend(config.fifo.iter().flat_map(|fifo| ["--fifo".into(), fifo.clone()]));
        let mut process = Process::spawn("ivcpu-backend", &words[0], |command| {
            command.args(&words[1..]).stdin(Stdio::null()).stderr(log);
        })?;
        // It is there after that for frontends.
        process.wait_for_socket(&stats, DEADLINE).context("see backend.log")?;
        Ok(Self { process, socket, stats })
    }

    /// Makes the FIFO region's file, as one does for a VMM that does not.
    pub fn create_region(host: &Host, region: &FifoRegion) -> anyhow::Result<()> {
        let program = host.binary("ivcpu-backend");
        let output = Command::new(&program)
            .args(["fifo", "create", "--size", region.qemu_size()])
            .arg(&region.path)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("running {}", program.display()))?;
        ensure!(output.status.success(), "fifo create: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }

    /// The vhost-user socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Its counters now.
    pub fn stats(&self) -> anyhow::Result<BackendStats> {
        let mut text = String::new();
        let mut stream = UnixStream::connect(&self.stats).context("asking the backend for its counters")?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.read_to_string(&mut text).context("reading the backend's counters")?;
        serde_json::from_str(&text).with_context(|| format!("the backend's counters are {text:?}"))
    }

    /// Kills it as a crash would.
    pub fn kill(mut self) -> anyhow::Result<()> {
        self.process.signal(Signal::SIGKILL);
        self.process.wait_for(Duration::from_secs(10))?;
        Ok(())
    }

    /// Asks it to end and gives its exit status.
    pub fn terminate(self) -> anyhow::Result<ExitStatus> {
        Ok(self.process.terminate()?)
    }
}
