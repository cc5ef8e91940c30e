//! A port's life: one frontend after another, until the program ends or the port fails.
//!
//! Each port has a thread for this, and each session threads of its own, which end with it. Nothing here waits for
//! another port, and a port that fails, fails alone.

use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use crate::door::{Budget, Doorway};
use crate::notify;
use crate::port::PortOptions;
use crate::sandbox::{self, Role, Sandbox};
use crate::session::{self, Session};
use crate::show::Board;
use crate::stats::Stats;
use crate::uplink::{Offloads, Pair};

/// Milliseconds that a port which connects waits between two attempts.
const RETRY: u8 = 200;

/// Why a port ends with a failure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A session could not be served.
    #[error("{0}")]
    Session(#[from] session::Error),
    /// Its thread could not be confined.
    #[error("{0}")]
    Sandbox(#[from] sandbox::Error),
    /// The system refuses something every port needs.
    #[error("cannot {what}: {source}")]
    System {
        /// What it refuses.
        what: &'static str,
        /// What it says.
        #[source]
        source: std::io::Error,
    },
    /// A bug.
    #[error("it ended by a panic: this is a bug, please report what was said before")]
    Panic,
}

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::System { what, source }
}

/// Tells all ports that the program shall end.
#[derive(Clone, Debug)]
pub struct Quit {
    asked: Arc<AtomicBool>,
    event: Arc<EventFd>,
    /// One a port.
    frontends: Arc<[Mutex<Option<UnixStream>>]>,
}

impl Quit {
    /// Nobody asked `ports` ports yet.
    pub fn new(ports: usize) -> std::io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let frontends = (0..ports).map(|_| Mutex::default()).collect();
        Ok(Quit { asked: Arc::default(), event: Arc::new(event), frontends })
    }

    /// Ends all ports: no further session, and the current ones are cut off.
    pub fn ask(&self) {
        self.asked.store(true, Ordering::Release);
        let _ = self.event.write(1);
        for frontend in self.frontends.iter() {
            if let Some(frontend) = &*frontend.lock().unwrap_or_else(PoisonError::into_inner) {
                let _ = frontend.shutdown(Shutdown::Both);
            }
        }
    }

    /// Whether the program shall end.
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// Names the connection of port `port` to cut off.
    fn set_frontend(&self, port: usize, frontend: Option<UnixStream>) {
        let Some(current) = self.frontends.get(port) else { return };
        let mut current = current.lock().unwrap_or_else(PoisonError::into_inner);
        *current = frontend;
        if let (true, Some(frontend)) = (self.is_asked(), &*current) {
            let _ = frontend.shutdown(Shutdown::Both);
        }
    }

    /// Waits for a connection on `listener`, if there is one, at most for `limit`; `false` when the program shall end.
    fn wait(&self, listener: Option<&UnixListener>, limit: PollTimeout) -> std::io::Result<bool> {
        let mut fds = vec![PollFd::new(self.event.as_fd(), PollFlags::POLLIN)];
        fds.extend(listener.map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN)));
        loop {
            match poll(&mut fds, limit) {
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => return Ok(!self.is_asked()),
            }
        }
    }
}

/// Where a port's frontends come from.
#[derive(Debug)]
pub enum Source<'a> {
    /// They connect here.
    Listener(UnixListener),
    /// This one is connected, and there will be no other.
    Connected(UnixStream),
    /// They are connected to.
    Path(&'a Path),
}

/// A port with everything open that it needs.
pub struct Port<'a> {
    /// Its place among the ports.
    pub index: usize,
    /// Its options.
    pub options: &'a PortOptions,
    /// Where its frontends come from.
    pub source: Source<'a>,
    /// The device-wide side of its uplink.
    pub offloads: Offloads,
    /// The uplink's end of each queue pair.
    pub pairs: Vec<Pair>,
    /// Its counters.
    pub stats: Arc<Stats>,
    /// Its way to the vhost-user-backend crate.
    pub doorway: Doorway,
    /// How much memory a frontend can bring.
    pub budget: Budget,
}

impl Port<'_> {
    /// Serves frontends until `quit` is asked, or the one that was inherited leaves.
    pub fn serve(self, quit: &Quit, sandbox: &Sandbox, board: &Board) -> Result<(), Error> {
        sandbox.confine(Role::Port)?;
        let Port { index, options, source, offloads, pairs, stats, doorway, budget } = self;
        let shown = stats.clone();
        let mut session = Session { options, doorway: &doorway, budget, sandbox, offloads, pairs, stats };
        let mut serve = |frontend: UnixStream| -> Result<(), Error> {
            quit.set_frontend(index, Some(frontend.try_clone().map_err(system("duplicate a connection"))?));
            shown.set_connected(true);
            notify::status(board);
            let result = session.run(frontend);
            shown.set_connected(false);
            quit.set_frontend(index, None);
            if !quit.is_asked() {
                notify::status(board);
            }
            match result {
                // Out of descriptors, threads or memory before it began: that passes, and the frontend may come again.
                Err(error) if session.is_whole() => {
                    tracing::warn!("{error}");
                    std::thread::sleep(Duration::from_millis(100));
                    Ok(())
                }
                result => Ok(result?),
            }
        };
        match source {
            Source::Connected(frontend) => serve(frontend),
            Source::Listener(listener) => {
                while quit.wait(Some(&listener), PollTimeout::NONE).map_err(system("wait for a frontend"))? {
                    match listener.accept() {
                        Ok((frontend, _)) => serve(frontend)?,
                        // Out of descriptors or memory: that passes, and the frontend is still waiting.
                        Err(error) => {
                            tracing::warn!("cannot accept a frontend: {error}");
                            std::thread::sleep(Duration::from_millis(100));
                        }
                    }
                }
                Ok(())
            }
            Source::Path(path) => {
                let mut said = false;
                loop {
                    match try_connect(path) {
                        Ok(frontend) => {
                            said = false;
                            serve(frontend)?;
                        }
                        Err(error) if !said => {
                            tracing::info!("no frontend at {}: {error}; trying on", path.display());
                            said = true;
                        }
                        Err(_) => {}
                    }
                    if !quit.wait(None, RETRY.into()).map_err(system("wait for a frontend"))? {
                        return Ok(());
                    }
                }
            }
        }
    }
}

/// Connects to the socket at `path`, without waiting for a frontend that does not accept.
fn try_connect(path: &Path) -> nix::Result<UnixStream> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket.into())
}
