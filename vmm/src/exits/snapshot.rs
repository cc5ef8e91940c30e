//! What was counted up to one moment, and the difference of two such moments.

use std::collections::BTreeMap;
use std::ops::Sub;

use super::hist::Hist;
use super::process::VcpuThread;
use super::reasons::{Events, Rows, rows};
use super::stats::Counters;
use super::trace::Counts;

/// Everything counted since [`Counter::start`](super::Counter::start). Subtract an earlier snapshot to get a window:
///
/// ```no_run
/// # fn main() -> Result<(), ivcpu_vmm::exits::Error> {
/// let counter = ivcpu_vmm::exits::Counter::start(4711)?;
/// let before = counter.snapshot()?;
/// std::thread::sleep(std::time::Duration::from_secs(10));
/// let window = &counter.snapshot()? - &before;
/// println!("{}", window.report());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Tracepoint counts of each pCPU; empty where tracing is not permitted.
    pub(super) pcpus: BTreeMap<u64, Events>,
    /// Interrupts put into the guest, by thread and vector.
    pub(super) injected: BTreeMap<(i32, u64), u64>,
    /// Interrupts accepted for a vCPU, by APIC id and vector; `None` where other VMs were counted along.
    pub(super) accepted: Option<BTreeMap<(u64, u64), u64>>,
    /// The vCPUs' threads, as last seen.
    pub(super) threads: Vec<VcpuThread>,
    /// KVM's own count of exits; `None` if unreadable or the VM has ended.
    pub(super) kvm_exits: Option<u64>,
    /// KVM's own counters of each vCPU.
    pub(super) kvm_vcpus: BTreeMap<u32, Counters>,
    /// Events that found no room in a histogram.
    pub(super) dropped: u64,
    /// Why nothing is traced, if so.
    pub(super) untraced: Option<String>,
}

impl Snapshot {
    /// Exits by row of each pCPU that ran the VM.
    pub fn pcpus(&self) -> BTreeMap<u32, Rows> {
        self.pcpus
            .iter()
            .map(|(&pcpu, events)| (u32::try_from(pcpu).unwrap_or(u32::MAX), rows(events)))
            .filter(|(_, rows)| rows.total() > 0)
            .collect()
    }

    /// Exits by row on all pCPUs.
    pub fn total(&self) -> Rows {
        self.pcpus.values().fold(Rows::default(), |mut total, events| {
            total += &rows(events);
            total
        })
    }

    /// KVM's own count of exits over the same span: taken as the mean of a reading before and one after the traced count.
    pub fn kvm_exits(&self) -> Option<u64> {
        self.kvm_exits
    }

    pub(super) fn take_counts(&mut self, counts: Counts, alone: bool) {
        self.dropped = counts.dropped();
        for (pcpu, [isa, reason], count) in split(counts.exits) {
            self.pcpus.entry(pcpu).or_default().exits.insert((isa, reason), count);
        }
        for (pcpu, [register, write], count) in split(counts.msrs) {
            self.pcpus.entry(pcpu).or_default().msrs.insert((register, write), count);
        }
        for (pcpu, [register, write], count) in split(counts.apic) {
            self.pcpus.entry(pcpu).or_default().apic.insert((register, write), count);
        }
        for (pcpu, [number], count) in split(counts.hypercalls) {
            self.pcpus.entry(pcpu).or_default().hypercalls.insert(number, count);
        }
        for (tid, [vector], count) in split(counts.injected) {
            self.injected.insert((i32::try_from(tid).unwrap_or(0), vector), count);
        }
        self.accepted = alone.then(|| {
            split(counts.accepted).map(|(apic_id, [vector], count)| ((apic_id, vector), count)).collect()
        });
    }
}

/// The entries of a histogram as (first key, other keys, hits).
fn split<const OTHERS: usize>(hist: Hist) -> impl Iterator<Item = (u64, [u64; OTHERS], u64)> {
    hist.counts.into_iter().filter_map(|(keys, count)| {
        let (&first, others) = keys.split_first()?;
        Some((first, others.try_into().ok()?, count))
    })
}

impl Sub for &Snapshot {
    type Output = Snapshot;

    /// What was counted between `earlier` and `self`.
    fn sub(self, earlier: &Snapshot) -> Snapshot {
        let none = Events::default();
        let pcpus = self.pcpus.iter().map(|(pcpu, events)| {
            let earlier = earlier.pcpus.get(pcpu).unwrap_or(&none);
            let window = Events {
                exits: difference(&events.exits, &earlier.exits),
                msrs: difference(&events.msrs, &earlier.msrs),
                apic: difference(&events.apic, &earlier.apic),
                hypercalls: difference(&events.hypercalls, &earlier.hypercalls),
            };
            (*pcpu, window)
        });
        let no_counters = Counters::new();
        let kvm_vcpus = self.kvm_vcpus.iter().map(|(vcpu, counters)| {
            (*vcpu, difference(counters, earlier.kvm_vcpus.get(vcpu).unwrap_or(&no_counters)))
        });
        Snapshot {
            pcpus: pcpus.collect(),
            injected: difference(&self.injected, &earlier.injected),
            accepted: self
                .accepted
                .as_ref()
                .zip(earlier.accepted.as_ref())
                .map(|(now, then)| difference(now, then)),
            threads: if self.threads.is_empty() { earlier.threads.clone() } else { self.threads.clone() },
            kvm_exits: self.kvm_exits.zip(earlier.kvm_exits).map(|(now, then)| now.saturating_sub(then)),
            kvm_vcpus: kvm_vcpus.collect(),
            dropped: self.dropped.saturating_sub(earlier.dropped),
            untraced: self.untraced.clone(),
        }
    }
}

/// Counts only grow, so what is in `earlier` is in `now`.
fn difference<K: Ord + Clone>(now: &BTreeMap<K, u64>, earlier: &BTreeMap<K, u64>) -> BTreeMap<K, u64> {
    now.iter()
        .map(|(key, &count)| (key.clone(), count.saturating_sub(earlier.get(key).copied().unwrap_or(0))))
        .filter(|&(_, count)| count > 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::reasons::Row;
    use super::super::trace;
    use super::*;

    fn snapshot(halts: u64, kvm_exits: Option<u64>) -> Snapshot {
        let events = Events { exits: [((2, 0x78), halts)].into(), ..Events::default() };
        Snapshot {
            pcpus: [(3, events)].into(),
            injected: [((77, 0x22), halts)].into(),
            accepted: Some([((0, 0x22), 2 * halts), ((0, 0xec), halts)].into()),
            threads: vec![VcpuThread { vcpu: 0, tid: 77, name: "vcpu0".into() }],
            kvm_exits,
            ..Snapshot::default()
        }
    }

    #[test]
    fn a_window_is_the_difference_of_two_snapshots() {
        let window = &snapshot(150, Some(160)) - &snapshot(50, Some(60));
        assert_eq!(window.pcpus()[&3].count(Row::Hlt), 100);
        assert_eq!(window.kvm_exits(), Some(100));
        let report = window.report();
        assert_eq!(
            (report.vcpus[0].device_injected, report.vcpus[0].device_accepted),
            (Some(100), Some(200))
        );
        assert_eq!(report.agrees(), Some(true));
        assert!(report.notes.is_empty());
    }

    /// One file of a recording, read with the keys that the counter asks for.
    macro_rules! recorded {
        ($event:literal, $counted:ident) => {
            Hist::parse(include_str!(concat!("fixtures/x2apic/", $event, ".hist")), trace::$counted.keys)
                .unwrap()
        };
    }

    #[test]
    fn a_recorded_vm_is_reported_as_it_was() {
        let counts = Counts {
            exits: recorded!("kvm_exit", EXITS),
            msrs: recorded!("kvm_msr", MSRS),
            apic: recorded!("kvm_apic", APIC),
            hypercalls: recorded!("kvm_hypercall", HYPERCALLS),
            injected: recorded!("kvm_inj_virq", INJECTED),
            accepted: recorded!("kvm_apic_accept_irq", ACCEPTED),
        };
        let threads = [(0, 217), (1, 218), (2, 219)].map(|(vcpu, tid)| VcpuThread {
            vcpu,
            tid,
            name: format!("CPU {vcpu}/KVM"),
        });
        let mut vm = Snapshot { threads: threads.into(), kvm_exits: Some(6379), ..Snapshot::default() };
        vm.take_counts(counts, true);
        let report = vm.report();
        assert_eq!(report.exits_total, Some(6379));
        assert_eq!(report.pcpus.iter().map(|column| column.exits.total()).sum::<u64>(), 6379);
        let injected: Vec<_> = report.vcpus.iter().map(|vcpu| vcpu.device_injected).collect();
        assert_eq!(injected, [Some(0), Some(657 + 884), Some(0)]);
    }

    #[test]
    fn a_pcpu_that_did_not_run_the_vm_in_the_window_has_no_column() {
        let window = &snapshot(50, None) - &snapshot(50, None);
        assert!(window.pcpus().is_empty());
        assert_eq!(window.report().kvm_exits, None);
    }

    #[test]
    fn rows_that_miss_exits_are_called_out() {
        let report = snapshot(98, Some(100)).report();
        assert_eq!(report.agrees(), Some(false));
        assert!(report.to_string().contains("NOT within 1 %"), "{report}");
    }

    #[test]
    fn a_kvm_that_never_reports_exits_is_called_out() {
        let software =
            Snapshot { kvm_exits: Some(1000), accepted: Some(BTreeMap::new()), ..Snapshot::default() };
        let report = software.report();
        assert_eq!((report.total, report.exits_total), (None, None));
        assert!(report.notes[0].contains("software KVM"));
    }

    #[test]
    fn without_tracing_the_rows_are_unknown_and_not_zero() {
        let untraced = Snapshot {
            kvm_exits: Some(100),
            kvm_vcpus: [(0, [("io_exits".to_owned(), 7)].into())].into(),
            untraced: Some("no permission".into()),
            ..Snapshot::default()
        };
        let report = untraced.report();
        assert_eq!((report.exits_total, report.agrees()), (None, None));
        assert!(report.to_string().contains("io_exits=7"), "{report}");
    }

    #[test]
    fn a_report_survives_json() {
        let report = snapshot(10, Some(10)).report();
        let json = serde_json::to_string(&report).unwrap();
        assert!(json.contains(r#""pcpu":3,"exits":{"IO_INSTRUCTION":0,"#), "{json}");
        assert_eq!(serde_json::from_str::<super::super::Report>(&json).unwrap(), report);
    }
}
