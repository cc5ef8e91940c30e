use proptest::strategy::Strategy;

use super::*;
use crate::exits::hist::Hist;

/// All pCPUs' events of a recording, as one.
macro_rules! recorded {
    ($folder:literal) => {
        Events {
            exits: pairs(
                include_str!(concat!("../fixtures/", $folder, "/kvm_exit.hist")),
                ["isa", "exit_reason"],
            ),
            msrs: pairs(include_str!(concat!("../fixtures/", $folder, "/kvm_msr.hist")), ["ecx", "write"]),
            apic: pairs(include_str!(concat!("../fixtures/", $folder, "/kvm_apic.hist")), ["reg", "rw"]),
            hypercalls: BTreeMap::new(),
        }
    };
}

fn pairs(text: &str, [first, second]: [&str; 2]) -> BTreeMap<(u64, u64), u64> {
    let mut sums = BTreeMap::new();
    for (keys, count) in Hist::parse(text, &["common_cpu", first, second]).unwrap().counts {
        *sums.entry((keys[1], keys[2])).or_insert(0) += count;
    }
    sums
}

/// The rows that are not zero.
fn counted(events: &Events) -> Vec<(Row, u64)> {
    let rows = rows(events);
    assert_eq!(rows.total(), events.exits.values().sum::<u64>(), "rows must add up to the exits");
    Row::ALL.into_iter().map(|row| (row, rows.count(row))).filter(|&(_, count)| count > 0).collect()
}

fn vmx(exits: &[(u64, u64)]) -> BTreeMap<(u64, u64), u64> {
    exits.iter().map(|&(reason, count)| ((VMX, reason), count)).collect()
}

fn svm(exits: &[(u64, u64)]) -> BTreeMap<(u64, u64), u64> {
    exits.iter().map(|&(reason, count)| ((SVM, reason), count)).collect()
}

#[test]
fn recorded_x2apic_guest_splits_msr_exits_by_register() {
    assert_eq!(
        counted(&recorded!("x2apic")),
        [
            (Row::ExternalIntr, 1210),
            (Row::ApicAccess, 778),
            (Row::Hlt, 870),
            (Row::EptViolation, 870),
            (Row::Ipi, 312),
            (Row::Timer, 1327),
            (Row::Msr, 12),
            (Row::InterruptWindow, 997),
            (Row::Hypercall, 3),
        ]
    );
}

#[test]
fn recorded_xapic_guest_takes_apic_accesses_out_of_the_page_faults() {
    let apic_page = 4201 + 195 + 195; // end of interrupt, ICR read, ICR2 write
    assert_eq!(
        counted(&recorded!("xapic")),
        [
            (Row::ExternalIntr, 2441),
            (Row::ApicAccess, apic_page),
            (Row::Hlt, 397),
            (Row::EptViolation, 6467 - apic_page - 195),
            (Row::Ipi, 195),
            (Row::Timer, 1073),
            (Row::Msr, 7),
            (Row::InterruptWindow, 1864),
        ]
    );
}

#[test]
fn vmx_reasons_without_a_register_map_by_themselves() {
    let events = Events {
        exits: vmx(&[
            (1, 1),
            (7, 2),
            (10, 3),
            (12, 4),
            (18, 5),
            (28, 6),
            (30, 7),
            (40, 8),
            (45, 9),
            (48, 10),
            (49, 20),
            (52, 30),
        ]),
        ..Events::default()
    };
    assert_eq!(
        counted(&events),
        [
            (Row::IoInstruction, 7),
            (Row::ExternalIntr, 1),
            (Row::ApicAccess, 9),
            (Row::Hlt, 4),
            (Row::EptViolation, 30),
            (Row::Timer, 30),
            (Row::Pause, 8),
            (Row::InterruptWindow, 2),
            (Row::Cpuid, 3),
            (Row::Hypercall, 5),
            (Row::Other, 6),
        ]
    );
}

#[test]
fn vmx_flags_above_the_reason_are_ignored() {
    let bus_lock_detected = 1 << 26;
    let events = Events { exits: vmx(&[(12 | bus_lock_detected, 5)]), ..Events::default() };
    assert_eq!(counted(&events), [(Row::Hlt, 5)]);
}

#[test]
fn vmx_x2apic_guest_splits_wrmsr_exits() {
    let events = Events {
        exits: vmx(&[(31, 4), (32, 100)]),
        msrs: [((0x80b, 1), 50), ((0x830, 1), 20), ((0x6e0, 1), 25), ((0x802, 0), 1)].into(),
        apic: [((0xb0, 1), 50), ((0x300, 1), 20), ((0x20, 0), 1)].into(),
        ..Events::default()
    };
    assert_eq!(counted(&events), [(Row::ApicAccess, 51), (Row::Ipi, 20), (Row::Timer, 25), (Row::Msr, 8)]);
}

#[test]
fn vmx_apic_access_exits_lose_ipis_and_timers_but_no_page_faults() {
    // The paper's machine: xAPIC with "virtualize APIC accesses", every access is exit 44.
    let events = Events {
        exits: vmx(&[(44, 100), (48, 40)]),
        apic: [((0xb0, 1), 70), ((0x310, 1), 10), ((0x300, 1), 10), ((0x380, 1), 10)].into(),
        ..Events::default()
    };
    assert_eq!(
        counted(&events),
        [(Row::ApicAccess, 80), (Row::EptViolation, 40), (Row::Ipi, 10), (Row::Timer, 10)]
    );
}

#[test]
fn vmx_apicv_write_traps_are_told_apart() {
    let events = Events {
        exits: vmx(&[(56, 30)]),
        apic: [((0x300, 1), 20), ((0x380, 1), 4)].into(),
        ..Events::default()
    };
    assert_eq!(counted(&events), [(Row::ApicAccess, 6), (Row::Ipi, 20), (Row::Timer, 4)]);
}

#[test]
fn avic_ipi_exits_are_not_counted_again_by_their_register() {
    let events = Events {
        exits: svm(&[(0x401, 10), (0x402, 5), (0x400, 7)]),
        // Of the ten IPIs KVM emulated three; one more came as a trap.
        apic: [((0x300, 1), 3), ((0xb0, 1), 5)].into(),
        ..Events::default()
    };
    assert_eq!(counted(&events), [(Row::ApicAccess, 5), (Row::EptViolation, 7), (Row::Ipi, 10)]);
}

#[test]
fn paravirtual_ipis_are_ipis() {
    let events = Events {
        exits: svm(&[(0x81, 9)]),
        hypercalls: [(KVM_HC_SEND_IPI, 6), (5, 3)].into(),
        ..Events::default()
    };
    assert_eq!(counted(&events), [(Row::Ipi, 6), (Row::Hypercall, 3)]);
}

#[test]
fn hyperv_guest_ends_interrupts_by_its_own_register() {
    let events = Events {
        exits: svm(&[(0x7c, 12)]),
        msrs: [((HYPERV_MSR_EOI, 1), 7), ((HYPERV_MSR_ICR, 1), 2), ((0x4000_00b1, 1), 3)].into(),
        apic: [((0xb0, 1), 7), ((0x300, 1), 2)].into(),
        ..Events::default()
    };
    assert_eq!(counted(&events), [(Row::ApicAccess, 7), (Row::Ipi, 2), (Row::Timer, 3)]);
}

#[test]
fn an_unknown_instruction_set_is_other() {
    let events = Events { exits: [((3, 12), 5)].into(), ..Events::default() };
    assert_eq!(counted(&events), [(Row::Other, 5)]);
}

#[test]
fn names_are_the_same_in_tables_and_in_json() {
    for row in Row::ALL {
        assert_eq!(serde_json::to_string(&row).unwrap(), format!("\"{}\"", row.name()));
    }
}

proptest::proptest! {
    /// Whatever the counters say, and however far apart in time they were read, no exit appears or vanishes.
    #[test]
    fn rows_always_add_up(
        exits in proptest::collection::btree_map((1u64..3, 0u64..0x410), 0u64..1000, 0..40),
        msrs in proptest::collection::btree_map((0x7f0u64..0x850, 0u64..2), 0u64..1000, 0..20),
        apic in proptest::collection::btree_map(((0u64..0x40).prop_map(|r| r << 4), 0u64..2), 0u64..1000, 0..20),
        hypercalls in proptest::collection::btree_map(0u64..12, 0u64..1000, 0..6),
    ) {
        counted(&Events { exits, msrs, apic, hypercalls });
    }
}
