//! What it takes to hand a completion to a thread on another core: `cargo bench -p ivcpu-abi`.
//!
//! One thread sends, one receives, each pinned to its core. A sender waits until the last completion has been
//! received, pauses, notes the time, and sends; the receiver notes the time at which it has it. Beside each
//! other in one run: a bare cache line, the FIFO with its consumer awake and asleep, eventfd with epoll and with
//! a blocking read. Ways are measured in turn, several times; medians over the runs count.

#[allow(dead_code, reason = "the memory has more to offer")]
#[path = "../tests/memory/mod.rs"]
mod memory;

use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ivcpu_abi::{Consumer, Geometry, Producer, Push, Region, Sleep, Source};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use memory::Memory;

const RUNS: usize = 9;

/// A word alone on its pair of cache lines.
#[repr(align(128))]
#[derive(Default)]
struct Line(AtomicU64);

/// Time in ticks: of the cycle counter where there is one, so that reading it does not drown a cache line.
fn ticks() -> u64 {
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

fn nanoseconds_per_tick() -> f64 {
    let (start, from) = (Instant::now(), ticks());
    while start.elapsed() < Duration::from_millis(50) {}
    start.elapsed().as_nanos() as f64 / (ticks() - from) as f64
}

/// The first two CPUs this process may use.
fn two_cpus() -> Option<[usize; 2]> {
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
fn on_two_cpus<S: Send, R: Send>(
    cpus: [usize; 2],
    sender: impl FnOnce() -> S + Send,
    receiver: impl FnOnce() -> R + Send,
) -> (S, R) {
    let both_are_there = Barrier::new(2);
    let start = |cpu| {
        pin(cpu);
        both_are_there.wait();
    };
    thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            start(cpus[1]);
            receiver()
        });
        let sender = scope.spawn(|| {
            start(cpus[0]);
            sender()
        });
        (sender.join().expect("the sender ends"), receiver.join().expect("the receiver ends"))
    })
}

/// Percentiles of one run, ticks.
#[derive(Clone, Copy, Default)]
struct Figures {
    delivery: [f64; 3],
    /// Median time the sender spent on sending.
    sending: f64,
}

fn percentiles(mut ticks: Vec<u64>) -> [f64; 3] {
    ticks.sort_unstable();
    [0.5, 0.99, 0.999].map(|part| ticks[((ticks.len() - 1) as f64 * part) as usize] as f64)
}

/// Measures one way of handing over, `samples` times, with pauses of `pause` to twice that (ticks).
fn measure(
    cpus: [usize; 2],
    samples: usize,
    pause: u64,
    mut send: impl FnMut() + Send,
    mut receive: impl FnMut() + Send,
) -> Figures {
    let received = Line::default();
    let receiver = || {
        let mut at = Vec::with_capacity(samples);
        for count in 1..=samples as u64 {
            receive();
            at.push(ticks());
            received.0.store(count, Ordering::Release);
        }
        at
    };
    let sender = || {
        let (mut at, mut took) = (Vec::with_capacity(samples), Vec::with_capacity(samples));
        let mut random = 1u64;
        for count in 0..samples as u64 {
            while received.0.load(Ordering::Acquire) < count {}
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let until = ticks() + pause + (random >> 33) % pause;
            while ticks() < until {}
            let start = ticks();
            send();
            took.push(ticks() - start);
            at.push(start);
        }
        (at, took)
    };
    let ((sent_at, sending), received_at) = on_two_cpus(cpus, sender, receiver);
    // The first tenth warms up.
    let warm = samples / 10;
    let delivery =
        received_at.iter().zip(&sent_at).skip(warm).map(|(to, from)| to.saturating_sub(*from)).collect();
    Figures { delivery: percentiles(delivery), sending: percentiles(sending)[0] }
}

/// A region of one ring with `sources` sources, and both ends.
fn fifo(sources: usize) -> (Memory, Producer, Vec<Source>, Consumer) {
    let (memory, region) = Memory::with_region(Geometry::DEFAULT);
    let (producer, sources) = producer(region, 0, sources);
    let mut consumer = Consumer::attach(region, 1, 64);
    assert_eq!(
        consumer.poll(),
        None,
        "a new region is empty, and this was the look at all its pending words"
    );
    (memory, producer, sources, consumer)
}

fn producer(region: Region, ring: usize, sources: usize) -> (Producer, Vec<Source>) {
    let mut producer = Producer::claim(region, ring).expect("the region has this ring");
    let sources = (1..=sources as u64).map(|n| producer.register(n * 4096).expect("a free source")).collect();
    (producer, sources)
}

fn cache_line(cpus: [usize; 2]) -> Figures {
    let line = Line::default();
    let (mut sent, mut seen) = (0, 0);
    let send = || {
        sent += 1;
        line.0.store(sent, Ordering::Release);
    };
    let receive = || {
        seen += 1;
        while line.0.load(Ordering::Acquire) != seen {}
    };
    measure(cpus, 5_000, 1_000, send, receive)
}

fn fifo_awake(cpus: [usize; 2]) -> Figures {
    let (_memory, mut producer, sources, mut consumer) = fifo(1);
    let send = || {
        let _ = black_box(producer.push(sources[0], 0));
    };
    let receive = || while black_box(consumer.poll()).is_none() {};
    measure(cpus, 5_000, 1_000, send, receive)
}

const SLEEP_PAUSE: u64 = 60_000;

fn fifo_asleep(cpus: [usize; 2]) -> Figures {
    let (_memory, mut producer, sources, mut consumer) = fifo(1);
    let call = EventFd::new(0).expect("an eventfd");
    let send = || {
        if let Push::Signal(_) = producer.push(sources[0], 0) {
            call.write(1).expect("the call is written");
        }
    };
    let receive = || {
        while black_box(consumer.poll()).is_none() {
            if consumer.prepare_sleep() == Sleep::Now {
                call.read().expect("the call is read");
                consumer.wake();
            }
        }
    };
    measure(cpus, 400, SLEEP_PAUSE, send, receive)
}

fn eventfd_epoll(cpus: [usize; 2]) -> Figures {
    let call = EventFd::new(0).expect("an eventfd");
    let epoll = Epoll::new().expect("an epoll");
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, call.as_raw_fd(), event).expect("the eventfd is added");
    let send = || call.write(1).expect("the call is written");
    let receive = || {
        epoll.wait(-1, &mut [EpollEvent::default()]).expect("epoll waits");
        call.read().expect("the call is read");
    };
    measure(cpus, 400, SLEEP_PAUSE, send, receive)
}

fn eventfd_read(cpus: [usize; 2]) -> Figures {
    let call = EventFd::new(0).expect("an eventfd");
    let send = || call.write(1).expect("the call is written");
    let receive = || {
        call.read().expect("the call is read");
    };
    measure(cpus, 400, SLEEP_PAUSE, send, receive)
}

/// Ticks from one completion to the next when they stream: 64 sources in turn, at most 32 not yet received, so
/// that none is merged. Both cores are busy all that time.
fn stream(cpus: [usize; 2]) -> f64 {
    const COMPLETIONS: u64 = 20_000;
    let (_memory, mut producer, sources, mut consumer) = fifo(64);
    let (received, done) = (Line::default(), Line::default());
    let receiver = || {
        let mut count = 0;
        while done.0.load(Ordering::Acquire) == 0 {
            if consumer.poll().is_some() {
                count += 1;
                received.0.store(count, Ordering::Release);
            }
        }
    };
    let sender = || {
        let start = ticks();
        let mut merged = 0;
        for (count, source) in (0..COMPLETIONS).zip(sources.iter().cycle()) {
            while count - merged - received.0.load(Ordering::Acquire) >= 32 {}
            merged += u64::from(producer.push(*source, 0) != Push::Queued);
        }
        while received.0.load(Ordering::Acquire) < COMPLETIONS - merged {}
        let took = ticks() - start;
        done.0.store(1, Ordering::Release);
        (took, merged)
    };
    let ((took, merged), ()) = on_two_cpus(cpus, sender, receiver);
    assert_eq!(merged, 0, "completions of sources already received were merged");
    took as f64 / COMPLETIONS as f64
}

/// Ticks one poll takes that finds nothing, beside idle sources in rings: `[(rings, sources of each)]`. Measured
/// in short batches in turn, of which the medians count.
fn idle_polls<const N: usize>(setups: [(usize, usize); N]) -> [f64; N] {
    const POLLS: u32 = 1_000;
    let mut consumers = setups.map(|(rings, sources)| {
        let (memory, region) = Memory::with_region(Geometry::DEFAULT);
        let mut consumer = Consumer::attach(region, 1, 64);
        for ring in 0..rings {
            let (mut producer, sources) = producer(region, ring, sources);
            for source in sources {
                let _ = producer.push(source, 0);
            }
        }
        while consumer.poll().is_some() {}
        (memory, consumer, Vec::new())
    });
    for _ in 0..500 {
        for (_, consumer, batches) in &mut consumers {
            let start = ticks();
            for _ in 0..POLLS {
                black_box(consumer.poll());
            }
            batches.push((ticks() - start) as f64 / f64::from(POLLS));
        }
    }
    consumers.map(|(_, _, batches)| median(batches))
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") {
        println!("delivery: a benchmark, measures only under cargo bench");
        return;
    }
    let Some(cpus) = two_cpus() else {
        println!("delivery: SKIPPED, needs two CPUs");
        return;
    };
    let tick = nanoseconds_per_tick();
    type Way = fn([usize; 2]) -> Figures;
    let ways: [(&str, Way); 5] = [
        ("cache line", cache_line),
        ("FIFO, awake", fifo_awake),
        ("FIFO, asleep", fifo_asleep),
        ("eventfd, epoll", eventfd_epoll),
        ("eventfd, read", eventfd_read),
    ];
    let mut runs = [const { Vec::new() }; 5];
    let mut streams = Vec::new();
    for _ in 0..RUNS {
        for (way, figures) in ways.iter().zip(&mut runs) {
            figures.push(way.1(cpus));
        }
        streams.push(stream(cpus));
    }
    println!("completion delivery from CPU {} to CPU {}, ns, medians of {RUNS} runs", cpus[0], cpus[1]);
    println!("{:16}{:>10}{:>10}{:>10}{:>10}", "way", "p50", "p99", "p99.9", "sending");
    for ((name, _), figures) in ways.iter().zip(&runs) {
        let of = |pick: &dyn Fn(&Figures) -> f64| tick * median(figures.iter().map(pick).collect());
        let [half, most, nearly_all] = [0, 1, 2].map(|at| of(&|figures| figures.delivery[at]));
        println!("{name:16}{half:10.0}{most:10.0}{nearly_all:10.0}{:10.0}", of(&|figures| figures.sending));
    }
    println!("a completion in a stream: {:.1} ns", tick * median(streams));
    let [alone, full, spread] = idle_polls([(1, 1), (1, 256), (16, 16)]);
    println!("a poll without work: {:.2} ns with 1 source", tick * alone);
    // Of neighbours in time: what a cache line costs changes when a hypervisor moves the CPUs.
    let ratio = |way: usize, to: usize| {
        let p50 = |run: &Figures| run.delivery[0];
        median(runs[way].iter().zip(&runs[to]).map(|(way, to)| p50(way) / p50(to)).collect())
    };
    println!(
        "delivery: FIFO awake = {:.2} x the cache line; eventfd = {:.1} x (epoll), {:.1} x (read) FIFO awake; \
         FIFO asleep = {:.2} x eventfd read; idle poll with 256 sources = {:.2} x (1 ring), {:.2} x (16 rings) \
         that with 1",
        ratio(1, 0),
        ratio(3, 1),
        ratio(4, 1),
        ratio(2, 4),
        full / alone,
        spread / alone,
    );
}
