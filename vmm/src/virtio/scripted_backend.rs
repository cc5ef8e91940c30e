//! A backend that answers as the protocol wants, for tests of the other end.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_CTRL_VQ;

pub(super) const PROTOCOL_FEATURES: u64 = 1 << 30;
pub(super) const PROTOCOL_MQ_AND_ACK: u64 = 0b1001;
pub(super) const PROTOCOL_MEMORY_SLOTS: u64 = 1 << 15;
pub(super) const PROTOCOL_STATUS: u64 = 1 << 16;
pub(super) const GET_FEATURES: u32 = 1;
pub(super) const SET_FEATURES: u32 = 2;
pub(super) const SET_MEM_TABLE: u32 = 5;
pub(super) const SET_VRING_BASE: u32 = 10;
pub(super) const GET_VRING_BASE: u32 = 11;
pub(super) const SET_VRING_KICK: u32 = 12;
pub(super) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(super) const GET_QUEUE_NUM: u32 = 17;
pub(super) const SET_VRING_ENABLE: u32 = 18;
pub(super) const ADD_MEM_REG: u32 = 37;
pub(super) const SET_STATUS: u32 = 39;

/// A message as it arrived: request, and its payload as 32-bit words.
pub(super) type Message = (u32, Vec<u32>);

/// What a backend can do.
#[derive(Clone, Copy)]
pub(super) struct Kind {
    pub(super) features: u64,
    pub(super) protocol: u64,
    pub(super) queues: u64,
    /// Starts every ring at its first entry, whatever it is told.
    pub(super) forgets: bool,
}

impl Kind {
    pub(super) fn new(features: u64, queues: u64) -> Self {
        Self { features, protocol: PROTOCOL_MQ_AND_ACK, queues, forgets: false }
    }

    /// As Alioth's is: it takes memory by regions, begins with all rings when the driver is ready, and has a control queue.
    pub(super) fn at_once() -> Self {
        let protocol = PROTOCOL_MQ_AND_ACK | PROTOCOL_MEMORY_SLOTS | PROTOCOL_STATUS;
        Self { protocol, ..Self::new(1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_NET_F_CTRL_VQ, 3) }
    }
}

/// A backend that answers as the protocol wants and notes what it was told.
pub(super) struct Backend {
    pub(super) heard: Receiver<Message>,
    stream: UnixStream,
    thread: JoinHandle<()>,
}

impl Backend {
    /// Accepts one frontend while `connect` runs.
    pub(super) fn accept<T>(
        listener: &UnixListener,
        features: u64,
        queues: u64,
        connect: impl FnOnce() -> T,
    ) -> (Self, T) {
        Self::accept_by(listener, Kind::new(features, queues), connect)
    }

    /// The same by a backend of this kind.
    pub(super) fn accept_by<T>(
        listener: &UnixListener,
        kind: Kind,
        connect: impl FnOnce() -> T,
    ) -> (Self, T) {
        let listener = listener.try_clone().unwrap();
        let (stream_out, stream_in) = channel();
        let (tell, heard) = channel();
        let thread = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut bases = [[0; 4]; 8];
            stream_out.send(stream.try_clone().unwrap()).unwrap();
            while let Ok((request, flags, payload)) = receive(&mut stream) {
                let words = payload
                    .chunks_exact(4)
                    .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
                    .collect();
                let _ = tell.send((request, words));
                let ring = usize::from(payload.first().copied().unwrap_or_default());
                if request == SET_VRING_BASE && !kind.forgets {
                    bases[ring].copy_from_slice(&payload[4..]);
                }
                let answer = match request {
                    GET_FEATURES => Some((kind.features | PROTOCOL_FEATURES).to_le_bytes().to_vec()),
                    GET_PROTOCOL_FEATURES => Some(kind.protocol.to_le_bytes().to_vec()),
                    GET_QUEUE_NUM => Some(kind.queues.to_le_bytes().to_vec()),
                    GET_VRING_BASE => Some([&payload[..4], &bases[ring]].concat()),
                    // An acknowledgement, where one is asked for.
                    _ => (flags & 8 != 0).then(|| 0u64.to_le_bytes().to_vec()),
                };
                if let Some(body) = answer {
                    let header = [request, 5, body.len() as u32].map(u32::to_le_bytes).concat();
                    stream.write_all(&[header, body].concat()).unwrap();
                }
            }
        });
        let result = connect();
        (Self { heard, stream: stream_in.recv().unwrap(), thread }, result)
    }

    /// What was heard since the last time, of this request.
    pub(super) fn heard(&self, wanted: u32) -> Vec<Vec<u32>> {
        self.heard.try_iter().filter(|(request, _)| *request == wanted).map(|(_, words)| words).collect()
    }

    pub(super) fn die(self) {
        self.stream.shutdown(std::net::Shutdown::Both).unwrap();
        self.thread.join().unwrap();
    }
}

fn receive(stream: &mut UnixStream) -> std::io::Result<(u32, u32, Vec<u8>)> {
    let mut header = [0; 12];
    stream.read_exact(&mut header)?;
    let [request, flags, size] =
        [0, 4, 8].map(|at| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]));
    let mut payload = vec![0; size as usize];
    stream.read_exact(&mut payload)?;
    Ok((request, flags, payload))
}
