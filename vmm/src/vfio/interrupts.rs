//! A function's vectors: how many the host gives it, and how they reach the guest.
//!
//! The host's interrupts (`vfio-msix[0](0000:01:10.0)` in /proc/interrupts) exist only while the guest has MSI or MSI-X on, and
//! as many as it uses. A guest's driver gives every vector it wants a message before it lets the function deliver, so
//! usually all are asked for at once. One that unmasks more later gets them, by asking the host for more.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::bars::Range;
use super::config::Config;
use super::hardware::{Hardware, VectorKind};
use crate::chain::Chain;
use crate::gsi::{self, MessageRouter};
use crate::pci::msi::{self, Msi};
use crate::pci::msix::{self, Msix};

const CONTROL: usize = 2;
const TABLE: usize = 4;
const PENDING: usize = 8;
/// Bytes of the MSI-X capability.
const MSIX_SIZE: usize = 12;
const LAST_VECTOR: u16 = 0x7ff;
/// Bits of a location that name the BAR.
const BAR: u32 = 7;

/// What makes a function's interrupts impossible.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither MSI nor MSI-X.
    #[error("it has neither MSI nor MSI-X, and interrupt pins (INTx) are not offered to guests")]
    OnlyIntx,
    /// The MSI-X structures are not where a function has room.
    #[error("its MSI-X table or pending bits lie outside its BARs")]
    NoRoom,
    /// GSIs.
    #[error(transparent)]
    Gsi(#[from] gsi::Error),
}

/// A place in a BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which BAR.
    pub bar: usize,
    /// Where in it.
    pub range: Range,
}

struct MsixFunction {
    capability: usize,
    msix: Msix,
    table: Place,
    pending: Place,
    given: Given,
}

struct MsiFunction {
    capability: usize,
    msi: Msi,
    given: Given,
}

/// What the host has given of one kind.
#[derive(Default)]
struct Given {
    vectors: u16,
    /// Whether the log says already that it refuses; a guest can ask as often as it likes.
    complained: bool,
}

/// The vectors of a function.
pub struct Interrupts {
    msix: Option<MsixFunction>,
    msi: Option<MsiFunction>,
    /// Written when the host has given or taken vectors.
    changed: EventFd,
}

impl Interrupts {
    /// Finds out what the function has, and takes those capabilities from it.
    pub fn new(
        hardware: &impl Hardware,
        config: &mut Config,
        router: &Arc<dyn MessageRouter>,
        changed: EventFd,
    ) -> Result<Self, Error> {
        let msix = find_msix(hardware, config, router)?;
        let msi = match config.space().find_capability(msi::CAPABILITY) {
            Some(capability) if hardware.vectors(VectorKind::Msi) > 0 => {
                let msi = Msi::new(Arc::clone(router), config.space().word(capability + CONTROL))?;
                config.keep(capability, &msi.writable());
                Some(MsiFunction { capability, msi, given: Given::default() })
            }
            _ => None,
        };
        if msix.is_none() && msi.is_none() {
            return Err(Error::OnlyIntx);
        }
        Ok(Self { msix, msi, changed })
    }

    /// The places in BARs that are emulated.
    pub fn places(&self) -> impl Iterator<Item = Place> {
        self.msix.iter().flat_map(|function| [function.table, function.pending])
    }

    /// The guest wrote configuration space.
    pub fn follow(&mut self, hardware: &impl Hardware, config: &mut Config) {
        if let Some(MsixFunction { capability, msix, .. }) = &mut self.msix {
            msix.set_control(config.space().word(*capability + CONTROL) & msix::CONTROL_WRITABLE);
        }
        if let Some(MsiFunction { capability, msi, .. }) = &mut self.msi {
            msi.apply(&config.ours(*capability, msi.writable().len()));
        }
        self.give(hardware);
    }

    /// Serves a read of a BAR if it is of something emulated.
    pub fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) -> bool {
        let Some(function) = &self.msix else { return false };
        if let Some(offset) = function.table.offset(bar, offset) {
            function.msix.table_read(offset, data);
        } else if let Some(offset) = function.pending.offset(bar, offset) {
            function.msix.pending_read(offset, data);
        } else {
            return false;
        }
        true
    }

    /// Serves a write of a BAR if it is of something emulated.
    pub fn bar_write(&mut self, hardware: &impl Hardware, bar: usize, offset: u64, data: &[u8]) -> bool {
        let Some(function) = &mut self.msix else { return false };
        if let Some(offset) = function.table.offset(bar, offset) {
            function.msix.table_write(offset, data);
            self.give(hardware);
            return true;
        }
        function.pending.offset(bar, offset).is_some()
    }

    /// The pending bits of MSI, as they are in configuration space.
    pub fn msi_pending(&self) -> Option<(usize, u32)> {
        let MsiFunction { capability, msi, .. } = self.msi.as_ref()?;
        msi.pending().map(|(offset, bits)| (capability + offset, bits))
    }

    /// Asks the host for as many vectors as the guest uses.
    fn give(&mut self, hardware: &impl Hardware) {
        let mut changed = false;
        if let Some(MsixFunction { msix, given, .. }) = &mut self.msix {
            let wanted = match (msix.is_enabled(), msix.delivers()) {
                (false, _) => 0,
                (true, false) => given.vectors,
                // One at least: a function whose MSI-X is off would raise its interrupt pin.
                (true, true) => msix.in_use().max(given.vectors).max(1),
            };
            let events: Vec<_> = (0..wanted).filter_map(|vector| msix.event(vector)).collect();
            changed |= given.set(hardware, VectorKind::MsiX, &events);
        }
        if let Some(MsiFunction { msi, given, .. }) = &mut self.msi {
            let events: Vec<_> = msi.events().collect();
            changed |= given.set(hardware, VectorKind::Msi, &events);
        }
        if changed && let Err(error) = self.changed.write(1) {
            tracing::info!("cannot say that there are other interrupts now: {error}");
        }
    }
}

impl Given {
    /// Has the host give these vectors, if it does not yet; says if anything was tried. What it refuses stays as it was.
    fn set(&mut self, hardware: &impl Hardware, kind: VectorKind, events: &[&EventFd]) -> bool {
        let wanted = events.len() as u16;
        if wanted == self.vectors {
            return false;
        }
        let mut result = hardware.set_vectors(kind, events);
        // Kernels that cannot add to what there is want it switched off first.
        if result.is_err() && self.vectors != 0 && wanted != 0 && hardware.set_vectors(kind, &[]).is_ok() {
            self.vectors = 0;
            result = hardware.set_vectors(kind, events);
        }
        match result {
            Ok(()) => self.vectors = wanted,
            Err(error) if self.complained => {
                tracing::info!("the host still does not give {wanted} {kind:?} vectors: {}", Chain(&error));
            }
            Err(error) => {
                tracing::warn!("the host does not give {wanted} {kind:?} vectors: {}", Chain(&error));
                self.complained = true;
            }
        }
        true
    }
}

impl Place {
    /// Where in it an access is that begins at `offset` in BAR `bar`.
    fn offset(&self, bar: usize, offset: u64) -> Option<u64> {
        (bar == self.bar && self.range.contains(offset)).then(|| offset - self.range.start)
    }
}

/// The MSI-X of a function; its table and pending bits lie in BARs.
fn find_msix(
    hardware: &impl Hardware,
    config: &mut Config,
    router: &Arc<dyn MessageRouter>,
) -> Result<Option<MsixFunction>, Error> {
    let Some(capability) = config.space().find_capability(msix::CAPABILITY) else { return Ok(None) };
    let of_hardware = hardware.vectors(VectorKind::MsiX).min(u32::from(LAST_VECTOR) + 1) as u16;
    let count = ((config.space().word(capability + CONTROL) & LAST_VECTOR) + 1).min(of_hardware);
    if count == 0 {
        return Ok(None);
    }
    let place = |at: usize, size: u64| {
        let bytes = config.ours(capability + at, 4);
        let location = bytes.try_into().map_or(0, u32::from_le_bytes);
        let (bar, start) = ((location & BAR) as usize, u64::from(location & !BAR));
        let fits = bar < crate::pci::config::BARS && start + size <= hardware.region(bar).size;
        fits.then_some(Place { bar, range: Range { start, size } }).ok_or(Error::NoRoom)
    };
    let table = place(TABLE, u64::from(count) * msix::ENTRY_SIZE)?;
    let pending = place(PENDING, u64::from(count).div_ceil(64) * 8)?;
    let mut writable = [0; MSIX_SIZE];
    writable[CONTROL..CONTROL + 2].copy_from_slice(&msix::CONTROL_WRITABLE.to_le_bytes());
    config.keep(capability, &writable);
    let msix = Msix::new(Arc::clone(router), count)?;
    Ok(Some(MsixFunction { capability, msix, table, pending, given: Given::default() }))
}
