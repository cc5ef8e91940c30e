//! The lab's own traffic: TCP streams whose every byte the receiver checks, and TCP ping-pongs that are timed.
//!
//! The wire's end listens, the guest's end connects; both run until told to stop, so that a measured window is cut
//! from the middle of steady traffic.

mod connection;
mod content;

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use clap::ValueEnum;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::link::Link;
use content::Content;
pub use content::content_of;

/// The port the wire's end listens on.
pub const PORT: u16 = 7077;

/// How often a blocked read or write looks whether it is time to stop.
const LOOK_UP: Duration = Duration::from_millis(200);
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// Longest round trip the histogram can hold; longer ones count as this.
const LONGEST: u64 = 60_000_000_000;

/// What flows, and which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// A stream from the guest to the wire.
    TcpOut,
    /// A stream from the wire to the guest.
    TcpIn,
    /// Request and response, one at a time, the guest asking.
    TcpRr,
}

/// One kind of traffic.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Traffic {
    /// What flows.
    pub workload: Workload,
    /// Parallel connections.
    pub connections: u16,
    /// Bytes of a ping-pong message.
    pub message: usize,
    /// Each connection of a stream carries one the other way, too.
    pub both_ways: bool,
    /// The cable it flows over.
    pub link: Link,
}

impl Traffic {
    /// One connection on the first cable, one way, 64-byte messages.
    pub fn new(workload: Workload) -> Self {
        Self { workload, connections: 1, message: 64, both_ways: false, link: Link::First }
    }
}

/// What one end has done so far.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Connections opened.
    pub connections: u64,
    /// Payload bytes given to the socket.
    pub bytes_sent: u64,
    /// Payload bytes received and found right.
    pub bytes_verified: u64,
    /// Round trips.
    pub transactions: u64,
    /// Round-trip times since the last reset; only at the asking end.
    pub latency_us: Option<Latency>,
    /// The first thing that went wrong.
    pub failure: Option<String>,
}

/// Percentiles of round-trip times in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile.
    #[serde(rename = "p99.9")]
    pub p999: f64,
}

/// One end of the traffic. Dropping it stops it.
pub struct End {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    traffic: Traffic,
    content: Content,
    stop: AtomicBool,
    connections: AtomicU64,
    bytes_sent: AtomicU64,
    bytes_verified: AtomicU64,
    transactions: AtomicU64,
    round_trips: Mutex<Histogram<u64>>,
    failure: Mutex<Option<String>>,
    streams: Mutex<Vec<TcpStream>>,
}

impl End {
    /// The wire's end: listens on `address` and serves as many connections as the traffic has.
    pub fn listen(traffic: Traffic, address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let shared = Shared::new(traffic)?;
        let threads = (0..traffic.connections)
            .map(|_| {
                let (shared, listener) = (shared.clone(), listener.try_clone()?);
                Ok(thread::spawn(move || {
                    if let Some(stream) = shared.accept(&listener) {
                        shared.serve(stream, false);
                    }
                }))
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { shared, threads })
    }

    /// The guest's end: connects to the wire's.
    pub fn connect(traffic: Traffic, address: SocketAddr) -> io::Result<Self> {
        let shared = Shared::new(traffic)?;
        let streams: Vec<_> = (0..traffic.connections)
            .map(|_| TcpStream::connect_timeout(&address, CONNECT_DEADLINE))
            .collect::<io::Result<_>>()?;
        let serve = |stream| {
            let shared = shared.clone();
            thread::spawn(move || shared.serve(stream, true))
        };
        let threads = streams.into_iter().map(serve).collect();
        Ok(Self { shared, threads })
    }

    /// What it has done so far.
    pub fn counts(&self) -> Counts {
        let shared = &self.shared;
        let round_trips = held(&shared.round_trips);
        let at = |percentile| round_trips.value_at_percentile(percentile) as f64 / 1e3;
        Counts {
            connections: shared.connections.load(Ordering::Relaxed),
            bytes_sent: shared.bytes_sent.load(Ordering::Relaxed),
            bytes_verified: shared.bytes_verified.load(Ordering::Relaxed),
            transactions: shared.transactions.load(Ordering::Relaxed),
            latency_us: (!round_trips.is_empty()).then(|| Latency {
                p50: at(50.0),
                p99: at(99.0),
                p999: at(99.9),
            }),
            failure: held(&shared.failure).clone(),
        }
    }

    /// Forgets the round-trip times so far: a measured window begins.
    pub fn reset_latency(&self) {
        held(&self.shared.round_trips).reset();
    }

    /// Stops it and gives its last counts.
    pub fn stop(mut self) -> Counts {
        self.shut_down();
        self.counts()
    }

    fn shut_down(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for stream in held(&self.shared.streams).iter() {
            // Already closed by the other end is as good.
            let _ = stream.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                self.shared.fail("a traffic thread died".into());
            }
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.shut_down();
    }
}

impl Shared {
    fn new(traffic: Traffic) -> io::Result<Arc<Self>> {
        let round_trips = Histogram::new_with_bounds(1, LONGEST, 3).map_err(io::Error::other)?;
        Ok(Arc::new(Self {
            traffic,
            content: Content::new(),
            stop: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            bytes_sent: AtomicU64::new(0),
            bytes_verified: AtomicU64::new(0),
            transactions: AtomicU64::new(0),
            round_trips: Mutex::new(round_trips),
            failure: Mutex::new(None),
            streams: Mutex::new(Vec::new()),
        }))
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn fail(&self, why: String) {
        held(&self.failure).get_or_insert(why);
    }

    fn accept(&self, listener: &TcpListener) -> Option<TcpStream> {
        while !self.stopped() {
            match listener.accept() {
                Ok((stream, _)) => return Some(stream),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => thread::sleep(LOOK_UP / 10),
                Err(e) => {
                    self.fail(format!("accepting a connection: {e}"));
                    return None;
                }
            }
        }
        None
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here leaves half a change behind.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::content::BLOCK;
    use super::*;

    fn run(workload: Workload, both_ways: bool) -> (Counts, Counts) {
        let traffic = Traffic { connections: 2, both_ways, ..Traffic::new(workload) };
        // The system picks a port by binding once; nothing else here listens on loopback's high ports.
        let probe = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = probe.local_addr().expect("its address");
        drop(probe);
        let wire = End::listen(traffic, address).expect("listening");
        let guest = End::connect(traffic, address).expect("connecting");
        let start = Instant::now();
        let enough = |counts: &Counts| match workload {
            Workload::TcpRr => counts.transactions >= 10,
            _ => counts.bytes_verified > 10 * BLOCK as u64,
        };
        while start.elapsed() < Duration::from_secs(60) {
            let ends = [wire.counts(), guest.counts()];
            let moved = if both_ways { ends.iter().all(enough) } else { ends.iter().any(enough) };
            if moved && ends.iter().all(|counts| counts.connections == 2) {
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
        let guest = guest.stop();
        (guest, wire.stop())
    }

    #[test]
    fn streams_arrive_as_sent() {
        for workload in [Workload::TcpOut, Workload::TcpIn] {
            let (guest, wire) = run(workload, false);
            let (sender, receiver) = if workload == Workload::TcpOut { (guest, wire) } else { (wire, guest) };
            assert_eq!((sender.failure, receiver.failure), (None, None));
            assert!(receiver.bytes_verified > 10 * BLOCK as u64, "{workload:?}: {}", receiver.bytes_verified);
            assert!(receiver.bytes_verified <= sender.bytes_sent);
            assert_eq!((sender.connections, receiver.connections), (2, 2));
        }
    }

    #[test]
    fn a_connection_carries_streams_both_ways() {
        let (guest, wire) = run(Workload::TcpOut, true);
        assert_eq!((&guest.failure, &wire.failure), (&None, &None));
        for (sender, receiver) in [(&guest, &wire), (&wire, &guest)] {
            assert!(receiver.bytes_verified > 10 * BLOCK as u64, "{receiver:?}");
            assert!(receiver.bytes_verified <= sender.bytes_sent);
            assert_eq!(receiver.connections, 2);
        }
    }

    #[test]
    fn round_trips_are_timed_at_the_asking_end() {
        let (guest, wire) = run(Workload::TcpRr, false);
        assert_eq!((guest.failure, wire.failure), (None, None));
        assert!(guest.transactions >= 8, "{}", guest.transactions);
        let latency = guest.latency_us.expect("round trips were timed");
        assert!(0.0 < latency.p50 && latency.p50 <= latency.p99 && latency.p99 <= latency.p999);
        assert_eq!(wire.latency_us, None);
    }
}
