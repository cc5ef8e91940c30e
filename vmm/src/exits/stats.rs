//! KVM's own counters: what the traced rows are checked against, and all there is where tracing is not permitted.
//!
//! Two ways lead to the same counters. *Binary statistics* (`KVM_GET_STATS_FD`) are per vCPU and need no more than the
//! right to trace the process: the descriptor is borrowed from a VMM that keeps it open (QEMU, ours), and made anew when
//! the VM is our own. *debugfs* knows the whole VM only, and takes root, but works with every VMM.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

use super::process::Process;

/// The counters that say something about exits, by KVM's names.
pub(super) const COUNTERS: [&str; 8] = [
    "exits",
    "io_exits",
    "mmio_exits",
    "halt_exits",
    "irq_exits",
    "irq_window_exits",
    "hypercalls",
    "irq_injections",
];

/// A set of KVM's counters by name.
pub type Counters = BTreeMap<String, u64>;

/// Where KVM's own counters of one VM are read.
pub(super) enum KvmStats {
    /// Per vCPU.
    Binary(BTreeMap<u32, BinaryStats>),
    /// For the whole VM: its directories (several if the process runs several VMs).
    Debugfs(Vec<PathBuf>),
    /// Neither way is open.
    Unreadable,
}

nix::ioctl_none!(kvm_get_stats_fd, 0xae, 0xce);

impl KvmStats {
    /// Opens the counters of the process's VM.
    pub(super) fn open(process: &Process, pidfd: BorrowedFd<'_>, own: bool) -> KvmStats {
        let vcpus = &process.fds.vcpus;
        let stats: Option<BTreeMap<u32, BinaryStats>> = vcpus
            .iter()
            .map(|(&vcpu, &vcpu_fd)| {
                let fd = match process.fds.vcpu_stats.get(&vcpu) {
                    Some(&stats_fd) => pidfd_getfd(pidfd, stats_fd, PidfdGetfdFlags::empty()).ok()?,
                    // KVM answers only the process that made the VM.
                    None if own => {
                        let vcpu = pidfd_getfd(pidfd, vcpu_fd, PidfdGetfdFlags::empty()).ok()?;
                        stats_of(vcpu.as_raw_fd()).ok()?
                    }
                    None => return None,
                };
                Some((vcpu, BinaryStats::new(File::from(fd)).ok()?))
            })
            .collect();
        match stats {
            Some(stats) if !stats.is_empty() => KvmStats::Binary(stats),
            _ if process.debugfs_vms.is_empty() => KvmStats::Unreadable,
            _ => KvmStats::Debugfs(process.debugfs_vms.clone()),
        }
    }

    /// KVM's count of exits of the whole VM; `None` if it cannot be read (any more).
    pub(super) fn exits(&self) -> Option<u64> {
        match self {
            KvmStats::Binary(vcpus) => vcpus.values().map(|stats| stats.read("exits").ok()).sum(),
            KvmStats::Debugfs(vms) => vms
                .iter()
                .map(|vm| fs::read_to_string(vm.join("exits")).ok()?.trim().parse::<u64>().ok())
                .sum(),
            KvmStats::Unreadable => None,
        }
    }

    /// The counters of each vCPU; empty where only debugfs is open.
    pub(super) fn per_vcpu(&self) -> BTreeMap<u32, Counters> {
        let KvmStats::Binary(vcpus) = self else { return BTreeMap::new() };
        vcpus.iter().map(|(&vcpu, stats)| (vcpu, stats.counters())).collect()
    }

    /// Whether there is anything to read.
    pub(super) fn readable(&self) -> bool {
        !matches!(self, KvmStats::Unreadable)
    }
}

/// The statistics of a vCPU of this very process.
fn stats_of(vcpu: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the request takes no argument and touches no memory of ours, whatever the descriptor is.
    let fd = unsafe { kvm_get_stats_fd(vcpu) }?;
    // SAFETY: on success the kernel returned a descriptor made for this call, which nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// KVM's counters of one vCPU of this process, which can be read as long as this lives.
pub struct VcpuStats(BinaryStats);

impl VcpuStats {
    /// Opens them.
    pub fn open(vcpu: &kvm_ioctls::VcpuFd) -> io::Result<Self> {
        Ok(Self(BinaryStats::new(File::from(stats_of(vcpu.as_raw_fd())?))?))
    }

    /// The counters that say something about exits, by KVM's names.
    pub fn counters(&self) -> Counters {
        self.0.counters()
    }
}

/// A binary statistics file with the places of the counters in it.
pub(super) struct BinaryStats {
    file: File,
    offsets: BTreeMap<String, u64>,
}

impl BinaryStats {
    fn new(file: File) -> io::Result<BinaryStats> {
        let mut header = [0; HEADER_SIZE];
        file.read_exact_at(&mut header, 0)?;
        let header = Header::parse(&header);
        if header.descriptors > 4096 || header.name_size > 4096 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a KVM statistics file"));
        }
        let mut descriptors = vec![0; header.descriptors as usize * header.descriptor_size()];
        file.read_exact_at(&mut descriptors, u64::from(header.descriptors_at))?;
        Ok(BinaryStats { offsets: offsets(&header, &descriptors), file })
    }

    fn read(&self, counter: &str) -> io::Result<u64> {
        let offset = self.offsets.get(counter).ok_or(io::ErrorKind::NotFound)?;
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, *offset)?;
        Ok(u64::from_ne_bytes(value))
    }

    fn counters(&self) -> Counters {
        COUNTERS.iter().filter_map(|&name| Some((name.to_owned(), self.read(name).ok()?))).collect()
    }
}

const HEADER_SIZE: usize = 24;
/// A descriptor without its name: flags, exponent, values, offset, bucket size.
const DESCRIPTOR_SIZE: usize = 16;

/// `struct kvm_stats_header`.
#[derive(Debug, PartialEq, Eq)]
struct Header {
    name_size: u32,
    descriptors: u32,
    descriptors_at: u32,
    data_at: u32,
}

impl Header {
    fn parse(bytes: &[u8; HEADER_SIZE]) -> Header {
        let [_flags, name_size, descriptors, _id_at, descriptors_at, data_at] =
            std::array::from_fn(|word| u32_at(bytes, 4 * word));
        Header { name_size, descriptors, descriptors_at, data_at }
    }

    fn descriptor_size(&self) -> usize {
        DESCRIPTOR_SIZE + self.name_size as usize
    }
}

/// Where in the file each of [`COUNTERS`] stands.
fn offsets(header: &Header, descriptors: &[u8]) -> BTreeMap<String, u64> {
    descriptors
        .chunks_exact(header.descriptor_size())
        .filter_map(|descriptor| {
            let name = descriptor.get(DESCRIPTOR_SIZE..)?.split(|&byte| byte == 0).next()?;
            let name = std::str::from_utf8(name).ok()?;
            let offset = u64::from(header.data_at) + u64::from(u32_at(descriptor, 8));
            COUNTERS.contains(&name).then(|| (name.to_owned(), offset))
        })
        .collect()
}

/// The word at `at`; zero beyond the end.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A statistics file as the kernel lays it out, with one counter of interest between two others.
    fn file(name_size: u32) -> File {
        let names = ["guest_mode", "exits", "halt_wait_ns"];
        let descriptors_at = 24 + 48;
        let data_at = descriptors_at + 3 * (16 + name_size);
        let mut bytes = Vec::new();
        for word in [0, name_size, 3, 24, descriptors_at, data_at] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.resize(descriptors_at as usize, b'x');
        for (index, name) in names.iter().enumerate() {
            for word in [0, 1 << 16, 8 * index as u32, 0] {
                bytes.extend(word.to_ne_bytes());
            }
            bytes.extend(name.as_bytes());
            bytes.resize((descriptors_at + (index as u32 + 1) * (16 + name_size)) as usize, 0);
        }
        for value in [5u64, 4711, 6] {
            bytes.extend(value.to_ne_bytes());
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn a_counter_is_found_by_its_name() {
        let stats = BinaryStats::new(file(48)).unwrap();
        assert_eq!(stats.read("exits").unwrap(), 4711);
        assert_eq!(stats.counters(), Counters::from([("exits".to_owned(), 4711)]));
        assert!(stats.read("io_exits").is_err());
    }

    #[test]
    fn a_file_with_absurd_sizes_is_refused() {
        assert!(BinaryStats::new(file(5000)).is_err());
        assert!(BinaryStats::new(tempfile::tempfile().unwrap()).is_err());
    }
}
