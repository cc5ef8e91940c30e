//! What a service manager is told, and the sockets it passes on. Without one, nothing happens here.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use sd_notify::NotifyState;

use crate::door::{self, Inherited};
use crate::show::Board;

/// Why sockets that the service manager passed on are of no use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `LISTEN_FDS` or `LISTEN_PID` is damaged.
    #[error("cannot take over the service manager's sockets: {0}")]
    Environment(#[source] io::Error),
    /// Not a listening Unix socket.
    #[error("cannot take over a socket of the service manager: {0}")]
    Socket(#[from] door::Error),
    /// Connected, or without a path.
    #[error(
        "descriptor {0} of the service manager is not a listening socket with a path; say ListenStream=/PATH"
    )]
    NotListening(RawFd),
    /// No option names it.
    #[error(
        "the service manager's socket {0} is none that an option names; name it with --socket-path or --port"
    )]
    Unused(PathBuf),
}

/// Listening sockets that the service manager passed on, each to be taken by the option that names its path.
#[derive(Debug, Default)]
pub struct Activation {
    sockets: Vec<(PathBuf, UnixListener)>,
}

impl Activation {
    /// Takes over what there is. To be called once, before other descriptors are opened.
    pub fn take_over() -> Result<Self, Error> {
        let mut sockets = Vec::new();
        for fd in sd_notify::listen_fds().map_err(Error::Environment)? {
            let Inherited::Listening(listener) = door::inherit(fd)? else {
                return Err(Error::NotListening(fd));
            };
            let address = listener.local_addr().map_err(Error::Environment)?;
            let path = address.as_pathname().ok_or(Error::NotListening(fd))?.to_owned();
            sockets.push((path, listener));
        }
        Ok(Activation { sockets })
    }

    /// Takes the socket of this path, if there is one.
    pub fn take(&mut self, path: &Path) -> Option<UnixListener> {
        let index = self.sockets.iter().position(|(known, _)| known == path)?;
        Some(self.sockets.swap_remove(index).1)
    }

    /// Whether all were taken.
    pub fn finish(self) -> Result<(), Error> {
        match self.sockets.into_iter().next() {
            Some((path, _)) => Err(Error::Unused(path)),
            None => Ok(()),
        }
    }
}

/// The program serves.
pub fn ready(board: &Board) {
    tell(&[NotifyState::Ready, NotifyState::Status(&words(board))]);
}

/// A frontend came or left.
pub fn status(board: &Board) {
    tell(&[NotifyState::Status(&words(board))]);
}

/// The program ends.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

fn words(board: &Board) -> String {
    let (ports, frontends) = board.frontends();
    format!("{ports} port(s), {frontends} with a frontend")
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!("cannot tell the service manager: {error}");
    }
}
