//! Sessions over a real socket: frames pass, rings stop and resume, hostile drivers and frontends that die.

mod guest;

use guest::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vm_memory::{Bytes, GuestAddress};

const MODERN: u64 = VERSION_1 | MRG_RXBUF | EVENT_IDX;

#[test]
fn frames_loop_with_and_without_sleep_and_event_index() {
    for poll in ["0", "50", "always"] {
        for features in [MODERN, VERSION_1 | MRG_RXBUF] {
            let backend = Backend::start(&["--uplink", "loop", "--poll-us", poll]);
            let mut guest = Guest::new(1, features);
            guest.connect(&backend.socket());
            guest.fill(0);
            for index in 0..300 {
                loop_once(&mut guest, index, &frame(60 + usize::from(index)));
            }
            assert_eq!(backend.count(0, "packets"), 300);
            assert_eq!(backend.count(1, "packets"), 300);
            assert_eq!(backend.count(1, "dropped"), 0);
        }
    }
}

#[test]
fn a_frame_spans_mergeable_buffers_and_waits_for_those_that_come_later() {
    let backend = Backend::start(&["--uplink", "loop"]);
    let mut guest = Guest::new(1, MODERN);
    guest.connect(&backend.socket());
    // Two buffers now, the rest after the frame was sent.
    let large = frame(9000);
    for index in 0..SIZE {
        guest.describe(0, index, Guest::buffer(0, index), BUFFER, WRITE, 0);
    }
    guest.offer(0, 0);
    guest.offer(0, 1);
    let at = GuestAddress(8 << 20);
    guest.memory.write_slice(&[&[0; HEADER][..], &large].concat(), at).unwrap();
    guest.describe(1, 0, at.0, (large.len() + HEADER) as u32, 0, 0);
    guest.offer(1, 0);
    guest.wait_used(1);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(guest.take_used(0), None, "a part of a frame must not be shown");
    for index in 2..8 {
        guest.offer(0, index);
    }
    let lengths: Vec<u32> = (0..5).map(|_| guest.wait_used(0).1).collect();
    assert_eq!(lengths, [2048, 2048, 2048, 2048, 9012 - 4 * 2048]);
    let mut count = [0; 2];
    guest.memory.read_slice(&mut count, GuestAddress(Guest::buffer(0, 0) + 10)).unwrap();
    assert_eq!(u16::from_le_bytes(count), 5);
}

#[test]
fn a_generator_fills_the_ring_and_null_swallows_everything() {
    let backend = Backend::start(&["--uplink", "gen:1000"]);
    let mut guest = Guest::new(1, MODERN);
    guest.connect(&backend.socket());
    guest.fill(0);
    for _ in 0..SIZE {
        let (head, length) = guest.wait_used(0);
        assert_eq!(length, 1012);
        guest.offer(0, head as u16);
    }
    let backend = Backend::start(&["--uplink", "null"]);
    let mut guest = Guest::new(1, MODERN);
    guest.connect(&backend.socket());
    for index in 0..1000 {
        guest.send(1, index % SIZE, &frame(100));
        guest.wait_used(1);
    }
    assert_eq!(backend.count(1, "packets"), 1000);
    assert_eq!(backend.count(1, "bytes"), 100_000);
    until("all kicks are counted", || backend.count(1, "kicks") == guest.queues[1].kicks);
}

#[test]
fn every_kick_is_counted_however_the_poll_thread_waits() {
    for poll in ["0", "50", "always"] {
        let backend = Backend::start(&["--uplink", "null", "--poll-us", poll]);
        let mut guest = Guest::new(1, MODERN);
        guest.connect(&backend.socket());
        guest.fill(0);
        let counted = |guest: &Guest| {
            until("all kicks are counted", || {
                [0, 1].iter().all(|&ring| backend.count(ring, "kicks") == guest.queues[ring].kicks)
            });
        };
        let kick = |guest: &mut Guest| (0..500).for_each(|number| guest.kick(number % 2));
        kick(&mut guest);
        counted(&guest);
        // None is forgotten when a ring stops, or the frontend leaves, right behind it.
        kick(&mut guest);
        let frontend = guest.frontend.take().unwrap();
        for ring in 0..2 {
            frontend.get_vring_base(ring).unwrap();
        }
        counted(&guest);
        for ring in 0..2 {
            guest.start_queue(&frontend, ring).unwrap();
        }
        guest.frontend = Some(frontend);
        kick(&mut guest);
        guest.disconnect();
        counted(&guest);
        assert!(guest.queues.iter().all(|queue| queue.kicks >= 750));
    }
}

#[test]
fn a_disabled_ring_is_consumed_and_dropped() {
    let backend = Backend::start(&["--uplink", "loop"]);
    let mut guest = Guest::new(1, MODERN);
    guest.connect_until(&backend.socket(), 7);
    guest.fill(0);
    guest.send(1, 0, &frame(100));
    guest.wait_used(1);
    assert_eq!(backend.count(1, "dropped"), 1);
    assert_eq!(guest.take_used(0), None);
    let mut frontend = guest.frontend.take().unwrap();
    for index in 0..2 {
        frontend.set_vring_enable(index, true).unwrap();
    }
    guest.frontend = Some(frontend);
    loop_once(&mut guest, 1, &frame(100));
}

#[test]
fn a_stopped_ring_tells_where_it_stopped_and_starts_without_a_kick() {
    let backend = Backend::start(&["--uplink", "gen"]);
    let mut guest = Guest::new(1, MODERN);
    guest.connect(&backend.socket());
    guest.fill(0);
    for _ in 0..SIZE {
        guest.wait_used(0);
    }
    let frontend = guest.frontend.take().unwrap();
    assert_eq!(frontend.get_vring_base(0).unwrap(), u32::from(SIZE));
    // What is offered now must stay untouched.
    for index in 0..SIZE {
        guest.offer(0, index);
    }
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(guest.take_used(0), None);
    let _ = guest.queues[0].kick.read();
    guest.start_queue(&frontend, 0).unwrap();
    for _ in 0..SIZE {
        guest.wait_used(0);
    }
    assert_eq!(frontend.get_vring_base(0).unwrap(), 2 * u32::from(SIZE));
}

#[test]
fn a_new_memory_table_takes_effect_between_two_frames() {
    let backend = Backend::start(&["--uplink", "loop", "--poll-us", "always"]);
    let mut guest = Guest::new(1, MODERN);
    guest.connect(&backend.socket());
    guest.fill(0);
    for index in 0..20 {
        loop_once(&mut guest, index, &frame(200));
        let frontend = guest.frontend.take().unwrap();
        let region = vhost::VhostUserMemoryRegionInfo::from_guest_region(guest.region()).unwrap();
        frontend.set_mem_table(&[region]).unwrap();
        guest.frontend = Some(frontend);
    }
}

#[test]
fn the_driver_reads_mac_status_and_pairs() {
    let backend = Backend::start(&["--uplink", "null", "--queue-pairs", "4", "--mac", "52:54:00:12:34:56"]);
    let mut guest = Guest::new(1, MODERN);
    guest.connect_until(&backend.socket(), 3);
    let mut frontend = guest.frontend.take().unwrap();
    let flags = VhostUserConfigFlags::empty();
    let (_, config) = frontend.get_config(0, 12, flags, &[0; 12]).unwrap();
    assert_eq!(config, [0x52, 0x54, 0, 0x12, 0x34, 0x56, 1, 0, 4, 0, 0, 0]);
    assert_eq!(frontend.get_queue_num().unwrap(), 8);
}

#[test]
fn four_pairs_carry_frames_independently() {
    let backend = Backend::start(&["--uplink", "loop", "--queue-pairs", "4", "--affinity", "[0-1]"]);
    let mut guest = Guest::new(4, MODERN);
    guest.connect(&backend.socket());
    for pair in 0..4 {
        guest.fill(2 * pair);
        guest.send(2 * pair + 1, 0, &frame(64));
        guest.wait_used(2 * pair + 1);
        assert_eq!(guest.wait_used(2 * pair).1, 76);
    }
}

fn survives_killed_backends(forgets_base: bool) {
    let mut backend = Backend::start(&["--uplink", "loop"]);
    let mut guest = Guest::new(1, MODERN);
    guest.forgets_base = forgets_base;
    guest.connect(&backend.socket());
    guest.fill(0);
    for round in 0..5 {
        for index in 0..50 {
            loop_once(&mut guest, round * 50 + index, &frame(500));
        }
        backend.kill_and_restart();
        guest.disconnect();
        guest.connect(&backend.socket());
    }
    loop_once(&mut guest, 250, &frame(500));
}

#[test]
fn frames_flow_again_after_the_backend_was_killed() {
    survives_killed_backends(false);
}

/// DPDK's virtio-user in server mode: no backend was left to ask for the base, so it says 0.
#[test]
fn frames_flow_again_if_the_frontend_has_forgotten_where_the_rings_were() {
    survives_killed_backends(true);
}

#[test]
fn frontends_that_die_at_any_step_leak_nothing() {
    let backend = Backend::start(&["--uplink", "loop", "--queue-pairs", "2"]);
    let serve_one = |steps| {
        let mut guest = Guest::new(2, MODERN);
        guest.connect_until(&backend.socket(), steps);
    };
    let idle = || (backend.entries("fd"), backend.entries("task"));
    // Answered means that no earlier connection of ours is open any more.
    backend.stats();
    let before = idle();
    serve_one(usize::MAX);
    for round in 0..5 {
        for steps in 0..=12 {
            serve_one(steps);
        }
        // Half a header, then nothing.
        use std::io::Write;
        let mut stream = std::os::unix::net::UnixStream::connect(backend.socket()).unwrap();
        stream.write_all(&[1, 0, 0, 0, 1]).unwrap();
        drop(stream);
        until(&format!("round {round} left nothing behind"), || idle() == before);
    }
    let mut guest = Guest::new(2, MODERN);
    guest.connect(&backend.socket());
    guest.fill(0);
    loop_once(&mut guest, 0, &frame(64));
    assert_eq!(backend.stats()["sessions"], 1 + 5 * 14 + 1);
}

#[test]
fn a_hostile_driver_only_stops_its_own_ring() {
    let backend = Backend::start(&["--uplink", "loop", "--queue-pairs", "2", "--poll-us", "0"]);
    let mut guest = Guest::new(2, MODERN);
    guest.connect(&backend.socket());
    guest.fill(0);
    // Malformed chains come back unused, and the next frame passes.
    let bad: &[&[(u64, u32, u16, u16)]] = &[
        &[(0x200000, 11, 0, 0)],                           // shorter than the header
        &[(0x200000, 0, 0, 0)],                            // empty
        &[(0x200000, 100, NEXT, SIZE)],                    // next out of range
        &[(0x200000, 100, NEXT, 0)],                       // loop
        &[(0x200000, 100, WRITE, 0)],                      // wrong direction
        &[(1 << 40, 100, 0, 0)],                           // not in memory
        &[(u64::MAX - 10, 100, 0, 0)],                     // wraps
        &[((16 << 20) - 10, 100, 0, 0)],                   // runs out of memory
        &[(0x200000, u32::MAX, 0, 0)],                     // longer than memory
        &[(0x200000, 17, INDIRECT, 0)],                    // odd table size
        &[(0x200000, 0, INDIRECT, 0)],                     // empty table
        &[(0x900000, 16 * 65535, INDIRECT, 0)],            // table of zeroes, mostly beyond memory
        &[(0x10000, 16 * 64, INDIRECT, 0)],                // table that contains an indirect descriptor
        &[(0x200000, 100, NEXT, 1), (1 << 40, 100, 0, 0)], // good, then bad
    ];
    for chain in bad {
        for (index, &(address, length, flags, next)) in chain.iter().enumerate() {
            guest.describe(1, index as u16, address, length, flags, next);
        }
        guest.offer(1, 0);
        assert_eq!(guest.wait_used(1), (0, 0), "{chain:x?}");
    }
    assert_eq!(backend.count(1, "dropped"), bad.len() as u64);
    loop_once(&mut guest, 20, &frame(64));
    // An index that jumps stops the ring, and only that ring.
    guest.queues[1].available += 1000;
    guest.offer(1, 0);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(guest.take_used(1), None);
    guest.fill(2);
    guest.send(3, 0, &frame(64));
    assert_eq!(guest.wait_used(2).1, 76);
}

#[test]
fn a_signal_ends_the_program_and_its_files() {
    for connected in [false, true] {
        let mut backend = Backend::start(&["--uplink", "null"]);
        let mut guest = Guest::new(1, MODERN);
        if connected {
            guest.connect(&backend.socket());
        }
        kill(Pid::from_raw(backend.child.id() as i32), Signal::SIGTERM).unwrap();
        assert!(backend.child.wait().unwrap().success());
        assert_eq!(std::fs::read_dir(backend.dir.path()).unwrap().count(), 0);
    }
}
