//! The program's life: open what it needs, serve one frontend after another, leave nothing behind.
//!
//! A vhost-user-backend daemon is good for one session: it keeps ring state of the last one and refuses a second
//! owner. So every session gets a fresh one, with its own workers and poll threads; the uplink and the counters stay.

use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::affinity;
use crate::cli::Options;
use crate::door::{self, Inherited};
use crate::fifo;
use crate::session::{self, Session};
use crate::socket::{self, Claimed};
use crate::stats::Stats;
use crate::uplink;

/// Why the program ends with a failure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No uplink was named.
    #[error("say where frames go with --uplink")]
    NoUplink,
    /// The uplink cannot be opened.
    #[error("{0}")]
    Uplink(#[from] uplink::tap::Error),
    /// A socket cannot be had.
    #[error("{0}")]
    Socket(#[from] socket::Error),
    /// A poll thread cannot be pinned.
    #[error("{0}")]
    Affinity(#[from] affinity::Error),
    /// The inherited descriptor is of no use.
    #[error("{0}")]
    Inherited(#[from] door::Error),
    /// The inherited FIFO region is of no use.
    #[error("{0}")]
    Fifo(#[from] fifo::Error),
    /// A session could not be set up.
    #[error("{0}")]
    Session(#[from] session::Error),
    /// The system refuses something every program needs.
    #[error("cannot {what}: {source}")]
    System {
        /// What it refuses.
        what: &'static str,
        /// What it says.
        #[source]
        source: std::io::Error,
    },
}

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::System { what, source }
}

/// Tells everybody that the program shall end.
#[derive(Clone)]
pub struct Quit {
    asked: Arc<AtomicBool>,
    event: Arc<EventFd>,
    frontend: Arc<Mutex<Option<UnixStream>>>,
}

impl Quit {
    /// Nobody asked yet.
    pub fn new() -> std::io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Quit { asked: Arc::default(), event: Arc::new(event), frontend: Arc::default() })
    }

    /// Ends the program: no further session, and the current one is cut off.
    pub fn ask(&self) {
        self.asked.store(true, Ordering::Release);
        let _ = self.event.write(1);
        if let Some(frontend) = &*self.frontend.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = frontend.shutdown(Shutdown::Both);
        }
    }

    /// Whether the program shall end.
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// Names the connection to cut off.
    fn set_frontend(&self, frontend: Option<UnixStream>) {
        let mut current = self.frontend.lock().unwrap_or_else(PoisonError::into_inner);
        *current = frontend;
        if let (true, Some(frontend)) = (self.is_asked(), &*current) {
            let _ = frontend.shutdown(Shutdown::Both);
        }
    }

    /// Waits for a connection on `listener`; `false` when the program shall end.
    fn wait_for(&self, listener: &UnixListener) -> std::io::Result<bool> {
        let mut fds = [
            PollFd::new(self.event.as_fd(), PollFlags::POLLIN),
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        ];
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => return Ok(!self.is_asked()),
            }
        }
    }
}

/// Runs the program until a signal (or, with an inherited connection, the frontend) ends it.
pub fn run(options: &Options) -> Result<(), Error> {
    let quit = Quit::new().map_err(system("create an eventfd"))?;
    let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(system("catch signals"))?;
    let asked = quit.clone();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || signals.forever().for_each(|_| asked.ask()))
        .map_err(system("start a thread"))?;
    serve(options, &quit)
}

/// Serves frontends until `quit` is asked.
pub fn serve(options: &Options, quit: &Quit) -> Result<(), Error> {
    options.fifo.as_ref().map_or(Ok(()), |fifo| fifo.place.check())?;
    let kind = options.uplink.as_ref().ok_or(Error::NoUplink)?;
    let queue_pairs = usize::from(options.queue_pairs);
    let pcpus = options.affinity.as_ref().map(|list| list.0.as_slice()).unwrap_or_default();
    affinity::check(pcpus)?;
    let (offloads, pairs) = uplink::open(kind, queue_pairs)?;
    let stats = Arc::new(Stats::new(queue_pairs));
    // Both sockets are dropped, and so removed, at the end.
    let claimed = options.socket_path.as_deref().map(Claimed::bind).transpose()?;
    let _stats_socket = match &options.stats_socket {
        Some(path) => Some(serve_stats(path, &stats)?),
        None => None,
    };
    let mut session = Session { options, offloads, pairs, stats };
    let mut serve = |frontend: UnixStream| -> Result<(), Error> {
        quit.set_frontend(Some(frontend.try_clone().map_err(system("duplicate a connection"))?));
        let result = session.run(frontend);
        quit.set_frontend(None);
        Ok(result?)
    };
    let inherited;
    let listener = match (&claimed, options.fd) {
        (Some(claimed), _) => claimed.listener(),
        (None, Some(fd)) => match door::inherit(fd)? {
            Inherited::Connected(frontend) => return serve(frontend),
            Inherited::Listening(listener) => {
                inherited = listener;
                &inherited
            }
        },
        (None, None) => return Ok(()),
    };
    while quit.wait_for(listener).map_err(system("wait for a frontend"))? {
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

/// Serves the counters on a thread of its own for the rest of the program's life.
fn serve_stats(path: &std::path::Path, stats: &Arc<Stats>) -> Result<Claimed, Error> {
    let claimed = Claimed::bind(path)?;
    let listener = claimed.listener().try_clone().map_err(system("duplicate the stats socket"))?;
    let stats = stats.clone();
    std::thread::Builder::new()
        .name("stats".into())
        .spawn(move || stats.serve(&listener))
        .map_err(system("start a thread"))?;
    Ok(claimed)
}
