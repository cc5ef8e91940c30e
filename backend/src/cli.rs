//! The command line. The comments on the options are their help.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::fifo::{FifoCommand, FifoOptions};
use crate::port::{Connection, LEAST_MTU, MAX_QUEUE_PAIRS, PortOptions};
use crate::sandbox::{Seccomp, UserName};
use crate::version::VERSION;

/// A vhost-user net backend: poll threads move a guest's frames, the guest is interrupted only when its driver asks.
#[derive(Debug, Parser)]
#[command(name = "ivcpu-backend", version = VERSION, max_term_width = 100)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(group = clap::ArgGroup::new("connection").args(["socket_path", "fd", "port", "print_capabilities"]).required(true))]
pub struct Options {
    /// Listen for frontends on the Unix socket PATH.
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// Use the inherited file descriptor N: a connected vhost-user socket, or a listening one.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(3..), allow_negative_numbers = true)]
    pub fd: Option<RawFd>,

    /// Serve a port of its own: socket=PATH or fd=N, uplink=UPLINK, and, as the options of the same names say for a
    /// single port, client=on|off, queue_pairs=N, poll_us=N|always, affinity=`[LIST]`, mac=MAC, mtu=N,
    /// control_queue=on|off, fifo=PATH, fifo_fd=N, bound_us=N; name=NAME for counters and messages (otherwise port0,
    /// port1 and so on). May be said several times: each port has threads of its own, and none waits for another.
    #[arg(long, value_name = "socket=PATH,uplink=UPLINK[,...]", conflicts_with_all = SINGLE_PORT_OPTIONS)]
    pub port: Vec<PortOptions>,

    /// Print what this backend can do as JSON and exit.
    #[arg(long)]
    pub print_capabilities: bool,

    /// Where frames go: tap:NAME, or for tests null, loop (back, MAC addresses swapped), gen or gen:SIZE (a source of
    /// frames of SIZE bytes, 64 if not said).
    #[arg(long, value_name = "UPLINK", required_unless_present_any = ["print_capabilities", "port"])]
    pub uplink: Option<UplinkKind>,

    /// Connect to the frontend, which listens on the socket of --socket-path, instead of waiting for it; again whenever
    /// it leaves.
    #[arg(long, requires = "socket_path", conflicts_with = "fd")]
    pub client: bool,

    /// Queue pairs, each with a poll thread of its own.
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_QUEUE_PAIRS)), allow_negative_numbers = true)]
    pub queue_pairs: u8,

    /// Microseconds a poll thread spins without work before it sleeps; 0 = never spin, always = never sleep.
    #[arg(long, value_name = "N|always", default_value = "50", allow_negative_numbers = true)]
    pub poll_us: PollTime,

    /// pCPUs for the poll threads, as in `[2]` or `[2-3,5]`: thread i is pinned to entry i modulo the list's length.
    #[arg(long, value_name = "[LIST]")]
    pub affinity: Option<PcpuList>,

    /// Complete through the FIFO region in file PATH, or in the inherited file descriptor N, while the guest's IVCPU
    /// polls it. Opened at the start of each session; where that fails, completions are calls. Further words:
    /// bound_us=N, how long an entry may wait before the driver is called all the same (100), and for tests
    /// lose_entries=on: no entry is ever written, so that every completion waits for that bound.
    #[arg(long, value_name = "path=PATH|fd=N[,...]")]
    pub fifo: Option<FifoOptions>,

    /// MAC address to offer to the driver (otherwise the frontend's choice).
    #[arg(long, value_name = "MAC")]
    pub mac: Option<MacAddress>,

    /// MTU to offer to the driver, 68 to 65535 bytes (otherwise the frontend's choice). The uplink's own is not changed.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    #[arg(value_parser = clap::value_parser!(u16).range(i64::from(LEAST_MTU)..))]
    pub mtu: Option<u16>,

    /// Whether to offer what a control queue brings, several queue pairs among it. The queue itself is the frontend's:
    /// say off for one that has none (Alioth), whose guest else finds no network device.
    #[arg(long, value_name = "on|off", default_value = "on", action = clap::ArgAction::Set)]
    #[arg(value_parser = parse_switch)]
    pub control_queue: bool,

    /// Serve counters as JSON on the Unix socket PATH.
    #[arg(long, value_name = "PATH")]
    pub stats_socket: Option<PathBuf>,

    /// Serve counters in Prometheus' text format on the Unix socket PATH, by HTTP.
    #[arg(long, value_name = "PATH")]
    pub metrics_socket: Option<PathBuf>,

    /// Go on as this user, by name or number, once uplinks and sockets are open; otherwise as the user of the start.
    /// All capabilities are given up either way.
    #[arg(long, value_name = "USER")]
    pub user: Option<UserName>,

    /// What becomes of a system call that a thread's filter forbids: true = the program says its name and ends with
    /// status 159, log = it is made, and its name said on standard error, false = there are no filters.
    #[arg(long, value_name = "true|false|log", default_value = "true")]
    pub seccomp: Seccomp,

    /// Whether Landlock, where the kernel has it, hides all files but those that the options name.
    #[arg(long, value_name = "true|false", default_value_t = true, action = clap::ArgAction::Set)]
    pub landlock: bool,

    /// Something else to do than to serve.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// Options that say what `--port` says with words of its own.
const SINGLE_PORT_OPTIONS: [&str; 11] = [
    "socket_path",
    "fd",
    "uplink",
    "client",
    "queue_pairs",
    "poll_us",
    "affinity",
    "fifo",
    "mac",
    "mtu",
    "control_queue",
];

impl Options {
    /// The ports to serve, each with a name; none where the options ask for something else.
    pub fn ports(&self) -> Vec<PortOptions> {
        let connection = match (&self.socket_path, self.fd) {
            (Some(path), _) if self.client => Some(Connection::Connect(path.clone())),
            (Some(path), _) => Some(Connection::Listen(path.clone())),
            (None, Some(fd)) => Some(Connection::Inherited(fd)),
            (None, None) => None,
        };
        let single = connection.zip(self.uplink.clone()).map(|(connection, uplink)| PortOptions {
            name: String::new(),
            connection,
            uplink,
            queue_pairs: self.queue_pairs,
            poll_us: self.poll_us,
            affinity: self.affinity.clone(),
            fifo: self.fifo.clone(),
            mac: self.mac,
            mtu: self.mtu,
            control_queue: self.control_queue,
        });
        let mut ports: Vec<_> = single.into_iter().chain(self.port.iter().cloned()).collect();
        for (index, port) in ports.iter_mut().enumerate() {
            if port.name.is_empty() {
                port.name = format!("port{index}");
            }
        }
        ports
    }
}

/// What this program does besides serving frontends.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make FIFO regions.
    #[command(subcommand, arg_required_else_help = false)]
    Fifo(FifoCommand),
}

/// `on` or `off`.
pub(crate) fn parse_switch(word: &str) -> Result<bool, String> {
    match word {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("expected on or off".to_owned()),
    }
}

/// An uplink by its words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UplinkKind {
    /// The TAP device of this name.
    Tap(String),
    /// Swallow every frame.
    Null,
    /// Give every frame back, MAC addresses swapped.
    Loop,
    /// Make frames.
    Generator {
        /// Bytes of each, Ethernet header included.
        size: usize,
    },
}

impl FromStr for UplinkKind {
    type Err = String;

    fn from_str(words: &str) -> Result<Self, String> {
        let (kind, rest) = words.split_once(':').map_or((words, None), |(kind, rest)| (kind, Some(rest)));
        match (kind, rest) {
            ("tap", Some(name)) if !name.is_empty() => Ok(UplinkKind::Tap(name.to_owned())),
            ("null", None) => Ok(UplinkKind::Null),
            ("loop", None) => Ok(UplinkKind::Loop),
            ("gen", None) => Ok(UplinkKind::Generator { size: 64 }),
            ("gen", Some(size)) => match size.parse() {
                Ok(size @ 14..=65_535) => Ok(UplinkKind::Generator { size }),
                _ => Err("the size of generated frames is 14 to 65535 bytes".to_owned()),
            },
            _ => Err("unknown uplink; known are tap:NAME, null, loop and gen[:SIZE]".to_owned()),
        }
    }
}

/// How long a poll thread spins without work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollTime {
    /// For this long, then it sleeps.
    Bounded(Duration),
    /// For ever.
    Always,
}

impl PollTime {
    /// What it is if nothing is said.
    pub const DEFAULT: PollTime = PollTime::Bounded(Duration::from_micros(50));
}

impl FromStr for PollTime {
    type Err = String;

    fn from_str(words: &str) -> Result<Self, String> {
        match (words, words.parse::<u32>()) {
            ("always", _) => Ok(PollTime::Always),
            (_, Ok(micros)) => Ok(PollTime::Bounded(Duration::from_micros(micros.into()))),
            _ => Err("expected microseconds, or always".to_owned()),
        }
    }
}

/// A MAC address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(words: &str) -> Result<Self, String> {
        let bytes: Option<Vec<u8>> = words
            .split(':')
            .map(|byte| (byte.len() == 2).then(|| u8::from_str_radix(byte, 16).ok()).flatten())
            .collect();
        match bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok()) {
            Some([first, ..]) if first & 1 != 0 => Err("this is a multicast address".to_owned()),
            Some(bytes) => Ok(MacAddress(bytes)),
            None => Err("expected six hexadecimal bytes, as in 52:54:00:12:34:56".to_owned()),
        }
    }
}

/// Physical CPUs, in Cloud Hypervisor's list syntax.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PcpuList(pub Vec<usize>);

impl FromStr for PcpuList {
    type Err = String;

    fn from_str(words: &str) -> Result<Self, String> {
        const HIGHEST: usize = 8191;
        let expected = || "expected a list of pCPUs in brackets, as in [2] or [2-3,5]".to_owned();
        let list = words.strip_prefix('[').and_then(|list| list.strip_suffix(']')).ok_or_else(expected)?;
        let mut pcpus = Vec::new();
        for part in list.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (usize, usize) =
                (first.parse().map_err(|_| expected())?, last.parse().map_err(|_| expected())?);
            if first > last || last > HIGHEST {
                return Err(expected());
            }
            pcpus.extend(first..=last);
        }
        Ok(PcpuList(pcpus))
    }
}

/// The file by which management software finds this program: QEMU's `docs/interop/vhost-user.json`.
const DESCRIPTION: &str = include_str!("../share/50-ivcpu-backend.json");

/// QEMU's convention for programs it may start: what kind of device this is, as the description says.
pub fn capabilities() -> serde_json::Result<String> {
    /// All that the convention has for network devices.
    #[derive(serde::Deserialize, serde::Serialize)]
    struct Capabilities<'a> {
        r#type: &'a str,
    }
    serde_json::to_string(&serde_json::from_str::<Capabilities<'_>>(DESCRIPTION)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uplinks_are_known_by_their_words() {
        assert_eq!("tap:t0".parse(), Ok(UplinkKind::Tap("t0".into())));
        assert_eq!("gen:1500".parse(), Ok(UplinkKind::Generator { size: 1500 }));
        for bad in ["tap", "tap:", "null:1", "gen:13", "gen:65536", "bridge:br0", ""] {
            assert!(bad.parse::<UplinkKind>().is_err(), "{bad}");
        }
    }

    #[test]
    fn options_without_a_port_make_one_with_the_same_defaults() {
        let parse = |words: &[&str]| Options::try_parse_from([&["ivcpu-backend"], words].concat()).unwrap();
        let single = parse(&["--socket-path", "/run/a", "--uplink", "null"]);
        let several =
            parse(&["--port", "socket=/run/a,uplink=null", "--port", "socket=/run/b,uplink=null,name=b"]);
        assert_eq!(single.ports()[0], several.ports()[0]);
        assert_eq!(several.ports().iter().map(|port| &port.name).collect::<Vec<_>>(), ["port0", "b"]);
        assert_eq!(parse(&["--print-capabilities"]).ports(), []);
    }

    #[test]
    fn pcpu_lists_are_those_of_cloud_hypervisor() {
        assert_eq!("[2]".parse(), Ok(PcpuList(vec![2])));
        assert_eq!("[2-4,7]".parse(), Ok(PcpuList(vec![2, 3, 4, 7])));
        for bad in ["2", "[]", "[3-2]", "[a]", "[1,]", "[0-99999999]"] {
            assert!(bad.parse::<PcpuList>().is_err(), "{bad}");
        }
    }

    #[test]
    fn mac_addresses_are_unicast() {
        assert_eq!("52:54:00:12:34:56".parse(), Ok(MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56])));
        for bad in ["", "52:54:00:12:34", "52:54:00:12:34:5", "53:54:00:12:34:56", "52:54:00:12:34:56:78"] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_connection_is_required_and_only_one() {
        assert!(Options::try_parse_from(["x", "--uplink", "null"]).is_err());
        assert!(
            Options::try_parse_from(["x", "--uplink", "null", "--fd", "3", "--socket-path", "s"]).is_err()
        );
        assert!(Options::try_parse_from(["x", "--socket-path", "s"]).is_err());
        assert!(Options::try_parse_from(["x", "--print-capabilities"]).is_ok());
        assert!(Options::try_parse_from(["x", "fifo", "create", "/dev/shm/f"]).is_ok());
        assert!(Options::try_parse_from(["x", "fifo"]).is_err());
    }
}
