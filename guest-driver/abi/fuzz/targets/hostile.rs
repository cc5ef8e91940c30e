//! A guest that writes what a fuzzer comes up with, header included, while the host opens, claims, pushes and asks for
//! what is overdue. The region lies between pages that nobody may touch; no step may panic, leave the region, or find
//! more sources overdue than there are.
//!
//!     cargo +nightly fuzz run hostile        (in guest-driver/abi)
#![no_main]

#[path = "../../tests/memory/mod.rs"]
#[allow(dead_code, reason = "the memory has more to offer")]
mod memory;

use std::sync::atomic::Ordering::Relaxed;

use arbitrary::Arbitrary;
use ivcpu_abi::{Consumer, Geometry, Overdue, Producer, Sleep, Source};
use libfuzzer_sys::fuzz_target;
use memory::Memory;

const SOURCES: u32 = 4;

#[derive(Arbitrary, Debug)]
enum Step {
    Push(u8),
    Overdue(u16),
    Rebind(u8),
    Restart,
    Poll,
    Sleep,
    Write { offset: u16, word: u32 },
    Open,
}

fn register(producer: &mut Producer) -> Vec<Source> {
    (1..=u64::from(SOURCES)).filter_map(|n| producer.register(0x1000 * n)).collect()
}

fuzz_target!(|steps: Vec<Step>| {
    let Some(geometry) = Geometry::new(1, SOURCES) else { return };
    let (memory, region) = Memory::with_region(geometry);
    let Some(mut producer) = Producer::claim(region, 0) else { return };
    let mut sources = register(&mut producer);
    let mut consumer = Consumer::attach(region, 1, 2);
    let mut now = 0;
    for step in steps {
        match step {
            Step::Push(source) => {
                let _ = producer.push(sources[usize::from(source) % sources.len()], now);
            }
            Step::Overdue(later) => {
                now += u64::from(later);
                let found =
                    (0..=SOURCES).take_while(|_| matches!(producer.overdue(now, 100), Overdue::Source(_)));
                assert!(found.count() <= SOURCES as usize);
            }
            Step::Rebind(source) => {
                let index = usize::from(source) % sources.len();
                producer.unregister(sources[index]);
                sources[index] = producer.register(0x9000).expect("the one just freed");
            }
            Step::Restart => {
                let Some(successor) = Producer::claim(region, 0) else { return };
                producer = successor;
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
            Step::Write { offset, word } => {
                memory.word(usize::from(offset) % (geometry.used_size() / 4) * 4).store(word, Relaxed);
            }
            Step::Open => {
                let _ = memory.open();
            }
        }
    }
});
