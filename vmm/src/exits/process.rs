//! The process whose VM is looked at: its threads, its vCPUs, and KVM's own view of it in debugfs.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::Error;

/// Where the kernel shows KVM's debugging files.
pub const KVM_DEBUGFS: &str = "/sys/kernel/debug/kvm";

/// Where the kernel shows processes and KVM's debugging files; elsewhere in tests.
#[derive(Clone, Debug)]
pub(super) struct Roots {
    pub(super) proc: PathBuf,
    pub(super) kvm_debugfs: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Roots { proc: "/proc".into(), kvm_debugfs: KVM_DEBUGFS.into() }
    }
}

/// A process that runs a VM.
#[derive(Clone, Debug)]
pub(super) struct Process {
    roots: Roots,
    pid: i32,
    /// The process's file descriptors by what KVM calls them.
    pub(super) fds: KvmFds,
    /// The directories of the process's VMs in debugfs; none where it cannot be read.
    pub(super) debugfs_vms: Vec<PathBuf>,
}

/// File descriptors of the process that lead to KVM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct KvmFds {
    /// VMs.
    pub(super) vms: Vec<i32>,
    /// vCPUs by number.
    pub(super) vcpus: BTreeMap<u32, i32>,
    /// vCPUs' binary statistics by vCPU number, where the VMM keeps them open.
    pub(super) vcpu_stats: BTreeMap<u32, i32>,
}

/// A thread that runs a vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct VcpuThread {
    /// The vCPU's number, which is its initial APIC id.
    pub(super) vcpu: u32,
    /// The thread's id.
    pub(super) tid: i32,
    /// The thread's name.
    pub(super) name: String,
}

impl Process {
    /// Looks at the process `pid`, which must hold a VM.
    pub(super) fn find(roots: Roots, pid: i32) -> Result<Process, Error> {
        let directory = roots.proc.join(pid.to_string());
        let entries = fs::read_dir(directory.join("fd")).map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => Error::NotOurs { pid },
            _ => Error::NoProcess { pid },
        })?;
        let mut fds = KvmFds::default();
        for entry in entries.flatten() {
            let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // A descriptor closed since the listing has no target any more.
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            fds.note(number, &target.to_string_lossy());
        }
        if fds.vms.is_empty() {
            let name = fs::read_to_string(directory.join("comm")).unwrap_or_default();
            return Err(Error::NotAVmm { pid, name: name.trim().to_owned() });
        }
        let mut process = Process { roots, pid, fds, debugfs_vms: Vec::new() };
        process.debugfs_vms = process.find_debugfs_vms();
        Ok(process)
    }

    /// Every thread of the process.
    pub(super) fn threads(&self) -> Result<Vec<i32>, Error> {
        let pid = self.pid;
        let task = self.roots.proc.join(pid.to_string()).join("task");
        let entries = fs::read_dir(task).map_err(|_| Error::NoProcess { pid })?;
        Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
    }

    /// The vCPU threads: as debugfs tells (Linux 6.0 and later), else by the names that VMMs give them.
    pub(super) fn vcpu_threads(&self) -> Vec<VcpuThread> {
        let Ok(threads) = self.threads() else { return Vec::new() };
        let mut told: BTreeMap<i32, u32> = BTreeMap::new();
        for directory in &self.debugfs_vms {
            told.extend(vcpu_tids(directory).into_iter().map(|(vcpu, tid)| (tid, vcpu)));
        }
        let mut vcpus: Vec<VcpuThread> = threads
            .into_iter()
            .filter_map(|tid| {
                let name = self.thread_name(tid);
                let named = || match name.as_str() {
                    "ivcpu" => self.fds.vcpus.keys().last().copied(),
                    name => vcpu_of_name(name),
                };
                let vcpu = if told.is_empty() { named() } else { told.get(&tid).copied() };
                Some(VcpuThread { vcpu: vcpu?, tid, name })
            })
            .collect();
        vcpus.sort_by_key(|vcpu| vcpu.vcpu);
        vcpus
    }

    /// The process's VMs in KVM's debugfs, whose directories are named by the thread that made the VM and its descriptor.
    fn find_debugfs_vms(&self) -> Vec<PathBuf> {
        let threads = self.threads().unwrap_or_default();
        let ours = |directory: &Path| {
            let name = directory.file_name()?.to_str()?;
            let (maker, fd) = name.split_once('-')?;
            let (maker, fd): (i32, i32) = (maker.parse().ok()?, fd.parse().ok()?);
            let made_here = threads.contains(&maker);
            let runs_here = || vcpu_tids(directory).into_values().any(|tid| threads.contains(&tid));
            Some(self.fds.vms.contains(&fd) && (made_here || runs_here()))
        };
        self.all_debugfs_vms().into_iter().filter(|directory| ours(directory) == Some(true)).collect()
    }

    /// Whether the process runs one VM and the host no other. Not known, and so denied, where debugfs cannot be read.
    pub(super) fn is_alone(&self) -> bool {
        self.debugfs_vms.len() == 1 && self.all_debugfs_vms().iter().all(|vm| self.debugfs_vms.contains(vm))
    }

    fn all_debugfs_vms(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(&self.roots.kvm_debugfs) else { return Vec::new() };
        entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
    }

    fn thread_name(&self, tid: i32) -> String {
        let comm = self.roots.proc.join(format!("{}/task/{tid}/comm", self.pid));
        fs::read_to_string(comm).map(|name| name.trim().to_owned()).unwrap_or_default()
    }
}

impl KvmFds {
    fn note(&mut self, fd: i32, target: &str) {
        let Some(kvm) = target.strip_prefix("anon_inode:kvm-") else { return };
        if kvm == "vm" {
            self.vms.push(fd);
        } else if let Some(vcpu) = number_after(kvm, "vcpu:") {
            self.vcpus.insert(vcpu, fd);
        } else if let Some(vcpu) = number_after(kvm, "vcpu-stats:") {
            self.vcpu_stats.insert(vcpu, fd);
        }
    }
}

/// vCPU number and thread of each vCPU in a VM's debugfs directory.
fn vcpu_tids(vm: &Path) -> BTreeMap<u32, i32> {
    let Ok(entries) = fs::read_dir(vm) else { return BTreeMap::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let vcpu = number_after(entry.file_name().to_str()?, "vcpu")?;
            let tid = fs::read_to_string(entry.path().join("pid")).ok()?.trim().parse().ok()?;
            Some((vcpu, tid))
        })
        .collect()
}

/// The vCPU number in a thread's name: `vcpu1` (ours, Cloud Hypervisor), `CPU 1/KVM` (QEMU with debug-threads), `vcpu_1`.
fn vcpu_of_name(name: &str) -> Option<u32> {
    let number = name.strip_prefix("vcpu").or_else(|| name.strip_prefix("CPU "))?;
    number.trim_start_matches(['_', '-']).trim_end_matches("/KVM").parse().ok()
}

fn number_after(name: &str, prefix: &str) -> Option<u32> {
    name.strip_prefix(prefix)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A fake /proc and debugfs with QEMU as process 100 (threads 100, 105, 106) and another VM on the host.
    fn host() -> (tempfile::TempDir, Roots) {
        let directory = tempfile::tempdir().unwrap();
        let roots = Roots { proc: directory.path().join("proc"), kvm_debugfs: directory.path().join("kvm") };
        let qemu = roots.proc.join("100");
        fs::create_dir_all(qemu.join("fd")).unwrap();
        fs::write(qemu.join("comm"), "qemu-system-x86\n").unwrap();
        for (fd, target) in [
            (0, "/dev/null"),
            (8, "anon_inode:kvm-vm"),
            (12, "anon_inode:kvm-vcpu:0"),
            (13, "anon_inode:kvm-vcpu-stats:0"),
            (14, "anon_inode:kvm-vcpu:1"),
        ] {
            symlink(target, qemu.join(format!("fd/{fd}"))).unwrap();
        }
        for (tid, name) in [(100, "qemu-system-x86"), (105, "CPU 0/KVM"), (106, "CPU 1/KVM")] {
            fs::create_dir_all(qemu.join(format!("task/{tid}"))).unwrap();
            fs::write(qemu.join(format!("task/{tid}/comm")), format!("{name}\n")).unwrap();
        }
        fs::create_dir_all(roots.proc.join("200/fd")).unwrap();
        fs::write(roots.proc.join("200/comm"), "sh\n").unwrap();
        for (vm, vcpus) in [("100-8", &[105, 106][..]), ("300-8", &[305])] {
            for (vcpu, tid) in vcpus.iter().enumerate() {
                let vcpu = roots.kvm_debugfs.join(format!("{vm}/vcpu{vcpu}"));
                fs::create_dir_all(&vcpu).unwrap();
                fs::write(vcpu.join("pid"), format!("{tid}\n")).unwrap();
            }
        }
        (directory, roots)
    }

    #[test]
    fn a_vmm_is_known_by_its_descriptors() {
        let (_directory, roots) = host();
        let qemu = Process::find(roots, 100).unwrap();
        assert_eq!(qemu.fds.vms, [8]);
        assert_eq!(qemu.fds.vcpus, BTreeMap::from([(0, 12), (1, 14)]));
        assert_eq!(qemu.fds.vcpu_stats, BTreeMap::from([(0, 13)]));
    }

    #[test]
    fn other_processes_are_refused() {
        let (_directory, roots) = host();
        assert!(
            matches!(Process::find(roots.clone(), 200), Err(Error::NotAVmm { pid: 200, name }) if name == "sh")
        );
        assert!(matches!(Process::find(roots, 201), Err(Error::NoProcess { pid: 201 })));
    }

    #[test]
    fn vcpu_threads_are_told_by_debugfs_or_by_their_names() {
        let (_directory, mut roots) = host();
        let told = Process::find(roots.clone(), 100).unwrap().vcpu_threads();
        roots.kvm_debugfs = "/nonexistent".into();
        let named = Process::find(roots, 100).unwrap().vcpu_threads();
        assert_eq!(told, named);
        assert_eq!(
            told.iter().map(|thread| (thread.vcpu, thread.tid)).collect::<Vec<_>>(),
            [(0, 105), (1, 106)]
        );
    }

    #[test]
    fn a_vm_made_by_a_thread_that_is_gone_is_found_by_its_vcpus() {
        let (_directory, roots) = host();
        fs::rename(roots.kvm_debugfs.join("100-8"), roots.kvm_debugfs.join("104-8")).unwrap();
        let qemu = Process::find(roots.clone(), 100).unwrap();
        assert_eq!(qemu.debugfs_vms, [roots.kvm_debugfs.join("104-8")]);
    }

    #[test]
    fn another_vm_on_the_host_is_noticed() {
        let (_directory, roots) = host();
        let qemu = Process::find(roots.clone(), 100).unwrap();
        assert!(!qemu.is_alone());
        fs::remove_dir_all(roots.kvm_debugfs.join("300-8")).unwrap();
        assert!(qemu.is_alone());
    }

    #[test]
    fn vcpu_names_of_several_vmms_are_understood() {
        for (name, vcpu) in
            [("CPU 3/KVM", Some(3)), ("vcpu3", Some(3)), ("vcpu_3", Some(3)), ("vhost-3", None)]
        {
            assert_eq!(vcpu_of_name(name), vcpu, "{name}");
        }
    }
}
