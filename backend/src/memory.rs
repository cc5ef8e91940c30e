//! Guest buffers: descriptor chains taken off a ring, as I/O vectors into mapped guest memory.
//!
//! A chain is checked and translated once, when it is taken off the ring; from then on the data path handles I/O
//! vectors, so that a frame travels between guest and uplink without a copy. [`Chains`] owns the memory map its
//! vectors point into: replacing the map drops every chain, so no stale pointer can outlive a memory change.

use std::collections::VecDeque;
use std::sync::Arc;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::mapped::Mapped;

/// What one frame can be at most: the largest GSO frame (65,535 bytes of IP in a VLAN-tagged Ethernet frame), with
/// room to spare, and the virtio header.
pub const MAX_FRAME: usize = 65_535 + 64;

/// The kernel takes at most this many vectors in one call (`UIO_MAXIOV`).
const MAX_VECTORS: usize = 1024;

/// Which way the device may use a ring's buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The device reads: rings that carry frames from the guest.
    Read,
    /// The device writes: rings that carry frames to the guest.
    Write,
}

/// One chain that was taken off the ring and not yet given back.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    /// Index of its first descriptor: its name in the used ring.
    pub head: u16,
    /// Bytes its buffers hold; 0 marks a malformed chain, which is given back unused.
    pub bytes: usize,
    /// I/O vectors it is made of.
    vectors: usize,
}

/// Chains in the order the driver made them available.
pub struct Chains {
    memory: Arc<GuestMemoryMmap>,
    access: Access,
    held: VecDeque<Chain>,
    /// Vectors of the held chains, in order, from `first` on. Every one lies in a mapping that `memory` owns.
    vectors: Vec<libc::iovec>,
    first: usize,
    bytes: usize,
    /// Malformed chains among the held ones.
    malformed: usize,
    epoch: u64,
    /// The region the last buffer lay in: the next one nearly always lies there too.
    region: Option<Mapped>,
}

// SAFETY: the raw pointers in `vectors` point into mappings that `memory` keeps alive and that belong to the whole
// process, so they are as valid on one thread as on another.
unsafe impl Send for Chains {}

impl Chains {
    /// No chains yet, over `memory`.
    pub fn new(memory: Arc<GuestMemoryMmap>, access: Access) -> Self {
        Chains {
            memory,
            access,
            held: VecDeque::new(),
            vectors: Vec::new(),
            first: 0,
            bytes: 0,
            malformed: 0,
            epoch: 0,
            region: None,
        }
    }

    /// The memory map the chains lie in.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }

    /// Uses another memory map; drops all chains, which point into the old one.
    pub fn set_memory(&mut self, memory: Arc<GuestMemoryMmap>) {
        self.clear();
        self.region = None;
        self.memory = memory;
    }

    /// Sets which way the buffers are used.
    pub fn set_access(&mut self, access: Access) {
        self.clear();
        self.access = access;
    }

    /// Drops all chains.
    pub fn clear(&mut self) {
        self.held.clear();
        self.vectors.clear();
        self.first = 0;
        self.bytes = 0;
        self.malformed = 0;
        self.epoch += 1;
    }

    /// Changes whenever chains were dropped: what was half written into them is gone.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Number of chains held.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether no chain is held.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Bytes all held chains can take or give.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The oldest chain.
    pub fn front(&self) -> Option<&Chain> {
        self.held.front()
    }

    /// The chains, oldest first, each with its vectors.
    pub fn iter(&self) -> impl Iterator<Item = (&Chain, &[libc::iovec])> {
        let mut rest = self.vectors.get(self.first..).unwrap_or_default();
        self.held.iter().map(move |chain| {
            let (own, after) = rest.split_at(chain.vectors.min(rest.len()));
            rest = after;
            (chain, own)
        })
    }

    /// Adds the chain that starts at `head` of `table`. A malformed one (a loop, an index or address out of range, more
    /// descriptors than the table has entries, a buffer of the wrong direction, fewer bytes than `least`) is added with
    /// 0 bytes, to be given back in its turn.
    pub fn push(&mut self, table: &Mapped, head: u16, least: usize) {
        self.compact();
        let before = self.vectors.len();
        let bytes = match self.walk(table, head) {
            Some(bytes) if bytes >= least && self.vectors.len() - before < MAX_VECTORS => bytes,
            _ => {
                self.vectors.truncate(before);
                self.malformed += 1;
                0
            }
        };
        self.bytes += bytes;
        self.held.push_back(Chain { head, bytes, vectors: self.vectors.len() - before });
    }

    /// Takes out the oldest chain.
    pub fn pop(&mut self) -> Option<Chain> {
        let chain = self.held.pop_front()?;
        self.first += chain.vectors;
        self.bytes -= chain.bytes;
        self.malformed -= usize::from(chain.bytes == 0);
        Some(chain)
    }

    /// Appends a chain's vectors and tells their bytes, or `None` where it is malformed.
    fn walk(&mut self, table: &Mapped, head: u16) -> Option<usize> {
        let (mut bytes, mut index) = (0usize, usize::from(head));
        // Every step uses up one of as many as the ring has entries: that ends loops, and tables that are too long.
        let mut steps = table.length() / DESCRIPTOR;
        let mut indirect: Option<Mapped> = None;
        loop {
            steps = steps.checked_sub(1)?;
            let entry = indirect.as_ref().unwrap_or(table).read::<DESCRIPTOR>(index * DESCRIPTOR)?;
            let descriptor = parse(entry);
            if descriptor.refers_to_indirect_table() {
                let length = descriptor.len() as usize;
                if indirect.is_some() || descriptor.has_next() || !length.is_multiple_of(DESCRIPTOR) {
                    return None;
                }
                indirect = Some(Mapped::new(&self.memory, descriptor.addr(), length)?);
                index = 0;
                steps += 1;
                continue;
            }
            if descriptor.is_write_only() != (self.access == Access::Write) {
                return None;
            }
            bytes = bytes.checked_add(descriptor.len() as usize)?;
            self.translate(descriptor.addr(), descriptor.len() as usize)?;
            if !descriptor.has_next() {
                return Some(bytes);
            }
            index = usize::from(descriptor.next());
        }
    }

    /// Appends the vectors of one buffer: one, or more where it lies over the border of two regions.
    fn translate(&mut self, address: GuestAddress, length: usize) -> Option<()> {
        if let Some(vector) = self.region.as_ref().and_then(|region| region.vector(address, length)) {
            self.vectors.push(vector);
            return Some(());
        }
        for slice in GuestMemoryBackend::get_slices(&*self.memory, address, length) {
            let slice = slice.ok()?;
            self.vectors
                .push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
        }
        self.region = self
            .memory
            .find_region(address)
            .and_then(|region| Mapped::new(&self.memory, region.start_addr(), region.len() as usize));
        Some(())
    }

    /// Moves the vectors down when most of the list is behind `first`, so that it stays small.
    fn compact(&mut self) {
        if self.held.is_empty() {
            self.vectors.clear();
            self.first = 0;
        } else if self.first > MAX_VECTORS {
            self.vectors.drain(..self.first);
            self.first = 0;
        }
    }

    /// The vectors of all held chains, if they are what one read of any frame needs: enough bytes, no malformed chain
    /// in between, and not too many for the kernel.
    pub fn whole(&self) -> Option<&[libc::iovec]> {
        let vectors = self.vectors.get(self.first..).unwrap_or_default();
        (self.malformed == 0 && self.bytes >= MAX_FRAME && vectors.len() <= MAX_VECTORS).then_some(vectors)
    }

    /// Collects in `out` the vectors of the oldest chains, at most `chains` of them, until they hold [`MAX_FRAME`]
    /// bytes, a malformed chain comes, or the kernel's limit (less one, kept for the caller) is reached. Tells how
    /// many bytes they hold.
    pub fn gather(&self, chains: usize, out: &mut Vec<libc::iovec>) -> usize {
        let mut held = 0;
        for (chain, vectors) in self.iter().take(chains) {
            if held >= MAX_FRAME || chain.bytes == 0 || out.len() + vectors.len() >= MAX_VECTORS {
                break;
            }
            out.extend_from_slice(vectors);
            held += chain.bytes;
        }
        held
    }

    /// Writes `data` at byte `offset` of the held chains taken as one buffer; tells whether all of it fitted.
    pub fn write_at(&self, offset: usize, data: &[u8]) -> bool {
        let mut data = data;
        let mut skip = offset;
        for vector in self.vectors.get(self.first..).unwrap_or_default() {
            if data.is_empty() {
                break;
            }
            if skip >= vector.iov_len {
                skip -= vector.iov_len;
                continue;
            }
            let (now, later) = data.split_at(data.len().min(vector.iov_len - skip));
            copy_in(vector, skip, now);
            (data, skip) = (later, 0);
        }
        data.is_empty()
    }
}

/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;

/// A descriptor from its bytes: address, length, flags, next, all little-endian.
fn parse(entry: [u8; DESCRIPTOR]) -> Descriptor {
    let words = u128::from_le_bytes(entry);
    Descriptor::new(words as u64, (words >> 64) as u32, (words >> 96) as u16, (words >> 112) as u16)
}

/// Copies `data` to byte `offset` of a guest buffer, as far as it fits.
pub fn copy_in(vector: &libc::iovec, offset: usize, data: &[u8]) {
    let length = data.len().min(vector.iov_len.saturating_sub(offset));
    // SAFETY: vectors are made in `Chains::translate` only (or describe a buffer of our own), so `iov_len` bytes at
    // `iov_base` are mapped; `offset + length` is at most that. The guest may write the same bytes at any time, which
    // is why this is a raw copy: no reference to guest memory is ever made.
    unsafe { std::ptr::copy(data.as_ptr(), vector.iov_base.cast::<u8>().wrapping_add(offset), length) };
}

/// Appends the bytes of guest buffers to `out`.
pub fn copy_out(vectors: &[libc::iovec], out: &mut Vec<u8>) {
    for vector in vectors {
        let start = out.len();
        out.resize(start + vector.iov_len, 0);
        let Some(room) = out.get_mut(start..) else { return };
        // SAFETY: as in `copy_in`; `room` is ours and exactly `iov_len` long.
        unsafe { std::ptr::copy(vector.iov_base.cast::<u8>(), room.as_mut_ptr(), vector.iov_len) };
    }
}

/// Writes `data` over consecutive guest buffers; tells how many bytes fitted.
pub fn scatter(vectors: &[libc::iovec], mut data: &[u8]) -> usize {
    let mut written = 0;
    for vector in vectors {
        if data.is_empty() {
            break;
        }
        let (now, later) = data.split_at(data.len().min(vector.iov_len));
        copy_in(vector, 0, now);
        written += now.len();
        data = later;
    }
    written
}
