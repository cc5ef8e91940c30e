//! The emulated host: a whole virtualization host (KVM, five pCPUs, IOMMU, NIC) under QEMU's TCG, in which the
//! machine's own file system is visible read-only, so that what is built here runs there as it is.
//!
//! The emulation can get stuck, rarely. Hence deadlines: one on coming up (killed and started anew a few times,
//! each reported), one on silence while a command runs (the run fails: nothing measured across a stall counts).

mod console;
mod machine;
mod outside;
mod terminal;

use std::fs;
use std::io::{self, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::channel::{Bytes, Report, Request, Run, receive, send};
use crate::lock::Lock;
use crate::process::{self, Process};
use crate::progress::Step;
use crate::provision::{Kernel, Provision};
use crate::workspace::Workspace;
use crate::{image, provision, qmp, workspace};
use console::keep_console;
pub(crate) use console::last_lines;
use machine::Parts;
pub use terminal::{RawTerminal, terminal_size};

/// Where the read-write share is mounted inside.
pub const SHARE: &str = "/run/ivcpu-lab";

/// Why the emulated host could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the lab's own.
    #[error("cannot use {0}: {1}")]
    File(PathBuf, #[source] io::Error),
    /// Something could not be provided.
    #[error(transparent)]
    Provision(#[from] provision::Error),
    /// What runs in it could not be built.
    #[error(transparent)]
    Workspace(#[from] workspace::Error),
    /// The image could not be made.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// QEMU did not start.
    #[error(transparent)]
    Process(#[from] process::Error),
    /// QEMU could not be asked for its threads.
    #[error(transparent)]
    Qmp(#[from] qmp::Error),
    /// It never came up.
    #[error(
        "the emulated host did not come up within {deadline:?}, {attempts} times; its console said last: {last}"
    )]
    NeverReady {
        /// Time given to each start.
        deadline: Duration,
        /// Number of starts.
        attempts: u32,
        /// End of the console.
        last: String,
    },
    /// It got stuck while a command ran.
    #[error("the emulated host is stuck ({sign}; its console: {}): nothing measured in it counts, run again", console.display())]
    Stuck {
        /// What shows it.
        sign: String,
        /// Its console, which the next boot leaves alone.
        console: PathBuf,
    },
    /// It powered off while a command ran.
    #[error("the emulated host is gone; its console said last: {0}")]
    Gone(String),
    /// The command did not end in time.
    #[error("`{0}` did not end within {1:?}")]
    Deadline(String, Duration),
    /// The command could not be started.
    #[error("cannot run `{0}` in the emulated host: {1}")]
    NotStarted(String, String),
}

/// How to boot.
#[derive(Clone, Debug)]
pub struct Options {
    /// Time for one start.
    pub ready: Duration,
    /// Starts in all before giving up.
    pub attempts: u32,
    /// The agent says "alive" every second; this much silence means the host is stuck.
    pub silence: Duration,
    /// More words for the emulated host's kernel command line.
    pub kernel_words: String,
    /// A raw image that it may write, its disk `/dev/vda`.
    pub disk: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        // 15 s is ample on an idle machine; this one may be building something else.
        // The emulator's faults come in rows where the machine is busy: three starts of four were seen to stall.
        let (ready, silence) = (Duration::from_secs(60), Duration::from_secs(20));
        Self { ready, attempts: 8, silence, kernel_words: String::new(), disk: None }
    }
}

/// Standard input of a command.
pub enum Input {
    /// None.
    Empty,
    /// The lab's own.
    Inherited,
}

/// What happens to a running emulated host.
#[derive(Debug)]
enum Event {
    Agent(Report),
    Stalled(String),
    PoweredOff,
}

/// A running emulated host. Dropping it ends it.
pub struct EmulatedHost {
    workspace: Workspace,
    qemu: Process,
    agent: Arc<Mutex<UnixStream>>,
    events: Receiver<Event>,
    console: PathBuf,
    share: PathBuf,
    kernel: String,
    restarts: u32,
    silence: Duration,
    _lock: Lock,
}

impl EmulatedHost {
    /// Boots it, waiting for another one of this checkout to end first.
    pub fn boot(workspace: &Workspace, provision: &Provision, options: &Options) -> Result<Self, Error> {
        Self::boot_locked(lock(workspace)?, workspace, provision, options)
    }

    /// Builds what runs in it and the images of its guests, and boots it. It waits first: another emulated host
    /// may be using the binaries and images that are made here.
    pub fn build_and_boot(
        workspace: &Workspace,
        provision: &Provision,
        guest_kernels: &[Kernel],
        options: &Options,
    ) -> Result<Self, Error> {
        let lock = lock(workspace)?;
        workspace.build()?;
        for kernel in guest_kernels {
            image::prepare_guest(workspace, provision, *kernel)?;
        }
        Self::boot_locked(lock, workspace, provision, options)
    }

    fn boot_locked(
        lock: Lock,
        workspace: &Workspace,
        provision: &Provision,
        options: &Options,
    ) -> Result<Self, Error> {
        let tools = provision.tools()?;
        let qemu = provision.qemu()?;
        let kernel = provision.kernel(Kernel::V6_12)?;
        let cache = workspace.cache();
        let share = cache.join("share");
        let _ = fs::remove_dir_all(&share);
        fs::create_dir_all(&share).map_err(|e| Error::File(share.clone(), e))?;
        let image = cache.join("host.img");
        let agent = workspace.release().join("ivcpu-lab");
        image::build_host(&image, &kernel, &tools, &visible(workspace), &agent)?;

        let console = cache.join("host-console.log");
        for attempt in 1..=options.attempts {
            let sockets = tempfile::tempdir().map_err(|e| Error::File(std::env::temp_dir(), e))?;
            let parts = Parts {
                qemu: &qemu,
                kernel: &kernel,
                image: &image,
                share: &share,
                sockets: sockets.path(),
                console: &console,
                more_kernel_words: &options.kernel_words,
                disk: options.disk.as_deref(),
            };
            let step = Step::start("booting the emulated host");
            let started = start(&parts, options.ready);
            step.finish();
            // The connections stay; nothing in the file system may outlive a killed lab.
            drop(sockets);
            match started? {
                Some(started) => {
                    return Ok(Self {
                        workspace: workspace.clone(),
                        qemu: started.qemu,
                        agent: started.agent,
                        events: started.events,
                        console,
                        share,
                        kernel: started.kernel,
                        restarts: attempt - 1,
                        silence: options.silence,
                        _lock: lock,
                    });
                }
                None if attempt < options.attempts => {
                    let last = last_lines(&console);
                    eprintln!(
                        "lab: the emulated host did not come up within {:?} (console: {}; it ends: {last}): \
                         starting it anew ({attempt} of {})",
                        options.ready,
                        keep_console(&console).display(),
                        options.attempts - 1
                    );
                }
                None => {}
            }
        }
        Err(Error::NeverReady {
            deadline: options.ready,
            attempts: options.attempts,
            last: last_lines(&console),
        })
    }

    /// `uname -r` in it.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// How often it had to be started anew before it came up.
    pub fn restarts(&self) -> u32 {
        self.restarts
    }

    /// The machine's side of the folder that is `SHARE` inside.
    pub fn share(&self) -> &Path {
        &self.share
    }

    /// A command in the lab's usual environment.
    pub fn command(&self, argv: impl IntoIterator<Item = impl Into<String>>) -> Run {
        let path = format!(
            "{}:{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            self.workspace.release().display(),
            self.workspace.launchers().display()
        );
        let terminal = std::env::var("TERM").unwrap_or_else(|_| "dumb".into());
        Run {
            argv: argv.into_iter().map(Into::into).collect(),
            directory: self.workspace.root().display().to_string(),
            environment: vec![("PATH".into(), path), ("TERM".into(), terminal)],
            terminal: None,
        }
    }

    /// Runs a command to its end and gives its exit status; `output` gets what it writes (and whether to standard
    /// error). After an error the emulated host is of no use any more, except after `NotStarted` and `Deadline`.
    pub fn run(
        &mut self,
        run: &Run,
        input: Input,
        deadline: Option<Duration>,
        mut output: impl FnMut(bool, &[u8]),
    ) -> Result<i32, Error> {
        let (what, silence) = (run.argv.join(" "), self.silence);
        self.request(&Request::Run(run.clone()))?;
        match input {
            Input::Empty => self.request(&Request::InputEnd)?,
            Input::Inherited => self.forward_input(),
        }
        let start = Instant::now();
        loop {
            let left = deadline.map(|deadline| deadline.saturating_sub(start.elapsed()));
            if left.is_some_and(|left| left.is_zero()) {
                self.request(&Request::Kill)?;
                self.wait_for_exit()?;
                return Err(Error::Deadline(what, deadline.unwrap_or_default()));
            }
            match self.report(left.unwrap_or(silence).min(silence))? {
                Some(Report::Output { error, bytes }) => output(error, &bytes.0),
                Some(Report::Exit(status)) => return Ok(status),
                Some(Report::NotStarted(why)) => return Err(Error::NotStarted(what, why)),
                Some(Report::Alive | Report::Ready { .. }) => {}
                None if left.is_some_and(|left| left < silence) => {}
                None => return Err(self.stuck(format!("no sign of life for {silence:?}"))),
            }
        }
    }

    /// What a killed command says last; the next one's exit is not taken for its own then.
    fn wait_for_exit(&self) -> Result<(), Error> {
        let deadline = Instant::now() + self.silence;
        loop {
            match self.report(deadline.saturating_duration_since(Instant::now()))? {
                Some(Report::Exit(_) | Report::NotStarted(_)) => return Ok(()),
                Some(_) => {}
                None => {
                    return Err(self.stuck(format!("a killed command did not end within {:?}", self.silence)));
                }
            }
        }
    }

    /// The agent's next report, if it comes within this time; an error if none can come any more.
    fn report(&self, within: Duration) -> Result<Option<Report>, Error> {
        match self.events.recv_timeout(within) {
            Ok(Event::Agent(report)) => Ok(Some(report)),
            Ok(Event::Stalled(sign)) => Err(self.stuck(sign)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Ok(Event::PoweredOff) | Err(RecvTimeoutError::Disconnected) => {
                Err(Error::Gone(last_lines(&self.console)))
            }
        }
    }

    fn stuck(&self, sign: String) -> Error {
        Error::Stuck { sign, console: keep_console(&self.console) }
    }

    /// Powers it off and waits for that.
    pub fn power_off(mut self) -> Result<(), Error> {
        self.request(&Request::PowerOff)?;
        self.qemu.wait_for(Duration::from_secs(15))?;
        Ok(())
    }

    /// Makes a file of the share readable inside under this path.
    pub fn share_path(name: &str) -> PathBuf {
        Path::new(SHARE).join(name)
    }

    fn request(&self, request: &Request) -> Result<(), Error> {
        request_on(&self.agent, request).map_err(|e| Error::Gone(e.to_string()))
    }

    fn forward_input(&self) {
        let agent = self.agent.clone();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let request = match io::stdin().read(&mut buffer) {
                    Ok(0) | Err(_) => Request::InputEnd,
                    Ok(length) => Request::Input(Bytes(buffer[..length].to_vec())),
                };
                let ended = matches!(request, Request::InputEnd);
                if request_on(&agent, &request).is_err() || ended {
                    return;
                }
            }
        });
    }
}

fn request_on(agent: &Mutex<UnixStream>, request: &Request) -> io::Result<()> {
    let mut agent = agent.lock().map_err(|_| io::Error::other("an earlier write to the agent failed"))?;
    send(&mut *agent, request)
}

/// One emulated host of a checkout at a time: two would share the cores, the console file and the share.
pub fn lock(workspace: &Workspace) -> Result<Lock, Error> {
    let path = workspace.cache().join("emulated-host.lock");
    let another = "another emulated host of this checkout is running";
    Lock::take(&path, another).map_err(|e| Error::File(path, e))
}

/// Folders that must be seen inside wherever they lie.
fn visible(workspace: &Workspace) -> Vec<PathBuf> {
    let mut folders = vec![workspace.root().to_path_buf()];
    let program = std::env::current_exe().ok().and_then(|program| program.parent().map(PathBuf::from));
    for folder in [Some(workspace.cache()), Some(workspace.release()), program].into_iter().flatten() {
        if !folders.iter().any(|seen| folder.starts_with(seen)) {
            folders.push(folder);
        }
    }
    folders
}

struct Started {
    qemu: Process,
    agent: Arc<Mutex<UnixStream>>,
    events: Receiver<Event>,
    kernel: String,
}

/// One start; `None` if the host is not ready in time.
fn start(parts: &Parts<'_>, ready: Duration) -> Result<Option<Started>, Error> {
    let begin = Instant::now();
    let (sender, events) = channel();
    let mut qemu = parts.start(sender.clone())?;
    let threads = match qmp::Qmp::connect(&parts.qmp()).and_then(|mut qmp| qmp.vcpu_threads()) {
        Ok(threads) => threads,
        Err(e) => {
            return Err(match qemu.try_wait()? {
                Some(_) => Error::Gone(last_lines(parts.console)),
                None => e.into(),
            });
        }
    };
    outside::serve(&parts.outside(), qemu.id(), threads).map_err(|e| Error::File(parts.outside(), e))?;
    let agent = UnixStream::connect(parts.agent()).map_err(|e| Error::File(parts.agent(), e))?;
    let reader = agent.try_clone().map_err(|e| Error::File(parts.agent(), e))?;
    thread::spawn(move || forward_reports(BufReader::new(reader), &sender));
    let agent = Arc::new(Mutex::new(agent));
    loop {
        match events.recv_timeout(ready.saturating_sub(begin.elapsed())) {
            Ok(Event::Agent(Report::Ready { kernel, cpus, uptime })) => {
                tracing::debug!(kernel, cpus, uptime, "the emulated host is ready");
                return Ok(Some(Started { qemu, agent, events, kernel }));
            }
            Ok(Event::Agent(_)) => {}
            Ok(Event::Stalled(_) | Event::PoweredOff) | Err(_) => return Ok(None),
        }
    }
}

fn forward_reports(mut reader: BufReader<UnixStream>, events: &Sender<Event>) {
    while let Ok(Some(report)) = receive(&mut reader) {
        if events.send(Event::Agent(report)).is_err() {
            return;
        }
    }
}
