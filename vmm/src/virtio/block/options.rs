//! The words of `--disk`.

use std::path::PathBuf;
use std::str::FromStr;

use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

use crate::suboption::{self, SubOptions};

/// Most queues a disk may have.
pub const MAX_QUEUES: u16 = 64;

/// `--disk path=PATH[,readonly=on|off][,direct=on|off][,num_queues=N][,queue_size=256][,serial=TEXT]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskOptions {
    /// The raw image, or a block device.
    pub path: PathBuf,
    /// Whether the guest may only read.
    pub readonly: bool,
    /// Whether the host's page cache is left out.
    pub direct: bool,
    /// Queues; as many as there are vCPUs if not given.
    pub queues: Option<u16>,
    /// Entries of each queue.
    pub queue_size: u16,
    /// What the guest reads as the disk's serial number.
    pub serial: Option<String>,
}

impl FromStr for DiskOptions {
    type Err = suboption::Error;

    fn from_str(text: &str) -> Result<Self, suboption::Error> {
        let mut options = SubOptions::parse(text)?;
        let path = options.take_with("path", |value| {
            if value.is_empty() { Err("expected a file".to_owned()) } else { Ok(PathBuf::from(value)) }
        })?;
        let readonly = options.take_switch("readonly")?;
        let direct = options.take_switch("direct")?;
        let queues = options.take_with("num_queues", |value| match value.parse() {
            Ok(queues) if (1..=MAX_QUEUES).contains(&queues) => Ok(queues),
            _ => Err(format!("expected a number from 1 to {MAX_QUEUES}")),
        })?;
        let queue_size = options.take_with("queue_size", |value| match value.parse::<u16>() {
            Ok(size) if size.is_power_of_two() && (16..=1024).contains(&size) => Ok(size),
            _ => Err("expected a power of two from 16 to 1024".to_owned()),
        })?;
        let serial = options.take_with("serial", |value| {
            let longest = VIRTIO_BLK_ID_BYTES as usize;
            if (1..=longest).contains(&value.len()) && value.bytes().all(|byte| byte.is_ascii_graphic()) {
                Ok(value.to_owned())
            } else {
                Err(format!("expected 1 to {longest} printable ASCII characters"))
            }
        })?;
        options.finish()?;
        Ok(Self {
            path: path.ok_or(suboption::Error::Missing("path="))?,
            readonly: readonly.unwrap_or(false),
            direct: direct.unwrap_or(false),
            queues,
            queue_size: queue_size.unwrap_or(256),
            serial,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_cloud_hypervisors_words() {
        let options: DiskOptions =
            "path=/a.raw,readonly=on,direct=on,num_queues=4,queue_size=128,serial=root".parse().unwrap();
        let expected = DiskOptions {
            path: "/a.raw".into(),
            readonly: true,
            direct: true,
            queues: Some(4),
            queue_size: 128,
            serial: Some("root".into()),
        };
        assert_eq!(options, expected);
        let plain: DiskOptions = "path=a".parse().unwrap();
        assert_eq!((plain.readonly, plain.direct, plain.queues, plain.queue_size), (false, false, None, 256));
        for bad in [
            "",
            "path=",
            "readonly=on",
            "path=a,num_queues=0",
            "path=a,num_queues=65",
            "path=a,queue_size=100",
            "path=a,serial=more-than-twenty-bytes",
            "path=a,serial=a b",
            "path=a,format=qcow2",
        ] {
            assert!(bad.parse::<DiskOptions>().is_err(), "{bad}");
        }
    }
}
