//! What was changed for a function: /run/ivcpu/vfio-ADDRESS, one JSON object a line, oldest first. /run does not outlive the host's
//! running, and neither do the changes.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::Error;
use super::change::Change;
use crate::pci::address::PciAddress;

/// The record of one function, held by one process at a time.
#[derive(Debug)]
pub struct Record {
    path: PathBuf,
    changes: Vec<Change>,
    /// Locked.
    _lock: File,
}

impl Record {
    /// Opens the record in `directory`, waiting for whoever has it; empty if there is none.
    pub fn open(directory: &Path, function: PciAddress) -> Result<Self, Error> {
        let path = directory.join(format!("vfio-{function}"));
        let open = || {
            fs::create_dir_all(directory)?;
            let lock = File::options().create(true).append(true).open(directory.join("vfio.lock"))?;
            lock.lock()?;
            let text = match fs::read_to_string(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
                text => text?,
            };
            let changes: Result<_, _> = text.lines().map(serde_json::from_str).collect();
            Ok((changes?, lock))
        };
        let (changes, lock) = open().map_err(|source| Error::Record { path: path.clone(), source })?;
        Ok(Self { path, changes, _lock: lock })
    }

    /// The changes, oldest first.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// Writes down a change that is about to be made.
    pub fn push(&mut self, change: Change) -> Result<(), Error> {
        self.changes.push(change);
        self.save()
    }

    /// Strikes out the last change.
    pub fn pop(&mut self) -> Result<(), Error> {
        self.changes.pop();
        self.save()
    }

    /// Replaces the file in one step, so that it is always whole.
    fn save(&self) -> Result<(), Error> {
        let save = || {
            if self.changes.is_empty() {
                return fs::remove_file(&self.path);
            }
            let directory = self.path.parent().unwrap_or(Path::new("."));
            let mut file = tempfile::NamedTempFile::new_in(directory)?;
            for change in &self.changes {
                writeln!(file, "{}", serde_json::to_string(change)?)?;
            }
            file.persist(&self.path)?;
            Ok(())
        };
        save().map_err(|source: io::Error| Error::Record { path: self.path.clone(), source })
    }
}
