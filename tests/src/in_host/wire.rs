//! The far end of the guest's cable: a network namespace with a TAP in it, or with the NIC at the other end of the
//! emulated host's cable. Processes that attach to the TAP are started in the namespace, so nothing of it is ever seen
//! on the machine's own network.

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

use crate::link::{Link, PREFIX};
use crate::pcpu;
use crate::traffic::{End, PORT, Traffic};
use crate::workspace::Workspace;

/// The interface's name in the namespace, TAP or NIC.
pub const TAP: &str = "ivcpu0";

/// What the guest's frames arrive by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cable {
    /// A TAP with so many queue pairs, for a software backend.
    Tap(u16),
    /// The emulated host's own cable, for what is behind its igb.
    Nic,
}

/// The namespace and its interface; a TAP is gone when it is dropped, the NIC back with the host.
pub struct Wire {
    link: Link,
    cable: Cable,
}

impl Wire {
    /// Makes them for the guest's first NIC.
    pub fn set_up(cable: Cable) -> anyhow::Result<Self> {
        Self::set_up_for(Link::First, cable)
    }

    /// Makes them for a NIC of the guest, after removing what a killed run may have left. A TAP with more than one queue
    /// pair is a multi-queue one.
    pub fn set_up_for(link: Link, cable: Cable) -> anyhow::Result<Self> {
        let namespace = link.namespace();
        let _ = ip(&["netns", "delete", namespace]);
        ip(&["netns", "add", namespace])?;
        let wire = Self { link, cable };
        match cable {
            Cable::Tap(queue_pairs) => {
                let mut add = vec!["-n", namespace, "tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"];
                if queue_pairs > 1 {
                    add.push("multi_queue");
                }
                ip(&add)?;
            }
            Cable::Nic => {
                let nic = far_end()?;
                ip(&["link", "set", "dev", &nic, "netns", namespace])?;
                if nic != TAP {
                    ip(&["-n", namespace, "link", "set", "dev", &nic, "name", TAP])?;
                }
            }
        }
        let address = format!("{}/{PREFIX}", link.wire());
        // No router solicitations among the counted packets.
        ip(&["-n", namespace, "link", "set", "dev", TAP, "addrgenmode", "none"])?;
        ip(&["-n", namespace, "address", "add", &address, "dev", TAP])?;
        ip(&["-n", namespace, "link", "set", "dev", "lo", "up"])?;
        ip(&["-n", namespace, "link", "set", "dev", TAP, "up"])?;
        Ok(wire)
    }

    /// Queue pairs of the TAP; 1 if it is none.
    pub fn queue_pairs(&self) -> u16 {
        match self.cable {
            Cable::Tap(queue_pairs) => queue_pairs,
            Cable::Nic => 1,
        }
    }

    /// Frames that passed the interface so far, both ways.
    pub fn frames(&self) -> anyhow::Result<u64> {
        // A thread that enters the namespace sees its interfaces; the others do not.
        let link = self.link;
        let text = thread::spawn(move || -> io::Result<String> {
            enter(link)?;
            std::fs::read_to_string("/proc/thread-self/net/dev")
        });
        let text = text.join().map_err(|_| anyhow::anyhow!("the thread in the namespace died"))?;
        let text = text.context("reading the wire's counters")?;
        parse_frames(&text).with_context(|| format!("the wire has no {TAP}"))
    }

    /// The words in front of a command that make it run in the first NIC's namespace.
    pub fn enter_words() -> [String; 3] {
        enter_words(Link::First)
    }

    /// Starts the wire's end of `traffic`, on the wire's pCPU.
    pub fn listen(&self, traffic: Traffic) -> anyhow::Result<End> {
        // The threads of the traffic inherit namespace and CPU from the one that starts them.
        let (sender, end) = channel();
        let link = self.link;
        thread::spawn(move || {
            let listen = || -> io::Result<End> {
                enter(link)?;
                pcpu::pin(0, &[pcpu::wire()])?;
                End::listen(traffic, SocketAddr::from((link.wire(), PORT)))
            };
            let _ = sender.send(listen());
        });
        end.recv().context("the wire's thread died")?.context("listening on the wire")
    }

    /// Runs a program in the namespace to its end and gives its standard output.
    pub fn output(&self, argv: &[&str]) -> anyhow::Result<String> {
        let words: Vec<_> =
            enter_words(self.link).into_iter().chain(argv.iter().map(|word| word.to_string())).collect();
        run(&words[0], &words[1..])
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if let Err(e) = ip(&["netns", "delete", self.link.namespace()]) {
            eprintln!("lab: {e:#}");
        }
    }
}

fn enter_words(link: Link) -> [String; 3] {
    ["nsenter".into(), format!("--net=/run/netns/{}", link.namespace()), "--".into()]
}

/// Moves the calling thread into the namespace.
fn enter(link: Link) -> io::Result<()> {
    setns(File::open(format!("/run/netns/{}", link.namespace()))?, CloneFlags::CLONE_NEWNET)?;
    Ok(())
}

/// The interface at the far end of the emulated host's cable: its one virtio NIC.
fn far_end() -> anyhow::Result<String> {
    let interfaces = std::fs::read_dir("/sys/class/net").context("listing the host's interfaces")?;
    let driver =
        |name: &OsStr| std::fs::read_link(Path::new("/sys/class/net").join(name).join("device/driver"));
    let found = interfaces
        .flatten()
        .map(|entry| entry.file_name())
        .find(|name| driver(name).is_ok_and(|driver| driver.file_name() == Some(OsStr::new("virtio_net"))));
    let name = found.context("this host has no virtio NIC at the far end of its cable")?;
    name.into_string().ok().context("the NIC's name")
}

fn parse_frames(net_dev: &str) -> Option<u64> {
    let line = net_dev.lines().find_map(|line| line.trim_start().strip_prefix(TAP)?.strip_prefix(':'))?;
    let fields: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    // Received bytes, packets, ..., then sent bytes, packets, ...
    Some(fields.get(1)? + fields.get(9)?)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_the_interface_both_ways() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets ...\n    lo: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n\
                    ivcpu0: 1000 10 0 0 0 0 0 0 2000 7 0 0 0 0 0 0\n";
        assert_eq!(parse_frames(text), Some(17));
        assert_eq!(parse_frames("lo: 1 2"), None);
    }
}
