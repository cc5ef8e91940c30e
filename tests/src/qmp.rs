//! The few words of QEMU's machine protocol (QMP) the lab needs.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

/// How long QEMU may take to offer its socket, and to answer.
const DEADLINE: Duration = Duration::from_secs(20);

/// Why QEMU could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket does not work.
    #[error("cannot talk to QEMU at {0}: {1}")]
    Socket(PathBuf, #[source] io::Error),
    /// The answer makes no sense.
    #[error("QEMU's answer to {0} is not understood: {1}")]
    Answer(&'static str, String),
}

/// A connection to one QEMU.
pub struct Qmp {
    path: PathBuf,
    reader: BufReader<UnixStream>,
    /// Events that came before an answer, in their order.
    events: VecDeque<Value>,
}

#[derive(Deserialize)]
struct Cpu {
    #[serde(rename = "cpu-index")]
    index: usize,
    #[serde(rename = "thread-id")]
    thread: i32,
}

impl Qmp {
    /// Connects, waiting for QEMU to come up.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let start = Instant::now();
        let socket = |e| Error::Socket(path.into(), e);
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(e) if start.elapsed() > DEADLINE => return Err(socket(e)),
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        };
        stream.set_read_timeout(Some(DEADLINE)).map_err(socket)?;
        let mut qmp = Self { path: path.into(), reader: BufReader::new(stream), events: VecDeque::new() };
        qmp.line()?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Lets a machine that was started stopped run.
    pub fn start_machine(&mut self) -> Result<(), Error> {
        self.execute("cont", json!({})).map(drop)
    }

    /// Carries a command out; what it returns.
    pub fn execute(&mut self, command: &'static str, arguments: Value) -> Result<Value, Error> {
        let request = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        let path = self.path.clone();
        self.reader.get_mut().write_all(request.as_bytes()).map_err(|e| Error::Socket(path, e))?;
        loop {
            let mut answer = self.message(command)?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                return Err(Error::Answer(command, error.to_string()));
            }
            self.events.push_back(answer);
        }
    }

    /// Waits for the next event of this name; its data. Others that came before it are forgotten.
    pub fn wait_for(&mut self, event: &'static str) -> Result<Value, Error> {
        let start = Instant::now();
        while start.elapsed() < DEADLINE {
            let mut next = match self.events.pop_front() {
                Some(next) => next,
                None => self.message(event)?,
            };
            if next["event"] == event {
                return Ok(next["data"].take());
            }
        }
        Err(Error::Answer(event, format!("it did not come within {DEADLINE:?}")))
    }

    /// The thread ids of the machine's vCPUs, in the order of their numbers.
    pub fn vcpu_threads(&mut self) -> Result<Vec<i32>, Error> {
        const COMMAND: &str = "query-cpus-fast";
        let answer = self.execute(COMMAND, json!({}))?;
        let mut cpus: Vec<Cpu> =
            serde_json::from_value(answer).map_err(|e| Error::Answer(COMMAND, e.to_string()))?;
        cpus.sort_by_key(|cpu| cpu.index);
        Ok(cpus.into_iter().map(|cpu| cpu.thread).collect())
    }

    /// Why the machine shut down, as far as QEMU has said by the time it closes the connection.
    pub fn shutdown_reason(&mut self) -> Option<String> {
        while let Some(event) = self.events.pop_front().or_else(|| self.message("SHUTDOWN").ok()) {
            if event["event"] == "SHUTDOWN" {
                return Some(event["data"]["reason"].as_str()?.into());
            }
        }
        None
    }

    fn message(&mut self, what: &'static str) -> Result<Value, Error> {
        let line = self.line()?;
        serde_json::from_str(&line).map_err(|e| Error::Answer(what, e.to_string()))
    }

    fn line(&mut self) -> Result<String, Error> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => Err(Error::Socket(self.path.clone(), io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => Ok(line),
            Err(e) => Err(Error::Socket(self.path.clone(), e)),
        }
    }
}
