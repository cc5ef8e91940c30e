//! The far end of the guest's cable: a network namespace with a TAP in it. Processes that attach to the TAP are
//! started in the namespace, so nothing of it is ever seen on the machine's own network.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;

use anyhow::{Context, bail};
use nix::sched::{CloneFlags, setns};

use crate::guest::{PREFIX, WIRE_ADDRESS};
use crate::pcpu;
use crate::traffic::{End, PORT, Traffic};
use crate::workspace::Workspace;

const NAMESPACE: &str = "ivcpu-wire";

/// The TAP's name.
pub const TAP: &str = "ivcpu0";

/// The namespace and its TAP; both are gone when dropped.
pub struct Wire {
    queue_pairs: u16,
}

impl Wire {
    /// Makes them, after removing what a killed run may have left. A TAP with more than one queue pair is a
    /// multi-queue one.
    pub fn set_up(queue_pairs: u16) -> anyhow::Result<Self> {
        let _ = ip(&["netns", "delete", NAMESPACE]);
        ip(&["netns", "add", NAMESPACE])?;
        let wire = Self { queue_pairs };
        let mut add = vec!["-n", NAMESPACE, "tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"];
        if queue_pairs > 1 {
            add.push("multi_queue");
        }
        ip(&add)?;
        let address = format!("{WIRE_ADDRESS}/{PREFIX}");
        // No router solicitations among the counted packets.
        ip(&["-n", NAMESPACE, "link", "set", "dev", TAP, "addrgenmode", "none"])?;
        ip(&["-n", NAMESPACE, "address", "add", &address, "dev", TAP])?;
        ip(&["-n", NAMESPACE, "link", "set", "dev", "lo", "up"])?;
        ip(&["-n", NAMESPACE, "link", "set", "dev", TAP, "up"])?;
        Ok(wire)
    }

    /// Queue pairs of the TAP.
    pub fn queue_pairs(&self) -> u16 {
        self.queue_pairs
    }

    /// The words in front of a command that make it run in the namespace.
    pub fn enter_words() -> [String; 3] {
        ["nsenter".into(), format!("--net=/run/netns/{NAMESPACE}"), "--".into()]
    }

    /// Starts the wire's end of `traffic`, on the wire's pCPU.
    pub fn listen(&self, traffic: Traffic) -> anyhow::Result<End> {
        // The threads of the traffic inherit namespace and CPU from the one that starts them.
        let (sender, end) = channel();
        thread::spawn(move || {
            let listen = || -> io::Result<End> {
                setns(File::open(format!("/run/netns/{NAMESPACE}"))?, CloneFlags::CLONE_NEWNET)?;
                pcpu::pin(0, &[pcpu::wire()])?;
                End::listen(traffic, SocketAddr::from((WIRE_ADDRESS, PORT)))
            };
            let _ = sender.send(listen());
        });
        end.recv().context("the wire's thread died")?.context("listening on the wire")
    }

    /// Runs a program in the namespace to its end and gives its standard output.
    pub fn output(&self, argv: &[&str]) -> anyhow::Result<String> {
        let words: Vec<_> =
            Self::enter_words().into_iter().chain(argv.iter().map(|word| word.to_string())).collect();
        run(&words[0], &words[1..])
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if let Err(e) = ip(&["netns", "delete", NAMESPACE]) {
            eprintln!("lab: {e:#}");
        }
    }
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    // The provisioned one: a bare system has none.
    run(Workspace::locate()?.launchers().join("ip"), arguments).map(drop)
}

fn run(program: impl AsRef<Path>, arguments: &[impl AsRef<OsStr>]) -> anyhow::Result<String> {
    let program = program.as_ref();
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {}", program.display()))?;
    if !output.status.success() {
        let words: Vec<_> = arguments.iter().map(|word| word.as_ref().to_string_lossy()).collect();
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("{} {}: {}", program.display(), words.join(" "), errors.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
