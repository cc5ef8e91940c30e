//! What a frontend can agree on with the backend besides moving frames.

mod guest;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use guest::*;
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures as Protocol,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::GuestMemoryRegion;

const MODERN: u64 = VERSION_1 | MRG_RXBUF | EVENT_IDX | IN_ORDER;
const IN_ORDER: u64 = 1 << 35;
const MTU: u64 = 1 << 3;

/// A frontend that has agreed on every protocol feature, and wants every message answered.
fn agreed(socket: &Path) -> Frontend {
    let mut frontend = Frontend::connect(socket, 2).unwrap();
    frontend.set_owner().unwrap();
    frontend.get_features().unwrap();
    let protocol = frontend.get_protocol_features().unwrap();
    frontend.set_protocol_features(protocol).unwrap();
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    frontend
}

/// A frontend by hand, for messages that the vhost crate has none of.
struct Raw(UnixStream);

impl Raw {
    const NEED_REPLY: u32 = 1 << 3;

    fn tell(&mut self, request: FrontendReq, flags: u32, payload: &[u8]) {
        let header = [request.into(), 1 | flags, payload.len() as u32].map(u32::to_ne_bytes).concat();
        self.0.write_all(&[&header, payload].concat()).unwrap();
    }

    fn ask(&mut self, request: FrontendReq, flags: u32, payload: &[u8]) -> u64 {
        self.tell(request, flags, payload);
        let mut answer = [0; 20];
        self.0.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..12], [request.into(), 5, 8].map(u32::to_ne_bytes).concat());
        u64::from_ne_bytes(answer[12..].try_into().unwrap())
    }
}

#[test]
fn what_is_offered_is_what_the_documents_say() {
    let backend = Backend::start(&["--uplink", "null", "--queue-pairs", "2", "--mtu", "9000"]);
    let frontend = Frontend::connect(backend.socket(), 4).unwrap();
    frontend.set_owner().unwrap();
    let features = frontend.get_features().unwrap();
    let mut frontend = frontend;
    let protocol = frontend.get_protocol_features().unwrap();
    let expected =
        Protocol::MQ | Protocol::REPLY_ACK | Protocol::MTU | Protocol::CONFIG | Protocol::CONFIGURE_MEM_SLOTS;
    assert_eq!(protocol, expected);
    // VERSION_1, IN_ORDER, EVENT_IDX, INDIRECT_DESC, protocol features, MQ, GUEST_ANNOUNCE, CTRL_RX, CTRL_VQ, STATUS,
    // MRG_RXBUF, CTRL_MAC_ADDR, MTU; a null uplink has no offloads.
    let bits = [32, 35, 29, 28, 30, 22, 21, 18, 17, 16, 15, 23, 3];
    assert_eq!(features, bits.into_iter().fold(0, |all, bit| all | 1u64 << bit));
}

#[test]
fn the_mtu_of_the_options_is_in_configuration_space_and_messages_lower_it() {
    let backend = Backend::start(&["--uplink", "null", "--mtu", "9000"]);
    let mut frontend = Raw(UnixStream::connect(backend.socket()).unwrap());
    frontend.tell(FrontendReq::SET_OWNER, 0, &[]);
    assert!(frontend.ask(FrontendReq::GET_FEATURES, 0, &[]) & MTU != 0);
    let protocol = frontend.ask(FrontendReq::GET_PROTOCOL_FEATURES, 0, &[]);
    frontend.tell(FrontendReq::SET_PROTOCOL_FEATURES, 0, &protocol.to_ne_bytes());
    let mut mtu = |message: Option<(u64, u64)>| {
        if let Some((value, answer)) = message {
            let answered = frontend.ask(FrontendReq::NET_SET_MTU, Raw::NEED_REPLY, &value.to_ne_bytes());
            assert_eq!(answered, answer, "{value}");
        }
        // Offset, size and flags of the field, and room for it.
        let field = [[10u32, 2, 0].map(u32::to_ne_bytes).concat(), vec![0; 2]].concat();
        frontend.tell(FrontendReq::GET_CONFIG, 0, &field);
        let mut answer = [0; 26];
        frontend.0.read_exact(&mut answer).unwrap();
        u16::from_le_bytes([answer[24], answer[25]])
    };
    assert_eq!(mtu(None), 9000);
    for (message, answer, now) in [(1500, 0, 1500), (67, 1, 1500), (9001, 1, 1500), (9000, 0, 9000)] {
        assert_eq!(mtu(Some((message, answer))), now);
    }
    assert_eq!(mtu(Some((1 << 40, 1))), 9000);
    drop(frontend);
    // The next frontend gets what the options say again.
    let flags = VhostUserConfigFlags::empty();
    let (_, field) = agreed(&backend.socket()).get_config(10, 2, flags, &[0; 2]).unwrap();
    assert_eq!(field, 9000u16.to_le_bytes());
}

#[test]
fn writing_configuration_space_is_refused_and_nothing_else_happens() {
    let backend = Backend::start(&["--uplink", "null", "--mac", "52:54:00:12:34:56"]);
    let mut frontend = agreed(&backend.socket());
    let flags = VhostUserConfigFlags::WRITABLE;
    assert!(frontend.set_config(0, flags, &[2, 0, 0, 0, 0, 1]).is_err());
    let (_, mac) = frontend.get_config(0, 6, VhostUserConfigFlags::empty(), &[0; 6]).unwrap();
    assert_eq!(mac, [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    assert_eq!(backend.stats()["sessions"], 1);
}

#[test]
fn frames_pass_through_memory_that_was_added_piece_by_piece() {
    let backend = Backend::start(&["--uplink", "loop"]);
    let mut frontend = agreed(&backend.socket());
    assert_eq!(frontend.get_max_mem_slots().unwrap(), 64);
    let mut guest = Guest::new(1, MODERN);
    let offered = frontend.get_features().unwrap();
    frontend.set_features(offered & (MODERN | 1 << 30)).unwrap();
    // The rings first, then, in a place of its own, a page that comes and goes.
    let ram = VhostUserMemoryRegionInfo::from_guest_region(guest.region()).unwrap();
    frontend.add_mem_region(&ram).unwrap();
    for index in 0..2 {
        guest.start_queue(&frontend, index).unwrap();
        frontend.set_vring_enable(index, true).unwrap();
    }
    guest.fill(0);
    let more = Guest::new(1, MODERN);
    let (mut added, size) = (VhostUserMemoryRegionInfo::from_guest_region(more.region()).unwrap(), 0x1000);
    added.memory_size = size;
    added.userspace_addr += 1 << 40;
    for round in 0..200 {
        added.guest_phys_addr = (1 << 32) + round * size;
        frontend.add_mem_region(&added).unwrap();
        loop_once(&mut guest, round as u16, &frame(200));
        frontend.remove_mem_region(&added).unwrap();
        loop_once(&mut guest, round as u16, &frame(300));
    }
    // 64 at once, and no more.
    let mut taken = 0;
    while taken < 100 {
        added.guest_phys_addr = (1 << 32) + taken * size;
        if frontend.add_mem_region(&added).is_err() {
            break;
        }
        taken += 1;
    }
    assert_eq!(taken, 63);
    loop_once(&mut guest, 400, &frame(400));
    assert!(backend.said().contains("are more than a port is given"), "{}", backend.said());
    assert_eq!(backend.stats()["sessions"], 1);
    assert_eq!(more.region().len(), 16 << 20);
}

#[test]
fn entries_are_used_in_the_order_they_were_offered_whatever_they_are() {
    let backend = Backend::start(&["--uplink", "loop", "--poll-us", "0"]);
    let mut guest = Guest::new(1, MODERN);
    guest.connect(&backend.socket());
    guest.fill(0);
    // Good frames and malformed chains of every length of burst, heads shuffled.
    for burst in 1..=SIZE {
        let heads: Vec<u16> = (0..burst).map(|i| (i * 7 + burst) % SIZE).collect();
        for (place, &head) in heads.iter().enumerate() {
            match place % 3 {
                2 => guest.describe(1, head, u64::MAX - 10, 100, 0, 0),
                _ => guest.prepare(1, head, &frame(100)),
            }
        }
        guest.offer_all(1, heads.iter().copied());
        for &head in &heads {
            assert_eq!(guest.wait_used(1), (u32::from(head), 0));
        }
        for _ in heads.iter().enumerate().filter(|(place, _)| place % 3 != 2) {
            let (head, _) = guest.wait_used(0);
            guest.offer(0, head as u16);
        }
    }
}

#[test]
fn a_port_that_connects_finds_a_frontend_that_comes_later_and_one_that_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("frontend");
    let words = ["--socket-path", path.to_str().unwrap(), "--client", "--uplink", "loop"];
    let backend = Backend::start_in(tempfile::tempdir().unwrap(), &words);
    let mut guest = Guest::new(1, MODERN);
    guest.fill(0);
    for round in 0..3 {
        let listener = UnixListener::bind(&path).unwrap();
        let (stream, _) = listener.accept().unwrap();
        guest.connect_stream(stream);
        for index in 0..20 {
            loop_once(&mut guest, round * 20 + index, &frame(100));
        }
        guest.disconnect();
        drop(listener);
        std::fs::remove_file(&path).unwrap();
    }
    assert_eq!(backend.stats()["sessions"], 3);
}

#[test]
fn a_message_of_a_feature_that_was_not_agreed_on_ends_the_session_and_the_next_begins() {
    let backend = Backend::start(&["--uplink", "loop"]);
    for request in [FrontendReq::NET_SET_MTU, FrontendReq::SET_CONFIG, FrontendReq::GET_MAX_MEM_SLOTS] {
        let mut frontend = Raw(UnixStream::connect(backend.socket()).unwrap());
        frontend.tell(request, Raw::NEED_REPLY, &[0; 8]);
        match frontend.0.read(&mut [0; 1]) {
            Ok(0) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            answer => panic!("answered: {answer:?}"),
        }
    }
    let mut guest = Guest::new(1, MODERN);
    guest.connect(&backend.socket());
    guest.fill(0);
    loop_once(&mut guest, 0, &frame(64));
}

#[test]
fn a_ring_where_no_memory_is_is_refused() {
    let backend = Backend::start(&["--uplink", "loop"]);
    let frontend = agreed(&backend.socket());
    let guest = Guest::new(1, MODERN);
    frontend.set_mem_table(&[VhostUserMemoryRegionInfo::from_guest_region(guest.region()).unwrap()]).unwrap();
    let nowhere = VringConfigData {
        queue_max_size: SIZE,
        queue_size: SIZE,
        flags: 0,
        desc_table_addr: 0x1000,
        used_ring_addr: 0x2000,
        avail_ring_addr: 0x3000,
        log_addr: None,
    };
    assert!(frontend.set_vring_addr(0, &nowhere).is_err());
}
