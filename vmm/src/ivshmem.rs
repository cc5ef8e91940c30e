//! The function in which a guest finds the FIFO region: what QEMU calls ivshmem-plain, so that one guest driver does
//! for both. BAR 2 is the region itself. KVM maps it where the guest put the BAR, and an access leaves the guest for
//! nothing; BAR 0 has the registers of an ivshmem device without interrupts, which do nothing.
//!
//! BAR 2 is prefetchable and above 4 GiB: with the memory types of [`crate::boot::mtrr`] a driver may map it write-back.

use crate::pci::bus::Function;
use crate::pci::config::{ConfigSpace, Identity, Mapping};
use crate::slot::Slot;

/// Bytes of BAR 0.
pub const REGISTERS_SIZE: u64 = 256;

const REGISTERS: usize = 0;
const MEMORY: usize = 2;

const IDENTITY: Identity = Identity {
    vendor: 0x1af4,
    device: 0x1110,
    revision: 1,
    class: 0x05_0000,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// Memory of the host as a PCI function.
#[derive(Debug)]
pub struct Ivshmem<S> {
    config: ConfigSpace,
    slot: S,
    /// Where the guest put BAR 2.
    address: Option<u64>,
}

impl<S: Slot> Ivshmem<S> {
    /// Shows the `size` bytes of `slot`, the BARs starting out at these addresses.
    pub fn new(slot: S, size: u64, registers_address: u64, memory_address: u64) -> Self {
        let mut config = ConfigSpace::new(IDENTITY);
        config.add_bar(REGISTERS, REGISTERS_SIZE, registers_address);
        config.add_bar(MEMORY, size, memory_address);
        Self { config, slot, address: None }
    }

    /// Moves the memory after the BAR.
    fn follow(&mut self) {
        let mapping = self.config.mappings().into_iter().find(|mapping| mapping.bar == MEMORY);
        let address = mapping.map(|mapping| mapping.start);
        if address == self.address {
            return;
        }
        self.address = address;
        // The guest can put it where RAM is, or beyond its address width: then nobody answers there.
        if let Err(error) = self.slot.place(address) {
            // Not for every log: the guest can have it written as often as it likes.
            tracing::debug!(
                "the FIFO region cannot be at the address {address:#x?} the guest chose: {error}"
            );
        }
    }
}

impl<S: Slot> Function for Ivshmem<S> {
    fn config_read(&mut self, offset: usize, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        self.follow();
    }

    fn mappings(&self) -> Vec<Mapping> {
        self.config.mappings()
    }

    fn bar_read(&mut self, bar: usize, _: u64, data: &mut [u8]) {
        data.fill(if bar == REGISTERS { 0 } else { 0xff });
    }

    fn bar_write(&mut self, _: usize, _: u64, _: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 2 << 20;
    const AT: u64 = 0x1_0020_0000;
    const COMMAND: usize = 0x04;
    const BAR_2: usize = 0x18;

    /// Where the memory was placed, one after the other; refuses addresses below 1 MiB.
    #[derive(Debug, Default)]
    struct Places(Vec<Option<u64>>);

    impl Slot for Places {
        fn place(&mut self, address: Option<u64>) -> Result<(), kvm_ioctls::Error> {
            self.0.push(address);
            match address {
                Some(..0x10_0000) => Err(kvm_ioctls::Error::new(libc::EEXIST)),
                _ => Ok(()),
            }
        }
    }

    fn function() -> Ivshmem<Places> {
        Ivshmem::new(Places::default(), SIZE, 0x1_0000_0000, AT)
    }

    fn dword(function: &mut Ivshmem<Places>, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        function.config_read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn a_guest_takes_it_for_qemus() {
        let mut function = function();
        assert_eq!(dword(&mut function, 0x00), 0x1110_1af4);
        assert_eq!(dword(&mut function, 0x08), 0x0500_0001);
        assert_eq!(dword(&mut function, 0x2c), 0x1100_1af4);
        assert_eq!(dword(&mut function, 0x34), 0, "no capability");
        assert_eq!(dword(&mut function, 0x3c), 0, "no interrupt");
        assert_eq!(dword(&mut function, BAR_2), AT as u32 | 0xc, "64-bit, prefetchable");
        assert_eq!(dword(&mut function, BAR_2 + 4), 1);
        function.config_write(BAR_2, &[0xff; 4]);
        assert_eq!(dword(&mut function, BAR_2) & !0xf, !(SIZE as u32 - 1));
    }

    #[test]
    fn the_memory_follows_the_bar_and_the_enable_bit() {
        let mut function = function();
        function.config_write(BAR_2, &[0, 0, 0x40, 0]);
        assert!(function.slot.0.is_empty(), "decoding is off");
        function.config_write(COMMAND, &[2, 0]);
        function.config_write(COMMAND, &[6, 0]);
        function.config_write(BAR_2, &[0, 0, 0x80, 0]);
        function.config_write(BAR_2 + 4, &[2, 0, 0, 0]);
        function.config_write(COMMAND, &[0, 0]);
        let [first, second, third] = [0x1_0040_0000, 0x1_0080_0000, 0x2_0080_0000].map(Some);
        assert_eq!(function.slot.0, [first, second, third, None]);
    }

    #[test]
    fn a_place_that_kvm_refuses_is_the_guests_loss() {
        let mut function = Ivshmem::new(Places::default(), 4096, 0x1_0000_0000, 0x4000);
        function.config_write(COMMAND, &[2, 0]);
        let mut data = [0; 4];
        function.bar_read(MEMORY, 0, &mut data);
        assert_eq!(data, [0xff; 4]);
        function.config_write(BAR_2, &[0, 0, 0x20, 0]);
        assert_eq!(function.slot.0, [Some(0x4000), Some(0x20_0000)]);
    }

    #[test]
    fn the_registers_read_as_zeros_and_take_nothing() {
        let mut function = function();
        let mut data = [0xaa; 8];
        function.bar_write(REGISTERS, 12, &[1; 4]);
        function.bar_read(REGISTERS, 8, &mut data);
        assert_eq!(data, [0; 8]);
    }

    proptest! {
        #[test]
        fn the_memory_is_where_the_bar_is_after_any_writes(
            writes in proptest::collection::vec((0usize..0x50, proptest::collection::vec(any::<u8>(), 0..9)), 0..64)
        ) {
            let mut function = function();
            for (offset, data) in writes {
                function.config_write(offset, &data);
                let bar = function.mappings().into_iter().find(|mapping| mapping.bar == MEMORY);
                prop_assert_eq!(function.slot.0.last().copied().flatten(), bar.map(|bar| bar.start));
            }
            prop_assert!(function.slot.0.windows(2).all(|pair| pair[0] != pair[1]));
        }
    }
}
