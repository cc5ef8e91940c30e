//! How a hand-over from one CPU to another is measured, whoever is at the two ends.
//!
//! One side sends, one receives, each pinned to its CPU. A sender waits until the last hand-over has been
//! received, pauses, notes the time, and sends; the receiver notes the time at which it has it. Ways are measured
//! in turn, several times; medians over the runs count.

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

pub(crate) const RUNS: usize = 9;

/// A pause long enough for the other side to fall asleep, ticks.
pub(crate) const SLEEP_PAUSE: u64 = 60_000;

/// Time in ticks: of the cycle counter where there is one, so that reading it does not drown a cache line.
pub(crate) fn ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: both instructions are in every x86-64 CPU. The fence makes earlier loads count.
    unsafe {
        core::arch::x86_64::_mm_lfence();
        core::arch::x86_64::_rdtsc()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        START.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }
}

pub(crate) fn nanoseconds_per_tick() -> f64 {
    let (start, from) = (Instant::now(), ticks());
    while start.elapsed() < Duration::from_millis(50) {}
    start.elapsed().as_nanos() as f64 / (ticks() - from) as f64
}

/// The first two CPUs this process may use.
pub(crate) fn two_cpus() -> Option<[usize; 2]> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).ok()?;
    let mut cpus = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    Some([cpus.next()?, cpus.next()?])
}

fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).expect("a CPU of the affinity mask fits into one");
    sched_setaffinity(Pid::from_raw(0), &set).expect("a CPU of the affinity mask can be used");
}

/// Runs both at a time, each on its CPU.
pub(crate) fn on_two_cpus<F: Send, S: Send>(
    cpus: [usize; 2],
    first: impl FnOnce() -> F + Send,
    second: impl FnOnce() -> S + Send,
) -> (F, S) {
    let both_are_there = Barrier::new(2);
    let start = |cpu| {
        pin(cpu);
        both_are_there.wait();
    };
    thread::scope(|scope| {
        let second = scope.spawn(|| {
            start(cpus[1]);
            second()
        });
        let first = scope.spawn(|| {
            start(cpus[0]);
            first()
        });
        (first.join().expect("the first side ends"), second.join().expect("the second side ends"))
    })
}

/// Sends `samples` times, each when `received` says that those before have arrived, after a pause of `pause` to
/// twice that (ticks). Says when each began, and how long it took the sender.
pub(crate) fn send_all(
    samples: usize,
    pause: u64,
    received: &AtomicU64,
    mut send: impl FnMut(),
) -> (Vec<u64>, Vec<u64>) {
    let (mut at, mut took) = (Vec::with_capacity(samples), Vec::with_capacity(samples));
    let mut random = 1u64;
    for count in 0..samples as u64 {
        while received.load(Ordering::Acquire) < count {}
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let until = ticks() + pause + (random >> 33) % pause;
        while ticks() < until {}
        let start = ticks();
        send();
        took.push(ticks() - start);
        at.push(start);
    }
    (at, took)
}

/// Percentiles of one run, ticks.
#[derive(Clone, Copy, Default)]
pub(crate) struct Figures {
    delivery: [f64; 3],
    /// Median time the sender spent on sending.
    sending: f64,
}

impl Figures {
    /// Of hand-overs by when they were sent and received, and the time sending took.
    pub(crate) fn new(sent_at: &[u64], received_at: &[u64], sending: Vec<u64>) -> Self {
        // The first tenth warms up.
        let delivery = received_at.iter().zip(sent_at).skip(sent_at.len() / 10);
        let delivery = delivery.map(|(to, from)| to.saturating_sub(*from)).collect();
        Self { delivery: percentiles(delivery), sending: percentiles(sending)[0] }
    }
}

fn percentiles(mut ticks: Vec<u64>) -> [f64; 3] {
    ticks.sort_unstable();
    [0.5, 0.99, 0.999].map(|part| ticks[((ticks.len() - 1) as f64 * part) as usize] as f64)
}

pub(crate) fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

/// The runs of each way.
pub(crate) struct Table<const N: usize> {
    names: [&'static str; N],
    runs: [Vec<Figures>; N],
}

impl<const N: usize> Table<N> {
    pub(crate) fn new(names: [&'static str; N]) -> Self {
        Self { names, runs: [const { Vec::new() }; N] }
    }

    pub(crate) fn add(&mut self, way: usize, figures: Figures) {
        self.runs[way].push(figures);
    }

    /// One row a way; `tick` in nanoseconds.
    pub(crate) fn print(&self, tick: f64) {
        println!("{:16}{:>10}{:>10}{:>10}{:>10}", "way", "p50", "p99", "p99.9", "sending");
        for (name, figures) in self.names.iter().zip(&self.runs) {
            let of = |pick: &dyn Fn(&Figures) -> f64| tick * median(figures.iter().map(pick).collect());
            let [half, most, nearly_all] = [0, 1, 2].map(|at| of(&|figures| figures.delivery[at]));
            println!(
                "{name:16}{half:10.0}{most:10.0}{nearly_all:10.0}{:10.0}",
                of(&|figures| figures.sending)
            );
        }
    }

    /// How many times as long `way` takes as `to`, at the median. Of neighbours in time: what a cache line costs
    /// changes when a hypervisor moves the CPUs.
    pub(crate) fn ratio(&self, way: usize, to: usize) -> f64 {
        let p50 = |run: &Figures| run.delivery[0];
        median(self.runs[way].iter().zip(&self.runs[to]).map(|(way, to)| p50(way) / p50(to)).collect())
    }
}
