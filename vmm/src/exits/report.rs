//! What a [`Snapshot`] says, for people (a table laid out as the paper's Table 1) and for programs (JSON).

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::reasons::{Row, Rows};
use super::snapshot::Snapshot;
use super::stats::Counters;

/// The vectors that Linux gives to devices on x86. Below are exceptions; above are IPIs and the APIC timer.
const DEVICE_VECTORS: std::ops::RangeInclusive<u64> = 0x20..=0xea;

/// Exits of one VM over one span of time. Unknown is `None`, never 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Exits on each pCPU that ran the VM; empty where tracing is not permitted.
    pub pcpus: Vec<PcpuExits>,
    /// Exits on all pCPUs; `None` where nothing was traced.
    pub total: Option<Rows>,
    /// The sum of all rows.
    pub exits_total: Option<u64>,
    /// KVM's own count over the same span.
    pub kvm_exits: Option<u64>,
    /// Each vCPU's thread, device interrupts and KVM counters.
    pub vcpus: Vec<VcpuReport>,
    /// What a reader must know about the figures: lost events, fallbacks, a software KVM.
    pub notes: Vec<String>,
}

/// One column of the table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PcpuExits {
    /// The physical CPU.
    pub pcpu: u32,
    /// Its exits.
    pub exits: Rows,
}

/// One vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuReport {
    /// Its number, which is its initial APIC id.
    pub vcpu: u32,
    /// Its thread's id and name, where they could be told.
    pub thread: Option<(i32, String)>,
    /// Device interrupts put into the guest on this vCPU. 0 where the hardware does it by itself (APICv, AVIC).
    pub device_injected: Option<u64>,
    /// Device interrupts accepted by this vCPU's APIC; more than injected where several merged before the guest took them.
    /// `None` when other VMs ran on the host: the kernel tells APIC ids, not VMs.
    pub device_accepted: Option<u64>,
    /// All interrupts injected, by vector.
    pub injected: BTreeMap<u64, u64>,
    /// All interrupts accepted, by vector.
    pub accepted: Option<BTreeMap<u64, u64>>,
    /// KVM's own counters, where they are readable per vCPU.
    pub kvm: Counters,
}

impl Snapshot {
    /// Makes the report.
    pub fn report(&self) -> Report {
        let total = (self.untraced.is_none() && !self.is_software_kvm()).then(|| self.total());
        Report {
            pcpus: self.pcpus().into_iter().map(|(pcpu, exits)| PcpuExits { pcpu, exits }).collect(),
            exits_total: total.as_ref().map(Rows::total),
            total,
            kvm_exits: self.kvm_exits(),
            vcpus: self.vcpus(),
            notes: self.notes(),
        }
    }

    /// A software KVM counts exits but never reports one.
    fn is_software_kvm(&self) -> bool {
        let too_many_to_have_been_missed = Some(100);
        self.untraced.is_none() && self.pcpus().is_empty() && self.kvm_exits > too_many_to_have_been_missed
    }

    fn vcpus(&self) -> Vec<VcpuReport> {
        let mut vcpus: BTreeMap<u32, VcpuReport> = BTreeMap::new();
        for thread in &self.threads {
            let report = vcpus.entry(thread.vcpu).or_default();
            report.thread = Some((thread.tid, thread.name.clone()));
            let injected = self.injected.range((thread.tid, 0)..=(thread.tid, u64::MAX));
            report.injected = injected.map(|(&(_, vector), &count)| (vector, count)).collect();
            report.device_injected = self.untraced.is_none().then(|| of_devices(&report.injected));
        }
        for (&vcpu, counters) in &self.kvm_vcpus {
            vcpus.entry(vcpu).or_default().kvm = counters.clone();
        }
        for (vcpu, report) in &mut vcpus {
            report.vcpu = *vcpu;
            report.accepted = self.accepted.as_ref().map(|all| {
                let apic_id = u64::from(*vcpu);
                all.range((apic_id, 0)..=(apic_id, u64::MAX))
                    .map(|(&(_, vector), &count)| (vector, count))
                    .collect()
            });
            report.device_accepted = report.accepted.as_ref().map(of_devices);
        }
        vcpus.into_values().collect()
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if let Some(reason) = &self.untraced {
            notes.push(format!(
                "KVM's own counters, no pCPUs and no APIC rows, because nothing may be traced: {reason}"
            ));
        } else if self.is_software_kvm() {
            notes.push(
                "this KVM never reports kvm_exit (a software KVM does not): only its own counters are known"
                    .into(),
            );
        }
        if self.dropped > 0 {
            notes.push(format!("{} events found no room in a histogram: the rows are too low", self.dropped));
        }
        if self.untraced.is_none() && self.accepted.is_none() {
            notes.push("other VMs run on this host, or none can be told apart: interrupts accepted by APIC id are left out".into());
        }
        notes
    }
}

fn of_devices(vectors: &BTreeMap<u64, u64>) -> u64 {
    vectors.range(DEVICE_VECTORS).map(|(_, count)| count).sum()
}

impl Report {
    /// How far the rows' sum is from KVM's own count, as a share of the latter.
    pub fn deviation(&self) -> Option<f64> {
        let (traced, kvm) = (self.exits_total?, self.kvm_exits?);
        Some(traced.abs_diff(kvm) as f64 / kvm.max(1) as f64)
    }

    /// Whether the rows add up to KVM's own count within 1 %; `None` if that is not known.
    pub fn agrees(&self) -> Option<bool> {
        self.deviation().map(|deviation| deviation <= 0.01)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(total) = self.total.as_ref().filter(|_| !self.pcpus.is_empty()) {
            self.fmt_table(f, total)?;
        }
        self.fmt_sum(f)?;
        for vcpu in &self.vcpus {
            writeln!(f, "{vcpu}")?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        Ok(())
    }
}

impl Report {
    fn fmt_table(&self, f: &mut fmt::Formatter<'_>, total: &Rows) -> fmt::Result {
        write!(f, "| {:<16} |", "exits")?;
        for column in &self.pcpus {
            write!(f, " {:>9} |", format!("pCPU{}", column.pcpu))?;
        }
        writeln!(f, " {:>9} |", "total")?;
        write!(f, "|{:-<18}|", "")?;
        for _ in 0..=self.pcpus.len() {
            write!(f, "{:->10}:|", "")?;
        }
        writeln!(f)?;
        for row in Row::ALL {
            write!(f, "| {row:<16} |")?;
            for column in &self.pcpus {
                write!(f, " {:>9} |", column.exits.count(row))?;
            }
            writeln!(f, " {:>9} |", total.count(row))?;
        }
        write!(f, "| {:<16} |", "sum")?;
        for column in &self.pcpus {
            write!(f, " {:>9} |", column.exits.total())?;
        }
        writeln!(f, " {:>9} |", total.total())
    }

    fn fmt_sum(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.exits_total, self.kvm_exits, self.deviation()) {
            (Some(traced), Some(kvm), Some(deviation)) => {
                let verdict = if self.agrees() == Some(true) { "within" } else { "NOT within" };
                writeln!(
                    f,
                    "rows {traced}, KVM's own count {kvm}: {:.2} % apart, {verdict} 1 %",
                    100.0 * deviation
                )
            }
            (None, Some(kvm), _) => writeln!(f, "exits, KVM's own count: {kvm}"),
            (Some(traced), None, _) => {
                writeln!(f, "rows {traced}; KVM's own count cannot be read (any more)")
            }
            _ => writeln!(f, "no count can be read (any more)"),
        }
    }
}

impl fmt::Display for VcpuReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vCPU{}", self.vcpu)?;
        if let Some((tid, name)) = &self.thread {
            write!(f, " ({name}, thread {tid})")?;
        }
        if let Some(injected) = self.device_injected {
            write!(f, ": device interrupts injected {injected}")?;
        }
        if let Some(accepted) = self.device_accepted {
            write!(f, ", accepted {accepted}")?;
        }
        if self.device_injected.is_none() {
            for (name, count) in &self.kvm {
                write!(f, " {name}={count}")?;
            }
        }
        Ok(())
    }
}
