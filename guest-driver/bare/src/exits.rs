//! KVM's own count of a vCPU's exits, from its binary statistics.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_bindings::KVMIO;
use kvm_ioctls::VcpuFd;

nix::ioctl_none!(kvm_get_stats_fd, KVMIO, 0xce);

/// The exits of one vCPU: every time it leaves guest mode, whatever for and however far.
#[derive(Debug)]
pub struct Exits {
    file: File,
    at: u64,
}

impl Exits {
    /// Finds the counter among those KVM keeps of the vCPU.
    pub fn of(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the request takes no argument; `vcpu` keeps its descriptor open.
        let fd = unsafe { kvm_get_stats_fd(vcpu.as_raw_fd()) }?;
        // SAFETY: the kernel made this descriptor for this call.
        let file = unsafe { File::from_raw_fd(fd) };
        // struct kvm_stats_header, and before each name a struct kvm_stats_desc with the offset in word 2.
        let [_, name_size, counters, _, descriptors_at, data_at] = words(&file, 0)?;
        let descriptor_size = DESCRIPTOR_SIZE + u64::from(name_size);
        for counter in 0..u64::from(counters) {
            let descriptor_at = u64::from(descriptors_at) + counter * descriptor_size;
            let mut name = [0; NAME.len()];
            file.read_exact_at(&mut name, descriptor_at + DESCRIPTOR_SIZE)?;
            if name == *NAME {
                let [_, _, offset, _] = words(&file, descriptor_at)?;
                return Ok(Self { file, at: u64::from(data_at) + u64::from(offset) });
            }
        }
        Err(io::Error::new(io::ErrorKind::NotFound, "KVM does not count exits"))
    }

    /// Exits up to now.
    pub fn count(&self) -> io::Result<u64> {
        let mut count = [0; 8];
        self.file.read_exact_at(&mut count, self.at)?;
        Ok(u64::from_ne_bytes(count))
    }
}

const DESCRIPTOR_SIZE: u64 = 16;
const NAME: &[u8; 6] = b"exits\0";

fn words<const N: usize>(file: &File, at: u64) -> io::Result<[u32; N]> {
    let mut words = [0; N];
    for (index, word) in (0..).zip(&mut words) {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, at + 4 * index)?;
        *word = u32::from_ne_bytes(bytes);
    }
    Ok(words)
}
