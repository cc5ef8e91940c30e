//! The bystander: an application that has nothing to do with the network, a fixed integer loop on each vCPU.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use crate::pcpu::pin;

/// Iterations between two updates of a counter.
const BATCH: u64 = 20_000;

/// One CPU's iterations, alone on its cache line so that the loops do not slow each other.
#[repr(align(64))]
#[derive(Default)]
struct Iterations(AtomicU64);

/// A running bystander. Dropping it stops it.
pub struct Bystander {
    counters: Arc<[Iterations]>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Bystander {
    /// Starts one loop pinned to each of `cpus`. A `yielding` one only takes what others leave (`SCHED_IDLE`): it
    /// delays nobody's wake-up.
    pub fn start(cpus: &[usize], yielding: bool) -> io::Result<Self> {
        let counters: Arc<[Iterations]> = cpus.iter().map(|_| Iterations::default()).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let mut bystander = Self { counters, stop, threads: Vec::new() };
        for (index, cpu) in cpus.iter().copied().enumerate() {
            let (ready, started) = std::sync::mpsc::channel();
            let (counters, stop) = (bystander.counters.clone(), bystander.stop.clone());
            bystander.threads.push(thread::spawn(move || {
                let prepared = prepare(cpu, yielding);
                let runs = prepared.is_ok();
                let _ = ready.send(prepared);
                if runs {
                    iterate(&counters[index].0, &stop);
                }
            }));
            started.recv().map_err(|_| io::Error::other("a bystander thread died"))??;
        }
        Ok(bystander)
    }

    /// Iterations so far, in the order of the CPUs it was started on.
    pub fn iterations(&self) -> Vec<u64> {
        self.counters.iter().map(|counter| counter.0.load(Ordering::Relaxed)).collect()
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn prepare(cpu: usize, yielding: bool) -> io::Result<()> {
    pin(0, &[cpu])?;
    if yielding {
        let parameters = libc::sched_param { sched_priority: 0 };
        // SAFETY: the pointer is to a live, initialised structure that the call only reads.
        if unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn iterate(counter: &AtomicU64, stop: &AtomicBool) {
    let mut state = 1_u64;
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..BATCH {
            // A multiplication that depends on the one before: neither vectorised nor skipped.
            state = std::hint::black_box(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
        }
        // Only this thread writes its counter.
        counter.store(counter.load(Ordering::Relaxed) + BATCH, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn iterations_grow_on_every_cpu() {
        let bystander = Bystander::start(&[0, 0], true).expect("CPU 0 exists");
        let start = Instant::now();
        // A yielding one may wait long on a machine that builds.
        while bystander.iterations().iter().any(|iterations| *iterations < 10 * BATCH) {
            assert!(start.elapsed() < Duration::from_secs(60), "{:?}", bystander.iterations());
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_cpu_that_does_not_exist() {
        assert!(Bystander::start(&[1000], false).is_err());
    }
}
