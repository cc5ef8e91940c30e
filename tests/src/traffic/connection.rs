//! One connection of the traffic, at either end.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Instant;

use super::content::{BLOCK, NUMBER};
use super::{LONGEST, LOOK_UP, Shared, Workload, held};

impl Shared {
    /// Moves the traffic over `stream` until it is time to stop.
    pub(super) fn serve(&self, stream: TcpStream, guest: bool) {
        let outcome = self.prepare(&stream).and_then(|()| match (self.traffic.workload, guest) {
            (Workload::TcpOut | Workload::TcpIn, _) if self.traffic.both_ways => {
                self.send_and_receive(&stream)
            }
            (Workload::TcpOut, true) | (Workload::TcpIn, false) => self.send(&stream),
            (Workload::TcpOut, false) | (Workload::TcpIn, true) => self.receive(&stream),
            (Workload::TcpRr, true) => self.ask(&stream),
            (Workload::TcpRr, false) => self.answer(&stream),
        });
        match outcome {
            Err(e) if !self.stopped() && !is_closed(&e) => self.fail(format!("moving traffic: {e}")),
            _ => {}
        }
    }

    fn prepare(&self, stream: &TcpStream) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LOOK_UP))?;
        stream.set_write_timeout(Some(LOOK_UP))?;
        held(&self.streams).push(stream.try_clone()?);
        self.connections.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn send(&self, stream: &TcpStream) -> io::Result<()> {
        let mut position = 0;
        while !self.stopped() {
            let (number, body) = self.content.rest_of_block(position);
            let slices = [IoSlice::new(&number), IoSlice::new(body)];
            let skip = position as usize % BLOCK;
            let length = if skip < NUMBER {
                let first = IoSlice::new(&number[skip..]);
                patient(self, || (&mut &*stream).write_vectored(&[first, slices[1]]))?
            } else {
                patient(self, || (&mut &*stream).write(body))?
            };
            position += length as u64;
            self.bytes_sent.fetch_add(length as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    fn receive(&self, stream: &TcpStream) -> io::Result<()> {
        let mut buffer = vec![0; BLOCK];
        let mut position = 0;
        loop {
            let length = patient(self, || (&mut &*stream).read(&mut buffer))?;
            if length == 0 {
                return Ok(());
            }
            self.content.verify(position, &buffer[..length])?;
            position += length as u64;
            self.bytes_verified.fetch_add(length as u64, Ordering::Relaxed);
        }
    }

    fn send_and_receive(&self, stream: &TcpStream) -> io::Result<()> {
        thread::scope(|scope| {
            let receiver = scope.spawn(|| self.receive(stream));
            let sent = self.send(stream);
            let received = receiver.join().map_err(|_| io::Error::other("the receiving thread died"))?;
            sent.and(received)
        })
    }

    fn ask(&self, stream: &TcpStream) -> io::Result<()> {
        let mut message = vec![0; self.traffic.message];
        let mut position = 0;
        while !self.stopped() {
            self.content.fill(position, &mut message);
            let start = Instant::now();
            self.write_message(stream, &message)?;
            if !self.read_message(stream, &mut message)? {
                return Ok(());
            }
            let nanoseconds = u64::try_from(start.elapsed().as_nanos()).unwrap_or(LONGEST);
            held(&self.round_trips).saturating_record(nanoseconds);
            self.content.verify(position, &message)?;
            position += message.len() as u64;
            self.bytes_verified.fetch_add(message.len() as u64, Ordering::Relaxed);
            self.transactions.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn answer(&self, stream: &TcpStream) -> io::Result<()> {
        let mut message = vec![0; self.traffic.message];
        let mut position = 0;
        while self.read_message(stream, &mut message)? {
            self.content.verify(position, &message)?;
            self.write_message(stream, &message)?;
            position += message.len() as u64;
            self.bytes_verified.fetch_add(message.len() as u64, Ordering::Relaxed);
            self.transactions.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn write_message(&self, stream: &TcpStream, mut message: &[u8]) -> io::Result<()> {
        while !message.is_empty() {
            let length = patient(self, || (&mut &*stream).write(message))?;
            message = &message[length..];
            self.bytes_sent.fetch_add(length as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Reads a whole message; false at the end of the stream.
    fn read_message(&self, stream: &TcpStream, message: &mut [u8]) -> io::Result<bool> {
        let mut filled = 0;
        while filled < message.len() {
            match patient(self, || (&mut &*stream).read(&mut message[filled..]))? {
                0 => return Ok(false),
                length => filled += length,
            }
        }
        Ok(true)
    }
}

/// Repeats a socket call that timed out, until it is time to stop: a backend that is started anew pauses the
/// traffic for longer than any timeout that would still notice the stop in time.
fn patient(shared: &Shared, mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                if shared.stopped() {
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
            }
            outcome => return outcome,
        }
    }
}

/// The other end was told to stop first.
fn is_closed(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected)
}
