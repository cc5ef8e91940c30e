//! What `vm.info` says: the VM as it was asked for, in Cloud Hypervisor's words where it has them.

use std::path::PathBuf;

use serde::Serialize;

use crate::machine::MachineOptions;
use crate::serial::SerialMode;
use crate::virtio::block;
use crate::virtio::console::ConsoleMode;

/// The configuration of a VM.
#[derive(Debug, Clone, Serialize)]
pub struct VmConfig {
    cpus: Cpus,
    memory: Memory,
    payload: Payload,
    net: Vec<Net>,
    devices: Vec<Device>,
    disks: Vec<Disk>,
    rng: Option<Rng>,
    serial: Output,
    console: Output,
    #[serde(skip_serializing_if = "Option::is_none")]
    ivcpu: Option<Ivcpu>,
}

#[derive(Debug, Clone, Serialize)]
struct Cpus {
    /// Application vCPUs; the IVCPU is one more.
    boot_vcpus: u8,
    max_vcpus: u8,
}

#[derive(Debug, Clone, Serialize)]
struct Memory {
    size: u64,
    shared: bool,
    hugepages: bool,
    /// Bytes.
    hugepage_size: Option<u64>,
    prefault: bool,
}

#[derive(Debug, Clone, Serialize)]
struct Payload {
    kernel: PathBuf,
    cmdline: String,
    initramfs: Option<PathBuf>,
}

#[derive(Debug, Clone, Serialize)]
struct Net {
    vhost_user: bool,
    vhost_socket: PathBuf,
    mac: String,
    num_queues: u16,
    queue_size: u16,
}

#[derive(Debug, Clone, Serialize)]
struct Device {
    path: String,
}

#[derive(Debug, Clone, Serialize)]
struct Disk {
    path: PathBuf,
    readonly: bool,
    direct: bool,
    num_queues: u16,
    queue_size: u16,
    serial: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
struct Rng {
    src: PathBuf,
}

/// Where a console's output goes.
#[derive(Debug, Clone, Serialize)]
struct Output {
    mode: &'static str,
    file: Option<PathBuf>,
}

#[derive(Debug, Clone, Serialize)]
struct Ivcpu {
    affinity: Vec<usize>,
    fifo: Option<PathBuf>,
}

impl From<&MachineOptions> for VmConfig {
    fn from(options: &MachineOptions) -> Self {
        let net = options.net.iter().map(|net| Net {
            vhost_user: true,
            vhost_socket: net.socket.clone(),
            mac: net.mac.to_string(),
            num_queues: 2 * net.pairs,
            queue_size: net.queue_size,
        });
        let devices = options.devices.iter().map(|device| Device { path: device.address.to_string() });
        let vcpus = options.cpus.boot + u8::from(options.ivcpu.is_some());
        let disks = options.disks.iter().map(|disk| Disk {
            path: disk.path.clone(),
            readonly: disk.readonly,
            direct: disk.direct,
            num_queues: disk.queues.unwrap_or_else(|| block::default_queues(vcpus)),
            queue_size: disk.queue_size,
            serial: disk.serial.clone(),
        });
        let (mode, file) = match &options.serial {
            SerialMode::Tty => ("Tty", None),
            SerialMode::Null => ("Null", None),
            SerialMode::Off => ("Off", None),
            SerialMode::File(path) => ("File", Some(path.clone())),
        };
        let serial = Output { mode, file };
        let (mode, file) = match &options.console {
            ConsoleMode::Tty => ("Tty", None),
            ConsoleMode::Off => ("Off", None),
            ConsoleMode::File(path) => ("File", Some(path.clone())),
        };
        let console = Output { mode, file };
        Self {
            cpus: Cpus { boot_vcpus: options.cpus.boot, max_vcpus: options.cpus.boot },
            memory: Memory {
                size: options.memory.size,
                shared: true,
                hugepages: options.memory.hugepages.is_some(),
                hugepage_size: options.memory.hugepages,
                prefault: options.memory.prefault,
            },
            payload: Payload {
                kernel: options.kernel.kernel.clone(),
                cmdline: options.kernel.command_line.clone(),
                initramfs: options.kernel.initramfs.clone(),
            },
            net: net.collect(),
            devices: devices.collect(),
            disks: disks.collect(),
            rng: options.rng.source.clone().map(|src| Rng { src }),
            serial,
            console,
            ivcpu: options.ivcpu.as_ref().map(|ivcpu| Ivcpu {
                affinity: ivcpu.affinity.0.iter().copied().collect(),
                fifo: ivcpu.fifo.as_ref().map(|fifo| fifo.path.clone()),
            }),
        }
    }
}
