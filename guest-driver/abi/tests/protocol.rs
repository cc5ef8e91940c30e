//! The situations a producer and a consumer meet, one after the other in one thread.

#[allow(dead_code, reason = "the memory has more to offer")]
mod memory;

use std::iter::from_fn;
use std::sync::atomic::Ordering::Relaxed;

use ivcpu_abi::{
    Consumer, Error, Geometry, Overdue, Producer, Push, Reason, Region, Sleep, Source, State, layout,
};
use memory::Memory;

const BOUND: u64 = 100;

/// A region, ring 0's producer with `N` sources, and an awake consumer.
fn pair<const N: usize>() -> (Memory, Region, Producer, [Source; N], Consumer) {
    let (memory, region) = Memory::with_region(Geometry::new(2, 4).unwrap());
    let mut producer = Producer::claim(region, 0).unwrap();
    let sources = std::array::from_fn(|n| producer.register(0x1000 * (n as u64 + 1)).unwrap());
    let mut consumer = Consumer::attach(region, 7, 64);
    assert_eq!(consumer.poll(), None);
    (memory, region, producer, sources, consumer)
}

fn drain(consumer: &mut Consumer) -> Vec<u32> {
    from_fn(|| consumer.poll()).map(|completion| completion.source).collect()
}

/// What a consumer takes until it may sleep.
fn until_sleep(consumer: &mut Consumer) -> Vec<u32> {
    let mut got = drain(consumer);
    while consumer.prepare_sleep() == Sleep::NotYet {
        got.extend(drain(consumer));
    }
    consumer.wake();
    got
}

fn offset_of_pending(source: Source) -> usize {
    layout::HEADER_SIZE + layout::RING_PENDING_AT + 4 * source.index()
}

#[test]
fn a_completion_names_its_used_ring() {
    let (_memory, _, mut producer, [_, b], mut consumer) = pair();
    assert_eq!(producer.push(b, 0), Push::Queued);
    let completion = consumer.poll().unwrap();
    assert_eq!(completion.binding.used_ring, 0x2000);
    assert_eq!(consumer.poll(), None);
}

#[test]
fn completions_of_a_source_not_yet_taken_merge() {
    let (_memory, _, mut producer, [a, b], mut consumer) = pair();
    assert_eq!(
        [a, b, a, b].map(|source| producer.push(source, 0)),
        [Push::Queued, Push::Queued, Push::Merged, Push::Merged]
    );
    assert_eq!(drain(&mut consumer), [0, 1]);
    assert_eq!(producer.push(a, 0), Push::Queued);
    assert_eq!(drain(&mut consumer), [0]);
}

#[test]
fn rings_take_turns() {
    let (_memory, region, mut first, sources @ [_, _], mut consumer) = pair();
    let mut second = Producer::claim(region, 1).unwrap();
    let other = second.register(0x9000).unwrap();
    for source in sources {
        let _ = first.push(source, 0);
    }
    let _ = second.push(other, 0);
    let rings: Vec<_> = from_fn(|| consumer.poll()).map(|completion| completion.ring).collect();
    assert_eq!(rings, [0, 1, 0]);
}

#[test]
fn a_ring_left_empty_beside_another_is_no_longer_looked_at() {
    let (memory, region, mut first, [a], mut consumer) = pair();
    let mut second = Producer::claim(region, 1).unwrap();
    let b = second.register(0x9000).unwrap();
    let _ = (first.push(a, 0), second.push(b, 0));
    drain(&mut consumer);
    for _ in 0..200 {
        assert_eq!(consumer.poll(), None);
    }
    let bits = memory.word(layout::SUMMARY_AT).load(Relaxed);
    assert_eq!(bits.count_ones(), 1, "one ring stays: {bits:#b}");
    let _ = (first.push(a, 0), second.push(b, 0));
    assert_eq!(drain(&mut consumer).len(), 2);
}

#[test]
fn a_sleeping_consumer_is_called_and_an_absent_one_always() {
    let (_memory, region, mut producer, [a, b], mut consumer) = pair();
    assert_eq!(consumer.prepare_sleep(), Sleep::Now);
    assert_eq!(producer.push(a, 0), Push::Signal(Reason::Asleep));
    assert_eq!(producer.push(a, 0), Push::Merged);
    assert_eq!(consumer.prepare_sleep(), Sleep::NotYet);
    assert_eq!(region.consumer_state(), State::Awake);
    assert_eq!(producer.push(b, 0), Push::Queued);
    assert_eq!(drain(&mut consumer), [0, 1]);

    assert_eq!(producer.push(b, 0), Push::Queued);
    let mut last = Vec::new();
    consumer.detach(|completion| last.push(completion.source));
    assert_eq!(last, [1]);
    for _ in 0..3 {
        assert_eq!(producer.push(a, 0), Push::Signal(Reason::Absent));
    }
}

#[test]
fn a_lost_entry_is_found_by_its_clock_alone() {
    let (_memory, _, mut producer, [a, _], mut consumer) = pair();
    assert_eq!(producer.lose(a, 10), Push::Merged);
    assert_eq!(producer.lose(a, 20), Push::Merged);
    assert_eq!(drain(&mut consumer), []);
    assert_eq!(consumer.prepare_sleep(), Sleep::Now);
    assert_eq!(producer.overdue(50, BOUND), Overdue::NotBefore(110));
    assert_eq!(producer.overdue(110, BOUND), Overdue::Source(a));
    assert_eq!(producer.lose(a, 111), Push::Signal(Reason::Overdue));
    consumer.wake();
    consumer.rescan();
    assert_eq!(drain(&mut consumer), [0]);
    assert_eq!(producer.overdue(3000, BOUND), Overdue::Nothing);
    consumer.detach(|_| ());
    assert_eq!(producer.lose(a, 4000), Push::Signal(Reason::Absent));
}

#[test]
fn an_awake_consumer_that_takes_nothing_costs_one_bound() {
    let (_memory, _, mut producer, [a, b], mut consumer) = pair();
    assert_eq!(producer.overdue(0, BOUND), Overdue::Nothing);
    assert_eq!(producer.push(a, 10), Push::Queued);
    assert_eq!(producer.push(b, 20), Push::Queued);
    assert_eq!(producer.overdue(50, BOUND), Overdue::NotBefore(110));
    assert_eq!(producer.overdue(115, BOUND), Overdue::Source(a));
    assert_eq!(producer.overdue(115, BOUND), Overdue::NotBefore(120));
    // From now on every completion of the source is called ...
    assert_eq!(producer.push(a, 116), Push::Signal(Reason::Overdue));
    assert_eq!(producer.push(b, 116), Push::Merged);
    assert_eq!(producer.overdue(120, BOUND), Overdue::Source(b));
    assert_eq!(producer.overdue(1000, BOUND), Overdue::Nothing);
    // ... until the consumer is back.
    assert_eq!(drain(&mut consumer), [0, 1]);
    assert_eq!(producer.push(a, 2000), Push::Queued);
    assert_eq!(drain(&mut consumer), [0]);
    assert_eq!(producer.overdue(3000, BOUND), Overdue::Nothing);
}

#[test]
fn a_merged_completion_of_a_called_sleeper_runs_a_clock() {
    let (_memory, _, mut producer, [a], mut consumer) = pair();
    assert_eq!(consumer.prepare_sleep(), Sleep::Now);
    assert_eq!(producer.push(a, 0), Push::Signal(Reason::Asleep));
    assert_eq!(producer.overdue(500, BOUND), Overdue::Nothing, "the call told of it");
    assert_eq!(producer.push(a, 500), Push::Merged);
    assert_eq!(producer.push(a, 550), Push::Merged);
    assert_eq!(producer.overdue(600, BOUND), Overdue::Source(a));
}

#[test]
fn a_pending_word_set_by_somebody_else_costs_no_completion() {
    let (memory, _, mut producer, [a], mut consumer) = pair();
    // Never announced by this producer: announce regardless.
    memory.word(offset_of_pending(a)).store(1, Relaxed);
    assert_eq!(producer.push(a, 0), Push::Queued);
    assert_eq!(drain(&mut consumer), [0]);
    // Set between two completions: the clock finds it, and a consumer that is called although awake rescans.
    memory.word(offset_of_pending(a)).store(0xdead, Relaxed);
    assert_eq!(producer.push(a, 10), Push::Merged);
    assert_eq!(producer.overdue(200, BOUND), Overdue::Source(a));
    consumer.rescan();
    assert_eq!(drain(&mut consumer), [0]);
    assert_eq!(producer.push(a, 300), Push::Queued);
    assert_eq!(drain(&mut consumer), [0]);
}

#[test]
fn damaged_slots_and_heads_are_repaired_by_one_look_at_the_pending_words() {
    let (memory, _, mut producer, sources @ [a, _, _], mut consumer) = pair();
    let slots = layout::HEADER_SIZE + layout::RING_SLOTS_AT;
    for damage in [0x0000_0000u32, 0x7fff_ffff, 0xffff_ffff, 0x0000_1234] {
        for source in sources {
            let _ = producer.push(source, 0);
        }
        for slot in 0..4 {
            memory.word(slots + 8 * slot + 4).store(damage, Relaxed);
        }
        memory.word(layout::HEADER_SIZE + layout::RING_HEAD_AT).store(damage, Relaxed);
        let mut got = until_sleep(&mut consumer);
        // Where chance makes the damage look like an empty ring, the clocks find it, and the call a rescan.
        if let Overdue::Source(_) = producer.overdue(BOUND, BOUND) {
            consumer.rescan();
            got.extend(until_sleep(&mut consumer));
        }
        got.sort_unstable();
        assert_eq!(got, [0, 1, 2], "damage {damage:#x}");
        assert_eq!(producer.push(a, 0), Push::Queued);
        assert_eq!(until_sleep(&mut consumer), [0], "the ring goes on after damage {damage:#x}");
    }
    assert!(consumer.rescans() > 0);
}

#[test]
fn sequences_wrap() {
    let (memory, region) = Memory::with_region(Geometry::new(1, 2).unwrap());
    memory.word(layout::HEADER_SIZE + layout::RING_HEAD_AT).store(u32::MAX - 2, Relaxed);
    for slot in 0..2 {
        let old = u32::MAX - 4 + slot as u32;
        let at = layout::HEADER_SIZE + layout::RING_SLOTS_AT + 8 * (old as usize % 2);
        memory.word(at + 4).store(old, Relaxed);
    }
    let mut producer = Producer::claim(region, 0).unwrap();
    let source = producer.register(0x1000).unwrap();
    let mut consumer = Consumer::attach(region, 7, 64);
    for _ in 0..10 {
        assert_eq!(producer.push(source, 0), Push::Queued);
        assert_eq!(drain(&mut consumer), [0]);
    }
}

/// Where the ring's last producer was killed: after which of its stores.
fn successor_after(killed_after: impl Fn(&Memory, u32)) {
    let (memory, region, mut killed, [a], mut consumer) = pair();
    let before = memory.word(layout::HEADER_SIZE + layout::RING_HEAD_AT).load(Relaxed);
    assert_eq!(killed.push(a, 0), Push::Queued);
    killed_after(&memory, before);
    let mut producer = Producer::claim(region, 0).unwrap();
    let source = producer.register(0x7000).unwrap();
    for _ in 0..10 {
        assert_eq!(producer.push(source, 0), Push::Queued);
        let used_rings: Vec<_> = from_fn(|| consumer.poll()).map(|one| one.binding.used_ring).collect();
        assert_eq!(used_rings, [0x7000]);
    }
    assert_eq!(consumer.rescans(), 0);
}

#[test]
fn a_successor_continues_after_a_complete_entry() {
    successor_after(|_, _| {});
}

#[test]
fn a_successor_continues_after_a_slot_without_its_head() {
    successor_after(|memory, before| {
        memory.word(layout::HEADER_SIZE + layout::RING_HEAD_AT).store(before, Relaxed);
    });
}

#[test]
fn a_successor_continues_after_a_pending_word_without_its_slot() {
    successor_after(|memory, before| {
        memory.word(layout::HEADER_SIZE + layout::RING_HEAD_AT).store(before, Relaxed);
        let slot = layout::HEADER_SIZE + layout::RING_SLOTS_AT + 8 * (before as usize % 4);
        memory.word(slot + 4).store(0, Relaxed);
    });
}

#[test]
fn completions_of_a_source_unregistered_since_are_dropped() {
    let (_memory, _, mut producer, [a, b], mut consumer) = pair();
    let _ = (producer.push(a, 0), producer.push(b, 0));
    producer.unregister(a);
    assert_eq!(drain(&mut consumer), [1]);
    let again = producer.register(0x1000).unwrap();
    assert_eq!(producer.push(again, 0), Push::Queued);
    let completion = consumer.poll().unwrap();
    assert_eq!((completion.source, completion.binding.generation), (0, 3), "a kept virtqueue is out of date");
}

#[test]
fn a_consumer_attached_anew_gets_what_the_last_one_left_and_the_last_one_stops() {
    let (_memory, region, mut producer, [a, b], mut first) = pair();
    let _ = (producer.push(b, 0), producer.push(a, 0));
    let mut second = Consumer::attach(region, 8, 64);
    assert_eq!(drain(&mut second), [0, 1]);
    assert_eq!(first.prepare_sleep(), Sleep::Replaced);
    assert_eq!(region.consumer_state(), State::Awake);
}

#[test]
fn the_directory_takes_possible_addresses_until_it_is_full() {
    let (_memory, _, mut producer, [a, _, _, _], _) = pair();
    assert_eq!(producer.register(0x9000), None);
    producer.unregister(a);
    for impossible in [0, 2, 1 << 52, u64::MAX] {
        assert_eq!(producer.register(impossible), None, "{impossible:#x}");
    }
    assert_eq!(producer.register((1 << 52) - 4), Some(a));
}

#[test]
fn the_host_advises_and_forgets_the_consumer() {
    let (_memory, region, mut producer, [a], consumer) = pair();
    region.set_contended(true);
    assert!(consumer.is_contended());
    region.forget_consumer();
    assert_eq!(producer.push(a, 0), Push::Signal(Reason::Absent));
}

#[test]
fn a_header_that_is_not_ours_is_named_in_one_line() {
    let (memory, region) = Memory::with_region(Geometry::new(2, 4).unwrap());
    assert_eq!(memory.open().unwrap().geometry(), region.geometry());
    assert_eq!(Producer::claim(region, 2).map(|_| ()), None);
    let spoil = |offset: usize, word: u32| {
        let old = memory.word(offset).swap(word, Relaxed);
        let error = memory.open().unwrap_err();
        memory.word(offset).store(old, Relaxed);
        assert!(!error.to_string().contains('\n'));
        error
    };
    assert!(matches!(spoil(layout::MAGIC_AT, 0), Error::Magic(_)));
    assert_eq!(spoil(layout::VERSION_AT, 2), Error::Version(2));
    assert_eq!(spoil(layout::FEATURES_AT, 8), Error::Features(8));
    for offset in [layout::SOURCES_AT, layout::RING_OFFSET_AT, layout::RING_STRIDE_AT] {
        assert!(matches!(spoil(offset, 3), Error::Geometry { .. }));
    }
    assert!(matches!(spoil(layout::RINGS_AT, 64), Error::TooSmall { .. }));
    assert!(matches!(spoil(layout::RINGS_AT, 65), Error::Geometry { rings: 65, .. }));
}
