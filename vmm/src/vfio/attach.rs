//! A function is ATTACHED to the VM: checked, opened, reset, and put on the guest's bus.

use std::sync::{Arc, Mutex};

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::container::{self, Container};
use super::function::{self, Passthrough, Windows};
use super::group;
use super::hardware::VfioHardware;
use super::mapping::RegisterMapping;
use super::options::DeviceOptions;
use super::reset;
use super::sysfs::{self, HostFunction, Sysfs};
use crate::gsi::MessageRouter;
use crate::memory::{self, GuestMemory};
use crate::pci::address::PciAddress;
use crate::pci::bus::{self, Bus};
use crate::slot::KvmSlot;

/// Why a function does not get into the VM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Given twice.
    #[error("--device {0} is given twice")]
    Twice(PciAddress),
    /// Not there.
    #[error(transparent)]
    Sysfs(#[from] sysfs::Error),
    /// Not to be given away.
    #[error(transparent)]
    Group(#[from] group::Error),
    /// Not to be reset.
    #[error(transparent)]
    Reset(#[from] reset::Error),
    /// VFIO.
    #[error(transparent)]
    Container(#[from] container::Error),
    /// The function itself.
    #[error("PCI function {address} cannot be passed through")]
    Function {
        /// Which.
        address: PciAddress,
        /// Why.
        source: function::Error,
    },
    /// Too many devices.
    #[error(transparent)]
    Bus(#[from] bus::Full),
}

/// A function that may go to a VM, and its IOMMU group.
#[derive(Debug)]
pub struct Checked {
    function: HostFunction,
    group: u32,
}

/// Checks all that can be known of the functions before anything is done.
pub fn check(sysfs: &Sysfs, options: &[DeviceOptions]) -> Result<Vec<Checked>, Error> {
    let mut checked: Vec<Checked> = Vec::new();
    for DeviceOptions { address } in options {
        if checked.iter().any(|other| other.function.address == *address) {
            return Err(Error::Twice(*address));
        }
        let function = sysfs.function(*address)?;
        let group = group::check(&function)?;
        reset::check(&function)?;
        checked.push(Checked { function, group });
    }
    Ok(checked)
}

/// What attaching needs of the machine.
pub struct Wiring<'a> {
    /// The VM.
    pub vm: &'a Arc<VmFd>,
    /// Guest memory, all of which the functions may reach.
    pub memory: &'a GuestMemory,
    /// For MSI and MSI-X.
    pub messages: &'a Arc<dyn MessageRouter>,
    /// Free places for BARs.
    pub windows: Windows<'a>,
    /// Free numbers of memory slots.
    pub slots: &'a mut memory::FreeSlots,
    /// Written when the host's interrupts for a function come or go.
    pub changed: &'a EventFd,
}

/// Puts the functions on the bus.
pub fn attach(bus: &mut Bus, functions: Vec<Checked>, wiring: Wiring<'_>) -> Result<(), Error> {
    if functions.is_empty() {
        return Ok(());
    }
    let Wiring { vm, memory, messages, windows, slots, changed } = wiring;
    let mut container = Container::new(vm, memory.clone())?;
    for Checked { function, group } in functions {
        let address = function.address;
        let failed = |source| Error::Function { address, source };
        let hardware = VfioHardware::new(container.open(&function, group)?, address)?;
        let changed = changed.try_clone().map_err(|source| failed(function::Error::EventFd(source)))?;
        let windows = Windows { below_4_gib: windows.below_4_gib, above_4_gib: windows.above_4_gib };
        let slot = |hardware: &VfioHardware, bar, range: super::bars::Range| {
            let offset = hardware.file_offset(bar) + range.start;
            let mapping = RegisterMapping::new(hardware, offset, range.size)?;
            Ok(KvmSlot::new(Arc::clone(vm), slots.take(), Arc::new(mapping)))
        };
        let passthrough = Passthrough::new(hardware, messages, changed, windows, slot).map_err(failed)?;
        bus.add(Arc::new(Mutex::new(passthrough)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::sysfs::tests::Tree;
    use super::*;

    #[test]
    fn a_function_is_checked_in_all_respects_and_given_once() {
        let tree = Tree::new();
        tree.add("0000:01:10.0", "vfio-pci", 7, &[("reset_method", "flr")]);
        tree.add("0000:01:00.0", "igb", 1, &[("reset_method", "flr")]);
        tree.add("0000:02:00.0", "vfio-pci", 2, &[("reset_method", "\n")]);
        let check = |addresses: &[&str]| {
            let options: Vec<_> = addresses.iter().map(|address| address.parse().unwrap()).collect();
            super::check(&tree.sysfs(), &options).map(|checked| checked.len())
        };
        assert_eq!(check(&["0000:01:10.0"]).unwrap(), 1);
        assert!(matches!(check(&["0000:01:10.0", "01:10.0"]), Err(Error::Twice(_))));
        assert!(matches!(check(&["0000:03:00.0"]), Err(Error::Sysfs(_))));
        assert!(matches!(check(&["0000:01:00.0"]), Err(Error::Group(_))));
        assert!(matches!(check(&["0000:02:00.0"]), Err(Error::Reset(_))));
    }
}
