//! Reset: what one VM leaves in a function must not meet the next, so a function that cannot be reset alone is not given away.

use std::os::fd::{AsRawFd, RawFd};

use super::sysfs::HostFunction;
use crate::pci::address::PciAddress;

/// Ways to reset a virtual function: all of them touch nothing else. Kernels that do not name the way count as well.
const VIRTUAL_FUNCTION_METHODS: [&str; 5] = ["flr", "af_flr", "device_specific", "acpi", "unknown"];

/// Why a function cannot be reset.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A virtual function without function-level reset.
    #[error(
        "virtual function {0} cannot be reset alone (it has no function-level reset, FLR, or reset_method in sysfs is empty), so what one VM leaves in it would meet the next"
    )]
    NoFunctionLevelReset(PciAddress),
    /// Any other function, that only the reset of its whole bus would reset.
    #[error(
        "PCI function {0} cannot be reset alone: it has no function-level reset, and a hot reset of its bus would reset others, which is not permitted"
    )]
    OnlyWithOthers(PciAddress),
    /// The kernel did not.
    #[error(
        "PCI function {address} does not reset; unbind it and bind it again, or see `dmesg | grep {address}`"
    )]
    Refused {
        /// The function.
        address: PciAddress,
        /// What the kernel answered.
        source: nix::Error,
    },
}

/// Checks that a function can be reset alone.
pub fn check(function: &HostFunction) -> Result<(), Error> {
    let methods = function.reset_methods();
    if function.physical_function().is_some() {
        let any = methods.iter().any(|method| VIRTUAL_FUNCTION_METHODS.contains(&method.as_str()));
        return if any { Ok(()) } else { Err(Error::NoFunctionLevelReset(function.address)) };
    }
    // `bus` is only there if nothing else is on the bus.
    if methods.is_empty() { Err(Error::OnlyWithOthers(function.address)) } else { Ok(()) }
}

mod ioctl {
    //! `VFIO_DEVICE_RESET`, which vfio-ioctls does not let fail.
    #![allow(missing_docs, reason = "the macro writes the function")]
    nix::ioctl_none_bad!(vfio_device_reset, nix::request_code_none!(b';', 111));
}

/// Resets the function that `device` is the VFIO file of.
pub fn reset(device: &impl AsRawFd, address: PciAddress) -> Result<(), Error> {
    let fd: RawFd = device.as_raw_fd();
    // SAFETY: the request has no argument, and `device` keeps the descriptor open. What the reset does to the function's
    // registers is no memory of this process.
    unsafe { ioctl::vfio_device_reset(fd) }.map_err(|source| Error::Refused { address, source })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::sysfs::tests::Tree;
    use super::*;

    #[test]
    fn a_virtual_function_needs_a_reset_of_its_own() {
        let tree = Tree::new();
        let nic = tree.add("0000:01:00.0", "igb", 1, &[]);
        for (index, (methods, fine)) in
            [("flr\n", true), ("flr bus", true), ("pm bus", false), ("\n", false)].into_iter().enumerate()
        {
            let vf = tree.add(&format!("0000:01:10.{index}"), "vfio-pci", 7, &[("reset_method", methods)]);
            tree.make_virtual(&nic, index as u16, &vf);
            assert_eq!(check(&vf).is_ok(), fine, "{methods}");
        }
        let error = check(&nic.virtual_functions()[3]).unwrap_err().to_string();
        assert!(error.contains("0000:01:10.3") && error.contains("FLR"), "{error}");
    }

    #[test]
    fn another_function_may_be_reset_with_its_bus_if_it_is_alone_there() {
        let tree = Tree::new();
        let card = tree.add("0000:02:00.0", "vfio-pci", 2, &[("reset_method", "bus\n")]);
        assert!(check(&card).is_ok());
        let card = tree.add("0000:02:00.1", "vfio-pci", 2, &[]);
        assert!(check(&card).unwrap_err().to_string().contains("hot reset"));
    }

    #[test]
    fn a_file_that_is_no_function_does_not_reset() {
        let file = tempfile::tempfile().unwrap();
        let error = reset(&file, "0000:01:10.0".parse().unwrap()).unwrap_err();
        assert!(error.to_string().contains("0000:01:10.0 does not reset"), "{error}");
    }
}
