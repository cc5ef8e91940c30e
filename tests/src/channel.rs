//! What the lab and the agent inside the emulated host say to each other: one JSON object a line.

use std::io::{self, BufRead, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Name of the virtio-serial port between the lab and the agent.
pub const AGENT_PORT: &str = "ivcpu.agent";
/// Name of the virtio-serial port on which a scenario asks the lab for what only the outside knows.
pub const OUTSIDE_PORT: &str = "ivcpu.outside";

/// The lab to the agent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Run a command; one at a time.
    Run(Run),
    /// More of the command's standard input.
    Input(Bytes),
    /// The command's standard input has ended.
    InputEnd,
    /// End the command and everything it started.
    Kill,
    /// Leave, which powers the emulated host off.
    PowerOff,
}

/// A command for the emulated host.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Run {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Working directory.
    pub directory: String,
    /// More environment variables.
    pub environment: Vec<(String, String)>,
    /// Run it on a terminal of this many rows and columns.
    pub terminal: Option<(u16, u16)>,
}

/// The agent to the lab.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Report {
    /// The emulated host is up.
    Ready {
        /// `uname -r` in it.
        kernel: String,
        /// Its number of pCPUs.
        cpus: usize,
        /// Seconds since its kernel started.
        uptime: f64,
    },
    /// Sent every second: the emulated host is not stuck.
    Alive,
    /// The command wrote something.
    Output {
        /// To standard error, not to standard output.
        error: bool,
        /// What it wrote.
        bytes: Bytes,
    },
    /// The command has ended with this status (128 + signal if killed).
    Exit(i32),
    /// The command could not be started.
    NotStarted(String),
}

/// A scenario to the lab outside.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// How much CPU time has each pCPU's emulator thread had?
    CpuTimes,
}

/// The lab's answer to a scenario.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Nanoseconds per pCPU.
    CpuTimes(Vec<u64>),
    /// The question could not be answered.
    Failed(String),
}

/// Arbitrary bytes, kept readable in JSON: each byte is one character of the same number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct Bytes(pub Vec<u8>);

impl From<Bytes> for String {
    fn from(bytes: Bytes) -> Self {
        bytes.0.into_iter().map(char::from).collect()
    }
}

impl From<String> for Bytes {
    fn from(text: String) -> Self {
        Self(text.chars().map(|character| u8::try_from(u32::from(character)).unwrap_or(b'?')).collect())
    }
}

/// Writes one message.
pub fn send<T: Serialize>(writer: &mut impl Write, message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    writer.write_all(&line)?;
    writer.flush()
}

/// Reads one message; `None` at the end of the stream.
pub fn receive<T: DeserializeOwned>(reader: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    serde_json::from_str(&line).map(Some).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives() {
        let all = Bytes((0..=255).collect());
        let mut line = Vec::new();
        send(&mut line, &Request::Input(all.clone())).expect("sent");
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        match receive(&mut line.as_slice()).expect("received") {
            Some(Request::Input(bytes)) => assert_eq!(bytes, all),
            other => panic!("{other:?}"),
        }
    }
}
