//! The door between a frontend's connection and the vhost-user-backend crate.
//!
//! The crate accepts its connections itself, and its message handler cannot be extended. Some things stock frontends
//! and their conventions need do not go with that, so a small relay stands in between; it passes on the messages of
//! a session's set-up, bytes and descriptors alike. Frames never come this way.
//!
//! - A connected socket inherited from the program that started us (`--fd`): the crate only takes what it accepts.
//! - QEMU enables rings when it creates the device, long before the driver's features are known. The crate drops a
//!   connection that does so. So the first message it sees is one of ours: `SET_FEATURES` with the protocol-features
//!   bit alone, which says what such a frontend takes for granted. The driver's own features replace it later.
//! - Some messages are answered here, and memory is counted: see `gate.rs`.

mod gate;

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{AcceptConn, SndBuf};
use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname, getsockopt, setsockopt};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{FrontendReq, VhostUserVirtioFeatures};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub use gate::{Budget, MAX_REGIONS};
use gate::{Gate, HEADER, Verdict};

use crate::device::Mtu;
use crate::sandbox::{Role, Sandbox};

/// Bytes of the largest payload the crate takes.
const MAX_PAYLOAD: usize = 4096;

/// Descriptors one message can carry, as the crate limits them.
const MAX_DESCRIPTORS: usize = 32;
/// Bytes of messages that may wait for the crate: a few messages.
const WAITING: usize = 8192;

/// Why an inherited descriptor is of no use.
#[derive(Debug, thiserror::Error)]
#[error("file descriptor {fd} is not an open Unix stream socket: {source}")]
pub struct Error {
    fd: RawFd,
    #[source]
    source: io::Error,
}

/// What was inherited.
pub enum Inherited {
    /// Frontends will connect.
    Listening(UnixListener),
    /// A frontend is connected.
    Connected(UnixStream),
}

/// Takes over descriptor `fd`.
pub fn inherit(fd: RawFd) -> Result<Inherited, Error> {
    let refuse = |source: io::Error| Error { fd, source };
    // SAFETY: only looked at here; whether it is open at all is what `getsockname` tells.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let address: SockaddrStorage = getsockname(fd).map_err(|error| refuse(error.into()))?;
    if address.family() != Some(AddressFamily::Unix) {
        return Err(refuse(io::ErrorKind::AddrNotAvailable.into()));
    }
    let listening = getsockopt(&borrowed, AcceptConn).map_err(|error| refuse(error.into()))?;
    // SAFETY: the number was given to us for our use alone, and it is taken over only once.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(if listening { Inherited::Listening(socket.into()) } else { Inherited::Connected(socket.into()) })
}

/// A way from us to the crate: a listener that only we can connect to, as often as sessions begin.
///
/// Its socket has no name any more. It was made in a directory of our own, opened, and removed; what is left leads
/// there through `/proc/self/fd` and works for whatever user we become, without a file that we would have to create.
#[derive(Debug)]
pub struct Doorway {
    listener: UnixListener,
    socket: OwnedFd,
}

impl Doorway {
    /// Makes one. To be called while files can be created.
    pub fn new() -> io::Result<Self> {
        let directory = nix::unistd::mkdtemp(&std::env::temp_dir().join("ivcpu-backend-XXXXXX"))?;
        let path = directory.join("socket");
        let make = || {
            let listener = UnixListener::bind(&path)?;
            // Old connections are looked for without waiting.
            listener.set_nonblocking(true)?;
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o777))?;
            let socket = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path)?;
            Ok(Doorway { listener, socket: socket.into() })
        };
        let doorway = make();
        let _ = std::fs::remove_file(&path);
        let _ = std::fs::remove_dir(&directory);
        doorway
    }

    /// A listener with one connection waiting, and that connection's other end.
    fn connect(&self) -> io::Result<(UnixListener, UnixStream)> {
        // One that a session left behind which ended before it began.
        while self.listener.accept().is_ok() {}
        let stream = UnixStream::connect(format!("/proc/self/fd/{}", self.socket.as_raw_fd()))?;
        // What waits here for the crate, and the descriptors with it, stays little.
        setsockopt(&stream, SndBuf, &WAITING)?;
        Ok((self.listener.try_clone()?, stream))
    }
}

/// What a session's relay needs besides the connection.
pub struct Passage<'a> {
    /// The way to the crate.
    pub doorway: &'a Doorway,
    /// How much memory is let in.
    pub budget: Budget,
    /// The MTU that messages set.
    pub mtu: Arc<Mtu>,
    /// How the relay's thread is confined.
    pub sandbox: &'a Sandbox,
}

/// A relay at work. When it is dropped the connection is closed, and its thread has ended.
pub struct Relay {
    frontend: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Starts a relay for `frontend`, and gives a listener from which the crate accepts its other end.
    pub fn start(frontend: UnixStream, passage: Passage<'_>) -> io::Result<(Listener, Relay)> {
        frontend.set_nonblocking(false)?;
        let (listener, mut ours) = passage.doorway.connect()?;
        let opening = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        ours.write_all(&gate::request(FrontendReq::SET_FEATURES, opening))?;
        let stream = frontend.try_clone()?;
        let gate = Gate::new(passage.budget, passage.mtu);
        let (sandbox, span) = (passage.sandbox.clone(), tracing::Span::current());
        let thread = std::thread::Builder::new().name("door".into()).spawn(move || {
            let _span = span.enter();
            sandbox.tighten(Role::Door);
            if let Err(error) = pass(&stream, &ours, gate) {
                // One that dies in the middle of a message is nothing special.
                match error.kind() {
                    io::ErrorKind::Other => tracing::warn!("the connection to the frontend is cut: {error}"),
                    _ => tracing::info!("the connection to the frontend broke: {error}"),
                }
            }
            // Both ends learn of it.
            let _ = stream.shutdown(Shutdown::Both);
            let _ = ours.shutdown(Shutdown::Both);
        })?;
        Ok((listener.into(), Relay { frontend, thread: Some(thread) }))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.frontend.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Passes on what may pass, both ways, until one side closes.
fn pass(frontend: &UnixStream, inside: &UnixStream, mut gate: Gate) -> io::Result<()> {
    // An answer of ours that has to wait for its turn; until then the frontend's next message waits too.
    let mut ours: Option<Vec<u8>> = None;
    loop {
        if gate.is_quiet()
            && let Some(answer) = ours.take()
        {
            (&mut &*frontend).write_all(&answer)?;
        }
        let from_frontend = if ours.is_none() { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut fds =
            [PollFd::new(frontend.as_fd(), from_frontend), PollFd::new(inside.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            result => result?,
        };
        let [from_frontend, from_inside] = fds.map(|fd| fd.any().unwrap_or(true));
        if from_frontend {
            // Told of its end while its next message may not be read yet.
            if ours.is_some() {
                return Ok(());
            }
            let Some(message) = Message::read(frontend)? else { return Ok(()) };
            match gate.judge(&message.bytes, message.fds.len())? {
                Verdict::Pass => message.write(inside)?,
                Verdict::Answer(answer) => ours = Some(answer),
                Verdict::Ignore => {}
            }
        }
        if from_inside {
            let Some(message) = Message::read(inside)? else { return Ok(()) };
            message.write(frontend)?;
            gate.answered();
        }
    }
}

/// A message and what came with it.
struct Message {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Message {
    /// Reads one; `None` at the end of the stream.
    ///
    /// A stream does not keep messages apart, and descriptors belong to the first byte of theirs: so the header is
    /// read alone, and the payload by the size the header tells.
    fn read(from: &UnixStream) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER];
        let (read, fds) = receive(from, &mut header)?;
        if read == 0 {
            return Ok(None);
        }
        let mut from = from;
        from.read_exact(header.get_mut(read..).unwrap_or_default())?;
        let [.., a, b, c, d] = header;
        let size = u32::from_ne_bytes([a, b, c, d]) as usize;
        if size > MAX_PAYLOAD {
            return Err(io::Error::other(format!("a message of {size} bytes, more than any has")));
        }
        let mut bytes = header.to_vec();
        bytes.resize(HEADER + size, 0);
        from.read_exact(bytes.get_mut(HEADER..).unwrap_or_default())?;
        Ok(Some(Message { bytes, fds }))
    }

    fn write(&self, to: &UnixStream) -> io::Result<()> {
        let mut rest = self.bytes.as_slice();
        let mut with: &[RawFd] = &self.fds.iter().map(AsRawFd::as_raw_fd).collect::<Vec<_>>();
        while !rest.is_empty() {
            let sent = to.send_with_fds(&[rest], with)?;
            rest = rest.get(sent..).unwrap_or_default();
            with = &[];
        }
        Ok(())
    }
}

/// Reads at most `bytes`, and the descriptors that come with them.
fn receive(from: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut fds = [-1; MAX_DESCRIPTORS];
    let mut vectors = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
    // SAFETY: the vector describes `bytes`, which outlives the call and which nobody else uses meanwhile.
    let (read, count) = unsafe { from.recv_with_fds(&mut vectors, &mut fds) }?;
    // SAFETY: the kernel has just given us these descriptors.
    let fds = fds.iter().take(count).map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) });
    Ok((read, fds.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A relay for `frontend`, and the crate's end of it.
    fn start(frontend: UnixStream) -> (UnixStream, Relay) {
        let doorway = Doorway::new().unwrap();
        let sandbox = Sandbox::default();
        let passage = Passage {
            doorway: &doorway,
            budget: Budget::of(1),
            mtu: Arc::new(Mtu::new(None)),
            sandbox: &sandbox,
        };
        let (listener, relay) = Relay::start(frontend, passage).unwrap();
        let backend = listener.accept().unwrap().unwrap();
        backend.set_nonblocking(false).unwrap();
        (backend, relay)
    }

    #[test]
    fn bytes_and_descriptors_pass_and_the_end_too() {
        let (mut frontend, inside) = UnixStream::pair().unwrap();
        let (mut backend, relay) = start(inside);
        let mut opening = vec![0; 20];
        backend.read_exact(&mut opening).unwrap();
        assert_eq!(opening, gate::request(FrontendReq::SET_FEATURES, 1 << 30));

        // Two messages in one go, the second with a descriptor: the kernel glues them together for a reader.
        let message = |payload: &[u8]| [&[9, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0], payload].concat();
        let file = tempfile::tempfile().unwrap();
        frontend.write_all(&message(b"one.")).unwrap();
        frontend.send_with_fd(&message(b"two.")[..], file.as_raw_fd()).unwrap();
        for (expected, with) in [(b"one.", false), (b"two.", true)] {
            let mut bytes = [0; 16];
            let (read, passed) = backend.recv_with_fd(&mut bytes).unwrap();
            assert_eq!((read, &bytes[12..]), (16, &expected[..]));
            assert_eq!(passed.is_some(), with);
        }

        backend.write_all(&message(b"back")).unwrap();
        let mut reply = [0; 16];
        frontend.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..], message(b"back"));

        drop(backend);
        assert_eq!(frontend.read(&mut reply).unwrap(), 0);
        drop(relay);
    }

    #[test]
    fn an_oversized_message_ends_the_connection() {
        let (mut frontend, inside) = UnixStream::pair().unwrap();
        let (_backend, relay) = start(inside);
        frontend.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0]).unwrap();
        assert_eq!(frontend.read(&mut [0; 1]).unwrap(), 0);
        drop(relay);
    }

    #[test]
    fn a_descriptor_that_is_no_socket_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(inherit(file.as_raw_fd()).is_err());
        assert!(inherit(1_000_000).is_err());
    }

    #[test]
    fn an_answer_of_ours_waits_for_those_before_it() {
        let (mut frontend, inside) = UnixStream::pair().unwrap();
        let (mut backend, relay) = start(inside);
        backend.read_exact(&mut [0; 20]).unwrap();
        // Features are asked for, memory slots agreed on and asked for, all in one go.
        let question = |code: u32| [code, 1, 0].map(u32::to_ne_bytes).concat();
        let agree = gate::request(FrontendReq::SET_PROTOCOL_FEATURES, 1 << 15);
        frontend.write_all(&[question(1), agree.clone(), question(36), question(17)].concat()).unwrap();
        let mut seen = vec![0; 12 + agree.len()];
        backend.read_exact(&mut seen).unwrap();
        assert_eq!(seen, [question(1), agree].concat());
        frontend.set_nonblocking(true).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(frontend.read(&mut [0]).is_err(), "answered out of turn");
        frontend.set_nonblocking(false).unwrap();
        let features = gate::message(1, 5, 7);
        backend.write_all(&features).unwrap();
        let mut answers = vec![0; 40];
        frontend.read_exact(&mut answers).unwrap();
        assert_eq!(answers, [features, gate::message(36, 5, MAX_REGIONS as u64)].concat());
        let mut next = [0; 12];
        backend.read_exact(&mut next).unwrap();
        assert_eq!(next[..], question(17));
        drop(relay);
    }
}
