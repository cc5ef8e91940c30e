//! From what the hardware and KVM report to the rows of the table: one pure function, [`rows`].
//!
//! `kvm:kvm_exit` says why a vCPU left the guest, but not *which* register an MSR write or a page fault was about, and
//! the rows need that: the same guest instruction ("end of interrupt") exits as an MSR write on one machine, as an APIC
//! access on another and as a nested page fault on a third. So three more counts are folded in:
//!
//! * `kvm:kvm_msr` has the register of every intercepted RDMSR and WRMSR. It splits the MSR exits into `APIC_ACCESS`,
//!   `IPI`, `TIMER` and what is left, `MSR`.
//! * `kvm:kvm_apic` is written for every emulated access to a local APIC register, whatever way it came. What of it
//!   `kvm_msr` does not explain came through the APIC page (xAPIC mode) or an accelerated write that trapped
//!   (APICv, AVIC). Those split the APIC exits and, where the hardware knows no APIC page of its own, are taken out of the
//!   page faults.
//! * `kvm:kvm_hypercall` tells the paravirtual "send IPI" call from the others.
//!
//! Nothing is ever invented: the other counts only *move* exits between rows, at most as many as there are, so the rows
//! always add up to the number of `kvm_exit` events. The SVM side is checked against recordings of a live host, the VMX
//! side only against hand-made counts that follow Intel's list of exit reasons.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a vCPU left the guest, in the words of the table. The first five are the rows of the paper's Table 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Row {
    /// Port I/O.
    IoInstruction,
    /// A host interrupt arrived while the guest ran, a device's, a timer's or another CPU's kick.
    ExternalIntr,
    /// The guest touched its local APIC, by page or by MSR: end of interrupt above all. IPIs and timers stand apart.
    ApicAccess,
    /// The guest's CPU went idle.
    Hlt,
    /// A guest-physical address without a mapping: memory not yet backed, and every emulated MMIO access.
    EptViolation,
    /// The guest sent an interrupt to another vCPU: a write to the ICR, or the paravirtual call that stands for it.
    Ipi,
    /// The guest set a timer (TSC deadline or APIC timer), or the VMX preemption timer that carries it ran out.
    Timer,
    /// Any other model-specific register.
    Msr,
    /// A spinning guest was stopped by pause-loop exiting.
    Pause,
    /// The guest became able to take an interrupt that KVM held ready.
    InterruptWindow,
    /// CPUID.
    Cpuid,
    /// A paravirtual call other than "send IPI".
    Hypercall,
    /// All that is left: control registers, exceptions, WBINVD, XSETBV, ...
    Other,
}

impl Row {
    /// Every row, in the order of the table.
    pub const ALL: [Row; 13] = [
        Row::IoInstruction,
        Row::ExternalIntr,
        Row::ApicAccess,
        Row::Hlt,
        Row::EptViolation,
        Row::Ipi,
        Row::Timer,
        Row::Msr,
        Row::Pause,
        Row::InterruptWindow,
        Row::Cpuid,
        Row::Hypercall,
        Row::Other,
    ];

    /// The row's name, in tables and in result files alike.
    pub fn name(self) -> &'static str {
        match self {
            Row::IoInstruction => "IO_INSTRUCTION",
            Row::ExternalIntr => "EXTERNAL_INTR",
            Row::ApicAccess => "APIC_ACCESS",
            Row::Hlt => "HLT",
            Row::EptViolation => "EPT_VIOLATION",
            Row::Ipi => "IPI",
            Row::Timer => "TIMER",
            Row::Msr => "MSR",
            Row::Pause => "PAUSE",
            Row::InterruptWindow => "INTERRUPT_WINDOW",
            Row::Cpuid => "CPUID",
            Row::Hypercall => "HYPERCALL",
            Row::Other => "OTHER",
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Exits by row. Every row is present, so a result file has the same fields whatever the guest did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rows(BTreeMap<Row, u64>);

impl Default for Rows {
    fn default() -> Self {
        Rows(Row::ALL.into_iter().map(|row| (row, 0)).collect())
    }
}

impl Rows {
    /// The exits of one row.
    pub fn count(&self, row: Row) -> u64 {
        self.0.get(&row).copied().unwrap_or(0)
    }

    /// The exits of all rows.
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }

    /// Adds `count` exits to one row.
    pub fn add(&mut self, row: Row, count: u64) {
        *self.0.entry(row).or_insert(0) += count;
    }

    /// Moves `count` exits from one row to another, as many as there are.
    fn shift(&mut self, from: Row, to: Row, count: u64) {
        let moved = count.min(self.count(from));
        if let Some(left) = self.0.get_mut(&from) {
            *left -= moved;
        }
        self.add(to, moved);
    }
}

impl std::ops::AddAssign<&Rows> for Rows {
    fn add_assign(&mut self, other: &Rows) {
        for (&row, &count) in &other.0 {
            self.add(row, count);
        }
    }
}

/// What one pCPU's tracepoints counted, before it is mapped to rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// `kvm_exit` by (instruction set: 1 is VMX, 2 is SVM; exit reason).
    pub exits: BTreeMap<(u64, u64), u64>,
    /// `kvm_msr` by (register, 1 for a write).
    pub msrs: BTreeMap<(u64, u64), u64>,
    /// `kvm_apic` by (register's offset in the APIC page, 1 for a write).
    pub apic: BTreeMap<(u64, u64), u64>,
    /// `kvm_hypercall` by call number.
    pub hypercalls: BTreeMap<u64, u64>,
}

const VMX: u64 = 1;
const SVM: u64 = 2;
const WRITE: u64 = 1;

const SVM_AVIC_INCOMPLETE_IPI: u64 = 0x401;
/// The paravirtual call that sends an IPI to a set of vCPUs.
const KVM_HC_SEND_IPI: u64 = 10;

const MSR_TSC_DEADLINE: u64 = 0x6e0;
const X2APIC_MSRS: std::ops::RangeInclusive<u64> = 0x800..=0x8ff;
const HYPERV_MSR_EOI: u64 = 0x4000_0070;
const HYPERV_MSR_ICR: u64 = 0x4000_0071;
const HYPERV_MSR_TPR: u64 = 0x4000_0072;
/// Configuration and count of the four synthetic timers.
const HYPERV_MSR_STIMERS: std::ops::RangeInclusive<u64> = 0x4000_00b0..=0x4000_00b7;

const APIC_TPR: u64 = 0x80;
const APIC_EOI: u64 = 0xb0;
const APIC_ICR: u64 = 0x300;
const APIC_LVT_TIMER: u64 = 0x320;
const APIC_TIMER_INITIAL_COUNT: u64 = 0x380;
const APIC_TIMER_DIVIDE: u64 = 0x3e0;
const APIC_SELF_IPI: u64 = 0x3f0;

/// A `hist` filter that keeps of `kvm_msr` what [`rows`] looks at.
pub(super) const MSR_FILTER: &str = "(ecx >= 0x800 && ecx <= 0x8ff) || ecx == 0x6e0 || \
     (ecx >= 0x40000070 && ecx <= 0x40000072) || (ecx >= 0x400000b0 && ecx <= 0x400000b7)";

/// One pCPU's exits by row; their sum is the number of `kvm_exit` events.
pub fn rows(events: &Events) -> Rows {
    let mut rows = Rows::default();
    for (&(isa, reason), &count) in &events.exits {
        rows.add(row_of_exit(isa, reason), count);
    }
    let trapped_ipis = events.exits.get(&(SVM, SVM_AVIC_INCOMPLETE_IPI)).copied().unwrap_or(0);
    let mut apic_exits = rows.count(Row::ApicAccess);

    for (&(register, write), &count) in &events.msrs {
        if let Some(row) = row_of_msr(register, write) {
            rows.shift(Row::Msr, row, count);
        }
    }
    let send_ipi_calls = events.hypercalls.get(&KVM_HC_SEND_IPI).copied().unwrap_or(0);
    rows.shift(Row::Hypercall, Row::Ipi, send_ipi_calls);

    let mut by_page = apic_accesses_without_msr(events);
    if let Some(ipis) = by_page.get_mut(&Row::Ipi) {
        *ipis = ipis.saturating_sub(trapped_ipis);
    }
    for (row, count) in by_page {
        let own_exit = count.min(apic_exits);
        apic_exits -= own_exit;
        rows.shift(Row::ApicAccess, row, own_exit);
        rows.shift(Row::EptViolation, row, count - own_exit);
    }
    rows
}

/// APIC register accesses that came by no MSR, by row.
fn apic_accesses_without_msr(events: &Events) -> BTreeMap<Row, u64> {
    let mut by_msr: BTreeMap<(u64, u64), u64> = BTreeMap::new();
    for (&(msr, write), &count) in &events.msrs {
        if let Some(register) = apic_register_of_msr(msr) {
            *by_msr.entry((register, write)).or_insert(0) += count;
        }
    }
    let mut by_row = BTreeMap::new();
    for (&(register, write), &count) in &events.apic {
        let explained = by_msr.get(&(register, write)).copied().unwrap_or(0);
        *by_row.entry(row_of_apic_register(register, write)).or_insert(0) += count.saturating_sub(explained);
    }
    by_row
}

fn row_of_exit(isa: u64, reason: u64) -> Row {
    match isa {
        // The low 16 bits; above them are flags (enclave, bus lock, failed entry).
        VMX => match reason & 0xffff {
            1 => Row::ExternalIntr,
            7 => Row::InterruptWindow,
            10 => Row::Cpuid,
            12 => Row::Hlt,
            18 => Row::Hypercall,
            30 => Row::IoInstruction,
            // RDMSR, WRMSR and their forms with an immediate operand.
            31 | 32 | 84 | 85 => Row::Msr,
            40 => Row::Pause,
            // TPR below threshold, APIC access, EOI induced, APIC write.
            43 | 44 | 45 | 56 => Row::ApicAccess,
            // Violation, and misconfiguration: KVM's mark for emulated MMIO.
            48 | 49 => Row::EptViolation,
            52 => Row::Timer,
            _ => Row::Other,
        },
        SVM => match reason {
            // CR8 is the APIC's task priority.
            0x08 | 0x18 => Row::ApicAccess,
            0x60 => Row::ExternalIntr,
            0x64 => Row::InterruptWindow,
            0x72 => Row::Cpuid,
            0x77 => Row::Pause,
            0x78 | 0xa6 => Row::Hlt,
            0x7b => Row::IoInstruction,
            0x7c => Row::Msr,
            0x81 => Row::Hypercall,
            0x400 => Row::EptViolation,
            SVM_AVIC_INCOMPLETE_IPI => Row::Ipi,
            // Unaccelerated AVIC access.
            0x402 => Row::ApicAccess,
            _ => Row::Other,
        },
        _ => Row::Other,
    }
}

fn row_of_msr(msr: u64, write: u64) -> Option<Row> {
    if write == WRITE && (msr == MSR_TSC_DEADLINE || HYPERV_MSR_STIMERS.contains(&msr)) {
        return Some(Row::Timer);
    }
    apic_register_of_msr(msr).map(|register| row_of_apic_register(register, write))
}

/// The APIC register that an MSR stands for, as its offset in the APIC page.
fn apic_register_of_msr(msr: u64) -> Option<u64> {
    match msr {
        HYPERV_MSR_EOI => Some(APIC_EOI),
        HYPERV_MSR_ICR => Some(APIC_ICR),
        HYPERV_MSR_TPR => Some(APIC_TPR),
        msr if X2APIC_MSRS.contains(&msr) => Some((msr - X2APIC_MSRS.start()) << 4),
        _ => None,
    }
}

fn row_of_apic_register(register: u64, write: u64) -> Row {
    match (register, write) {
        (APIC_ICR | APIC_SELF_IPI, WRITE) => Row::Ipi,
        (APIC_LVT_TIMER | APIC_TIMER_INITIAL_COUNT | APIC_TIMER_DIVIDE, WRITE) => Row::Timer,
        _ => Row::ApicAccess,
    }
}

#[cfg(test)]
mod tests;
