//! The page's tables: the paper's Table 1 beside ours, the ratios, and every case's exits.

use ivcpu_vmm::exits::Row;
use maud::{Markup, html};

use super::label::label;
use super::{WORKLOADS, workload_name};
use crate::report::{PAPER_TABLE_1, findings};
use crate::result::{CaseResult, Mode, Path, ResultFile, word};

/// The case that is nearest to the paper's: the IVCPU by interrupts, over a virtual function if there is one.
fn nearest_to_paper(file: &ResultFile) -> Option<&CaseResult> {
    let measured = |case: &&CaseResult| case.error.is_none() && !case.figures.pcpus.is_empty();
    let with_ivcpu = file.cases.iter().filter(measured).filter(|case| case.key.mode == Mode::Irq);
    with_ivcpu.min_by_key(|case| {
        // Its host did not skip EOI exits, and nothing but the traffic ran in its guest.
        let key = &case.key;
        let workload = WORKLOADS.iter().position(|w| *w == key.workload);
        (key.path != Path::Sriov, key.pv_eoi, key.with_bystander, workload)
    })
}

/// The paper's Table 1 and ours.
pub(super) fn paper(file: &ResultFile) -> Markup {
    let ours = nearest_to_paper(file);
    let pcpus = ours.map(|case| &case.figures.pcpus[..]).unwrap_or_default();
    html! {
        section {
            h2 { "The paper's Table 1, and ours" }
            p.soft { "Exits as counted, by pCPU. Lee & Eom (2012): Netperf over a virtual function of an Intel X520, the IVCPU alone on PCPU4. "
                "Two machines, two loads: compare where the exits are, not how many." }
            @match ours {
                Some(case) => p.soft title=(case.key) { "Ours: " (label(&case.key)) ", " (workload_name(case.key.workload)) "." },
                None => p.soft { "No case of this file with the IVCPU by interrupts was measured." },
            }
            div.scroll tabindex="0" role="region" aria-label="The paper's Table 1 and ours" {
                table data-table="paper" {
                    thead {
                        tr { th rowspan="2" { "exits" } th colspan="4" { "paper" } @if !pcpus.is_empty() { th colspan=(pcpus.len()) { "ours" } } }
                        tr {
                            @for number in 1..=4 { th { "PCPU" (number) } }
                            @for p in pcpus { th { "pCPU" (p.pcpu) br; (p.role) } }
                        }
                    }
                    tbody {
                        @for (row, counts) in PAPER_TABLE_1 {
                            tr { th scope="row" { (row.name()) } @for n in counts { td { (n) } } @for p in pcpus { td { (p.exits.count(row)) } } }
                        }
                    }
                }
            }
        }
    }
}

/// Side-by-side figures.
pub(super) fn ratios(file: &ResultFile) -> Markup {
    html! {
        section {
            h2 { "Ratios" }
            @if file.ratios.is_empty() { p.soft { "None: no two cases that are compared were both measured." } }
            @else {
                div.scroll tabindex="0" role="region" aria-label="Ratios" {
                    table data-table="ratios" {
                        thead { tr { th { "figure" } th { "median" } th { "min" } th { "max" } th.left { "of" } th.left { "to" } } }
                        tbody {
                            @for ratio in &file.ratios {
                                tr {
                                    td.wrap { (ratio.what) }
                                    @for value in [ratio.median, ratio.min, ratio.max] { td { (format!("{value:.2}")) } }
                                    td.left.wrap { (named(file, &ratio.of)) } td.left.wrap { (named(file, &ratio.to)) }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// A case of a ratio by its short name, or by its key if the file has no such case.
fn named(file: &ResultFile, key: &str) -> Markup {
    let case = file.cases.iter().find(|case| case.key.to_string() == key);
    match case {
        Some(case) => html! { span title=(key) { (label(&case.key)) ", " (word(case.key.workload)) } },
        None => html! { (key) },
    }
}

/// Every case's exits, folded.
pub(super) fn cases(file: &ResultFile) -> Markup {
    html! {
        section {
            h2 { "Every case" }
            @for workload in WORKLOADS {
                @let cases: Vec<_> = file.cases.iter().filter(|case| case.key.workload == workload).collect();
                @if !cases.is_empty() { h3 { (workload_name(workload)) } }
                @for case in cases {
                    details {
                        summary { (label(&case.key)) @if case.error.is_some() { strong { ": failed" } } }
                        p.key { (case.key) }
                        @match &case.error { Some(error) => p.notice.bad { strong { "Failed: " } (error) }, None => { @for line in findings(case).lines() { p.soft { (line) } } (exits(case)) } }
                    }
                }
            }
        }
    }
}

fn exits(case: &CaseResult) -> Markup {
    let pcpus = &case.figures.pcpus;
    let rows = Row::ALL.into_iter().filter(|row| pcpus.iter().any(|p| p.has_any(*row)));
    html! {
        @if pcpus.is_empty() { p.soft { "No exits known." } }
        @else {
            div.scroll tabindex="0" role="region" aria-label={ "Exits: " (label(&case.key)) } {
                table data-table="exits" {
                    thead {
                        tr { th rowspan="2" { "exits" } @for p in pcpus { th colspan="3" { "pCPU" (p.pcpu) " " (p.role) } } }
                        tr { @for _ in pcpus { th { "raw" } th { "control" } th { "net" } } }
                    }
                    tbody {
                        @for row in rows {
                            tr { th scope="row" { (row.name()) }
                                @for p in pcpus { td { (p.exits.count(row)) } td { (p.control.count(row)) } td { (p.net(row)) } } }
                        }
                    }
                }
            }
        }
    }
}
