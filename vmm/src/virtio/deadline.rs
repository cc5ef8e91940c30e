//! A deadline for a peer: while a guard lives longer than allowed, the connection is shut down and the blocked call on it
//! returns with an error. The vhost crate waits for replies without a limit, and a peer that never answers must not
//! stop a vCPU or the event loop for ever.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{io, thread};

use crate::sandbox::{self, Role};

#[derive(Debug, Default)]
struct State {
    /// When time is up, and how much there was.
    running: Option<(Instant, Duration)>,
    /// How much time there was, once it was up.
    expired: Option<Duration>,
    ended: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Watches one connection.
#[derive(Debug)]
pub struct Deadline {
    shared: Arc<Shared>,
}

/// As long as this lives, the deadline runs.
#[derive(Debug)]
pub struct Guard<'a>(&'a Deadline);

impl Deadline {
    /// Watches `stream`.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let seen = Arc::clone(&shared);
        thread::Builder::new().name("vhost-deadline".into()).spawn(move || {
            sandbox::enter_or_exit(Role::Deadline);
            watch(&seen, &stream);
        })?;
        Ok(Self { shared })
    }

    /// Starts the clock: calls on the connection may take `within` from now on.
    pub fn start(&self, within: Duration) -> Guard<'_> {
        self.change(|state| state.running = Some((Instant::now() + within, within)));
        Guard(self)
    }

    /// Whether the peer was too slow and the connection is given up for it: the time it had.
    pub fn expired(&self) -> Option<Duration> {
        lock(&self.shared.state).expired
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut lock(&self.shared.state));
        self.shared.changed.notify_one();
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.change(|state| state.running = None);
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        self.change(|state| state.ended = true);
    }
}

fn watch(shared: &Shared, stream: &UnixStream) {
    let mut state = lock(&shared.state);
    while !state.ended {
        let left = state.running.map(|(end, within)| (end.saturating_duration_since(Instant::now()), within));
        state = match left {
            None => shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            Some((Duration::ZERO, within)) => {
                // First, so that whoever meets the shut connection finds out why.
                state.expired = Some(within);
                tracing::debug!("the vhost-user backend does not answer; the connection is given up");
                let _ = stream.shutdown(Shutdown::Both);
                return;
            }
            Some((left, _)) => {
                shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
            }
        };
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_silent_peer_ends_the_call() {
        let (mut ours, _peer) = UnixStream::pair().unwrap();
        let deadline = Deadline::new(ours.try_clone().unwrap()).unwrap();
        let guard = deadline.start(Duration::from_millis(20));
        assert_eq!(ours.read(&mut [0; 8]).unwrap(), 0);
        drop(guard);
        assert_eq!(deadline.expired(), Some(Duration::from_millis(20)));
    }

    #[test]
    fn calls_in_time_leave_the_connection_alone() {
        let (mut ours, mut peer) = UnixStream::pair().unwrap();
        let deadline = Deadline::new(ours.try_clone().unwrap()).unwrap();
        for _ in 0..3 {
            drop(deadline.start(Duration::from_millis(200)));
        }
        thread::sleep(Duration::from_millis(250));
        io::Write::write_all(&mut peer, &[1]).unwrap();
        assert_eq!(ours.read(&mut [0; 8]).unwrap(), 1);
        assert_eq!(deadline.expired(), None);
    }
}
