//! The entropy device: virtio-rng, which fills the guest's buffers from a file of the host's.
//!
//! A request is answered on the thread of the vCPU that made it: reading /dev/urandom never blocks, and requests are few.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::str::FromStr;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::Bytes;

use super::ring::Ring;
use super::{Activation, Device};
use crate::memory::GuestMemory;
use crate::suboption::{self, SubOptions};

/// "Other system peripheral", as QEMU has it.
const CLASS_OTHER: u32 = 0x00_ff00;
const QUEUE_SIZE: u16 = 64;
/// Most bytes a request gets; the driver asks again for more.
const MOST: usize = 4096;

/// `--rng src=PATH` or `--rng off`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RngOptions {
    /// Where randomness comes from; nothing for no device.
    pub source: Option<PathBuf>,
}

impl FromStr for RngOptions {
    type Err = suboption::Error;

    fn from_str(text: &str) -> Result<Self, suboption::Error> {
        if text == "off" {
            return Ok(Self { source: None });
        }
        let mut options = SubOptions::parse(text)?;
        let source: Option<PathBuf> = options.take("src")?;
        options.finish()?;
        Ok(Self { source: Some(source.ok_or(suboption::Error::Missing("src="))?) })
    }
}

/// What can go wrong with the source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be opened.
    #[error("cannot open the source of randomness {path}; /dev/urandom is there on every host")]
    Open {
        /// Its path.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// It is something that may end, or block for ever.
    #[error("the source of randomness {0} is no character device; give one, such as /dev/urandom")]
    NotADevice(PathBuf),
}

/// The device.
pub struct Rng {
    source: File,
    memory: GuestMemory,
    ring: Option<Ring>,
    complained: bool,
}

impl Rng {
    /// Opens the source.
    pub fn new(path: PathBuf, memory: GuestMemory) -> Result<Self, Error> {
        // A pipe would block until somebody writes to it.
        let opened =
            OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(&path);
        let checked = opened.and_then(|file| {
            let kind = file.metadata()?.file_type();
            fcntl(&file, FcntlArg::F_SETFL(OFlag::empty()))?;
            Ok((file, kind))
        });
        match checked {
            Ok((source, kind)) if kind.is_char_device() => {
                Ok(Self { source, memory, ring: None, complained: false })
            }
            Ok(_) => Err(Error::NotADevice(path)),
            Err(source) => Err(Error::Open { path, source }),
        }
    }

    fn serve(&mut self) -> Result<(), virtio_queue::Error> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        // One kick, no more than a queue holds: what comes meanwhile comes with a kick of its own.
        for _ in 0..ring.size() {
            let Some(chain) = ring.pop(&self.memory)? else { break };
            let head = chain.head_index();
            let mut written = 0;
            // No chain is longer than its queue, as no tables are offered; the guest may make one of 65535 all the same.
            for piece in chain.take(usize::from(QUEUE_SIZE)).filter(|piece| piece.is_write_only()) {
                let mut bytes = [0; MOST];
                let wanted = &mut bytes[..(piece.len() as usize).min(MOST - written)];
                let count = self.source.read(wanted).unwrap_or_else(|error| {
                    if !std::mem::replace(&mut self.complained, true) {
                        tracing::warn!("the source of randomness fails: {error}");
                    }
                    0
                });
                // The driver reads `written` bytes from the first one on, so there is no going on behind a gap.
                if self.memory.write_slice(&wanted[..count], piece.addr()).is_err() {
                    break;
                }
                written += count;
                if count < piece.len() as usize {
                    break;
                }
            }
            ring.add_used(&self.memory, head, written as u32)?;
        }
        ring.notify(&self.memory)
    }
}

impl Device for Rng {
    fn id(&self) -> u16 {
        VIRTIO_ID_RNG as u16
    }

    fn class(&self) -> u32 {
        CLASS_OTHER
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) {
        let Activation { features, queues, .. } = activation;
        self.ring = queues.into_iter().next().and_then(|queue| Ring::new(queue, features).ok());
    }

    fn serves(&self, _: u16) -> bool {
        true
    }

    fn kicked(&mut self, _: u16) {
        if let Err(error) = self.serve() {
            tracing::info!("the queue of the entropy device stops: {error}");
            self.ring = None;
        }
    }

    fn reset(&mut self) {
        self.ring = None;
    }
}

#[cfg(test)]
mod tests {
    use super::super::ring::tests::{BUFFERS, Driver};
    use super::*;

    #[test]
    fn requests_are_filled_and_bounded() {
        let mut driver = Driver::new();
        let mut rng = Rng::new("/dev/urandom".into(), driver.memory.clone()).unwrap();
        rng.activate(driver.activation(1));
        driver.offer(0, &[(BUFFERS, 64, true)]);
        driver.offer(0, &[(BUFFERS + 0x1000, 0x3000, true)]);
        driver.offer(0, &[(BUFFERS, 64, false)]);
        driver.offer(0, &[(u64::MAX, 64, true)]);
        rng.kicked(0);
        assert_eq!(driver.used(0), [64, MOST as u32, 0, 0]);
        assert_ne!(driver.read(BUFFERS, 64), vec![0; 64]);
        assert!(driver.interrupted(0));
        rng.reset();
        driver.offer(0, &[(BUFFERS, 64, true)]);
        rng.kicked(0);
        assert_eq!(driver.used(0).len(), 4);
    }

    #[test]
    fn a_table_is_read_no_further_than_a_queue_is_long() {
        let mut driver = Driver::new();
        let mut rng = Rng::new("/dev/urandom".into(), driver.memory.clone()).unwrap();
        rng.activate(driver.activation(1));
        // A table of 1000 pieces in the place of the one descriptor.
        for index in 0..1000u16 {
            let piece = [
                &BUFFERS.to_le_bytes()[..],
                &1u32.to_le_bytes()[..],
                &3u16.to_le_bytes(),
                &(index + 1).to_le_bytes(),
            ];
            driver.write(BUFFERS + 0x4000 + 16 * u64::from(index), &piece.concat());
        }
        driver.offer(0, &[(BUFFERS + 0x4000, 16_000, false)]);
        driver.write(0x1000 + 12, &4u16.to_le_bytes());
        rng.kicked(0);
        assert_eq!(driver.used(0), [u32::from(QUEUE_SIZE)]);
    }

    #[test]
    fn only_devices_are_sources() {
        let source = |path: &str| Rng::new(path.into(), Driver::new().memory).map(drop);
        assert!(matches!(source("/nonexistent"), Err(Error::Open { .. })));
        for path in ["/", "/etc/passwd"] {
            assert!(matches!(source(path), Err(Error::NotADevice(_))));
        }
        assert_eq!("off".parse(), Ok(RngOptions { source: None }));
        assert_eq!("src=/dev/hwrng".parse(), Ok(RngOptions { source: Some("/dev/hwrng".into()) }));
        for bad in ["", "on", "source=/dev/urandom"] {
            assert!(bad.parse::<RngOptions>().is_err(), "{bad}");
        }
    }
}
