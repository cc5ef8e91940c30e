//! Child processes that never outlive the lab.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A child process: ended when dropped, and killed by the kernel if the lab dies first.
#[derive(Debug)]
pub struct Process {
    what: String,
    child: Child,
}

/// Why a process could not be started or ended badly.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It did not start.
    #[error("cannot start {0}: {1}")]
    Start(String, #[source] io::Error),
    /// It did not end in time.
    #[error("{0} (process {1}) is still running after {2:?}")]
    StillRunning(String, u32, Duration),
    /// It ended instead of listening.
    #[error("{0} ended at once: {1}")]
    Ended(String, ExitStatus),
    /// It does not listen.
    #[error("{0} does not listen at {1} after {2:?}")]
    NotListening(String, PathBuf, Duration),
    /// It could not be waited for.
    #[error("cannot wait for {0}: {1}")]
    Wait(String, #[source] io::Error),
}

impl Process {
    /// Starts `program` with `arguments`; `configure` sets its streams and the rest.
    pub fn spawn(
        what: impl Into<String>,
        program: impl AsRef<std::ffi::OsStr>,
        configure: impl FnOnce(&mut Command),
    ) -> Result<Self, Error> {
        // setpriv becomes the program itself, so the process id is the program's.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program);
        configure(&mut command);
        let what = what.into();
        let child = spawn_from_keeper(command).map_err(|e| Error::Start(what.clone(), e))?;
        Ok(Self { what, child })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The child itself, for its streams.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Whether it has ended, and how.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>, Error> {
        self.child.try_wait().map_err(|e| Error::Wait(self.what.clone(), e))
    }

    /// Waits for it to end by itself.
    pub fn wait_for(&mut self, deadline: Duration) -> Result<ExitStatus, Error> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > deadline {
                return Err(Error::StillRunning(self.what.clone(), self.id(), deadline));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until it listens at `socket`, where nothing may be before. The file appears with `bind`; whoever connects then may have to
    /// wait, but is not refused.
    pub fn wait_for_socket(&mut self, socket: &Path, deadline: Duration) -> Result<(), Error> {
        let start = Instant::now();
        while !socket.exists() {
            if let Some(status) = self.try_wait()? {
                return Err(Error::Ended(self.what.clone(), status));
            }
            if start.elapsed() > deadline {
                return Err(Error::NotListening(self.what.clone(), socket.into(), deadline));
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Sends `signal`.
    pub fn signal(&self, signal: Signal) {
        // A process that has ended but was not waited for still owns its id; a failure means nothing is left to do.
        let _ = kill(Pid::from_raw(self.child.id() as i32), signal);
    }

    /// Asks it to end, and kills it if it does not within two seconds.
    pub fn terminate(mut self) -> Result<ExitStatus, Error> {
        self.signal(Signal::SIGTERM);
        self.wait_for(Duration::from_secs(2)).or_else(|_| {
            self.signal(Signal::SIGKILL);
            self.wait_for(Duration::from_secs(10))
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The kernel ties a child's life to the *thread* that started it, so one thread that lives as long as the lab
/// starts them all.
fn spawn_from_keeper(command: Command) -> io::Result<Child> {
    type Order = (Command, Sender<io::Result<Child>>);
    static KEEPER: OnceLock<Sender<Order>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (orders, incoming) = channel::<Order>();
        thread::spawn(move || {
            for (mut command, answer) in incoming {
                let _ = answer.send(command.spawn());
            }
        });
        orders
    });
    let (answer, child) = channel();
    let gone = |_| io::Error::other("the thread that starts processes is gone");
    keeper.send((command, answer)).map_err(|_| gone(()))?;
    child.recv().map_err(|_| gone(()))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_process_is_gone() {
        let process = Process::spawn("sleep", "sleep", |command| {
            command.arg("60");
        })
        .expect("sleep starts");
        let id = Pid::from_raw(process.id() as i32);
        assert!(kill(id, None).is_ok());
        drop(process);
        assert!(kill(id, None).is_err());
    }

    #[test]
    fn a_process_that_does_not_end_in_time() {
        let mut process = Process::spawn("sleep", "sleep", |command| {
            command.arg("60");
        })
        .expect("sleep starts");
        let error = process.wait_for(Duration::from_millis(50)).expect_err("it sleeps on");
        assert!(matches!(error, Error::StillRunning(..)), "{error}");
    }
}
