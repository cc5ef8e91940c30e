//! A guest whose serial line is a terminal: its VMM's process, and what a person would type.

use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{ChildStdin, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::Host;
use super::vm::end_of;
use crate::process::Process;

/// A command's status follows this and is followed by the other; neither is in what is typed.
const BEFORE_STATUS: &str = "\nlab-status-";
const AFTER_STATUS: &str = "-end\r\n";
/// What a guest may write without being understood; enough for a boot's messages.
const MOST: usize = 1 << 20;

/// A guest with a shell on its serial line; ended when dropped. What it writes is kept in `guest.log`.
pub struct Login {
    process: Process,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    /// Written and not yet waited for.
    pending: Vec<u8>,
    log: PathBuf,
}

impl Login {
    /// Starts a VMM whose standard input and output are the serial line.
    pub fn start(host: &Host, words: &[String]) -> anyhow::Result<Self> {
        let mut log = host.log("guest.log")?;
        let errors = log.try_clone()?;
        let (program, arguments) = words.split_first().context("an empty command")?;
        let mut process = Process::spawn("the VMM", program, |command| {
            command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
        })?;
        let input = process.child().stdin.take().context("the VMM's standard input")?;
        let mut serial = process.child().stdout.take().context("the VMM's standard output")?;
        let (sender, output) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = serial.read(&mut buffer) {
                keep(&mut log, &buffer[..length]);
                if sender.send(buffer[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { process, input, output, pending: Vec::new(), log: host.log_path("guest.log") })
    }

    /// Waits until the guest has written `text`; what it wrote before that.
    pub fn wait_for(&mut self, text: &str, deadline: Duration) -> anyhow::Result<String> {
        let begin = Instant::now();
        loop {
            if let Some(at) = find(&self.pending, text.as_bytes()) {
                let before = String::from_utf8_lossy(&self.pending[..at]).into_owned();
                self.pending.drain(..at + text.len());
                return Ok(before);
            }
            ensure!(self.pending.len() < MOST, "the guest writes and writes, but not {text:?}");
            match self.output.recv_timeout(deadline.saturating_sub(begin.elapsed())) {
                Ok(bytes) => self.pending.extend(bytes),
                Err(RecvTimeoutError::Timeout) => bail!(
                    "the guest has not written {text:?} within {deadline:?}; it wrote {:?}",
                    last_of(&self.pending)
                ),
                Err(RecvTimeoutError::Disconnected) => bail!(
                    "the VMM closed the serial line before {text:?}: {:?}; the guest wrote {:?}",
                    self.process.wait_for(Duration::from_secs(5)),
                    last_of(&self.pending)
                ),
            }
        }
    }

    /// Logs in as root, which has no password, and leaves a shell that does not repeat what it is told.
    pub fn log_in(&mut self, deadline: Duration) -> anyhow::Result<()> {
        self.wait_for("login: ", deadline)?;
        self.type_line("root")?;
        self.wait_for("# ", deadline)?;
        // Not bash, which edits lines. Before the next line the terminal has to be as that wants it.
        self.type_line("exec env TERM=dumb PS1=lab-'ready ' sh")?;
        self.wait_for("lab-ready ", deadline)?;
        self.type_line("PS1=; stty -echo; dmesg -n 1")?;
        self.run("true", deadline).map(drop)
    }

    /// Runs a shell command; what it wrote. One that fails is an error.
    pub fn run(&mut self, command: &str, deadline: Duration) -> anyhow::Result<String> {
        let (status, text) = self.status_of(command, deadline)?;
        ensure!(status == 0, "`{command}` in the guest: status {status}, {text}");
        Ok(text)
    }

    fn status_of(&mut self, command: &str, deadline: Duration) -> anyhow::Result<(i32, String)> {
        self.type_line(&format!("{command}; printf '\\nlab-status-%d-%s\\n' $? end"))?;
        let text = self.wait_for(AFTER_STATUS, deadline).with_context(|| format!("running `{command}`"))?;
        let (output, status) = text.rsplit_once(BEFORE_STATUS).context("a command without a status")?;
        Ok((status.parse().with_context(|| format!("the status {status:?}"))?, output.trim().into()))
    }

    /// Types a line.
    pub fn type_line(&mut self, line: &str) -> anyhow::Result<()> {
        let written = self.input.write_all(format!("{line}\n").as_bytes());
        written.and_then(|()| self.input.flush()).context("writing to the serial line")
    }

    /// Powers the guest off as its administrator would, and gives the VMM's exit status.
    pub fn power_off(mut self, deadline: Duration) -> anyhow::Result<ExitStatus> {
        self.type_line("systemctl poweroff")?;
        end_of(&mut self.process, deadline, &self.log)
    }
}

/// The log is for people; a full disk is no reason to stop the guest.
fn keep(log: &mut File, bytes: &[u8]) {
    let _ = log.write_all(bytes);
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|window| window == wanted)
}

/// As much as fits into a message.
fn last_of(text: &[u8]) -> String {
    const LENGTH: usize = 500;
    String::from_utf8_lossy(&text[text.len().saturating_sub(LENGTH)..]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_among_bytes() {
        assert_eq!(find(b"one\xfftwo", b"two"), Some(4));
        assert_eq!(find(b"tw", b"two"), None);
        assert_eq!(last_of(&[b'x'; 600]).len(), 500);
    }
}
