//! One frontend's time with us: workers, poll threads, and their end.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use vhost::vhost_user::Error as MessageError;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::affinity;
use crate::device::{Device, Model, Mtu, QueuePair, birth_fd};
use crate::door::{Budget, Doorway, Passage, Relay};
use crate::fifo::{self, Fifo};
use crate::memory::Access;
use crate::port::PortOptions;
use crate::sandbox::{Role, Sandbox};
use crate::stats::{FifoInUse, Stats};
use crate::uplink::{Offloads, Pair};
use crate::worker::Worker;

/// Why a session could not be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The vhost-user-backend crate could not start.
    #[error("cannot start a vhost-user session: {0}")]
    Start(vhost_user_backend::Error),
    /// The crate's workers did not hand over their rings.
    #[error("cannot start a vhost-user session: its workers do not answer")]
    Workers,
    /// The system refuses something.
    #[error("cannot start a vhost-user session: {0}")]
    System(#[from] std::io::Error),
    /// A poll thread died.
    #[error(
        "a poll thread ended by a panic, so its port ends: this is a bug, please report what was said before"
    )]
    PollThread,
}

/// What the sessions of a port share: the uplink, the counters, and how its threads are confined.
pub struct Session<'a> {
    /// The port.
    pub options: &'a PortOptions,
    /// The way to the crate.
    pub doorway: &'a Doorway,
    /// How much memory a frontend can bring.
    pub budget: Budget,
    /// How threads are confined.
    pub sandbox: &'a Sandbox,
    /// The device-wide side of the uplink.
    pub offloads: Offloads,
    /// The uplink's end of each queue pair, while no session uses them.
    pub pairs: Vec<Pair>,
    /// Counters.
    pub stats: Arc<Stats>,
}

impl Session<'_> {
    /// Serves a frontend until it leaves or its connection is shut down.
    pub fn run(&mut self, frontend: UnixStream) -> Result<(), Error> {
        let (born, births) = mpsc::channel();
        let mtu = Arc::new(Mtu::new(self.options.mtu));
        let model = Model {
            queue_pairs: self.pairs.len(),
            mac: self.options.mac,
            mtu: mtu.clone(),
            control_queue: self.options.control_queue,
            offloads: self.offloads.clone(),
            sandbox: self.sandbox.clone(),
        };
        let device = Device::new(model, born).map_err(std::io::Error::from)?;
        let device = Arc::new(device);
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let mut daemon =
            VhostUserDaemon::new("vhost-user".into(), device.clone(), memory).map_err(Error::Start)?;
        for (worker, birth) in daemon.get_epoll_handlers().iter().zip(device.births()) {
            register(worker, birth, device.birth_event())?;
        }
        let rings = (0..self.pairs.len())
            .map(|_| births.recv_timeout(Duration::from_secs(5)))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| Error::Workers)?;

        let connection = Arc::new(frontend.try_clone()?);
        let passage = Passage { doorway: self.doorway, budget: self.budget, mtu, sandbox: self.sandbox };
        let (mut listener, relay) = Relay::start(frontend, passage)?;
        let poll_threads = self.start(rings, &connection)?;
        if let Err(error) = daemon.start(&mut listener) {
            drop(relay);
            poll_threads.stop(&mut self.pairs)?;
            return Err(Error::Start(error));
        }
        self.stats.sessions.add(1);
        tracing::info!("a frontend connected");
        // Whatever ends a session, the next frontend gets its chance.
        match daemon.wait() {
            Ok(()) | Err(vhost_user_backend::Error::HandleRequest(MessageError::Disconnected)) => {
                tracing::info!("the frontend left");
            }
            Err(error) => tracing::warn!("the session ended: {error}"),
        }
        drop(relay);
        let result = poll_threads.stop(&mut self.pairs);
        self.stats.set_fifo(None);
        result
    }

    /// Whether another session can follow one that failed: nothing of the uplink was lost with it.
    pub fn is_whole(&self) -> bool {
        self.pairs.len() == usize::from(self.options.queue_pairs)
    }

    /// Claims a ring of the FIFO region for each poll thread. Whatever is wrong with it, the session goes on: without
    /// a ring a thread's completions are calls.
    fn claim_fifos(&self) -> Vec<Fifo> {
        let Some(options) = &self.options.fifo else { return Vec::new() };
        let wanted = self.pairs.len();
        match fifo::claim(options, wanted) {
            Ok(fifos) => {
                let (path, rings) = (options.place.path(), fifos.len());
                if rings < wanted {
                    tracing::warn!(
                        "FIFO region {} has {rings} free rings for {wanted} poll threads; the others call, create it \
                         with more rings or stop backends that hold them",
                        path.display()
                    );
                }
                self.stats.set_fifo((rings > 0).then_some(FifoInUse { path, rings }));
                fifos
            }
            Err(error) => {
                tracing::warn!("{error}; completions are calls in this session");
                Vec::new()
            }
        }
    }

    /// Starts a poll thread a queue pair; one that panics ends `connection`.
    fn start(&mut self, rings: Vec<QueuePair>, connection: &Arc<UnixStream>) -> Result<PollThreads, Error> {
        let mut threads =
            PollThreads { stop: Arc::new(AtomicBool::new(false)), rings: rings.clone(), handles: Vec::new() };
        let pcpus = self.options.affinity.as_ref().map(|list| list.0.clone()).unwrap_or_default();
        let mut fifos = self.claim_fifos().into_iter();
        let mut rings = rings;
        rings.sort_by_key(|pair| pair.index);
        rings.iter().for_each(|pair| self.name_rings(pair));
        for (rings, pair) in rings.into_iter().zip(self.pairs.drain(..)) {
            let index = rings.index;
            let (Some(to_guest), Some(from_guest)) =
                (self.stats.ring(2 * index), self.stats.ring(2 * index + 1))
            else {
                continue;
            };
            let worker = Worker {
                rings,
                pair,
                fifo: fifos.next(),
                poll: self.options.poll_us,
                stats: [to_guest.clone(), from_guest.clone()],
                stop: threads.stop.clone(),
                hang_up: Box::new({
                    let connection = connection.clone();
                    move || drop(connection.shutdown(Shutdown::Both))
                }),
            };
            let pcpu = (!pcpus.is_empty()).then(|| pcpus.get(index % pcpus.len()).copied()).flatten();
            let hang_up = HangUp(connection.clone());
            let (sandbox, span) = (self.sandbox.clone(), tracing::Span::current());
            let handle = std::thread::Builder::new().name(format!("poll{index}")).spawn(move || {
                let _hang_up = hang_up;
                let _span = span.enter();
                if let Some(pcpu) = pcpu
                    && let Err(error) = affinity::pin(pcpu)
                {
                    tracing::warn!("{error}");
                }
                sandbox.tighten(Role::Poll);
                worker.run()
            })?;
            threads.handles.push(handle);
        }
        Ok(threads)
    }

    /// Tells the rings what they are called, which way their buffers are used, and where their stops are counted.
    fn name_rings(&self, pair: &QueuePair) {
        for (vring, index, way, access) in [
            (&pair.to_guest, 2 * pair.index, "to guest", Access::Write),
            (&pair.from_guest, 2 * pair.index + 1, "from guest", Access::Read),
        ] {
            let name = format!("ring {index} ({way})");
            let stopped = self.stats.ring(index).map(|stats| stats.stopped.clone()).unwrap_or_default();
            vring.control(|ring| ring.set_role(name, access, stopped));
        }
    }
}

/// Makes a worker hand over its rings.
fn register<T: vhost_user_backend::VhostUserBackend>(
    worker: &vhost_user_backend::VringEpollHandler<T>,
    birth: &EventFd,
    event: u64,
) -> std::io::Result<()> {
    worker.register_listener(birth_fd(birth), EventSet::IN, event)
}

/// Ends a frontend's connection, and with it the session, when the thread that holds it panics: a ring that nobody
/// serves any more would hang silently. [`PollThreads::stop`] finds the panic then, and the program ends.
struct HangUp(Arc<UnixStream>);

impl Drop for HangUp {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.0.shutdown(Shutdown::Both);
        }
    }
}

/// A session's poll threads.
struct PollThreads {
    stop: Arc<AtomicBool>,
    rings: Vec<QueuePair>,
    handles: Vec<JoinHandle<Pair>>,
}

impl PollThreads {
    /// Ends them and puts the uplink's ends back into `pairs`.
    fn stop(self, pairs: &mut Vec<Pair>) -> Result<(), Error> {
        self.stop.store(true, Ordering::Relaxed);
        for pair in &self.rings {
            pair.to_guest.wake();
            pair.from_guest.wake();
        }
        for handle in self.handles {
            pairs.push(handle.join().map_err(|_| Error::PollThread)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read};

    use super::*;

    #[test]
    fn a_thread_that_panics_ends_the_connection_and_one_that_returns_does_not() {
        let (mut frontend, ours) = UnixStream::pair().unwrap();
        let ours = Arc::new(ours);
        let run = |panics: bool| {
            let hang_up = HangUp(ours.clone());
            std::thread::spawn(move || {
                let _hang_up = hang_up;
                assert!(!panics, "on purpose");
            })
            .join()
        };
        frontend.set_nonblocking(true).unwrap();
        assert!(run(false).is_ok());
        assert_eq!(frontend.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        assert!(run(true).is_err());
        assert_eq!(frontend.read(&mut [0]).unwrap(), 0);
    }
}
