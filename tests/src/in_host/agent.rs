//! The agent: runs the lab's commands inside the emulated host and says that it is alive.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::channel::{AGENT_PORT, Bytes, Report, Request, Run, receive, send};
use crate::pcpu;

/// How long output may still come after the command itself has ended (from something it left running).
const DRAIN: Duration = Duration::from_secs(1);

type Port = Arc<Mutex<File>>;

/// The device file of the virtio-serial port `name`.
pub fn port_path(name: &str) -> anyhow::Result<PathBuf> {
    let class = "/sys/class/virtio-ports";
    for entry in fs::read_dir(class).with_context(|| format!("reading {class}"))? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|text| text.trim() == name) {
            return Ok(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    Err(anyhow!("there is no virtio-serial port {name}: this runs inside the emulated host only"))
}

/// Serves the lab until it asks to power off.
pub fn serve() -> anyhow::Result<()> {
    let path = port_path(AGENT_PORT)?;
    let port =
        File::options().read(true).write(true).open(&path).with_context(|| format!("opening {path:?}"))?;
    let mut requests = BufReader::new(port.try_clone()?);
    let port: Port = Arc::new(Mutex::new(port));
    let uptime = fs::read_to_string("/proc/uptime").context("reading the uptime")?;
    report(
        &port,
        &Report::Ready {
            kernel: nix::sys::utsname::uname()?.release().to_string_lossy().into_owned(),
            cpus: online_cpus(),
            uptime: uptime.split(' ').next().unwrap_or_default().parse().unwrap_or(0.0),
        },
    );
    thread::spawn({
        let port = port.clone();
        move || {
            stay_on_the_wire_pcpu();
            loop {
                thread::sleep(Duration::from_secs(1));
                report(&port, &Report::Alive);
            }
        }
    });

    let mut input: Option<File> = None;
    let mut group: Option<Pid> = None;
    while let Some(request) = receive(&mut requests)? {
        match request {
            Request::Run(run) => match start(&run) {
                Ok(started) => {
                    group = Some(Pid::from_raw(started.child.id() as i32));
                    input = Some(started.input);
                    let port = port.clone();
                    thread::spawn(move || follow(started.child, started.outputs, &port));
                }
                Err(e) => report(&port, &Report::NotStarted(format!("{e:#}"))),
            },
            Request::Input(bytes) => {
                // A command that reads no more is its own affair.
                let _ = input.as_mut().map(|file| file.write_all(&bytes.0));
            }
            Request::InputEnd => input = None,
            Request::Kill => {
                let _ = group.map(|group| killpg(group, Signal::SIGKILL));
            }
            Request::PowerOff => break,
        }
    }
    Ok(())
}

fn online_cpus() -> usize {
    fs::read_to_string("/proc/stat")
        .map(|text| text.lines().filter(|line| line.starts_with("cpu") && !line.starts_with("cpu ")).count())
        .unwrap_or(0)
}

/// The agent's busy threads keep off the pCPUs that are measured; the commands it runs may use them all.
fn stay_on_the_wire_pcpu() {
    if let Err(e) = pcpu::pin(0, &[pcpu::wire()]) {
        eprintln!("lab: cannot pin the agent to pCPU {}: {e}", pcpu::wire());
    }
}

struct Started {
    child: Child,
    input: File,
    /// Readable ends, and whether each is standard error.
    outputs: Vec<(File, bool)>,
}

fn start(run: &Run) -> anyhow::Result<Started> {
    let program = run.argv.first().context("an empty command")?;
    // A session of its own, so that killing reaches everything the command starts.
    let mut command = Command::new("setsid");
    if run.terminal.is_some() {
        command.arg("--ctty");
    }
    command.args(&run.argv).current_dir(&run.directory);
    command.env_clear().env("HOME", "/root").envs(run.environment.iter().cloned());
    let started = match run.terminal {
        Some((rows, columns)) => {
            let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
            let pty = openpty(Some(&size), None).context("opening a terminal")?;
            command.stdin(pty.slave.try_clone()?).stdout(pty.slave.try_clone()?).stderr(pty.slave);
            let child = command.spawn().with_context(|| format!("starting {program}"))?;
            let input = File::from(pty.master);
            Started { outputs: vec![(input.try_clone()?, false)], child, input }
        }
        None => {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn().with_context(|| format!("starting {program}"))?;
            let taken = "a piped stream";
            let input = OwnedFd::from(child.stdin.take().context(taken)?).into();
            let output = OwnedFd::from(child.stdout.take().context(taken)?).into();
            let error = OwnedFd::from(child.stderr.take().context(taken)?).into();
            Started { child, input, outputs: vec![(output, false), (error, true)] }
        }
    };
    Ok(started)
}

/// Passes on what the command writes, then how it ended.
fn follow(mut child: Child, outputs: Vec<(File, bool)>, port: &Port) {
    stay_on_the_wire_pcpu();
    let (ended, all_ended) = channel::<()>();
    for (file, error) in outputs {
        let (port, ended) = (port.clone(), ended.clone());
        thread::spawn(move || {
            forward(file, error, &port);
            drop(ended);
        });
    }
    drop(ended);
    let status = child.wait();
    // Fails at once when every forwarder is done, which is what is waited for.
    let _ = all_ended.recv_timeout(DRAIN);
    report(port, &Report::Exit(status.map_or(127, exit_code)));
}

fn forward(mut file: File, error: bool, port: &Port) {
    let mut buffer = [0; 8192];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => report(port, &Report::Output { error, bytes: Bytes(buffer[..length].to_vec()) }),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // A terminal whose last user is gone answers with an error.
            Err(_) => return,
        }
    }
}

/// The status as a shell would give it.
fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn report(port: &Port, message: &Report) {
    // When the lab is gone the emulated host is about to be, too.
    if let Ok(mut port) = port.lock() {
        let _ = send(&mut *port, message);
    }
}
