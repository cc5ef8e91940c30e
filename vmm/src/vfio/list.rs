//! Functions that can go to a VM, or can be made to: those with virtual functions, virtual ones, and what is bound to vfio-pci.

use std::fmt;
use std::path::Path;

use serde::Serialize;

use super::holders::{self, Holder};
use super::sysfs::{Error, HostFunction, Sysfs};
use crate::pci::address::PciAddress;

/// What kind of function it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Kind {
    /// A physical function with SR-IOV.
    Physical {
        /// Virtual functions it has.
        virtual_functions: u16,
        /// It can have.
        most: u16,
    },
    /// A virtual function.
    Virtual {
        /// Of which physical one.
        of: PciAddress,
    },
    /// Any other.
    Other,
}

/// One function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Its address.
    pub address: PciAddress,
    /// What it is.
    #[serde(flatten)]
    pub kind: Kind,
    /// The driver it is bound to.
    pub driver: Option<String>,
    /// Its IOMMU group.
    pub iommu_group: Option<u32>,
    /// Its network interfaces.
    pub interfaces: Vec<String>,
    /// Processes that have its group open.
    pub used_by: Vec<Holder>,
}

/// All of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct List(Vec<Row>);

/// Looks at all functions.
pub fn list(sysfs: &Sysfs, proc: &Path) -> Result<List, Error> {
    let rows = sysfs.functions()?.into_iter().filter_map(|function| row(&function, proc)).collect();
    Ok(List(rows))
}

fn row(function: &HostFunction, proc: &Path) -> Option<Row> {
    let kind = match (function.most_virtual_functions(), function.physical_function()) {
        (_, Some(physical)) => Kind::Virtual { of: physical.address },
        (0, None) if function.is_bound_to_vfio() => Kind::Other,
        (0, None) => return None,
        (most, None) => Kind::Physical { virtual_functions: function.virtual_function_count(), most },
    };
    let iommu_group = function.group();
    Some(Row {
        address: function.address,
        kind,
        driver: function.driver(),
        iommu_group,
        interfaces: function.interfaces(),
        used_by: iommu_group.map(|group| holders::of_group(proc, group)).unwrap_or_default(),
    })
}

impl fmt::Display for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return writeln!(f, "no function has SR-IOV, is a virtual one, or is bound to vfio-pci");
        }
        let heading = ["address", "kind", "driver", "group", "used by"].map(str::to_owned);
        let rows: Vec<_> = std::iter::once(heading).chain(self.0.iter().map(Row::cells)).collect();
        let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        let widths = [0, 1, 2, 3].map(width);
        for [address, kind, driver, group, used_by] in &rows {
            let [a, k, d, g] = widths;
            writeln!(f, "{address:a$}  {kind:k$}  {driver:d$}  {group:>g$}  {used_by}")?;
        }
        Ok(())
    }
}

impl Row {
    fn cells(&self) -> [String; 5] {
        let kind = match self.kind {
            Kind::Physical { virtual_functions, most } => {
                format!("physical, {virtual_functions} of {most} VFs")
            }
            Kind::Virtual { of } => format!("virtual, of {of}"),
            Kind::Other => "other".to_owned(),
        };
        let dash = || "-".to_owned();
        let users = self.used_by.iter().map(ToString::to_string);
        let used_by: Vec<_> = self.interfaces.iter().cloned().chain(users).collect();
        [
            self.address.to_string(),
            kind,
            self.driver.clone().unwrap_or_else(dash),
            self.iommu_group.map_or_else(dash, |group| group.to_string()),
            if used_by.is_empty() { dash() } else { used_by.join(", ") },
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::super::sysfs::tests::Tree;
    use super::*;

    fn example() -> (Tree, tempfile::TempDir) {
        let tree = Tree::new();
        let nic = tree.add("0000:01:00.0", "igb", 1, &[("sriov_totalvfs", "7"), ("net/eth0/mtu", "1500")]);
        let vf = tree.add("0000:01:10.0", "vfio-pci", 7, &[]);
        tree.make_virtual(&nic, 0, &vf);
        tree.add("0000:02:00.0", "e1000e", 2, &[]);
        let proc = tempfile::tempdir().unwrap();
        fs::create_dir_all(proc.path().join("42/fd")).unwrap();
        symlink("/dev/vfio/7", proc.path().join("42/fd/3")).unwrap();
        fs::write(proc.path().join("42/comm"), "ivcpu-vmm\n").unwrap();
        (tree, proc)
    }

    #[test]
    fn the_table_has_what_can_be_passed_through_and_who_has_it() {
        let (tree, proc) = example();
        let table = list(&tree.sysfs(), proc.path()).unwrap().to_string();
        assert_eq!(
            table,
            "address       kind                      driver    group  used by\n\
             0000:01:00.0  physical, 1 of 7 VFs      igb           1  eth0\n\
             0000:01:10.0  virtual, of 0000:01:00.0  vfio-pci      7  ivcpu-vmm (process 42)\n"
        );
    }

    #[test]
    fn the_same_as_json() {
        let (tree, proc) = example();
        let json = serde_json::to_value(list(&tree.sysfs(), proc.path()).unwrap()).unwrap();
        let expected = serde_json::json!([
            {"address": "0000:01:00.0", "kind": "physical", "virtual_functions": 1, "most": 7, "driver": "igb",
             "iommu_group": 1, "interfaces": ["eth0"], "used_by": []},
            {"address": "0000:01:10.0", "kind": "virtual", "of": "0000:01:00.0", "driver": "vfio-pci",
             "iommu_group": 7, "interfaces": [], "used_by": [{"pid": 42, "name": "ivcpu-vmm"}]},
        ]);
        assert_eq!(json, expected);
    }

    #[test]
    fn nothing_is_said_in_words() {
        let tree = Tree::new();
        let text = list(&tree.sysfs(), tree.path()).unwrap().to_string();
        assert!(text.starts_with("no function"), "{text}");
    }
}
