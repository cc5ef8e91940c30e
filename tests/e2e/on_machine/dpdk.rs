//! DPDK's frontend for containers, virtio-user, driven by testpmd: frames counted at both ends, and this machine's own TCP
//! through it.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ivcpu_lab::in_host::testpmd::{Testpmd, TestpmdConfig};
use ivcpu_lab::in_host::{Backend, BackendConfig, BackendStats, Cable, Host, NearEnd, TAP, Wire};
use ivcpu_lab::traffic::{End, Traffic, Workload};
use ivcpu_lab::trial::with_testpmd;

const QUEUE_PAIRS: u16 = 2;
/// So many that hashing puts them all on one queue pair in one run of some ten thousand.
const CONNECTIONS: u16 = 16;
const RING: u64 = 256;
/// How long frames flow that are counted.
const FLOW: Duration = Duration::from_millis(500);
/// TCP backs off while one end is away; its next try may be some seconds later.
const RESUME: Duration = Duration::from_secs(60);
const MAC: &str = "52:54:00:49:56:01";

fn backend_config(uplink: &str) -> BackendConfig {
    BackendConfig {
        uplink: uplink.into(),
        queue_pairs: QUEUE_PAIRS,
        poll: "50".into(),
        pcpus: vec![],
        control_queue: true,
        fifo: None,
    }
}

/// The device that connects to `socket`, with `more` words.
fn virtio_user(socket: &Path, more: &str) -> String {
    let path = socket.display();
    format!("net_virtio_user0,path={path},queues={QUEUE_PAIRS},queue_size={RING},mac={MAC}{more}")
}

/// A frontend of `backend` that moves frames in this way, and nothing else.
fn frontend(host: &Host, backend: &Backend, forward: &'static str, frame: usize) -> Result<Testpmd> {
    let devices = vec![virtio_user(backend.socket(), "")];
    let config = TestpmdConfig { enter: vec![], devices, queues: QUEUE_PAIRS, forward, frame };
    Testpmd::start(host, &config)
}

/// Waits until the backend's counters are as they must become, once nothing is sent any more.
fn settles(backend: &Backend, settled: impl Fn(&BackendStats) -> bool) -> Result<BackendStats> {
    let start = Instant::now();
    loop {
        let stats = backend.stats()?;
        if settled(&stats) {
            return Ok(stats);
        }
        ensure!(start.elapsed() < Duration::from_secs(10), "the counters do not become equal: {stats:?}");
        sleep(Duration::from_millis(20));
    }
}

fn packets(stats: &BackendStats, direction: &str) -> u64 {
    stats.total(|queue| if queue.direction == direction { queue.packets } else { 0 })
}

fn bytes(stats: &BackendStats, direction: &str) -> u64 {
    stats.total(|queue| if queue.direction == direction { queue.bytes } else { 0 })
}

#[test]
fn every_frame_that_virtio_user_sends_on_two_queue_pairs_arrives() -> Result<()> {
    with_testpmd(|host| {
        let backend = Backend::start(host, &backend_config("null"))?;
        let mut testpmd = frontend(host, &backend, "txonly", 200)?;
        testpmd.command("start")?;
        sleep(FLOW);
        testpmd.command("stop")?;
        let sent = testpmd.counts(0)?;
        ensure!(sent.sent > 1_000, "{sent:?}");
        let stats = settles(&backend, |stats| packets(stats, "from_guest") == sent.sent)?;
        ensure!(bytes(&stats, "from_guest") == sent.bytes_sent, "{sent:?}, {stats:?}");
        ensure!(sent.bytes_sent == 200 * sent.sent && stats.total(|queue| queue.dropped) == 0, "{stats:?}");
        let sending = stats.queues.iter().filter(|queue| queue.direction == "from_guest");
        ensure!(sending.filter(|queue| queue.packets > 100).count() == 2, "{stats:?}");
        testpmd.quit()
    })
}

#[test]
fn virtio_user_receives_what_is_made_for_it() -> Result<()> {
    with_testpmd(|host| {
        let backend = Backend::start(host, &backend_config("gen:200"))?;
        let mut testpmd = frontend(host, &backend, "rxonly", 64)?;
        testpmd.command("start")?;
        sleep(FLOW);
        testpmd.command("stop")?;
        let received = testpmd.counts(0)?;
        ensure!(received.received > 1_000, "{received:?}");
        ensure!(received.bytes_received == 200 * received.received, "{received:?}");
        // What came after the stop is in the rings, which are full then. Of what testpmd took before, its count misses some
        // frames of a ring now and then, never more than a ring's (the rings' own indices agree with our count).
        let rings = u64::from(QUEUE_PAIRS) * RING;
        let full = |stats: &BackendStats| {
            let rest = packets(stats, "to_guest").checked_sub(received.received);
            rest.is_some_and(|rest| (rings..=2 * rings).contains(&rest))
        };
        settles(&backend, full).with_context(|| format!("{received:?}"))?;
        testpmd.quit()
    })
}

#[test]
fn frames_go_round_and_round_and_none_is_lost() -> Result<()> {
    with_testpmd(|host| {
        let backend = Backend::start(host, &backend_config("loop"))?;
        let mut testpmd = frontend(host, &backend, "io", 64)?;
        // Two bursts of 32 frames on each queue; whatever comes back is sent again.
        testpmd.command("start tx_first 2")?;
        let under_way = u64::from(QUEUE_PAIRS) * 2 * 32;
        sleep(FLOW);
        testpmd.command("stop")?;
        let counts = testpmd.counts(0)?;
        ensure!(counts.received > 1_000 && counts.bytes_received == 64 * counts.received, "{counts:?}");
        ensure!(counts.sent == counts.received + under_way, "{counts:?}");
        let all_back = |stats: &BackendStats| {
            packets(stats, "from_guest") == counts.sent && packets(stats, "to_guest") == counts.sent
        };
        settles(&backend, all_back)?;
        testpmd.quit()
    })
}

/// Both ends of a stream each way in one connection.
struct Streams {
    near: End,
    far: End,
}

impl Streams {
    fn start(near: &NearEnd, wire: &Wire, connections: u16) -> Result<Self> {
        let traffic = Traffic { connections, both_ways: true, ..Traffic::new(Workload::TcpOut) };
        let far = wire.listen(traffic)?;
        Ok(Self { near: near.start_traffic(traffic)?, far })
    }

    /// Waits until both ends have received a further megabyte, every byte as it was sent.
    fn wait_for_more(&self) -> Result<()> {
        let verified = || -> Result<[u64; 2]> {
            let ends = [self.near.counts(), self.far.counts()];
            ensure!(ends.iter().all(|end| end.failure.is_none()), "{ends:?}");
            Ok(ends.map(|end| end.bytes_verified))
        };
        let (start, before) = (Instant::now(), verified()?);
        loop {
            let now = verified()?;
            if now.iter().zip(before).all(|(now, before)| *now > before + 1_000_000) {
                return Ok(());
            }
            ensure!(start.elapsed() < RESUME, "from {before:?} bytes in and out only to {now:?}");
            sleep(Duration::from_millis(100));
        }
    }

    fn stop(self, connections: u64) -> Result<()> {
        let ends = [self.near.stop(), self.far.stop()];
        let whole = ends.iter().all(|end| end.failure.is_none() && end.connections == connections);
        ensure!(whole, "{ends:?}");
        Ok(())
    }
}

#[test]
fn tcp_through_virtio_user_outlives_frontends_and_backends() -> Result<()> {
    with_testpmd(|host| {
        let wire = Wire::set_up(Cable::Tap(QUEUE_PAIRS))?;
        let near = NearEnd::set_up(QUEUE_PAIRS)?;
        let config = backend_config(&format!("tap:{TAP}"));
        let forwarding = |device: String| TestpmdConfig {
            enter: NearEnd::enter_words().into(),
            devices: vec![device, format!("net_tap0,iface={TAP},mac={MAC}")],
            queues: QUEUE_PAIRS,
            forward: "io",
            frame: 64,
        };

        let backend = Backend::start(host, &config)?;
        let client = forwarding(virtio_user(backend.socket(), ""));
        let mut testpmd = Testpmd::start(host, &client)?;
        testpmd.command("start")?;
        let many = Streams::start(&near, &wire, CONNECTIONS)?;
        many.wait_for_more()?;
        many.stop(u64::from(CONNECTIONS))?;
        let stats = backend.stats()?;
        ensure!(stats.queues.len() == 4 && stats.queues.iter().all(|queue| queue.packets > 10), "{stats:?}");

        let streams = Streams::start(&near, &wire, 1)?;
        streams.wait_for_more()?;
        testpmd.kill()?;
        let mut testpmd = Testpmd::start(host, &client)?;
        testpmd.command("start")?;
        streams.wait_for_more()?;
        ensure!(backend.stats()?.sessions == 2);

        // A virtio-user that listens takes a backend that comes back; one that connects does not look for it.
        testpmd.quit()?;
        ensure!(backend.terminate()?.success());
        let socket = host.scratch().join("virtio-user.sock");
        let mut testpmd = Testpmd::spawn(host, &forwarding(virtio_user(&socket, ",server=1")))?;
        let mut backend = Backend::connect(host, &config, &socket)?;
        testpmd.wait_until_ready()?;
        testpmd.command("start")?;
        streams.wait_for_more()?;
        for _ in 0..2 {
            backend.kill()?;
            until_link(&mut testpmd, false)?;
            backend = Backend::connect(host, &config, &socket)?;
            until_link(&mut testpmd, true)?;
            streams.wait_for_more()?;
        }
        streams.stop(1)?;
        // Its own end would be an abort: it still watches descriptors of connections that broke, and has closed them.
        testpmd.kill()
    })
}

/// Asks for the link until it is so, which is when virtio-user acts on it.
fn until_link(testpmd: &mut Testpmd, up: bool) -> Result<()> {
    let start = Instant::now();
    while testpmd.has_link(0)? != up {
        ensure!(start.elapsed() < Duration::from_secs(20), "virtio-user's link does not become {up}");
        sleep(Duration::from_millis(50));
    }
    Ok(())
}
