//! The files a guest boots from, opened and checked before anything is made of them: a pipe or a device could block the
//! VMM, or never end.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Why a file is not one to boot from.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be opened.
    #[error("cannot read the {what} {path}")]
    Open {
        /// kernel or initramfs.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// It is a pipe, a device or a directory.
    #[error("the {what} {path} is not a regular file; give one that is")]
    NotRegular {
        /// kernel or initramfs.
        what: &'static str,
        /// Its path.
        path: PathBuf,
    },
}

/// A regular file, open for reading.
#[derive(Debug)]
pub struct BootFile {
    /// Its path, for messages.
    pub path: PathBuf,
    /// The file.
    pub file: File,
    /// Its bytes when it was opened.
    pub size: u64,
}

impl BootFile {
    fn open(what: &'static str, path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Open { what, path: path.into(), source };
        // A pipe would block until somebody writes to it.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(Error::NotRegular { what, path: path.into() });
        }
        Ok(Self { path: path.into(), file, size: metadata.len() })
    }
}

/// All of them.
#[derive(Debug)]
pub struct BootFiles {
    /// The bzImage.
    pub kernel: BootFile,
    /// The initial RAM file system, if any.
    pub initramfs: Option<BootFile>,
}

impl BootFiles {
    /// Opens kernel and initramfs.
    pub fn open(kernel: &Path, initramfs: Option<&Path>) -> Result<Self, Error> {
        Ok(Self {
            kernel: BootFile::open("kernel", kernel)?,
            initramfs: initramfs.map(|path| BootFile::open("initramfs", path)).transpose()?,
        })
    }
}
