//! From measured windows to the figures of a case. Pure arithmetic: what a share, a control or a price means is
//! decided here and nowhere else.

use std::collections::BTreeMap;

use ivcpu_vmm::exits::{Row, Rows};

use crate::result::{self, Bystander, Figures, GuestIrqs, Latency, Pcpu, Role};

/// What one window saw: differences between two samples.
#[derive(Clone, Debug, Default)]
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
    /// TCP payload bytes.
    pub bytes: u64,
    /// Round trips.
    pub transactions: u64,
    /// Median round trip in microseconds.
    pub p50_us: Option<f64>,
    /// Notifications that virtio's suppression rule asked for; none where the backend does not tell.
    pub completions: Option<u64>,
    /// Kicks that reached the backend; none where it does not tell.
    pub kicks: Option<u64>,
    /// CPU seconds by pCPU; none where they cannot be had.
    pub cpu_seconds: Option<Vec<f64>>,
}

/// Consecutive windows of one steady load, and what is only known around them.
#[derive(Clone, Debug, Default)]
pub struct Load {
    /// The windows, equally long.
    pub windows: Vec<Window>,
    /// Bystander iterations per CPU second of the application pCPUs.
    pub bystander_rate: Option<f64>,
    /// The NIC's interrupts as the guest counted them.
    pub guest_irqs: Option<GuestIrqs>,
    /// Round trips of the whole load.
    pub latency: Option<Latency>,
    /// Bytes the receiving end compared with what was sent.
    pub bytes_verified: Option<u64>,
}

fn pcpu_rows(windows: &[Window], pcpu: u32) -> Rows {
    let mut sum = Rows::default();
    windows.iter().filter_map(|w| w.exits.get(&pcpu)).for_each(|rows| sum += rows);
    sum
}

/// Largest less smallest window, a row, times the number of windows: the spread of the summed figure if all windows
/// erred the same way.
fn pcpu_spread(windows: &[Window], pcpu: u32) -> Rows {
    let mut spread = Rows::default();
    for row in Row::ALL {
        let counts = windows.iter().map(|w| w.exits.get(&pcpu).map_or(0, |rows| rows.count(row)));
        let (low, high) = counts.fold((u64::MAX, 0), |(l, h), n| (l.min(n), h.max(n)));
        spread.add(row, high.saturating_sub(low) * windows.len() as u64);
    }
    spread
}

fn total_cpu_seconds(windows: &[Window], pcpu: u32) -> Option<f64> {
    windows.iter().map(|w| w.cpu_seconds.as_ref()?.get(pcpu as usize).copied()).sum()
}

fn total<T: std::iter::Sum>(windows: &[Window], figure: impl Fn(&Window) -> T) -> T {
    windows.iter().map(figure).sum()
}

/// Figures of a load beside its control: the same VM and spinning threads over as many equally long windows without
/// traffic. `roles` names every pCPU of the host.
pub fn of_load(traffic: &Load, control: &Load, roles: &[Role]) -> Figures {
    let windows = &traffic.windows;
    let pcpus: Vec<Pcpu> = (0u32..)
        .zip(roles)
        .map(|(pcpu, role)| Pcpu {
            pcpu,
            role: *role,
            exits: pcpu_rows(windows, pcpu),
            control: pcpu_rows(&control.windows, pcpu),
            control_spread: pcpu_spread(&control.windows, pcpu),
            cpu_seconds: total_cpu_seconds(windows, pcpu),
        })
        .collect();

    let bystander = match (traffic.bystander_rate, control.bystander_rate) {
        (Some(with), Some(without)) if without > 0.0 => Some(Bystander { share: with / without }),
        _ => None,
    };
    let io_cpu_seconds = io_cpu_seconds(&pcpus, bystander);
    let seconds = total(windows, |w| w.seconds);
    let bytes = total(windows, |w| w.bytes);
    let transactions = total(windows, |w| w.transactions);
    let accepted = total(windows, |w| w.accepted);
    let rates: Vec<f64> = windows.iter().map(|w| mbps(w.bytes, w.seconds)).collect();
    let medians: Vec<f64> = windows.iter().filter_map(|w| w.p50_us).collect();

    Figures {
        seconds: Some(seconds),
        mbps: (bytes > 0).then(|| mbps(bytes, seconds)),
        latency_us: traffic.latency,
        transactions: traffic.latency.map(|_| transactions),
        packets: Some(total(windows, |w| w.packets)),
        bytes: (bytes > 0).then_some(bytes),
        bytes_verified: traffic.bytes_verified,
        completions: total(windows, |w| w.completions),
        kicks: total(windows, |w| w.kicks),
        fifo: result::Fifo::default(),
        guest_irqs: traffic.guest_irqs,
        accepted_by_ivcpu: (accepted > 0 && roles.contains(&Role::Ivcpu))
            .then(|| total(windows, |w| w.accepted_by_ivcpu) as f64 / accepted as f64),
        exits_total: Some(pcpus.iter().map(|p| p.exits.total()).sum()),
        kvm_exits: total(windows, |w| w.kvm_exits),
        bystander,
        cpu_seconds_per_gb: io_cpu_seconds.filter(|_| bytes > 0).map(|s| s / (bytes as f64 / 1e9)),
        cpu_seconds_per_1k_transactions: io_cpu_seconds
            .filter(|_| transactions > 0)
            .map(|s| s / (transactions as f64 / 1e3)),
        repeats: u32::try_from(windows.len()).ok(),
        spread: if traffic.latency.is_some() { result::spread(&medians) } else { result::spread(&rates) },
        pcpus,
    }
}

/// Payload bytes over seconds, in Mbit/s.
pub fn mbps(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 * 8.0 / 1e6 / seconds
}

/// CPU seconds that I/O cost: all of the IVCPU's and the backend's pCPUs, and of the application's what the bystander
/// did not get. The wire is the peer's machine, not this one's.
fn io_cpu_seconds(pcpus: &[Pcpu], bystander: Option<Bystander>) -> Option<f64> {
    let bystander = bystander?.share;
    pcpus
        .iter()
        .map(|p| {
            let seconds = p.cpu_seconds?;
            Some(match p.role {
                Role::App => seconds * (1.0 - bystander),
                Role::Ivcpu | Role::Backend => seconds,
                Role::Wire | Role::Other => 0.0,
            })
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn external_intr(n: u64) -> Rows {
        let mut rows = Rows::default();
        rows.add(Row::ExternalIntr, n);
        rows
    }

    fn window(exits: [u64; 2], bytes: u64) -> Window {
        let exits = (0u32..).zip(exits).map(|(p, n)| (p, external_intr(n))).collect();
        Window {
            seconds: 2.0,
            exits,
            kvm_exits: Some(10),
            bytes,
            cpu_seconds: Some(vec![2.0, 1.0]),
            ..Window::default()
        }
    }

    #[test]
    fn sums_windows_and_keeps_the_control_apart() {
        let traffic = Load {
            windows: vec![window([5, 100], 1_000_000_000), window([7, 200], 1_000_000_000)],
            bystander_rate: Some(80.0),
            ..Load::default()
        };
        let control = Load {
            windows: vec![window([4, 0], 0), window([6, 1], 0)],
            bystander_rate: Some(100.0),
            ..Load::default()
        };
        let f = of_load(&traffic, &control, &[Role::App, Role::Ivcpu]);
        assert_eq!(f.seconds, Some(4.0));
        assert_eq!(f.mbps, Some(4000.0));
        assert_eq!(f.pcpus[0].exits.count(Row::ExternalIntr), 12);
        assert_eq!(f.pcpus[0].control.count(Row::ExternalIntr), 10);
        assert_eq!(f.pcpus[0].control_spread.count(Row::ExternalIntr), 4);
        assert_eq!(f.exits_total, Some(312));
        assert_eq!(f.kvm_exits, Some(20));
        assert_eq!(f.bystander, Some(Bystander { share: 0.8 }));
        // 4 s of the application's pCPU less the bystander's 80 %, and all 2 s of the IVCPU's, for 2 GB.
        assert!((f.cpu_seconds_per_gb.unwrap() - (0.8 + 2.0) / 2.0).abs() < 1e-9);
        assert_eq!(f.spread, Some(0.0));
    }

    #[test]
    fn one_unknown_window_makes_the_sum_unknown() {
        let mut known = window([1, 1], 10);
        known.kicks = Some(3);
        let load = Load { windows: vec![known, window([1, 1], 10)], ..Load::default() };
        let f = of_load(&load, &load, &[Role::App, Role::Ivcpu]);
        assert_eq!(f.kicks, None);
        assert_eq!(f.bystander, None);
        assert_eq!(f.cpu_seconds_per_gb, None);
    }
}
