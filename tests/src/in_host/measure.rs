//! One VM, measured: control windows without traffic, then windows of each workload in the middle of steady traffic.
//!
//! A window is cut between two samples taken on the host; nothing crosses the guest's serial line inside it. What
//! only the guest knows (interrupts, round trips, the bystander) is asked for just outside.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ivcpu_vmm::exits::{Counter, Snapshot};
use serde::{Deserialize, Serialize};

use super::drive::taken_between;
use super::{Backend, BackendConfig, Host, Layout, Net, TAP, Vm, VmConfig, Vmm, Wire};
use crate::figures::{Load, Window};
use crate::pcpu;
use crate::procfs::Interrupt;
use crate::provision::Kernel;
use crate::result::{self, GuestIrqs, Mode, Role};
use crate::traffic::{Counts, End, Traffic, Workload};

/// Time for traffic, or for a bystander, to become steady.
const WARM_UP: Duration = Duration::from_secs(1);

/// What to boot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Setup {
    /// Who runs the guest.
    pub vmm: Vmm,
    /// What feeds its network device.
    pub backend: result::Backend,
    /// How completions reach it.
    pub mode: Mode,
    /// Where its vCPUs run.
    pub layout: Layout,
    /// Paravirtual end of interrupt.
    pub pv_eoi: bool,
    /// Queue pairs, and connections of a stream.
    pub queue_pairs: u16,
    /// Our backend's `--poll-us`.
    pub poll_us: Option<String>,
    /// The guest's kernel.
    pub kernel: Kernel,
}

/// What to measure of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// What to boot.
    pub setup: Setup,
    /// What flows, one after the other.
    pub workloads: Vec<Workload>,
    /// Windows of each, and of the control.
    pub windows: usize,
    /// Length of a window.
    pub seconds: f64,
}

/// What was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// Bystander, spinning threads, no traffic.
    pub control: Load,
    /// The workloads, in the plan's order.
    pub workloads: Vec<Load>,
}

impl Setup {
    /// What each pCPU is for.
    pub fn roles(&self) -> Vec<Role> {
        let ivcpu = if self.mode == Mode::Irq { Role::Ivcpu } else { Role::Other };
        let mut roles = vec![Role::Other; pcpu::COUNT];
        roles[pcpu::BACKEND] = Role::Backend;
        roles[pcpu::IVCPU] = ivcpu;
        roles[pcpu::WIRE] = Role::Wire;
        for vcpu in 0..pcpu::APPLICATION.len() {
            self.layout.application(vcpu).into_iter().for_each(|pcpu| roles[pcpu] = Role::App);
        }
        roles
    }

    /// The backend's pCPU; in the paper's layout no pCPU is left for it alone.
    fn backend_pcpu(&self) -> usize {
        match self.layout {
            Layout::Pinned => pcpu::BACKEND,
            Layout::Paper => pcpu::WIRE,
        }
    }
}

/// Boots, measures, powers off.
pub fn measure(host: &mut Host, plan: &Plan) -> anyhow::Result<Measured> {
    let setup = &plan.setup;
    keep_host_irqs_off_measured_pcpus();
    let wire = Wire::set_up(setup.queue_pairs)?;
    let backend = match setup.backend {
        result::Backend::VhostNet => None,
        result::Backend::Ivcpu => Some(Backend::start(
            host,
            &BackendConfig {
                uplink: format!("tap:{TAP}"),
                queue_pairs: setup.queue_pairs,
                poll: setup.poll_us.clone().context("ivcpu-backend needs a --poll-us")?,
                pcpus: vec![setup.backend_pcpu()],
            },
        )?),
    };
    let (kernel, image) = host.guest_files(setup.kernel)?;
    let config = VmConfig {
        vmm: setup.vmm,
        kernel,
        image,
        kernel_words: String::new(),
        application_vcpus: pcpu::APPLICATION.len(),
        layout: setup.layout,
        ivcpu: setup.mode == Mode::Irq,
        pv_eoi: setup.pv_eoi,
        net: backend.as_ref().map_or(Net::VhostNet, |backend| Net::VhostUser(backend.socket().into())),
        queue_pairs: setup.queue_pairs,
    };
    let mut vm = Vm::boot(host, &config)?;
    vm.bring_up_network(setup.queue_pairs)?;
    if config.ivcpu {
        vm.start_service()?;
    }
    let vcpus: Vec<_> = (0..config.application_vcpus).collect();
    vm.start_bystander(&vcpus, true)?;
    let counter = Counter::start(vm.id().try_into().context("the VMM's pid")?)?;

    let mut meter = Meter { host, vm, backend, counter, config: &config };
    thread::sleep(WARM_UP);
    let control = meter.windows(plan, None)?;
    let mut workloads = Vec::new();
    for workload in &plan.workloads {
        workloads.push(meter.workload(plan, &wire, *workload)?);
    }

    let Meter { mut vm, counter, .. } = meter;
    drop(counter);
    vm.stop_bystander()?;
    let status = vm.power_off()?;
    if !status.success() {
        bail!("the VMM ended with {status} after the guest's power-off");
    }
    Ok(Measured { control, workloads })
}

/// The emulated host's own devices interrupt the wire's pCPU only. One that cannot be moved stays, for control and
/// traffic alike.
fn keep_host_irqs_off_measured_pcpus() {
    let Ok(irqs) = fs::read_dir("/proc/irq") else { return };
    for irq in irqs.flatten() {
        let _ = fs::write(irq.path().join("smp_affinity_list"), pcpu::WIRE.to_string());
    }
}

struct Meter<'a> {
    host: &'a mut Host,
    vm: Vm,
    backend: Option<Backend>,
    counter: Counter,
    config: &'a VmConfig,
}

/// What only the guest knows.
struct GuestSample {
    interrupts: Vec<Interrupt>,
    counts: Counts,
    iterations: Vec<u64>,
}

/// What the host knows.
struct HostSample {
    cpu_times: Vec<u64>,
    kicks_and_calls: Option<(u64, u64)>,
    packets: u64,
    wire: Counts,
    exits: Snapshot,
    at: Instant,
}

impl Meter<'_> {
    /// Windows in the middle of one workload's steady traffic; then both ends must agree on every byte.
    fn workload(&mut self, plan: &Plan, wire: &Wire, workload: Workload) -> anyhow::Result<Load> {
        let connections = if workload == Workload::TcpRr { 1 } else { self.config.queue_pairs };
        let traffic = Traffic { connections, ..Traffic::new(workload) };
        let wire_end = wire.listen(traffic)?;
        self.vm.start_traffic(traffic)?;
        thread::sleep(WARM_UP);
        let mut load = self.windows(plan, Some((workload, &wire_end)))?;
        let guest = self.vm.stop_traffic()?;
        let wire = wire_end.stop();
        if let Some(failure) = guest.failure.as_ref().or(wire.failure.as_ref()) {
            bail!("the traffic failed: {failure}");
        }
        load.bytes_verified = Some(match workload {
            Workload::TcpOut => wire.bytes_verified,
            Workload::TcpIn => guest.bytes_verified,
            Workload::TcpRr => wire.bytes_verified + guest.bytes_verified,
        });
        Ok(load)
    }

    fn windows(&mut self, plan: &Plan, load: Option<(Workload, &End)>) -> anyhow::Result<Load> {
        let windows: anyhow::Result<_> = (0..plan.windows).map(|_| self.window(plan, load)).collect();
        Ok(Load { windows: windows?, bytes_verified: None })
    }

    fn window(&mut self, plan: &Plan, load: Option<(Workload, &End)>) -> anyhow::Result<Window> {
        if load.is_some() {
            self.vm.reset_latency()?;
        }
        let guest_before = self.guest_sample(load.is_some())?;
        let before = self.host_sample(load)?;
        thread::sleep(Duration::from_secs_f64(plan.seconds));
        let after = self.host_sample(load)?;
        let guest_after = self.guest_sample(load.is_some())?;
        let workload = load.map(|(workload, _)| workload);
        self.difference(workload, (&before, &guest_before), (&after, &guest_after))
    }

    fn guest_sample(&mut self, traffic: bool) -> anyhow::Result<GuestSample> {
        Ok(GuestSample {
            interrupts: self.vm.interrupts()?,
            counts: if traffic { self.vm.traffic_counts()? } else { Counts::default() },
            iterations: self.vm.iterations()?,
        })
    }

    fn host_sample(&mut self, load: Option<(Workload, &End)>) -> anyhow::Result<HostSample> {
        let kicks_and_calls = match &self.backend {
            Some(backend) => {
                let queues = backend.stats()?.queues;
                Some((queues.iter().map(|q| q.kicks).sum(), queues.iter().map(|q| q.calls).sum()))
            }
            None => None,
        };
        // Whoever feeds the guest lives in the wire's namespace, so its view of the network has the TAP.
        let feeder = self.backend.as_ref().map_or_else(|| self.vm.id(), Backend::id);
        Ok(HostSample {
            cpu_times: self.host.outside.cpu_times()?,
            kicks_and_calls,
            packets: frames(&format!("/proc/{feeder}/net/dev"))?,
            wire: load.map(|(_, end)| end.counts()).unwrap_or_default(),
            exits: self.counter.snapshot()?,
            at: Instant::now(),
        })
    }

    fn difference(
        &self,
        workload: Option<Workload>,
        before: (&HostSample, &GuestSample),
        after: (&HostSample, &GuestSample),
    ) -> anyhow::Result<Window> {
        let ((before, guest_before), (after, guest_after)) = (before, after);
        let exits = (&after.exits - &before.exits).report();
        if !exits.notes.is_empty() {
            bail!("exits cannot be counted exactly: {}", exits.notes.join("; "));
        }
        let ivcpu = self.config.application_vcpus;
        let accepted = |only_ivcpu: bool| {
            let vcpus = exits.vcpus.iter().filter(|v| !only_ivcpu || v.vcpu as usize == ivcpu);
            vcpus.filter_map(|v| v.device_accepted).sum()
        };
        let cpu_seconds: Vec<f64> = after
            .cpu_times
            .iter()
            .zip(&before.cpu_times)
            .map(|(after, before)| after.saturating_sub(*before) as f64 / 1e9)
            .collect();
        let iterations: u64 =
            guest_after.iterations.iter().zip(&guest_before.iterations).map(|(a, b)| a - b).sum();
        let application = (0..ivcpu).flat_map(|vcpu| self.config.layout.application(vcpu));
        let mut pcpus: Vec<usize> = application.collect();
        pcpus.sort_unstable();
        pcpus.dedup();
        let application_seconds: f64 = pcpus.iter().filter_map(|pcpu| cpu_seconds.get(*pcpu)).sum();
        let backend = after.kicks_and_calls.zip(before.kicks_and_calls);

        Ok(Window {
            seconds: after.at.duration_since(before.at).as_secs_f64(),
            exits: exits.pcpus.iter().map(|p| (p.pcpu, p.exits.clone())).collect(),
            kvm_exits: exits.kvm_exits,
            accepted_by_ivcpu: if self.config.ivcpu { accepted(true) } else { 0 },
            accepted: accepted(false),
            packets: after.packets - before.packets,
            bytes: match workload {
                Some(Workload::TcpOut) => after.wire.bytes_verified - before.wire.bytes_verified,
                Some(Workload::TcpIn) => after.wire.bytes_sent - before.wire.bytes_sent,
                Some(Workload::TcpRr) | None => 0,
            },
            transactions: after.wire.transactions - before.wire.transactions,
            latency_us: guest_after.counts.latency_us,
            completions: backend.map(|(after, before)| after.1 - before.1),
            kicks: backend.map(|(after, before)| after.0 - before.0),
            bystander_rate: (application_seconds > 0.0).then(|| iterations as f64 / application_seconds),
            guest_irqs: Some(self.queue_interrupts(&guest_before.interrupts, &guest_after.interrupts)?),
            cpu_seconds,
        })
    }

    fn queue_interrupts(&self, before: &[Interrupt], after: &[Interrupt]) -> anyhow::Result<GuestIrqs> {
        let mut irqs = GuestIrqs { ivcpu: self.config.ivcpu.then_some(0), other: 0 };
        for interrupt in taken_between(before, after)?.iter().filter(|interrupt| interrupt.is_queue()) {
            for (cpu, taken) in interrupt.taken.iter().enumerate() {
                match &mut irqs.ivcpu {
                    Some(ivcpu) if cpu == self.config.application_vcpus => *ivcpu += taken,
                    _ => irqs.other += taken,
                }
            }
        }
        Ok(irqs)
    }
}

/// Frames that passed the TAP, both ways.
fn frames(net_dev: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string(net_dev).with_context(|| format!("reading {net_dev}"))?;
    parse_frames(&text).with_context(|| format!("{net_dev} has no {TAP}"))
}

fn parse_frames(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix(TAP)?.strip_prefix(':'))?;
    let fields: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    // Received bytes, packets, ..., then sent bytes, packets, ...
    Some(fields.get(1)? + fields.get(9)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_the_tap_both_ways() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets ...\n    lo: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n\
                    ivcpu0: 1000 10 0 0 0 0 0 0 2000 7 0 0 0 0 0 0\n";
        assert_eq!(parse_frames(text), Some(17));
        assert_eq!(parse_frames("lo: 1 2"), None);
    }

    #[test]
    fn every_pcpu_has_one_role() {
        let mut setup = Setup {
            vmm: Vmm::IvcpuVmm,
            backend: result::Backend::Ivcpu,
            mode: Mode::Irq,
            layout: Layout::Pinned,
            pv_eoi: true,
            queue_pairs: 1,
            poll_us: Some("0".into()),
            kernel: Kernel::V6_12,
        };
        assert_eq!(setup.roles(), [Role::App, Role::App, Role::Backend, Role::Ivcpu, Role::Wire]);
        setup.layout = Layout::Paper;
        assert_eq!(setup.roles(), [Role::App, Role::App, Role::App, Role::Ivcpu, Role::Wire]);
        setup.mode = Mode::Stock;
        assert_eq!(setup.roles()[pcpu::IVCPU], Role::Other);
    }
}
