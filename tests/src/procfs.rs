//! What the running kernel counts: interrupts of NICs and CPU times.

use std::fs;

use anyhow::Context;

use serde::{Deserialize, Serialize};

/// `/proc/stat` counts in hundredths of a second on every kernel there is.
const TICKS_PER_SECOND: f64 = 100.0;

/// The interrupts of virtio devices and of network interfaces.
pub fn nic_interrupts() -> anyhow::Result<Vec<Interrupt>> {
    let text = fs::read_to_string("/proc/interrupts").context("reading /proc/interrupts")?;
    Ok(parse_interrupts(&text, |name| name.starts_with("virtio") || name.starts_with("eth")))
}

/// The interrupts of virtio devices in another kernel's `/proc/interrupts`.
pub fn virtio_interrupts(text: &str) -> Vec<Interrupt> {
    parse_interrupts(text, |name| name.starts_with("virtio"))
}

/// The interrupts of functions that are passed through to a VM.
pub fn passthrough_interrupts() -> anyhow::Result<Vec<Interrupt>> {
    let text = fs::read_to_string("/proc/interrupts").context("reading /proc/interrupts")?;
    Ok(parse_interrupts(&text, |name| name.starts_with("vfio-")))
}

/// Interrupts of each CPU's own timer.
pub fn timer_interrupts() -> anyhow::Result<Vec<u64>> {
    let text = fs::read_to_string("/proc/interrupts").context("reading /proc/interrupts")?;
    parse_timer_interrupts(&text).context("/proc/interrupts has no local timer")
}

fn parse_timer_interrupts(text: &str) -> Option<Vec<u64>> {
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix("LOC:"))?;
    Some(line.split_whitespace().map_while(|word| word.parse().ok()).collect())
}

/// Times of each CPU.
pub fn cpu_times() -> anyhow::Result<Vec<CpuTime>> {
    let text = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
    Ok(parse_cpu_times(&text))
}

/// One line of `/proc/interrupts`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interrupt {
    /// Such as `virtio0-input.0` or `eth0-rx-0`.
    pub name: String,
    /// Taken so far by each CPU.
    pub taken: Vec<u64>,
}

impl Interrupt {
    /// Whether it belongs to a queue of a NIC or a disk (not to a configuration change).
    pub fn is_queue(&self) -> bool {
        self.is_receive()
            || self.is_transmit()
            || self.name.contains("virtqueues")
            || self.name.contains("-req.")
    }

    /// Whether it belongs to receive queues alone.
    pub fn is_receive(&self) -> bool {
        self.name.contains("input") || self.name.contains("-rx-")
    }

    /// Whether it belongs to transmit queues alone.
    pub fn is_transmit(&self) -> bool {
        self.name.contains("output") || self.name.contains("-tx-")
    }
}

/// Seconds one CPU has spent, as `/proc/stat` has it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CpuTime {
    /// In programs.
    pub user: f64,
    /// In the kernel, without interrupts.
    pub system: f64,
    /// In hard interrupts.
    pub irq: f64,
    /// In soft interrupts.
    pub softirq: f64,
    /// Idle.
    pub idle: f64,
    /// Wanted to run but the host ran something else.
    pub steal: f64,
}

fn parse_interrupts(text: &str, is_chosen: fn(&str) -> bool) -> Vec<Interrupt> {
    let mut lines = text.lines();
    let cpus = lines.next().unwrap_or_default().split_whitespace().count();
    let interrupts = lines.filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let mut words = rest.split_whitespace();
        let taken: Vec<u64> = words.by_ref().take(cpus).map_while(|word| word.parse().ok()).collect();
        // Behind the counts: controller, hardware number, trigger, and the name.
        let name = words.last()?;
        (taken.len() == cpus && is_chosen(name)).then(|| Interrupt { name: name.into(), taken })
    });
    interrupts.collect()
}

fn parse_cpu_times(text: &str) -> Vec<CpuTime> {
    let lines = text.lines().filter(|line| line.starts_with("cpu") && !line.starts_with("cpu "));
    lines
        .map(|line| {
            let ticks: Vec<f64> =
                line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
            let at = |index: usize| ticks.get(index).copied().unwrap_or(0.0) / TICKS_PER_SECOND;
            CpuTime {
                user: at(0) + at(1),
                system: at(2),
                idle: at(3) + at(4),
                irq: at(5),
                softirq: at(6),
                steal: at(7),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timer_interrupts_of_each_cpu() {
        let text = "   CPU0 CPU1\n 24: 1 2 PCI-MSI eth0\nLOC:   12   7   Local timer interrupts\n";
        assert_eq!(parse_timer_interrupts(text), Some(vec![12, 7]));
        assert_eq!(parse_timer_interrupts("  CPU0\n"), None);
    }

    #[test]
    fn interrupts_of_nics_only() {
        let text = "           CPU0       CPU1\n\
                    \x20 4:        861          0   IO-APIC   4-edge      ttyS0\n\
                    \x2026:          0          7   PCI-MSIX-0000:00:02.0   0-edge      virtio0-config\n\
                    \x2027:       1234         56   PCI-MSIX-0000:00:02.0   1-edge      virtio0-input.0\n\
                    NMI:          0          0   Non-maskable interrupts\n\
                    ERR:          0\n";
        let interrupts = parse_interrupts(text, |name| name.starts_with("virtio"));
        let names: Vec<_> = interrupts.iter().map(|interrupt| interrupt.name.as_str()).collect();
        assert_eq!(names, ["virtio0-config", "virtio0-input.0"]);
        assert_eq!(interrupts[1].taken, [1234, 56]);
        assert!(interrupts[1].is_queue() && !interrupts[0].is_queue());
    }

    #[test]
    fn cpu_times_without_the_sum() {
        let text = "cpu  9 9 9 9\ncpu0 100 50 25 1000 0 3 7 11 0 0\nintr 1\n";
        let expected = CpuTime { user: 1.5, system: 0.25, irq: 0.03, softirq: 0.07, idle: 10.0, steal: 0.11 };
        assert_eq!(parse_cpu_times(text), [expected]);
    }
}
