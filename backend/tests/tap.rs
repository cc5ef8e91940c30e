//! A real TAP device in a network namespace of its own. Needs root, and says so where it is not.

mod guest;

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

use guest::*;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use vm_memory::{Bytes, GuestAddress};

const MODERN: u64 = VERSION_1 | MRG_RXBUF | EVENT_IDX | 0b11;
/// The EtherType for local experiments.
const OURS: [u8; 2] = [0x88, 0xb5];

/// Moves the test into a fresh network namespace; `false` where that is not allowed.
fn own_namespace() -> bool {
    let allowed = unshare(CloneFlags::CLONE_NEWNET).is_ok() && File::open("/dev/net/tun").is_ok();
    if !allowed {
        eprintln!("SKIPPED: a TAP device needs root and /dev/net/tun");
    }
    allowed
}

/// A socket on the far side of the device.
fn far_side(name: &str) -> OwnedFd {
    let all = SockProtocol::EthAll;
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_NONBLOCK, all).unwrap();
    // SAFETY: sockaddr_ll is plain data, for which all zeroes is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = nix::net::if_::if_nametoindex(name).unwrap() as i32;
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address lives until the call returns and is `length` long.
    assert_eq!(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) }, 0);
    socket
}

fn frame(number: u8, length: usize) -> Vec<u8> {
    [&[0xff; 6][..], &[2, 0, 0, 0, 0, 1], &OURS, &vec![number; length]].concat()
}

/// The next frame of ours that reached the far side.
#[track_caller]
fn next(socket: &OwnedFd) -> Vec<u8> {
    let mut frame = Vec::new();
    until("a frame arrives", || {
        let mut bytes = [0; 4096];
        let Ok(length) = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::empty()) else { return false };
        frame = bytes[..length].to_vec();
        frame[12..14] == OURS
    });
    frame
}

#[test]
fn bursts_and_single_frames_pass_both_ways_and_a_bad_header_is_only_dropped() {
    if !own_namespace() {
        return;
    }
    let backend = Backend::start(&["--uplink", "tap:ivt0", "--poll-us", "0"]);
    let far = far_side("ivt0");
    let mut guest = Guest::new(1, MODERN);
    guest.connect(&backend.socket());
    guest.fill(0);
    // A burst, large enough to be batched, with one header that contradicts its frame.
    let bad = 7u16;
    for number in 0..32u16 {
        guest.prepare(1, number, &frame(number as u8, 100 + usize::from(number)));
        if number == bad {
            guest.memory.write_slice(&[1, 99], GuestAddress(Guest::buffer(1, number))).unwrap();
        }
    }
    guest.offer_all(1, 0..32);
    for number in 0..32u16 {
        assert_eq!(guest.wait_used(1), (u32::from(number), 0));
    }
    for number in (0..32u16).filter(|&number| number != bad) {
        assert_eq!(next(&far), frame(number as u8, 100 + usize::from(number)));
    }
    assert_eq!((backend.count(1, "packets"), backend.count(1, "dropped")), (31, 1));
    // One by one, the other way.
    for number in 0..100u8 {
        send(far.as_raw_fd(), &frame(number, 1000), MsgFlags::empty()).unwrap();
        loop {
            let (head, length) = guest.wait_used(0);
            let mut got = vec![0; length as usize];
            guest.memory.read_slice(&mut got, GuestAddress(Guest::buffer(0, head as u16))).unwrap();
            guest.offer(0, head as u16);
            if got[HEADER + 12..HEADER + 14] == OURS {
                assert!(got[HEADER..] == frame(number, 1000));
                break;
            }
        }
    }
}

#[test]
fn the_device_may_move_to_another_namespace_and_goes_with_the_program() {
    if !own_namespace() {
        return;
    }
    let here = File::open("/proc/thread-self/ns/net").unwrap();
    let backend = Backend::start(&["--uplink", "tap:ivt1", "--queue-pairs", "2"]);
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let there = File::open("/proc/thread-self/ns/net").unwrap();
    setns(&here, CloneFlags::CLONE_NEWNET).unwrap();
    let ip = |arguments: &[&str]| {
        assert!(
            std::process::Command::new("ip").args(arguments).status().unwrap().success(),
            "{arguments:?}"
        );
    };
    ip(&["link", "set", "ivt1", "netns", &format!("/proc/{}/fd/{}", std::process::id(), there.as_raw_fd())]);
    setns(&there, CloneFlags::CLONE_NEWNET).unwrap();
    ip(&["link", "set", "ivt1", "up"]);
    let far = far_side("ivt1");
    let mut guest = Guest::new(1, MODERN);
    guest.connect(&backend.socket());
    guest.send(1, 0, &frame(1, 100));
    assert_eq!(next(&far), frame(1, 100));
    drop(backend);
    until("the device is gone", || nix::net::if_::if_nametoindex("ivt1").is_err());
}
