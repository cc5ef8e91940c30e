//! The door between a frontend's connection and the vhost-user-backend crate.
//!
//! The crate accepts its connections itself, and its message handler cannot be extended. Two things stock frontends
//! and their conventions need do not go with that, so a small relay stands in between; it passes on the messages of
//! a session's set-up, bytes and descriptors alike. Frames never come this way.
//!
//! - A connected socket inherited from the program that started us (`--fd`): the crate only takes what it accepts.
//! - QEMU enables rings when it creates the device, long before the driver's features are known. The crate drops a
//!   connection that does so. So the first message it sees is one of ours: `SET_FEATURES` with the protocol-features
//!   bit alone, which says what such a frontend takes for granted. The driver's own features replace it later.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::AcceptConn;
use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname, getsockopt};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{FrontendReq, VhostUserVirtioFeatures};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Bytes of a message's header (request, flags, size of the payload), and of the largest payload the crate takes.
const HEADER: usize = 12;
const MAX_PAYLOAD: usize = 4096;

/// Descriptors one message can carry, as the crate limits them.
const MAX_DESCRIPTORS: usize = 32;

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

/// A relay at work.
pub struct Relay {
    frontend: UnixStream,
    thread: JoinHandle<()>,
}

impl Relay {
    /// Starts a relay for `frontend`, and gives a listener from which the crate accepts its other end.
    pub fn start(frontend: UnixStream) -> io::Result<(Listener, Relay)> {
        frontend.set_nonblocking(false)?;
        let (listener, mut ours) = private_connection()?;
        ours.write_all(&opening_message())?;
        let stream = frontend.try_clone()?;
        let thread = std::thread::Builder::new().name("door".into()).spawn(move || {
            if let Err(error) = pass(&stream, &ours) {
                tracing::info!("the connection to the frontend broke: {error}");
            }
            // Both ends learn of it.
            let _ = stream.shutdown(Shutdown::Both);
            let _ = ours.shutdown(Shutdown::Both);
        })?;
        Ok((listener.into(), Relay { frontend, thread }))
    }

    /// Closes the connection and waits for the relay's end.
    pub fn close(self) {
        let _ = self.frontend.shutdown(Shutdown::Both);
        let _ = self.thread.join();
    }
}

/// A listener with one connection waiting, and that connection's other end. The directory makes sure that nobody
/// else connects.
fn private_connection() -> io::Result<(UnixListener, UnixStream)> {
    let directory = nix::unistd::mkdtemp(&std::env::temp_dir().join("ivcpu-backend-XXXXXX"))?;
    let path = directory.join("socket");
    let connection =
        UnixListener::bind(&path).and_then(|listener| Ok((listener, UnixStream::connect(&path)?)));
    let _ = std::fs::remove_file(&path);
    let _ = std::fs::remove_dir(&directory);
    connection
}

/// `SET_FEATURES` with the protocol-features bit: request, flags (version 1), size of the payload, payload.
fn opening_message() -> Vec<u8> {
    const VERSION: u32 = 1;
    let words = [u32::from(FrontendReq::SET_FEATURES), VERSION, size_of::<u64>() as u32];
    let payload = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    words.into_iter().flat_map(u32::to_ne_bytes).chain(payload.to_ne_bytes()).collect()
}

/// Passes everything on, both ways, until one side closes.
fn pass(one: &UnixStream, other: &UnixStream) -> io::Result<()> {
    loop {
        let mut fds =
            [PollFd::new(one.as_fd(), PollFlags::POLLIN), PollFd::new(other.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            result => result?,
        };
        let [from_one, from_other] = fds.map(|fd| fd.any().unwrap_or(true));
        if (from_one && !pass_on(one, other)?) || (from_other && !pass_on(other, one)?) {
            return Ok(());
        }
    }
}

/// Passes on one message; `false` at the end of the stream.
///
/// A stream does not keep messages apart, and descriptors belong to the first byte of theirs: so the header is read
/// alone, and the payload by the size the header tells.
fn pass_on(from: &UnixStream, to: &UnixStream) -> io::Result<bool> {
    let mut header = [0; HEADER];
    let (read, fds) = receive(from, &mut header)?;
    if read == 0 {
        return Ok(false);
    }
    let mut from = from;
    from.read_exact(header.get_mut(read..).unwrap_or_default())?;
    let [.., a, b, c, d] = header;
    let size = u32::from_ne_bytes([a, b, c, d]) as usize;
    if size > MAX_PAYLOAD {
        return Err(io::Error::other(format!("a message of {size} bytes, more than any has")));
    }
    let mut message = header.to_vec();
    message.resize(HEADER + size, 0);
    from.read_exact(message.get_mut(HEADER..).unwrap_or_default())?;

    let mut rest = message.as_slice();
    let mut with: &[RawFd] = &fds.iter().map(AsRawFd::as_raw_fd).collect::<Vec<_>>();
    while !rest.is_empty() {
        let sent = to.send_with_fds(&[rest], with)?;
        rest = rest.get(sent..).unwrap_or_default();
        with = &[];
    }
    Ok(true)
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

    #[test]
    fn bytes_and_descriptors_pass_and_the_end_too() {
        let (mut frontend, inside) = UnixStream::pair().unwrap();
        let (listener, relay) = Relay::start(inside).unwrap();
        let mut backend = listener.accept().unwrap().unwrap();
        let mut opening = vec![0; 20];
        backend.read_exact(&mut opening).unwrap();
        assert_eq!(opening, opening_message());

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
        relay.close();
    }

    #[test]
    fn an_oversized_message_ends_the_connection() {
        let (mut frontend, inside) = UnixStream::pair().unwrap();
        let (_listener, relay) = Relay::start(inside).unwrap();
        frontend.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0]).unwrap();
        assert_eq!(frontend.read(&mut [0; 1]).unwrap(), 0);
        relay.close();
    }

    #[test]
    fn a_descriptor_that_is_no_socket_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(inherit(file.as_raw_fd()).is_err());
        assert!(inherit(1_000_000).is_err());
    }
}
