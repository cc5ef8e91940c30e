//! A passed-through function, as the guest's bus has it.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::bars::{self, Bars, PAGE, Range};
use super::config::Config;
use super::hardware::Hardware;
use super::interrupts::{self, Interrupts};
use crate::gsi::MessageRouter;
use crate::pci::bus::Function;
use crate::pci::config::{BARS, BarKind, Mapping};
use crate::pci::window::{self, Window};
use crate::slot::Slot;

const BAR_0: usize = 0x10;
const BAR_PORTS: u32 = 1;
const BAR_TYPE: u32 = 0b110;
const BAR_TYPE_64_BIT: u32 = 0b100;
const BAR_PREFETCHABLE: u32 = 0b1000;
const COMMAND: usize = 0x04;
/// Most bytes a BAR below 4 GiB can have here.
const MOST_32_BIT: u64 = 256 << 20;

/// What makes a function impossible to pass through.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Interrupts.
    #[error(transparent)]
    Interrupts(#[from] interrupts::Error),
    /// A BAR that makes no sense.
    #[error("its BAR {bar} of {size:#x} bytes cannot be shown to a guest")]
    Bar {
        /// Which.
        bar: usize,
        /// Bytes.
        size: u64,
    },
    /// No place for a BAR.
    #[error(transparent)]
    Window(#[from] window::Full),
    /// An eventfd could not be duplicated.
    #[error("cannot have another eventfd")]
    EventFd(#[source] std::io::Error),
    /// Registers could not be mapped.
    #[error("cannot map the registers of its BAR {bar}")]
    Map {
        /// Which.
        bar: usize,
        /// Why.
        source: nix::Error,
    },
}

/// The host bridge's windows for BARs.
pub struct Windows<'a> {
    /// Below 4 GiB.
    pub below_4_gib: &'a mut Window,
    /// Above.
    pub above_4_gib: &'a mut Window,
}

/// A host's function in the guest.
// Dropped in this order: the guest's view of the registers before the function, which cannot be closed while they are mapped.
pub struct Passthrough<H, S> {
    bars: Bars<S>,
    interrupts: Interrupts,
    config: Config,
    hardware: H,
}

impl<H: Hardware, S: Slot> Passthrough<H, S> {
    /// Shows `hardware`. `slot` makes a memory slot over a range of a BAR's registers; `changed` is written when the host's
    /// interrupts for the function come and go.
    pub fn new(
        hardware: H,
        router: &Arc<dyn MessageRouter>,
        changed: EventFd,
        windows: Windows<'_>,
        mut slot: impl FnMut(&H, usize, Range) -> nix::Result<S>,
    ) -> Result<Self, Error> {
        // Nothing decodes and nothing is master of the bus until the guest says so.
        hardware.config_write(COMMAND, &[0, 0]);
        let mut config = Config::new(&hardware);
        let interrupts = Interrupts::new(&hardware, &mut config, router, changed)?;
        let mut bars = Bars::default();
        let mut bar = 0;
        while bar < BARS {
            let Some((kind, size)) = bar_of(&hardware, bar) else {
                bar += 1;
                continue;
            };
            let fits = if kind.is_64_bit { bar + 1 < BARS } else { size <= MOST_32_BIT };
            if !fits || !size.is_power_of_two() || size < 16 {
                return Err(Error::Bar { bar, size });
            }
            let window = if kind.is_64_bit { &mut *windows.above_4_gib } else { &mut *windows.below_4_gib };
            // A page at least, so that no two functions share one.
            config.space().add_bar_of_kind(bar, kind, size, window.place(size.max(PAGE))?);
            let emulated: Vec<_> =
                interrupts.places().filter(|place| place.bar == bar).map(|place| place.range).collect();
            for range in bars::direct(size, &hardware.region(bar).mappable, &emulated) {
                let slot = slot(&hardware, bar, range).map_err(|source| Error::Map { bar, source })?;
                bars.add(bar, range.start, slot);
            }
            bar += if kind.is_64_bit { 2 } else { 1 };
        }
        Ok(Self { bars, interrupts, config, hardware })
    }
}

/// Kind and size of a memory BAR, if the function has it. Ports are not passed through: no virtual function has any.
fn bar_of(hardware: &impl Hardware, bar: usize) -> Option<(BarKind, u64)> {
    let size = hardware.region(bar).size;
    let mut bytes = [0; 4];
    hardware.config_read(BAR_0 + 4 * bar, &mut bytes);
    let register = u32::from_le_bytes(bytes);
    if size == 0 || register & BAR_PORTS != 0 {
        return None;
    }
    let kind = BarKind {
        is_64_bit: register & BAR_TYPE == BAR_TYPE_64_BIT,
        prefetchable: register & BAR_PREFETCHABLE != 0,
    };
    Some((kind, size))
}

impl<H: Hardware, S: Slot> Function for Passthrough<H, S> {
    fn config_read(&mut self, offset: usize, data: &mut [u8]) {
        self.config.read(&self.hardware, offset, data);
        if let Some((at, bits)) = self.interrupts.msi_pending() {
            for (byte, position) in data.iter_mut().zip(offset..) {
                if let Some(index) = position.checked_sub(at).filter(|&index| index < 4) {
                    *byte = bits.to_le_bytes()[index];
                }
            }
        }
    }

    fn config_write(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        let mappings = self.config.mappings();
        self.bars.withdraw(&mappings);
        self.config.forward(&self.hardware, offset, data);
        self.bars.place(&mappings);
        self.interrupts.follow(&self.hardware, &mut self.config);
    }

    fn mappings(&self) -> Vec<Mapping> {
        self.config.mappings()
    }

    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        if !self.interrupts.bar_read(bar, offset, data) {
            self.hardware.bar_read(bar, offset, data);
        }
    }

    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        if !self.interrupts.bar_write(&self.hardware, bar, offset, data) {
            self.hardware.bar_write(bar, offset, data);
        }
    }
}

#[cfg(test)]
#[path = "function_test.rs"]
mod tests;
