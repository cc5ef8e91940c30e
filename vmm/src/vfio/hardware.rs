//! The function itself, as VFIO gives it to us.

use std::os::fd::{AsRawFd, RawFd};

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
};
use vfio_ioctls::{VfioDevice, VfioError, VfioRegionInfoCap};
use vmm_sys_util::eventfd::EventFd;

use super::bars::Range;
use super::reset;
use crate::chain::Chain;
use crate::pci::address::PciAddress;

/// Ways a function signals interrupts by messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VectorKind {
    /// MSI.
    Msi,
    /// MSI-X.
    MsiX,
}

/// The registers behind a BAR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Bytes; 0 if the function has no such BAR.
    pub size: u64,
    /// What of it can be mapped.
    pub mappable: Vec<Range>,
}

/// What passthrough needs of a function.
pub trait Hardware: Send {
    /// A read of configuration space; ones if it fails.
    fn config_read(&self, offset: usize, data: &mut [u8]);
    /// A write of configuration space, as far as VFIO lets it through.
    fn config_write(&self, offset: usize, data: &[u8]);
    /// What is behind a BAR.
    fn region(&self, bar: usize) -> Region;
    /// A read of the registers behind a BAR, from within its region; ones if it fails.
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]);
    /// A write of them.
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]);
    /// How many vectors of this kind there are.
    fn vectors(&self, kind: VectorKind) -> u32;
    /// From now on these vectors, from the first on, write these eventfds; the rest, or all if there are none, are off.
    fn set_vectors(&self, kind: VectorKind, events: &[&EventFd]) -> Result<(), VfioError>;
}

/// A function opened through VFIO. It is reset when this is dropped.
pub struct VfioHardware {
    device: VfioDevice,
    address: PciAddress,
}

impl VfioHardware {
    /// Takes `device`, the function at `address`, and resets it.
    pub fn new(device: VfioDevice, address: PciAddress) -> Result<Self, reset::Error> {
        reset::reset(&device, address)?;
        Ok(Self { device, address })
    }

    /// Where the region of a BAR is in the VFIO file.
    pub fn file_offset(&self, bar: usize) -> u64 {
        self.device.get_region_offset(bar as u32)
    }
}

impl AsRawFd for VfioHardware {
    fn as_raw_fd(&self) -> RawFd {
        self.device.as_raw_fd()
    }
}

impl Drop for VfioHardware {
    fn drop(&mut self) {
        // The kernel resets it once more when the file is closed, also after a kill.
        if let Err(error) = reset::reset(&self.device, self.address) {
            tracing::warn!("{}", Chain(&error));
        }
    }
}

impl VectorKind {
    fn index(self) -> u32 {
        match self {
            Self::Msi => VFIO_PCI_MSI_IRQ_INDEX,
            Self::MsiX => VFIO_PCI_MSIX_IRQ_INDEX,
        }
    }
}

impl Hardware for VfioHardware {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0xff);
        self.device.region_read(VFIO_PCI_CONFIG_REGION_INDEX, data, offset as u64);
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        self.device.region_write(VFIO_PCI_CONFIG_REGION_INDEX, data, offset as u64);
    }

    fn region(&self, bar: usize) -> Region {
        let bar = bar as u32;
        let size = self.device.get_region_size(bar);
        if self.device.get_region_flags(bar) & VFIO_REGION_INFO_FLAG_MMAP == 0 {
            return Region { size, mappable: Vec::new() };
        }
        let sparse = self.device.get_region_caps(bar).into_iter().find_map(|capability| match capability {
            VfioRegionInfoCap::SparseMmap(sparse) => Some(sparse.areas),
            _ => None,
        });
        let mappable = match sparse {
            Some(areas) => areas.iter().map(|area| Range { start: area.offset, size: area.size }).collect(),
            None => vec![Range { start: 0, size }],
        };
        Region { size, mappable }
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.device.region_read(bar as u32, data, offset);
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        self.device.region_write(bar as u32, data, offset);
    }

    fn vectors(&self, kind: VectorKind) -> u32 {
        self.device.get_irq_info(kind.index()).map_or(0, |irq| irq.count)
    }

    fn set_vectors(&self, kind: VectorKind, events: &[&EventFd]) -> Result<(), VfioError> {
        if events.is_empty() {
            self.device.disable_irq(kind.index())
        } else {
            self.device.enable_irq(kind.index(), events.to_vec())
        }
    }
}
