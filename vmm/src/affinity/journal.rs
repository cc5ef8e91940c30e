//! Which interrupts a running VMM has moved, and what they were before: one file a guard, `/run/ivcpu/irqs-PID-N`.
//!
//! ```text
//! pcpu 3
//! irq 24 0-3 0
//! irq 25 1 1
//! ```
//!
//! An interrupt's line has the pCPUs it was allowed on and the one it went to.
//! A line is appended before the interrupt is moved, so that a kill at any moment leaves a complete record. The owner holds
//! a lock on its file as long as it lives; the kernel drops the lock with the process, however that ends. So "locked"
//! means alive, with no guessing from process ids that may have been used again or belong to another namespace.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::{Affinity, Error};

/// All journals, under the lock that keeps two VMMs from moving interrupts at the same time.
pub(super) struct Journals {
    directory: PathBuf,
    _lock: File,
}

/// The journal of one guard.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    /// Open and locked as long as the owner lives.
    file: File,
    record: Record,
}

/// What the other, living VMMs have moved.
pub(super) struct Held(Vec<Record>);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Record {
    pcpu: usize,
    former: BTreeMap<u32, Affinity>,
}

const PREFIX: &str = "irqs-";

impl Journals {
    pub(super) fn lock(directory: &Path) -> Result<Journals, Error> {
        fs::create_dir_all(directory).map_err(failed(directory))?;
        let path = directory.join("lock");
        let lock = OpenOptions::new().create(true).append(true).open(&path).map_err(failed(&path))?;
        lock.lock().map_err(failed(&path))?;
        Ok(Journals { directory: directory.to_owned(), _lock: lock })
    }

    /// Starts a journal for interrupts that go to `pcpu`.
    pub(super) fn create(&self, pcpu: usize) -> Result<Journal, Error> {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let path = self.directory.join(format!("{PREFIX}{}-{serial}", std::process::id()));
        let mut file =
            OpenOptions::new().create_new(true).read(true).append(true).open(&path).map_err(failed(&path))?;
        file.lock().map_err(failed(&path))?;
        writeln!(file, "pcpu {pcpu}").map_err(failed(&path))?;
        Ok(Journal { path, file, record: Record { pcpu, former: BTreeMap::new() } })
    }

    /// What living VMMs other than the owner of `own` have moved.
    pub(super) fn others(&self, own: Option<&Journal>) -> Result<Held, Error> {
        let mut held = Vec::new();
        for path in self.paths()? {
            if own.is_some_and(|own| own.path == path) {
                continue;
            }
            if let Some((file, record)) = open(&path)?
                && !unlocked(&file)
            {
                held.push(record);
            }
        }
        Ok(Held(held))
    }

    /// The journals whose owners are dead; until they are dropped they are locked as if by living ones.
    pub(super) fn abandoned(&self) -> Result<Vec<Journal>, Error> {
        let mut abandoned = Vec::new();
        for path in self.paths()? {
            if let Some((file, record)) = open(&path)?
                && unlocked(&file)
            {
                abandoned.push(Journal { path, file, record });
            }
        }
        Ok(abandoned)
    }

    fn paths(&self) -> Result<Vec<PathBuf>, Error> {
        let entries = fs::read_dir(&self.directory).map_err(failed(&self.directory))?;
        let is_journal = |name: &std::ffi::OsStr| name.to_str().is_some_and(|name| name.starts_with(PREFIX));
        Ok(entries
            .flatten()
            .filter(|entry| is_journal(&entry.file_name()))
            .map(|entry| entry.path())
            .collect())
    }
}

impl Journal {
    /// Writes down the former affinity of an interrupt that is about to be moved.
    pub(super) fn note(&mut self, irq: u32, former: &Affinity) -> Result<(), Error> {
        // One write, so that a kill leaves the whole line or nothing of it.
        let line = format!("irq {irq} {} {}\n", former.allowed, former.effective);
        self.file.write_all(line.as_bytes()).map_err(failed(&self.path))?;
        self.record.former.insert(irq, former.clone());
        Ok(())
    }

    pub(super) fn pcpu(&self) -> usize {
        self.record.pcpu
    }

    pub(super) fn former(&self) -> &BTreeMap<u32, Affinity> {
        &self.record.former
    }

    pub(super) fn remove(self) -> Result<(), Error> {
        fs::remove_file(&self.path).map_err(failed(&self.path))
    }
}

impl Held {
    /// The affinity an interrupt had before any of them moved it.
    pub(super) fn former_of(&self, irq: u32) -> Option<Affinity> {
        self.0.iter().find_map(|record| record.former.get(&irq).cloned())
    }

    /// Whether one of them wants the interrupt where it is.
    pub(super) fn have_moved(&self, irq: u32, allowed: &str) -> bool {
        self.0.iter().any(|record| record.former.contains_key(&irq) && record.pcpu.to_string() == allowed)
    }

    /// A pCPU that one of them wants the interrupt on.
    pub(super) fn pcpu_of(&self, irq: u32) -> Option<usize> {
        self.0.iter().find(|record| record.former.contains_key(&irq)).map(|record| record.pcpu)
    }
}

impl Record {
    /// Reads a journal. What does not parse is left out: there is nothing to restore from it.
    fn parse(text: &str) -> Record {
        let mut record = Record::default();
        for line in text.lines() {
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["pcpu", pcpu] => record.pcpu = pcpu.parse().unwrap_or(usize::MAX),
                ["irq", irq, allowed, effective] => {
                    if let Ok(irq) = irq.parse() {
                        let former =
                            Affinity { allowed: allowed.to_owned(), effective: effective.to_owned() };
                        record.former.insert(irq, former);
                    }
                }
                _ => {}
            }
        }
        record
    }
}

/// A journal's file and contents; `None` if its owner has just removed it.
fn open(path: &Path) -> Result<Option<(File, Record)>, Error> {
    match File::open(path).and_then(|file| Ok((io::read_to_string(&file)?, file))) {
        Ok((text, file)) => Ok(Some((file, Record::parse(&text)))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(path)(error)),
    }
}

/// Whether the owner is gone. Takes the lock if so.
fn unlocked(file: &File) -> bool {
    !matches!(file.try_lock(), Err(TryLockError::WouldBlock))
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Journal { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread() -> Affinity {
        Affinity { allowed: "0-3".into(), effective: "1".into() }
    }

    #[test]
    fn a_journal_is_held_by_its_owner_and_abandoned_without() {
        let directory = tempfile::tempdir().unwrap();
        let journals = Journals::lock(directory.path()).unwrap();
        let mut journal = journals.create(3).unwrap();
        journal.note(24, &spread()).unwrap();
        assert!(journals.abandoned().unwrap().is_empty());
        assert_eq!(journals.others(None).unwrap().pcpu_of(24), Some(3));
        assert_eq!(journals.others(Some(&journal)).unwrap().pcpu_of(24), None);

        drop(journal); // As a kill does: the lock goes, the file stays.
        assert_eq!(journals.others(None).unwrap().pcpu_of(24), None);
        let [dead] = &journals.abandoned().unwrap()[..] else { panic!("one abandoned journal") };
        assert_eq!((dead.pcpu(), dead.former()), (3, &BTreeMap::from([(24, spread())])));
    }

    #[test]
    fn a_damaged_journal_restores_what_it_still_says() {
        let record = Record::parse("pcpu 3\nirq 24 0-3 1\nirq x 1 1\nnonsense\nirq 25 0");
        assert_eq!(record, Record { pcpu: 3, former: BTreeMap::from([(24, spread())]) });
    }
}
