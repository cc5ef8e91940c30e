//! Many writes to a TAP device in one system call, by io_uring.
//!
//! It pays from a handful of frames on and costs below that (`benches/tap_io.rs`, numbers in the crate's README), so
//! small bursts go by `writev`. Reads stay `readv`: how many frames wait is not known, and an io_uring read too many
//! does not fail but waits for the next frame, holding on to guest buffers that a message may take away any time.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::{IoUring, opcode, types};

use crate::memory::Chains;

/// Frames from which a batch is cheaper than a system call each.
pub const WORTHWHILE: usize = 8;

/// Frames in one submission.
const ENTRIES: u32 = 64;

/// Times in a row that the kernel may be out of resources before the ring is given up.
const PATIENCE: usize = 1000;

/// An io_uring instance for writes to one file, as long as there is one: where io_uring is not to be had, or fails,
/// nothing is written.
///
/// The file is named by its descriptor and not registered: a registered one is let go only some time after the
/// process ended, and a TAP device that should be gone by then would still be there when its successor opens it.
pub struct Batch {
    ring: Option<IoUring>,
    file: RawFd,
    /// What became of each frame of the last submission.
    results: Vec<Option<i32>>,
}

impl Batch {
    /// Sets up batches of writes to `file`, which must stay open as long as they are made.
    pub fn new(file: BorrowedFd<'_>) -> Self {
        let ring = IoUring::new(ENTRIES)
            .inspect_err(|error| tracing::info!("no io_uring ({error}): frames are written one by one"))
            .ok();
        Batch { ring, file: file.as_raw_fd(), results: Vec::new() }
    }

    /// Writes every well-formed frame in `chains`, at most 64 of them, and waits for all. Tells for each chain, in
    /// order, what the kernel said (negative: refused). Chains that are missing or `None` have not been written.
    pub fn write(&mut self, chains: &Chains) -> &[Option<i32>] {
        let frames = chains.iter().map(|(chain, vectors)| if chain.bytes == 0 { &[] } else { vectors });
        // SAFETY: the vectors belong to `chains`, which stays borrowed; they describe mapped guest memory (see
        // `Chains`), which the kernel only reads.
        unsafe { self.write_all(frames, |ring, pending| ring.submit_and_wait(pending)) }
    }

    /// Writes `frames`, leaving out empty ones; `submit` submits what is queued and waits for as many completions.
    ///
    /// # Safety
    ///
    /// The vectors, and the memory they describe, must be readable until this returns.
    unsafe fn write_all<'a>(
        &mut self,
        frames: impl Iterator<Item = &'a [libc::iovec]>,
        mut submit: impl FnMut(&IoUring, usize) -> io::Result<usize>,
    ) -> &[Option<i32>] {
        self.results.clear();
        let Some(ring) = &mut self.ring else { return &[] };
        let mut pending = 0;
        for (index, vectors) in frames.enumerate().take(ENTRIES as usize) {
            self.results.push(None);
            if vectors.is_empty() {
                continue;
            }
            let entry = opcode::Writev::new(types::Fd(self.file), vectors.as_ptr(), vectors.len() as u32)
                .build()
                .user_data(index as u64);
            // SAFETY: the vectors stay readable until this function returns (its caller's promise), and it does not
            // before the kernel has completed every write it was given: `pending` counts them down to 0. What it was
            // not given when `submit` failed for good it never sees, because the ring is closed before the return.
            if unsafe { ring.submission().push(&entry) }.is_err() {
                break;
            }
            pending += 1;
        }
        let (mut patience, mut failure) = (PATIENCE, None);
        while pending > 0 {
            if failure.is_some() {
                // Completions arrive in the course of any system call.
                std::thread::yield_now();
            } else {
                match submit(ring, pending) {
                    Ok(_) => patience = PATIENCE,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) if is_passing(&error) && patience > 0 => {
                        patience -= 1;
                        std::thread::yield_now();
                    }
                    Err(error) => {
                        pending -= ring.submission().len();
                        failure = Some(error);
                    }
                }
            }
            for completion in ring.completion() {
                pending -= 1;
                if let Some(result) = self.results.get_mut(completion.user_data() as usize) {
                    *result = Some(completion.result());
                }
            }
        }
        if let Some(error) = failure {
            tracing::warn!("io_uring failed ({error}): from now on frames are written one by one");
            self.ring = None;
        }
        &self.results
    }
}

/// Whether the kernel is only short of something: requests (`EAGAIN`) or room for completions (`EBUSY`).
fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ResourceBusy)
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, PipeWriter, Read, Write};
    use std::os::fd::AsFd;
    use std::time::Duration;

    use super::*;

    /// A batch that writes into a pipe; `None`, said aloud, where there is no io_uring.
    fn into_pipe() -> Option<(Batch, PipeReader, PipeWriter)> {
        let (reader, writer) = io::pipe().unwrap();
        let batch = Batch::new(writer.as_fd());
        if batch.ring.is_none() {
            eprintln!("SKIPPED: no io_uring");
            return None;
        }
        Some((batch, reader, writer))
    }

    /// Writes `frames` with `submit` and tells what became of them.
    fn write(
        batch: &mut Batch,
        frames: &[&[u8]],
        submit: impl FnMut(&IoUring, usize) -> io::Result<usize>,
    ) -> Vec<Option<i32>> {
        let vectors: Vec<[libc::iovec; 1]> = frames
            .iter()
            .map(|frame| [libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() }])
            .collect();
        // SAFETY: the vectors and the frames live until the call returns; the kernel only reads them.
        unsafe { batch.write_all(vectors.iter().map(<[_; 1]>::as_slice), submit) }.to_vec()
    }

    fn error(number: i32) -> io::Error {
        io::Error::from_raw_os_error(number)
    }

    #[test]
    fn what_passes_is_tried_again() {
        let Some((mut batch, mut reader, writer)) = into_pipe() else { return };
        let mut troubles = vec![libc::EINTR, libc::EAGAIN, libc::EBUSY];
        let results = write(&mut batch, &[b"one", b"three"], |ring, pending| match troubles.pop() {
            Some(number) => Err(error(number)),
            None => ring.submit_and_wait(pending),
        });
        assert_eq!(results, [Some(3), Some(5)]);
        assert!(batch.ring.is_some());
        drop(writer);
        assert_eq!(io::read_to_string(&mut reader).unwrap(), "onethree");
    }

    #[test]
    fn what_was_submitted_before_a_failure_is_waited_for_and_the_rest_is_not_written() {
        let Some((mut batch, mut reader, mut writer)) = into_pipe() else { return };
        // A full pipe: nothing completes before it is read.
        let full = vec![0; 1 << 16];
        writer.write_all(&full).unwrap();
        let reading = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all.split_off(1 << 16)
        });
        let mut calls = 0;
        let results = write(&mut batch, &[b"one", b"three", b"never"], |ring, _| {
            calls += 1;
            // SAFETY: no argument that could be wrong is given.
            unsafe { ring.submitter().enter::<libc::sigset_t>(2, 0, 0, None) }.unwrap();
            Err(error(libc::ENOMEM))
        });
        assert_eq!((results, calls), (vec![Some(3), Some(5), None], 1));
        assert!(batch.ring.is_none(), "it would submit the third frame next time");
        assert_eq!(write(&mut batch, &[b"more"], |_, _| unreachable!()), []);
        drop(writer);
        assert_eq!(reading.join().unwrap().len(), 8);
    }

    #[test]
    fn a_kernel_that_never_recovers_does_not_hold_the_thread() {
        let Some((mut batch, _reader, _writer)) = into_pipe() else { return };
        assert_eq!(write(&mut batch, &[b"one"], |_, _| Err(error(libc::EAGAIN))), [None]);
        assert!(batch.ring.is_none());
    }
}
