//! What cannot go to a VM is refused at once: one line that says why and what to do, and a failure. Every case is real in the
//! emulated host.

use std::fs;
use std::io::Read;
use std::os::unix::fs::chown;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ivcpu_lab::in_host::{Host, VirtualFunction};
use ivcpu_lab::process::Process;
use ivcpu_lab::provision::Kernel;
use ivcpu_lab::trial::in_emulated_host;
use nix::sys::signal::Signal;

/// The igb: its driver has it.
const UPLINK: &str = "0000:01:00.0";
/// A virtio NIC on the root bus, which can be reset in no way.
const WITHOUT_RESET: &str = "0000:00:02.0";
/// Functions of the chipset, in one IOMMU group. The second's driver has that one.
const DISK: &str = "0000:00:1f.2";
const SMBUS: &str = "0000:00:1f.3";
/// Time to refuse something, or to come up.
const SOON: Duration = Duration::from_secs(30);

/// Starts `words`, which end in a command of ours, with its outputs kept.
fn spawn(words: &[&str]) -> Result<Process> {
    let (program, arguments) = words.split_first().context("an empty command")?;
    Ok(Process::spawn("ivcpu-vmm", program, |command| {
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    })?)
}

/// Runs it to its end; its exit code and what it wrote.
fn finish(mut process: Process) -> Result<(Option<i32>, String, String)> {
    let status = process.wait_for(SOON)?;
    let (mut output, mut errors) = (String::new(), String::new());
    process.child().stdout.take().context("its output")?.read_to_string(&mut output)?;
    process.child().stderr.take().context("its errors")?.read_to_string(&mut errors)?;
    Ok((status.code(), output, errors))
}

/// The program, and the words that make it boot a guest.
struct Lab<'a> {
    program: String,
    guest: Vec<String>,
    host: &'a Host,
}

impl<'a> Lab<'a> {
    fn new(host: &'a Host) -> Result<Self> {
        let (kernel, image) = host.guest_files(Kernel::V6_12)?;
        let (kernel, image) = (kernel.display(), image.display());
        let words = format!("--kernel {kernel} --initramfs {image} --memory size=256M --serial null");
        let guest = words.split(' ').map(str::to_owned).collect();
        Ok(Self { program: host.binary("ivcpu-vmm").display().to_string(), guest, host })
    }

    /// A VM with these devices, started by way of the words in front.
    fn vm(&self, front: &[&str], devices: &[&str]) -> Result<Process> {
        let mut words = front.to_vec();
        words.push(&self.program);
        words.extend(self.guest.iter().map(String::as_str));
        words.extend(devices.iter().flat_map(|device| ["--device", device]));
        spawn(&words)
    }

    /// `ivcpu-vmm vfio`, which succeeds.
    fn vfio(&self, arguments: &[&str]) -> Result<String> {
        let (code, output, errors) = finish(self.start_vfio(arguments)?)?;
        ensure!(code == Some(0) && errors.is_empty(), "vfio {arguments:?}: {code:?} {errors}");
        Ok(output)
    }

    fn start_vfio(&self, arguments: &[&str]) -> Result<Process> {
        spawn(&[&[self.program.as_str(), "vfio"], arguments].concat())
    }
}

/// It must end by itself with a failure and one line, in which these parts are.
fn refused(process: Process, parts: &[&str]) -> Result<()> {
    let begin = Instant::now();
    let (code, _, errors) = finish(process)?;
    println!("{code:?} after {:?}: {}", begin.elapsed(), errors.trim_end());
    ensure!(matches!(code, Some(1 | 2)), "exit code {code:?}: {errors}");
    ensure!(errors.lines().count() == 1 && errors.starts_with("ivcpu-vmm: "), "not one line: {errors}");
    for part in parts {
        ensure!(errors.contains(part), "{part:?} is not in: {errors}");
    }
    Ok(())
}

#[test]
fn what_is_no_function_for_a_vm_is_refused() -> Result<()> {
    in_emulated_host(|host| {
        let lab = Lab::new(host)?;
        let vm = |device: &str| lab.vm(&[], &[device]);
        refused(vm("0000:99:00.0")?, &["the host has no PCI function 0000:99:00.0", "vfio list"])?;
        refused(vm("eth0")?, &["--device", "eth0", "is not the address of a PCI function"])?;
        refused(
            vm("path=/sys/class/net/lo")?,
            &["/sys/class/net/lo", "is not the address of a PCI function"],
        )?;
        refused(vm(&format!("path=/tmp/{UPLINK}"))?, &["/tmp/", "/sys/bus/pci/devices/"])?;
        refused(lab.start_vfio(&["bind", "0000:99:00.0"])?, &["the host has no PCI function 0000:99:00.0"])?;

        let bind = format!("ivcpu-vmm vfio bind {UPLINK}");
        refused(vm(UPLINK)?, &["is bound to igb, not to vfio-pci", &bind])?;

        lab.vfio(&["bind", WITHOUT_RESET])?;
        refused(vm(WITHOUT_RESET)?, &[WITHOUT_RESET, "cannot be reset alone", "hot reset"])?;
        lab.vfio(&["unbind", WITHOUT_RESET])?;

        let shared = format!("(bound to {})", driver(SMBUS)?);
        let shared = [DISK, "shares IOMMU group", SMBUS, &shared];
        refused(lab.start_vfio(&["bind", DISK])?, &shared)?;
        refused(vm(DISK)?, &shared)?;
        lab.vfio(&["unbind", DISK])?;
        Ok(())
    })
}

#[test]
fn a_virtual_function_that_cannot_be_had_is_refused() -> Result<()> {
    in_emulated_host(|host| {
        let lab = Lab::new(host)?;
        let function = VirtualFunction::bind(lab.host)?;
        let address = function.address();
        let directory = format!("/sys/bus/pci/devices/{address}");
        let path = format!("path={directory}");
        let group = fs::read_link(format!("{directory}/iommu_group"))?;
        let group = group.file_name().and_then(|name| name.to_str()).context("the group")?;

        refused(lab.vm(&[], &[address, &path])?, &[address, "is given twice"])?;

        let holder = lab.vm(&[], &[address])?;
        let name = format!("ivcpu-vmm (process {})", holder.id());
        wait_until(|| Ok(lab.vfio(&["list"])?.contains(&name)))?;
        refused(lab.vm(&[], &[address])?, &[address, "is in use", &name, &format!("IOMMU group {group}")])?;
        refused(lab.start_vfio(&["unbind", UPLINK])?, &[address, "is in use by", &name])?;
        holder.signal(Signal::SIGKILL);
        ensure!(finish(holder)?.0.is_none(), "the first VM must not have ended before");

        let limited = ["setpriv", "--bounding-set=-ipc_lock", "prlimit", "--memlock=16777216"];
        let locked = ["all 256 MiB of guest memory locked", "may lock 16 MiB", "ulimit -l"];
        refused(lab.vm(&limited, &[address])?, &locked)?;

        // Another user's group.
        chown(format!("/dev/vfio/{group}"), Some(65534), None)?;
        let without = ["setpriv", "--bounding-set=-dac_override"];
        refused(lab.vm(&without, &[address])?, &[address, "run as root", &format!("/dev/vfio/{group}")])?;

        fs::write(format!("{directory}/reset_method"), "\n").context("taking its reset away")?;
        refused(lab.vm(&[], &[address])?, &["virtual function", address, "cannot be reset alone", "FLR"])?;
        Ok(())
    })
}

fn wait_until(mut reached: impl FnMut() -> Result<bool>) -> Result<()> {
    let begin = Instant::now();
    while !reached()? {
        ensure!(begin.elapsed() < SOON, "not within {SOON:?}");
        sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// The name of a function's driver.
fn driver(address: &str) -> Result<String> {
    let link = fs::read_link(format!("/sys/bus/pci/devices/{address}/driver"));
    let link = link.with_context(|| format!("{address} has no driver"))?;
    Ok(link.file_name().unwrap_or_default().to_string_lossy().into_owned())
}
