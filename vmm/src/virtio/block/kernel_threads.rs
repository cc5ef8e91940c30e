//! Where the kernel's own threads for an io_uring run: those that do what would block.

use std::{io, mem};

use io_uring::{IoUring, opcode};

/// What marks the completion that says nothing. No request has this number.
const NOTHING: u64 = u64::MAX;

/// Keeps them where the calling thread may run, which is not where vCPUs are pinned. For the thread that is going to submit.
pub(super) fn keep_to_own_pcpus(uring: &mut IoUring) -> io::Result<()> {
    let own = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0))?;
    // SAFETY: a CPU set is an array of words, for which all zero is a value.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    for pcpu in (0..nix::sched::CpuSet::count()).filter(|&pcpu| own.is_set(pcpu).unwrap_or(false)) {
        // SAFETY: the number is below the size of the set.
        unsafe { libc::CPU_SET(pcpu, &mut set) };
    }
    // The threads belong to who submits, not to the ring, and the kernel notes where they may run only once this thread has submitted
    // something: the ring was made by another one. An enter that submits nothing is not enough.
    let nothing = opcode::Nop::new().build().user_data(NOTHING);
    // SAFETY: it points at nothing.
    unsafe { uring.submission().push(&nothing) }.map_err(io::Error::other)?;
    uring.submit_and_wait(1)?;
    // Nothing else is in flight yet.
    uring.completion().for_each(drop);
    uring.submitter().register_iowq_aff(&set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_did_not_make_the_ring_may_say_where() {
        let mut uring = match IoUring::new(8) {
            Ok(uring) => uring,
            Err(error) => return eprintln!("SKIPPED: {error}"),
        };
        let thread = std::thread::spawn(move || {
            keep_to_own_pcpus(&mut uring).unwrap();
            assert!(
                uring.completion().next().is_none(),
                "no completion is left for a request to be taken for"
            );
        });
        thread.join().unwrap();
    }
}
