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

use super::fifo_guest::polled;
use super::plan::Plan;
use super::{Backend, BackendStats, Host, Testbed};
use crate::bystander::Bystander;
use crate::figures::{FifoCounts, Load, Window};
use crate::pcpu;
use crate::procfs::{self, Interrupt};
use crate::result::{GuestIrqs, Mode, Polled, Role};
use crate::traffic::{Counts, End, Traffic, Workload};

/// Time for traffic, or for a bystander, to become steady.
const WARM_UP: Duration = Duration::from_secs(1);

/// A window that waits for FIFO entries ends after this.
const LONGEST_WINDOW: Duration = Duration::from_secs(90);

/// What was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// What each pCPU was for.
    pub roles: Vec<Role>,
    /// Bystander, spinning threads, no traffic.
    pub control: Load,
    /// The workloads, in the plan's order.
    pub workloads: Vec<Load>,
}

/// Boots, measures, powers off.
pub fn measure(host: &mut Host, plan: &Plan) -> anyhow::Result<Measured> {
    if host.is_emulated() {
        keep_host_irqs_off_measured_pcpus();
    }
    let mut testbed = Testbed::start(host, &plan.setup)?;
    let vcpus: Vec<_> = (0..testbed.config.application_vcpus).collect();
    testbed.vm.start_bystander(&vcpus, true)?;
    let counter = Counter::start(testbed.vm.id().try_into().context("the VMM's pid")?)?;

    let mut meter = Meter { host, polls: plan.setup.mode == Mode::Poll, testbed, counter };
    thread::sleep(WARM_UP);
    let control = meter.windows(plan, None)?;
    if !plan.with_bystander {
        meter.testbed.vm.stop_bystander()?;
    }
    // An emulated pCPU that idles leaves its real core to the others, whose timer ticks then merge less than in the
    // control: some hundred exits that no traffic causes. So in the emulated host none idles.
    let filler = plan.fills_idle_pcpus(meter.host).then(|| Bystander::start(&pcpu::APPLICATION, true));
    let _filler = filler.transpose().context("keeping the application's pCPUs busy")?;
    let mut workloads = Vec::new();
    for workload in &plan.workloads {
        workloads.push(meter.workload(plan, *workload)?);
    }

    let Meter { testbed, counter, .. } = meter;
    drop(counter);
    let Testbed { mut vm, .. } = testbed;
    if plan.with_bystander {
        vm.stop_bystander()?;
    }
    let status = vm.power_off()?;
    if !status.success() {
        bail!("the VMM ended with {status} after the guest's power-off");
    }
    Ok(Measured { roles: plan.setup.roles(), control, workloads })
}

/// The emulated host's own devices interrupt the wire's pCPU only. One that cannot be moved stays, for control and
/// traffic alike. A real machine's interrupts are left alone: they are not ours.
fn keep_host_irqs_off_measured_pcpus() {
    let Ok(irqs) = fs::read_dir("/proc/irq") else { return };
    for irq in irqs.flatten() {
        let _ = fs::write(irq.path().join("smp_affinity_list"), pcpu::wire().to_string());
    }
}

struct Meter<'a> {
    host: &'a mut Host,
    /// The guest module polls the NIC's NAPI contexts.
    polls: bool,
    testbed: Testbed,
    counter: Counter,
}

/// What only the guest knows.
struct GuestSample {
    interrupts: Vec<Interrupt>,
    polled: Option<Polled>,
    counts: Counts,
    iterations: Vec<u64>,
}

/// What the host knows.
struct HostSample {
    cpu_times: Vec<u64>,
    backend: Option<Notifications>,
    timer_interrupts: Vec<u64>,
    packets: u64,
    wire: Counts,
    exits: Snapshot,
    at: Instant,
}

/// What passed between the backend and the driver besides frames, over all queues.
#[derive(Clone, Copy, Debug)]
struct Notifications {
    kicks: u64,
    completions: u64,
    fifo: FifoCounts,
}

impl Notifications {
    fn of(stats: &BackendStats) -> Self {
        let fifo = FifoCounts {
            entries: stats.total(|q| q.fifo_entries),
            merged: stats.total(|q| q.fifo_merged),
            wakeups: stats.total(|q| q.wakeups),
            fallbacks: stats.total(|q| q.fallbacks),
        };
        Self { kicks: stats.total(|q| q.kicks), completions: stats.total(|q| q.completions), fifo }
    }

    fn since(&self, before: &Self) -> Self {
        let (now, then) = (&self.fifo, &before.fifo);
        let fifo = FifoCounts {
            entries: now.entries - then.entries,
            merged: now.merged - then.merged,
            wakeups: now.wakeups - then.wakeups,
            fallbacks: now.fallbacks - then.fallbacks,
        };
        Self { kicks: self.kicks - before.kicks, completions: self.completions - before.completions, fifo }
    }
}

impl Meter<'_> {
    /// Windows in the middle of one workload's steady traffic; then both ends must agree on every byte.
    fn workload(&mut self, plan: &Plan, workload: Workload) -> anyhow::Result<Load> {
        let connections = if workload == Workload::TcpRr { 1 } else { plan.setup.queue_pairs };
        let traffic = Traffic { connections, ..Traffic::new(workload) };
        let wire_end = self.testbed.wire.listen(traffic)?;
        self.testbed.vm.start_traffic(traffic)?;
        thread::sleep(WARM_UP);
        let mut load = self.windows(plan, Some((workload, &wire_end)))?;
        let guest = self.testbed.vm.stop_traffic()?;
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
        let count = if load.is_some() && plan.entries.is_some() { 1 } else { plan.windows };
        let windows: anyhow::Result<_> = (0..count).map(|_| self.window(plan, load)).collect();
        Ok(Load { windows: windows?, bytes_verified: None })
    }

    fn window(&mut self, plan: &Plan, load: Option<(Workload, &End)>) -> anyhow::Result<Window> {
        if load.is_some() {
            self.testbed.vm.reset_latency()?;
        }
        let bystander = plan.with_bystander || load.is_none();
        let guest_before = self.guest_sample(load.is_some(), bystander)?;
        let before = self.host_sample(load)?;
        thread::sleep(Duration::from_secs_f64(plan.seconds));
        if let (Some(entries), true) = (plan.entries, load.is_some()) {
            self.wait_for_entries(&before, entries)?;
        }
        let after = self.host_sample(load)?;
        let guest_after = self.guest_sample(load.is_some(), bystander)?;
        let workload = load.map(|(workload, _)| workload);
        self.difference(plan, workload, (&before, &guest_before), (&after, &guest_after))
    }

    /// Waits until the FIFO has had `entries` entries since `before`, or the wire so many frames where the IVCPU polls
    /// the NIC. Whoever asked for them checks the count: a window that is too long to wait for says so by it.
    fn wait_for_entries(&self, before: &HostSample, entries: u64) -> anyhow::Result<()> {
        let so_far = || -> anyhow::Result<u64> {
            if self.polls {
                return self.testbed.wire.frames();
            }
            let backend = self.testbed.backend.as_ref().context("no backend of ours runs")?;
            Ok(Notifications::of(&backend.stats()?).fifo.entries)
        };
        let begin = if self.polls {
            before.packets
        } else {
            before.backend.context("no backend of ours runs")?.fifo.entries
        };
        while before.at.elapsed() < LONGEST_WINDOW && so_far()? < begin + entries {
            thread::sleep(Duration::from_millis(500));
        }
        Ok(())
    }

    fn guest_sample(&mut self, traffic: bool, bystander: bool) -> anyhow::Result<GuestSample> {
        Ok(GuestSample {
            interrupts: self.testbed.vm.interrupts()?,
            polled: self.polls.then(|| polled(&mut self.testbed.vm)).transpose()?,
            counts: if traffic { self.testbed.vm.traffic_counts()? } else { Counts::default() },
            iterations: if bystander { self.testbed.vm.iterations()? } else { Vec::new() },
        })
    }

    fn host_sample(&mut self, load: Option<(Workload, &End)>) -> anyhow::Result<HostSample> {
        let backend = &self.testbed.backend;
        let backend = backend.as_ref().map(Backend::stats).transpose()?.as_ref().map(Notifications::of);
        Ok(HostSample {
            cpu_times: self.host.outside.cpu_times()?,
            backend,
            timer_interrupts: procfs::timer_interrupts()?,
            packets: self.testbed.wire.frames()?,
            wire: load.map(|(_, end)| end.counts()).unwrap_or_default(),
            exits: self.counter.snapshot()?,
            at: Instant::now(),
        })
    }

    fn difference(
        &self,
        plan: &Plan,
        workload: Option<Workload>,
        before: (&HostSample, &GuestSample),
        after: (&HostSample, &GuestSample),
    ) -> anyhow::Result<Window> {
        let ((before, guest_before), (after, guest_after)) = (before, after);
        let exits = (&after.exits - &before.exits).report();
        if !exits.notes.is_empty() {
            bail!("exits cannot be counted exactly: {}", exits.notes.join("; "));
        }
        let ivcpu = self.testbed.ivcpu();
        let irqs = |of: fn(&Interrupt) -> bool| {
            interrupts_of(of, &guest_before.interrupts, &guest_after.interrupts, ivcpu)
        };
        let accepted = |by: Option<usize>| {
            let vcpus = exits.vcpus.iter().filter(|v| by.is_none_or(|by| v.vcpu as usize == by));
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
        let application_seconds: f64 = plan
            .setup
            .roles()
            .iter()
            .zip(&cpu_seconds)
            .filter(|(role, _)| **role == Role::App)
            .map(|(_, seconds)| seconds)
            .sum();
        let backend = after.backend.zip(before.backend).map(|(after, before)| after.since(&before));
        let bystander = plan.with_bystander || workload.is_none();

        Ok(Window {
            seconds: after.at.duration_since(before.at).as_secs_f64(),
            exits: exits.pcpus.iter().map(|p| (p.pcpu, p.exits.clone())).collect(),
            kvm_exits: exits.kvm_exits,
            accepted_by_ivcpu: ivcpu.map_or(0, |ivcpu| accepted(Some(ivcpu))),
            accepted: accepted(None),
            packets: after.packets - before.packets,
            bytes: match workload {
                Some(Workload::TcpOut) => after.wire.bytes_verified - before.wire.bytes_verified,
                Some(Workload::TcpIn) => after.wire.bytes_sent - before.wire.bytes_sent,
                Some(Workload::TcpRr) | None => 0,
            },
            transactions: after.wire.transactions - before.wire.transactions,
            latency_us: guest_after.counts.latency_us,
            completions: backend.map(|b| b.completions),
            kicks: backend.map(|b| b.kicks),
            fifo: backend.filter(|_| plan.setup.mode == Mode::Fifo).map(|b| b.fifo),
            bystander_rate: (bystander && application_seconds > 0.0)
                .then(|| iterations as f64 / application_seconds),
            application_is_filled: workload.is_some() && plan.fills_idle_pcpus(self.host),
            guest_irqs: Some(irqs(Interrupt::is_queue)?),
            receive_irqs: Some(irqs(Interrupt::is_receive)?),
            transmit_irqs: Some(irqs(Interrupt::is_transmit)?),
            polled: guest_after.polled.zip(guest_before.polled).map(|(after, before)| Polled {
                packets: after.packets - before.packets,
                sleeps: after.sleeps - before.sleeps,
                handler_runs: after.handler_runs - before.handler_runs,
            }),
            cpu_seconds,
            timer_interrupts: after
                .timer_interrupts
                .iter()
                .zip(&before.timer_interrupts)
                .map(|(after, before)| after.saturating_sub(*before))
                .collect(),
        })
    }
}

/// Interrupts of the network queues from one reading to the next: taken by CPU `ivcpu`, and by the others.
pub fn queue_interrupts(
    before: &[Interrupt],
    after: &[Interrupt],
    ivcpu: Option<usize>,
) -> anyhow::Result<GuestIrqs> {
    interrupts_of(Interrupt::is_queue, before, after, ivcpu)
}

fn interrupts_of(
    chosen: fn(&Interrupt) -> bool,
    before: &[Interrupt],
    after: &[Interrupt],
    ivcpu: Option<usize>,
) -> anyhow::Result<GuestIrqs> {
    let mut irqs = GuestIrqs { ivcpu: ivcpu.map(|_| 0), other: 0 };
    for later in after.iter().filter(|interrupt| chosen(interrupt)) {
        let earlier = before.iter().find(|earlier| earlier.name == later.name);
        let earlier = earlier.with_context(|| format!("interrupt {} appeared in the window", later.name))?;
        for (cpu, (later, earlier)) in later.taken.iter().zip(&earlier.taken).enumerate() {
            let taken = later.checked_sub(*earlier).context("an interrupt count went backwards")?;
            match &mut irqs.ivcpu {
                Some(count) if Some(cpu) == ivcpu => *count += taken,
                _ => irqs.other += taken,
            }
        }
    }
    Ok(irqs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_interrupts_by_who_took_them() {
        let interrupt = |name: &str, taken: &[u64]| Interrupt { name: name.into(), taken: taken.into() };
        let before = [interrupt("virtio0-config", &[0, 9, 9]), interrupt("virtio0-input.0", &[1, 0, 5])];
        let after = [interrupt("virtio0-config", &[7, 9, 9]), interrupt("virtio0-input.0", &[2, 0, 105])];
        let with = queue_interrupts(&before, &after, Some(2)).unwrap();
        assert_eq!(with, GuestIrqs { ivcpu: Some(100), other: 1 });
        let without = queue_interrupts(&before, &after, None).unwrap();
        assert_eq!(without, GuestIrqs { ivcpu: None, other: 101 });
        assert!(queue_interrupts(&before[..1], &after, None).is_err());
    }
}
