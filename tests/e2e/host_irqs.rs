//! The host's interrupts of a VM's device are on the IVCPU's pCPU while the VM runs, and back afterwards, however it ends.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ivcpu_lab::in_host::Host;
use ivcpu_lab::pcpu;
use ivcpu_lab::process::Process;
use ivcpu_lab::provision::Kernel;
use ivcpu_lab::trial::in_emulated_host;
use nix::sys::signal::Signal;

/// The emulated host's igb: its physical function.
const FUNCTION: &str = "0000:01:00.0";
/// Time a VMM may take to start, to look again, or to end.
const SOON: Duration = Duration::from_secs(60);

type Affinities = BTreeMap<u32, String>;

fn affinity_file(irq: u32) -> String {
    format!("/proc/irq/{irq}/smp_affinity_list")
}

/// Where each interrupt of the function may go.
fn affinities() -> Result<Affinities> {
    let folder = format!("/sys/bus/pci/devices/{FUNCTION}/msi_irqs");
    let entries = fs::read_dir(&folder).with_context(|| format!("reading {folder}"))?;
    let irqs = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    irqs.map(|irq| Ok((irq, fs::read_to_string(affinity_file(irq))?.trim().to_owned()))).collect()
}

/// Brings the function's interface up, so that its driver has requested its interrupts.
fn bring_up(host: &Host) -> Result<String> {
    let folder = format!("/sys/bus/pci/devices/{FUNCTION}/net");
    let mut interfaces = fs::read_dir(&folder).with_context(|| format!("reading {folder}"))?;
    let name = interfaces.next().context("the igb has no interface")??.file_name();
    let name = name.into_string().ok().context("the interface's name")?;
    let status = Command::new(host.launcher("ip")).args(["link", "set", "dev", &name, "up"]).status()?;
    ensure!(status.success(), "ip link set: {status}");
    Ok(name)
}

fn start(host: &Host, more: &[&str]) -> Result<Process> {
    let (kernel, image) = host.guest_files(Kernel::V6_12)?;
    let log = host.log("host-irqs.log")?;
    Ok(Process::spawn("the VMM", host.binary("ivcpu-vmm"), |command| {
        command.arg("--kernel").arg(kernel).arg("--initramfs").arg(image);
        command.args(["--cmdline", "console=ttyS0 quiet panic=-1", "--serial", "null"]);
        command.args(["--cpus", "boot=1,affinity=[0@[0]]"]).args(more);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    })?)
}

/// Waits until the interrupts are where `wanted` says.
fn wait_for(vmm: &mut Process, wanted: &Affinities) -> Result<()> {
    let begin = Instant::now();
    while affinities()? != *wanted {
        if let Some(status) = vmm.try_wait()? {
            anyhow::bail!("the VMM ended: {status}; see host-irqs.log");
        }
        ensure!(begin.elapsed() < SOON, "{:?} instead of {wanted:?}", affinities()?);
        sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Ends the VMM with `signal` and waits until it is gone.
fn end(mut vmm: Process, signal: Signal) -> Result<Option<i32>> {
    vmm.signal(signal);
    Ok(vmm.wait_for(SOON)?.code())
}

#[test]
fn interrupts_of_the_uplink_go_to_the_ivcpu_and_come_back() -> Result<()> {
    in_emulated_host(|host| {
        let interface = bring_up(host)?;
        let before = affinities()?;
        let on_ivcpu: Affinities = before.keys().map(|&irq| (irq, pcpu::IVCPU.to_string())).collect();
        ensure!(!before.is_empty() && before != on_ivcpu, "nothing to move: {before:?}");
        let ivcpu = |source: &str| format!("affinity=[{}],host_irqs=[{source}]", pcpu::IVCPU);

        for source in [FUNCTION, &interface] {
            let mut vmm = start(host, &["--ivcpu", &ivcpu(source)])?;
            wait_for(&mut vmm, &on_ivcpu)?;
            // A balancer at work.
            for (&irq, list) in &before {
                fs::write(affinity_file(irq), list)?;
            }
            wait_for(&mut vmm, &on_ivcpu)?;
            ensure!(end(vmm, Signal::SIGINT)? == Some(128 + Signal::SIGINT as i32));
            ensure!(affinities()? == before, "{:?} instead of {before:?}", affinities()?);
        }

        // What a killed run leaves, the next one puts back, also one without an IVCPU.
        for next in [&[][..], &["--ivcpu", "affinity=[3]"]] {
            let mut killed = start(host, &["--ivcpu", &ivcpu(FUNCTION)])?;
            wait_for(&mut killed, &on_ivcpu)?;
            ensure!(end(killed, Signal::SIGKILL)?.is_none());
            ensure!(affinities()? == on_ivcpu, "a kill cannot restore anything");
            let mut vmm = start(host, next)?;
            wait_for(&mut vmm, &before)?;
            end(vmm, Signal::SIGINT)?;
            ensure!(affinities()? == before, "{:?} instead of {before:?}", affinities()?);
        }
        Ok(())
    })
}
