//! A request in flight: what the kernel has been asked to do, and what is left of it.

use std::fs::File;
use std::os::fd::AsRawFd;

use io_uring::{opcode, squeue, types};
use vm_memory::GuestAddress;

use super::image::Image;
use super::request::{Buffers, Operation};

/// What direct I/O is aligned to, in the file and in memory: the largest block any disk has. Other requests take the page
/// cache, which the kernel keeps coherent.
const DIRECT_ALIGNMENT: u64 = 4096;

/// A request the kernel has.
pub(super) struct Flight {
    /// Which ring it came from.
    pub(super) ring: usize,
    /// Its chain.
    pub(super) head: u16,
    /// Where its status goes.
    pub(super) status: GuestAddress,
    /// What is being done.
    pub(super) work: Work,
    /// Bytes of data in memory.
    pub(super) bytes: u64,
}

/// What the kernel does for a request.
pub(super) enum Work {
    /// From the image to guest memory.
    Read(Transfer),
    /// From guest memory to the image.
    Write(Transfer),
    /// What was written before is made to last.
    Flush,
    /// Space is given back, or made zero.
    Allocate {
        /// Where.
        offset: u64,
        /// How much.
        bytes: u64,
        /// How, as fallocate(2) has it.
        mode: i32,
    },
}

impl Work {
    /// What an operation takes, and the bytes of its data; the buffers if it needs no I/O.
    pub(super) fn of(operation: Operation) -> Result<(Self, u64), Buffers> {
        let allocate =
            |offset, bytes, mode| Self::Allocate { offset, bytes, mode: mode | libc::FALLOC_FL_KEEP_SIZE };
        Ok(match operation {
            Operation::Identify(buffers) => return Err(buffers),
            Operation::Read { offset, buffers } => {
                let bytes = buffers.bytes;
                (Self::Read(Transfer::new(offset, buffers)), bytes)
            }
            Operation::Write { offset, buffers } => {
                let bytes = buffers.bytes;
                (Self::Write(Transfer::new(offset, buffers)), bytes)
            }
            Operation::Flush => (Self::Flush, 0),
            // A hole reads as zeroes.
            Operation::Discard { offset, bytes } | Operation::WriteZeroes { offset, bytes, unmap: true } => {
                (allocate(offset, bytes, libc::FALLOC_FL_PUNCH_HOLE), 0)
            }
            Operation::WriteZeroes { offset, bytes, unmap: false } => {
                (allocate(offset, bytes, libc::FALLOC_FL_ZERO_RANGE), 0)
            }
        })
    }

    /// What to submit for what is left of it. It points into `self`, and names files of the image.
    pub(super) fn entry(&self, image: &Image, write_flags: i32) -> squeue::Entry {
        let file = |aligned: bool| match (&image.direct, aligned) {
            (Some(direct), true) => fd(direct),
            _ => fd(&image.file),
        };
        match self {
            Self::Read(transfer) => {
                let rest = transfer.rest();
                opcode::Readv::new(file(transfer.aligned), rest.as_ptr(), rest.len() as u32)
                    .offset(transfer.offset)
                    .build()
            }
            Self::Write(transfer) => {
                let rest = transfer.rest();
                opcode::Writev::new(file(transfer.aligned), rest.as_ptr(), rest.len() as u32)
                    .offset(transfer.offset)
                    .rw_flags(write_flags)
                    .build()
            }
            Self::Flush => opcode::Fsync::new(fd(&image.file)).flags(types::FsyncFlags::DATASYNC).build(),
            Self::Allocate { offset, bytes, mode } => {
                opcode::Fallocate::new(fd(&image.file), *bytes).offset(*offset).mode(*mode).build()
            }
        }
    }
}

fn fd(file: &File) -> types::Fd {
    types::Fd(file.as_raw_fd())
}

/// What is left of a read or write.
pub(super) struct Transfer {
    offset: u64,
    pieces: Vec<libc::iovec>,
    /// Pieces that are done.
    done: usize,
    /// Bytes that are not.
    pub(super) left: u64,
    aligned: bool,
}

impl Transfer {
    fn new(offset: u64, buffers: Buffers) -> Self {
        let Buffers { pieces, bytes } = buffers;
        let is_aligned = |value: u64| value.is_multiple_of(DIRECT_ALIGNMENT);
        let aligned = is_aligned(offset)
            && pieces
                .iter()
                .all(|piece| is_aligned(piece.iov_base as u64) && is_aligned(piece.iov_len as u64));
        Self { offset, pieces, done: 0, left: bytes, aligned }
    }

    /// Goes on behind the first `bytes`, which are fewer than are left.
    pub(super) fn advance(&mut self, bytes: u64) {
        self.offset += bytes;
        self.left -= bytes;
        let mut skip = bytes as usize;
        while let Some(piece) = self.pieces.get_mut(self.done) {
            if skip < piece.iov_len {
                piece.iov_base = piece.iov_base.wrapping_byte_add(skip);
                piece.iov_len -= skip;
                break;
            }
            skip -= piece.iov_len;
            self.done += 1;
        }
        // Where a short transfer ended is not known to be aligned.
        self.aligned = false;
    }

    fn rest(&self) -> &[libc::iovec] {
        self.pieces.get(self.done..).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_transfer_goes_on_where_it_ended() {
        let mut content = [0u8; 64];
        let base = content.as_mut_ptr();
        let piece =
            |at: usize, length| libc::iovec { iov_base: base.wrapping_add(at).cast(), iov_len: length };
        let pieces = vec![piece(0, 16), piece(16, 16), piece(32, 32)];
        let mut transfer = Transfer::new(4096, Buffers { pieces, bytes: 64 });
        let rest = |transfer: &Transfer| -> Vec<_> {
            transfer
                .rest()
                .iter()
                .map(|piece| (piece.iov_base as usize - base as usize, piece.iov_len))
                .collect()
        };
        transfer.advance(10);
        assert_eq!(rest(&transfer), [(10, 6), (16, 16), (32, 32)]);
        transfer.advance(22);
        assert_eq!(rest(&transfer), [(32, 32)]);
        assert_eq!((transfer.offset, transfer.left), (4128, 32));
    }
}
