//! The serial console: a 16550 whose output goes to a sink and whose input comes from standard input.
//!
//! Output is collected and written at each line end or full buffer by the vCPU that fills it; what stays behind (a
//! prompt) is written by the main loop a few milliseconds later, when the timer armed by its first byte expires. So a
//! line costs one write, not one per byte. Input is read by a thread of its own, because standard input may be a
//! terminal, a pipe or a file, and only the first two can be polled; its end is no error, the console just hears
//! nothing more.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::events;

/// First I/O port of COM1.
pub const PORT: u16 = 0x3f8;
/// Ports of a 16550.
pub const PORTS: u16 = 8;
/// The interrupt line of COM1.
pub const GSI: u32 = 4;

const BUFFER: usize = 4096;
const FLUSH_AFTER: Duration = Duration::from_millis(5);

/// `--serial tty|null|off|file=PATH`
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum SerialMode {
    /// Standard input and output.
    #[default]
    Tty,
    /// A port that swallows what is written and never hears anything.
    Null,
    /// No port at all.
    Off,
    /// Output to a file, no input.
    File(PathBuf),
}

impl FromStr for SerialMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "tty" => Ok(Self::Tty),
            "null" => Ok(Self::Null),
            "off" => Ok(Self::Off),
            _ => match text.strip_prefix("file=") {
                Some(path) if !path.is_empty() => Ok(Self::File(path.into())),
                _ => Err("expected tty, null, off or file=PATH".to_owned()),
            },
        }
    }
}

/// What can go wrong while the port is made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file of `--serial file=` or `--console file=` could not be made.
    #[error("cannot create the {what} output file {path}")]
    File {
        /// serial or console.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// That file is a pipe or the like, which could block the VMM.
    #[error(
        "the {what} output file {path} is neither a regular file nor a character device such as a terminal; give one of these"
    )]
    NotAFile {
        /// serial or console.
        what: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// An event or timer file could not be made.
    #[error("cannot make the serial port's event files")]
    Events(#[source] io::Error),
}

/// The interrupt line: an eventfd that KVM turns into an edge on [`GSI`].
#[derive(Debug)]
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the input thread that the receive FIFO has room again.
#[derive(Debug, Default)]
struct RoomForInput(Arc<Condvar>);

impl SerialEvents for RoomForInput {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.notify_one();
    }
}

/// Collects bytes until a line or the buffer is full.
#[derive(Debug)]
struct Output<W> {
    sink: W,
    pending: Vec<u8>,
    timer: Option<Arc<Mutex<TimerFd>>>,
}

impl<W: Write> Output<W> {
    /// A sink that went away (a closed pipe) must not stop the guest: its bytes are dropped.
    fn write_pending(&mut self) {
        let _ = self.sink.write_all(&self.pending).and_then(|()| self.sink.flush());
        self.pending.clear();
    }
}

impl<W: Write> Write for Output<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let first = self.pending.is_empty();
        self.pending.extend_from_slice(bytes);
        if bytes.contains(&b'\n') || self.pending.len() >= BUFFER {
            self.write_pending();
        } else if first && let Some(timer) = &self.timer {
            let _ = lock(timer).reset(FLUSH_AFTER, None);
        }
        Ok(bytes.len())
    }

    /// The UART flushes after each byte; the buffer decides for itself.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Uart = Serial<Line, RoomForInput, Output<Box<dyn Write + Send>>>;

/// The serial port of a VM.
pub struct Port {
    uart: Mutex<Uart>,
    room: Arc<Condvar>,
    interrupt: EventFd,
    timer: Arc<Mutex<TimerFd>>,
    /// Whether output can be made to wait by whoever reads it.
    is_terminal: bool,
}

impl Port {
    /// The port that `mode` asks for; `None` for `off`.
    pub fn new(mode: &SerialMode) -> Result<Option<Arc<Self>>, Error> {
        let sink: Box<dyn Write + Send> = match mode {
            SerialMode::Off => return Ok(None),
            SerialMode::Null => Box::new(io::sink()),
            SerialMode::Tty => Box::new(io::stdout()),
            SerialMode::File(path) => Box::new(create("serial", path)?),
        };
        let mut port = Self::with_sink(sink).map_err(Error::Events)?;
        port.is_terminal = *mode == SerialMode::Tty;
        Ok(Some(Arc::new(port)))
    }

    fn with_sink(sink: Box<dyn Write + Send>) -> io::Result<Self> {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let timer = Arc::new(Mutex::new(TimerFd::new().map_err(io::Error::from)?));
        let room = Arc::new(Condvar::new());
        let output = Output { sink, pending: Vec::with_capacity(BUFFER), timer: Some(Arc::clone(&timer)) };
        let events = RoomForInput(Arc::clone(&room));
        let uart = Mutex::new(Serial::with_events(Line(interrupt.try_clone()?), events, output));
        Ok(Self { uart, room, interrupt, timer, is_terminal: false })
    }

    /// The eventfd to be wired to [`GSI`].
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// Writes out what is collected, if that can be done within `patience`: the terminal may be stopped, and a vCPU may be waiting for
    /// it with the port in its hands.
    pub fn flush(&self, patience: Duration) -> bool {
        if self.is_terminal && !can_write(io::stdout().as_fd(), patience) {
            return false;
        }
        let mut uart = match self.uart.try_lock() {
            Ok(uart) => uart,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        uart.writer_mut().write_pending();
        true
    }

    /// The guest reads `data.len()` bytes from one register.
    pub fn read(&self, offset: u8, data: &mut [u8]) {
        let mut uart = lock(&self.uart);
        data.fill_with(|| uart.read(offset));
    }

    /// The guest writes bytes to one register, one after the other.
    pub fn write(&self, offset: u8, data: &[u8]) {
        let mut uart = lock(&self.uart);
        for byte in data {
            // Only a full interrupt eventfd can fail here, and then the line is up already.
            let _ = uart.write(offset, *byte);
        }
    }

    /// Feeds `input` to the guest until it ends; blocks while the guest does not read.
    pub fn feed(&self, input: impl Read) {
        hand_on(input, |bytes| self.feed_bytes(bytes));
    }

    fn feed_bytes(&self, mut bytes: &[u8]) {
        let mut uart = lock(&self.uart);
        while !bytes.is_empty() {
            match uart.enqueue_raw_bytes(bytes) {
                // In loop-back mode the port takes nothing from outside.
                Ok(0) => return,
                Ok(count) => bytes = &bytes[count..],
                Err(_) => uart = self.room.wait(uart).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// Hands a console what `input` has, piece by piece, until it ends.
pub(crate) fn hand_on(mut input: impl Read, mut take: impl FnMut(&[u8])) {
    let mut bytes = [0; 256];
    loop {
        match input.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => take(&bytes[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::warn!("the console hears nothing more: cannot read standard input: {error}");
                return;
            }
        }
    }
}

/// Opens the file of `--serial file=` or `--console file=`, made if it is not there and emptied if it is.
pub(crate) fn create(what: &'static str, path: &Path) -> Result<File, Error> {
    let failed = |source| Error::File { what, path: path.into(), source };
    let not_a_file = || Error::NotAFile { what, path: path.into() };
    let mut options = OpenOptions::new();
    // A pipe nobody reads from would block, and a terminal is not to become ours.
    options.write(true).create(true).truncate(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = match options.open(path) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Err(not_a_file()),
        opened => opened.map_err(failed)?,
    };
    let kind = file.metadata().map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_char_device() {
        return Err(not_a_file());
    }
    // Output to a slow terminal waits for it rather than being lost.
    fcntl(&file, FcntlArg::F_SETFL(OFlag::empty())).map_err(|error| failed(error.into()))?;
    Ok(file)
}

/// Writes out what stayed in the serial buffer.
pub struct Flush(
    /// Of this port.
    pub Arc<Port>,
);

impl MutEventSubscriber for Flush {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        let mut timer = lock(&self.0.timer);
        let _ = timer.wait();
        drop(timer);
        if !self.0.flush(Duration::ZERO) {
            // Later, then.
            let _ = lock(&self.0.timer).reset(FLUSH_AFTER, None);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        events::watch(ops, lock(&self.0.timer).as_raw_fd());
    }
}

/// Whether a write to `output` of what the buffer holds would not wait.
fn can_write(output: BorrowedFd<'_>, patience: Duration) -> bool {
    let mut fds = [PollFd::new(output, PollFlags::POLLOUT)];
    let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::ZERO);
    matches!(poll(&mut fds, patience), Ok(ready) if ready > 0)
}

/// No code panics while it holds one of these locks; if one ever did, the console should still work.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<Vec<u8>>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            lock(&self.0).push(bytes.to_vec());
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn port() -> (Port, Sink) {
        let sink = Sink::default();
        (Port::with_sink(Box::new(sink.clone())).unwrap(), sink)
    }

    #[test]
    fn a_line_is_one_write() {
        let (port, sink) = port();
        for byte in b"hello\n" {
            port.write(0, &[*byte]);
        }
        assert_eq!(*lock(&sink.0), [b"hello\n".to_vec()]);
    }

    #[test]
    fn a_prompt_arms_the_timer_and_is_flushed() {
        let (port, sink) = port();
        port.write(0, b"#");
        assert!(lock(&port.timer).is_armed().unwrap());
        assert!(lock(&sink.0).is_empty());
        assert!(port.flush(Duration::ZERO));
        assert_eq!(*lock(&sink.0), [b"#".to_vec()]);
    }

    #[test]
    fn input_raises_the_line_and_waits_for_room() {
        let (port, _) = port();
        port.write(1, &[1]); // receive interrupt on
        let _ = port.interrupt().read();
        std::thread::scope(|scope| {
            let feeder = scope.spawn(|| port.feed(&[b'x'; 200][..]));
            let mut got = 0;
            while got < 200 {
                let mut byte = [0];
                port.read(5, &mut byte);
                if byte[0] & 1 != 0 {
                    port.read(0, &mut byte);
                    assert_eq!(byte[0], b'x');
                    got += 1;
                }
            }
            feeder.join().unwrap();
        });
        assert!(port.interrupt().read().unwrap() > 0);
    }

    #[test]
    fn output_goes_to_files_and_terminals_but_not_to_pipes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(create("serial", &path), Err(Error::NotAFile { .. })), "without a reader");
        let _reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        assert!(matches!(create("serial", &path), Err(Error::NotAFile { .. })), "with a reader");
        for path in [directory.path().join("log"), "/dev/null".into()] {
            let file = create("serial", &path).unwrap();
            let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL).unwrap());
            assert!(!flags.contains(OFlag::O_NONBLOCK), "{path:?}");
        }
    }

    #[test]
    fn modes_are_words() {
        assert_eq!("tty".parse(), Ok(SerialMode::Tty));
        assert_eq!("file=/tmp/x".parse(), Ok(SerialMode::File("/tmp/x".into())));
        for bad in ["", "file=", "pty", "TTY"] {
            assert!(bad.parse::<SerialMode>().is_err(), "{bad}");
        }
    }
}
