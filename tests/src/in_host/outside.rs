//! Real CPU time of each pCPU: in the emulated host that of the emulator thread that *is* the pCPU, which only the
//! lab outside can see; natively the time the pCPU was not idle.

use std::fs::File;
use std::io::BufReader;

use anyhow::{Context, bail};

use super::agent::port_path;
use crate::channel::{Answer, OUTSIDE_PORT, Question, receive, send};
use crate::procfs;

/// Where CPU times come from.
pub enum Outside {
    /// From the lab that runs this emulated host.
    Emulator {
        /// The port, for questions.
        port: File,
        /// The same, for answers.
        answers: BufReader<File>,
    },
    /// From this machine's own kernel.
    Native,
}

impl Outside {
    /// The way to the lab outside this emulated host.
    pub fn of_emulated_host() -> anyhow::Result<Self> {
        let path = port_path(OUTSIDE_PORT)?;
        let port = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("opening {} (is another scenario running?)", path.display()))?;
        let answers = BufReader::new(port.try_clone()?);
        Ok(Self::Emulator { port, answers })
    }

    /// Nanoseconds of CPU time each pCPU has had so far; only differences mean something.
    pub fn cpu_times(&mut self) -> anyhow::Result<Vec<u64>> {
        match self {
            Outside::Emulator { port, answers } => {
                send(port, &Question::CpuTimes).context("asking the lab outside")?;
                match receive(answers).context("waiting for the lab outside")? {
                    Some(Answer::CpuTimes(times)) => Ok(times),
                    Some(Answer::Failed(why)) => bail!("the lab outside cannot read CPU times: {why}"),
                    None => bail!("the lab outside is gone"),
                }
            }
            Outside::Native => {
                let busy =
                    |time: &procfs::CpuTime| time.user + time.system + time.irq + time.softirq + time.steal;
                Ok(procfs::cpu_times()?.iter().map(|time| (busy(time) * 1e9) as u64).collect())
            }
        }
    }
}
