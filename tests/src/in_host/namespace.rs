//! A network namespace, so that nothing of the lab is ever seen on the machine's own network.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, anyhow, bail};
use nix::sched::{CloneFlags, setns};

use crate::link::PREFIX;
use crate::workspace::Workspace;

/// A network namespace; gone when it is dropped, and its TAPs with it.
pub(super) struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes it, after removing what a killed run may have left.
    pub(super) fn create(name: String) -> anyhow::Result<Self> {
        let _ = ip(&["netns", "delete", &name]);
        ip(&["netns", "add", &name])?;
        let namespace = Self { name };
        namespace.ip(&["link", "set", "dev", "lo", "up"])?;
        Ok(namespace)
    }

    /// Runs `ip` in it.
    pub(super) fn ip(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let words: Vec<_> = ["-n", &self.name].iter().chain(arguments).copied().collect();
        ip(&words)
    }

    /// Moves an interface of the host's into it and names it there.
    pub(super) fn take(&self, interface: &str, name: &str) -> anyhow::Result<()> {
        ip(&["link", "set", "dev", interface, "netns", &self.name])?;
        if interface != name {
            self.ip(&["link", "set", "dev", interface, "name", name])?;
        }
        Ok(())
    }

    /// Makes a TAP; with more than one queue pair a multi-queue one.
    pub(super) fn add_tap(&self, name: &str, queue_pairs: u16) -> anyhow::Result<()> {
        let mut add = vec!["tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr"];
        if queue_pairs > 1 {
            add.push("multi_queue");
        }
        self.ip(&add)
    }

    /// Gives an interface its address and brings it up.
    pub(super) fn bring_up(&self, interface: &str, address: Ipv4Addr) -> anyhow::Result<()> {
        let address = format!("{address}/{PREFIX}");
        // No router solicitations among the counted packets.
        self.ip(&["link", "set", "dev", interface, "addrgenmode", "none"])?;
        self.ip(&["address", "add", &address, "dev", interface])?;
        self.ip(&["link", "set", "dev", interface, "up"])
    }

    /// The words in front of a command that make it run in a namespace of this name.
    pub(super) fn enter_words(name: &str) -> [String; 3] {
        ["nsenter".into(), format!("--net=/run/netns/{name}"), "--".into()]
    }

    /// Runs `body` on a thread in it; what that starts is in it, too.
    pub(super) fn within<T: Send + 'static>(
        &self,
        body: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let path = format!("/run/netns/{}", self.name);
        let thread = thread::spawn(move || {
            setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?;
            body()
        });
        Ok(thread.join().map_err(|_| anyhow!("the thread in the namespace died"))??)
    }

    /// Runs a program in it to its end and gives its standard output.
    pub(super) fn output(&self, argv: &[&str]) -> anyhow::Result<String> {
        let words: Vec<_> = Self::enter_words(&self.name)
            .into_iter()
            .chain(argv.iter().map(|word| word.to_string()))
            .collect();
        run(&words[0], &words[1..])
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(e) = ip(&["netns", "delete", &self.name]) {
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
