//! What the guest and the host agree on: where things lie in guest memory, the jobs, and the words they share.
//!
//! The guest is compiled from this same file, so it needs neither the standard library nor anything else.

use core::sync::atomic::{AtomicU32, AtomicU64};

/// The guest's interrupt handler; the rest of its program follows. Its linker script has the same address.
pub const INTERRUPT_AT: u64 = 0x20_0000;
/// Where the stack begins, downwards.
pub const STACK_TOP: u64 = 0x40_0000;
/// The [`Mailbox`].
pub const MAILBOX_AT: u64 = 0x40_0000;
/// The FIFO region.
pub const FIFO_AT: u64 = 0x60_0000;
/// No memory: writing a [`Report`] here exits to user space.
pub const REPORT_AT: u64 = 0x80_0000;
/// No memory: writing here is a kick, the way a driver notifies a virtio device.
pub const KICK_AT: u64 = 0x80_0008;

/// Rings the guest expects completions from.
pub const RINGS: usize = 2;
/// Sources of each of those rings.
pub const SOURCES: usize = 4;
/// Hand-overs of which the times are kept.
pub const SAMPLES: usize = 1 << 13;

/// What the guest is started to do. A job ends after `count` hand-overs, or when [`Mailbox::stop`] is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Job {
    /// Poll [`Mailbox::line`], as the other jobs do, and receive nothing.
    Spin,
    /// Receive each increment of [`Mailbox::line`].
    Line,
    /// Receive completions from the FIFO; spin between them.
    Fifo,
    /// Receive completions from the FIFO; without one, sleep until called.
    SleepyFifo,
    /// Receive interrupts.
    Interrupt,
    /// Kick.
    Kick,
    /// Exit to user space.
    Exit,
}

impl Job {
    /// The job with this number.
    pub fn from_word(word: u64) -> Option<Self> {
        [Self::Spin, Self::Line, Self::Fifo, Self::SleepyFifo, Self::Interrupt, Self::Kick, Self::Exit]
            .into_iter()
            .find(|job| *job as u64 == word)
    }
}

/// Why the guest exits to user space: the word it writes at [`REPORT_AT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Report {
    /// The job is done. Nothing comes after it.
    Done,
    /// The consumer sleeps; enter the guest again when a source is called.
    Asleep,
    /// Only to exit.
    Exit,
    /// The guest's program panicked, or could not open the FIFO region.
    Broken,
}

impl Report {
    /// The report with this number.
    pub fn from_word(word: u64) -> Option<Self> {
        [Self::Done, Self::Asleep, Self::Exit, Self::Broken].into_iter().find(|report| *report as u64 == word)
    }
}

/// A word alone on its pair of cache lines.
#[derive(Debug, Default)]
#[repr(C, align(128))]
pub struct Line(pub AtomicU64);

/// The words guest and host share, beside the FIFO region. All zero when a job starts.
#[derive(Debug)]
#[repr(C)]
pub struct Mailbox {
    /// Host to guest: hand-overs made. For a kick or an exit: received.
    pub line: Line,
    /// Host to guest: not 0 = stop.
    pub stop: Line,
    /// Guest to host: 1 = the job has begun.
    pub ready: Line,
    /// Guest to host: hand-overs received. For a kick or an exit: made.
    pub received: Line,
    /// Guest's own: interrupts taken, and when the first instruction of the last one's handler ran.
    pub interrupts: AtomicU64,
    /// See `interrupts`.
    pub interrupted_at: AtomicU64,
    /// Guest to host: when hand-over `n` was received, or its kick or exit begun; in ticks of the cycle counter.
    pub at: [AtomicU64; SAMPLES],
    /// Guest to host: how many ticks the kick or exit took.
    pub took: [AtomicU64; SAMPLES],
    /// Host to guest: stands for a used ring's index, one a source.
    pub used: [[AtomicU32; SOURCES]; RINGS],
    /// Guest to host: the `used` it saw when it was last handed the source out.
    pub seen: [[AtomicU32; SOURCES]; RINGS],
}
