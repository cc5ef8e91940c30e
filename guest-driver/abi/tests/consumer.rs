//! The C consumer, compiled and fed by the Rust producer: another process, another language, one region.
//!
//! It sleeps and is woken 100,000 times, with random pauses; `IVCPU_SLEEP_RACES` in the environment asks for
//! another number.

#[allow(dead_code, reason = "the memory has more to offer")]
mod memory;

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ivcpu_abi::{Geometry, Producer, Push, Region, Source, State};
use memory::Memory;
use vmm_sys_util::eventfd::EventFd;

const RINGS: usize = 2;
const SOURCES: usize = 4;
/// Longer than a busy machine takes to run a process again, by far.
const PATIENCE: Duration = Duration::from_secs(20);

fn compile(name: &str, flags: &[&str]) -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let status = Command::new("cc")
        .args(["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(here.join("../include"))
        .args(flags)
        .arg(here.join("tests/consumer.c"))
        .arg("-o")
        .arg(&program)
        .status()
        .expect("a C compiler is installed as cc");
    assert!(status.success(), "cc {flags:?} failed");
    program
}

/// The host: one producer a ring, the page behind the region, the call, and the C consumer.
struct Host {
    memory: Memory,
    region: Region,
    bytes: usize,
    call: EventFd,
    producers: Vec<(Producer, Vec<Source>)>,
    consumer: Child,
    /// Calls signalled.
    called: u64,
}

impl Host {
    fn start(program: &Path) -> Self {
        let geometry = Geometry::new(RINGS as u32, SOURCES as u32).unwrap();
        let bytes = geometry.used_size();
        let memory = Memory::new(bytes + 4096);
        // SAFETY: the mapping lives as long as the host.
        let region = unsafe { Region::create(memory.base, bytes, geometry) }.unwrap();
        let call = EventFd::new(0).unwrap();
        let consumer = Command::new(program)
            .args(
                [memory.file.as_raw_fd(), bytes as i32, call.as_raw_fd(), SOURCES as i32]
                    .map(|n| n.to_string()),
            )
            .spawn()
            .unwrap();
        // Before the consumer attaches, the call is the completion, and this one only wakes.
        let start = Instant::now();
        while region.consumer_state() == State::Absent {
            assert!(start.elapsed() < PATIENCE, "the C consumer does not attach");
            std::thread::yield_now();
        }
        let producers = (0..RINGS).map(|ring| claim(region, ring)).collect();
        Self { memory, region, bytes, call, producers, consumer, called: 0 }
    }

    fn behind(&self, offset: usize) -> &AtomicU32 {
        self.memory.word(self.bytes + offset)
    }

    fn push(&mut self, ring: usize, source: usize, now: Instant) {
        let queue = ring * SOURCES + source;
        self.behind(4 * queue).fetch_add(1, Ordering::Relaxed);
        let (producer, sources) = &mut self.producers[ring];
        if let Push::Signal(_) = producer.push(sources[source], now.elapsed().as_micros() as u64) {
            self.called += 1;
            self.call.write(1).unwrap();
        }
    }

    /// A producer dies and its successor announces every source once.
    fn replace_producer(&mut self, ring: usize, now: Instant) {
        self.producers[ring] = claim(self.region, ring);
        for source in 0..SOURCES {
            self.push(ring, source, now);
        }
    }

    fn wait_until_seen(&mut self) {
        let start = Instant::now();
        for queue in 0..RINGS * SOURCES {
            let used = self.behind(4 * queue).load(Ordering::Relaxed);
            while self.behind(0x800 + 4 * queue).load(Ordering::Acquire) != used {
                if start.elapsed() > PATIENCE {
                    let _ = self.consumer.kill();
                    panic!("queue {queue}: a completion was lost; {:?}", self.region.consumer_state());
                }
                std::hint::spin_loop();
            }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.consumer.kill();
        let _ = self.consumer.wait();
    }
}

fn claim(region: Region, ring: usize) -> (Producer, Vec<Source>) {
    let mut producer = Producer::claim(region, ring).unwrap();
    let sources = (1..=SOURCES).map(|n| producer.register(((ring * SOURCES + n) as u64) << 12).unwrap());
    let sources = sources.collect();
    (producer, sources)
}

#[test]
fn no_completion_is_lost_between_a_rust_producer_and_the_c_consumer() {
    let races: u32 = std::env::var("IVCPU_SLEEP_RACES").map_or(100_000, |count| count.parse().unwrap());
    let mut host = Host::start(&compile("consumer", &[]));
    let now = Instant::now();
    let mut random = 1u64;
    let mut next = |below: u64| {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (random >> 33) % below
    };
    let (mut rounds, sleeps) = (0u32, 0xff8);
    while host.behind(sleeps).load(Ordering::Relaxed) < races {
        rounds += 1;
        for _ in 0..=next(4).saturating_sub(2) {
            host.push(next(RINGS as u64) as usize, next(SOURCES as u64) as usize, now);
            for _ in 0..next(300) {
                std::hint::spin_loop();
            }
        }
        if rounds.is_multiple_of(50) {
            host.replace_producer(next(RINGS as u64) as usize, now);
        }
        host.wait_until_seen();
        // Now the consumer is about to sleep, and the longer pauses find it asleep.
        let longest = if next(4) == 0 { 2_000 } else { 16 };
        for _ in 0..next(longest) {
            std::hint::spin_loop();
        }
    }
    host.behind(0xffc).store(1, Ordering::Release);
    host.call.write(1).unwrap();
    assert!(host.consumer.wait().unwrap().success());
    println!("{rounds} rounds, {} calls, {:?}", host.called, now.elapsed());
}

#[test]
fn the_c_consumer_is_freestanding() {
    compile(
        "freestanding.o",
        &["-ffreestanding", "-c", "-Wpedantic", "-Wconversion", "-Wno-sign-conversion"],
    );
}
