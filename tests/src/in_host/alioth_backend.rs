//! `alioth vu net`: a vhost-user backend by others, on the wire's TAP.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::Signal;

use super::{Host, TAP, Wire};
use crate::pcpu;
use crate::process::Process;

/// Longest until it listens, or has ended.
const DEADLINE: Duration = Duration::from_secs(15);

/// A running one; ended when dropped.
pub struct AliothBackend(Process);

impl AliothBackend {
    /// Starts it on the wire's TAP, and waits until it listens at `socket`, where nothing may be yet. What it says is kept
    /// in `alioth-backend.log`.
    pub fn start(host: &Host, socket: &Path) -> anyhow::Result<Self> {
        let mut words = Vec::from(Wire::enter_words());
        words.push(host.alioth()?.display().to_string());
        words.extend(["vu".into(), "--socket".into(), socket.display().to_string()]);
        // It must be told both; the guest sees neither, because its VMM has the configuration space.
        let device = format!("mac=52:54:00:49:56:01,mtu=1500,if={TAP}");
        words.extend(["net".into(), "--param".into(), device]);
        let (log, errors) = (host.log("alioth-backend.log")?, host.log("alioth-backend.log")?);
        let mut process = Process::spawn("Alioth's backend", &words[0], |command| {
            command.args(&words[1..]).stdin(Stdio::null()).stdout(log).stderr(errors);
        })?;
        // Before it makes the threads that serve frontends.
        pcpu::pin(process.id().try_into()?, &[pcpu::BACKEND]).context("pinning Alioth's backend")?;
        process.wait_for_socket(socket, DEADLINE).context("see alioth-backend.log")?;
        Ok(Self(process))
    }

    /// Kills it as a crash would.
    pub fn kill(mut self) -> anyhow::Result<()> {
        self.0.signal(Signal::SIGKILL);
        self.0.wait_for(DEADLINE)?;
        Ok(())
    }
}
