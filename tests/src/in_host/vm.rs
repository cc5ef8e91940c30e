//! A running guest: its VMM's process, its serial line, and the guest agent at the other end of that.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::pty::openpty;
use nix::sys::signal::Signal;
use serde_json::json;

use super::{Host, Net, VmConfig, Vmm, Wire};
use crate::emulated_host::last_lines;
use crate::guest::protocol::{Answer, MARK, Request};
use crate::link::Link;
use crate::pcpu;
use crate::process::Process;
use crate::procfs::{CpuTime, Interrupt};
use crate::qmp::Qmp;
use crate::traffic::{Counts, Traffic};

/// A guest boots in a few seconds; the emulation may be slow.
const BOOT: Duration = Duration::from_secs(180);
const ANSWER: Duration = Duration::from_secs(30);
/// Starts of a stock QEMU guest before giving up.
const STARTS: u32 = 3;

/// A running guest; ended when dropped.
pub struct Vm {
    process: Process,
    /// `guest.log`: the guest's console, and what the VMM has to say.
    log: PathBuf,
    input: File,
    answers: Receiver<Answer>,
    vcpu_threads: Vec<i32>,
    qemu: Option<Qmp>,
    boot_time: Duration,
}

impl Vm {
    /// Starts the VMM, pins its threads, and waits until the guest agent says hello. The guest's console is kept
    /// in `guest.log`.
    ///
    /// In the emulated host a guest of stock QEMU resets, once in some fifteen starts, before its kernel has said a
    /// word. It is started anew then, three times at most, and each time is reported. A guest of our own
    /// VMM gets one start: whatever happens to it is our business.
    pub fn boot(host: &Host, config: &VmConfig) -> anyhow::Result<Self> {
        let starts = if config.vmm.is_qemu() { STARTS } else { 1 };
        for start in 1..starts {
            match Self::start(host, config) {
                Ok(vm) => return Ok(vm),
                Err(e) => eprintln!("lab: start {start} of {starts} of the guest failed: {e:#}"),
            }
        }
        Self::start(host, config)
    }

    fn start(host: &Host, config: &VmConfig) -> anyhow::Result<Self> {
        let begin = Instant::now();
        let qmp = host.scratch().join("qmp.sock");
        let _ = fs::remove_file(&qmp);
        let words = match config.vmm {
            Vmm::IvcpuVmm => config.ivcpu_vmm_words(&host.binary("ivcpu-vmm")),
            Vmm::Qemu | Vmm::QemuTcg => {
                let mut words = Vec::new();
                if matches!(config.net, Net::VhostNet) {
                    words.extend(Wire::enter_words());
                }
                words.extend(config.qemu_words(&host.launcher("qemu-system-x86_64"), &qmp));
                words
            }
            Vmm::Alioth => config.alioth_words(&host.alioth()?)?,
        };
        let stdin = if config.vmm == Vmm::Alioth { StandardInput::Terminal } else { StandardInput::Pipe };
        let mut vm = Self::spawn(host, &words, stdin)?;
        if config.vmm == Vmm::Alioth {
            // It cannot be started stopped: its first exits are wherever they are.
            vm.vcpu_threads = vcpu_threads_named(vm.id(), "vcpu_", config.vcpus())?;
            vm.pin_vcpus(config)?;
        }
        if config.vmm.is_qemu() {
            let mut connection = Qmp::connect(&qmp).context("see guest.log")?;
            vm.vcpu_threads = connection.vcpu_threads()?;
            if config.vmm == Vmm::Qemu {
                vm.pin_vcpus(config)?;
            }
            if matches!(config.net, Net::VhostNet) {
                pin_vhost_workers(vm.id())?;
            }
            connection.start_machine()?;
            vm.qemu = Some(connection);
        }
        vm.wait_for_hello(config.vcpus())?;
        if config.vmm == Vmm::IvcpuVmm {
            vm.vcpu_threads = own_vcpu_threads(vm.id())?;
        }
        vm.boot_time = begin.elapsed();
        Ok(vm)
    }

    /// A VMM started by a command of any kind, with the guest's serial line on its standard input and output. Of
    /// its vCPU threads nothing is known.
    pub fn boot_by(host: &Host, words: &[String], vcpus: usize) -> anyhow::Result<Self> {
        let begin = Instant::now();
        let mut vm = Self::spawn(host, words, StandardInput::Pipe)?;
        vm.wait_for_hello(vcpus)?;
        vm.boot_time = begin.elapsed();
        Ok(vm)
    }

    fn spawn(host: &Host, words: &[String], stdin: StandardInput) -> anyhow::Result<Self> {
        let log = host.log("guest.log")?;
        let errors = log.try_clone()?;
        let (program, arguments) = words.split_first().context("an empty command")?;
        let (theirs, ours) = stdin.open().context("opening the VMM's standard input")?;
        let mut process = Process::spawn("the VMM", program, |command| {
            command.args(arguments).stdin(theirs).stdout(Stdio::piped()).stderr(errors);
        })?;
        let output = process.child().stdout.take().context("the VMM's standard output")?;
        let (sender, answers) = channel();
        thread::spawn(move || watch_serial(BufReader::new(output), log, &sender));
        let input = File::from(ours);
        let log = host.log_path("guest.log");
        Ok(Self { process, log, input, answers, vcpu_threads: vec![], qemu: None, boot_time: Duration::ZERO })
    }

    fn pin_vcpus(&self, config: &VmConfig) -> anyhow::Result<()> {
        for (vcpu, thread) in self.vcpu_threads.iter().enumerate() {
            pcpu::pin(*thread, &config.pcpus(vcpu)).context("pinning a vCPU")?;
        }
        Ok(())
    }

    fn wait_for_hello(&mut self, vcpus: usize) -> anyhow::Result<()> {
        match self.answer(BOOT).context("the guest did not come up, see guest.log")? {
            Answer::Hello { cpus, .. } if cpus == vcpus => Ok(()),
            Answer::Hello { cpus, .. } => bail!("the guest has {cpus} CPUs, not {vcpus}"),
            other => bail!("the guest said {other:?} instead of hello"),
        }
    }

    /// QEMU's machine protocol.
    pub fn qemu(&mut self) -> anyhow::Result<&mut Qmp> {
        self.qemu.as_mut().context("this guest is not QEMU's")
    }

    /// Has QEMU reset the machine, as its button does, and waits until the guest is up again.
    pub fn reset(&mut self) -> anyhow::Result<()> {
        let vcpus = self.vcpu_threads.len();
        let qemu = self.qemu()?;
        // It was started to end at a reset, which is how a guest that panics is noticed.
        qemu.execute("set-action", json!({ "reboot": "reset" }))?;
        qemu.execute("system_reset", json!({}))?;
        self.wait_for_hello(vcpus)
    }

    /// The VMM's process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// The vCPUs' thread ids; the IVCPU's is the last.
    pub fn vcpu_threads(&self) -> &[i32] {
        &self.vcpu_threads
    }

    /// From the VMM's start to the agent's hello.
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// Asks the guest agent; what failed in the guest is an error here.
    pub fn request(&mut self, request: &Request) -> anyhow::Result<Answer> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        if let Err(error) = self.input.write_all(&line).and_then(|()| self.input.flush()) {
            // How the VMM ended says more.
            self.answer(ANSWER).with_context(|| format!("asking the guest for {request:?}"))?;
            return Err(error).context("writing to the serial line");
        }
        match self.answer(ANSWER).with_context(|| format!("asking the guest for {request:?}"))? {
            Answer::Failed(why) => bail!("in the guest: {why}"),
            answer => Ok(answer),
        }
    }

    /// Brings the guest's first NIC up.
    pub fn bring_up_network(&mut self, queue_pairs: u16) -> anyhow::Result<()> {
        self.bring_up(Link::First, queue_pairs)
    }

    /// Brings a NIC of the guest up.
    pub fn bring_up(&mut self, link: Link, queue_pairs: u16) -> anyhow::Result<()> {
        self.request(&Request::Network { link, queue_pairs }).map(drop)
    }

    /// Starts the shipped interrupt service in the guest.
    pub fn start_service(&mut self) -> anyhow::Result<()> {
        self.request(&Request::Service).map(drop)
    }

    /// Connects to the wire, whose end must be listening, and starts traffic.
    pub fn start_traffic(&mut self, traffic: Traffic) -> anyhow::Result<()> {
        self.request(&Request::Traffic(traffic)).map(drop)
    }

    /// The guest's end of the traffic so far, on the first NIC.
    pub fn traffic_counts(&mut self) -> anyhow::Result<Counts> {
        self.traffic_counts_on(Link::First)
    }

    /// The guest's end of a NIC's traffic so far.
    pub fn traffic_counts_on(&mut self, link: Link) -> anyhow::Result<Counts> {
        self.counts(&Request::Counts(link))
    }

    /// Forgets the first NIC's round-trip times so far.
    pub fn reset_latency(&mut self) -> anyhow::Result<()> {
        self.request(&Request::ResetLatency(Link::First)).map(drop)
    }

    /// Stops the first NIC's traffic and gives its last counts.
    pub fn stop_traffic(&mut self) -> anyhow::Result<Counts> {
        self.stop_traffic_on(Link::First)
    }

    /// Stops a NIC's traffic and gives its last counts.
    pub fn stop_traffic_on(&mut self, link: Link) -> anyhow::Result<Counts> {
        self.counts(&Request::StopTraffic(link))
    }

    fn counts(&mut self, request: &Request) -> anyhow::Result<Counts> {
        match self.request(request)? {
            Answer::Counts(counts) => Ok(counts),
            other => bail!("the guest answered {other:?} to {request:?}"),
        }
    }

    /// Starts a bystander on the guest's CPUs `cpus`.
    pub fn start_bystander(&mut self, cpus: &[usize], yielding: bool) -> anyhow::Result<()> {
        self.request(&Request::Bystander { cpus: cpus.to_vec(), yielding }).map(drop)
    }

    /// The bystander's iterations so far.
    pub fn iterations(&mut self) -> anyhow::Result<Vec<u64>> {
        match self.request(&Request::Iterations)? {
            Answer::Iterations(iterations) => Ok(iterations),
            other => bail!("the guest answered {other:?} instead of iterations"),
        }
    }

    /// Stops the bystander.
    pub fn stop_bystander(&mut self) -> anyhow::Result<()> {
        self.request(&Request::StopBystander).map(drop)
    }

    /// Interrupts of the guest's virtio devices so far.
    pub fn interrupts(&mut self) -> anyhow::Result<Vec<Interrupt>> {
        match self.request(&Request::Interrupts)? {
            Answer::Interrupts(interrupts) => Ok(interrupts),
            other => bail!("the guest answered {other:?} instead of interrupts"),
        }
    }

    /// Times of the guest's CPUs so far.
    pub fn cpu_times(&mut self) -> anyhow::Result<Vec<CpuTime>> {
        match self.request(&Request::CpuTimes)? {
            Answer::CpuTimes(times) => Ok(times),
            other => bail!("the guest answered {other:?} instead of CPU times"),
        }
    }

    /// Runs a shell command in the guest; its exit status and what it wrote.
    pub fn run(&mut self, command: &str) -> anyhow::Result<(i32, String)> {
        match self.request(&Request::Run(command.into()))? {
            Answer::Output { status, text } => Ok((status, text)),
            other => bail!("the guest answered {other:?} instead of output"),
        }
    }

    /// Powers the guest off and gives the VMM's exit status.
    pub fn power_off(mut self) -> anyhow::Result<ExitStatus> {
        self.request(&Request::PowerOff)?;
        end_of(&mut self.process, ANSWER, &self.log)
    }

    /// Sends the VMM a signal that ends it, and gives its exit status.
    pub fn end_by(mut self, signal: Signal) -> anyhow::Result<ExitStatus> {
        self.process.signal(signal);
        self.process.wait_for(ANSWER).context("the VMM did not end after the signal")
    }

    /// Kills the VMM as a crash would.
    pub fn kill(mut self) -> anyhow::Result<()> {
        self.process.signal(Signal::SIGKILL);
        self.process.wait_for(ANSWER)?;
        Ok(())
    }

    fn answer(&mut self, deadline: Duration) -> anyhow::Result<Answer> {
        match self.answers.recv_timeout(deadline) {
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Timeout) => bail!("no answer within {deadline:?}"),
            Err(RecvTimeoutError::Disconnected) => match self.process.wait_for(Duration::from_secs(5)) {
                Ok(status) => {
                    let reason = self.qemu.as_mut().and_then(Qmp::shutdown_reason);
                    let reason = reason.as_deref().unwrap_or("no reason given");
                    bail!("the VMM ended: {status}, {reason}; guest.log ends: {}", last_lines(&self.log))
                }
                Err(_) => bail!("the VMM closed the guest's serial line"),
            },
        }
    }
}

/// What a VMM wants its standard input to be.
enum StandardInput {
    Pipe,
    Terminal,
}

impl StandardInput {
    /// The VMM's end and ours.
    fn open(&self) -> io::Result<(OwnedFd, OwnedFd)> {
        match self {
            Self::Pipe => io::pipe().map(|(theirs, ours)| (theirs.into(), ours.into())),
            Self::Terminal => {
                let pty = openpty(None, None)?;
                Ok((pty.slave, pty.master))
            }
        }
    }
}

/// Keeps the guest's console and picks the agent's answers out of it.
fn watch_serial(mut serial: impl BufRead, mut log: File, answers: &Sender<Answer>) {
    /// A guest that never ends its line must not fill the memory.
    const LONGEST_LINE: u64 = 1 << 20;
    let mut line = Vec::new();
    while matches!(serial.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line), Ok(length) if length > 0)
    {
        // The log is for people; a full disk is no reason to stop the guest.
        let _ = log.write_all(&line);
        let text = String::from_utf8_lossy(&line);
        if let Some((_, json)) = text.split_once(MARK)
            && let Ok(answer) = serde_json::from_str(json.trim())
            && answers.send(answer).is_err()
        {
            return;
        }
        line.clear();
    }
}

/// The threads of `count` vCPUs that carry `prefix` and the vCPU's number, in order, once they are all there.
fn vcpu_threads_named(process: u32, prefix: &str, count: usize) -> anyhow::Result<Vec<i32>> {
    let begin = Instant::now();
    loop {
        let vcpus = vcpu_threads(process, |name| name.strip_prefix(prefix)?.parse().ok())?;
        if vcpus.len() == count {
            return Ok(vcpus);
        }
        if begin.elapsed() > ANSWER {
            bail!("the VMM has {} threads called {prefix}N instead of {count}, see guest.log", vcpus.len());
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Threads of our own VMM carry their vCPU's name.
fn own_vcpu_threads(process: u32) -> anyhow::Result<Vec<i32>> {
    vcpu_threads(process, |name| match name {
        "ivcpu" => Some(usize::MAX),
        name => name.strip_prefix("vcpu")?.parse().ok(),
    })
}

/// The threads whose names are a vCPU's, in the order of the numbers that `number` reads there.
fn vcpu_threads(process: u32, number: impl Fn(&str) -> Option<usize>) -> anyhow::Result<Vec<i32>> {
    let threads = threads(process)?.into_iter();
    let mut vcpus: Vec<_> = threads.filter_map(|(thread, name)| Some((number(&name)?, thread))).collect();
    vcpus.sort_unstable();
    Ok(vcpus.into_iter().map(|(_, thread)| thread).collect())
}

/// The kernel's vhost workers of a QEMU: threads of its own since Linux 6.4, kernel threads before.
fn pin_vhost_workers(qemu: u32) -> anyhow::Result<()> {
    let name = format!("vhost-{qemu}");
    let mut workers: Vec<i32> =
        threads(qemu)?.into_iter().filter(|(_, n)| *n == name).map(|(t, _)| t).collect();
    if workers.is_empty() {
        let processes = fs::read_dir("/proc").context("reading /proc")?.flatten();
        let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        workers = numbers
            .filter(|id: &i32| fs::read_to_string(format!("/proc/{id}/comm")).is_ok_and(|n| n.trim() == name))
            .collect();
    }
    if workers.is_empty() {
        bail!("QEMU has no vhost worker called {name}");
    }
    for worker in workers {
        pcpu::pin(worker, &[pcpu::BACKEND]).context("pinning a vhost worker")?;
    }
    Ok(())
}

/// Ids and names of a process's threads.
fn threads(process: u32) -> anyhow::Result<Vec<(i32, String)>> {
    let folder = format!("/proc/{process}/task");
    let entries = fs::read_dir(&folder).with_context(|| format!("reading {folder}"))?;
    let threads = entries.flatten().filter_map(|entry| {
        let name = fs::read_to_string(entry.path().join("comm")).ok()?;
        Some((entry.file_name().to_str()?.parse().ok()?, name.trim().to_string()))
    });
    Ok(threads.collect())
}

/// How the VMM of a guest that was powered off ends. What it said last is printed if that is badly, so that a guest that crashed is
/// known for one.
pub(super) fn end_of(vmm: &mut Process, deadline: Duration, log: &Path) -> anyhow::Result<ExitStatus> {
    let status = vmm.wait_for(deadline).context("the VMM did not end after the guest's power-off")?;
    if !status.success() {
        println!("guest.log ends: {}", last_lines(log));
    }
    Ok(status)
}
