//! A TAP device as uplink: each frame is one write or read straight from or into guest buffers, the virtio header in
//! front (`IFF_VNET_HDR`). Bursts of writes are batched.
//!
//! The descriptors stay attached to the device when it is moved into another network namespace; nothing here looks
//! the device up again by its name after it was opened.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::*;

use crate::device::header_length;
use crate::memory::{Chain, Chains};
use crate::uplink::batch::{Batch, WORTHWHILE};

/// What can go wrong with a TAP device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name the kernel cannot have.
    #[error("a TAP name has 1 to 15 bytes without '/' or white space; {0:?} has not")]
    Name(String),
    /// No TUN driver.
    #[error("cannot open /dev/net/tun: {0} (is the tun module loaded, and may this user open it?)")]
    Driver(#[source] io::Error),
    /// No rights.
    #[error(
        "no rights to TAP {0}: create it for this user (ip tuntap add {0} mode tap user NAME) or run with CAP_NET_ADMIN"
    )]
    Rights(String),
    /// Somebody else has it open.
    #[error("TAP {0} is in use by another process")]
    InUse(String),
    /// Wrong kind of device.
    #[error("{name} does not fit: {queue_pairs} queue pair(s) need a {} with vnet_hdr", if *.queue_pairs > 1 { "multi_queue TAP" } else { "TAP" })]
    Kind {
        /// Its name.
        name: String,
        /// What was asked for.
        queue_pairs: usize,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// An ioctl failed.
    #[error("cannot set up TAP {name} ({what}): {source}")]
    Setup {
        /// Its name.
        name: String,
        /// The step.
        what: &'static str,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

/// The device-wide side of a TAP device.
#[derive(Debug)]
pub struct Tap {
    name: String,
    /// A descriptor of one queue: device-wide settings can be made through any.
    control: File,
}

impl Tap {
    /// Attaches to the device `name`, which is created when there is none (and vanishes with this process), with one
    /// queue a pair.
    pub fn open(name: &str, queue_pairs: usize) -> Result<(Tap, Vec<TapPair>), Error> {
        if name.is_empty() || name.len() > 15 || name.contains(|c: char| c == '/' || c.is_whitespace()) {
            return Err(Error::Name(name.to_owned()));
        }
        let existed = std::path::Path::new("/sys/class/net").join(name).exists();
        let several = queue_pairs > 1;
        // A single pair takes either kind of existing device; the kernel refuses the wrong flag.
        let (first, multi_queue) = match attach(name, several) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && !several => {
                (attach(name, true), true)
            }
            result => (result, several),
        };
        let explain = |error: io::Error| match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Error::Rights(name.to_owned()),
            Some(libc::EBUSY) => Error::InUse(name.to_owned()),
            Some(libc::EINVAL) => Error::Kind { name: name.to_owned(), queue_pairs, source: error },
            _ => Error::Driver(error),
        };
        let mut queues = vec![first.map_err(explain)?];
        for _ in 1..queue_pairs {
            queues.push(attach(name, true).map_err(explain)?);
        }
        let setup = |what, source| Error::Setup { name: name.to_owned(), what, source };
        let control = queues
            .first()
            .ok_or_else(|| setup("queues", io::ErrorKind::InvalidInput.into()))?
            .try_clone()
            .map_err(|error| setup("dup", error))?;
        if !existed {
            bring_up(name).map_err(|error| setup("link up", error))?;
        }
        let tap = Tap { name: name.to_owned(), control };
        tap.negotiated(1 << VIRTIO_F_VERSION_1)?;
        Ok((tap, queues.into_iter().map(|queue| TapPair::new(queue, multi_queue)).collect()))
    }

    /// Lets the kernel hand us what the driver can take: unfinished checksums, and segments of up to 64 KiB.
    pub fn negotiated(&self, features: u64) -> Result<(), Error> {
        let has = |bit: u32| features & (1 << bit) != 0;
        let setup = |what, source| Error::Setup { name: self.name.clone(), what, source };
        let mut flags = 0;
        for (feature, flag) in [
            (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
            (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
            (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
            (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
        ] {
            // Nothing without checksums: the kernel refuses the others alone.
            if has(feature) && has(VIRTIO_NET_F_GUEST_CSUM) {
                flags |= flag;
            }
        }
        // ECN qualifies the segment kinds and means nothing alone.
        if flags & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) == 0 {
            flags &= !libc::TUN_F_TSO_ECN;
        }
        let header = header_length(features) as libc::c_int;
        // SAFETY: this ioctl takes a plain integer.
        let result =
            unsafe { libc::ioctl(self.control.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
        check(result).map_err(|error| setup("TUNSETOFFLOAD", error))?;
        // SAFETY: this ioctl reads one int, which lives until it returns.
        let result =
            unsafe { libc::ioctl(self.control.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) };
        check(result).map_err(|error| setup("TUNSETVNETHDRSZ", error))
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Opens one queue of the device.
fn attach(name: &str, multi_queue: bool) -> io::Result<File> {
    let queue =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    let mut request = request(name);
    let multi = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi) as libc::c_short;
    // SAFETY: the ioctl reads and writes one ifreq, which lives until it returns.
    check(unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    Ok(queue)
}

/// Writes one frame; tells whether the kernel took it.
fn write(queue: &File, vectors: &[libc::iovec]) -> bool {
    // SAFETY: the vectors describe mapped guest memory (see `Chains`), which the kernel only reads.
    let written = unsafe { libc::writev(queue.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) };
    written >= 0
}

/// An interface request for the device `name`, which was checked to fit.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

/// Sets the device up (`ip link set NAME up`).
fn bring_up(name: &str) -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut request = request(name);
    // SAFETY: both ioctls read and write one ifreq, which lives until they return.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) })?;
    // SAFETY: the kernel has just filled in the flags, the union's field of this ioctl.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    // SAFETY: as above.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) })
}

/// One queue of a TAP device.
pub struct TapPair {
    queue: File,
    batch: Batch,
    multi_queue: bool,
    enabled: bool,
}

impl TapPair {
    fn new(queue: File, multi_queue: bool) -> Self {
        let batch = Batch::new(queue.as_fd());
        TapPair { queue, batch, multi_queue, enabled: true }
    }

    /// The queue's descriptor: readable when a frame waits.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }

    /// Sends each frame; the kernel refuses (EINVAL) a header that contradicts its frame.
    pub fn send(&mut self, chains: &Chains, mut sent: impl FnMut(&Chain, bool)) {
        let batched = if chains.len() >= WORTHWHILE { self.batch.write(chains) } else { &[] };
        for (index, (chain, vectors)) in chains.iter().enumerate() {
            let taken = match batched.get(index).copied().flatten() {
                Some(result) => result >= 0,
                None => chain.bytes != 0 && write(&self.queue, vectors),
            };
            sent(chain, taken);
        }
    }

    /// Receives one frame.
    pub fn receive(&mut self, vectors: &[libc::iovec]) -> Option<usize> {
        // SAFETY: the vectors describe mapped guest memory (see `Chains`) or a buffer of the caller's; nobody holds a
        // reference into either while the kernel writes.
        let read =
            unsafe { libc::readv(self.queue.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) };
        usize::try_from(read).ok()
    }

    /// Attaches or detaches the queue, so that the kernel spreads flows only over queues whose rings are in use.
    pub fn set_enabled(&mut self, enabled: bool) {
        if !self.multi_queue || self.enabled == enabled {
            return;
        }
        let mut request = request("");
        let flag = if enabled { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = flag as libc::c_short;
        // SAFETY: the ioctl reads one ifreq, which lives until it returns.
        match check(unsafe { libc::ioctl(self.queue.as_raw_fd(), libc::TUNSETQUEUE, &raw mut request) }) {
            Ok(()) => self.enabled = enabled,
            Err(error) => tracing::warn!("cannot attach or detach a TAP queue: {error}"),
        }
    }
}
