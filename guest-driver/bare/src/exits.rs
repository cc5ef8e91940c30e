//! KVM's own counts of a vCPU's exits, from its binary statistics.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_bindings::KVMIO;
use kvm_ioctls::VcpuFd;

nix::ioctl_none!(kvm_get_stats_fd, KVMIO, 0xce);

/// How often a vCPU has left guest mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// Whatever for, and however far.
    pub all: u64,
    /// Of these, for an interrupt of the host: its timer, another thread's turn, or an interrupt for the guest.
    pub interrupted: u64,
}

impl Count {
    /// What came after an earlier count.
    pub fn since(self, earlier: Self) -> Self {
        Self { all: self.all - earlier.all, interrupted: self.interrupted - earlier.interrupted }
    }
}

/// The counters of one vCPU.
#[derive(Debug)]
pub struct Exits {
    file: File,
    all_at: u64,
    interrupted_at: u64,
}

impl Exits {
    /// Finds the counters among all that KVM keeps of the vCPU.
    pub fn of(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the request takes no argument; `vcpu` keeps its descriptor open.
        let fd = unsafe { kvm_get_stats_fd(vcpu.as_raw_fd()) }?;
        // SAFETY: the kernel made this descriptor for this call.
        let file = unsafe { File::from_raw_fd(fd) };
        let [all_at, interrupted_at] = [find(&file, "exits")?, find(&file, "irq_exits")?];
        Ok(Self { file, all_at, interrupted_at })
    }

    /// Exits up to now.
    pub fn count(&self) -> io::Result<Count> {
        let value = |at| {
            let mut value = [0; 8];
            self.file.read_exact_at(&mut value, at).map(|()| u64::from_ne_bytes(value))
        };
        Ok(Count { all: value(self.all_at)?, interrupted: value(self.interrupted_at)? })
    }
}

/// Bytes of a `struct kvm_stats_desc` without the name that follows it.
const DESCRIPTOR_SIZE: u64 = 16;

/// Where in the file the counter of this name is.
fn find(file: &File, name: &str) -> io::Result<u64> {
    // struct kvm_stats_header.
    let [_, name_size, counters, _, descriptors_at, data_at] = words(file, 0)?;
    let size = DESCRIPTOR_SIZE + u64::from(name_size);
    let mut found = vec![0; name.len() + 1];
    for at in (0..u64::from(counters)).map(|index| u64::from(descriptors_at) + index * size) {
        file.read_exact_at(&mut found, at + DESCRIPTOR_SIZE)?;
        if found.strip_suffix(&[0]) == Some(name.as_bytes()) {
            let [_, _, offset, _] = words(file, at)?;
            return Ok(u64::from(data_at) + u64::from(offset));
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("KVM has no counter {name}")))
}

fn words<const N: usize>(file: &File, at: u64) -> io::Result<[u32; N]> {
    let mut words = [0; N];
    for (index, word) in (0..).zip(&mut words) {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, at + 4 * index)?;
        *word = u32::from_ne_bytes(bytes);
    }
    Ok(words)
}
