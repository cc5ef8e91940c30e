//! Configuration space of a passed-through function: a few registers are ours, the others are the function's.
//!
//! Ours are the BARs (the guest has addresses of its own), MSI and MSI-X (it has local APICs of its own), power management
//! (a function that the guest puts to sleep stops answering at its BARs, which would end the VM), and what the
//! function cannot have here: an expansion ROM, an interrupt pin, neighbours in its slot. Of the function's own registers the
//! kernel's VFIO decides what a guest may write. Extended configuration space, beyond 256 bytes, is not shown.

use super::hardware::Hardware;
use crate::pci::config::{ConfigSpace, Mapping, SIZE};

/// Capability id of power management.
const POWER_MANAGEMENT: u8 = 0x01;
/// Bytes of that capability.
const POWER_MANAGEMENT_SIZE: usize = 8;

/// Registers that are ours in every function: header type, BARs, expansion ROM, interrupt line and pin.
const OURS: [std::ops::Range<usize>; 4] = [0x0e..0x0f, 0x10..0x28, 0x30..0x34, 0x3c..0x3e];

/// What `ours` says of a byte that is the function's.
const FUNCTIONS: bool = false;

/// Configuration space as the guest has it.
#[derive(Debug)]
pub struct Config {
    space: ConfigSpace,
    ours: [bool; SIZE],
}

impl Config {
    /// That of `hardware`, with nothing of MSI and MSI-X kept back yet.
    pub fn new(hardware: &impl Hardware) -> Self {
        let mut bytes = [0; SIZE];
        hardware.config_read(0, &mut bytes);
        let mut config = Self { space: ConfigSpace::like(&bytes), ours: [FUNCTIONS; SIZE] };
        for range in OURS {
            config.ours[range].fill(true);
        }
        if let Some(at) = config.space.find_capability(POWER_MANAGEMENT) {
            config.keep(at, &[0; POWER_MANAGEMENT_SIZE]);
        }
        config
    }

    /// Our part of it.
    pub fn space(&mut self) -> &mut ConfigSpace {
        &mut self.space
    }

    /// Makes the bytes from `offset` on ours, in which the guest may change the bits of `writable`.
    pub fn keep(&mut self, offset: usize, writable: &[u8]) {
        let length = writable.len().min(SIZE.saturating_sub(offset));
        self.space.allow(offset, &writable[..length]);
        self.ours[offset..offset + length].fill(true);
    }

    /// Up to `length` bytes of our part.
    pub fn ours(&self, offset: usize, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.space.read(offset, &mut bytes);
        bytes
    }

    /// The guest reads.
    pub fn read(&self, hardware: &impl Hardware, offset: usize, data: &mut [u8]) {
        data.fill(0xff);
        let length = data.len().min(SIZE.saturating_sub(offset));
        let (data, _) = data.split_at_mut(length);
        if data.is_empty() {
            return;
        }
        hardware.config_read(offset, data);
        for (byte, at) in data.iter_mut().zip(offset..) {
            if self.ours[at] {
                self.space.read(at, std::slice::from_mut(byte));
            }
        }
    }

    /// The guest writes: what that means for our part.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        self.space.write(offset, data);
    }

    /// The guest writes: what of it goes to the function.
    pub fn forward(&self, hardware: &impl Hardware, offset: usize, data: &[u8]) {
        let length = data.len().min(SIZE.saturating_sub(offset));
        let mut start = 0;
        for run in self.ours.get(offset..offset + length).unwrap_or_default().chunk_by(|a, b| a == b) {
            let end = start + run.len();
            if run[0] == FUNCTIONS {
                hardware.config_write(offset + start, &data[start..end]);
            }
            start = end;
        }
    }

    /// Where the BARs are now.
    pub fn mappings(&self) -> Vec<Mapping> {
        self.space.mappings()
    }
}
