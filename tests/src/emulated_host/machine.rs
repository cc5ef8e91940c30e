//! The emulated machine: QEMU's command line, its console, its sockets.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc::Sender;
use std::thread;

use super::console::watch_console;
use super::{Error, Event};
use crate::channel::{AGENT_PORT, OUTSIDE_PORT};
use crate::pcpu;
use crate::process::Process;
use crate::provision::KernelFiles;

/// `nohz=off` avoids a lost end-of-interrupt of the multi-threaded emulation, which otherwise hangs one boot in
/// fifteen; the TSC words keep the kernel from measuring clocks that emulation makes look unsteady. A task that stands still
/// for half a minute is reported, not only after the usual two.
const KERNEL_WORDS: &str = "console=ttyS0 quiet panic=-1 intel_iommu=on iommu=pt tsc=reliable no_timer_check mitigations=off nohz=off \
                            sysctl.kernel.hung_task_timeout_secs=30";

/// What an emulated machine is made from.
pub(super) struct Parts<'a> {
    pub(super) qemu: &'a Path,
    pub(super) kernel: &'a KernelFiles,
    pub(super) image: &'a Path,
    pub(super) share: &'a Path,
    pub(super) sockets: &'a Path,
    pub(super) console: &'a Path,
    pub(super) more_kernel_words: &'a str,
    pub(super) disk: Option<&'a Path>,
}

impl Parts<'_> {
    pub(super) fn qmp(&self) -> PathBuf {
        self.sockets.join("qmp")
    }

    pub(super) fn agent(&self) -> PathBuf {
        self.sockets.join("agent")
    }

    pub(super) fn outside(&self) -> PathBuf {
        self.sockets.join("outside")
    }

    fn arguments(&self) -> Vec<String> {
        let port = |id: &str, path: PathBuf, name: &str| {
            [
                "-chardev".into(),
                format!("socket,id={id},path={},server=on,wait=off", path.display()),
                "-device".into(),
                format!("virtserialport,chardev={id},name={name}"),
            ]
        };
        let fixed = [
            "-machine q35,kernel-irqchip=split -accel tcg,thread=multi -cpu EPYC-Rome,+svm,+npt -m 2560",
            "-nographic -no-reboot -nodefaults -serial stdio",
            "-device intel-iommu,intremap=on",
            // Above 4 GiB this QEMU maps the BARs of an igb's virtual functions wrongly.
            "-global q35-pcihost.pci-hole64-size=0",
            // The two ends of a cable: the host's NIC, and the one a test moves to the wire's far end.
            "-netdev hubport,hubid=0,id=n0 -device pcie-root-port,id=rp0 -device igb,netdev=n0,bus=rp0",
            "-netdev hubport,hubid=0,id=n1 -device virtio-net-pci,netdev=n1,romfile=",
            "-device virtio-serial-pci",
        ];
        let mut arguments: Vec<String> =
            fixed.iter().flat_map(|words| words.split(' ')).map(String::from).collect();
        arguments.extend(["-smp".into(), pcpu::COUNT.to_string()]);
        // The bzImage, which puts the kernel at a random address, and not the vmlinux that guests are booted from: this emulator
        // does not always tell a guest's address from the host's own, and with both kernels at one address guests, and the
        // host, crash in one test of four.
        arguments.extend(["-kernel".into(), self.kernel.image.display().to_string()]);
        arguments.extend(["-initrd".into(), self.image.display().to_string()]);
        arguments.extend(["-append".into(), format!("{KERNEL_WORDS} {}", self.more_kernel_words)]);
        if let Some(disk) = self.disk {
            let file = doubled_commas(disk);
            arguments
                .extend(["-drive".into(), format!("if=none,id=disk,format=raw,discard=unmap,file={file}")]);
            arguments.extend(["-device".into(), "virtio-blk-pci,drive=disk".into()]);
        }
        arguments.extend(["-virtfs".into(), shared(Path::new("/"), "machine", ",readonly=on")]);
        arguments.extend(["-virtfs".into(), shared(self.share, "share", "")]);
        arguments.extend(["-qmp".into(), format!("unix:{},server=on,wait=off", self.qmp().display())]);
        arguments.extend(port("agent", self.agent(), AGENT_PORT));
        arguments.extend(port("outside", self.outside(), OUTSIDE_PORT));
        arguments
    }

    /// Starts the machine; its console goes to a file and is watched for signs of a stall.
    pub(super) fn start(&self, events: Sender<Event>) -> Result<Process, Error> {
        let console = |e| Error::File(self.console.into(), e);
        let mut log = File::create(self.console).map_err(console)?;
        let errors = log.try_clone().map_err(console)?;
        let mut qemu = Process::spawn("the emulated host", self.qemu, |command| {
            command.args(self.arguments()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors);
        })?;
        if let Some(output) = qemu.child().stdout.take() {
            thread::spawn(move || watch_console(BufReader::new(output), &mut log, &events));
        }
        Ok(qemu)
    }
}

fn shared(path: &Path, tag: &str, more: &str) -> String {
    let path = doubled_commas(path);
    format!("local,path={path},mount_tag={tag},security_model=none,multidevs=remap{more}")
}

/// A comma in a QEMU option value is written twice.
fn doubled_commas(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}
