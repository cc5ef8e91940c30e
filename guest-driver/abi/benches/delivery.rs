//! What it takes to hand a completion to a thread on another core: `cargo bench -p ivcpu-abi`.
//!
//! Beside each other in one run: a bare cache line, the FIFO with its consumer awake and asleep, eventfd with epoll
//! and with a blocking read. How is said in `measure`.

mod measure;
#[allow(dead_code, reason = "the memory has more to offer")]
#[path = "../tests/memory/mod.rs"]
mod memory;

use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use ivcpu_abi::{Consumer, Geometry, Producer, Push, Region, Sleep, Source};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use measure::{
    Figures, RUNS, SLEEP_PAUSE, Table, median, nanoseconds_per_tick, on_two_cpus, send_all, ticks, two_cpus,
};
use memory::Memory;

/// A word alone on its pair of cache lines.
#[repr(align(128))]
#[derive(Default)]
struct Line(AtomicU64);

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
    let sender = || send_all(samples, pause, &received.0, &mut send);
    let ((sent_at, sending), received_at) = on_two_cpus(cpus, sender, receiver);
    Figures::new(&sent_at, &received_at, sending)
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
    let ways: [Way; 5] = [cache_line, fifo_awake, fifo_asleep, eventfd_epoll, eventfd_read];
    let mut table =
        Table::new(["cache line", "FIFO, awake", "FIFO, asleep", "eventfd, epoll", "eventfd, read"]);
    let mut streams = Vec::new();
    for _ in 0..RUNS {
        for (index, way) in ways.iter().enumerate() {
            table.add(index, way(cpus));
        }
        streams.push(stream(cpus));
    }
    println!("completion delivery from CPU {} to CPU {}, ns, medians of {RUNS} runs", cpus[0], cpus[1]);
    table.print(tick);
    println!("a completion in a stream: {:.1} ns", tick * median(streams));
    let [alone, full, spread] = idle_polls([(1, 1), (1, 256), (16, 16)]);
    println!("a poll without work: {:.2} ns with 1 source", tick * alone);
    println!(
        "delivery: FIFO awake = {:.2} x the cache line; eventfd = {:.1} x (epoll), {:.1} x (read) FIFO awake; \
         FIFO asleep = {:.2} x eventfd read; idle poll with 256 sources = {:.2} x (1 ring), {:.2} x (16 rings) \
         that with 1",
        table.ratio(1, 0),
        table.ratio(3, 1),
        table.ratio(4, 1),
        table.ratio(2, 4),
        full / alone,
        spread / alone,
    );
}
