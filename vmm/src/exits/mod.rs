//! Exits of one VM, counted exactly, per physical CPU and reason: any VMM's process, VMX and SVM alike.
//!
//! The kernel counts (`trace`), `reasons` maps what it counted to the rows of the table, and KVM's own counter
//! (`stats`) checks the sum. Where tracing is not permitted the counter falls back to KVM's own numbers, which know vCPUs
//! but no pCPUs and no APIC registers, and the report says so.

mod hist;
mod process;
mod reasons;
mod report;
mod snapshot;
mod stats;
mod trace;

pub mod command;
pub mod lifetime;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

pub use hist::HistError;
pub use process::KVM_DEBUGFS;
pub use reasons::{Events, Row, Rows, rows};
pub use report::{PcpuExits, Report, VcpuReport};
pub use snapshot::Snapshot;
pub use stats::{Counters, VcpuStats};
pub use trace::TRACEFS;

use hist::Hist;
use process::{Process, Roots};
use stats::KvmStats;
use trace::Trace;

/// Why exits cannot be counted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such process, or it has ended.
    #[error("there is no process {pid} (any more)")]
    NoProcess {
        /// The process.
        pid: i32,
    },
    /// The process belongs to somebody else.
    #[error("process {pid} belongs to another user: run this as that user or as root")]
    NotOurs {
        /// The process.
        pid: i32,
    },
    /// The process holds no VM.
    #[error(
        "process {pid} ({name}) runs no KVM virtual machine: give the pid of the VMM itself, not of a wrapper"
    )]
    NotAVmm {
        /// The process.
        pid: i32,
        /// What it is called.
        name: String,
    },
    /// tracefs is nowhere to be found.
    #[error("tracefs is not mounted: mount -t tracefs nodev /sys/kernel/tracing")]
    NoTracefs,
    /// tracefs may not be used.
    #[error("no permission to make a tracing instance in {path}: run this as root")]
    NotPermitted {
        /// What could not be entered or made.
        path: PathBuf,
    },
    /// This kernel has no such tracepoint.
    #[error("this kernel has no tracepoint kvm:{event}: is the module kvm loaded?")]
    NoTracepoint {
        /// The tracepoint.
        event: &'static str,
    },
    /// This kernel cannot count events by itself.
    #[error("this kernel was built without histogram triggers (CONFIG_HIST_TRIGGERS)")]
    NoHistograms,
    /// A file operation in tracefs failed.
    #[error("cannot {doing} {path}")]
    Tracefs {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel answered.
        source: std::io::Error,
    },
    /// A histogram does not look as expected.
    #[error("cannot understand {path}")]
    Hist {
        /// The file.
        path: PathBuf,
        /// The line in question.
        source: HistError,
    },
}

impl Error {
    /// Whether tracing is out of reach here as a whole, so that KVM's own counters are the next best thing.
    fn is_no_tracing(&self) -> bool {
        matches!(
            self,
            Error::NoTracefs | Error::NotPermitted { .. } | Error::NoTracepoint { .. } | Error::NoHistograms
        )
    }
}

/// A running count of one VM's exits. Dropping it removes everything it set up.
pub struct Counter {
    process: Process,
    pidfd: OwnedFd,
    kvm: KvmStats,
    trace: Result<Trace, String>,
    /// No other VM was seen on the host so far, so interrupts accepted by APIC ids are this VM's.
    alone: AtomicBool,
}

impl Counter {
    /// Starts to count for the VM of the process `pid`, which may be our own.
    ///
    /// Falls back to KVM's own counters where tracing is refused; fails where those cannot be read either.
    pub fn start(pid: i32) -> Result<Counter, Error> {
        let pidfd = Pid::from_raw(pid)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
            .ok_or(Error::NoProcess { pid })?;
        let process = Process::find(Roots::default(), pid)?;
        let own = u32::try_from(pid) == Ok(std::process::id());
        let kvm = KvmStats::open(&process, pidfd.as_fd(), own);
        let trace = match Trace::start(|| process.threads()) {
            Err(error) if error.is_no_tracing() && kvm.readable() => Err(error.to_string()),
            started => Ok(started?),
        };
        let alone = AtomicBool::new(process.is_alone());
        Ok(Counter { process, pidfd, kvm, trace, alone })
    }

    /// What was counted up to now. Costs some ten short file reads and touches neither the VM nor its threads.
    ///
    /// Works on after the VM has ended: the traced counts stay, KVM's own count is then unknown.
    pub fn snapshot(&self) -> Result<Snapshot, Error> {
        let mut snapshot = Snapshot {
            threads: self.process.vcpu_threads(),
            kvm_vcpus: self.kvm.per_vcpu(),
            untraced: self.trace.as_ref().err().cloned(),
            ..Snapshot::default()
        };
        match &self.trace {
            Ok(trace) => {
                let (exits, kvm_exits) = self.exits_of_one_moment(trace)?;
                snapshot.kvm_exits = kvm_exits;
                if !self.process.is_alone() {
                    self.alone.store(false, Ordering::Relaxed);
                }
                snapshot.take_counts(trace.counts(exits)?, self.alone.load(Ordering::Relaxed));
            }
            Err(_) => snapshot.kvm_exits = self.kvm.exits(),
        }
        Ok(snapshot)
    }

    /// The exits up to now by pCPU and row; `None` where nothing may be traced. Reads files that are open already and
    /// nothing else, so any thread may do it, whatever it gave up.
    pub fn pcpus(&self) -> Result<Option<BTreeMap<u32, Rows>>, Error> {
        let Ok(trace) = &self.trace else { return Ok(None) };
        let mut snapshot = Snapshot::default();
        snapshot.take_counts(trace.counts(trace.exits()?)?, false);
        Ok(Some(snapshot.pcpus()))
    }

    /// The traced exits, and KVM's own count at the same moment: the middle between a reading before and one after. Where
    /// many exits fell in between (a busy host took the CPU away meanwhile) it tries again and keeps the closest.
    fn exits_of_one_moment(&self, trace: &Trace) -> Result<(Hist, Option<u64>), Error> {
        const TRIES: usize = 5;
        const CLOSE: u64 = 4;
        let mut closest: Option<(u64, Hist, u64)> = None;
        for _ in 0..TRIES {
            let before = self.kvm.exits();
            let exits = trace.exits()?;
            let Some((before, after)) = before.zip(self.kvm.exits()) else { return Ok((exits, None)) };
            let apart = after.saturating_sub(before);
            if closest.as_ref().is_none_or(|(least, ..)| apart < *least) {
                closest = Some((apart, exits, before.midpoint(after)));
            }
            if apart <= CLOSE {
                break;
            }
        }
        match closest {
            Some((_, exits, kvm_exits)) => Ok((exits, Some(kvm_exits))),
            None => Ok((trace.exits()?, None)),
        }
    }

    /// A descriptor that becomes readable when the VMM's process ends.
    pub fn process_end(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}
