//! From measured windows to the figures of a case. Pure arithmetic: what a share, a control or a price means is
//! decided here and in `result.rs`, nowhere else.

use std::collections::BTreeMap;

use ivcpu_vmm::exits::{Row, Rows};
use serde::{Deserialize, Serialize};

use crate::result::{self, Bystander, Figures, GuestIrqs, Pcpu, Polled, Role, TimerInterrupts};
use crate::statistics;
use crate::traffic::Latency;

/// What one window saw: differences between two samples.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Window {
    /// Length in seconds.
    pub seconds: f64,
    /// Exits by pCPU and row.
    pub exits: BTreeMap<u32, Rows>,
    /// KVM's own exit counter.
    pub kvm_exits: Option<u64>,
    /// Device interrupts accepted by the IVCPU's local APIC.
    pub accepted_by_ivcpu: u64,
    /// Device interrupts accepted by all local APICs of the VM.
    pub accepted: u64,
    /// virtio frames in both directions.
    pub packets: u64,
    /// TCP payload bytes of a stream.
    pub bytes: u64,
    /// Round trips.
    pub transactions: u64,
    /// Round-trip times.
    pub latency_us: Option<Latency>,
    /// Notifications that virtio's suppression rule asked for; none where the backend does not tell.
    pub completions: Option<u64>,
    /// Kicks that reached the backend; none where it does not tell.
    pub kicks: Option<u64>,
    /// What became of them in the FIFO; none in modes without one.
    pub fifo: Option<FifoCounts>,
    /// CPU seconds by pCPU.
    pub cpu_seconds: Vec<f64>,
    /// Interrupts of the host's own timer by pCPU: its ticks, and the timers of the guest's CPUs.
    pub timer_interrupts: Vec<u64>,
    /// Something outside the guest took what it left of the application's pCPUs: their CPU time says nothing.
    pub application_is_filled: bool,
    /// Bystander iterations per CPU second of the application's pCPUs.
    pub bystander_rate: Option<f64>,
    /// The NIC's interrupts as the guest counted them.
    pub guest_irqs: Option<GuestIrqs>,
    /// Those of receive queues alone.
    pub receive_irqs: Option<GuestIrqs>,
    /// Those of transmit queues alone.
    pub transmit_irqs: Option<GuestIrqs>,
    /// What the guest module polled; none but in `poll` mode.
    pub polled: Option<Polled>,
}

/// What became of completions in the FIFO.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FifoCounts {
    /// Put into it as entries.
    pub entries: u64,
    /// Covered by an entry that was there already.
    pub merged: u64,
    /// Interrupts because the IVCPU slept.
    pub wakeups: u64,
    /// Interrupts because an entry was too old.
    pub fallbacks: u64,
}

/// Equally long windows of one load.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Load {
    /// The windows.
    pub windows: Vec<Window>,
    /// Payload bytes the receiving ends compared with what was sent, from start to end of the traffic.
    pub bytes_verified: Option<u64>,
}

impl Load {
    /// Takes in the windows of another run of the same load.
    pub fn extend(&mut self, other: Load) {
        self.bytes_verified = match (self.windows.is_empty(), self.bytes_verified, other.bytes_verified) {
            (true, _, verified) => verified,
            (false, ours, theirs) => ours.zip(theirs).map(|(ours, theirs)| ours + theirs),
        };
        self.windows.extend(other.windows);
    }

    fn total<T: std::iter::Sum>(&self, figure: impl Fn(&Window) -> T) -> T {
        self.windows.iter().map(figure).sum()
    }

    fn median(&self, figure: impl Fn(&Window) -> Option<f64>) -> Option<f64> {
        statistics::median(&self.windows.iter().filter_map(figure).collect::<Vec<_>>())
    }

    /// Throughput of each window, or its median round trip: what repeats of the load are compared by.
    pub fn rates(&self) -> Vec<f64> {
        let rate = |w: &Window| w.latency_us.map_or_else(|| mbps(w.bytes, w.seconds), |latency| latency.p50);
        self.windows.iter().map(rate).collect()
    }

    fn rows(&self, pcpu: u32) -> Rows {
        let mut sum = Rows::default();
        self.windows.iter().filter_map(|w| w.exits.get(&pcpu)).for_each(|rows| sum += rows);
        sum
    }

    fn timer_interrupts(&self, pcpu: u32) -> u64 {
        self.total(|w| w.timer_interrupts.get(pcpu as usize).copied().unwrap_or(0))
    }

    /// Largest less smallest window, a row, times the number of windows: the spread of the summed figure if all
    /// windows erred the same way. One window has none.
    fn spread(&self, pcpu: u32) -> Option<Rows> {
        if self.windows.len() < 2 {
            return None;
        }
        let mut spread = Rows::default();
        for row in Row::ALL {
            let counts = self.windows.iter().map(|w| w.exits.get(&pcpu).map_or(0, |rows| rows.count(row)));
            let (low, high) = counts.fold((u64::MAX, 0), |(l, h), n| (l.min(n), h.max(n)));
            spread.add(row, high.saturating_sub(low) * self.windows.len() as u64);
        }
        Some(spread)
    }

    /// Standard deviation of the windows' summed device exits, from that of one window.
    fn device_exits_sigma(&self, pcpu: u32) -> Option<f64> {
        let of = |rows: &Rows| Figures::DEVICE_ROWS.iter().map(|row| rows.count(*row)).sum::<u64>() as f64;
        let counts: Vec<_> = self.windows.iter().map(|w| w.exits.get(&pcpu).map_or(0.0, of)).collect();
        Some(statistics::sigma(&counts)? * (counts.len() as f64).sqrt())
    }

    fn polled(&self) -> Option<Polled> {
        Some(Polled {
            packets: self.total(|w| Some(w.polled?.packets))?,
            sleeps: self.total(|w| Some(w.polled?.sleeps))?,
            handler_runs: self.total(|w| Some(w.polled?.handler_runs))?,
        })
    }

    fn irqs(&self, of: impl Fn(&Window) -> Option<GuestIrqs>) -> Option<GuestIrqs> {
        let windows: Option<Vec<GuestIrqs>> = self.windows.iter().map(of).collect();
        let windows = windows?;
        Some(GuestIrqs {
            ivcpu: windows.iter().map(|irqs| irqs.ivcpu).sum(),
            other: windows.iter().map(|irqs| irqs.other).sum(),
        })
    }
}

/// Figures of a load beside its control: the same VM and spinning threads in windows without traffic, scaled to the
/// same length. `roles` names every pCPU of the host.
pub fn of_load(traffic: &Load, control: &Load, roles: &[Role]) -> Figures {
    // Windows with traffic may be longer than those without.
    let times = traffic.total(|w| w.seconds) / control.total(|w| w.seconds);
    let times = if times.is_finite() { times } else { 1.0 };
    let pcpus: Vec<Pcpu> = (0u32..)
        .zip(roles)
        .map(|(pcpu, role)| Pcpu {
            pcpu,
            role: *role,
            exits: traffic.rows(pcpu),
            control: scaled(&control.rows(pcpu), times),
            control_spread: control.spread(pcpu).map(|rows| scaled(&rows, times)),
            timer_interrupts: TimerInterrupts {
                traffic: traffic.timer_interrupts(pcpu),
                control: (control.timer_interrupts(pcpu) as f64 * times).round() as u64,
            },
            control_sigma: control.device_exits_sigma(pcpu).map(|sigma| sigma * times.sqrt()),
            cpu_seconds: traffic.windows.iter().map(|w| w.cpu_seconds.get(pcpu as usize).copied()).sum(),
        })
        .collect();

    let bystander = match (traffic.median(|w| w.bystander_rate), control.median(|w| w.bystander_rate)) {
        (Some(with), Some(without)) if without > 0.0 => Some(Bystander { share: with / without }),
        _ => None,
    };
    // Without a bystander all of the application's time is the traffic's, idle polling included.
    let bystanders_part = if traffic.windows.iter().any(|w| w.application_is_filled) {
        None
    } else if traffic.windows.iter().all(|w| w.bystander_rate.is_none()) {
        Some(0.0)
    } else {
        bystander.map(|b| b.share)
    };
    let application_cpu_seconds =
        bystanders_part.and_then(|part| Some(cpu_seconds(&pcpus, &[Role::App])? * (1.0 - part)));
    // The wire is the peer's machine, not this one's. Unknown where the backend has no pCPU of its own.
    let io_cpu_seconds = pcpus
        .iter()
        .find(|p| p.role == Role::Backend)
        .and_then(|_| Some(application_cpu_seconds? + cpu_seconds(&pcpus, &[Role::Ivcpu, Role::Backend])?));
    let seconds = traffic.total(|w| w.seconds);
    let bytes = traffic.total(|w| w.bytes);
    let transactions = traffic.total(|w| w.transactions);
    let accepted = traffic.total(|w| w.accepted);
    let percentile = |of: fn(&Latency) -> f64| traffic.median(|w| w.latency_us.as_ref().map(of));
    let latency_us = match (percentile(|l| l.p50), percentile(|l| l.p99), percentile(|l| l.p999)) {
        (Some(p50), Some(p99), Some(p999)) => Some(Latency { p50, p99, p999 }),
        _ => None,
    };

    Figures {
        seconds: Some(seconds),
        mbps: (bytes > 0).then(|| mbps(bytes, seconds)),
        latency_us,
        transactions: latency_us.map(|_| transactions),
        packets: Some(traffic.total(|w| w.packets)),
        bytes: (bytes > 0).then_some(bytes),
        bytes_verified: traffic.bytes_verified,
        completions: traffic.total(|w| w.completions),
        kicks: traffic.total(|w| w.kicks),
        fifo: result::Fifo {
            entries: traffic.total(|w| w.fifo.map(|f| f.entries)),
            merged: traffic.total(|w| w.fifo.map(|f| f.merged)),
            wakeups: traffic.total(|w| w.fifo.map(|f| f.wakeups)),
            fallbacks: traffic.total(|w| w.fifo.map(|f| f.fallbacks)),
        },
        guest_irqs: traffic.irqs(|w| w.guest_irqs),
        receive_irqs: traffic.irqs(|w| w.receive_irqs),
        transmit_irqs: traffic.irqs(|w| w.transmit_irqs),
        device_interrupts: Some(accepted),
        polled: traffic.polled(),
        accepted_by_ivcpu: (accepted > 0 && roles.contains(&Role::Ivcpu))
            .then(|| traffic.total(|w| w.accepted_by_ivcpu) as f64 / accepted as f64),
        exits_total: Some(pcpus.iter().map(|p| p.exits.total()).sum()),
        kvm_exits: traffic.total(|w| w.kvm_exits),
        bystander,
        application_cpu_seconds,
        cpu_seconds_per_gb: io_cpu_seconds.filter(|_| bytes > 0).map(|s| s / (bytes as f64 / 1e9)),
        cpu_seconds_per_1k_transactions: io_cpu_seconds
            .filter(|_| transactions > 0)
            .map(|s| s / (transactions as f64 / 1e3)),
        repeats: u32::try_from(traffic.windows.len()).ok(),
        spread: statistics::spread(&traffic.rates()),
        pcpus,
    }
}

/// Counts as they would be over a span so many times as long.
fn scaled(rows: &Rows, times: f64) -> Rows {
    let mut result = Rows::default();
    for row in Row::ALL {
        result.add(row, (rows.count(row) as f64 * times).round() as u64);
    }
    result
}

/// Payload bytes over seconds, in Mbit/s.
pub fn mbps(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 * 8.0 / 1e6 / seconds
}

/// CPU seconds of all pCPUs with one of these roles.
fn cpu_seconds(pcpus: &[Pcpu], roles: &[Role]) -> Option<f64> {
    pcpus.iter().filter(|p| roles.contains(&p.role)).map(|p| p.cpu_seconds).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn external_intr(n: u64) -> Rows {
        let mut rows = Rows::default();
        rows.add(Row::ExternalIntr, n);
        rows
    }

    fn window(exits: [u64; 2], bytes: u64, bystander_rate: f64) -> Window {
        let exits = (0u32..).zip(exits).map(|(p, n)| (p, external_intr(n))).collect();
        Window {
            seconds: 2.0,
            exits,
            kvm_exits: Some(10),
            bytes,
            cpu_seconds: vec![2.0, 1.0],
            bystander_rate: Some(bystander_rate),
            ..Window::default()
        }
    }

    fn load(windows: Vec<Window>) -> Load {
        Load { windows, bytes_verified: Some(1) }
    }

    #[test]
    fn sums_windows_and_keeps_the_control_apart() {
        let traffic =
            load(vec![window([5, 100], 1_000_000_000, 80.0), window([7, 200], 1_000_000_000, 80.0)]);
        let control = load(vec![window([4, 0], 0, 100.0), window([6, 1], 0, 100.0)]);
        let f = of_load(&traffic, &control, &[Role::App, Role::Backend]);
        assert_eq!(f.seconds, Some(4.0));
        assert_eq!(f.mbps, Some(4000.0));
        assert_eq!(f.pcpus[0].exits.count(Row::ExternalIntr), 12);
        assert_eq!(f.pcpus[0].control.count(Row::ExternalIntr), 10);
        assert_eq!(f.control_spread(Row::ExternalIntr, Some(Role::App)), Some(4));
        assert_eq!(f.exits_total, Some(312));
        assert_eq!(f.kvm_exits, Some(20));
        assert_eq!(f.bystander, Some(Bystander { share: 0.8 }));
        // 4 s of the application's pCPU less the bystander's 80 %, and all 2 s of the backend's, for 2 GB.
        assert!((f.cpu_seconds_per_gb.unwrap() - (0.8 + 2.0) / 2.0).abs() < 1e-9);
        assert_eq!(f.spread, Some(0.0));
    }

    #[test]
    fn a_control_of_other_length_is_scaled() {
        let traffic = load(vec![window([500, 100], 1_000_000_000, 80.0); 4]);
        let control = load(vec![window([400, 10], 0, 100.0), window([420, 10], 0, 100.0)]);
        let f = of_load(&traffic, &control, &[Role::App, Role::Backend]);
        assert_eq!(f.pcpus[0].control.count(Row::ExternalIntr), 1640);
        assert_eq!(f.pcpus[1].control_sigma, Some(0.0));
        // One window errs by 14.1, four of them together by twice that.
        assert!((f.pcpus[0].control_sigma.unwrap() - 200f64.sqrt() * 2.0).abs() < 1e-9);
    }

    #[test]
    fn one_unknown_window_makes_the_sum_unknown() {
        let mut known = window([1, 1], 10, 1.0);
        known.kicks = Some(3);
        let load = load(vec![known, window([1, 1], 10, 1.0)]);
        let f = of_load(&load, &load, &[Role::App, Role::Backend]);
        assert_eq!(f.kicks, None);
        assert_eq!(f.guest_irqs, None);
    }

    #[test]
    fn a_backend_without_a_pcpu_of_its_own_has_no_price() {
        let load = load(vec![window([1, 1], 10, 1.0)]);
        let f = of_load(&load, &load, &[Role::App, Role::Wire]);
        assert_eq!(f.cpu_seconds_per_gb, None);
    }

    #[test]
    fn a_filled_pcpu_has_no_price_and_an_unaccompanied_one_is_billed_whole() {
        let mut alone = window([1, 1], 1_000_000_000, 1.0);
        alone.bystander_rate = None;
        let control = load(vec![window([1, 1], 0, 1.0)]);
        let roles = [Role::App, Role::Backend];
        let price = |window: Window| of_load(&load(vec![window]), &control, &roles).cpu_seconds_per_gb;
        assert_eq!(price(alone.clone()), Some(3.0));
        assert_eq!(price(Window { application_is_filled: true, ..alone }), None);
    }

    #[test]
    fn loads_of_several_runs_add_up() {
        let mut sum = Load::default();
        sum.extend(load(vec![window([1, 1], 10, 1.0)]));
        sum.extend(load(vec![window([2, 2], 20, 1.0)]));
        assert_eq!((sum.windows.len(), sum.bytes_verified), (2, Some(2)));
        sum.extend(Load { windows: vec![window([3, 3], 30, 1.0)], bytes_verified: None });
        assert_eq!(sum.bytes_verified, None);
    }
}
