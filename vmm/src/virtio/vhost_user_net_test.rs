//! The device against a scripted backend: what it is told, and what happens when it goes and comes back.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::virtio::scripted_backend::*;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const MQ: u64 = 1 << VIRTIO_NET_F_MQ;

fn eventfd() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

fn queue(index: u16) -> Queue {
    let base = 0x1_0000 + 0x4000 * u64::from(index);
    Queue {
        index,
        size: 16,
        descriptors: base,
        available: base + 0x1000,
        used: base + 0x2000,
        kick: eventfd(),
        call: eventfd(),
        config_change: Arc::default(),
    }
}

struct Rig {
    directory: tempfile::TempDir,
    listener: UnixListener,
    memory: GuestMemory,
}

impl Rig {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        Self { directory, listener, memory: crate::memory::allocate(&"size=32M".parse().unwrap()).unwrap() }
    }

    fn socket(&self) -> std::path::PathBuf {
        self.directory.path().join("socket")
    }

    fn connect(&self, pairs: u16, features: u64, queues: u64) -> (Backend, Result<VhostUserNet, Error>) {
        self.connect_to(pairs, Kind::new(features, queues))
    }

    fn connect_to(&self, pairs: u16, kind: Kind) -> (Backend, Result<VhostUserNet, Error>) {
        let text = format!("vhost_user=true,socket={},num_queues={}", self.socket().display(), 2 * pairs);
        let options = text.parse().unwrap();
        Backend::accept_by(&self.listener, kind, || VhostUserNet::new(options, self.memory.clone()))
    }
}

fn activate(
    net: &VhostUserNet,
    features: u64,
    queues: Vec<Queue>,
) -> (Arc<ConfigChange>, Vec<(EventFd, EventFd)>) {
    let config_change = Arc::<ConfigChange>::default();
    let files = queues.iter().map(|q| (q.kick.try_clone().unwrap(), q.call.try_clone().unwrap())).collect();
    let mut net = net.clone();
    net.activate(Activation { features, queues, config_change: Arc::clone(&config_change) });
    (config_change, files)
}

fn status(net: &VhostUserNet) -> u32 {
    let mut status = [0; 2];
    net.read_config(6, &mut status);
    u32::from(u16::from_le_bytes(status))
}

#[test]
fn a_fresh_driver_starts_at_zero_with_one_pair() {
    let rig = Rig::new();
    let (backend, net) = rig.connect(2, VERSION_1 | MQ, 4);
    let net = net.unwrap();
    assert_ne!(net.features() & MQ, 0);
    // A used index that somebody left in memory means nothing to a fresh driver.
    rig.memory.write_obj(77u16, GuestAddress(0x1_2002)).unwrap();
    activate(&net, VERSION_1 | MQ, (0..5).map(queue).collect());
    let heard: Vec<_> = backend.heard.try_iter().collect();
    let of = |wanted| {
        heard.iter().filter(|(request, _)| *request == wanted).map(|(_, w)| w.clone()).collect::<Vec<_>>()
    };
    assert_eq!(
        of(SET_VRING_BASE),
        [[0, 0], [1, 0], [2, 0], [3, 0]],
        "the control queue is not the backend's"
    );
    assert_eq!(of(SET_VRING_ENABLE), [[0, 1], [1, 1], [2, 0], [3, 0]]);
    let agreed = of(SET_FEATURES);
    assert_eq!(u64::from(agreed[0][0]) | u64::from(agreed[0][1]) << 32, VERSION_1 | MQ | PROTOCOL_FEATURES);
    assert!(net.serves(4) && !net.serves(2));
}

#[test]
fn pairs_are_switched_on_and_off_at_the_backend() {
    let rig = Rig::new();
    let (backend, net) = rig.connect(2, VERSION_1 | MQ, 4);
    let net = net.unwrap();
    activate(&net, VERSION_1 | MQ, (0..5).map(queue).collect());
    backend.heard(0);
    assert!(net.lock().command(Command::Pairs(2)));
    assert_eq!(backend.heard(SET_VRING_ENABLE), [[2, 1], [3, 1]]);
    assert!(net.lock().command(Command::Pairs(1)));
    assert_eq!(backend.heard(SET_VRING_ENABLE), [[2, 0], [3, 0]]);
    for wrong in [0, 3, u16::MAX] {
        assert!(!net.lock().command(Command::Pairs(wrong)), "{wrong}");
    }
}

#[test]
fn a_paused_vms_rings_are_taken_back_also_from_a_backend_that_comes_meanwhile() {
    let rig = Rig::new();
    let (backend, net) = rig.connect(1, VERSION_1, 2);
    let net = net.unwrap();
    let (_, files) = activate(&net, VERSION_1, (0..2).map(queue).collect());
    backend.heard(0);
    assert!(net.pause(Duration::ZERO));
    assert_eq!(backend.heard(GET_VRING_BASE), [[0, 0], [1, 0]]);
    rig.memory.write_obj(7u16, GuestAddress(0x1_2002)).unwrap();
    Pausable::resume(&net);
    let heard: Vec<_> = backend.heard.try_iter().collect();
    let of = |wanted| {
        heard.iter().filter(|(request, _)| *request == wanted).map(|(_, w)| w.clone()).collect::<Vec<_>>()
    };
    assert_eq!((of(SET_VRING_BASE), of(SET_MEM_TABLE).len()), (vec![vec![0, 7], vec![1, 0]], 0));
    assert_eq!(of(SET_VRING_ENABLE), [[0, 1], [1, 1]]);
    for (kick, call) in &files {
        assert_eq!((kick.read().unwrap(), call.read().is_err()), (1, true), "what is there is seen");
    }

    assert!(net.pause(Duration::ZERO));
    backend.die();
    net.lock().lost();
    let (next, resumed) = Backend::accept(&rig.listener, VERSION_1, 2, || net.reconnect());
    resumed.unwrap();
    assert_eq!(next.heard(SET_VRING_BASE).len(), 0, "not in a pause");
    Pausable::resume(&net);
    assert_eq!(next.heard(SET_VRING_BASE), [[0, 7], [1, 0]]);
    next.die();
    assert!(!net.pause(Duration::ZERO), "it did not give them back");
}

#[test]
fn a_backend_that_comes_back_goes_on_at_the_used_index() {
    let rig = Rig::new();
    let (backend, net) = rig.connect(1, VERSION_1, 2);
    let net = net.unwrap();
    let announce = 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
    let (config_change, files) = activate(&net, VERSION_1 | announce, (0..2).map(queue).collect());
    assert_eq!(status(&net), VIRTIO_NET_S_LINK_UP);
    backend.die();
    for round in 1..=3u16 {
        net.lock().lost();
        assert_eq!(status(&net), 0, "link down");
        rig.memory.write_obj(100 * round, GuestAddress(0x1_2002)).unwrap();
        rig.memory.write_obj(100 * round + 1, GuestAddress(0x1_6002)).unwrap();
        let (next, resumed) = Backend::accept(&rig.listener, VERSION_1, 2, || net.reconnect());
        resumed.unwrap();
        let bases = next.heard(SET_VRING_BASE);
        assert_eq!(bases, [[0, 100 * u32::from(round)], [1, 100 * u32::from(round) + 1]]);
        for (kick, call) in &files {
            assert_eq!(
                (kick.read().unwrap(), call.read().unwrap()),
                (1, 1),
                "each ring is kicked and called"
            );
        }
        assert_eq!(status(&net), VIRTIO_NET_S_LINK_UP | VIRTIO_NET_S_ANNOUNCE);
        assert_eq!(config_change.generation() as u16, 2 * round);
        assert!(net.lock().command(Command::AnnounceAck));
        next.die();
    }
}

#[test]
fn a_driver_that_comes_while_the_backend_is_away_gets_the_next_one() {
    let rig = Rig::new();
    let (backend, net) = rig.connect(1, VERSION_1, 2);
    let net = net.unwrap();
    backend.die();
    net.lock().lost();
    activate(&net, VERSION_1, (0..2).map(queue).collect());
    let (next, resumed) = Backend::accept(&rig.listener, VERSION_1, 2, || net.reconnect());
    resumed.unwrap();
    assert_eq!(next.heard(SET_VRING_BASE), [[0, 0], [1, 0]]);
}

#[test]
fn a_backend_that_comes_back_with_less_is_not_taken() {
    let rig = Rig::new();
    let csum = 1 << VIRTIO_NET_F_CSUM;
    let (backend, net) = rig.connect(1, VERSION_1 | csum, 2);
    let net = net.unwrap();
    backend.die();
    net.lock().lost();
    for with_driver in [false, true] {
        if with_driver {
            activate(&net, VERSION_1 | csum, (0..2).map(queue).collect());
        }
        let (_less, resumed) = Backend::accept(&rig.listener, VERSION_1, 2, || net.reconnect());
        assert!(matches!(resumed, Err(Error::Changed { missing, .. }) if missing == csum));
        assert_eq!(status(&net), 0);
    }
}

#[test]
fn the_device_is_free_while_a_silent_backend_is_waited_for() {
    let rig = Rig::new();
    let (backend, net) = rig.connect(1, VERSION_1, 2);
    let net = net.unwrap();
    backend.die();
    net.lock().lost();
    // Nobody accepts: the connection stays in the listener's queue, as with a backend that serves another VMM.
    let tried = Instant::now();
    let trying = thread::spawn({
        let net = net.clone();
        move || net.reconnect()
    });
    let mut longest = Duration::ZERO;
    while !trying.is_finished() {
        let asked = Instant::now();
        assert_eq!(status(&net), 0);
        longest = longest.max(asked.elapsed());
        thread::sleep(Duration::from_millis(10));
    }
    assert!(tried.elapsed() >= Duration::from_secs(3), "it was not silent");
    assert!(longest < Duration::from_secs(2), "the guest waited {longest:?}");
    let outcome = trying.join().unwrap();
    assert!(matches!(outcome, Err(Error::Silent { .. })), "{outcome:?}");
}

#[test]
fn a_lost_backend_is_looked_for_until_it_is_there() {
    let rig = Rig::new();
    let (backend, net) = rig.connect(1, VERSION_1, 2);
    let net = net.unwrap();
    backend.die();
    net.lock().lost();
    std::fs::remove_file(rig.socket()).unwrap();
    net.look_for_backend();
    thread::sleep(3 * reconnect::RETRY);
    assert_eq!(status(&net), 0);
    let listener = UnixListener::bind(rig.socket()).unwrap();
    let _back = Backend::accept(&listener, VERSION_1, 2, || {
        let deadline = Instant::now() + Duration::from_secs(10);
        while status(&net) == 0 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
    });
    assert_eq!(status(&net), VIRTIO_NET_S_LINK_UP);
    assert_eq!(net.lock().back.read().unwrap(), 1, "the event loop is told");
}

#[test]
fn reset_takes_the_rings_back() {
    let rig = Rig::new();
    let (backend, net) = rig.connect(1, VERSION_1, 2);
    let mut net = net.unwrap();
    activate(&net, VERSION_1, (0..2).map(queue).collect());
    net.reset();
    assert_eq!(backend.heard(GET_VRING_BASE), [[0, 0], [1, 0]]);
    net.reset();
    assert!(backend.heard(GET_VRING_BASE).is_empty(), "once");
    activate(&net, VERSION_1, (0..2).map(queue).collect());
    assert_eq!(backend.heard(SET_VRING_BASE).len(), 2, "the next driver gets them");
}

#[test]
fn a_backend_that_begins_at_once_is_told_of_memory_once_and_of_drivers_each_time() {
    let rig = Rig::new();
    let (backend, net) = rig.connect_to(1, Kind::at_once());
    let mut net = net.unwrap();
    for round in 0..2 {
        activate(&net, VERSION_1, (0..2).map(queue).collect());
        net.reset();
        let heard: Vec<_> = backend.heard.try_iter().collect();
        let of = |wanted: u32| {
            heard.iter().filter(|heard| heard.0 == wanted).map(|heard| heard.1.clone()).collect::<Vec<_>>()
        };
        assert!(of(SET_MEM_TABLE).is_empty());
        assert_eq!(of(ADD_MEM_REG).len(), 1 - round, "round {round}");
        assert_eq!(of(SET_VRING_KICK), [[0, 0], [1, 0], [2, 0]], "its control queue's, too");
        assert_eq!(of(SET_STATUS), [[0xf, 0], [0, 0]]);
        let at = |wanted: u32| heard.iter().position(|heard| heard.0 == wanted);
        assert!(at(SET_VRING_ENABLE) < at(SET_STATUS), "it begins when all is said");
        assert_eq!(heard.last().map(|heard| heard.0), Some(SET_STATUS), "it is free when all rings are back");
    }
}

#[test]
fn a_backend_that_begins_at_once_gets_rings_that_were_used_only_if_it_can_go_on() {
    let rig = Rig::new();
    let kind = Kind::at_once();
    let (backend, net) = rig.connect_to(1, kind);
    let mut net = net.unwrap();
    activate(&net, VERSION_1, (0..2).map(queue).collect());
    rig.memory.write_obj(100u16, GuestAddress(0x1_2002)).unwrap();
    backend.die();
    net.lock().lost();
    let forgets = Kind { forgets: true, ..kind };
    let (next, resumed) = Backend::accept_by(&rig.listener, forgets, || net.reconnect());
    let forgot = matches!(resumed, Err(Error::Forgets { ring: 0, told: 100, said: 0, .. }));
    assert!(forgot, "{resumed:?}");
    assert!(next.heard(SET_STATUS).is_empty(), "it begins with nothing");
    assert_eq!(status(&net), 0, "link down");
    let (next, resumed) = Backend::accept_by(&rig.listener, kind, || net.reconnect());
    resumed.unwrap();
    assert_eq!(next.heard(SET_VRING_BASE), [[0, 100], [0, 100], [1, 0]]);
    // A driver that sets its device up anew wants nothing remembered.
    next.die();
    net.lock().lost();
    net.reset();
    let (_next, resumed) = Backend::accept_by(&rig.listener, forgets, || net.reconnect());
    resumed.unwrap();
    activate(&net, VERSION_1, (0..2).map(queue).collect());
    assert_eq!(status(&net), VIRTIO_NET_S_LINK_UP);
}

#[test]
fn backends_may_count_rings_or_pairs_but_must_have_enough() {
    let rig = Rig::new();
    for (queues, works) in [(4, true), (2, true), (1, false)] {
        let (_backend, net) = rig.connect(2, VERSION_1 | MQ, queues);
        assert_eq!(net.is_ok(), works, "{queues}");
        if let Ok(net) = net {
            activate(&net, VERSION_1 | MQ, (0..5).map(queue).collect());
            assert!(net.lock().session.as_ref().unwrap().offered() & VERSION_1 != 0);
        }
    }
    let (_backend, old) = rig.connect(1, 0, 2);
    assert!(matches!(old, Err(Error::Lacks { .. })), "no VERSION_1");
    let (_backend, single) = rig.connect(2, VERSION_1, 4);
    assert!(matches!(single, Err(Error::Lacks { .. })), "no MQ");
}

#[test]
fn an_absent_socket_is_said_to_be_absent() {
    let text = "vhost_user=true,socket=/nonexistent/socket";
    let memory = crate::memory::allocate(&"size=32M".parse().unwrap()).unwrap();
    let error = VhostUserNet::new(text.parse().unwrap(), memory).err().unwrap();
    assert!(matches!(error, Error::Connect { path, .. } if path == Path::new("/nonexistent/socket")));
}

#[test]
fn the_offer_is_what_backend_and_vmm_have_together() {
    let all = u64::MAX;
    assert_eq!(offer(all, 1) & mask(&[VIRTIO_NET_F_MQ]), 0, "one pair needs no MQ");
    assert_ne!(offer(all, 2) & mask(&[VIRTIO_NET_F_MQ]), 0);
    assert_eq!(offer(0, 2), mask(FROM_VMM));
    assert_eq!(
        offer(all, 2) & mask(&[VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, 34, 33]),
        0,
        "no packed ring, no IOMMU"
    );
}
