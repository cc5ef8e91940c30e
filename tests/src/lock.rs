//! Locks between processes, and threads, that use the same files.

use std::fs::File;
use std::io;
use std::path::Path;

/// Held until it is dropped, or its process ends in whatever way.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock at `path`, a file of its own; if it has to wait, it says why (`another`: who has it).
    pub fn take(path: &Path, another: &str) -> io::Result<Self> {
        let file = File::create(path)?;
        if file.try_lock().is_err() {
            eprintln!("lab: {another}, waiting for that to end");
            file.lock()?;
        }
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn threads_take_turns() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("lock");
        let holders = AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let lock = Lock::take(&path, "another thread has it").expect("the lock");
                    assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                    thread::sleep(Duration::from_millis(5));
                    holders.fetch_sub(1, Ordering::SeqCst);
                    drop(lock);
                });
            }
        });
    }
}
