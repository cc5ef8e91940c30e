//! `ivcpu-vmm exits`: counts the exits of a VM that already runs, whatever VMM runs it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use nix::poll::{PollFd, PollFlags, poll};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::Counter;

/// Counts the exits of a running VM per physical CPU and reason (works with any VMM on KVM; needs root).
#[derive(Debug, Args)]
pub struct ExitsArgs {
    /// Process id of the VMM
    #[arg(long, value_name = "PID")]
    pid: i32,

    /// How long to count, such as 10s or 2min; ends earlier with the VM or on Ctrl-C
    #[arg(long = "for", value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    span: Duration,

    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
}

/// How often a wait looks for a signal.
const TICK_MS: u16 = 200;

/// Counts and prints.
pub fn run(args: &ExitsArgs) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).context("cannot catch signals")?;
    }

    let counter = Counter::start(args.pid)?;
    let started = Instant::now();
    let before = counter.snapshot()?;
    let ended = wait(&counter, args.span, &stop)?;
    let counted = started.elapsed();
    let window = &counter.snapshot()? - &before;
    let mut report = window.report();
    if ended {
        report.notes.push(format!("the VM ended after {:.1} s", counted.as_secs_f64()));
    }

    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("process {}, {:.1} s", args.pid, counted.as_secs_f64());
        print!("{report}");
    }
    Ok(())
}

/// Waits for `span`, a signal, or the end of the process; tells whether it was the last.
fn wait(counter: &Counter, span: Duration, stop: &AtomicBool) -> Result<bool> {
    let started = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let left = span.saturating_sub(started.elapsed());
        if left.is_zero() {
            break;
        }
        let timeout = u16::try_from(left.as_millis()).unwrap_or(TICK_MS).clamp(1, TICK_MS);
        match poll(&mut [PollFd::new(counter.process_end(), PollFlags::POLLIN)], timeout) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error).context("cannot wait for the VM's process"),
        }
    }
    Ok(false)
}
