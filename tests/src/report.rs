//! What `compare` prints: a line of figures and a Table 1 for every case, then the ratios.

use std::fmt::Write as _;

use ivcpu_vmm::exits::Row;

use crate::judgement::Share;
use crate::result::{CaseKey, CaseResult, Figures, GuestIrqs, Mode, Pcpu, ResultFile, Role};

/// Table 1 of Lee & Eom (2012): exits of a Netperf run over an SR-IOV virtual function of an Intel X520, two vCPUs
/// floating over PCPU1 to PCPU3, the IVCPU alone on PCPU4.
pub(crate) const PAPER_TABLE_1: [(Row, [u64; 4]); 5] = [
    (Row::IoInstruction, [17, 21, 19, 0]),
    (Row::ExternalIntr, [3972, 4005, 3798, 1_275_323]),
    (Row::ApicAccess, [5788, 6102, 5511, 1_459_550]),
    (Row::Hlt, [1123, 1376, 1221, 17_217]),
    (Row::EptViolation, [281, 213, 307, 115]),
];

/// Payload bytes of a full TCP segment on a 1,500-byte MTU with timestamps.
const SEGMENT_PAYLOAD: f64 = 1448.0;

/// The whole comparison as text.
pub fn text(file: &ResultFile) -> String {
    let mut out = String::new();
    for case in &file.cases {
        out.push_str(&case_text(case));
        out.push('\n');
    }
    out.push_str(&overview(file));
    out.push_str(&pays_from(file));
    for ratio in &file.ratios {
        let _ = writeln!(
            out,
            "{}: {:.2} (min {:.2}, max {:.2})\n    {}\n  / {}",
            ratio.what, ratio.median, ratio.min, ratio.max, ratio.of, ratio.to
        );
    }
    if !file.complete {
        out.push_str("\nNot complete: at least one case failed (see above).\n");
    }
    if file.host.emulated {
        out.push_str(
            "\nThe host was emulated: exit counts are real, times compare only within this run \
             (two emulated CPUs may share one real core).\n",
        );
    }
    out
}

/// One case: figures, then Table 1.
pub fn case_text(case: &CaseResult) -> String {
    let mut out = format!("== {}\n", case.key);
    if let Some(error) = &case.error {
        let _ = writeln!(out, "FAILED: {error}");
        return out;
    }
    for line in findings(case).lines() {
        let _ = writeln!(out, "  {line}");
    }
    let f = &case.figures;
    table_1(&mut out, f);
    if let (Some(total), Some(kvm)) = (f.exits_total, f.kvm_exits) {
        let off = 100.0 * (total as f64 - kvm as f64) / (kvm.max(1) as f64);
        let _ = writeln!(out, "  all rows {total}, KVM's own counter {kvm} ({off:+.2} %)");
    }
    out
}

/// What a case's figures say, a line each.
pub fn findings(case: &CaseResult) -> String {
    let mut out = String::new();
    let f = &case.figures;
    let _ = writeln!(out, "{}", speed(f));
    let _ = writeln!(out, "{}", exits_per_packet(f));
    let _ = writeln!(out, "{}", interrupts(f));
    let _ = writeln!(out, "{}", price(f));
    if let Some(line) = fifo(f) {
        let _ = writeln!(out, "{line}");
    }
    if let Some(line) = polled(f) {
        let _ = writeln!(out, "{line}");
    }
    match case.key.mode {
        Mode::Fifo => exitless_lines(&mut out, f, f.fifo.entries, "entries"),
        Mode::Poll => exitless_lines(&mut out, f, f.packets, "packets"),
        Mode::Stock | Mode::Irq | Mode::ThreadedNapi => {}
    }
    if case.key.mode == Mode::Irq {
        for row in [Row::ExternalIntr, Row::ApicAccess] {
            let _ = writeln!(out, "{}", share_line(f, row));
        }
    }
    out
}

fn speed(f: &Figures) -> String {
    let mut parts = Vec::new();
    if let Some(mbps) = f.mbps {
        parts.push(format!("{mbps:.0} Mbit/s"));
    }
    if let Some(l) = f.latency_us {
        parts.push(format!("round trip p50 {:.0} us, p99 {:.0} us, p99.9 {:.0} us", l.p50, l.p99, l.p999));
    }
    if let (Some(n), Some(s)) = (f.transactions, f.seconds) {
        parts.push(format!("{:.0} transactions/s", n as f64 / s));
    }
    if let (Some(spread), Some(repeats)) = (f.spread, f.repeats) {
        parts.push(format!("spread {:.0} % over {repeats} windows", spread * 100.0));
    }
    if let (Some(bytes), Some(verified)) = (f.bytes, f.bytes_verified) {
        parts.push(format!("{bytes} bytes in the windows, {verified} verified over the stream"));
    }
    parts.join(", ")
}

fn exits_per_packet(f: &Figures) -> String {
    let (Some(packets), Some(total)) = (f.packets.filter(|p| *p > 0), f.exits_total) else {
        return "no packets".into();
    };
    let control: u64 = f.pcpus.iter().map(|p| p.control.total()).sum();
    let net = total as f64 - control as f64;
    let mut line = format!(
        "{packets} packets, exits per packet {:.4} raw, {:.4} net of the control",
        total as f64 / packets as f64,
        net / packets as f64
    );
    if let Some(bytes) = f.bytes.filter(|b| *b > 0) {
        let _ = write!(line, " ({:.4} net per 1,448 bytes)", net / (bytes as f64 / SEGMENT_PAYLOAD));
    }
    if let Some(kicks) = f.kicks {
        let _ = write!(line, ", kicks per packet {:.4}", kicks as f64 / packets as f64);
    }
    line
}

fn interrupts(f: &Figures) -> String {
    let mut parts = Vec::new();
    if let Some(n) = f.completions {
        parts.push(format!("{n} completions"));
    }
    match f.guest_irqs {
        Some(irqs) => match irqs.ivcpu {
            Some(ivcpu) => {
                let all = (ivcpu + irqs.other).max(1);
                let share = 100.0 * ivcpu as f64 / all as f64;
                parts.push(format!(
                    "guest interrupts {ivcpu} on the IVCPU, {} elsewhere ({share:.2} %)",
                    irqs.other
                ));
            }
            None => parts.push(format!("guest interrupts {} on application vCPUs", irqs.other)),
        },
        None => parts.push("guest interrupts unknown".into()),
    }
    let all = |irqs: &GuestIrqs| irqs.ivcpu.unwrap_or(0) + irqs.other;
    if let (Some(receive), Some(transmit)) = (&f.receive_irqs, &f.transmit_irqs) {
        parts.push(format!("receive {}, transmit {}", all(receive), all(transmit)));
    }
    if let Some(share) = f.accepted_by_ivcpu {
        parts.push(format!("of those the host saw accepted, {:.2} % by the IVCPU", share * 100.0));
    }
    parts.join(", ")
}

/// What became of completions in the FIFO, and how few still came as interrupts.
fn fifo(f: &Figures) -> Option<String> {
    let fifo = f.fifo;
    let (entries, merged) = (fifo.entries?, fifo.merged?);
    let mut line = format!("FIFO: {entries} entries, {merged} merged into one that was there");
    if let (Some(wakeups), Some(fallbacks)) = (fifo.wakeups, fifo.fallbacks) {
        let _ = write!(line, ", {wakeups} interrupts to wake the IVCPU, {fallbacks} for late entries");
    }
    if let (Some(irqs), Some(completions)) = (f.guest_irqs, f.completions.filter(|n| *n > 0)) {
        let all = irqs.ivcpu.unwrap_or(0) + irqs.other;
        let _ = write!(
            line,
            "; device interrupts in the guest: {:.2} % of completions",
            100.0 * all as f64 / completions as f64
        );
    }
    Some(line)
}

/// What the IVCPU found by polling, and how many of the guest's interrupts were none.
fn polled(f: &Figures) -> Option<String> {
    let polled = f.polled?;
    let mut line = format!(
        "polled: {} packets received, {} times back to interrupts; {} runs of the transmit handler, which the guest counts \
         as interrupts",
        polled.packets, polled.sleeps, polled.handler_runs
    );
    if let Some(interrupts) = f.device_interrupts {
        let _ = write!(line, "; {interrupts} device interrupts as the host counts");
    }
    Some(line)
}

/// Exits a packet that an exitless mode may leave on a pCPU, beyond the noise: the application's, and any other.
pub const ALLOWED_PER_PACKET: [f64; 2] = [0.001, 0.01];

/// FIFO entries, or polled packets, from which exits a packet say something.
pub const ENOUGH_ENTRIES: u64 = 10_000;

fn exitless_lines(out: &mut String, f: &Figures, served: Option<u64>, what: &str) {
    let served = served.unwrap_or(0);
    if served < ENOUGH_ENTRIES {
        let _ =
            writeln!(out, "{served} {what} are too few to call a pCPU exitless ({ENOUGH_ENTRIES} are not)");
        return;
    }
    let [application, any] = ALLOWED_PER_PACKET;
    for p in f.pcpus.iter().filter(|p| p.role != Role::Other && p.role != Role::Wire) {
        let per_packet = if p.role == Role::App { application } else { any };
        let _ = match f.exitless(p, per_packet) {
            Some(e) => writeln!(
                out,
                "pCPU{} {}: net EXTERNAL_INTR + APIC_ACCESS + IO exits {}, allowed {:.0} (the larger of {per_packet} a \
                 packet and 3 sigma of the control): {}",
                p.pcpu,
                p.role,
                e.net,
                e.allowed,
                match e {
                    e if e.holds() => "exitless".to_owned(),
                    e if e.holds_but_for_timers() => format!(
                        "exitless but for {} interrupts of the pCPU's own timer beyond the control's",
                        e.more_timer_interrupts
                    ),
                    _ => "NOT exitless".to_owned(),
                }
            ),
            None => {
                writeln!(out, "pCPU{} {}: a single control window says nothing of noise", p.pcpu, p.role)
            }
        };
    }
}

/// From which load a spinning IVCPU pays: the application's pCPUs must save the one pCPU it takes.
fn pays_from(file: &ResultFile) -> String {
    let mut out = String::new();
    for fifo in file.cases.iter().filter(|case| {
        case.key.mode == Mode::Fifo && case.key.with_bystander && case.key.ivcpu_poll_us.is_some()
    }) {
        let stock = file.cases.iter().find(|case| {
            let as_stock = CaseKey { mode: Mode::Stock, ivcpu_poll_us: None, ..fifo.key.clone() };
            case.key == as_stock
        });
        let cost = |case: &CaseResult| {
            Some(case.figures.application_cpu_seconds? / (case.figures.bytes? as f64 / 1e9))
        };
        let Some((with, without)) = cost(fifo).zip(stock.and_then(cost)) else { continue };
        let what = format!(
            "{}: the application's pCPUs spend {with:.1} CPU s per GB, {without:.1} with stock interrupts",
            fifo.key
        );
        let saved = without - with;
        if saved > 0.0 {
            // One pCPU second each second for saved seconds a GB.
            let _ =
                writeln!(out, "{what}: an IVCPU that never sleeps pays from {:.0} Mbit/s", 8000.0 / saved);
        } else {
            let _ = writeln!(out, "{what}: an IVCPU that never sleeps does not pay at any load");
        }
    }
    out
}

fn price(f: &Figures) -> String {
    let mut parts = Vec::new();
    if let Some(bystander) = f.bystander {
        parts.push(format!("bystander keeps {:.1} % of its speed", bystander.share * 100.0));
    }
    if let Some(cost) = f.cpu_seconds_per_gb {
        parts.push(format!("{cost:.1} CPU s per GB"));
    }
    if let Some(cost) = f.cpu_seconds_per_1k_transactions {
        parts.push(format!("{cost:.2} CPU s per 1,000 transactions"));
    }
    if f.cpu_seconds_per_gb.or(f.cpu_seconds_per_1k_transactions).is_some() {
        parts.push("IVCPU and backend counted in".into());
    }
    parts.join(", ")
}

fn share_line(f: &Figures, row: Row) -> String {
    match f.ivcpu_share(row) {
        Share::Claimed(share) => {
            format!("device-caused {row} exits on the IVCPU's pCPU: {:.2} %", share * 100.0)
        }
        Share::NoSpread => {
            format!("device-caused {row} exits: no share claimed, a single control window has no spread")
        }
        Share::TooNoisy { net, spread } => format!(
            "device-caused {row} exits: no share claimed, net {net} is under ten times the control's spread {spread}"
        ),
    }
}

/// Rows x pCPUs: raw, control and net of each, with the paper's columns beside its five rows.
fn table_1(out: &mut String, f: &Figures) {
    if f.pcpus.is_empty() {
        return;
    }
    let _ = write!(out, "  {:<18}{:<8}", "exits", "");
    for p in &f.pcpus {
        let _ = write!(out, "{:>15}", format!("pCPU{} {}", p.pcpu, p.role));
    }
    let _ =
        writeln!(out, "{:>11}  | paper:{:>6}{:>7}{:>7}{:>9}", "total", "PCPU1", "PCPU2", "PCPU3", "PCPU4");
    for row in Row::ALL {
        let in_paper = PAPER_TABLE_1.iter().find(|(r, _)| *r == row);
        if in_paper.is_none() && !f.pcpus.iter().any(|p| p.has_any(row)) {
            continue;
        }
        for (index, label) in ["raw", "control", "net"].into_iter().enumerate() {
            let value = |p: &Pcpu| match label {
                "raw" => p.exits.count(row) as i64,
                "control" => p.control.count(row) as i64,
                _ => p.net(row),
            };
            let name = if index == 0 { row.name() } else { "" };
            let _ = write!(out, "  {name:<18}{label:<8}");
            for p in &f.pcpus {
                let _ = write!(out, "{:>15}", value(p));
            }
            let _ = write!(out, "{:>11}  |", f.pcpus.iter().map(value).sum::<i64>());
            if let (0, Some((_, [a, b, c, d]))) = (index, in_paper) {
                let _ = write!(out, "{a:>13}{b:>7}{c:>7}{d:>9}");
            }
            out.push('\n');
        }
    }
}

/// One line a case, to compare at a glance.
fn overview(file: &ResultFile) -> String {
    let mut out = format!(
        "{:<78}{:>10}{:>10}{:>11}{:>11}{:>9}{:>10}\n",
        "case", "Mbit/s", "p50 us", "exits/pkt", "app ex/pkt", "IVCPU %", "bystander"
    );
    for case in &file.cases {
        let f = &case.figures;
        let cell = |value: Option<f64>, digits: usize| value.map_or("-".into(), |v| format!("{v:.digits$}"));
        let per_packet = |role: Option<Role>| {
            let packets = f.packets.filter(|p| *p > 0)? as f64;
            Some(Row::ALL.iter().map(|row| f.net_of(*row, role)).sum::<i64>() as f64 / packets)
        };
        let on_ivcpu = f.guest_irqs.and_then(|irqs| {
            irqs.ivcpu.map(|ivcpu| 100.0 * ivcpu as f64 / (ivcpu + irqs.other).max(1) as f64)
        });
        let _ = writeln!(
            out,
            "{:<78}{:>10}{:>10}{:>11}{:>11}{:>9}{:>10}",
            case.key.to_string(),
            cell(f.mbps, 0),
            cell(f.latency_us.map(|l| l.p50), 0),
            cell(per_packet(None), 3),
            cell(per_packet(Some(Role::App)), 3),
            cell(on_ivcpu, 2),
            cell(f.bystander.map(|b| b.share * 100.0), 1),
        );
    }
    out.push_str("(exits/pkt: net of the control, all pCPUs; app ex/pkt: the application pCPUs' part)\n\n");
    out
}
