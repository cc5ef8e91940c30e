//! The second console: virtio-console with one port, `hvc0` in Linux, beside the serial port.
//!
//! Output is written by the vCPU that makes it, as that of the serial port is. Input is read by a thread of its own and put into the
//! buffers the guest has made available; while there are none, that thread waits.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vm_memory::Bytes;

use super::ring::Ring;
use super::{Activation, Device};
use crate::memory::GuestMemory;
use crate::pause::Pausable;
use crate::serial;

/// "Other communication controller".
const CLASS_COMMUNICATION: u32 = 0x07_8000;
const QUEUE_SIZE: u16 = 64;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Most descriptors of a chain. None is longer than its queue, as no tables are offered; the guest may make one of 65535 all the same.
const LONGEST: usize = QUEUE_SIZE as usize;
/// Most bytes of output in one chain; Linux sends a page.
const MOST: usize = 64 << 10;

/// `--console off|tty|file=PATH`
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ConsoleMode {
    /// No device.
    #[default]
    Off,
    /// Standard input and output.
    Tty,
    /// Output to a file, no input.
    File(PathBuf),
}

impl FromStr for ConsoleMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("file=")) {
            ("off", _) => Ok(Self::Off),
            ("tty", _) => Ok(Self::Tty),
            (_, Some(path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err("expected off, tty or file=PATH".to_owned()),
        }
    }
}

struct State {
    sink: Box<dyn Write + Send>,
    receive: Option<Ring>,
    transmit: Option<Ring>,
    /// Whether input waits for the end of a pause.
    paused: bool,
}

/// The device, shared between the vCPUs and the thread that brings input.
#[derive(Clone)]
pub struct Console {
    state: Arc<Mutex<State>>,
    room: Arc<Condvar>,
    memory: GuestMemory,
}

impl Console {
    /// The device that `mode` asks for; `None` for `off`.
    pub fn new(mode: &ConsoleMode, memory: GuestMemory) -> Result<Option<Self>, serial::Error> {
        let sink: Box<dyn Write + Send> = match mode {
            ConsoleMode::Off => return Ok(None),
            ConsoleMode::Tty => Box::new(io::stdout()),
            ConsoleMode::File(path) => Box::new(serial::create("console", path)?),
        };
        Ok(Some(Self::with_sink(sink, memory)))
    }

    fn with_sink(sink: Box<dyn Write + Send>, memory: GuestMemory) -> Self {
        let state = State { sink, receive: None, transmit: None, paused: false };
        Self { state: Arc::new(Mutex::new(state)), room: Arc::default(), memory }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Feeds `input` to the guest until it ends; blocks while the guest does not read.
    pub fn feed(&self, input: impl Read) {
        serial::hand_on(input, |bytes| self.feed_bytes(bytes));
    }

    fn feed_bytes(&self, mut bytes: &[u8]) {
        let mut state = self.lock();
        while !bytes.is_empty() {
            match state.receive(bytes, &self.memory) {
                Some(taken) => bytes = &bytes[taken..],
                None => state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

impl Pausable for Console {
    fn pause(&self, _: Duration) -> bool {
        self.lock().paused = true;
        true
    }

    fn resume(&self) {
        self.lock().paused = false;
        self.room.notify_all();
    }

    fn name(&self) -> String {
        "the console".into()
    }
}

impl State {
    /// Puts bytes into the next buffer; how many, if there is a buffer.
    fn receive(&mut self, bytes: &[u8], memory: &GuestMemory) -> Option<usize> {
        let ring = self.receive.as_mut().filter(|_| !self.paused)?;
        let mut put = || {
            let Some(chain) = ring.pop(memory)? else { return Ok(None) };
            let head = chain.head_index();
            let mut taken = 0;
            for piece in chain.take(LONGEST).filter(|piece| piece.is_write_only()) {
                let rest = &bytes[taken..];
                let now = &rest[..rest.len().min(piece.len() as usize)];
                // The driver reads from the first byte on, so there is no going on behind a gap.
                if memory.write_slice(now, piece.addr()).is_err() {
                    break;
                }
                taken += now.len();
            }
            ring.add_used(memory, head, taken as u32)?;
            ring.notify(memory)?;
            Ok(Some(taken))
        };
        put().unwrap_or_else(|error: virtio_queue::Error| {
            tracing::info!("the console's input queue stops: {error}");
            self.receive = None;
            None
        })
    }

    fn transmit(&mut self, memory: &GuestMemory) -> Result<(), virtio_queue::Error> {
        let Some(ring) = &mut self.transmit else { return Ok(()) };
        for _ in 0..ring.size() {
            let Some(chain) = ring.pop(memory)? else { break };
            let head = chain.head_index();
            let mut output = Vec::new();
            for piece in chain.take(LONGEST).filter(|piece| !piece.is_write_only()) {
                let start = output.len();
                output.resize(MOST.min(start + piece.len() as usize), 0);
                if memory.read_slice(&mut output[start..], piece.addr()).is_err() {
                    output.truncate(start);
                    break;
                }
            }
            // A sink that went away must not stop the guest: its bytes are dropped.
            let _ = self.sink.write_all(&output).and_then(|()| self.sink.flush());
            ring.add_used(memory, head, 0)?;
        }
        ring.notify(memory)
    }
}

impl Device for Console {
    fn id(&self) -> u16 {
        VIRTIO_ID_CONSOLE as u16
    }

    fn class(&self) -> u32 {
        CLASS_COMMUNICATION
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) {
        let Activation { features, queues, .. } = activation;
        let mut state = self.lock();
        for queue in queues {
            let place = if queue.index == RECEIVE { &mut state.receive } else { &mut state.transmit };
            *place = Ring::new(queue, features).ok();
        }
        self.room.notify_all();
    }

    fn serves(&self, _: u16) -> bool {
        true
    }

    fn kicked(&mut self, queue: u16) {
        if queue == TRANSMIT {
            let mut state = self.lock();
            if let Err(error) = state.transmit(&self.memory) {
                tracing::info!("the console's output queue stops: {error}");
                state.transmit = None;
            }
        } else {
            // The feeder must not be between its look at the queue and its sleep.
            let _state = self.lock();
            self.room.notify_all();
        }
    }

    fn reset(&mut self) {
        let mut state = self.lock();
        (state.receive, state.transmit) = (None, None);
    }
}

#[cfg(test)]
mod tests {
    use super::super::ring::tests::{BUFFERS, Driver};
    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_reaches_the_sink_whatever_the_chain() {
        let (mut driver, sink) = (Driver::new(), Sink::default());
        let mut console = Console::with_sink(Box::new(sink.clone()), driver.memory.clone());
        console.activate(driver.activation(2));
        driver.write(BUFFERS, b"hello world");
        driver.offer(1, &[(BUFFERS, 5, false), (BUFFERS + 5, 6, false)]);
        driver.offer(1, &[(BUFFERS, 5, true)]);
        driver.offer(1, &[(u64::MAX, 5, false)]);
        console.kicked(TRANSMIT);
        assert_eq!(*sink.0.lock().unwrap(), b"hello world");
        assert_eq!(driver.used(1), [0, 0, 0]);
        assert!(driver.interrupted(1));
    }

    #[test]
    fn a_table_is_read_no_further_than_a_queue_is_long() {
        let (mut driver, sink) = (Driver::new(), Sink::default());
        let mut console = Console::with_sink(Box::new(sink.clone()), driver.memory.clone());
        console.activate(driver.activation(2));
        // A table of 1000 pieces in the place of the one descriptor.
        for index in 0..1000u16 {
            let piece = [
                &BUFFERS.to_le_bytes()[..],
                &1u32.to_le_bytes()[..],
                &1u16.to_le_bytes(),
                &(index + 1).to_le_bytes(),
            ];
            driver.write(BUFFERS + 0x4000 + 16 * u64::from(index), &piece.concat());
        }
        driver.offer(1, &[(BUFFERS + 0x4000, 16_000, false)]);
        driver.write(0x5000 + 12, &4u16.to_le_bytes());
        console.kicked(TRANSMIT);
        assert_eq!((sink.0.lock().unwrap().len(), driver.used(1)), (LONGEST, vec![0]));
    }

    #[test]
    fn input_waits_for_buffers() {
        let mut driver = Driver::new();
        let mut console = Console::with_sink(Box::new(io::sink()), driver.memory.clone());
        let feeder = console.clone();
        let feeder = std::thread::spawn(move || feeder.feed(&b"typed before there was a guest"[..]));
        console.activate(driver.activation(2));
        driver.offer(0, &[(BUFFERS, 10, true)]);
        driver.offer(0, &[(BUFFERS + 10, 4, false)]);
        driver.offer(0, &[(BUFFERS + 10, 100, true)]);
        console.kicked(RECEIVE);
        feeder.join().unwrap();
        assert_eq!(driver.used(0), [10, 0, 20]);
        assert_eq!(driver.read(BUFFERS, 30), b"typed before there was a guest");
    }

    #[test]
    fn modes_are_words() {
        assert_eq!("file=/tmp/x".parse(), Ok(ConsoleMode::File("/tmp/x".into())));
        assert_eq!("off".parse(), Ok(ConsoleMode::Off));
        for bad in ["", "file=", "null", "pty"] {
            assert!(bad.parse::<ConsoleMode>().is_err(), "{bad}");
        }
    }
}
