//! What the host says about its PCI functions.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::pci::address::PciAddress;

/// The host's PCI functions, under /sys; elsewhere in tests.
#[derive(Debug, Clone)]
pub struct Sysfs {
    root: PathBuf,
}

/// Why a function cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not there.
    #[error("the host has no PCI function {0}; `ivcpu-vmm vfio list` shows those that can be given to a VM")]
    NoSuchFunction(PciAddress),
    /// A file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Default for Sysfs {
    fn default() -> Self {
        Self::at("/sys")
    }
}

impl Sysfs {
    /// The tree under `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory of the PCI bus.
    pub fn pci_bus(&self) -> PathBuf {
        self.root.join("bus/pci")
    }

    /// One function.
    pub fn function(&self, address: PciAddress) -> Result<HostFunction, Error> {
        let path = self.pci_bus().join("devices").join(address.to_string());
        if path.exists() { Ok(HostFunction { address, path }) } else { Err(Error::NoSuchFunction(address)) }
    }

    /// All functions, in order.
    pub fn functions(&self) -> Result<Vec<HostFunction>, Error> {
        functions_in(&self.pci_bus().join("devices"))
    }
}

/// The functions a directory has links to.
fn functions_in(directory: &Path) -> Result<Vec<HostFunction>, Error> {
    let entries =
        fs::read_dir(directory).map_err(|source| Error::Read { path: directory.to_owned(), source })?;
    let mut functions: Vec<_> = entries
        .flatten()
        .filter_map(|entry| {
            Some(HostFunction { address: entry.file_name().to_str()?.parse().ok()?, path: entry.path() })
        })
        .collect();
    functions.sort_by_key(|function| function.address);
    Ok(functions)
}

/// A PCI function of the host.
#[derive(Debug, Clone)]
pub struct HostFunction {
    /// Its address.
    pub address: PciAddress,
    path: PathBuf,
}

impl HostFunction {
    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The driver it is bound to.
    pub fn driver(&self) -> Option<String> {
        link_name(&self.path.join("driver"))
    }

    /// Whether that driver gives it to user space: vfio-pci, or a vendor's own that does the same.
    pub fn is_bound_to_vfio(&self) -> bool {
        self.driver().is_some_and(|driver| driver == "vfio-pci") || self.path.join("vfio-dev").exists()
    }

    /// The number of its IOMMU group.
    pub fn group(&self) -> Option<u32> {
        // VFIO makes one up where unsafe access without an IOMMU was asked of it.
        let made_up = self.text("iommu_group/name").is_some_and(|name| name == "vfio-noiommu");
        if made_up { None } else { link_name(&self.path.join("iommu_group"))?.parse().ok() }
    }

    /// All functions of its IOMMU group, itself among them.
    pub fn group_members(&self) -> Result<Vec<HostFunction>, Error> {
        functions_in(&self.path.join("iommu_group/devices"))
    }

    /// Whether it is a bridge (to PCI, host or ISA), which no driver uses for DMA of its own.
    pub fn is_bridge(&self) -> bool {
        self.text("class").is_some_and(|class| class.starts_with("0x06"))
    }

    /// The physical function, if this is a virtual one.
    pub fn physical_function(&self) -> Option<HostFunction> {
        let address = link_name(&self.path.join("physfn"))?.parse().ok()?;
        Some(HostFunction { address, path: self.path.join("physfn") })
    }

    /// How many virtual functions it can have; 0 if it cannot.
    pub fn most_virtual_functions(&self) -> u16 {
        self.number("sriov_totalvfs")
    }

    /// How many virtual functions it has now.
    pub fn virtual_function_count(&self) -> u16 {
        self.number("sriov_numvfs")
    }

    /// The virtual functions it has now, by number.
    pub fn virtual_functions(&self) -> Vec<HostFunction> {
        let function = |index| {
            let path = self.path.join(format!("virtfn{index}"));
            Some(HostFunction { address: link_name(&path)?.parse().ok()?, path })
        };
        (0..self.virtual_function_count()).map_while(function).collect()
    }

    /// Its network interfaces.
    pub fn interfaces(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path.join("net")) else { return Vec::new() };
        let mut names: Vec<_> =
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    /// How the kernel can reset this function alone: `flr`, `pm`, `bus` and so on; none if it cannot.
    pub fn reset_methods(&self) -> Vec<String> {
        match self.text("reset_method") {
            Some(methods) => methods.split_whitespace().map(str::to_owned).collect(),
            // Kernels before 5.15 only say whether.
            None if self.path.join("reset").exists() => vec!["unknown".to_owned()],
            None => Vec::new(),
        }
    }

    /// The contents of one of its files.
    pub fn text(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.path.join(file)).ok().map(|text| text.trim().to_owned())
    }

    fn number(&self, file: &str) -> u16 {
        self.text(file).and_then(|text| text.parse().ok()).unwrap_or(0)
    }
}

/// The last part of what a link points at.
fn link_name(link: &Path) -> Option<String> {
    fs::read_link(link).ok()?.file_name()?.to_str().map(str::to_owned)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A made-up /sys.
    pub(crate) struct Tree(tempfile::TempDir);

    impl Tree {
        pub(crate) fn new() -> Self {
            let tree = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(tree.path().join("bus/pci/devices")).unwrap();
            tree
        }

        pub(crate) fn path(&self) -> &Path {
            self.0.path()
        }

        pub(crate) fn sysfs(&self) -> Sysfs {
            Sysfs::at(self.path())
        }

        /// A function with a driver and a group, and these files.
        pub(crate) fn add(
            &self,
            address: &str,
            driver: &str,
            group: u32,
            files: &[(&str, &str)],
        ) -> HostFunction {
            let bus = self.path().join("bus/pci");
            let directory = bus.join("devices").join(address);
            fs::create_dir_all(&directory).unwrap();
            if !driver.is_empty() {
                let driver = bus.join("drivers").join(driver);
                fs::create_dir_all(&driver).unwrap();
                symlink(driver, directory.join("driver")).unwrap();
            }
            let members = self.path().join("kernel/iommu_groups").join(group.to_string()).join("devices");
            fs::create_dir_all(&members).unwrap();
            symlink(members.parent().unwrap(), directory.join("iommu_group")).unwrap();
            symlink(&directory, members.join(address)).unwrap();
            for (name, text) in files {
                let file = directory.join(name);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, text).unwrap();
            }
            self.sysfs().function(address.parse().unwrap()).unwrap()
        }

        /// Makes one function the `index`th virtual function of another.
        pub(crate) fn make_virtual(
            &self,
            physical: &HostFunction,
            index: u16,
            virtual_function: &HostFunction,
        ) {
            symlink(physical.path(), virtual_function.path().join("physfn")).unwrap();
            symlink(virtual_function.path(), physical.path().join(format!("virtfn{index}"))).unwrap();
            fs::write(physical.path().join("sriov_numvfs"), format!("{}\n", index + 1)).unwrap();
        }
    }

    #[test]
    fn a_function_is_described_by_its_files_and_links() {
        let tree = Tree::new();
        let nic = tree.add(
            "0000:01:00.0",
            "igb",
            3,
            &[
                ("class", "0x020000\n"),
                ("sriov_totalvfs", "7\n"),
                ("net/eth0/mtu", "1500\n"),
                ("reset_method", "flr bus\n"),
            ],
        );
        let vf = tree.add("0000:01:10.0", "vfio-pci", 7, &[("reset", "")]);
        tree.make_virtual(&nic, 0, &vf);
        assert_eq!((nic.driver().as_deref(), nic.group(), nic.is_bridge()), (Some("igb"), Some(3), false));
        assert_eq!((nic.most_virtual_functions(), nic.virtual_function_count()), (7, 1));
        assert_eq!(nic.interfaces(), ["eth0"]);
        assert_eq!(nic.reset_methods(), ["flr", "bus"]);
        assert_eq!(vf.reset_methods(), ["unknown"]);
        assert_eq!(vf.physical_function().unwrap().address, nic.address);
        assert_eq!(nic.virtual_functions()[0].address, vf.address);
        assert!(vf.is_bound_to_vfio() && !nic.is_bound_to_vfio());
        let all: Vec<_> = tree.sysfs().functions().unwrap().iter().map(|function| function.address).collect();
        assert_eq!(all, [nic.address, vf.address]);
    }

    #[test]
    fn a_function_that_is_not_there_is_named() {
        let error = Tree::new().sysfs().function("0000:01:10.0".parse().unwrap()).unwrap_err();
        assert!(error.to_string().contains("no PCI function 0000:01:10.0"), "{error}");
    }
}
