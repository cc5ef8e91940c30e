//! A port by its words: one device for one VM, with a socket, an uplink and threads of its own.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use crate::cli::{MacAddress, PcpuList, PollTime, UplinkKind, parse_switch};
use crate::fifo::FifoOptions;

/// Queue pairs that a port can have at most.
pub const MAX_QUEUE_PAIRS: u8 = 32;

/// What virtio calls the least MTU (1.2, 5.1.4.1): IPv4's.
pub const LEAST_MTU: u16 = 68;

/// Where frontends come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Connection {
    /// They connect to the socket of this path.
    Listen(PathBuf),
    /// They listen there, and the port connects, again and again.
    Connect(PathBuf),
    /// An inherited descriptor: a connected socket, or one to listen on.
    Inherited(RawFd),
}

/// A port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortOptions {
    /// What counters and messages call it.
    pub name: String,
    /// Where its frontends come from.
    pub connection: Connection,
    /// Where its frames go.
    pub uplink: UplinkKind,
    /// Queue pairs, 1 to [`MAX_QUEUE_PAIRS`].
    pub queue_pairs: u8,
    /// How long its poll threads spin.
    pub poll_us: PollTime,
    /// Where they run.
    pub affinity: Option<PcpuList>,
    /// How its completions leave, other than by calls.
    pub fifo: Option<FifoOptions>,
    /// The MAC address offered to the driver.
    pub mac: Option<MacAddress>,
    /// The largest packet, without Ethernet's header, offered to the driver; bytes, [`LEAST_MTU`] at least.
    pub mtu: Option<u16>,
    /// Whether what a control queue brings is offered.
    pub control_queue: bool,
}

impl PortOptions {
    /// A port with the defaults of the command line.
    pub fn new(connection: Connection, uplink: UplinkKind) -> Self {
        PortOptions {
            name: String::new(),
            connection,
            uplink,
            queue_pairs: 1,
            poll_us: PollTime::DEFAULT,
            affinity: None,
            fifo: None,
            mac: None,
            mtu: None,
            control_queue: true,
        }
    }
}

impl FromStr for PortOptions {
    type Err = String;

    fn from_str(words: &str) -> Result<Self, String> {
        let (mut listen, mut inherited, mut client, mut uplink) = (None, None, false, None);
        let mut fifo = Vec::new();
        // What the words that were there say is checked as they come; the two that make a port may come last.
        let mut port = PortOptions::new(Connection::Inherited(-1), UplinkKind::Null);
        let mut seen = Vec::new();
        for word in split(words) {
            let (key, value) = word.split_once('=').ok_or_else(|| format!("'{word}' is not KEY=VALUE"))?;
            if value.is_empty() {
                return Err(format!("{key}= says nothing"));
            }
            if seen.contains(&key) {
                return Err(format!("{key}= is there twice"));
            }
            seen.push(key);
            let wrong = |expected: String| format!("{key}={value}: {expected}");
            match key {
                "name" if value.len() <= 64 => port.name = value.to_owned(),
                "name" => return Err("a port's name has at most 64 bytes".to_owned()),
                "socket" => listen = Some(PathBuf::from(value)),
                "fd" => {
                    let number = value.parse().ok().filter(|number: &RawFd| *number > 2);
                    inherited = Some(number.ok_or_else(|| wrong("expected a number from 3 on".to_owned()))?);
                }
                "client" => client = parse_switch(value).map_err(wrong)?,
                "uplink" => uplink = Some(value.parse().map_err(wrong)?),
                "queue_pairs" => {
                    let pairs = value.parse().ok().filter(|pairs| (1..=MAX_QUEUE_PAIRS).contains(pairs));
                    port.queue_pairs =
                        pairs.ok_or_else(|| wrong(format!("expected 1 to {MAX_QUEUE_PAIRS}")))?;
                }
                "poll_us" => port.poll_us = value.parse().map_err(wrong)?,
                "affinity" => port.affinity = Some(value.parse().map_err(wrong)?),
                "mac" => port.mac = Some(value.parse().map_err(wrong)?),
                "mtu" => {
                    let mtu = value.parse().ok().filter(|mtu| *mtu >= LEAST_MTU);
                    port.mtu = Some(mtu.ok_or_else(|| wrong(format!("expected {LEAST_MTU} to 65535")))?);
                }
                "control_queue" => port.control_queue = parse_switch(value).map_err(wrong)?,
                "fifo" => fifo.push(format!("path={value}")),
                "fifo_fd" => fifo.push(format!("fd={value}")),
                "bound_us" | "lose_entries" => fifo.push(word.to_owned()),
                _ => {
                    return Err(format!(
                        "'{key}' is none of name, socket, fd, client, uplink, queue_pairs, poll_us, affinity, mac, \
                         mtu, control_queue, fifo, fifo_fd, bound_us and lose_entries"
                    ));
                }
            }
        }
        port.uplink = uplink.ok_or("a port's uplink is missing: uplink=tap:NAME")?;
        port.connection = match (listen, inherited, client) {
            (Some(path), None, false) => Connection::Listen(path),
            (Some(path), None, true) => Connection::Connect(path),
            (None, Some(fd), false) => Connection::Inherited(fd),
            (None, Some(_), true) => return Err("client=on wants a socket=".to_owned()),
            (Some(_), Some(_), _) => return Err("one socket= or one fd= is wanted".to_owned()),
            (None, None, _) => return Err("a port's socket is missing: socket=PATH".to_owned()),
        };
        if !fifo.is_empty() {
            port.fifo = Some(fifo.join(",").parse()?);
        }
        Ok(port)
    }
}

/// Words between commas; a list in brackets is one word.
fn split(words: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0i32;
    words.split(move |letter| {
        depth += i32::from(letter == '[') - i32::from(letter == ']');
        letter == ',' && depth == 0
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::fifo::Place;

    #[test]
    fn a_port_is_made_of_its_words() {
        let least = PortOptions::new(Connection::Listen("/run/a".into()), UplinkKind::Null);
        assert_eq!("socket=/run/a,uplink=null".parse(), Ok(least.clone()));
        let port: PortOptions =
            "uplink=tap:net0,socket=/run/a,queue_pairs=2,affinity=[2-3,5],poll_us=always,\
                                 mac=52:54:00:12:34:56,mtu=9000,control_queue=off,fifo=/dev/shm/f,bound_us=7,\
                                 name=web,client=on"
                .parse()
                .unwrap();
        assert_eq!(port.connection, Connection::Connect("/run/a".into()));
        assert_eq!(port.uplink, UplinkKind::Tap("net0".into()));
        assert_eq!((port.queue_pairs, port.mtu, port.control_queue), (2, Some(9000), false));
        assert_eq!(port.affinity, Some(PcpuList(vec![2, 3, 5])));
        assert_eq!(port.name, "web");
        let fifo = port.fifo.unwrap();
        assert_eq!((fifo.place, fifo.bound), (Place::Path("/dev/shm/f".into()), Duration::from_micros(7)));
        assert_eq!(
            "fd=7,uplink=gen:100".parse::<PortOptions>().unwrap().connection,
            Connection::Inherited(7)
        );
    }

    #[test]
    fn words_that_make_no_port_are_refused() {
        for (bad, with) in [
            ("", "not KEY=VALUE"),
            ("socket=a", "uplink"),
            ("uplink=null", "socket"),
            ("socket=a,uplink=null,", "not KEY=VALUE"),
            ("socket=a,uplink=null,colour=red", "'colour'"),
            ("socket=a,uplink=null,socket=b", "twice"),
            ("socket=a,fd=3,uplink=null", "one socket="),
            ("fd=2,uplink=null", "from 3 on"),
            ("fd=3,client=on,uplink=null", "client=on"),
            ("socket=a,uplink=null,queue_pairs=33", "1 to 32"),
            ("socket=a,uplink=null,mtu=67", "68 to 65535"),
            ("socket=a,uplink=null,mtu=65536", "68 to 65535"),
            ("socket=a,uplink=null,affinity=[1,2", "list of pCPUs"),
            ("socket=a,uplink=null,affinity=1]", "list of pCPUs"),
            ("socket=a,uplink=null,bound_us=100", "path=PATH"),
            ("socket=a,uplink=null,fifo=a,fifo_fd=4", "one path or one fd"),
            ("socket=a,uplink=bridge", "unknown uplink"),
            ("socket=,uplink=null", "says nothing"),
        ] {
            let error = bad.parse::<PortOptions>().unwrap_err();
            assert!(error.contains(with), "{bad}: {error}");
        }
    }
}
