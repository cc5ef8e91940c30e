//! The bus: configuration accesses, by port or through ECAM, and memory accesses find their function here.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::config::{ConfigSpace, Identity, Mapping};

/// Functions sit at function 0 of slots 0 to 31.
pub const SLOTS: usize = 32;
/// Bytes of configuration space a function has in ECAM.
const ECAM_FUNCTION: u64 = 4096;
/// First and last of the ports that give access to configuration space.
pub const CONFIG_PORTS: std::ops::RangeInclusive<u16> = 0xcf8..=0xcff;

const CONFIG_DATA: u16 = 0xcfc;
const CONFIG_ENABLE: u32 = 1 << 31;

/// A function on the bus. Offsets and lengths come from the guest and may be anything.
pub trait Function: Send {
    /// A read of configuration space.
    fn config_read(&mut self, offset: usize, data: &mut [u8]);
    /// A write of configuration space.
    fn config_write(&mut self, offset: usize, data: &[u8]);
    /// Where the BARs are now.
    fn mappings(&self) -> Vec<Mapping>;
    /// A read of a BAR.
    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]);
    /// A write of a BAR.
    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]);
}

/// The host bridge, which is only there to be seen.
#[derive(Debug)]
struct HostBridge(ConfigSpace);

impl HostBridge {
    fn new() -> Self {
        // The generic PCI Express host bridge of QEMU: no driver binds to it, none needs to.
        Self(ConfigSpace::new(Identity {
            vendor: 0x1b36,
            device: 0x0008,
            class: 0x06_0000,
            ..Default::default()
        }))
    }
}

impl Function for HostBridge {
    fn config_read(&mut self, offset: usize, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn config_write(&mut self, offset: usize, data: &[u8]) {
        self.0.write(offset, data);
    }
    fn mappings(&self) -> Vec<Mapping> {
        Vec::new()
    }
    fn bar_read(&mut self, _: usize, _: u64, _: &mut [u8]) {}
    fn bar_write(&mut self, _: usize, _: u64, _: &[u8]) {}
}

type Shared = Arc<Mutex<dyn Function>>;

/// One BAR of one function, as memory accesses look it up.
struct Window {
    slot: usize,
    mapping: Mapping,
}

/// Bus 0.
pub struct Bus {
    functions: Vec<Shared>,
    /// Kept apart from the functions, so that an access to one never waits for another one's lock.
    windows: RwLock<Vec<Window>>,
    config_address: Mutex<u32>,
}

impl Default for Bus {
    fn default() -> Self {
        Self {
            functions: vec![Arc::new(Mutex::new(HostBridge::new()))],
            windows: RwLock::default(),
            config_address: Mutex::default(),
        }
    }
}

/// The bus is full.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the PCI bus has no free slot for another device; give at most {} devices", SLOTS - 1)]
pub struct Full;

impl Bus {
    /// Puts a function into the next free slot.
    pub fn add(&mut self, function: Arc<Mutex<dyn Function>>) -> Result<usize, Full> {
        if self.functions.len() == SLOTS {
            return Err(Full);
        }
        self.functions.push(function);
        Ok(self.functions.len() - 1)
    }

    /// A read of one of [`CONFIG_PORTS`].
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        let address = *lock(&self.config_address);
        if port < CONFIG_DATA {
            let bytes = address.to_le_bytes();
            let at = usize::from(port - CONFIG_PORTS.start());
            for (index, byte) in data.iter_mut().enumerate() {
                *byte = bytes.get(at + index).copied().unwrap_or(0xff);
            }
            return;
        }
        match selected(address, port) {
            Some((slot, offset)) => self.config_read(slot, offset, data),
            None => data.fill(0xff),
        }
    }

    /// A write of one of [`CONFIG_PORTS`].
    pub fn port_write(&self, port: u16, data: &[u8]) {
        if port == *CONFIG_PORTS.start()
            && let Ok(bytes) = data.try_into()
        {
            *lock(&self.config_address) = u32::from_le_bytes(bytes);
        } else if port >= CONFIG_DATA
            && let Some((slot, offset)) = selected(*lock(&self.config_address), port)
        {
            self.config_write(slot, offset, data);
        }
    }

    /// A read of ECAM, `offset` bytes from its start.
    pub fn ecam_read(&self, offset: u64, data: &mut [u8]) {
        match ecam_target(offset) {
            Some((slot, offset)) => self.config_read(slot, offset, data),
            None => data.fill(0xff),
        }
    }

    /// A write of ECAM.
    pub fn ecam_write(&self, offset: u64, data: &[u8]) {
        if let Some((slot, offset)) = ecam_target(offset) {
            self.config_write(slot, offset, data);
        }
    }

    fn config_read(&self, slot: usize, offset: usize, data: &mut [u8]) {
        match self.functions.get(slot) {
            Some(function) if data.len() <= 8 => lock(function).config_read(offset, data),
            _ => data.fill(0xff),
        }
    }

    fn config_write(&self, slot: usize, offset: usize, data: &[u8]) {
        let Some(function) = self.functions.get(slot) else { return };
        if data.len() > 8 {
            return;
        }
        let mut function = lock(function);
        let before = function.mappings();
        function.config_write(offset, data);
        let after = function.mappings();
        if before != after {
            let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
            windows.retain(|window| window.slot != slot);
            windows.extend(after.into_iter().map(|mapping| Window { slot, mapping }));
        }
    }

    /// A read of memory outside RAM; ones where no BAR answers.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        match self.bar_at(address, data.len()) {
            Some((function, bar, offset)) => lock(function).bar_read(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    /// A write of memory outside RAM; lost where no BAR answers.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        if let Some((function, bar, offset)) = self.bar_at(address, data.len()) {
            lock(function).bar_write(bar, offset, data);
        }
    }

    /// The function and the place in its BAR that holds all `length` bytes from `address` on.
    fn bar_at(&self, address: u64, length: usize) -> Option<(&Shared, usize, u64)> {
        let windows = self.windows.read().unwrap_or_else(PoisonError::into_inner);
        windows.iter().find_map(|Window { slot, mapping }| {
            let offset = address.checked_sub(mapping.start)?;
            let end = offset.checked_add(length as u64)?;
            (end <= mapping.size).then(|| (&self.functions[*slot], mapping.bar, offset))
        })
    }
}

/// Slot and offset that the address port selects; nothing on other buses and functions.
fn selected(address: u32, port: u16) -> Option<(usize, usize)> {
    let (bus, slot, function) = (address >> 16 & 0xff, address >> 11 & 0x1f, address >> 8 & 7);
    let offset = (address & 0xfc) as usize + usize::from(port - CONFIG_DATA);
    (address & CONFIG_ENABLE != 0 && bus == 0 && function == 0).then_some((slot as usize, offset))
}

fn ecam_target(offset: u64) -> Option<(usize, usize)> {
    let function = offset / ECAM_FUNCTION;
    (function.is_multiple_of(8) && function / 8 < SLOTS as u64)
        .then_some(((function / 8) as usize, (offset % ECAM_FUNCTION) as usize))
}

/// A function that panicked while it held its lock is a bug, but not a reason to take the other vCPUs down as well.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Echo {
        space: ConfigSpace,
        last: Option<(u64, Vec<u8>)>,
    }

    impl Function for Echo {
        fn config_read(&mut self, offset: usize, data: &mut [u8]) {
            self.space.read(offset, data);
        }
        fn config_write(&mut self, offset: usize, data: &[u8]) {
            self.space.write(offset, data);
        }
        fn mappings(&self) -> Vec<Mapping> {
            self.space.mappings()
        }
        fn bar_read(&mut self, _: usize, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn bar_write(&mut self, _: usize, offset: u64, data: &[u8]) {
            assert!(offset + data.len() as u64 <= 0x1000);
            self.last = Some((offset, data.to_vec()));
        }
    }

    fn bus() -> (Bus, Arc<Mutex<Echo>>) {
        let mut space = ConfigSpace::new(Identity { vendor: 0x1af4, device: 0x1041, ..Default::default() });
        space.add_bar(0, 0x1000, 0x2_0000_0000);
        let echo = Arc::new(Mutex::new(Echo { space, last: None }));
        let mut bus = Bus::default();
        assert_eq!(bus.add(Arc::clone(&echo) as Arc<Mutex<dyn Function>>), Ok(1));
        (bus, echo)
    }

    fn port_dword(bus: &Bus, address: u32) -> u32 {
        bus.port_write(0xcf8, &address.to_le_bytes());
        let mut data = [0; 4];
        bus.port_read(0xcfc, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn both_ways_to_configuration_space_agree() {
        let (bus, _) = bus();
        assert_eq!(port_dword(&bus, 0x8000_0000), 0x0008_1b36);
        assert_eq!(port_dword(&bus, 0x8000_0800), 0x1041_1af4);
        assert_eq!(port_dword(&bus, 0x8000_1000), u32::MAX, "empty slot");
        assert_eq!(port_dword(&bus, 0x8000_0900), u32::MAX, "function 1");
        assert_eq!(port_dword(&bus, 0x8001_0000), u32::MAX, "bus 1");
        assert_eq!(port_dword(&bus, 0x0000_0000), u32::MAX, "not enabled");
        let mut data = [0; 4];
        bus.ecam_read(0x8000, &mut data);
        assert_eq!(data, 0x1041_1af4u32.to_le_bytes());
        let mut half = [0; 2];
        bus.port_write(0xcf8, &0x8000_0800u32.to_le_bytes());
        bus.port_read(0xcfe, &mut half);
        assert_eq!(half, 0x1041u16.to_le_bytes());
    }

    #[test]
    fn memory_follows_the_bar() {
        let (bus, echo) = bus();
        let mut data = [0; 2];
        bus.memory_read(0x2_0000_0010, &mut data);
        assert_eq!(data, [0xff; 2], "decoding is off");
        bus.ecam_write(0x8004, &[2, 0]);
        bus.memory_read(0x2_0000_0010, &mut data);
        assert_eq!(data, [0x10; 2]);
        bus.ecam_write(0x8010, &0xd000_0000u32.to_le_bytes());
        bus.ecam_write(0x8014, &0u32.to_le_bytes());
        bus.memory_write(0xd000_0ffe, &[1, 2]);
        assert_eq!(lock(&echo).last, Some((0xffe, vec![1, 2])));
        bus.memory_write(0xd000_0fff, &[3, 4]);
        assert_eq!(lock(&echo).last, Some((0xffe, vec![1, 2])), "across the end: nobody answers");
    }

    #[test]
    fn the_bus_fills_up() {
        let (mut bus, echo) = bus();
        for _ in 2..SLOTS {
            bus.add(Arc::clone(&echo) as Arc<Mutex<dyn Function>>).unwrap();
        }
        assert_eq!(bus.add(echo), Err(Full));
    }

    proptest! {
        #[test]
        fn no_access_panics(
            accesses in proptest::collection::vec((0u8..6, any::<u64>(), proptest::collection::vec(any::<u8>(), 0..16)), 0..64)
        ) {
            let (bus, _) = bus();
            bus.ecam_write(0x8004, &[2, 0]);
            for (kind, address, mut data) in accesses {
                let near = 0x2_0000_0000 + address % 0x1010;
                match kind {
                    0 => bus.port_read(0xcf8 + (address % 8) as u16, &mut data),
                    1 => bus.port_write(0xcf8 + (address % 8) as u16, &data),
                    2 => bus.ecam_read(address % (1 << 21), &mut data),
                    3 => bus.ecam_write(address % (1 << 21), &data),
                    4 => bus.memory_read(near, &mut data),
                    _ => bus.memory_write(near, &data),
                }
            }
        }
    }
}
