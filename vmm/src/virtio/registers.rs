//! The common configuration of the virtio PCI transport: the registers a driver programs, and in which order it may.
//!
//! The states are those of the standard: reset, driver present, features agreed, running. A queue's registers can be
//! written only before it is enabled, and nothing of any queue after DRIVER_OK: the device works on a copy made at that
//! moment, so a driver that rewrites a ring's address under a running device cannot reach anything.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};

use super::ConfigChange;

/// Bytes of the structure.
pub const SIZE: usize = 0x38;
/// The vector number that means no interrupt.
pub const NO_VECTOR: u16 = 0xffff;

const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
/// Bits the driver may set; NEEDS_RESET is the device's.
const DRIVER_STATUS: u8 = 0x8f;

/// Registers of one queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueRegisters {
    /// The size the device offers.
    pub max_size: u16,
    /// The size the driver chose.
    pub size: u16,
    /// MSI-X vector, or [`NO_VECTOR`].
    pub vector: u16,
    /// Whether the driver enabled it.
    pub enabled: bool,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            vector: NO_VECTOR,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
        }
    }

    /// Address and length of descriptor table, available ring and used ring, event words included; nothing if size or
    /// alignment are not what the standard wants.
    pub fn areas(&self) -> Option<[(u64, u64); 3]> {
        let size = u64::from(self.size);
        let aligned = self.descriptors.is_multiple_of(16)
            && self.available.is_multiple_of(2)
            && self.used.is_multiple_of(4);
        (self.size.is_power_of_two() && self.size <= self.max_size && aligned).then_some([
            (self.descriptors, 16 * size),
            (self.available, 6 + 2 * size),
            (self.used, 6 + 8 * size),
        ])
    }
}

/// What a write asks the transport to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// The driver is ready: start the device.
    Activate,
    /// The driver gives up: stop the device, then call [`Registers::reset`].
    Reset,
}

/// The registers of a device.
#[derive(Debug)]
pub struct Registers {
    offered: u64,
    vectors: u16,
    driver_features: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    config_vector: u16,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

impl Registers {
    /// A device that offers these features and queues, with this many MSI-X vectors.
    pub fn new(offered: u64, queue_sizes: &[u16], vectors: u16) -> Self {
        Self {
            offered: offered | 1 << VIRTIO_F_VERSION_1,
            vectors,
            driver_features: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            config_vector: NO_VECTOR,
            status: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(|&size| QueueRegisters::new(size)).collect(),
        }
    }

    /// Back to the state of a device nobody uses.
    pub fn reset(&mut self) {
        let sizes: Vec<_> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self::new(self.offered, &sizes, self.vectors);
    }

    /// Features the driver accepted, and the device offered.
    pub fn features(&self) -> u64 {
        self.driver_features & self.offered
    }

    /// The vector of configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// All queues.
    pub fn queues(&self) -> &[QueueRegisters] {
        &self.queues
    }

    /// Whether the driver said DRIVER_OK.
    pub fn is_running(&self) -> bool {
        self.status & DRIVER_OK != 0
    }

    /// The driver reads; generation and NEEDS_RESET come from the device.
    pub fn read(&self, offset: usize, data: &mut [u8], device: &ConfigChange) {
        let image = self.image(device);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = offset.checked_add(index).and_then(|at| image.get(at)).copied().unwrap_or(0);
        }
    }

    /// The structure as the driver sees it now.
    fn image(&self, device: &ConfigChange) -> [u8; SIZE] {
        let needs_reset = if device.needs_reset() { NEEDS_RESET } else { 0 };
        let mut image = [0; SIZE];
        let mut put =
            |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(0x04, &half(self.offered, self.device_feature_select).to_le_bytes());
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(0x0c, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(0x10, &self.config_vector.to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.status | needs_reset, device.generation()]);
        put(0x16, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1a, &queue.vector.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            // Each queue has a notify address of its own, in the order of their numbers.
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.available.to_le_bytes());
            put(0x30, &queue.used.to_le_bytes());
        }
        image
    }

    /// The driver writes. Registers take accesses of their own width, and the 64-bit ones of their halves; anything else
    /// is ignored, and so is what comes at the wrong time.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Action {
        let value = data.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = value as u32,
            (0x08, 4) => self.driver_feature_select = value as u32,
            (0x0c, 4) if self.status & (FEATURES_OK | DRIVER_OK) == 0 => self.accept_features(value as u32),
            (0x10, 2) if !self.is_running() => self.config_vector = self.checked_vector(value as u16),
            (0x14, 1) => return self.write_status(value as u8),
            (0x16, 2) => self.queue_select = value as u16,
            (0x18..SIZE, 2 | 4 | 8) if data.len() <= 8 => self.write_queue(offset, data.len(), value),
            _ => {}
        }
        Action::None
    }

    fn accept_features(&mut self, value: u32) {
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
            1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    fn write_status(&mut self, value: u8) -> Action {
        if value == 0 {
            return Action::Reset;
        }
        let mut status = self.status | (value & DRIVER_STATUS);
        let agreed = self.driver_features & !self.offered == 0
            && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0;
        if !agreed {
            // The driver reads the bit back to see whether its features were accepted.
            status &= !FEATURES_OK;
        }
        if status & FEATURES_OK == 0 {
            status &= !DRIVER_OK;
        }
        let starts = status & !self.status & DRIVER_OK != 0;
        self.status = status;
        if starts { Action::Activate } else { Action::None }
    }

    fn write_queue(&mut self, offset: usize, length: usize, value: u64) {
        if self.is_running() {
            return;
        }
        let vector = self.checked_vector(value as u16);
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)).filter(|queue| !queue.enabled)
        else {
            return;
        };
        match (offset, length) {
            (0x18, 2) => queue.size = value as u16,
            (0x1a, 2) => queue.vector = vector,
            (0x1c, 2) => queue.enabled = value == 1,
            (0x20 | 0x24, _) => write_address(&mut queue.descriptors, offset - 0x20, length, value),
            (0x28 | 0x2c, _) => write_address(&mut queue.available, offset - 0x28, length, value),
            (0x30 | 0x34, _) => write_address(&mut queue.used, offset - 0x30, length, value),
            _ => {}
        }
    }

    /// A vector that is not there reads back as none, which is how the driver learns of it.
    fn checked_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors { vector } else { NO_VECTOR }
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn write_address(register: &mut u64, at: usize, length: usize, value: u64) {
    match (at, length) {
        (0, 8) => *register = value,
        (0, 4) => *register = *register & !0xffff_ffff | value,
        (4, 4) => *register = *register & 0xffff_ffff | value << 32,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

    fn registers() -> Registers {
        Registers::new(0b1010, &[256, 256, 64], 4)
    }

    fn get(registers: &Registers, offset: usize, length: usize) -> u64 {
        let mut data = [0; 8];
        let device = ConfigChange::default();
        device.announce();
        registers.read(offset, &mut data[..length], &device);
        u64::from_le_bytes(data)
    }

    fn set(registers: &mut Registers, offset: usize, length: usize, value: u64) -> Action {
        registers.write(offset, &value.to_le_bytes()[..length])
    }

    fn accept(registers: &mut Registers, features: u64) {
        for select in 0..2 {
            set(registers, 0x08, 4, select);
            set(registers, 0x0c, 4, features >> (32 * select) & 0xffff_ffff);
        }
    }

    #[test]
    fn a_driver_comes_up_step_by_step() {
        let mut r = registers();
        assert_eq!(set(&mut r, 0x14, 1, 0x0), Action::Reset);
        set(&mut r, 0x14, 1, 0x3);
        set(&mut r, 0x00, 4, 1);
        assert_eq!(get(&r, 0x04, 4), 1, "VERSION_1 is always offered");
        accept(&mut r, VERSION_1 | 0b10);
        set(&mut r, 0x14, 1, 0xb);
        assert_eq!(get(&r, 0x14, 1), 0xb);
        set(&mut r, 0x16, 2, 2);
        assert_eq!(get(&r, 0x18, 2), 64);
        assert_eq!(get(&r, 0x1e, 2), 2);
        set(&mut r, 0x18, 2, 32);
        set(&mut r, 0x1a, 2, 3);
        set(&mut r, 0x20, 8, 0x1_0000_1000);
        set(&mut r, 0x28, 4, 0x2000);
        set(&mut r, 0x30, 4, 0x3000);
        set(&mut r, 0x34, 4, 1);
        set(&mut r, 0x1c, 2, 1);
        assert_eq!(set(&mut r, 0x14, 1, 0xf), Action::Activate);
        assert_eq!(set(&mut r, 0x14, 1, 0xf), Action::None, "only once");
        let queue = &r.queues()[2];
        assert_eq!((queue.vector, queue.enabled), (3, true));
        assert_eq!(queue.areas(), Some([(0x1_0000_1000, 512), (0x2000, 70), (0x1_0000_3000, 262)]));
        assert_eq!(get(&r, 0x15, 1), 1);
        assert_eq!(r.features(), VERSION_1 | 0b10);
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        for wrong in [VERSION_1 | 0b100, 0b10, 0] {
            let mut r = registers();
            accept(&mut r, wrong);
            assert_eq!(set(&mut r, 0x14, 1, 0xf), Action::None);
            assert_eq!(get(&r, 0x14, 1) & 0xc, 0, "neither FEATURES_OK nor DRIVER_OK for {wrong:#x}");
        }
    }

    #[test]
    fn features_are_fixed_once_agreed() {
        let mut r = registers();
        accept(&mut r, VERSION_1 | 0b1000);
        set(&mut r, 0x14, 1, 0xb);
        accept(&mut r, VERSION_1 | 0b10);
        assert_eq!(r.features(), VERSION_1 | 0b1000);
    }

    #[test]
    fn rings_cannot_be_moved_after_driver_ok() {
        let mut r = registers();
        accept(&mut r, VERSION_1);
        set(&mut r, 0x20, 8, 0x1000);
        set(&mut r, 0x1c, 2, 1);
        set(&mut r, 0x20, 8, 0x9000);
        assert_eq!(r.queues()[0].descriptors, 0x1000, "enabled");
        set(&mut r, 0x14, 1, 0xf);
        let before = r.queues().to_vec();
        for select in 0..3 {
            set(&mut r, 0x16, 2, select);
            for offset in (0x18..SIZE).step_by(2) {
                for length in [2, 4, 8] {
                    set(&mut r, offset, length, 0x4242_4242_4242_4242);
                }
            }
        }
        assert_eq!(r.queues(), before);
    }

    #[test]
    fn sizes_and_alignments_are_checked() {
        let base =
            QueueRegisters { size: 8, descriptors: 16, available: 2, used: 4, ..QueueRegisters::new(256) };
        assert!(base.areas().is_some());
        for wrong in [
            QueueRegisters { size: 0, ..base.clone() },
            QueueRegisters { size: 7, ..base.clone() },
            QueueRegisters { size: 512, ..base.clone() },
            QueueRegisters { descriptors: 8, ..base.clone() },
            QueueRegisters { available: 1, ..base.clone() },
            QueueRegisters { used: 2, ..base.clone() },
        ] {
            assert_eq!(wrong.areas(), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_vector_that_is_not_there_reads_back_as_none() {
        let mut r = registers();
        set(&mut r, 0x10, 2, 4);
        assert_eq!(get(&r, 0x10, 2), 0xffff);
        set(&mut r, 0x1a, 2, 3);
        assert_eq!(get(&r, 0x1a, 2), 3);
    }

    proptest! {
        #[test]
        fn any_writes_are_safe_and_a_running_device_is_left_alone(
            writes in proptest::collection::vec((0usize..0x60, 0usize..9, any::<u64>()), 0..200)
        ) {
            let mut r = registers();
            let mut running: Option<Vec<QueueRegisters>> = None;
            for (offset, length, value) in writes {
                // Small values reach the interesting states; accept the features now and then.
                let value = if value % 3 == 0 { value % 16 } else { value };
                if value % 7 == 0 { accept(&mut r, VERSION_1) }
                match set(&mut r, offset, length.min(8), value) {
                    Action::Activate => { prop_assert!(running.is_none()); running = Some(r.queues().to_vec()) }
                    Action::Reset => { r.reset(); running = None }
                    Action::None => {}
                }
                if let Some(queues) = &running {
                    prop_assert_eq!(queues.as_slice(), r.queues());
                }
                prop_assert!(r.features() & !(0b1010 | VERSION_1) == 0);
                get(&r, offset, length.min(8));
            }
        }
    }
}
