//! The command line. The words are Cloud Hypervisor's where it has them, so that users can move.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::api::socket::ApiSocket;
use crate::boot::kernel::KernelOptions;
use crate::doctor;
use crate::exits;
use crate::ivcpu::IvcpuOptions;
use crate::machine::MachineOptions;
use crate::memory::MemoryOptions;
use crate::sandbox::{SandboxOptions, Seccomp};
use crate::serial::SerialMode;
use crate::vcpu::CpusOptions;
use crate::version::VERSION;
use crate::vfio;
use crate::vfio::options::DeviceOptions;
use crate::virtio::block::options::DiskOptions;
use crate::virtio::console::ConsoleMode;
use crate::virtio::net_options::NetOptions;
use crate::virtio::rng::RngOptions;

/// A KVM virtual machine monitor whose guests take every device interrupt on one vCPU of their own, the IVCPU
#[derive(Debug, Parser)]
#[command(name = "ivcpu-vmm", version = VERSION, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Cli {
    /// What to do instead of running a VM.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// What to run.
    #[command(flatten)]
    pub run: Option<RunOptions>,
}

/// What to do instead of running a VM.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Count the exits of a running VM, of this or any other VMM.
    Exits(exits::command::ExitsArgs),
    /// Say what of this host is ready for an IVCPU, and what to do about the rest.
    Doctor(doctor::command::DoctorArgs),
    /// Make PCI functions ready for a VM, give them back, list them.
    #[command(subcommand)]
    Vfio(vfio::command::VfioCommand),
}

/// Run a VM.
#[derive(Debug, Args)]
pub struct RunOptions {
    /// Linux kernel to boot: a bzImage such as /boot/vmlinuz-*, or an ELF vmlinux with a PVH entry point
    #[arg(long, value_name = "PATH")]
    pub kernel: PathBuf,

    /// Initial RAM file system
    #[arg(long, value_name = "PATH")]
    pub initramfs: Option<PathBuf>,

    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0 panic=-1", allow_hyphen_values = true)]
    pub cmdline: String,

    /// RAM: `size=SIZE[,shared=on][,hugepages=on|off][,hugepage_size=2M|1G][,prefault=on|off]`. prefault=on has the host provide all of
    /// it before the guest starts
    #[arg(long, value_name = "OPTIONS", default_value = "size=512M")]
    pub memory: MemoryOptions,

    /// vCPUs: `boot=N[,affinity=[0@[0],1@[2-3]]][,pv_eoi=on|off]`
    #[arg(long, value_name = "OPTIONS", default_value = "boot=1")]
    pub cpus: CpusOptions,

    /// Network device, once for each: `vhost_user=true,socket=PATH[,mac=MAC][,num_queues=2N][,queue_size=256]`
    #[arg(long, value_name = "OPTIONS")]
    pub net: Vec<NetOptions>,

    /// Disk, once for each: `path=PATH[,readonly=on][,direct=on][,num_queues=N][,queue_size=256][,serial=TEXT]`. PATH is a raw
    /// image or a block device; a disk has as many queues as the VM has vCPUs unless it says otherwise
    #[arg(long, value_name = "OPTIONS")]
    pub disk: Vec<DiskOptions>,

    /// PCI function of the host to pass through, once for each: `path=/sys/bus/pci/devices/0000:01:10.0` or just its address.
    /// It must be bound to vfio-pci; `ivcpu-vmm vfio bind` does that. With --ivcpu its host interrupts go to the IVCPU's pCPU
    #[arg(long, value_name = "OPTIONS")]
    pub device: Vec<DeviceOptions>,

    /// Serial console: tty, null, off or file=PATH
    #[arg(long, value_name = "MODE", default_value = "tty")]
    pub serial: SerialMode,

    /// Second console, hvc0 in Linux: off, tty (then with --serial null or off) or file=PATH
    #[arg(long, value_name = "MODE", default_value = "off")]
    pub console: ConsoleMode,

    /// Entropy device: `src=PATH`, a character device of the host, or off
    #[arg(long, value_name = "OPTIONS", default_value = "src=/dev/urandom")]
    pub rng: RngOptions,

    /// One more vCPU, the last, that takes every device interrupt:
    /// `affinity=[3][,fifo=PATH[,fifo_size=2M]][,host_irqs=[eth0,0000:01:10.0,24]]`.
    /// affinity names the pCPU it has to itself, fifo the file (made if it is missing) through which backends hand it
    /// completions without an interrupt, host_irqs the host interrupts that go to its pCPU while the VM runs
    #[arg(long, value_name = "OPTIONS")]
    pub ivcpu: Option<IvcpuOptions>,

    /// Socket to be made for the API: HTTP with Cloud Hypervisor's paths, such as `GET /api/v1/vm.info`
    #[arg(long, value_name = "PATH")]
    pub api_socket: Option<ApiSocket>,

    /// What a system call does that a thread has no business with: true ends the VMM, log lets the kernel log it, false nothing
    #[arg(long, value_name = "MODE", default_value = "true")]
    pub seccomp: Seccomp,

    /// Whether the VMM gives up access to files once all that it needs are open
    #[arg(long, value_name = "BOOL", default_value = "true", action = clap::ArgAction::Set)]
    pub landlock: bool,

    /// Count the VM's exits per physical CPU and reason, and print them when it ends: table or json (needs root)
    #[arg(long, value_name = "FORMAT")]
    pub exits: Option<exits::lifetime::Format>,
}

impl From<RunOptions> for MachineOptions {
    fn from(options: RunOptions) -> Self {
        Self {
            kernel: KernelOptions {
                kernel: options.kernel,
                initramfs: options.initramfs,
                command_line: options.cmdline,
            },
            memory: options.memory,
            cpus: options.cpus,
            ivcpu: options.ivcpu,
            net: options.net,
            disks: options.disk,
            devices: options.device,
            serial: options.serial,
            console: options.console,
            rng: options.rng,
            exits: options.exits,
            api_socket: options.api_socket.map(|socket| socket.0),
            sandbox: SandboxOptions { seccomp: options.seccomp, landlock: options.landlock },
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    fn parse(words: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from([&["ivcpu-vmm"], words].concat())
    }

    #[test]
    fn the_declaration_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_vm_is_run_without_a_subcommand() {
        let words = ["--kernel", "k", "--cpus", "boot=2,affinity=[0@[0],1@[1]]", "--ivcpu", "affinity=[3]"];
        let options = MachineOptions::from(parse(&words).unwrap().run.unwrap());
        assert_eq!((options.cpus.boot, options.memory.size), (2, 512 << 20));
        assert_eq!(options.kernel.command_line, "console=ttyS0 panic=-1");
        assert!(options.ivcpu.is_some() && options.net.is_empty());
    }

    #[test]
    fn each_network_device_is_a_word_of_its_own() {
        let net = "vhost_user=true,socket=/run/x";
        let options =
            MachineOptions::from(parse(&["--kernel", "k", "--net", net, "--net", net]).unwrap().run.unwrap());
        assert_eq!(options.net.len(), 2);
        assert_ne!(options.net[0].mac, options.net[1].mac, "each has an address of its own");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (words, expected) in [
            (&["--kernel", "k", "--cpus", "boot=0"][..], "expected 1 to 253 vCPUs"),
            (&["--kernel", "k", "--memory", "size=1"], "expected whole MiB"),
            (&["--kernel", "k", "--memory", "sise=1"], "unknown sub-option `sise`; known are: size, shared"),
            (&["--kernel", "k", "--ivcpu", "affinity=3"], "expected a list of pCPUs"),
            (&["--kernel", "k", "--net", "socket=/x"], "vhost_user=true"),
            (&["--kernel", "k", "--serial", "pty"], "expected tty, null, off or file=PATH"),
            (&["--kernel", "k", "--seccomp", "maybe"], "expected true, false or log"),
            (&["--kernel", "k", "--landlock", "log"], "possible values: true, false"),
            (&["--kernel", "k", "--api-socket", "path="], "expected the path of a socket"),
            (&["--colonel", "k"], "--colonel"),
            (&["--memory", "size=64M"], "--kernel"),
        ] {
            let error = parse(words).unwrap_err().to_string();
            assert!(error.contains(expected), "{words:?}: {error}");
        }
    }
}
