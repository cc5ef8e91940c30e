//! `--device`.

use std::path::Path;
use std::str::FromStr;

use crate::pci::address::PciAddress;
use crate::suboption::{self, SubOptions};

/// `--device path=/sys/bus/pci/devices/0000:01:10.0`, or just `0000:01:10.0`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceOptions {
    /// The host's function.
    pub address: PciAddress,
}

impl FromStr for DeviceOptions {
    type Err = suboption::Error;

    fn from_str(text: &str) -> Result<Self, suboption::Error> {
        let mut options = if text.contains('=') {
            SubOptions::parse(text)?
        } else {
            SubOptions::parse(&format!("path={text}"))?
        };
        let address = options.take_with("path", |path| {
            let directory = Path::new(path);
            let name = directory.file_name().and_then(|name| name.to_str()).unwrap_or(path);
            let address = name.parse::<PciAddress>().map_err(|error| error.to_string())?;
            // A path from elsewhere would mean what its last part happens to name.
            let is_bare = name == path;
            if is_bare || directory.starts_with("/sys") {
                Ok(address)
            } else {
                Err(format!("this is not the function's directory, /sys/bus/pci/devices/{address}"))
            }
        })?;
        options.finish()?;
        Ok(Self { address: address.ok_or(suboption::Error::Missing("path="))? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_and_a_bare_address_name_the_same_function() {
        let expected = Ok(DeviceOptions { address: "0000:01:10.0".parse().unwrap() });
        for text in [
            "path=/sys/bus/pci/devices/0000:01:10.0",
            "path=/sys/bus/pci/devices/0000:01:10.0/",
            "0000:01:10.0",
            "01:10.0",
        ] {
            assert_eq!(text.parse::<DeviceOptions>(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, expected) in [
            ("", "is not the address of a PCI function"),
            ("eth0", "is not the address of a PCI function"),
            ("path=/sys/bus/pci/devices", "is not the address of a PCI function"),
            (
                "path=/tmp/0000:01:10.0",
                "this is not the function's directory, /sys/bus/pci/devices/0000:01:10.0",
            ),
            ("path=01:10.0,iommu=on", "unknown sub-option `iommu`"),
            ("iommu=on", "unknown sub-option `iommu`"),
        ] {
            let error = text.parse::<DeviceOptions>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
