//! The far end of the guest's cable: a network namespace with a TAP in it, or with the NIC at the other end of the
//! emulated host's cable. Processes that attach to the TAP are started in the namespace.

use std::ffi::OsStr;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context;

use super::namespace::Namespace;
use crate::link::Link;
use crate::traffic::{End, PORT, Traffic};

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
    namespace: Namespace,
}

impl Wire {
    /// Makes them for the guest's first NIC.
    pub fn set_up(cable: Cable) -> anyhow::Result<Self> {
        Self::set_up_for(Link::First, cable)
    }

    /// Makes them for a NIC of the guest, after removing what a killed run may have left.
    pub fn set_up_for(link: Link, cable: Cable) -> anyhow::Result<Self> {
        let namespace = Namespace::create(link.namespace())?;
        match cable {
            Cable::Tap(queue_pairs) => namespace.add_tap(TAP, queue_pairs)?,
            Cable::Nic => namespace.take(&far_end()?, TAP)?,
        }
        namespace.bring_up(TAP, link.wire())?;
        Ok(Self { link, cable, namespace })
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
        let text = self.namespace.within(|| std::fs::read_to_string("/proc/thread-self/net/dev"));
        parse_frames(&text.context("reading the wire's counters")?)
            .with_context(|| format!("the wire has no {TAP}"))
    }

    /// The words in front of a command that make it run in the first NIC's namespace.
    pub fn enter_words() -> [String; 3] {
        Namespace::enter_words(&Link::First.namespace())
    }

    /// Starts the wire's end of `traffic`, where the calling thread runs: on the wire's pCPU, in a host that has a plan.
    pub fn listen(&self, traffic: Traffic) -> anyhow::Result<End> {
        let address = SocketAddr::from((self.link.wire(), PORT));
        self.namespace.within(move || End::listen(traffic, address)).context("listening on the wire")
    }

    /// Runs a program in the namespace to its end and gives its standard output.
    pub fn output(&self, argv: &[&str]) -> anyhow::Result<String> {
        self.namespace.output(argv)
    }
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
