//! A guest that writes anything anywhere at any time: the producer stays within the region, its work stays
//! bounded, and once the guest behaves, completions arrive again.
//!
//! The region is mapped between two pages that nobody may touch, so a single step outside ends the test.

#[allow(dead_code, reason = "the memory has more to offer")]
mod memory;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

use ivcpu_abi::{Consumer, Geometry, Overdue, Producer, Push, Sleep, Source, layout};
use memory::Memory;
use proptest::prelude::*;

const SOURCES: usize = 4;

/// One step of the host or of the guest.
#[derive(Clone, Copy, Debug)]
enum Step {
    Push(usize),
    Overdue(u64),
    Rebind(usize),
    Restart,
    Poll,
    Sleep,
    Write { offset: usize, word: u32 },
}

/// Words that mean something somewhere, or nothing.
fn word() -> impl Strategy<Value = u32> {
    prop_oneof![any::<u32>(), 0..4u32, (0..8u32).prop_map(|n| n << 30), (u32::MAX - 4)..=u32::MAX]
}

/// Anywhere, and more often where the words are that the protocol is about.
fn offset() -> impl Strategy<Value = usize> {
    let ring = layout::HEADER_SIZE;
    let used = Geometry::new(1, SOURCES as u32).unwrap().used_size();
    prop_oneof![
        0..used / 4,
        layout::STATE_AT / 4..layout::STATE_AT / 4 + 2,
        layout::SUMMARY_AT / 4..layout::SUMMARY_AT / 4 + 2,
        Just((ring + layout::RING_HEAD_AT) / 4),
        (ring + layout::RING_PENDING_AT) / 4..(ring + layout::RING_PENDING_AT) / 4 + SOURCES,
        (ring + layout::RING_DIRECTORY_AT) / 4..(ring + layout::RING_DIRECTORY_AT) / 4 + 2 * SOURCES,
        (ring + layout::RING_SLOTS_AT) / 4..(ring + layout::RING_SLOTS_AT) / 4 + 2 * SOURCES,
    ]
    .prop_map(|index| 4 * index)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..SOURCES).prop_map(Step::Push),
        1 => (0..400u64).prop_map(Step::Overdue),
        1 => (0..SOURCES).prop_map(Step::Rebind),
        1 => Just(Step::Restart),
        2 => Just(Step::Poll),
        1 => Just(Step::Sleep),
        4 => (offset(), word()).prop_map(|(offset, word)| Step::Write { offset, word }),
    ]
}

fn register(producer: &mut Producer) -> [Source; SOURCES] {
    std::array::from_fn(|n| producer.register(0x1000 * (n as u64 + 1)).unwrap())
}

proptest! {
    #[test]
    fn whatever_the_guest_wrote_completions_arrive_once_it_behaves(steps in prop::collection::vec(step(), 0..200)) {
        let (memory, region) = Memory::with_region(Geometry::new(1, SOURCES as u32).unwrap());
        let mut producer = Producer::claim(region, 0).unwrap();
        let mut sources = register(&mut producer);
        let mut consumer = Consumer::attach(region, 1, 2);
        let mut now = 0;
        for step in steps {
            match step {
                Step::Push(source) => {
                    let _ = producer.push(sources[source], now);
                }
                Step::Overdue(later) => {
                    now += later;
                    let found = std::iter::repeat_with(|| producer.overdue(now, 100))
                        .take_while(|overdue| matches!(overdue, Overdue::Source(_)))
                        .count();
                    prop_assert!(found <= SOURCES, "{found} of {SOURCES} sources are overdue");
                }
                Step::Rebind(source) => {
                    producer.unregister(sources[source]);
                    sources[source] = producer.register(0x9000).unwrap();
                }
                Step::Restart => {
                    producer = Producer::claim(region, 0).unwrap();
                    sources = register(&mut producer);
                }
                Step::Poll => {
                    let _ = consumer.poll();
                }
                Step::Sleep => {
                    if consumer.prepare_sleep() == Sleep::Now {
                        consumer.wake();
                    }
                }
                Step::Write { offset, word } => memory.word(offset).store(word, Relaxed),
            }
        }

        // The guest behaves from now on: it puts the addresses back that no producer writes again, a consumer
        // attaches, and is called when it sleeps or is found slow.
        for source in sources {
            let at = layout::HEADER_SIZE + layout::RING_DIRECTORY_AT + 8 * source.index();
            memory.word(at).store(0x1000, Relaxed);
        }
        let mut consumer = Consumer::attach(region, 2, 2);
        let mut waiting = Vec::from(sources);
        for source in sources {
            if let Push::Signal(_) = producer.push(source, now) {
                consumer.rescan();
            }
        }
        for _ in 0..4 {
            for _ in 0..100 {
                if let Some(completion) = consumer.poll() {
                    waiting.retain(|source| source.index() != completion.source as usize);
                }
            }
            now += 1000;
            while let Overdue::Source(_) = producer.overdue(now, 100) {
                consumer.rescan();
            }
        }
        prop_assert!(waiting.is_empty(), "{waiting:?} were not delivered");
        for _ in 0..100 {
            if consumer.poll().is_none() && consumer.prepare_sleep() == Sleep::Now {
                return Ok(());
            }
        }
        prop_assert!(false, "the consumer is never let to sleep");
    }
}

/// The guest scribbles while the producer pushes: no push takes more than its few loads and stores, so a fixed
/// number of them ends.
#[test]
fn pushing_ends_while_the_guest_scribbles() {
    let geometry = Geometry::new(2, 256).unwrap();
    let (memory, region) = Memory::with_region(geometry);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = 1u64;
            while !done.load(Relaxed) {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let offset = (random >> 33) as usize % (geometry.used_size() / 4) * 4;
                memory.word(offset).store((random >> 16) as u32, Relaxed);
                memory.word(layout::STATE_AT).store((random >> 40) as u32, Relaxed);
            }
        });
        for _ in 0..20 {
            let mut producer = Producer::claim(region, 1).unwrap();
            let sources: Vec<_> = (1..=256).map(|n| producer.register(n * 4096).unwrap()).collect();
            for (now, source) in sources.iter().cycle().take(20_000).enumerate() {
                let _ = producer.push(*source, now as u64);
                let _ = producer.overdue(now as u64, 100);
            }
        }
        done.store(true, Relaxed);
    });
}
