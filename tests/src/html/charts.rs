//! Charts as inline SVG with lengths in percent: they fill any width while their text keeps its size, which a chart
//! of fixed coordinates (plotters) cannot, and each row says what it shows to a screen reader.

use ivcpu_vmm::exits::Row;
use maud::{Markup, html};

use super::label::label;
use super::{WORKLOADS, workload_name};
use crate::result::{CaseResult, Figures, Pcpu, ResultFile};

/// All charts of the page.
pub(super) fn all(file: &ResultFile) -> Markup {
    html! {
        (exits(file))
        (bars(file, &Bars {
            id: "throughput", title: "Throughput", unit: "Mbit/s", digits: 0,
            caption: "TCP payload. The line across a bar's end is as wide as the repeats lie apart (largest less smallest).",
            value: |f| f.mbps, spread: |f| f.spread,
        }))
        (latency(file))
        (bars(file, &Bars {
            id: "bystander", title: "What the bystander keeps", unit: "%", digits: 1,
            caption: "Speed of an application that has nothing to do with the network while traffic flows, as a share of its speed without.",
            value: |f| f.bystander.map(|b| b.share * 100.0), spread: |_| None,
        }))
        (bars(file, &Bars {
            id: "price-gb", title: "CPU seconds per GB", unit: "s", digits: 1,
            caption: "Application, IVCPU and backend pCPUs, the bystander's part taken off.",
            value: |f| f.cpu_seconds_per_gb, spread: |_| None,
        }))
        (bars(file, &Bars {
            id: "price-transactions", title: "CPU seconds per 1,000 transactions", unit: "s", digits: 2,
            caption: "The same for round trips.",
            value: |f| f.cpu_seconds_per_1k_transactions, spread: |_| None,
        }))
    }
}

/// A chart of one figure a case.
struct Bars {
    id: &'static str,
    title: &'static str,
    unit: &'static str,
    digits: usize,
    caption: &'static str,
    value: fn(&Figures) -> Option<f64>,
    spread: fn(&Figures) -> Option<f64>,
}

/// Groups the cases that a chart has something to say of by workload; failed ones stay visible in each.
fn groups(file: &ResultFile, known: impl Fn(&Figures) -> bool) -> Vec<(&'static str, Vec<&CaseResult>)> {
    let of = |workload| file.cases.iter().filter(move |case| case.key.workload == workload);
    let groups = WORKLOADS.into_iter().filter(|w| of(*w).any(|case| known(&case.figures)));
    let shown = |case: &&CaseResult| case.error.is_some() || known(&case.figures);
    groups.map(|workload| (workload_name(workload), of(workload).filter(shown).collect())).collect()
}

fn chart(
    id: &str,
    title: &str,
    caption: Markup,
    groups: &[(&str, Vec<&CaseResult>)],
    row: impl Fn(&[&CaseResult], &CaseResult) -> Markup,
    axis: impl Fn(&[&CaseResult]) -> Markup,
) -> Markup {
    html! {
        section {
            h2 { (title) }
            figure.chart data-chart=(id) {
                figcaption { (caption) }
                @for (name, cases) in groups {
                    h3 { (name) }
                    @for case in cases {
                        @if let Some(error) = &case.error {
                            div.row { div.label title=(case.key) { span { (label(&case.key)) } } div.soft { strong { "failed: " } (error) } }
                        } @else { (row(cases, case)) }
                    }
                    (axis(cases))
                }
                @if groups.is_empty() { p.soft { "No case of this file has this figure." } }
            }
        }
    }
}

fn named(case: &CaseResult, value: &str, drawing: Markup) -> Markup {
    html! {
        div.row {
            div.label title=(case.key) { span { (label(&case.key)) } span.value { (value) } }
            (drawing)
        }
    }
}

fn percent(part: f64) -> String {
    format!("{}%", part * 100.0)
}

fn bars(file: &ResultFile, what: &Bars) -> Markup {
    let of = |case: &CaseResult| (what.value)(&case.figures);
    // A half of the spread on each side of the figure.
    let half = |case: &CaseResult| {
        (what.spread)(&case.figures).zip(of(case)).map_or(0.0, |(spread, value)| spread * value / 2.0)
    };
    let row = |cases: &[&CaseResult], case: &CaseResult| {
        let value = of(case).unwrap_or(0.0);
        let most = cases.iter().filter_map(|c| Some(of(c)? + half(c))).fold(f64::MIN_POSITIVE, f64::max);
        let (low, high) = ((value - half(case)).max(0.0), value + half(case));
        let mut text = format!("{value:.*} {}", what.digits, what.unit);
        if let Some(spread) = (what.spread)(&case.figures) {
            text.push_str(&format!(", spread {:.0} %", spread * 100.0));
        }
        let says = format!("{}: {}, {text}", what.title, label(&case.key));
        named(
            case,
            &text,
            html! {
                svg height="14" role="img" aria-label=(says) {
                    title { (says) }
                    rect.track width="100%" height="14" {}
                    rect.mark.bar width=(percent(value.max(0.0) / most)) height="14" {}
                    @if high > low { line.whisker x1=(percent(low / most)) x2=(percent(high / most)) y1="7" y2="7" {} }
                }
            },
        )
    };
    let groups = groups(file, |f| (what.value)(f).is_some());
    chart(what.id, what.title, html! { (what.caption) }, &groups, row, |_| html! {})
}

/// The reasons a chart tells apart; the rest is one.
const REASONS: [Row; 7] = [
    Row::ExternalIntr,
    Row::ApicAccess,
    Row::IoInstruction,
    Row::Hlt,
    Row::EptViolation,
    Row::Ipi,
    Row::Timer,
];

/// Net exits of one pCPU by reason, without those that are none.
fn nets(pcpu: &Pcpu) -> Vec<(usize, &'static str, i64)> {
    let rest = Row::ALL.into_iter().filter(|row| !REASONS.contains(row)).map(|row| pcpu.net(row)).sum();
    let named = REASONS.iter().map(|row| (row.name(), pcpu.net(*row))).chain([("all others", rest)]);
    named.enumerate().map(|(i, (name, net))| (i, name, net)).filter(|(_, _, net)| *net != 0).collect()
}

/// Net exits a packet to the left and right of zero.
fn reach(pcpu: &Pcpu, packets: f64) -> (f64, f64) {
    let sum = |sign: i64| -> i64 { nets(pcpu).iter().map(|n| n.2).filter(|net| net.signum() == sign).sum() };
    (-sum(-1) as f64 / packets, sum(1) as f64 / packets)
}

fn packets(f: &Figures) -> Option<f64> {
    f.packets.filter(|n| *n > 0).map(|n| n as f64)
}

fn exits(file: &ResultFile) -> Markup {
    let caption = html! {
        p { "Net of the control (the same VM without traffic). A reason with fewer exits than in the control stands to the left of zero, "
            "so bars never hide it; raw, control and net are in the tables below. One scale for each kind of traffic." }
        ul.legend {
            @for (index, name) in REASONS.iter().map(|row| row.name()).chain(["all others"]).enumerate() {
                li { svg aria-hidden="true" { rect width="12" height="12" class={ "c" (index) } {} } (name) }
            }
        }
    };
    let row = |cases: &[&CaseResult], case: &CaseResult| {
        let ends = |c: &CaseResult| {
            let packets = packets(&c.figures)?;
            let ends = c.figures.pcpus.iter().map(|p| reach(p, packets));
            ends.reduce(|a, b| (a.0.max(b.0), a.1.max(b.1)))
        };
        let (left, right) = cases
            .iter()
            .filter_map(|c| ends(c))
            .fold((0.0, f64::MIN_POSITIVE), |a, b| (f64::max(a.0, b.0), f64::max(a.1, b.1)));
        let at = |per_packet: f64| percent((left + per_packet) / (left + right));
        let count = packets(&case.figures).unwrap_or(1.0);
        let all: i64 = case.figures.pcpus.iter().flat_map(nets).map(|n| n.2).sum();
        let text = format!("{:.3} a packet on all pCPUs", all as f64 / count);
        let says = format!("Net exits per packet by pCPU and reason: {}, {text}", label(&case.key));
        named(
            case,
            &text,
            html! {
                svg.pcpus height=(case.figures.pcpus.len() * 18) role="img" aria-label=(says) {
                    title { (says) }
                    @for (line, pcpu) in case.figures.pcpus.iter().enumerate() {
                        @let y = line * 18 + 2;
                        @let total = nets(pcpu).iter().map(|n| n.2).sum::<i64>() as f64 / count;
                        text x="-6" y=(y + 11) text-anchor="end" { "pCPU" (pcpu.pcpu) " " (pcpu.role) }
                        rect.track width="100%" y=(y) height="14" {}
                        @for (index, name, from, net) in stacked(pcpu) {
                            rect class={ "mark c" (index) } y=(y) height="14" x=(at(from as f64 / count))
                                width=(percent((net.abs() as f64 / count) / (left + right))) {
                                title { "pCPU" (pcpu.pcpu) " " (pcpu.role) ", " (name) ": " (format!("{:.4}", net as f64 / count)) " a packet (" (net) " net)" }
                            }
                        }
                        text x="100%" dx="6" y=(y + 11) { (format!("{total:.3}")) }
                    }
                    line.zero x1=(at(0.0)) x2=(at(0.0)) y1="0" y2="100%" {}
                }
            },
        )
    };
    let groups = groups(file, |f| packets(f).is_some() && f.pcpus.iter().any(|p| !nets(p).is_empty()));
    chart("exits", "Exits per packet, by pCPU and reason", caption, &groups, row, |_| html! {})
}

/// Where each reason's part begins (its left end) and how many exits it is.
fn stacked(pcpu: &Pcpu) -> Vec<(usize, &'static str, i64, i64)> {
    let (mut left, mut right) = (0, 0);
    let place = |(index, name, net): (usize, &'static str, i64)| {
        let from = if net < 0 {
            left += net;
            left
        } else {
            right += net;
            right - net
        };
        (index, name, from, net)
    };
    nets(pcpu).into_iter().map(place).collect()
}

/// The percentiles: name, colour, and a shape of its own.
const PERCENTILES: [(&str, &str, &str); 3] = [
    ("p50", "c0", "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z"),
    ("p99", "c1", "M-5 -5h10v10h-10z"),
    ("p99.9", "c4", "M0 -6L6 5H-6z"),
];

fn latency(file: &ResultFile) -> Markup {
    let of =
        |case: &CaseResult| case.figures.latency_us.map(|l| [l.p50, l.p99, l.p999].map(|us| us.max(1.0)));
    // Whole decades.
    let decades = |cases: &[&CaseResult]| {
        let all: Vec<f64> = cases.iter().filter_map(|case| of(case)).flatten().collect();
        let low = all.iter().copied().fold(f64::INFINITY, f64::min).log10().floor();
        let high = all.iter().copied().fold(1.0, f64::max).log10().ceil();
        (low, high.max(low + 1.0))
    };
    let at = |(low, high): (f64, f64), us: f64| percent((us.log10() - low) / (high - low));
    let caption = html! {
        p { "Round-trip times in microseconds, medians over the windows. The axis is logarithmic." }
        ul.legend { @for (name, class, shape) in PERCENTILES { li { svg aria-hidden="true" viewBox="-6 -6 12 12" { path class=(class) d=(shape) {} } (name) } } }
    };
    let row = |cases: &[&CaseResult], case: &CaseResult| {
        let ends = decades(cases);
        let us = of(case).unwrap_or([1.0; 3]);
        let text = format!("{:.0} / {:.0} / {:.0} us", us[0], us[1], us[2]);
        let says = format!("Round trip p50 / p99 / p99.9: {}, {text}", label(&case.key));
        named(
            case,
            &text,
            html! {
                svg.inset height="16" role="img" aria-label=(says) {
                    title { (says) }
                    rect.track y="5" width="100%" height="6" {}
                    line.span x1=(at(ends, us[0])) x2=(at(ends, us[2])) y1="8" y2="8" {}
                    @for ((name, class, shape), us) in PERCENTILES.iter().zip(us) {
                        svg x=(at(ends, us)) y="8" { path class={ "mark point " (class) } d=(shape) { title { (name) ": " (format!("{us:.0}")) " us" } } }
                    }
                }
            },
        )
    };
    let axis = |cases: &[&CaseResult]| {
        let (low, high) = decades(cases);
        html! {
            svg.axis height="20" aria-hidden="true" {
                @for decade in low as i32..=high as i32 {
                    @let x = percent((f64::from(decade) - low) / (high - low));
                    line.zero x1=(x) x2=(x) y1="0" y2="5" {}
                    text x=(x) y="17" text-anchor="middle" { (10i64.pow(decade.clamp(0, 18) as u32)) }
                }
            }
        }
    };
    chart("latency", "Round-trip times", caption, &groups(file, |f| f.latency_us.is_some()), row, axis)
}

#[cfg(test)]
mod tests {
    use ivcpu_vmm::exits::Rows;

    use super::*;
    use crate::result::{Role, TimerInterrupts};

    #[test]
    fn negative_nets_stack_to_the_left_of_zero() {
        let rows = |counts: &[(Row, u64)]| {
            let mut rows = Rows::default();
            counts.iter().for_each(|(row, n)| rows.add(*row, *n));
            rows
        };
        let pcpu = Pcpu {
            pcpu: 0,
            role: Role::App,
            exits: rows(&[(Row::ExternalIntr, 10), (Row::Ipi, 3), (Row::Msr, 4)]),
            control: rows(&[(Row::ApicAccess, 5), (Row::Timer, 2)]),
            control_spread: None,
            control_sigma: None,
            timer_interrupts: TimerInterrupts::default(),
            cpu_seconds: None,
        };
        let places: Vec<_> = stacked(&pcpu).into_iter().map(|(_, _, from, net)| (from, net)).collect();
        assert_eq!(places, [(0, 10), (-5, -5), (10, 3), (-7, -2), (13, 4)]);
        assert_eq!(reach(&pcpu, 2.0), (3.5, 8.5));
    }
}
