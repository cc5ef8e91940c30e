//! Does io_uring pay for TAP I/O? One system call a frame against io_uring batches, on a real TAP device.
//!
//!     cargo bench -p ivcpu-backend --bench tap_io          (needs root: it makes a network namespace of its own)
//!
//! Each line: nanoseconds a frame, median of the rounds, and the ratio to `readv`/`writev` (above 1 = io_uring is
//! slower). The numbers measured when the data path was decided are in the crate's README.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use ivcpu_backend::uplink::Tap;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, send, socket};

const NAME: &str = "bench0";
const HEADER: usize = 12;
/// Frames a round: fewer than a TAP device's queue holds (1000).
const FRAMES: usize = 512;
const ROUNDS: usize = 100;

fn main() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(|error| {
        io::Error::other(format!("cannot make a network namespace (root needed): {error}"))
    })?;
    let (_tap, mut pairs) = Tap::open(NAME, 1).map_err(io::Error::other)?;
    let pair = pairs.pop().ok_or(ErrorKind::NotFound)?;
    let tap = pair.fd().as_raw_fd();
    // Let the kernel's own first frames (IPv6 autoconfiguration) pass.
    std::thread::sleep(Duration::from_secs(2));
    let source = packet_socket()?;
    println!("{:<22}{:>12}{:>12}{:>8}", "", "syscall ns", "uring ns", "ratio");
    for size in [64, 1500] {
        let frame = frame(size);
        for batch in [1, 4, 8, 16, 64] {
            let mut ring = ring(tap)?;
            let (plain, uring) =
                medians(|| write_plain(tap, &frame), || write_uring(&mut ring, &frame, batch));
            report(&format!("write {size} B, batch {batch}"), plain, uring);
        }
        let fill = || -> io::Result<()> {
            for _ in 0..FRAMES {
                send(source.as_raw_fd(), &frame[HEADER..], MsgFlags::empty())?;
            }
            Ok(())
        };
        for batch in [1, 4, 8, 16, 64] {
            let mut ring = ring(tap)?;
            let (plain, uring) = medians(
                || fill().and_then(|()| read_plain(tap)),
                || fill().and_then(|()| read_uring(&mut ring, tap, batch)),
            );
            report(&format!("read {size} B, batch {batch}"), plain, uring);
        }
    }
    Ok(())
}

/// An instance with the device registered, as the data path has it.
fn ring(tap: i32) -> io::Result<IoUring> {
    let ring = IoUring::new(64)?;
    ring.submitter().register_files(&[tap])?;
    Ok(ring)
}

fn report(what: &str, plain: f64, uring: f64) {
    println!("{what:<22}{plain:>12.0}{uring:>12.0}{:>8.2}", uring / plain);
}

/// Nanoseconds a frame, medians of the rounds, the two ways in turn so that the machine's mood meets both.
fn medians(
    mut plain: impl FnMut() -> io::Result<Duration>,
    mut uring: impl FnMut() -> io::Result<Duration>,
) -> (f64, f64) {
    let mut times = (Vec::new(), Vec::new());
    let nanos =
        |time: io::Result<Duration>| time.map_or(f64::NAN, |time| time.as_nanos() as f64 / FRAMES as f64);
    for _ in 0..ROUNDS {
        times.0.push(nanos(plain()));
        times.1.push(nanos(uring()));
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[ROUNDS / 2]
    };
    (median(times.0), median(times.1))
}

/// A zeroed virtio header and a broadcast frame of the EtherType for local experiments.
fn frame(size: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER + size];
    frame[HEADER..HEADER + 6].fill(0xff);
    frame[HEADER + 12..HEADER + 14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

/// A socket that puts whole frames into the device's queue.
fn packet_socket() -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None::<SockProtocol>)?;
    let index = nix::net::if_::if_nametoindex(NAME)?;
    // SAFETY: sockaddr_ll is plain data, for which all zeroes is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_ifindex = index as i32;
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address lives until the call returns and is `length` long.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}

fn vectors(buffers: &mut [Vec<u8>]) -> Vec<libc::iovec> {
    buffers
        .iter_mut()
        .map(|buffer| libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() })
        .collect()
}

fn write_plain(tap: i32, frame: &[u8]) -> io::Result<Duration> {
    let vector = libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() };
    let start = Instant::now();
    for _ in 0..FRAMES {
        // SAFETY: the vector describes `frame`, which is only read.
        if unsafe { libc::writev(tap, &raw const vector, 1) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(start.elapsed())
}

fn write_uring(ring: &mut IoUring, frame: &[u8], batch: usize) -> io::Result<Duration> {
    let vector = libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() };
    let start = Instant::now();
    for _ in 0..FRAMES / batch {
        for _ in 0..batch {
            let entry = opcode::Writev::new(types::Fixed(0), &raw const vector, 1).build();
            // SAFETY: the entry's vector and frame outlive `submit_and_wait`, which waits for every one.
            unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
        }
        ring.submit_and_wait(batch)?;
        for completion in ring.completion() {
            if completion.result() < 0 {
                return Err(io::Error::from_raw_os_error(-completion.result()));
            }
        }
    }
    Ok(start.elapsed())
}

/// Reads until the queue is empty, as the data path does.
fn read_plain(tap: i32) -> io::Result<Duration> {
    let mut buffers = [vec![0u8; 2048]];
    let vector = vectors(&mut buffers);
    let (start, mut frames) = (Instant::now(), 0);
    // SAFETY: the vector describes a buffer of ours.
    while unsafe { libc::readv(tap, vector.as_ptr(), 1) } > 0 {
        frames += 1;
    }
    let time = start.elapsed();
    if frames < FRAMES { Err(io::Error::other("frames were lost")) } else { Ok(time) }
}

/// Reads just the frames that are there: io_uring's best case. A read too many would not fail but wait for the next
/// frame, holding on to its buffer; the plain loop pays for finding the queue empty.
fn read_uring(ring: &mut IoUring, tap: i32, batch: usize) -> io::Result<Duration> {
    let mut buffers = vec![vec![0u8; 2048]; batch];
    let vectors = vectors(&mut buffers);
    let start = Instant::now();
    for _ in 0..FRAMES / batch {
        for vector in &vectors {
            let entry = opcode::Readv::new(types::Fixed(0), vector, 1).build();
            // SAFETY: vectors and buffers outlive `submit_and_wait`, which waits for every one.
            unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
        }
        ring.submit_and_wait(batch)?;
        for completion in ring.completion() {
            if completion.result() <= 0 {
                return Err(io::Error::other("frames were lost"));
            }
        }
    }
    let time = start.elapsed();
    // What the kernel itself sent in between.
    read_rest(tap);
    Ok(time)
}

fn read_rest(tap: i32) {
    let mut buffers = [vec![0u8; 2048]];
    let vector = vectors(&mut buffers);
    // SAFETY: the vector describes a buffer of ours.
    while unsafe { libc::readv(tap, vector.as_ptr(), 1) } > 0 {}
}
