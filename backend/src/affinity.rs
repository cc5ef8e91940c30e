//! Pinning of poll threads.

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Why a thread cannot be pinned.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such pCPU, or this program may not use it.
    #[error(
        "cannot run on pCPU {pcpu}: it does not exist, is offline, or is not one that this program may use"
    )]
    Pcpu {
        /// Its number.
        pcpu: usize,
        /// What the kernel says.
        #[source]
        source: Errno,
    },
    /// No thread to try it on.
    #[error("cannot start a thread to try the affinity: {0}")]
    Thread(#[source] std::io::Error),
}

/// Pins the calling thread to `pcpu`.
pub fn pin(pcpu: usize) -> Result<(), Error> {
    let mut set = CpuSet::new();
    set.set(pcpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
        .map_err(|source| Error::Pcpu { pcpu, source })
}

/// Tries on a thread of its own whether every one of `pcpus` can be had.
pub fn check(pcpus: &[usize]) -> Result<(), Error> {
    std::thread::scope(|scope| {
        let trial = std::thread::Builder::new()
            .name("affinity".into())
            .spawn_scoped(scope, || pcpus.iter().try_for_each(|&pcpu| pin(pcpu)))
            .map_err(Error::Thread)?;
        trial.join().unwrap_or(Ok(()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pcpu_that_does_not_exist_is_refused() {
        assert!(check(&[]).is_ok());
        assert!(matches!(check(&[1023]), Err(Error::Pcpu { pcpu: 1023, .. })));
        assert!(matches!(check(&[8000]), Err(Error::Pcpu { pcpu: 8000, .. })));
    }
}
