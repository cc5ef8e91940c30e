//! A function is BOUND to vfio-pci, so that a VM can have it, and given back.
//!
//! Every change is written down before it is made ([`record`]), so that `unbind` undoes what was changed and nothing else,
//! whenever the binding stopped: a change that was written down but not made is found as it was.

pub mod change;
pub mod host;
pub mod record;

use std::path::PathBuf;

use self::change::Change;
use self::host::Host;
use self::record::Record;
use super::group;
use super::holders;
use super::sysfs::{self, HostFunction};
use crate::pci::address::PciAddress;
use crate::virtio::net_options::Mac;

/// What binding is to set.
#[derive(Debug, Clone, Copy, Default)]
pub struct BindOptions {
    /// Virtual functions to make of a physical one; 0 binds that one itself.
    pub virtual_functions: Option<u16>,
    /// MAC address of the (first) virtual function.
    pub mac: Option<Mac>,
    /// VLAN of the virtual functions; 0 is none.
    pub vlan: Option<u16>,
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The module is not loaded.
    #[error("the driver vfio-pci is not there; load it: modprobe vfio-pci")]
    NoDriver,
    /// Not a physical function with SR-IOV.
    #[error("PCI function {0} has no virtual functions to make; leave --vfs out to bind it itself")]
    NoVirtualFunctions(PciAddress),
    /// More than it has.
    #[error("PCI function {address} can have {most} virtual functions at most, not {wanted}")]
    TooMany {
        /// The function.
        address: PciAddress,
        /// What it can have.
        most: u16,
        /// What was asked for.
        wanted: u16,
    },
    /// There are some already, and another number of them.
    #[error(
        "PCI function {address} has {now} virtual functions already, and the number cannot change while there are any; use them as they are (--vfs {now}), or take them away: `ivcpu-vmm vfio unbind {address}`"
    )]
    OtherNumber {
        /// The function.
        address: PciAddress,
        /// What it has.
        now: u16,
    },
    /// No virtual function, or its physical function has no interface to set it through.
    #[error("--mac and --vlan are set through the interface of the physical function, and {0} has none")]
    NoInterface(PciAddress),
    /// Not a VLAN.
    #[error("VLAN {0} is not one of 0 (none) to 4094")]
    Vlan(u16),
    /// A VM has it.
    #[error("PCI function {address} is in use by {holders}; end that first")]
    InUse {
        /// The function.
        address: PciAddress,
        /// Who.
        holders: String,
    },
    /// Nothing to undo.
    #[error(
        "there is no record that `ivcpu-vmm vfio bind` changed anything for {0}; see `ivcpu-vmm vfio list`"
    )]
    NoRecord(PciAddress),
    /// A change was not possible.
    #[error("cannot {what}")]
    Change {
        /// Which.
        what: String,
        /// Why.
        source: host::Error,
    },
    /// The driver did not take the function.
    #[error("vfio-pci did not take PCI function {0}; see `dmesg | grep vfio`")]
    NotTaken(PciAddress),
    /// The record.
    #[error("cannot keep the record of changes {path}{advice}", advice = if source.kind() == std::io::ErrorKind::PermissionDenied { "; run this as root" } else { "" })]
    Record {
        /// Where it is kept.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The group.
    #[error(transparent)]
    Group(#[from] group::Error),
    /// Sysfs.
    #[error(transparent)]
    Sysfs(#[from] sysfs::Error),
}

/// Binds a function, or virtual functions made of it, and returns those that a VM can have now. Each change goes to `show`.
pub fn bind(
    host: &impl Host,
    address: PciAddress,
    options: BindOptions,
    show: &mut dyn FnMut(String),
) -> Result<Vec<PciAddress>, Error> {
    let function = host.sysfs().function(address)?;
    group::number(&function)?;
    if !host.sysfs().pci_bus().join("drivers/vfio-pci").exists() {
        return Err(Error::NoDriver);
    }
    if let Some(vlan) = options.vlan.filter(|&vlan| vlan > 4094) {
        return Err(Error::Vlan(vlan));
    }
    let mut binding = Binding { host, record: Record::open(host.records(), address)?, show };
    let mut fresh = false;
    let targets = match (function.most_virtual_functions(), options.virtual_functions) {
        (0, Some(1..)) => return Err(Error::NoVirtualFunctions(address)),
        (0, _) | (_, Some(0)) => vec![function],
        (most, wanted) => {
            fresh = function.virtual_function_count() == 0;
            binding.make_virtual_functions(&function, most, wanted)?
        }
    };
    let mut bound = Vec::new();
    for (mac_offset, target) in (0u32..).zip(&targets) {
        if options.mac.is_some() || options.vlan.is_some() {
            binding.set_link(target, options.mac.map(|mac| mac.offset(mac_offset)), options.vlan, fresh)?;
        }
        binding.take(target)?;
        bound.push(target.address);
    }
    for target in &targets {
        group::check(target)?;
    }
    Ok(bound)
}

/// Undoes what [`bind`] changed for a function, last change first.
pub fn unbind(host: &impl Host, address: PciAddress, show: &mut dyn FnMut(String)) -> Result<(), Error> {
    let mut record = Record::open(host.records(), address)?;
    if record.changes().is_empty() {
        return Err(Error::NoRecord(address));
    }
    for change in record.changes() {
        if let Change::Driver { function, .. } = change
            && let Ok(function) = host.sysfs().function(*function)
        {
            check_unused(host, &function)?;
        }
    }
    while let Some(change) = record.changes().last() {
        let undone = change.undo(host);
        show(format!("{}: {}", change.subject(), undone.map_err(|source| failed(change, source))?));
        record.pop()?;
    }
    Ok(())
}

struct Binding<'a, H> {
    host: &'a H,
    record: Record,
    show: &'a mut dyn FnMut(String),
}

impl<H: Host> Binding<'_, H> {
    /// Makes virtual functions, or takes those there are.
    fn make_virtual_functions(
        &mut self,
        function: &HostFunction,
        most: u16,
        wanted: Option<u16>,
    ) -> Result<Vec<HostFunction>, Error> {
        let (address, now) = (function.address, function.virtual_function_count());
        let wanted = wanted.unwrap_or(now.max(1));
        if wanted > most {
            return Err(Error::TooMany { address, most, wanted });
        }
        if now != 0 && now != wanted {
            return Err(Error::OtherNumber { address, now });
        }
        // Many NICs serve their virtual functions only while their own interface is up.
        for interface in function.interfaces() {
            if !self.host.is_up(&interface) {
                self.make(Change::Up { interface }, true)?;
            }
        }
        if now == 0 {
            self.make(Change::VirtualFunctions { function: address, count: wanted }, true)?;
        }
        Ok(function.virtual_functions())
    }

    /// Sets the addresses of a virtual function. Those of a fresh one go with it, so they need no record.
    fn set_link(
        &mut self,
        function: &HostFunction,
        mac: Option<Mac>,
        vlan: Option<u16>,
        fresh: bool,
    ) -> Result<(), Error> {
        let none = || Error::NoInterface(function.address);
        let physical = function.physical_function().ok_or_else(none)?;
        let interface = physical.interfaces().into_iter().next().ok_or_else(none)?;
        let index = physical.virtual_functions().iter().position(|other| other.address == function.address);
        let vf = index.ok_or_else(none)? as u16;
        let read = |source| Error::Change { what: format!("read how {interface} has set VF {vf}"), source };
        let former = self.host.link(&interface, vf).map_err(read)?;
        if let Some(mac) = mac.map(|mac| mac.to_string()).filter(|mac| *mac != former.mac) {
            let interface = interface.clone();
            self.make(Change::Mac { interface, vf, mac, former: former.mac }, !fresh)?;
        }
        if let Some(vlan) = vlan.filter(|&vlan| vlan != former.vlan) {
            self.make(Change::Vlan { interface, vf, vlan, former: former.vlan }, !fresh)?;
        }
        Ok(())
    }

    /// Binds a function to vfio-pci.
    fn take(&mut self, function: &HostFunction) -> Result<(), Error> {
        if !function.is_bound_to_vfio() {
            let former_override = function.text("driver_override").filter(|text| text != "(null)");
            self.make(
                Change::Driver { function: function.address, former: function.driver(), former_override },
                true,
            )?;
        }
        if function.is_bound_to_vfio() { Ok(()) } else { Err(Error::NotTaken(function.address)) }
    }

    /// Writes a change down, makes it, and shows it.
    fn make(&mut self, change: Change, recorded: bool) -> Result<(), Error> {
        if recorded {
            self.record.push(change.clone())?;
        }
        change.make(self.host).map_err(|source| failed(&change, source))?;
        (self.show)(format!("{}: {change}", change.subject()));
        Ok(())
    }
}

fn check_unused(host: &impl Host, function: &HostFunction) -> Result<(), Error> {
    let holders = function.group().map(|group| holders::of_group(host.proc(), group)).unwrap_or_default();
    if holders.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = holders.iter().map(ToString::to_string).collect();
    Err(Error::InUse { address: function.address, holders: names.join(", ") })
}

fn failed(change: &Change, source: host::Error) -> Error {
    Error::Change { what: format!("change {} ({change})", change.subject()), source }
}

#[cfg(test)]
mod tests;
