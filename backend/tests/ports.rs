//! Several ports in one program: each on its own, whatever the others' frontends do.

mod guest;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use guest::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vhost::VhostBackend;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vm_memory::{GuestAddress, GuestMemoryRegion};

const MODERN: u64 = VERSION_1 | MRG_RXBUF | EVENT_IDX;

#[test]
fn each_port_has_its_own_device_counters_and_end() {
    let ports = [
        "uplink=loop,queue_pairs=2,mac=52:54:00:12:34:56,name=web",
        "uplink=gen:100,poll_us=0",
        "uplink=null,mtu=1280,control_queue=off",
    ];
    let mut backend = Backend::with_ports(&ports, &[]);
    let offered = |index| {
        let frontend = Frontend::connect(backend.port(index), 2).unwrap();
        frontend.set_owner().unwrap();
        frontend.get_features().unwrap()
    };
    // MAC and MQ, then neither, then MTU and no control queue.
    let bits = 1 << 5 | 1 << 22 | 1 << 3 | 1 << 17;
    assert_eq!([0, 1, 2].map(|index| offered(index) & bits), [1 << 5 | 1 << 22 | 1 << 17, 1 << 17, 1 << 3]);

    let mut guest = Guest::new(2, MODERN);
    guest.connect(&backend.port(0));
    guest.fill(0);
    loop_once(&mut guest, 0, &frame(100));
    let mut taker = Guest::new(1, MODERN);
    taker.connect(&backend.port(1));
    taker.fill(0);
    assert_eq!(taker.wait_used(0).1, 112);
    let shown = backend.stats();
    let shown = shown["ports"].as_array().unwrap();
    assert_eq!([0, 1, 2].map(|port| shown[port]["name"].as_str().unwrap()), ["web", "port1", "port2"]);
    assert_eq!([0, 1, 2].map(|port| shown[port]["sessions"].as_u64().unwrap()), [2, 2, 1]);
    assert_eq!(shown[0]["queues"].as_array().unwrap().len(), 4);
    assert_eq!(shown[0]["queues"][1]["packets"], 1);

    kill(Pid::from_raw(backend.child.id() as i32), Signal::SIGTERM).unwrap();
    let status = backend.child.wait().unwrap();
    assert!(status.success(), "{status}: {}", backend.said());
    assert_eq!(std::fs::read_dir(backend.dir.path()).unwrap().count(), 0);
    assert_eq!(backend.said(), "");
}

/// A frontend that does its worst on a port.
fn attack(backend: &Backend, kind: usize) {
    let socket = backend.port(0);
    match kind {
        // Bytes that are no message; half a message, then nothing; a message of 64 MiB.
        0..=2 => {
            let words: &[u8] =
                [&[0xff; 64][..], &[1, 0, 0, 0, 1], &[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 4]][kind];
            let mut stream = UnixStream::connect(socket).unwrap();
            stream.write_all(words).unwrap();
            std::thread::sleep(Duration::from_millis(20));
        }
        // Memory that is gone while a ring runs: first met by the poll thread, then by a message.
        3 | 4 => {
            let mut guest = Guest::new(1, MODERN);
            guest.connect(&socket);
            guest.fill(0);
            loop_once(&mut guest, 0, &frame(100));
            guest.region().file_offset().unwrap().file().set_len(0x1000).unwrap();
            let mut frontend = guest.frontend.take().unwrap();
            if kind == 3 {
                guest.kick(1);
                until("the session is cut", || frontend.get_features().is_err());
            } else {
                let _ = frontend.get_vring_base(0);
                let _ = frontend.set_vring_enable(0, false);
            }
        }
        // An index that jumps, a head that does not exist, a chain without an end.
        5..=7 => {
            let mut guest = Guest::new(1, MODERN);
            guest.connect(&socket);
            guest.fill(0);
            guest.describe(1, 0, 0x200000, 100, NEXT, 0);
            match kind {
                5 => guest.queues[1].available += 1000,
                6 => guest.offer(1, SIZE),
                _ => {}
            }
            guest.offer(1, 0);
            std::thread::sleep(Duration::from_millis(20));
        }
        // A kick that is always ready and a call that is always full.
        _ => {
            let mut guest = Guest::new(1, MODERN);
            guest.connect_until(&socket, 5);
            let frontend = guest.frontend.take().unwrap();
            for index in 0..2 {
                guest.start_queue(&frontend, index).unwrap();
                // It may have been called already, and then it is full all the same.
                let _ = guest.queues[index].call.write(u64::MAX - 2);
            }
            guest.frontend = Some(frontend);
            guest.fill(0);
            for index in 0..SIZE {
                guest.send(1, index, &frame(100));
                guest.kick(1);
            }
        }
    }
}

#[test]
fn a_hostile_frontend_on_one_port_does_not_stop_another() {
    let backend = Backend::with_ports(&["uplink=loop,poll_us=0", "uplink=loop,poll_us=0"], &[]);
    let entries = || ["fd", "task"].map(|what| backend.entries(what));
    let mut guest = Guest::new(1, MODERN);
    guest.connect(&backend.port(1));
    guest.fill(0);
    loop_once(&mut guest, 0, &frame(64));
    backend.stats();
    let before = entries();
    let (done, passed) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|threads| {
        let traffic = threads.spawn(|| {
            let mut index = 1u16;
            while !done.load(Ordering::Relaxed) {
                loop_once(&mut guest, index, &frame(64 + usize::from(index % 1000)));
                index = index.wrapping_add(1);
                passed.fetch_add(1, Ordering::Relaxed);
            }
        });
        let attacks = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for kind in 0..9 {
                attack(&backend, kind);
                let now = passed.load(Ordering::Relaxed);
                until(&format!("frames pass after attack {kind}"), || {
                    passed.load(Ordering::Relaxed) > now + 20
                });
                until(&format!("attack {kind} left nothing behind"), || entries() == before);
            }
        }));
        done.store(true, Ordering::Relaxed);
        traffic.join().unwrap();
        attacks.unwrap();
    });
    let shown = backend.stats();
    assert_eq!(shown["ports"][1]["sessions"], 1);
    for queue in shown["ports"][1]["queues"].as_array().unwrap() {
        assert_eq!((&queue["dropped"], &queue["stopped"]), (&0.into(), &0.into()));
    }
    assert!(shown["ports"][0]["queues"][1]["stopped"].as_u64().unwrap() >= 2);
    assert!(backend.said().contains("guest memory was cut"), "{}", backend.said());
    // And the port that was attacked serves the next frontend.
    let mut guest = Guest::new(1, MODERN);
    guest.connect(&backend.port(0));
    guest.fill(0);
    loop_once(&mut guest, 0, &frame(64));
    assert_eq!(guest.region().start_addr(), GuestAddress(0));
}
