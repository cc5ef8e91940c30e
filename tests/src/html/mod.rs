//! A result file as one self-contained page: charts and tables, without scripts and without anything from a network.
//!
//! Text of a result file, error messages above all, is not trusted: maud escapes every string it is given.

mod charts;
mod label;
mod tables;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::result::{ResultFile, SCHEMA};
use crate::traffic::Workload;

/// Which result file becomes which page.
#[derive(Clone, Debug, clap::Args)]
pub struct ReportOptions {
    /// A file that `compare --json` wrote
    #[arg(long, value_name = "FILE")]
    pub json: PathBuf,
    /// Write the page to this file
    #[arg(long, value_name = "FILE")]
    pub html: PathBuf,
}

/// Makes a page of a result file that is there already.
pub fn report(options: &ReportOptions) -> anyhow::Result<()> {
    let json = &options.json;
    let text = fs::read_to_string(json).with_context(|| format!("reading {}", json.display()))?;
    let file: ResultFile = serde_json::from_str(&text)
        .with_context(|| format!("{} is no result file of this version's", json.display()))?;
    ensure!(
        file.schema == SCHEMA,
        "{} has schema {}, this version reads {SCHEMA}: measure again",
        json.display(),
        file.schema
    );
    write(&file, &options.html)
}

/// Writes the page of a comparison.
pub fn write(file: &ResultFile, path: &Path) -> anyhow::Result<()> {
    fs::write(path, page(file)).with_context(|| format!("writing {}", path.display()))
}

/// The page.
pub fn page(file: &ResultFile) -> String {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                // Whatever slipped through: a browser runs no script of this page and fetches nothing for it.
                meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'";
                title { "ivcpu: exits, speed and price" }
                style { (PreEscaped(include_str!("style.css"))) }
            }
            body {
                header { (facts(file)) }
                main {
                    (charts::all(file))
                    (tables::paper(file))
                    (tables::ratios(file))
                    (tables::cases(file))
                }
            }
        }
    }
    .into_string()
}

/// What it ran on and how far the figures go.
fn facts(file: &ResultFile) -> Markup {
    let host = &file.host;
    let failed = file.cases.iter().filter(|case| case.error.is_some()).count();
    html! {
        h1 { "I/O completions with and without an IVCPU" }
        dl {
            dt { "Host" } dd { @if host.emulated { "emulated" } @else { "real hardware" } ", " (host.cpus) " pCPUs" }
            dt { "Kernel" } dd { (host.kernel) }
            dt { "QEMU" } dd { (host.qemu.as_deref().unwrap_or("unknown")) }
            dt { "ivcpu" } dd { (file.version) }
            dt { "Cases" } dd { (file.cases.len()) @if failed > 0 { ", " (failed) " failed" } }
        }
        @if file.complete {
            p.notice { strong { "Complete." } " Every case was measured." }
        } @else {
            p.notice.bad { strong { "Not complete." } " At least one case failed; it is shown as failed, with its error." }
        }
        @if host.emulated {
            p.notice {
                strong { "The host was emulated." }
                " Exit counts are real; times compare only within this run (two emulated CPUs may share one real core)."
            }
        }
    }
}

/// The heading of a workload.
fn workload_name(workload: Workload) -> &'static str {
    match workload {
        Workload::TcpOut => "TCP stream out of the guest",
        Workload::TcpIn => "TCP stream into the guest",
        Workload::TcpRr => "TCP ping-pong",
    }
}

/// The workloads, in the order of the page.
const WORKLOADS: [Workload; 3] = [Workload::TcpOut, Workload::TcpIn, Workload::TcpRr];
