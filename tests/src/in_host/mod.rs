//! What runs inside the host: in the emulated one, or natively on a machine with VMX or SVM.

pub mod agent;
pub mod alioth_backend;
mod backend;
pub mod fifo_guest;
pub mod flow;
pub mod huge_pages;
mod login;
pub mod measure;
mod namespace;
mod near_end;
mod outside;
pub mod plan;
mod testbed;
pub mod testpmd;
mod virtual_function;
mod vm;
mod vmm;
mod wire;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use tempfile::TempDir;

use crate::emulated_host::SHARE;
use crate::image::guest_image;
use crate::pcpu;
use crate::provision::{ALIOTH, Kernel, Provision};
use crate::workspace::Workspace;

pub use backend::{Backend, BackendConfig, BackendStats, QueueStats};
pub use login::Login;
pub use near_end::NearEnd;
pub use outside::Outside;
pub use testbed::{Setup, Testbed};
pub use virtual_function::VirtualFunction;
pub use vm::Vm;
pub use vmm::{FifoRegion, Layout, Net, VmConfig, Vmm};
pub use wire::{Cable, TAP, Wire};

/// The host a scenario runs in.
pub struct Host {
    workspace: Workspace,
    /// The way to real CPU times.
    pub outside: Outside,
    logs: PathBuf,
    scratch: TempDir,
}

impl Host {
    /// The emulated host this process runs in. The process and what it starts keep to the wire's pCPU unless
    /// pinned elsewhere.
    pub fn emulated() -> anyhow::Result<Self> {
        Self::enter(Outside::of_emulated_host()?, PathBuf::from(SHARE))
    }

    /// This machine itself.
    pub fn native() -> anyhow::Result<Self> {
        let workspace = Workspace::locate()?;
        check_native()?;
        let logs = workspace.cache().join("share");
        fs::create_dir_all(&logs).with_context(|| format!("making {}", logs.display()))?;
        Self::enter(Outside::Native, logs)
    }

    /// This machine, whatever it is, for guests that QEMU emulates: nothing is pinned, nothing needs a privilege.
    pub fn for_emulated_guests() -> anyhow::Result<Self> {
        let workspace = Workspace::locate()?;
        let logs = workspace.cache().join("share");
        fs::create_dir_all(&logs).with_context(|| format!("making {}", logs.display()))?;
        Self::with(workspace, Outside::Native, logs)
    }

    fn enter(outside: Outside, logs: PathBuf) -> anyhow::Result<Self> {
        pcpu::pin(0, &[pcpu::wire()]).context("pinning the scenario")?;
        Self::with(Workspace::locate()?, outside, logs)
    }

    fn with(workspace: Workspace, outside: Outside, logs: PathBuf) -> anyhow::Result<Self> {
        let scratch = tempfile::tempdir_in("/dev/shm").context("making a temporary folder")?;
        Ok(Self { workspace, outside, logs, scratch })
    }

    /// Whether this is the emulated host, which is gone after the run.
    pub fn is_emulated(&self) -> bool {
        matches!(self.outside, Outside::Emulator { .. })
    }

    /// The guest `config` describes, with the provisioned kernel and the guest image made for it.
    pub fn guest_files(&self, kernel: Kernel) -> anyhow::Result<(PathBuf, PathBuf)> {
        let image = guest_image(&self.workspace, kernel);
        if !image.exists() {
            bail!("there is no {}: it is made outside, before the host boots", image.display());
        }
        Ok((Provision::new(&self.workspace).kernel(kernel)?.quickest().into(), image))
    }

    /// A folder, in memory, for sockets and the FIFO region.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// A program of this workspace.
    pub fn binary(&self, name: &str) -> PathBuf {
        self.workspace.release().join(name)
    }

    /// A provisioned program.
    pub fn launcher(&self, name: &str) -> PathBuf {
        self.workspace.launchers().join(name)
    }

    /// Alioth, where it has been provisioned.
    pub fn alioth(&self) -> anyhow::Result<PathBuf> {
        let program = ALIOTH.path(&self.workspace);
        if !program.exists() {
            bail!("there is no {}: `cargo lab provision`, outside, builds it", program.display());
        }
        Ok(program)
    }

    /// Where a log is kept.
    pub fn log_path(&self, name: &str) -> PathBuf {
        self.logs.join(name)
    }

    /// Opens a log that outlives the host; one that is there already is continued.
    pub fn log(&self, name: &str) -> anyhow::Result<File> {
        let path = self.log_path(name);
        File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("opening {}", path.display()))
    }
}

/// Says in one line what a machine lacks that is to be measured natively.
fn check_native() -> anyhow::Result<()> {
    let cpus = fs::read_to_string("/proc/cpuinfo").context("reading /proc/cpuinfo")?;
    let flag =
        |name: &str| cpus.lines().any(|line| line.starts_with("flags") && line.split(' ').any(|w| w == name));
    if !flag("vmx") && !flag("svm") {
        bail!("this machine's CPUs have neither VMX nor SVM: leave --native out to use the emulated host");
    }
    let count = cpus.lines().filter(|line| line.starts_with("processor")).count();
    if count < pcpu::FEWEST {
        bail!("this machine has {count} CPUs, the lab's plan needs {}: leave --native out", pcpu::FEWEST);
    }
    File::options().read(true).write(true).open("/dev/kvm").context("opening /dev/kvm")?;
    if !nix::unistd::geteuid().is_root() {
        bail!("measuring natively makes a network namespace and reads tracefs: run it as root");
    }
    Ok(())
}
