//! Images: initial RAM images for the emulated host and its guests, written without any outside tool, and a distribution's
//! disk image.

pub mod debian;
mod guest;
mod host;
pub mod ivcpu_module;
mod modules;

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cpio::newc;
use tempfile::NamedTempFile;

use crate::provision::{Kernel, Provision};
use crate::workspace::Workspace;
use guest::Contents;
pub use guest::{MODULE, SERVICE};
pub use host::build_host;

/// Where the guest image for `kernel` lies.
pub fn guest_image(workspace: &Workspace, kernel: Kernel) -> PathBuf {
    workspace.cache().join(format!("guest-{}.img", kernel.name()))
}

/// Makes the guest image for `kernel`, out of what is built and provisioned now.
pub fn prepare_guest(workspace: &Workspace, provision: &Provision, kernel: Kernel) -> Result<(), Error> {
    let contents = Contents {
        kernel: &provision.kernel(kernel)?,
        tools: &provision.tools()?,
        agent: &workspace.release().join("ivcpu-lab"),
        service: &workspace.root().join("guest-driver/service/ivcpu-irq"),
        module: &ivcpu_module::build(workspace, provision, kernel)?,
        igbvf: kernel.has_igbvf(),
    };
    guest::build(&guest_image(workspace, kernel), &contents)
}

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that goes into the image, or the image itself.
    #[error("cannot {what} {path}: {source}")]
    File {
        /// "read", "write", ...
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A kernel module that is neither a file nor built in.
    #[error("kernel {release} has no module {name}")]
    NoModule {
        /// The kernel's release.
        release: String,
        /// The module's name.
        name: String,
    },
    /// A module file without the facts every module carries.
    #[error("{0} is not a kernel module: {1}")]
    NotAModule(PathBuf, String),
    /// kbuild could not make the guest module.
    #[error("building ivcpu.ko for {release} failed:\n{message}")]
    Module {
        /// The kernel's release.
        release: String,
        /// What make and the compiler said.
        message: String,
    },
    /// A tool was missing.
    #[error(transparent)]
    Provision(#[from] crate::provision::Error),
    /// The loader could not list a program's libraries.
    #[error("cannot list the libraries of {0}: {1}")]
    Libraries(PathBuf, String),
}

impl Error {
    fn file<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
        move |source| Error::File { what, path: path.into(), source }
    }
}

/// A cpio archive ("newc") under construction, held in memory.
#[derive(Default)]
struct Image {
    archive: Vec<u8>,
    folders: BTreeSet<PathBuf>,
    entries: u32,
}

impl Image {
    /// Adds the folder `path` and its parents.
    fn folder(&mut self, path: &str) -> io::Result<()> {
        let ancestors: Vec<_> = Path::new(path).ancestors().collect();
        for folder in ancestors.into_iter().rev() {
            if folder.components().count() > 0 && self.folders.insert(folder.into()) {
                self.entry(&folder.to_string_lossy(), 0o040_755, &[])?;
            }
        }
        Ok(())
    }

    /// Adds a file and the folders it lies in; a leading slash is dropped.
    fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        if let Some((folder, _)) = path.rsplit_once('/') {
            self.folder(folder)?;
        }
        self.entry(path, 0o100_000 | mode, content)
    }

    /// Adds the file `from` of this machine as `path`.
    fn copy(&mut self, from: &Path, path: &str, mode: u32) -> Result<(), Error> {
        let content = fs::read(from).map_err(Error::file("read", from))?;
        self.file(path, mode, &content).map_err(Error::file("add", from))
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        let entry = newc::Builder::new(path).ino(self.entries).nlink(1).mode(mode);
        let mut writer = entry.write(&mut self.archive, size);
        writer.write_all(content)?;
        writer.finish().map(drop)
    }

    /// Ends the archive and writes it to `path`, whole or not at all.
    fn write(mut self, path: &Path) -> Result<(), Error> {
        newc::trailer(&mut self.archive).map_err(Error::file("finish", path))?;
        let folder = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).map_err(Error::file("make", folder))?;
        // A machine that boots from the former image keeps that; two that write at once do not mix.
        let mut partial = NamedTempFile::new_in(folder).map_err(Error::file("make a file in", folder))?;
        partial.write_all(&self.archive).map_err(Error::file("write", path))?;
        partial.persist(path).map_err(|e| Error::file("write", path)(e.error))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_bring_their_folders_once() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("image");
        let mut image = Image::default();
        image.file("/a/b/one", 0o755, b"1").expect("one");
        image.file("a/b/two", 0o644, b"22").expect("two");
        image.write(&path).expect("written");

        let mut names = Vec::new();
        let mut rest = fs::File::open(&path).expect("the image");
        loop {
            let reader = newc::Reader::new(rest).expect("an entry");
            if reader.entry().is_trailer() {
                break;
            }
            names.push((
                reader.entry().name().to_string(),
                reader.entry().mode(),
                reader.entry().file_size(),
            ));
            rest = reader.finish().expect("the next entry");
        }
        let expected =
            [("a", 0o040755, 0), ("a/b", 0o040755, 0), ("a/b/one", 0o100755, 1), ("a/b/two", 0o100644, 2)];
        assert_eq!(names, expected.map(|(name, mode, size)| (name.to_string(), mode, size)));
    }
}
