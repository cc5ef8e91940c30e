//! The devices a vCPU reaches by leaving the guest, by port or by address. Nothing of a packet's way is here.

use std::sync::Arc;

use crate::memory::{ECAM_SIZE, ECAM_START};
use crate::pci::bus::{Bus, CONFIG_PORTS};
use crate::power::{self, Ending};
use crate::serial;

const SERIAL_LAST: u16 = serial::PORT + serial::PORTS - 1;

/// All of them.
#[derive(Default)]
pub struct Devices {
    /// COM1, unless it is off.
    pub serial: Option<Arc<serial::Port>>,
    /// The PCI bus.
    pub pci: Bus,
}

impl Devices {
    /// An IN instruction; what nobody answers reads as ones.
    pub fn port_in(&self, port: u16, data: &mut [u8]) {
        match (port, &self.serial) {
            (serial::PORT..=SERIAL_LAST, Some(serial)) => serial.read((port - serial::PORT) as u8, data),
            (port, _) if CONFIG_PORTS.contains(&port) => self.pci.port_read(port, data),
            // The keyboard controller is always ready for a command: Linux waits for that before it sends the reset.
            (power::SLEEP_STATUS_PORT | power::KEYBOARD_PORT, _) => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    /// An OUT instruction; says if it ends the VM.
    pub fn port_out(&self, port: u16, data: &[u8]) -> Option<Ending> {
        if let [value] = data
            && let Some(ending) = power::port_written(port, *value)
        {
            return Some(ending);
        }
        match (port, &self.serial) {
            (serial::PORT..=SERIAL_LAST, Some(serial)) => serial.write((port - serial::PORT) as u8, data),
            (port, _) if CONFIG_PORTS.contains(&port) => self.pci.port_write(port, data),
            _ => {}
        }
        None
    }

    /// A read of an address that is no RAM.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match address.checked_sub(ECAM_START) {
            Some(offset) if offset < ECAM_SIZE => self.pci.ecam_read(offset, data),
            _ => self.pci.memory_read(address, data),
        }
    }

    /// A write of an address that is no RAM.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        match address.checked_sub(ECAM_START) {
            Some(offset) if offset < ECAM_SIZE => self.pci.ecam_write(offset, data),
            _ => self.pci.memory_write(address, data),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_answers_reads_as_ones() {
        let devices = Devices::default();
        for port in [0x20u16, 0x3f8, 0x60, 0xffff] {
            let mut data = [0; 4];
            devices.port_in(port, &mut data);
            assert_eq!(data, [0xff; 4], "{port:#x}");
        }
        let mut data = [0; 8];
        devices.mmio_read(u64::MAX, &mut data);
        assert_eq!(data, [0xff; 8]);
        devices.mmio_write(0, &data);
    }

    #[test]
    fn the_host_bridge_is_seen_both_ways() {
        let devices = Devices::default();
        let (mut by_port, mut by_memory) = ([0; 4], [0; 4]);
        assert_eq!(devices.port_out(0xcf8, &0x8000_0000u32.to_le_bytes()), None);
        devices.port_in(0xcfc, &mut by_port);
        devices.mmio_read(ECAM_START, &mut by_memory);
        assert_eq!((by_port, by_memory), ([0x36, 0x1b, 8, 0], [0x36, 0x1b, 8, 0]));
    }

    #[test]
    fn the_reset_register_is_one_byte_between_the_configuration_ports() {
        let devices = Devices::default();
        assert_eq!(devices.port_out(0xcf9, &[6]), Some(Ending::Reboot));
        assert_eq!(devices.port_out(0xcf8, &[6, 6, 6, 6]), None);
    }
}
