//! The IOMMU group: the functions that the IOMMU cannot tell apart, and which therefore only go to a VM together.

use crate::pci::address::PciAddress;

use super::sysfs::{self, HostFunction};

/// Why a function cannot be given to a VM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Bound to another driver, or to none.
    #[error(
        "PCI function {address} is bound to {driver}, not to vfio-pci; run `ivcpu-vmm vfio bind {address}`"
    )]
    NotBound {
        /// The function.
        address: PciAddress,
        /// What has it.
        driver: String,
    },
    /// The host has no IOMMU switched on.
    #[error(
        "PCI function {0} is in no IOMMU group, so its DMA could not be confined to the VM; switch the IOMMU on in the firmware and boot the host with intel_iommu=on (Intel) or without amd_iommu=off (AMD)"
    )]
    NoGroup(PciAddress),
    /// Others in the group are in use.
    #[error(
        "PCI function {address} shares IOMMU group {group} with {others}; a group goes to a VM as a whole: bind those to vfio-pci too, or unbind them from their drivers"
    )]
    Shared {
        /// The function.
        address: PciAddress,
        /// Its group.
        group: u32,
        /// The others and who has them.
        others: String,
    },
    /// Sysfs.
    #[error(transparent)]
    Sysfs(#[from] sysfs::Error),
}

/// The number of the function's group.
pub fn number(function: &HostFunction) -> Result<u32, Error> {
    function.group().ok_or(Error::NoGroup(function.address))
}

/// Checks that the function and everything in its group may go to a VM; returns the group's number.
pub fn check(function: &HostFunction) -> Result<u32, Error> {
    let address = function.address;
    // First: without one, vfio-pci does not take the function, and binding it would be no way out.
    let group = number(function)?;
    if !function.is_bound_to_vfio() {
        let driver = function.driver().unwrap_or_else(|| "no driver".to_owned());
        return Err(Error::NotBound { address, driver });
    }
    let in_use = |member: &HostFunction| {
        let driver = member.driver()?;
        // Of pci-stub the kernel knows that it does nothing.
        (!member.is_bound_to_vfio() && !member.is_bridge() && driver != "pci-stub")
            .then(|| format!("{} (bound to {driver})", member.address))
    };
    let others: Vec<_> = function.group_members()?.iter().filter_map(in_use).collect();
    if others.is_empty() {
        Ok(group)
    } else {
        Err(Error::Shared { address, group, others: others.join(", ") })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::sysfs::tests::Tree;
    use super::*;

    fn refused(function: &HostFunction) -> String {
        check(function).unwrap_err().to_string()
    }

    #[test]
    fn a_function_alone_or_with_bridges_and_unused_ones_is_fine() {
        let tree = Tree::new();
        let vf = tree.add("0000:01:10.0", "vfio-pci", 7, &[]);
        assert_eq!(check(&vf).unwrap(), 7);
        tree.add("0000:00:1c.0", "pcieport", 7, &[("class", "0x060400")]);
        tree.add("0000:01:10.2", "", 7, &[("class", "0x020000")]);
        tree.add("0000:01:10.3", "pci-stub", 7, &[("class", "0x020000")]);
        tree.add("0000:01:10.4", "vfio-pci", 7, &[("class", "0x020000")]);
        tree.add("0000:01:10.6", "mlx5_vfio_pci", 7, &[("class", "0x020000"), ("vfio-dev/vfio0/dev", "1:2")]);
        assert_eq!(check(&vf).unwrap(), 7);
    }

    #[test]
    fn a_group_shared_with_a_used_function_is_refused_and_the_function_named() {
        let tree = Tree::new();
        let vf = tree.add("0000:01:10.0", "vfio-pci", 7, &[]);
        tree.add("0000:01:10.2", "igbvf", 7, &[("class", "0x020000")]);
        let error = refused(&vf);
        assert!(error.contains("shares IOMMU group 7 with 0000:01:10.2 (bound to igbvf)"), "{error}");
    }

    #[test]
    fn a_function_with_another_driver_is_refused() {
        let tree = Tree::new();
        let nic = tree.add("0000:01:00.0", "igb", 1, &[]);
        assert!(refused(&nic).contains("is bound to igb, not to vfio-pci"));
        let free = tree.add("0000:02:00.0", "", 2, &[]);
        assert!(refused(&free).contains("is bound to no driver"));
    }

    #[test]
    fn without_an_iommu_there_is_no_group() {
        let tree = Tree::new();
        for (address, driver) in [("01:10.0", "vfio-pci"), ("01:10.2", "igbvf"), ("01:10.4", "")] {
            let vf = tree.add(&format!("0000:{address}"), driver, 7, &[]);
            fs::remove_file(vf.path().join("iommu_group")).unwrap();
            assert!(refused(&vf).contains("intel_iommu=on"), "{driver}");
        }
    }

    #[test]
    fn the_group_that_vfio_makes_up_without_an_iommu_is_none() {
        let tree = Tree::new();
        let vf = tree.add("0000:01:10.0", "vfio-pci", 7, &[]);
        fs::write(vf.path().join("iommu_group/name"), "vfio-noiommu\n").unwrap();
        assert!(refused(&vf).contains("is in no IOMMU group"));
    }
}
