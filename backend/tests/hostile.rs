//! The data path against rings full of nonsense: whatever a driver writes, a burst ends, stays in guest memory and
//! gives back only what it took.

use std::sync::Arc;

use ivcpu_backend::from_guest;
use ivcpu_backend::memory::Access;
use ivcpu_backend::ring::Ring;
use ivcpu_backend::stats::Stats;
use ivcpu_backend::to_guest::ToGuest;
use ivcpu_backend::uplink::{self, Pair};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const SIZE: u16 = 16;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Two regions that touch in guest-physical space (and not in ours), and a hole behind them.
const REGIONS: [(GuestAddress, usize); 2] = [(GuestAddress(0), 0x8000), (GuestAddress(0x8000), 0x8000)];

/// A descriptor as a driver could write it: address, length, flags, next.
type Words = (u64, u32, u16, u16);

fn words() -> impl Strategy<Value = Words> {
    let address = prop_oneof![
        4 => 0x4000..0x10000u64,
        1 => Just(0x7ff0),
        1 => TABLE..TABLE + 0x400,
        1 => 0xff00..0x10010u64,
        1 => any::<u64>(),
    ];
    let length =
        prop_oneof![4 => 0..2000u32, 1 => 0..64u32, 1 => (0..20u32).prop_map(|n| n * 16), 1 => any::<u32>()];
    let flags = prop_oneof![3 => 0..4u16, 1 => 0..8u16, 1 => any::<u16>()];
    let next = prop_oneof![4 => 0..SIZE, 1 => any::<u16>()];
    (address, length, flags, next)
}

fn guest(table: &[Words], heads: &[u16], index: u16) -> Arc<GuestMemoryMmap> {
    let memory = GuestMemoryMmap::from_ranges(&REGIONS).unwrap();
    for (i, &(address, length, flags, next)) in table.iter().enumerate() {
        let words = u128::from(address)
            | u128::from(length) << 64
            | u128::from(flags) << 96
            | u128::from(next) << 112;
        memory.write_slice(&words.to_le_bytes(), GuestAddress(TABLE + 16 * i as u64)).unwrap();
    }
    for (i, head) in heads.iter().enumerate() {
        memory.write_obj(head.to_le(), GuestAddress(AVAILABLE + 4 + 2 * i as u64)).unwrap();
    }
    memory.write_obj(index.to_le(), GuestAddress(AVAILABLE + 2)).unwrap();
    Arc::new(memory)
}

fn ring(memory: &Arc<GuestMemoryMmap>, access: Access, features: u64) -> Ring {
    let mut ring = Ring::new(memory.clone(), 256).unwrap();
    ring.set_role("test".into(), access, Default::default());
    ring.set_features(features);
    ring.set_size(SIZE);
    ring.set_addresses(TABLE, AVAILABLE, USED).unwrap();
    ring.set_base(0);
    ring.set_started(true);
    ring.set_enabled(true);
    ring
}

fn pair(kind: &str) -> Pair {
    uplink::open(&kind.parse().unwrap(), 1).unwrap().1.pop().unwrap()
}

/// Checks the used ring against what the driver offered.
fn check_used(memory: &GuestMemoryMmap, heads: &[u16], index: u16) -> Result<u16, TestCaseError> {
    let used: u16 = memory.read_obj(GuestAddress(USED + 2)).unwrap();
    prop_assert!(used <= index.min(SIZE), "{used} given back of {index}");
    for i in 0..used {
        let id: u32 = memory.read_obj(GuestAddress(USED + 4 + 8 * u64::from(i))).unwrap();
        prop_assert_eq!(id, u32::from(heads[usize::from(i)]), "given back out of order");
    }
    Ok(used)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn from_guest_survives_anything(
        table in prop::collection::vec(words(), usize::from(SIZE)),
        heads in prop::collection::vec(prop_oneof![9 => 0..SIZE, 1 => any::<u16>()], usize::from(SIZE)),
        index in prop_oneof![9 => 0..=SIZE, 1 => any::<u16>()],
        features in prop_oneof![Just(0), Just(1 << 29), Just(1 << 32 | 1 << 15), Just(1 << 32 | 1 << 29)],
    ) {
        let memory = guest(&table, &heads, index);
        let mut ring = ring(&memory, Access::Read, features);
        let stats = Stats::new(1);
        let mut pair = pair("loop");
        for _ in 0..3 {
            from_guest::burst(&mut ring, &mut pair, None, stats.ring(1).unwrap());
        }
        // The table may lie under a buffer only in the other direction, so what was offered is what it was.
        let used = check_used(&memory, &heads, index)?;
        let stats = stats.ring(1).unwrap();
        prop_assert_eq!(stats.packets.get() + stats.dropped.total(), u64::from(used));
        if index > SIZE {
            prop_assert!(!ring.is_running(), "the index jumped");
        } else if let Some(bad) = heads[..usize::from(index)].iter().position(|&head| head >= SIZE) {
            prop_assert!(!ring.is_running());
            prop_assert!(usize::from(used) <= bad);
        } else {
            prop_assert_eq!(used, index);
            prop_assert_eq!(ring.base(), index);
        }
    }

    #[test]
    fn to_guest_survives_anything(
        table in prop::collection::vec(words(), usize::from(SIZE)),
        heads in prop::collection::vec(prop_oneof![9 => 0..SIZE, 1 => any::<u16>()], usize::from(SIZE)),
        index in prop_oneof![9 => 0..=SIZE, 1 => any::<u16>()],
        features in prop_oneof![Just(0), Just(1 << 32), Just(1 << 32 | 1 << 15), Just(1 << 32 | 1 << 15 | 1 << 29)],
        kind in prop_oneof![Just("gen:60"), Just("gen:1514"), Just("gen:9000"), Just("gen:65535")],
    ) {
        let memory = guest(&table, &heads, index);
        let mut ring = ring(&memory, Access::Write, features);
        let stats = Stats::new(1);
        let mut pair = pair(kind);
        let mut to_guest = ToGuest::default();
        // A frame may overwrite the rings themselves: only that every burst ends is asked then.
        for _ in 0..4 {
            to_guest.burst(&mut ring, &mut pair, None, stats.ring(0).unwrap());
        }
        if table.iter().all(|&(address, length, ..)| address >= 0x4000 && address.checked_add(length.into()).is_some()) {
            check_used(&memory, &heads, index)?;
        }
    }
}

#[test]
fn a_ring_outside_of_memory_or_of_an_odd_size_never_runs() {
    let memory = guest(&[], &[], 0);
    for (table, available, used, size) in [
        (0xff10, AVAILABLE, USED, SIZE),
        (TABLE, 0xfff0, USED, SIZE),
        (TABLE, AVAILABLE, 0xfff0, SIZE),
        (TABLE, AVAILABLE, USED, 12),
    ] {
        let mut ring = Ring::new(memory.clone(), 256).unwrap();
        ring.set_size(size);
        ring.set_addresses(table, available, used).unwrap();
        ring.set_started(true);
        assert!(!ring.is_running());
        // Set up anew, it runs.
        ring.set_started(false);
        ring.set_size(SIZE);
        ring.set_addresses(TABLE, AVAILABLE, USED).unwrap();
        ring.set_started(true);
        assert!(ring.is_running());
    }
}

#[test]
fn another_start_at_the_same_address_is_another_used_ring() {
    let memory = guest(&[], &[], 0);
    let mut ring = ring(&memory, Access::Read, 1 << 32);
    let first = ring.used_ring().unwrap();
    assert_eq!((first.address, ring.used_ring()), (USED, Some(first)));
    ring.set_started(false);
    assert_eq!(ring.used_ring(), None);
    ring.set_started(true);
    let second = ring.used_ring().unwrap();
    assert!(second.address == USED && second != first);
}

#[test]
fn what_was_taken_and_not_given_back_is_taken_again_from_new_memory() {
    let table = [(0x4000, 1000, 2, 0); SIZE as usize];
    let heads: Vec<u16> = (0..SIZE).collect();
    let memory = guest(&table, &heads, SIZE);
    let mut ring = ring(&memory, Access::Write, 1 << 32 | 1 << 15);
    ring.take(5, usize::MAX);
    assert_eq!((ring.chains().len(), ring.base()), (5, 0));
    ring.give_back(10);
    assert_eq!(ring.base(), 1);
    let other = guest(&table, &heads, SIZE);
    ring.set_memory(other.clone());
    assert_eq!((ring.chains().len(), ring.base()), (0, 1));
    ring.take(usize::MAX, usize::MAX);
    assert_eq!((ring.chains().len(), ring.base()), (SIZE as usize - 1, 1));
    assert_eq!(Arc::strong_count(&memory), 1, "the old memory is not held any more");
}

#[test]
fn a_ring_pauses_while_its_region_is_gone() {
    let heads: Vec<u16> = (0..SIZE).collect();
    let memory = guest(&[(0x4000, 1000, 2, 0); SIZE as usize], &heads, SIZE);
    let mut ring = ring(&memory, Access::Write, 1 << 32 | 1 << 15);
    ring.take(usize::MAX, usize::MAX);
    let without = GuestMemoryMmap::from_ranges(&[(GuestAddress(0x8000), 0x8000)]).unwrap();
    ring.set_memory(Arc::new(without));
    assert!(!ring.is_running());
    assert_eq!(ring.base(), 0);
    ring.set_memory(memory);
    assert!(ring.is_running());
    ring.take(usize::MAX, usize::MAX);
    assert_eq!(ring.chains().len(), usize::from(SIZE));
}
