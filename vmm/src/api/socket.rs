//! The socket's file: made for its owner alone, taken over from a VMM that was killed, removed at the end.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::{Mode, fchmod};

/// `--api-socket PATH` or, as Cloud Hypervisor also has it, `--api-socket path=PATH`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiSocket(pub PathBuf);

impl FromStr for ApiSocket {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("path=").unwrap_or(text) {
            "" => Err("expected the path of a socket to be made"),
            path => Ok(Self(path.into())),
        }
    }
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A VMM serves it.
    #[error("somebody serves the API socket {0} already; give this VM another one")]
    Alive(PathBuf),
    /// Something else is there.
    #[error("{0} is there and no socket; give --api-socket another path")]
    NotASocket(PathBuf),
    /// The file system or the kernel refuses.
    #[error("cannot {step} the API socket {path}")]
    System {
        /// What was being done.
        step: &'static str,
        /// The socket.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
}

/// The file, removed when this is dropped.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::info!("cannot remove the API socket {}: {error}", self.0.display());
        }
    }
}

/// Makes the socket and listens on it.
pub fn open(path: &Path) -> Result<(UnixListener, SocketFile), Error> {
    let failed = |step| move |source: io::Error| Error::System { step, path: path.into(), source };
    make_way(path)?;
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|error| failed("make")(error.into()))?;
    // On Linux the file gets the mode that the socket has when it is bound, so nobody else can connect at any moment.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|error| failed("protect")(error.into()))?;
    let address = UnixAddr::new(path).map_err(|error| failed("name")(error.into()))?;
    bind(socket.as_raw_fd(), &address).map_err(|error| failed("bind")(error.into()))?;
    let file = SocketFile(path.into());
    listen(&socket, Backlog::MAXCONN).map_err(|error| failed("listen on")(error.into()))?;
    // SAFETY: the descriptor is a listening Unix socket, and nobody else has it.
    let listener = unsafe { UnixListener::from_raw_fd(socket.into_raw_fd()) };
    Ok((listener, file))
}

/// Removes a socket that nobody serves any more.
fn make_way(path: &Path) -> Result<(), Error> {
    let failed = |step| move |source| Error::System { step, path: path.into(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at")(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(Error::NotASocket(path.into())),
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(Error::Alive(path.into())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed("replace"))
        }
        // Gone in the meantime.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("look at")(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn both_ways_to_say_it() {
        assert_eq!("/run/vm.sock".parse(), Ok(ApiSocket("/run/vm.sock".into())));
        assert_eq!("path=/run/vm.sock".parse(), Ok(ApiSocket("/run/vm.sock".into())));
        assert!("".parse::<ApiSocket>().is_err() && "path=".parse::<ApiSocket>().is_err());
    }

    #[test]
    fn the_socket_is_its_owners_alone_and_goes_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        let (listener, file) = open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(open(&path), Err(Error::Alive(_))));
        drop(listener);
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_anything_else_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(open(&path).unwrap());
        fs::write(&path, "precious").unwrap();
        assert!(matches!(open(&path), Err(Error::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let error = open(&folder.path().join("x".repeat(200))).unwrap_err().to_string();
        assert!(error.contains("cannot name the API socket"), "{error}");
    }
}
