//! How each VMM is told to run the same guest.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::wire::TAP;
use crate::pcpu;
use crate::result::Carrier;

/// Words on every guest's kernel command line.
const KERNEL_WORDS: &str = "console=ttyS0 quiet panic=-1";
const MEMORY: &str = "512M";
/// The same of a guest on huge pages, in MiB.
pub(super) const HUGE_MEMORY: u64 = 256;
/// How often QEMU looks for a vhost-user backend that is gone, in milliseconds.
const RECONNECT_MS: u32 = 100;
const MAC: &str = "52:54:00:49:56:01";

/// Who runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vmm {
    /// Ours.
    IvcpuVmm,
    /// Stock QEMU on KVM.
    Qemu,
    /// Stock QEMU that emulates the vCPUs too: no KVM, no pinning.
    QemuTcg,
    /// Alioth, a VMM in Rust by others; vhost-user only.
    Alioth,
}

impl Vmm {
    /// Whether it is QEMU, which shows its vCPUs over QMP and knows no IVCPU.
    pub fn is_qemu(self) -> bool {
        matches!(self, Vmm::Qemu | Vmm::QemuTcg)
    }
}

/// The guest's network device.
#[derive(Clone, Debug)]
pub enum Net {
    /// A vhost-user backend at this socket.
    VhostUser(PathBuf),
    /// The kernel's vhost-net on the wire's TAP; QEMU only.
    VhostNet,
    /// None that is software.
    Absent,
}

/// The FIFO region, and what shows it to the guest.
#[derive(Clone, Debug)]
pub struct FifoRegion {
    /// Its file.
    pub path: PathBuf,
    /// What shows it.
    pub carrier: Carrier,
}

impl FifoRegion {
    /// Size of the file under QEMU. Its firmware keeps an ivshmem function below 4 GiB, in uncached memory, if it fits
    /// there; this one does not. Of the sparse file only the first pages are used.
    pub fn qemu_size(&self) -> &'static str {
        match self.carrier {
            Carrier::Ivshmem => "2G",
            Carrier::VirtioPmem => "2M",
        }
    }
}

/// Where application vCPUs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Each on a pCPU of its own, the backend on another.
    Pinned,
    /// The paper's: application vCPUs float over three pCPUs (the backend is on the third), the IVCPU is alone.
    Paper,
}

impl Layout {
    /// The pCPUs application vCPU number `vcpu` may run on.
    pub fn application(self, vcpu: usize) -> Vec<usize> {
        match self {
            Layout::Pinned => vec![pcpu::APPLICATION[vcpu % pcpu::APPLICATION.len()]],
            Layout::Paper => pcpu::APPLICATION.into_iter().chain([pcpu::BACKEND]).collect(),
        }
    }
}

/// A guest to be run.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// Who runs it.
    pub vmm: Vmm,
    /// The bzImage.
    pub kernel: PathBuf,
    /// The guest image.
    pub image: PathBuf,
    /// More words for its kernel command line.
    pub kernel_words: String,
    /// Application vCPUs.
    pub application_vcpus: usize,
    /// Where they run.
    pub layout: Layout,
    /// One more vCPU, the IVCPU.
    pub ivcpu: bool,
    /// The FIFO region its IVCPU polls.
    pub fifo: Option<FifoRegion>,
    /// Paravirtual end of interrupt.
    pub pv_eoi: bool,
    /// The network device.
    pub net: Net,
    /// The PCI address of a virtual function of the host's, instead of that or beside it.
    pub function: Option<String>,
    /// Its queue pairs.
    pub queue_pairs: u16,
    /// Its memory is made of huge pages, all of them there before it starts; our own VMM only.
    pub huge_pages: bool,
}

impl VmConfig {
    /// vCPUs in all.
    pub fn vcpus(&self) -> usize {
        self.application_vcpus + usize::from(self.ivcpu)
    }

    /// The pCPUs vCPU number `vcpu` may run on.
    pub fn pcpus(&self, vcpu: usize) -> Vec<usize> {
        if self.ivcpu && vcpu == self.application_vcpus {
            vec![pcpu::IVCPU]
        } else {
            self.layout.application(vcpu)
        }
    }

    /// The command line of our own VMM.
    pub(super) fn ivcpu_vmm_words(&self, program: &Path) -> Vec<String> {
        let lists: Vec<_> = (0..self.application_vcpus)
            .map(|vcpu| format!("{vcpu}@[{}]", join(&self.layout.application(vcpu))))
            .collect();
        let pv_eoi = on(self.pv_eoi);
        let mut words = vec![program.display().to_string()];
        let mut option = |name: &str, value: String| words.extend([name.to_string(), value]);
        option("--kernel", self.kernel.display().to_string());
        option("--initramfs", self.image.display().to_string());
        option("--cmdline", self.command_line());
        option(
            "--memory",
            if self.huge_pages {
                format!("size={HUGE_MEMORY}M,hugepages=on,prefault=on")
            } else {
                format!("size={MEMORY},shared=on")
            },
        );
        option(
            "--cpus",
            format!("boot={},affinity=[{}],pv_eoi={pv_eoi}", self.application_vcpus, lists.join(",")),
        );
        if let Net::VhostUser(socket) = &self.net {
            let queues = 2 * self.queue_pairs;
            let socket = socket.display();
            option("--net", format!("vhost_user=true,socket={socket},mac={MAC},num_queues={queues}"));
        }
        if let Some(function) = &self.function {
            option("--device", format!("path=/sys/bus/pci/devices/{function}"));
        }
        option("--serial", "tty".into());
        if self.ivcpu {
            // The VMM itself adds the words that keep tasks off the IVCPU.
            let fifo = self.fifo.iter().map(|region| format!(",fifo={}", region.path.display()));
            option("--ivcpu", format!("affinity=[{}]{}", pcpu::IVCPU, fifo.collect::<String>()));
        }
        words
    }

    /// QEMU's command line; the machine starts stopped, to be pinned first.
    pub(super) fn qemu_words(&self, program: &Path, qmp: &Path) -> Vec<String> {
        let mut words = vec![program.display().to_string()];
        let fixed = "-nodefaults -no-user-config -display none -no-reboot -serial stdio -S -accel";
        words.extend(fixed.split(' ').map(String::from));
        words.push(if self.vmm == Vmm::QemuTcg { "tcg,thread=multi" } else { "kvm" }.into());
        let mut option = |name: &str, value: String| words.extend([name.to_string(), value]);
        option("-machine", "q35,memory-backend=ram".into());
        // Shared with whoever serves the guest, and as QEMU's default is with hardware.
        let memory = match &self.net {
            Net::Absent => "memory-backend-ram,share=off",
            Net::VhostUser(_) | Net::VhostNet => "memory-backend-memfd,share=on",
        };
        option("-object", format!("{memory},id=ram,size={MEMORY}"));
        option(
            "-m",
            format!("{MEMORY}{}", if self.has(Carrier::VirtioPmem) { ",slots=2,maxmem=2G" } else { "" }),
        );
        option("-smp", self.vcpus().to_string());
        let cpu = match self.vmm {
            Vmm::QemuTcg => "max".to_owned(),
            _ => format!("host,kvm-pv-eoi={},kvm-hint-dedicated={}", on(self.pv_eoi), on(self.dedicated())),
        };
        option("-cpu", cpu);
        option("-qmp", format!("unix:{},server=on,wait=off", qmp.display()));
        option("-kernel", self.kernel.display().to_string());
        option("-initrd", self.image.display().to_string());
        option("-append", self.command_line() + &self.isolation());
        if let Some(region) = &self.fifo {
            let (path, size) = (region.path.display(), region.qemu_size());
            option("-object", format!("memory-backend-file,id=fifo,share=on,mem-path={path},size={size}"));
            let device = match region.carrier {
                Carrier::Ivshmem => "ivshmem-plain",
                Carrier::VirtioPmem => "virtio-pmem-pci",
            };
            option("-device", format!("{device},memdev=fifo"));
        }
        if let Some(function) = &self.function {
            option("-device", format!("vfio-pci,host={function}"));
        }
        let queues = self.queue_pairs;
        match &self.net {
            Net::Absent => return words,
            Net::VhostUser(socket) => {
                // A backend that is started anew is found again, as our own VMM does.
                let socket = socket.display();
                option("-chardev", format!("socket,id=backend,path={socket},reconnect-ms={RECONNECT_MS}"));
                option("-netdev", format!("vhost-user,id=net,chardev=backend,queues={queues}"));
            }
            Net::VhostNet => option(
                "-netdev",
                format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost=on,queues={queues}"),
            ),
        }
        // Behind a port it can be unplugged; the q35's own bus has no hotplug.
        let port = match self.vmm {
            Vmm::QemuTcg => {
                option("-device", "pcie-root-port,id=rp0,chassis=1".into());
                ",bus=rp0,id=nic"
            }
            _ => "",
        };
        let queues = if queues > 1 { format!(",mq=on,vectors={}", 2 * queues + 2) } else { String::new() };
        option("-device", format!("virtio-net-pci,netdev=net,mac={MAC},romfile={queues}{port}"));
        words
    }

    /// What QEMU is told, after the start, to give a guest with a vhost-user backend its NIC again: commands and their
    /// arguments.
    pub(super) fn qemu_plug(&self) -> anyhow::Result<[(&'static str, Value); 3]> {
        let Net::VhostUser(socket) = &self.net else { bail!("only a vhost-user NIC is unplugged here") };
        let address = json!({ "type": "unix", "data": { "path": socket } });
        let data = json!({ "addr": address, "server": false, "reconnect-ms": RECONNECT_MS });
        let queues = self.queue_pairs;
        Ok([
            ("chardev-add", json!({ "id": "backend", "backend": { "type": "socket", "data": data } })),
            (
                "netdev_add",
                json!({ "type": "vhost-user", "id": "net", "chardev": "backend", "queues": queues }),
            ),
            (
                "device_add",
                json!({ "driver": "virtio-net-pci", "netdev": "net", "mac": MAC, "romfile": "", "mq": queues > 1,
                        "vectors": 2 * queues + 2, "bus": "rp0", "id": "nic" }),
            ),
        ])
    }

    /// Alioth's command line.
    pub(super) fn alioth_words(&self, program: &Path) -> anyhow::Result<Vec<String>> {
        let Net::VhostUser(socket) = &self.net else {
            bail!("Alioth runs here with a vhost-user backend only: use --backend ivcpu");
        };
        ensure!(self.pv_eoi, "Alioth always lets the guest skip EOI exits: leave --pv-eoi at true");
        ensure!(
            self.fifo.is_none(),
            "Alioth has nothing that shows a FIFO region: use another --mode or --vmm"
        );
        let mut words = vec![program.display().to_string(), "boot".into()];
        let mut option = |name: &str, value: String| words.extend([name.to_string(), value]);
        // It does not find out by itself what a kernel is.
        let unpacked = self.kernel.file_name() == Some(OsStr::new("vmlinux"));
        option(if unpacked { "--pvh" } else { "--kernel" }, self.kernel.display().to_string());
        option("--initramfs", self.image.display().to_string());
        option("--cmdline", self.command_line() + &self.isolation());
        option("--memory", format!("size={MEMORY},backend=memfd"));
        option("--cpu", format!("count={}", self.vcpus()));
        option("--net", format!("vu,socket={}", socket.display()));
        Ok(words)
    }

    /// The words that keep tasks and interrupts off the IVCPU, which our own VMM adds itself.
    fn isolation(&self) -> String {
        match self.ivcpu.then_some(self.application_vcpus) {
            Some(n) => format!(" isolcpus=domain,{n} irqaffinity={n} ivcpu.cpu={n}"),
            None => String::new(),
        }
    }

    /// Whether every vCPU has a pCPU to itself; our VMM finds that out and tells the guest, QEMU must be told to.
    fn dedicated(&self) -> bool {
        self.layout == Layout::Pinned
    }

    fn has(&self, carrier: Carrier) -> bool {
        self.fifo.as_ref().is_some_and(|region| region.carrier == carrier)
    }

    fn command_line(&self) -> String {
        format!("{KERNEL_WORDS} {}", self.kernel_words).trim_end().to_string()
    }
}

fn on(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

fn join(pcpus: &[usize]) -> String {
    pcpus.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(vmm: Vmm, net: Net) -> VmConfig {
        VmConfig {
            vmm,
            kernel: "/k".into(),
            image: "/i".into(),
            kernel_words: String::new(),
            application_vcpus: 2,
            layout: Layout::Pinned,
            ivcpu: true,
            fifo: None,
            pv_eoi: false,
            net,
            function: None,
            queue_pairs: 2,
            huge_pages: false,
        }
    }

    #[test]
    fn own_vmm_with_an_ivcpu() {
        let words = config(Vmm::IvcpuVmm, Net::VhostUser("/s".into())).ivcpu_vmm_words(Path::new("/vmm"));
        let expected = [
            "/vmm",
            "--kernel",
            "/k",
            "--initramfs",
            "/i",
            "--cmdline",
            "console=ttyS0 quiet panic=-1",
            "--memory",
            "size=512M,shared=on",
            "--cpus",
            "boot=2,affinity=[0@[0],1@[1]],pv_eoi=off",
            "--net",
            "vhost_user=true,socket=/s,mac=52:54:00:49:56:01,num_queues=4",
            "--serial",
            "tty",
            "--ivcpu",
            "affinity=[3]",
        ];
        assert_eq!(words, expected);
    }

    #[test]
    fn qemu_gets_the_ivcpu_as_one_more_vcpu() {
        let config = config(Vmm::Qemu, Net::VhostNet);
        let words = config.qemu_words(Path::new("/q"), Path::new("/m")).join(" ");
        for part in [
            "-smp 3",
            "isolcpus=domain,2 irqaffinity=2",
            "kvm-pv-eoi=off,kvm-hint-dedicated=on",
            "vhost=on,queues=2",
            "vectors=6",
        ] {
            assert!(words.contains(part), "{part} in {words}");
        }
        let pcpus: Vec<_> = (0..config.vcpus()).map(|vcpu| config.pcpus(vcpu)).collect();
        assert_eq!(pcpus, [[0], [1], [3]]);
    }

    #[test]
    fn alioth_gets_the_ivcpu_as_one_more_vcpu_and_nothing_it_has_not() {
        let config = VmConfig { pv_eoi: true, ..config(Vmm::Alioth, Net::VhostUser("/s".into())) };
        let words = config.alioth_words(Path::new("/a")).unwrap().join(" ");
        for part in ["/a boot", "count=3", "irqaffinity=2", "backend=memfd", "vu,socket=/s"] {
            assert!(words.contains(part), "{part} in {words}");
        }
        let fifo = Some(FifoRegion { path: "/f".into(), carrier: Carrier::VirtioPmem });
        for (wrong, word) in [
            (VmConfig { pv_eoi: false, ..config.clone() }, "--pv-eoi"),
            (VmConfig { fifo, ..config.clone() }, "FIFO region"),
            (VmConfig { net: Net::VhostNet, ..config.clone() }, "vhost-user"),
        ] {
            let error = wrong.alioth_words(Path::new("/a")).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn both_vmms_show_the_fifo_region() {
        let with = |vmm, carrier| VmConfig {
            fifo: Some(FifoRegion { path: "/f".into(), carrier }),
            ..config(vmm, Net::VhostUser("/s".into()))
        };
        let words = with(Vmm::IvcpuVmm, Carrier::Ivshmem).ivcpu_vmm_words(Path::new("/vmm"));
        assert_eq!(words.last().map(String::as_str), Some("affinity=[3],fifo=/f"));
        let qemu = |carrier| with(Vmm::Qemu, carrier).qemu_words(Path::new("/q"), Path::new("/m")).join(" ");
        assert!(qemu(Carrier::Ivshmem).contains("mem-path=/f,size=2G -device ivshmem-plain,memdev=fifo"));
        let pmem = qemu(Carrier::VirtioPmem);
        assert!(pmem.contains("-m 512M,slots=2,maxmem=2G") && pmem.contains("virtio-pmem-pci,memdev=fifo"));
    }

    #[test]
    fn qemu_with_vcpus_that_float_finds_its_backend_again() {
        let config = VmConfig { layout: Layout::Paper, ..config(Vmm::Qemu, Net::VhostUser("/s".into())) };
        let words = config.qemu_words(Path::new("/q"), Path::new("/m")).join(" ");
        for part in
            ["kvm-hint-dedicated=off", "path=/s,reconnect-ms=100", "vhost-user,id=net,chardev=backend"]
        {
            assert!(words.contains(part), "{part} in {words}");
        }
    }
}
