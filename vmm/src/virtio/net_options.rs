//! The words of `--net`.

use std::fmt;
use std::io::{self, Read};
use std::path::PathBuf;
use std::str::FromStr;

use crate::suboption::{self, SubOptions};

/// `--net vhost_user=true,socket=PATH[,mac=MAC][,num_queues=2N][,queue_size=256]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetOptions {
    /// The socket where the backend listens.
    pub socket: PathBuf,
    /// The address of the device.
    pub mac: Mac,
    /// Queue pairs; `num_queues` counts both queues of each.
    pub pairs: u16,
    /// Entries of each queue.
    pub queue_size: u16,
}

impl FromStr for NetOptions {
    type Err = suboption::Error;

    fn from_str(text: &str) -> Result<Self, suboption::Error> {
        let mut options = SubOptions::parse(text)?;
        let vhost_user = options.take_switch("vhost_user")?;
        let socket: Option<PathBuf> = options.take("socket")?;
        let mac = options.take("mac")?;
        let pairs = options.take_with("num_queues", |value| match value.parse::<u16>() {
            Ok(queues) if (2..=128).contains(&queues) && queues % 2 == 0 => Ok(queues / 2),
            _ => Err("expected an even number from 2 to 128 (two for each queue pair)".to_owned()),
        })?;
        let queue_size = options.take_with("queue_size", |value| match value.parse::<u16>() {
            Ok(size) if size.is_power_of_two() && size >= 16 => Ok(size),
            _ => Err("expected a power of two from 16 to 32768".to_owned()),
        })?;
        options.finish()?;
        if vhost_user != Some(true) {
            // The one kind of network device there is, and Cloud Hypervisor's word for it.
            return Err(suboption::Error::Missing("vhost_user=true"));
        }
        Ok(Self {
            socket: socket.ok_or(suboption::Error::Missing("socket="))?,
            mac: mac.map_or_else(Mac::random, Ok).map_err(|error| suboption::Error::Value {
                key: "mac".to_owned(),
                value: String::new(),
                reason: format!("no random address: {error}"),
            })?,
            pairs: pairs.unwrap_or(1),
            queue_size: queue_size.unwrap_or(256),
        })
    }
}

/// An Ethernet address of one station.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac(
    /// Its bytes as sent.
    pub [u8; 6],
);

impl Mac {
    /// A locally administered address nobody else is likely to have.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 6];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        bytes[0] = (bytes[0] & 0xfc) | 0x02;
        Ok(Self(bytes))
    }

    /// The address this many further on; the three bytes of the vendor stay.
    pub fn offset(self, by: u32) -> Self {
        let [a, b, c, d, e, f] = self.0;
        let [_, d, e, f] = u32::from_be_bytes([0, d, e, f]).wrapping_add(by).to_be_bytes();
        Self([a, b, c, d, e, f])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || "expected an address of one station such as 52:54:00:12:34:56".to_owned();
        let bytes: Vec<u8> = text
            .split(':')
            .map(|part| if part.len() == 2 { u8::from_str_radix(part, 16).ok() } else { None })
            .collect::<Option<_>>()
            .ok_or_else(expected)?;
        match <[u8; 6]>::try_from(bytes) {
            Ok(bytes) if bytes[0] & 1 == 0 && bytes != [0; 6] => Ok(Self(bytes)),
            _ => Err(expected()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_follow_keep_the_vendor() {
        let mac: Mac = "52:54:00:ff:ff:fe".parse().unwrap();
        assert_eq!(mac.offset(1).to_string(), "52:54:00:ff:ff:ff");
        assert_eq!(mac.offset(3).to_string(), "52:54:00:00:00:01");
    }

    #[test]
    fn options_are_cloud_hypervisors_words() {
        let options: NetOptions =
            "vhost_user=true,socket=/run/a.sock,mac=52:54:00:12:34:56,num_queues=4,queue_size=1024"
                .parse()
                .unwrap();
        assert_eq!((options.pairs, options.queue_size), (2, 1024));
        assert_eq!(options.mac, Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
        for bad in [
            "socket=/a",
            "vhost_user=true",
            "vhost_user=true,socket=/a,num_queues=3",
            "vhost_user=true,socket=/a,num_queues=0",
            "vhost_user=true,socket=/a,queue_size=100",
            "vhost_user=true,socket=/a,mac=01:00:00:00:00:00",
            "vhost_user=true,socket=/a,mac=2:0:0:0:0:1",
            "tap=tap0",
        ] {
            assert!(bad.parse::<NetOptions>().is_err(), "{bad}");
        }
    }

    #[test]
    fn random_addresses_are_local_and_differ() {
        let (first, second) = (Mac::random().unwrap(), Mac::random().unwrap());
        assert_eq!(first.0[0] & 3, 2);
        assert_ne!(first, second);
    }
}
