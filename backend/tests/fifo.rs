//! Completions through a FIFO region: the program on one side, the ABI's consumer and a small driver on the other.

mod guest;
mod region;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use guest::*;
use ivcpu_abi::{Sleep, State, layout};
use region::*;
use vhost::VhostBackend;

const MODERN: u64 = VERSION_1 | MRG_RXBUF | EVENT_IDX;
/// A bound that a test on a busy machine does not reach by accident.
const PATIENT: &str = "bound_us=1000000";

fn fifo(path: &std::path::Path, more: &str) -> String {
    format!("path={},{more}", path.display())
}

fn total(backend: &Backend, counter: &str) -> u64 {
    backend.count(0, counter) + backend.count(1, counter)
}

#[test]
fn frames_pass_both_ways_without_a_call_while_the_consumer_is_awake() {
    for poll in ["0", "50", "always"] {
        for features in [MODERN, VERSION_1 | MRG_RXBUF] {
            let dir = tempfile::tempdir().unwrap();
            let (path, shared) = Shared::create(dir.path(), 16);
            let backend =
                Backend::start(&["--uplink", "loop", "--poll-us", poll, "--fifo", &fifo(&path, PATIENT)]);
            let mut ivcpu = Ivcpu::new(Guest::new(1, features), Some(shared.consumer()));
            ivcpu.connect(&backend.socket());
            ivcpu.guest.fill(0);
            let before = total(&backend, "calls");
            for index in 0..300 {
                ivcpu.loop_once(index, false);
            }
            ivcpu.take_calls();
            assert_eq!((ivcpu.calls.iter().sum::<u64>(), total(&backend, "calls")), (0, before));
            let said = backend.stats();
            assert_eq!(said["fifo"], serde_json::json!({"path": path, "rings": 1}));
            for ring in 0..2 {
                // Each start of a ring is one more than what the driver asked for.
                let completions = backend.count(ring, "completions");
                assert!(completions >= 300 / 2, "{completions}");
                let (entries, merged) =
                    (backend.count(ring, "fifo_entries"), backend.count(ring, "fifo_merged"));
                assert_eq!(entries + merged, completions + 1);
                assert_eq!(ivcpu.delivered[ring], entries);
            }
        }
    }
}

#[test]
fn a_sleeper_is_called_once_and_finds_the_entry() {
    for poll in ["0", "always"] {
        let dir = tempfile::tempdir().unwrap();
        let (path, shared) = Shared::create(dir.path(), 1);
        let backend =
            Backend::start(&["--uplink", "null", "--poll-us", poll, "--fifo", &fifo(&path, PATIENT)]);
        let mut ivcpu = Ivcpu::new(Guest::new(1, MODERN), Some(shared.consumer()));
        ivcpu.connect(&backend.socket());
        for index in 0..100u64 {
            ivcpu.poll();
            assert_eq!(ivcpu.consumer.as_mut().unwrap().prepare_sleep(), Sleep::Now);
            ivcpu.guest.send(1, index as u16 % SIZE, &[0; 60]);
            until("the sleeper is called", || backend.count(1, "wakeups") == index + 1);
            assert_eq!(ivcpu.guest.queues[1].call.read().unwrap(), 1);
            let (consumer, taken) = (ivcpu.consumer.as_mut().unwrap(), ivcpu.delivered[1]);
            consumer.wake();
            ivcpu.poll();
            assert_eq!((ivcpu.delivered[1], ivcpu.used[1].len() as u64), (taken + 1, index + 1));
        }
        assert_eq!(backend.count(1, "fallbacks"), 0);
        assert_eq!(ivcpu.calls, [0, 0]);
    }
}

#[test]
fn nobody_there_is_called_and_the_rings_stay_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let (path, shared) = Shared::create(dir.path(), 1);
    let backend = Backend::start(&["--uplink", "loop", "--fifo", &fifo(&path, "bound_us=100")]);
    let mut ivcpu = Ivcpu::new(Guest::new(1, MODERN), None);
    ivcpu.connect(&backend.socket());
    ivcpu.guest.fill(0);
    for index in 0..300 {
        ivcpu.loop_once(index, true);
    }
    assert!(ivcpu.calls.iter().all(|calls| *calls > 0));
    assert_eq!(total(&backend, "wakeups"), total(&backend, "calls"));
    assert_eq!(total(&backend, "calls"), total(&backend, "completions") + 2);
    assert_eq!(shared.state(), State::Absent);
    assert!(!shared.has_entries());
    // A consumer may come at any time.
    ivcpu.consumer = Some(shared.consumer());
    for index in 300..400 {
        ivcpu.loop_once(index, true);
    }
    assert!(shared.has_entries() && ivcpu.delivered.iter().all(|count| *count > 0));
}

#[test]
fn lost_entries_are_delivered_by_the_fallback_alone() {
    for poll in ["0", "50", "always"] {
        let dir = tempfile::tempdir().unwrap();
        let (path, shared) = Shared::create(dir.path(), 1);
        let how = fifo(&path, "bound_us=2000,lose_entries=on");
        let backend = Backend::start(&["--uplink", "loop", "--poll-us", poll, "--fifo", &how]);
        let mut ivcpu = Ivcpu::new(Guest::new(1, MODERN), None);
        ivcpu.connect(&backend.socket());
        ivcpu.guest.fill(0);
        until("each ring is announced", || total(&backend, "wakeups") == 2);
        let before = (total(&backend, "calls"), total(&backend, "wakeups"));
        ivcpu.consumer = Some(shared.consumer());
        for index in 0..50 {
            ivcpu.loop_once(index, true);
        }
        assert!(!shared.has_entries());
        assert_eq!((total(&backend, "fifo_entries"), total(&backend, "wakeups")), (0, before.1));
        assert_eq!(total(&backend, "calls") - before.0, total(&backend, "fallbacks"));
        // A call makes the consumer look at everything, so one that comes late can deliver the next frame too.
        assert!(total(&backend, "fallbacks") >= 25);
    }
}

#[test]
fn a_consumer_that_stopped_awake_costs_a_bound_and_no_completion() {
    for poll in ["0", "50", "always"] {
        let dir = tempfile::tempdir().unwrap();
        let (path, shared) = Shared::create(dir.path(), 1);
        let how = fifo(&path, "bound_us=100");
        let backend = Backend::start(&["--uplink", "loop", "--poll-us", poll, "--fifo", &how]);
        let mut ivcpu = Ivcpu::new(Guest::new(1, MODERN), Some(shared.consumer()));
        ivcpu.connect(&backend.socket());
        ivcpu.guest.fill(0);
        // It says awake and is gone.
        ivcpu.consumer = None;
        for index in 0..300 {
            ivcpu.loop_once(index, true);
        }
        assert_eq!(shared.state(), State::Awake);
        assert!(total(&backend, "fallbacks") >= 300, "{}", total(&backend, "fallbacks"));
        // A successor finds the entries there are, and the interrupts end.
        ivcpu.consumer = Some(shared.consumer());
        for index in 300..400 {
            ivcpu.loop_once(index, true);
        }
        assert!(ivcpu.delivered.iter().all(|count| *count > 2), "{:?}", ivcpu.delivered);
    }
}

#[test]
fn a_thread_that_has_called_for_everything_sleeps_without_a_timer() {
    let dir = tempfile::tempdir().unwrap();
    let (path, shared) = Shared::create(dir.path(), 1);
    let how = fifo(&path, "bound_us=100");
    let backend = Backend::start(&["--uplink", "null", "--poll-us", "0", "--fifo", &how]);
    let mut ivcpu = Ivcpu::new(Guest::new(1, MODERN), Some(shared.consumer()));
    ivcpu.connect(&backend.socket());
    ivcpu.guest.send(1, 0, &[0; 60]);
    until("the fallback came", || backend.count(1, "fallbacks") == 1);
    let sleeps = || -> u64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", backend.child.id())).unwrap();
        let status = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("status")).unwrap();
        let status =
            tasks.map(|task| status(task.unwrap())).find(|status| status.starts_with("Name:\tpoll0"));
        let line = status
            .unwrap()
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:").map(str::trim).map(str::to_owned));
        line.unwrap().parse().unwrap()
    };
    std::thread::sleep(Duration::from_millis(50));
    let before = sleeps();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(sleeps(), before);
}

#[test]
fn a_guest_that_scribbles_everywhere_hurts_only_itself() {
    for poll in ["0", "always"] {
        let dir = tempfile::tempdir().unwrap();
        let (path, shared) = Shared::create(dir.path(), 1);
        let how = fifo(&path, "bound_us=100");
        let backend = Backend::start(&["--uplink", "loop", "--poll-us", poll, "--fifo", &how]);
        let mut ivcpu = Ivcpu::new(Guest::new(1, MODERN), Some(shared.consumer()));
        ivcpu.connect(&backend.socket());
        ivcpu.guest.fill(0);
        ivcpu.consumer = None;
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut random = 1u32;
                let end = layout::HEADER_SIZE + layout::RING_STRIDE;
                while !done.load(Ordering::Relaxed) {
                    random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    // Often the few words that are looked at most, else any word.
                    let offset = match random >> 28 {
                        0..4 => layout::STATE_AT,
                        4..6 => layout::SUMMARY_AT,
                        6..8 => layout::HEADER_SIZE + layout::RING_HEAD_AT,
                        8..12 => {
                            layout::HEADER_SIZE + layout::RING_PENDING_AT + (random as usize >> 20 & 1) * 4
                        }
                        _ => (random as usize >> 8) % end / 4 * 4,
                    };
                    shared.word(offset).store(random >> 4 & 3 | random << 8, Ordering::Relaxed);
                }
            });
            // It may miss its own completions now, so it looks at its used rings unasked.
            for index in 0..2000u16 {
                ivcpu.guest.send(1, index % SIZE, &[0; 100]);
                ivcpu.guest.wait_used(1);
                let (head, _) = ivcpu.guest.wait_used(0);
                ivcpu.guest.offer(0, head as u16);
            }
            done.store(true, Ordering::Relaxed);
        });
        // Whatever is left there now: with a state that makes sense, nothing is missed.
        shared.word(layout::STATE_AT).store(layout::STATE_AWAKE, Ordering::Relaxed);
        ivcpu.forget_calls();
        for index in 0..300 {
            ivcpu.loop_once(index, true);
        }
        assert_eq!(backend.said(), "");
    }
}

#[test]
fn a_ring_is_in_the_directory_while_it_runs() {
    let dir = tempfile::tempdir().unwrap();
    let (path, shared) = Shared::create(dir.path(), 1);
    let backend = Backend::start(&["--uplink", "loop", "--fifo", &fifo(&path, PATIENT)]);
    let mut ivcpu = Ivcpu::new(Guest::new(1, MODERN), Some(shared.consumer()));
    ivcpu.connect(&backend.socket());
    let addresses = || {
        let mut addresses: Vec<u64> = shared.bindings().iter().map(|binding| binding.used_ring).collect();
        addresses.sort();
        addresses
    };
    let used = |ivcpu: &Ivcpu, ring: usize| ivcpu.guest.queues[ring].table + USED;
    let both = [used(&ivcpu, 0), used(&ivcpu, 1)];
    assert_eq!(addresses(), both);
    let frontend = ivcpu.guest.frontend.take().unwrap();
    frontend.get_vring_base(0).unwrap();
    until("a stopped ring is forgotten", || addresses() == [both[1]]);
    // Where it was: another start, announced again.
    let announced = ivcpu.delivered[0];
    ivcpu.guest.start_queue(&frontend, 0).unwrap();
    until("a new start is announced", || {
        ivcpu.poll();
        ivcpu.delivered[0] == announced + 1
    });
    assert_eq!(addresses(), both);
    // Somewhere else, without a stop in between that the poll thread had to see.
    frontend.get_vring_base(0).unwrap();
    ivcpu.guest.queues[0].table = 0xe00000;
    ivcpu.guest.start_queue(&frontend, 0).unwrap();
    until("it has moved", || addresses() == [both[1], 0xe00000 + USED]);
    ivcpu.guest.frontend = Some(frontend);
    ivcpu.guest.fill(0);
    ivcpu.loop_once(0, false);
    // And no longer than the session.
    ivcpu.guest.disconnect();
    until("the session's rings are forgotten", || addresses().is_empty());
}

#[test]
fn four_pairs_have_a_ring_each_as_far_as_there_are_free_ones() {
    let dir = tempfile::tempdir().unwrap();
    let (path, shared) = Shared::create(dir.path(), 3);
    let how = fifo(&path, PATIENT);
    let backend = Backend::start(&["--uplink", "loop", "--queue-pairs", "4", "--fifo", &how]);
    let mut ivcpu = Ivcpu::new(Guest::new(4, MODERN), Some(shared.consumer()));
    ivcpu.guest.connect(&backend.socket());
    until("three pairs are announced", || {
        ivcpu.poll();
        ivcpu.delivered.iter().filter(|count| **count == 1).count() == 6
    });
    assert_eq!(backend.stats()["fifo"]["rings"], 3);
    for pair in 0..4 {
        ivcpu.guest.fill(2 * pair);
        ivcpu.guest.send(2 * pair + 1, 0, &[0; 64]);
        until("a frame came back", || {
            ivcpu.poll();
            ivcpu.take_calls();
            !ivcpu.used[2 * pair].is_empty()
        });
        assert_eq!(backend.count(2 * pair, "calls") > 0, pair == 3);
    }
    let said = backend.said();
    assert!(said.lines().count() == 1 && said.contains("3 free rings for 4 poll threads"), "{said}");
}
