//! What a VM is made of, as it was asked for.

use std::path::PathBuf;

use crate::boot::kernel;
use crate::exits;
use crate::ivcpu::IvcpuOptions;
use crate::memory::MemoryOptions;
use crate::sandbox::SandboxOptions;
use crate::serial::SerialMode;
use crate::vcpu::CpusOptions;
use crate::vfio::options::DeviceOptions;
use crate::virtio::block::options::DiskOptions;
use crate::virtio::console::ConsoleMode;
use crate::virtio::net_options::NetOptions;
use crate::virtio::rng::RngOptions;

/// Everything that describes a VM.
#[derive(Debug, Clone)]
pub struct MachineOptions {
    /// The kernel and what comes with it.
    pub kernel: kernel::KernelOptions,
    /// RAM.
    pub memory: MemoryOptions,
    /// Application vCPUs.
    pub cpus: CpusOptions,
    /// The IVCPU, if there is one.
    pub ivcpu: Option<IvcpuOptions>,
    /// Network devices.
    pub net: Vec<NetOptions>,
    /// Disks.
    pub disks: Vec<DiskOptions>,
    /// The host's PCI functions that are passed through.
    pub devices: Vec<DeviceOptions>,
    /// The serial port.
    pub serial: SerialMode,
    /// The second console.
    pub console: ConsoleMode,
    /// The entropy device.
    pub rng: RngOptions,
    /// Whether and how the VM's exits are counted and printed when it ends.
    pub exits: Option<exits::lifetime::Format>,
    /// Where the API is served.
    pub api_socket: Option<PathBuf>,
    /// How the VMM is confined.
    pub sandbox: SandboxOptions,
}
