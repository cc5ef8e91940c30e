//! Unix sockets that are ours from bind to removal.

use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Why a socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody listens there.
    #[error("socket {0} is in use: stop the program that listens on it or choose another path")]
    InUse(PathBuf),
    /// Something else has that name.
    #[error("{0} exists and is not a socket; it is left alone, choose another path")]
    NotSocket(PathBuf),
    /// The system refuses.
    #[error("cannot listen on socket {path}: {source}")]
    Bind {
        /// Where.
        path: PathBuf,
        /// What it says.
        #[source]
        source: io::Error,
    },
}

/// A listening socket whose file is removed with it.
#[derive(Debug)]
pub struct Claimed {
    path: PathBuf,
    file: Identity,
    listener: UnixListener,
}

/// Device and inode of a file. The inode of a socket is not used again while its listener is open.
type Identity = (u64, u64);

fn identity(path: &Path) -> io::Result<Identity> {
    path.symlink_metadata().map(|file| (file.dev(), file.ino()))
}

impl Claimed {
    /// Listens on `path`; a socket file that nobody listens on any more is replaced.
    pub fn bind(path: &Path) -> Result<Self, Error> {
        let refused = |source| Error::Bind { path: path.to_owned(), source };
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                let is_socket = path.symlink_metadata().map_err(refused)?.file_type().is_socket();
                if !is_socket {
                    return Err(Error::NotSocket(path.to_owned()));
                }
                match UnixStream::connect(path) {
                    Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                        std::fs::remove_file(path).map_err(refused)?;
                        UnixListener::bind(path).map_err(refused)?
                    }
                    _ => return Err(Error::InUse(path.to_owned())),
                }
            }
            result => result.map_err(refused)?,
        };
        let file = identity(path).map_err(refused)?;
        Ok(Claimed { path: path.to_owned(), file, listener })
    }

    /// The listening socket.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        // Somebody may have removed ours, and a successor may listen there by now.
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let live = Claimed::bind(&path).unwrap();
        assert!(matches!(Claimed::bind(&path), Err(Error::InUse(_))));
        drop(live);
        assert!(!path.exists());
    }

    #[test]
    fn a_successor_keeps_its_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = Claimed::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let second = Claimed::bind(&path).unwrap();
        drop(first);
        assert!(UnixStream::connect(&path).is_ok());
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(Claimed::bind(&path), Err(Error::NotSocket(_))));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }
}
