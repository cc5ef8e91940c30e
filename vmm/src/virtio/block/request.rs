//! A request of the driver: a chain of descriptors is READ and checked. Nothing here is done yet.
//!
//! A chain is 16 bytes of header, then data, then one byte for the status (5.2.6 of the standard). Where one descriptor
//! ends and the next begins means nothing (2.7.4.3), so header, data and status are cut out of the bytes, not out
//! of the descriptors. All of it is the guest's choice: what is read is read once, and lengths are checked before use.

use std::collections::VecDeque;

use virtio_bindings::virtio_blk::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::image::SECTOR;
use crate::memory::GuestMemory;

/// Most pieces of data in one request: what the device offers as `seg_max`.
pub const MAX_SEGMENTS: usize = 254;
/// Most descriptors of a chain: the data's, and what header and status take. A table of the guest's may have 65535.
const MAX_DESCRIPTORS: usize = MAX_SEGMENTS + 3;
/// Most bytes of data in one request.
pub const MAX_BYTES: u64 = 64 << 20;
/// Most sectors in one discard or write-zeroes request.
pub const MAX_DISCARD: u32 = 1 << 22;

const HEADER: usize = 16;
/// Bytes of `struct virtio_blk_discard_write_zeroes`.
const RANGE: usize = 16;

/// What a disk allows.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Its sectors.
    pub sectors: u64,
    /// Whether it is only read.
    pub readonly: bool,
    /// Whether it gives space back.
    pub discards: bool,
}

/// Guest memory that data goes to or comes from.
#[derive(Debug)]
pub struct Buffers {
    /// In this process. Each piece was inside guest memory, which stays mapped.
    pub pieces: Vec<libc::iovec>,
    /// Bytes of all pieces.
    pub bytes: u64,
}

/// What is to be done. Offsets and lengths are bytes, whole sectors and inside the disk.
#[derive(Debug)]
pub enum Operation {
    /// From the disk to the buffers.
    Read {
        /// Where in the image.
        offset: u64,
        /// Where to.
        buffers: Buffers,
    },
    /// From the buffers to the disk.
    Write {
        /// Where in the image.
        offset: u64,
        /// Where from.
        buffers: Buffers,
    },
    /// What was written before must last.
    Flush,
    /// The content is of no use any more.
    Discard {
        /// Where in the image.
        offset: u64,
        /// How much.
        bytes: u64,
    },
    /// The content is to be zero.
    WriteZeroes {
        /// Where in the image.
        offset: u64,
        /// How much.
        bytes: u64,
        /// Whether space may be given back.
        unmap: bool,
    },
    /// The serial number is wanted here.
    Identify(Buffers),
}

/// A request.
#[derive(Debug)]
pub struct Request {
    /// The operation, or the status it is refused with.
    pub operation: Result<Operation, u8>,
    /// Where the status goes.
    pub status: GuestAddress,
}

impl Request {
    /// Reads the descriptors of a chain, each as address, length and whether the device writes there. `None` if there is no
    /// room for a status, or no end of it.
    pub fn parse(
        descriptors: impl Iterator<Item = (u64, u32, bool)>,
        memory: &GuestMemory,
        limits: Limits,
    ) -> Option<Self> {
        let (mut from_driver, mut to_driver) = (Areas::default(), Areas::default());
        let mut ordered = true;
        for (index, (address, length, device_writes)) in descriptors.enumerate() {
            if index == MAX_DESCRIPTORS {
                return None;
            }
            if device_writes {
                to_driver.push(address, length);
            } else {
                ordered &= to_driver.0.is_empty();
                from_driver.push(address, length);
            }
        }
        let status = to_driver.take_last_byte()?;
        let operation = if ordered {
            read_operation(from_driver, to_driver, memory, limits)
        } else {
            Err(VIRTIO_BLK_S_IOERR as u8)
        };
        Some(Self { operation, status })
    }
}

fn read_operation(
    mut from_driver: Areas,
    to_driver: Areas,
    memory: &GuestMemory,
    limits: Limits,
) -> Result<Operation, u8> {
    let header: [u8; HEADER] = from_driver.take_front(memory)?;
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
    let (kind, sector) = (u32::from_le_bytes([k0, k1, k2, k3]), u64::from_le_bytes(sector));
    let writes = matches!(kind, VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES);
    if writes && limits.readonly {
        return Err(VIRTIO_BLK_S_IOERR as u8);
    }
    match kind {
        VIRTIO_BLK_T_IN => {
            let buffers = to_driver.map(memory)?;
            Ok(Operation::Read { offset: limits.place(sector, buffers.bytes)?, buffers })
        }
        VIRTIO_BLK_T_OUT => {
            let buffers = from_driver.map(memory)?;
            Ok(Operation::Write { offset: limits.place(sector, buffers.bytes)?, buffers })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Operation::Identify(to_driver.map(memory)?)),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if limits.discards => {
            let range: [u8; RANGE] = from_driver.take_front(memory)?;
            if !from_driver.is_empty() {
                // More than one range, which is more than the device offers.
                return Err(VIRTIO_BLK_S_UNSUPP as u8);
            }
            let [s0, s1, s2, s3, s4, s5, s6, s7, c0, c1, c2, c3, flags @ ..] = range;
            let (sector, count, flags) = (
                u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
                u32::from_le_bytes([c0, c1, c2, c3]),
                u32::from_le_bytes(flags),
            );
            read_range(kind, sector, count, flags, limits)
        }
        _ => Err(VIRTIO_BLK_S_UNSUPP as u8),
    }
}

fn read_range(kind: u32, sector: u64, count: u32, flags: u32, limits: Limits) -> Result<Operation, u8> {
    let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    let discard = kind == VIRTIO_BLK_T_DISCARD;
    // The standard wants unknown flags refused, and the known one as well with a discard.
    if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (discard && unmap) {
        return Err(VIRTIO_BLK_S_UNSUPP as u8);
    }
    if count > MAX_DISCARD {
        return Err(VIRTIO_BLK_S_IOERR as u8);
    }
    let bytes = u64::from(count) * SECTOR;
    let offset = limits.place(sector, bytes)?;
    Ok(if discard {
        Operation::Discard { offset, bytes }
    } else {
        Operation::WriteZeroes { offset, bytes, unmap }
    })
}

impl Limits {
    /// The byte offset of a sector from which on `bytes` are inside the disk.
    fn place(&self, sector: u64, bytes: u64) -> Result<u64, u8> {
        let end = sector.checked_add(bytes / SECTOR).filter(|end| *end <= self.sectors);
        match end {
            Some(_) if bytes != 0 && bytes.is_multiple_of(SECTOR) => Ok(sector * SECTOR),
            _ => Err(VIRTIO_BLK_S_IOERR as u8),
        }
    }
}

/// Pieces of guest memory, as the descriptors have them.
#[derive(Debug, Default)]
struct Areas(VecDeque<(u64, u32)>);

impl Areas {
    fn push(&mut self, address: u64, length: u32) {
        if length != 0 {
            self.0.push_back((address, length));
        }
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Reads the first bytes and takes them away.
    fn take_front<const LENGTH: usize>(&mut self, memory: &GuestMemory) -> Result<[u8; LENGTH], u8> {
        const FAILED: u8 = VIRTIO_BLK_S_IOERR as u8;
        let mut bytes = [0; LENGTH];
        let mut rest = &mut bytes[..];
        while !rest.is_empty() {
            let (address, length) = self.0.pop_front().ok_or(FAILED)?;
            let (now, later) = rest.split_at_mut(rest.len().min(length as usize));
            memory.read_slice(now, GuestAddress(address)).map_err(|_| FAILED)?;
            let left = length - now.len() as u32;
            if left != 0 {
                // The bytes before were in guest memory, so the address after them does not overflow.
                self.0.push_front((address + now.len() as u64, left));
            }
            rest = later;
        }
        Ok(bytes)
    }

    /// Takes the last byte away; its address.
    fn take_last_byte(&mut self) -> Option<GuestAddress> {
        let (address, length) = self.0.back_mut()?;
        *length -= 1;
        let last = address.checked_add(u64::from(*length));
        if *length == 0 {
            self.0.pop_back();
        }
        last.map(GuestAddress)
    }

    /// Finds them in this process.
    fn map(self, memory: &GuestMemory) -> Result<Buffers, u8> {
        const FAILED: u8 = VIRTIO_BLK_S_IOERR as u8;
        let bytes = self.0.iter().map(|(_, length)| u64::from(*length)).sum();
        if self.0.len() > MAX_SEGMENTS || bytes > MAX_BYTES {
            return Err(FAILED);
        }
        let mut pieces = Vec::with_capacity(self.0.len());
        for (address, length) in self.0 {
            for slice in memory.get_slices(GuestAddress(address), length as usize) {
                let slice = slice.map_err(|_| FAILED)?;
                let iov_base = slice.ptr_guard_mut().as_ptr().cast();
                pieces.push(libc::iovec { iov_base, iov_len: slice.len() });
            }
        }
        Ok(Buffers { pieces, bytes })
    }
}

#[cfg(test)]
#[path = "request_test.rs"]
mod tests;
