//! What the host asks a guest over its serial line, and what the guest answers: one JSON object a line, each answer
//! behind a mark that tells it from the console's other text.

use serde::{Deserialize, Serialize};

use crate::link::Link;
use crate::procfs::{CpuTime, Interrupt};
use crate::traffic::{Counts, Traffic};

/// Comes before every answer.
pub const MARK: &str = "@ivcpu-lab ";

/// A request to the guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Give an interface the guest's address, and bring it up.
    Network {
        /// Which.
        link: Link,
        /// How many it is to have.
        queue_pairs: u16,
    },
    /// Start the shipped service that keeps device interrupts on the IVCPU.
    Service,
    /// Start a bystander on these CPUs; see `Bystander::start` for yielding.
    Bystander {
        /// One loop pinned to each.
        cpus: Vec<usize>,
        /// It takes only what others leave.
        yielding: bool,
    },
    /// Iterations of the bystander so far.
    Iterations,
    /// Stop the bystander.
    StopBystander,
    /// Connect to the wire and start traffic.
    Traffic(Traffic),
    /// What the traffic's guest end has done so far.
    Counts(Link),
    /// Forget the round-trip times so far.
    ResetLatency(Link),
    /// Stop the traffic.
    StopTraffic(Link),
    /// Interrupts of the NICs.
    Interrupts,
    /// Times of each CPU.
    CpuTimes,
    /// Run a shell command.
    Run(String),
    /// Power off.
    PowerOff,
}

/// The guest's answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Said once, unasked: the guest is up.
    Hello {
        /// `uname -r`.
        kernel: String,
        /// Number of CPUs.
        cpus: usize,
    },
    /// It is done.
    Done,
    /// It failed.
    Failed(String),
    /// Bystander iterations, in the order of its CPUs.
    Iterations(Vec<u64>),
    /// Traffic so far, or up to its end.
    Counts(Counts),
    /// The NICs' interrupts.
    Interrupts(Vec<Interrupt>),
    /// One entry a CPU.
    CpuTimes(Vec<CpuTime>),
    /// A shell command has ended.
    Output {
        /// Its exit status.
        status: i32,
        /// What it wrote to standard output and standard error.
        text: String,
    },
}
