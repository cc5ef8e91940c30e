//! DPDK's testpmd, driven by its command line: a frontend (virtio-user) or a backend (vhost) by others that needs no
//! virtual machine.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::pty::openpty;
use nix::sys::signal::Signal;
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

use super::Host;
use crate::pcpu;
use crate::process::Process;

const PROMPT: &str = "testpmd> ";
const ANSWER: Duration = Duration::from_secs(30);

/// How testpmd is started.
#[derive(Clone, Debug)]
pub struct TestpmdConfig {
    /// Words in front of the command, which make it run in a network namespace.
    pub enter: Vec<String>,
    /// Its devices, as `--vdev` says them; ports in this order.
    pub devices: Vec<String>,
    /// Receive and transmit queues of each port.
    pub queues: u16,
    /// What it does with frames: `io`, `txonly`, `rxonly`.
    pub forward: &'static str,
    /// Bytes of the frames it sends in `txonly`.
    pub frame: usize,
}

/// What a port has moved since testpmd started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortCounts {
    /// Frames received.
    pub received: u64,
    /// Their bytes.
    pub bytes_received: u64,
    /// Frames sent.
    pub sent: u64,
    /// Their bytes.
    pub bytes_sent: u64,
}

/// A running testpmd; ended when dropped.
pub struct Testpmd {
    process: Process,
    terminal: File,
    output: Receiver<Vec<u8>>,
}

impl Testpmd {
    /// Starts it and waits until it takes commands.
    pub fn start(host: &Host, config: &TestpmdConfig) -> anyhow::Result<Self> {
        let mut testpmd = Self::spawn(host, config)?;
        testpmd.wait_until_ready()?;
        Ok(testpmd)
    }

    /// Starts it; a virtio-user in server mode waits for its backend next. What it says is kept in `testpmd.log`.
    ///
    /// Its memory is an ordinary shared file (`--no-huge` makes it of a memfd, which virtio-user needs): no huge page has to
    /// be set aside.
    pub fn spawn(host: &Host, config: &TestpmdConfig) -> anyhow::Result<Self> {
        let mut words = config.enter.clone();
        words.push(host.launcher("dpdk-testpmd").display().to_string());
        // Its command line, and the loop that moves frames.
        let [commands, forwards] = if host.is_emulated() { [pcpu::wire(), pcpu::BACKEND] } else { [0, 1] };
        words.extend(["--lcores".into(), format!("0@{commands},1@{forwards}")]);
        words.extend("--no-huge -m 64 --no-pci --no-shconf --no-telemetry".split(' ').map(String::from));
        words.extend(config.devices.iter().flat_map(|device| ["--vdev".into(), device.clone()]));
        let TestpmdConfig { queues, forward, frame, .. } = config;
        let rest = format!(
            "-- -i --no-lsc-interrupt --total-num-mbufs=8192 --rxq={queues} --txq={queues} \
             --forward-mode={forward} --txpkts={frame}"
        );
        words.extend(rest.split(' ').map(String::from));

        // What it prints through a pipe comes in blocks, and late.
        let pty = openpty(None, None).context("opening a terminal")?;
        raw(&pty.slave)?;
        let (input, output, errors) = (pty.slave.try_clone()?, pty.slave.try_clone()?, pty.slave);
        let process = Process::spawn("testpmd", &words[0], |command| {
            command.args(&words[1..]).stdin(input).stdout(output).stderr(errors);
        })?;
        let terminal = File::from(pty.master);
        let (reader, mut log) = (terminal.try_clone()?, host.log("testpmd.log")?);
        let (sender, output) = channel();
        thread::spawn(move || {
            let mut reader = reader;
            let mut buffer = [0; 4096];
            // A terminal whose last user is gone answers with an error.
            while let Ok(length @ 1..) = reader.read(&mut buffer) {
                let _ = log.write_all(&buffer[..length]);
                if sender.send(buffer[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { process, terminal, output })
    }

    /// Waits for its first prompt.
    pub fn wait_until_ready(&mut self) -> anyhow::Result<()> {
        self.until_prompt().context("starting testpmd, see testpmd.log").map(drop)
    }

    /// Carries a command out; what it printed.
    pub fn command(&mut self, command: &str) -> anyhow::Result<String> {
        let line = format!("{command}\n");
        self.terminal.write_all(line.as_bytes()).with_context(|| format!("telling testpmd to {command}"))?;
        let said = self.until_prompt().with_context(|| format!("testpmd: {command}"))?;
        ensure!(
            !said.contains("Command not found") && !said.contains("Bad arguments"),
            "testpmd does not know `{command}`: {said}"
        );
        Ok(said)
    }

    /// What port number `port` has moved so far.
    pub fn counts(&mut self, port: u16) -> anyhow::Result<PortCounts> {
        let said = self.command(&format!("show port stats {port}"))?;
        parse_counts(&said).with_context(|| format!("testpmd's counts of port {port} are {said:?}"))
    }

    /// Whether port number `port` has a link. (Asking is also when virtio-user looks for a backend that has come back.)
    pub fn has_link(&mut self, port: u16) -> anyhow::Result<bool> {
        let said = self.command(&format!("show port info {port}"))?;
        Ok(said.contains("Link status: up"))
    }

    /// Kills it as a crash would.
    pub fn kill(mut self) -> anyhow::Result<()> {
        self.process.signal(Signal::SIGKILL);
        self.process.wait_for(ANSWER)?;
        Ok(())
    }

    /// Has it close its ports and end.
    pub fn quit(mut self) -> anyhow::Result<()> {
        self.terminal.write_all(b"quit\n").context("telling testpmd to quit")?;
        let status = self.process.wait_for(ANSWER)?;
        ensure!(status.success(), "testpmd ended with {status}, see testpmd.log");
        Ok(())
    }

    fn until_prompt(&mut self) -> anyhow::Result<String> {
        let start = Instant::now();
        let mut said = Vec::new();
        loop {
            match self.output.recv_timeout(ANSWER.saturating_sub(start.elapsed())) {
                Ok(bytes) => said.extend(bytes),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no prompt within {ANSWER:?} after {:?}", String::from_utf8_lossy(&said))
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("it ended: {}", String::from_utf8_lossy(&said))
                }
            }
            // The echo of the command comes first, on the line of the last prompt.
            if said.ends_with(PROMPT.as_bytes()) {
                return Ok(String::from_utf8_lossy(&said).into_owned());
            }
        }
    }
}

/// Bytes as they are: no echo but testpmd's own, no signal characters.
fn raw(terminal: &impl AsFd) -> anyhow::Result<()> {
    let mut settings = tcgetattr(terminal)?;
    cfmakeraw(&mut settings);
    Ok(tcsetattr(terminal, SetArg::TCSANOW, &settings)?)
}

fn parse_counts(said: &str) -> Option<PortCounts> {
    let value = |name: &str| {
        let (_, rest) = said.split_once(name)?;
        rest.split_whitespace().next()?.parse().ok()
    };
    Some(PortCounts {
        received: value("RX-packets:")?,
        bytes_received: value("RX-bytes:")?,
        sent: value("TX-packets:")?,
        bytes_sent: value("TX-bytes:")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_as_testpmd_prints_them() {
        let said = "show port stats 0\r\n\r\n  ######################## NIC statistics for port 0  ####\r\n  \
                    RX-packets: 12         RX-missed: 0          RX-bytes:  768\r\n  RX-errors: 0\r\n  RX-nombuf:  0         \r\n  \
                    TX-packets: 7          TX-errors: 0          TX-bytes:  448\r\ntestpmd> ";
        let expected = PortCounts { received: 12, bytes_received: 768, sent: 7, bytes_sent: 448 };
        assert_eq!(parse_counts(said), Some(expected));
        assert_eq!(parse_counts("Invalid port 7"), None);
    }
}
