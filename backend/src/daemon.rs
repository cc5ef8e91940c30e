//! The program's life: open what it needs, give up all rights, serve its ports, leave nothing behind.

use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, mpsc};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::affinity;
use crate::cli::Options;
use crate::door::{self, Budget, Doorway, Inherited, MAX_REGIONS};
use crate::fifo::{self, Place};
use crate::lost_memory;
use crate::notify::{self, Activation};
use crate::port::{Connection, PortOptions};
use crate::sandbox::{self, Files, Role, Sandbox, Wanted};
use crate::serving::{self, Port, Quit, Source};
use crate::show::{Board, PortShown};
use crate::socket::{self, Claimed};
use crate::stats::Stats;
use crate::uplink;

/// Why the program ends with a failure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Two ports cannot be told apart.
    #[error("two ports have the name {0:?}: give them different ones with name=")]
    Name(String),
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
    /// The service manager's sockets are of no use.
    #[error("{0}")]
    Activation(#[from] notify::Error),
    /// The inherited FIFO region is of no use.
    #[error("{0}")]
    Fifo(#[from] fifo::Error),
    /// The program cannot be confined.
    #[error("{0}")]
    Sandbox(#[from] sandbox::Error),
    /// A port failed.
    #[error("{name} failed: {source}")]
    Port {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: serving::Error,
    },
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

/// Runs the program until a signal (or, with inherited connections only, the last frontend) ends it.
pub fn run(options: &Options) -> Result<(), Error> {
    let ports = options.ports();
    let mut names: Vec<_> = ports.iter().map(|port| port.name.as_str()).collect();
    names.sort_unstable();
    if let Some(twice) = names.chunk_by(|one, other| one == other).find_map(|same| same.get(1)) {
        return Err(Error::Name((*twice).to_owned()));
    }
    let mut activation = Activation::take_over()?;
    for port in &ports {
        port.fifo.as_ref().map_or(Ok(()), |fifo| fifo.place.check())?;
        affinity::check(port.affinity.as_ref().map(|list| list.0.as_slice()).unwrap_or_default())?;
    }
    allow_descriptors(&ports);

    // Sockets that are claimed here are dropped, and so removed, at the end.
    let mut sockets: Vec<Option<Claimed>> = Vec::new();
    let mut opened = Vec::new();
    let mut shown = Vec::new();
    for (index, port) in ports.iter().enumerate() {
        let queue_pairs = usize::from(port.queue_pairs);
        let (offloads, pairs) = uplink::open(&port.uplink, queue_pairs)?;
        let (source, claimed) = source(port, &mut activation)?;
        let stats = Arc::new(Stats::new(queue_pairs));
        shown.push(PortShown { name: port.name.clone(), stats: stats.clone() });
        sockets.push(claimed);
        opened.push(Port {
            index,
            options: port,
            source,
            offloads,
            pairs,
            stats,
            doorway: Doorway::new().map_err(system("make a socket in the directory for temporary files"))?,
            budget: Budget::of(ports.len()),
        });
    }
    let stats_socket = Listening::at(options.stats_socket.as_deref(), &mut activation)?;
    let metrics_socket = Listening::at(options.metrics_socket.as_deref(), &mut activation)?;
    activation.finish()?;
    let board = Arc::new(match <[PortShown; 1]>::try_from(shown) {
        Ok(one) if options.port.is_empty() => Board::One(one),
        Ok(one) => Board::Ports { ports: one.into() },
        Err(ports) => Board::Ports { ports },
    });
    let quit = Quit::new(ports.len()).map_err(system("create an eventfd"))?;
    let signals = Signals::new([SIGTERM, SIGINT]).map_err(system("catch signals"))?;

    lost_memory::survive().map_err(|error| system("catch SIGBUS")(error.into()))?;
    let files = options.landlock.then(|| files(options, &ports));
    let sandbox = Sandbox::enter(&Wanted { user: options.user.as_ref(), seccomp: options.seccomp, files })?;
    catch_signals(signals, &quit, &sandbox)?;
    // Who gets an answer there knows that everything has started.
    let show = || {
        show(&stats_socket, "stats", &board, &sandbox, Board::serve_json)?;
        show(&metrics_socket, "metrics", &board, &sandbox, Board::serve_metrics)
    };
    serve(opened, sockets, &quit, &sandbox, &board, show)
}

/// Serves `ports`, each on a thread of its own, until the last has ended; `started` is called once all run. A port that fails ends the program only when
/// it is the only one; otherwise its socket goes, and the others go on.
fn serve(
    ports: Vec<Port<'_>>,
    mut sockets: Vec<Option<Claimed>>,
    quit: &Quit,
    sandbox: &Sandbox,
    board: &Board,
    started: impl FnOnce() -> Result<(), Error>,
) -> Result<(), Error> {
    let count = ports.len();
    let (ended, ends) = mpsc::channel();
    std::thread::scope(|threads| {
        for port in ports {
            let (index, ended) = (port.index, ended.clone());
            let name = port.options.name.clone();
            let serve = move || {
                let span = if count > 1 { tracing::error_span!("port", name) } else { tracing::Span::none() };
                let _span = span.enter();
                let served = catch_unwind(AssertUnwindSafe(|| port.serve(quit, sandbox, board)));
                let result = served.unwrap_or(Err(serving::Error::Panic));
                let result = result.map_err(|source| Error::Port { name, source });
                // Nobody listening means the program is about to end.
                let _ = ended.send((index, result));
            };
            let thread = std::thread::Builder::new().name(format!("port{index}"));
            if let Err(error) = thread.spawn_scoped(threads, serve) {
                quit.ask();
                return Err(system("start a port's thread")(error));
            }
        }
        drop(ended);
        if let Err(error) = started().and_then(|()| Ok(sandbox.confine(Role::Main)?)) {
            quit.ask();
            return Err(error);
        }
        notify::ready(board);
        let mut failure = None;
        for (index, result) in ends {
            if let Some(socket) = sockets.get_mut(index) {
                *socket = None;
            }
            if let Err(error) = result {
                if count > 1 {
                    tracing::error!("{error}; other ports go on");
                }
                failure.get_or_insert(error);
            }
        }
        notify::stopping();
        failure.map_or(Ok(()), Err)
    })
}

/// Where a port's frontends come from, and the socket to remove at its end.
fn source<'a>(
    port: &'a PortOptions,
    activation: &mut Activation,
) -> Result<(Source<'a>, Option<Claimed>), Error> {
    Ok(match &port.connection {
        Connection::Connect(path) => (Source::Path(path), None),
        Connection::Inherited(fd) => match door::inherit(*fd)? {
            Inherited::Connected(frontend) => (Source::Connected(frontend), None),
            Inherited::Listening(listener) => (Source::Listener(listener), None),
        },
        Connection::Listen(path) => match activation.take(path) {
            Some(listener) => (Source::Listener(listener), None),
            None => {
                let claimed = Claimed::bind(path)?;
                let listener = claimed.listener().try_clone().map_err(system("duplicate a socket"))?;
                (Source::Listener(listener), Some(claimed))
            }
        },
    })
}

/// A socket that counters are shown on: the service manager's, or our own.
enum Listening {
    Given(UnixListener),
    Claimed(Claimed),
}

impl Listening {
    fn at(path: Option<&Path>, activation: &mut Activation) -> Result<Option<Self>, Error> {
        let Some(path) = path else { return Ok(None) };
        Ok(Some(match activation.take(path) {
            Some(listener) => Listening::Given(listener),
            None => Listening::Claimed(Claimed::bind(path)?),
        }))
    }

    fn listener(&self) -> &UnixListener {
        match self {
            Listening::Given(listener) => listener,
            Listening::Claimed(claimed) => claimed.listener(),
        }
    }
}

/// Shows counters on a thread of its own for the rest of the program's life.
fn show(
    socket: &Option<Listening>,
    name: &'static str,
    board: &Arc<Board>,
    sandbox: &Sandbox,
    serve: fn(&Board, &UnixListener),
) -> Result<(), Error> {
    let Some(socket) = socket else { return Ok(()) };
    let listener = socket.listener().try_clone().map_err(system("duplicate a socket"))?;
    let board = board.clone();
    start(name, Role::Show, sandbox, move || serve(&board, &listener))
}

/// Asks to quit at a signal, on a thread of its own.
fn catch_signals(mut signals: Signals, quit: &Quit, sandbox: &Sandbox) -> Result<(), Error> {
    let quit = quit.clone();
    start("signals", Role::Main, sandbox, move || signals.forever().for_each(|_| quit.ask()))
}

/// Starts a thread that is never waited for; one that cannot be confined does not run.
fn start(
    name: &'static str,
    role: Role,
    sandbox: &Sandbox,
    run: impl FnOnce() + Send + 'static,
) -> Result<(), Error> {
    let sandbox = sandbox.clone();
    let (confined, is_confined) = mpsc::channel();
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            let result = sandbox.confine(role);
            let is_ok = result.is_ok();
            let _ = confined.send(result);
            if is_ok {
                run();
            }
        })
        .map_err(system("start a thread"))?;
    is_confined.recv().map_err(|_| system("start a thread")(std::io::ErrorKind::BrokenPipe.into()))??;
    Ok(())
}

/// The files that are used after the start.
fn files(options: &Options, ports: &[PortOptions]) -> Files {
    let mut files = Files::default();
    let ours = [&options.stats_socket, &options.metrics_socket].into_iter().flatten();
    ours.for_each(|path| files.remove(path));
    for port in ports {
        if let Connection::Listen(path) = &port.connection {
            files.remove(path);
        }
        match port.fifo.as_ref().map(|fifo| &fifo.place) {
            Some(Place::Path(path)) => files.share(path),
            Some(Place::Inherited(fd)) => files.share_inherited(*fd),
            None => {}
        }
    }
    files
}

/// Makes room for as many descriptors as all ports can need at once, if this program may: what one cannot have would
/// be another's loss.
fn allow_descriptors(ports: &[PortOptions]) {
    // Standard streams, sockets that show counters, eventfds and the like.
    const PROGRAM: u64 = 64;
    // A port's sockets, a session's connections and copies of them, and two memory tables while one is replaced.
    const PORT: u64 = 32 + 2 * MAX_REGIONS as u64;
    // A queue of a TAP device, its io_uring, the crate's worker and the eventfds of two rings.
    const PAIR: u64 = 20;
    let pairs: u64 = ports.iter().map(|port| u64::from(port.queue_pairs)).sum();
    let needed = PROGRAM + PORT * ports.len() as u64 + PAIR * pairs;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_none_or(|current| current >= needed) {
        return;
    }
    let wanted = maximum.map_or(needed, |maximum| maximum.min(needed));
    let raised = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum });
    if raised.is_err() || wanted < needed {
        tracing::warn!(
            "{} port(s) may need {needed} descriptors and can have {wanted}: raise the limit (ulimit -n, LimitNOFILE=)",
            ports.len()
        );
    }
}
