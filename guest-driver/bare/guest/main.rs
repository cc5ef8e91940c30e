//! The guest: a program without an operating system that runs in user mode from its first instruction on, and
//! does one job (see `mailbox.rs`) each time it is started.

#![no_std]
#![no_main]

mod interrupt;
#[path = "../src/mailbox.rs"]
#[allow(dead_code, reason = "the host uses the rest")]
mod mailbox;
mod memory;

use core::arch::x86_64::{_mm_lfence, _rdtsc};
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::*};

use ivcpu_abi::{Completion, Consumer, Geometry, Region, Sleep};
use mailbox::*;

/// Ticks without work after which a consumer that may sleep does.
const SPIN: u64 = 20_000;
/// Ticks between a kick or exit and the next.
const PAUSE: u64 = 60_000;

/// The entry point. The host sets the stack and passes the arguments in registers.
///
/// # Safety
///
/// Called by the host alone, with the memory of `mailbox.rs` there and mapped to itself.
#[unsafe(no_mangle)]
unsafe extern "sysv64" fn start(job: u64, count: u64) -> ! {
    // SAFETY: the host has put a zeroed mailbox there, and everything in it is atomic.
    let mailbox = unsafe { &*(MAILBOX_AT as *const Mailbox) };
    let work = Work { mailbox, count };
    match Job::from_word(job) {
        Some(Job::Spin) => work.receive(|_| None::<()>, drop),
        Some(Job::Line) => {
            work.receive(|received| (mailbox.line.0.load(Acquire) > received).then_some(()), drop)
        }
        Some(Job::Fifo) => work.consume(false),
        Some(Job::SleepyFifo) => work.consume(true),
        Some(Job::Interrupt) => work.take_interrupts(),
        Some(Job::Kick) => work.send(KICK_AT, 1),
        Some(Job::Exit) => work.send(REPORT_AT, Report::Exit as u64),
        None => report(Report::Broken),
    }
    loop {
        report(Report::Done);
    }
}

/// One job.
struct Work {
    mailbox: &'static Mailbox,
    count: u64,
}

impl Work {
    /// Spins until `look`, given how many have been received so far, finds the next hand-over; notes the time, deals
    /// with it by `then`; and so on.
    fn receive<T>(&self, mut look: impl FnMut(u64) -> Option<T>, mut then: impl FnMut(T)) {
        self.mailbox.ready.0.store(1, Release);
        let mut received = 0;
        while received < self.count && !self.is_stopped() {
            if let Some(found) = look(received) {
                self.note(&self.mailbox.at, received, ticks());
                then(found);
                received += 1;
                self.mailbox.received.0.store(received, Release);
            }
        }
    }

    fn consume(&self, sleepy: bool) {
        let Some(mut consumer) = attach() else { return report(Report::Broken) };
        let mut idle_since = None;
        let look = |_| {
            let completion = consumer.poll();
            if completion.is_some() {
                idle_since = None;
            } else if sleepy
                && ticks() - *idle_since.get_or_insert_with(ticks) > SPIN
                && consumer.prepare_sleep() == Sleep::Now
            {
                report(Report::Asleep);
                consumer.wake();
            }
            completion
        };
        self.receive(look, |completion| self.look_at_used_ring(completion));
        consumer.detach(|_| {});
    }

    fn look_at_used_ring(&self, Completion { ring, source, .. }: Completion) {
        let queue = |of: &'static [[AtomicU32; SOURCES]; RINGS]| of.get(ring)?.get(source as usize);
        if let (Some(used), Some(seen)) = (queue(&self.mailbox.used), queue(&self.mailbox.seen)) {
            seen.store(used.load(Relaxed), Relaxed);
        }
    }

    fn take_interrupts(&self) {
        self.receive(|received| (self.mailbox.interrupts.load(Relaxed) > received).then_some(()), drop);
    }

    /// Writes `value` to `address`, which is no memory, and waits until the host has noticed; and so on.
    fn send(&self, address: u64, value: u64) {
        self.mailbox.ready.0.store(1, Release);
        for sent in 0..self.count {
            let pause_ends = ticks() + PAUSE;
            while ticks() < pause_ends {}
            let start = ticks();
            write(address, value);
            let took = ticks() - start;
            self.note(&self.mailbox.at, sent, start);
            self.note(&self.mailbox.took, sent, took);
            self.mailbox.received.0.store(sent + 1, Release);
            while self.mailbox.line.0.load(Acquire) <= sent && !self.is_stopped() {}
        }
    }

    fn note(&self, samples: &[AtomicU64; SAMPLES], index: u64, value: u64) {
        if let Some(sample) = samples.get(index as usize) {
            sample.store(value, Relaxed);
        }
    }

    fn is_stopped(&self) -> bool {
        self.mailbox.stop.0.load(Relaxed) != 0
    }
}

fn attach() -> Option<Consumer> {
    let base = NonNull::new(ptr::with_exposed_provenance_mut(FIFO_AT as usize))?;
    // SAFETY: the host has put the region there, nothing else is, and only the ABI crate touches it.
    let region = unsafe { Region::open(base, Geometry::DEFAULT.region_size()) }.ok()?;
    let mut consumer = Consumer::attach(region, 1, 64);
    // Completes the look at all pending words, so that it is not part of the first hand-over.
    while consumer.poll().is_some() {}
    Some(consumer)
}

fn report(what: Report) {
    write(REPORT_AT, what as u64);
}

fn write(address: u64, value: u64) {
    // SAFETY: there is no memory at the addresses this is called with; KVM takes the write.
    unsafe { ptr::with_exposed_provenance_mut::<u64>(address as usize).write_volatile(value) };
}

/// The cycle counter, read when earlier loads are done.
fn ticks() -> u64 {
    // SAFETY: both instructions are in every x86-64 CPU, and the host lets user mode read the counter.
    unsafe {
        _mm_lfence();
        _rdtsc()
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {
        report(Report::Broken);
    }
}
