//! Many writes to a TAP device in one system call, by io_uring.
//!
//! It pays from a handful of frames on and costs below that (`benches/tap_io.rs`, numbers in the crate's README), so
//! small bursts go by `writev`. Reads stay `readv`: how many frames wait is not known, and an io_uring read too many
//! does not fail but waits for the next frame, holding on to guest buffers that a message may take away any time.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, opcode, types};

use crate::memory::Chains;

/// Frames from which a batch is cheaper than a system call each.
pub const WORTHWHILE: usize = 8;

/// Frames in one submission.
const ENTRIES: u32 = 64;

/// An io_uring instance bound to one file.
pub struct Batch {
    ring: IoUring,
    /// What became of each frame of the current submission.
    results: Vec<i32>,
}

impl Batch {
    /// Sets up batches of writes to `file`.
    pub fn new(file: BorrowedFd<'_>) -> io::Result<Self> {
        let ring = IoUring::new(ENTRIES)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(Batch { ring, results: Vec::new() })
    }

    /// Writes every well-formed frame in `chains`, at most 64 of them, and waits for all. Tells for each
    /// chain, in order, what the kernel said (negative: refused, or not written at all).
    pub fn write(&mut self, chains: &Chains) -> io::Result<&[i32]> {
        self.results.clear();
        let mut pending = 0;
        for (index, (chain, vectors)) in chains.iter().enumerate() {
            self.results.push(-libc::EINVAL);
            if chain.bytes == 0 {
                continue;
            }
            let entry = opcode::Writev::new(types::Fixed(0), vectors.as_ptr(), vectors.len() as u32)
                .build()
                .user_data(index as u64);
            // SAFETY: the vectors belong to `chains`, which is borrowed until all completions have been reaped below;
            // they describe mapped guest memory (see `Chains`), which the kernel only reads.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                break;
            }
            pending += 1;
        }
        while pending > 0 {
            match self.ring.submit_and_wait(pending) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            for completion in self.ring.completion() {
                pending -= 1;
                if let Some(result) = self.results.get_mut(completion.user_data() as usize) {
                    *result = completion.result();
                }
            }
        }
        Ok(&self.results)
    }
}
