//! The guest agent: serves the host's requests over the guest's serial line, and says nothing unasked.

pub mod protocol;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

use crate::bystander::Bystander;
use crate::image::SERVICE;
use crate::link::{Link, PREFIX};
use crate::procfs;
use crate::traffic::{End, PORT};
use protocol::{Answer, MARK, Request};

/// Longest text a command's answer carries: every byte of it costs the serial line exits.
const LONGEST_TEXT: usize = 16 * 1024;

#[derive(Default)]
struct Guest {
    bystander: Option<Bystander>,
    traffic: BTreeMap<Link, End>,
}

/// Serves until asked to power off, or until the serial line ends.
pub fn serve() -> anyhow::Result<()> {
    let mut line_settings = tcgetattr(io::stdin()).context("the guest agent needs the serial line")?;
    cfmakeraw(&mut line_settings);
    tcsetattr(io::stdin(), SetArg::TCSANOW, &line_settings)?;
    let kernel = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
    answer(&Answer::Hello { kernel, cpus: procfs::cpu_times()?.len() })?;
    let mut guest = Guest::default();
    for line in io::stdin().lock().lines() {
        let line = line?;
        if line.trim().is_empty() {
            continue;
        }
        let request = serde_json::from_str(&line).with_context(|| format!("reading the request {line:?}"));
        if matches!(request, Ok(Request::PowerOff)) {
            return answer(&Answer::Done);
        }
        let outcome = request.and_then(|request| guest.handle(request));
        answer(&outcome.unwrap_or_else(|e| Answer::Failed(format!("{e:#}"))))?;
    }
    Ok(())
}

fn answer(answer: &Answer) -> anyhow::Result<()> {
    let text = serde_json::to_string(answer)?;
    let mut output = io::stdout().lock();
    // The mark begins a line, whatever the console said before.
    write!(output, "\n{MARK}{text}\n").and_then(|()| output.flush()).context("answering")
}

impl Guest {
    fn handle(&mut self, request: Request) -> anyhow::Result<Answer> {
        Ok(match request {
            Request::Network { link, queue_pairs } => {
                bring_up(link, queue_pairs)?;
                Answer::Done
            }
            Request::Service => {
                start_service()?;
                Answer::Done
            }
            Request::Bystander { cpus, yielding } => {
                self.bystander = None;
                self.bystander = Some(Bystander::start(&cpus, yielding).context("starting the bystander")?);
                Answer::Done
            }
            Request::Iterations => {
                Answer::Iterations(self.bystander.as_ref().context("no bystander runs")?.iterations())
            }
            Request::StopBystander => {
                self.bystander = None;
                Answer::Done
            }
            Request::Traffic(traffic) => {
                self.traffic.remove(&traffic.link);
                let wire = SocketAddr::from((traffic.link.wire(), PORT));
                let end = End::connect(traffic, wire).context("connecting to the wire")?;
                self.traffic.insert(traffic.link, end);
                Answer::Done
            }
            Request::Counts(link) => Answer::Counts(self.running_traffic(link)?.counts()),
            Request::ResetLatency(link) => {
                self.running_traffic(link)?.reset_latency();
                Answer::Done
            }
            Request::StopTraffic(link) => {
                Answer::Counts(self.traffic.remove(&link).context("no traffic runs")?.stop())
            }
            Request::Interrupts => Answer::Interrupts(procfs::nic_interrupts()?),
            Request::CpuTimes => Answer::CpuTimes(procfs::cpu_times()?),
            Request::Run(command) => run_command(&command)?,
            Request::PowerOff => Answer::Done,
        })
    }

    fn running_traffic(&self, link: Link) -> anyhow::Result<&End> {
        self.traffic.get(&link).context("no traffic runs")
    }
}

fn bring_up(link: Link, queue_pairs: u16) -> anyhow::Result<()> {
    let (interface, queues) = (link.interface(), queue_pairs.to_string());
    let address = format!("{}/{PREFIX}", link.guest());
    // The driver takes as many queue pairs as there are CPUs; only a difference needs saying.
    if combined_queues(interface)? != queue_pairs {
        run_quietly("ethtool", &["-L", interface, "combined", &queues])?;
    }
    run_quietly("ip", &["link", "set", interface, "up"])?;
    run_quietly("ip", &["address", "replace", &address, "dev", interface])
}

fn combined_queues(interface: &str) -> anyhow::Result<u16> {
    let entries = fs::read_dir(format!("/sys/class/net/{interface}/queues"));
    let entries = entries.with_context(|| format!("the guest has no {interface}"))?;
    let receivers = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("rx-"));
    Ok(u16::try_from(receivers.count())?)
}

fn start_service() -> anyhow::Result<()> {
    if !Path::new(SERVICE).exists() {
        bail!("the guest's image has no {SERVICE}");
    }
    let log = File::create("/tmp/ivcpu-irq.log")?;
    let mut service = Command::new(SERVICE)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting {SERVICE}"))?;
    std::thread::spawn(move || service.wait());
    Ok(())
}

fn run_quietly(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {program}"))?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {}: {}", arguments.join(" "), why.trim());
    }
    Ok(())
}

fn run_command(command: &str) -> anyhow::Result<Answer> {
    let script = format!("exec 2>&1\n{command}");
    let output =
        Command::new("sh").args(["-c", &script]).stdin(Stdio::null()).output().context("running sh")?;
    let bytes = &output.stdout[..output.stdout.len().min(LONGEST_TEXT)];
    Ok(Answer::Output {
        status: output.status.code().unwrap_or(-1),
        text: String::from_utf8_lossy(bytes).into_owned(),
    })
}
