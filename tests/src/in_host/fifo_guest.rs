//! A guest whose completions come through the FIFO: what its module says, and the region's bytes from outside.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, ensure};

use super::{Testbed, Vm};
use crate::image::MODULE;
use crate::link::Link;
use crate::result::Polled;

/// What the guest module shows in `/sys/kernel/ivcpu`, all counted since it was loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleCounters {
    /// Entries taken from the FIFO.
    pub entries: u64,
    /// Queues that had something in their used ring.
    pub delivered: u64,
    /// Interrupts that woke the IVCPU.
    pub wakeups: u64,
    /// Looks at every pending word.
    pub rescans: u64,
    /// Times it slept.
    pub sleeps: u64,
    /// Interrupts that came while it was awake.
    pub fallbacks: u64,
    /// Entries that named no queue of this guest.
    pub ignored: u64,
}

/// Runs a command in the guest that must succeed; what it wrote.
pub fn run(vm: &mut Vm, command: &str) -> anyhow::Result<String> {
    let (status, text) = vm.run(command)?;
    ensure!(status == 0, "`{command}` in the guest: status {status}: {}", text.trim());
    Ok(text)
}

/// Loads the guest module and waits until it polls. `poll_us`: how long without work until it sleeps; its default
/// if none.
pub fn load_module(vm: &mut Vm, ivcpu: usize, poll_us: Option<u64>) -> anyhow::Result<()> {
    insert_module(vm, ivcpu, poll_us)?;
    let state = "/sys/kernel/ivcpu/state";
    run(vm, &format!("for i in $(seq 50); do grep -q -v absent {state} && exit 0; sleep 0.1; done; dmesg | tail -3; exit 1"))
        .context("the guest module found no FIFO region")?;
    Ok(())
}

/// Loads the guest module, whatever it finds.
pub fn insert_module(vm: &mut Vm, ivcpu: usize, poll_us: Option<u64>) -> anyhow::Result<()> {
    insmod(vm, ivcpu, poll_us, "")
}

fn insmod(vm: &mut Vm, ivcpu: usize, poll_us: Option<u64>, more: &str) -> anyhow::Result<()> {
    let poll_us = poll_us.map(|us| format!(" poll_us={us}")).unwrap_or_default();
    run(vm, &format!("insmod {MODULE} cpu={ivcpu}{poll_us}{more}")).map(drop)
}

/// Loads the guest module, to poll the NAPI contexts of a NIC, and waits until it does.
pub fn poll_interface(vm: &mut Vm, ivcpu: usize, link: Link, poll_us: Option<u64>) -> anyhow::Result<()> {
    let interface = link.interface();
    insmod(vm, ivcpu, poll_us, &format!(" poll={interface}"))?;
    run(vm, "for i in $(seq 50); do [ $(cat /sys/kernel/ivcpu/napi_polls) != 0 ] && exit 0; sleep 0.1; done; exit 1")
        .with_context(|| format!("the guest module polled no NAPI context of {interface}"))?;
    Ok(())
}

/// What it has polled since it was loaded.
pub fn polled(vm: &mut Vm) -> anyhow::Result<Polled> {
    let [packets, sleeps, handler_runs] = counters(vm, "napi_packets napi_sleeps napi_reaps")?;
    Ok(Polled { packets, sleeps, handler_runs })
}

/// The module's counters of these names, one value each.
fn counters<const COUNT: usize>(vm: &mut Vm, names: &str) -> anyhow::Result<[u64; COUNT]> {
    let text = run(vm, &format!("cd /sys/kernel/ivcpu && cat {names}"))?;
    let values: Result<Vec<u64>, _> = text.split_whitespace().map(str::parse).collect();
    let values = values.ok().and_then(|values| values.try_into().ok());
    values.with_context(|| format!("the module's counters are {text:?}"))
}

/// Unloads it.
pub fn remove_module(vm: &mut Vm) -> anyhow::Result<()> {
    run(vm, "rmmod ivcpu").map(drop)
}

/// Its state: `absent`, `awake` or `sleeping`.
pub fn module_state(vm: &mut Vm) -> anyhow::Result<String> {
    Ok(run(vm, "cat /sys/kernel/ivcpu/state")?.trim().to_owned())
}

/// Its counters now.
pub fn module_counters(vm: &mut Vm) -> anyhow::Result<ModuleCounters> {
    let [entries, delivered, wakeups, rescans, sleeps, fallbacks, ignored] =
        counters(vm, "entries delivered wakeups rescans sleeps fallbacks ignored")?;
    Ok(ModuleCounters { entries, delivered, wakeups, rescans, sleeps, fallbacks, ignored })
}

/// Sends frames one by one to a neighbour that the backend's `loop` uplink plays: each comes back, so each is two
/// completions. (Nobody answers the pings: what comes back has this guest's own address.)
pub fn send_to_loop(vm: &mut Vm, frames: u32) -> anyhow::Result<()> {
    let wire = Link::First.wire();
    let command = format!(
        "/usr/bin/ip neigh replace {wire} lladdr 02:00:00:00:00:01 dev eth0 && \
         {{ ping -q -c {frames} -i 0.01 -W 1 {wire} > /dev/null || true; }}"
    );
    run(vm, &command).map(drop)
}

/// What the module has said, if the kernel complained of nothing.
pub fn kernel_log(vm: &mut Vm) -> anyhow::Result<String> {
    let complaints = "BUG:|WARNING: CPU|Oops|Call Trace|nobody cared|rcu: INFO";
    let complaint = run(vm, &format!("dmesg | grep -E -A 25 '{complaints}' || true"))?;
    ensure!(complaint.is_empty(), "the guest's kernel complains:\n{complaint}");
    run(vm, "dmesg | grep ivcpu: || true")
}

/// Overwrites bytes of the region, as a hostile guest or a second consumer could.
pub fn scribble(region: &Path, offset: u64, bytes: &[u8]) -> anyhow::Result<()> {
    let file = File::options().write(true).open(region);
    file.and_then(|file| file.write_all_at(bytes, offset))
        .with_context(|| format!("writing to {}", region.display()))
}

impl Testbed {
    /// The FIFO region's file.
    pub fn region(&self) -> anyhow::Result<&Path> {
        self.config.fifo.as_ref().map(|fifo| fifo.path.as_path()).context("this guest has no FIFO region")
    }
}
