use std::cell::{Cell, RefCell};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::host::Link;
use super::*;
use crate::vfio::sysfs::Sysfs;
use crate::vfio::sysfs::tests::Tree;

const NIC: &str = "0000:01:00.0";
const VF: &str = "0000:01:10.0";

/// A made-up host whose kernel does what is written to it.
struct FakeHost {
    tree: Tree,
    sysfs: Sysfs,
    records: tempfile::TempDir,
    proc: tempfile::TempDir,
    up: Cell<bool>,
    link: RefCell<Link>,
    /// Changes it makes before it fails; for a kill in the middle.
    patience: Cell<usize>,
}

impl FakeHost {
    fn new() -> Self {
        let tree = Tree::new();
        tree.add(NIC, "igb", 1, &[("sriov_totalvfs", "7"), ("sriov_numvfs", "0"), ("net/eth0/mtu", "1500")]);
        for driver in ["vfio-pci", "igbvf", "e1000e"] {
            fs::create_dir_all(tree.path().join("bus/pci/drivers").join(driver)).unwrap();
        }
        tree.add("0000:02:00.0", "e1000e", 2, &[("driver_override", "(null)\n")]);
        Self {
            sysfs: tree.sysfs(),
            tree,
            records: tempfile::tempdir().unwrap(),
            proc: tempfile::tempdir().unwrap(),
            up: Cell::new(false),
            link: RefCell::new(Link { mac: "00:00:00:00:00:00".to_owned(), vlan: 0 }),
            patience: Cell::new(usize::MAX),
        }
    }

    fn address(text: &str) -> PciAddress {
        text.parse().unwrap()
    }

    fn bind(&self, address: &str, options: BindOptions) -> Result<Vec<String>, Error> {
        let mut lines = Vec::new();
        bind(self, Self::address(address), options, &mut |line| lines.push(line)).map(|_| lines)
    }

    fn unbind(&self, address: &str) -> Result<Vec<String>, Error> {
        let mut lines = Vec::new();
        unbind(self, Self::address(address), &mut |line| lines.push(line)).map(|()| lines)
    }

    fn driver(&self, address: &str) -> Option<String> {
        self.sysfs.function(Self::address(address)).ok()?.driver()
    }

    /// All that binding may change.
    fn state(&self) -> (Option<String>, Option<String>, Option<String>, bool, Link, Option<String>) {
        let other = self.sysfs.function(Self::address("0000:02:00.0")).unwrap();
        (
            self.driver(NIC),
            self.driver(VF),
            other.driver(),
            self.up.get(),
            self.link.borrow().clone(),
            other.text("driver_override").filter(|text| text != "(null)" && !text.is_empty()),
        )
    }

    fn records(&self) -> usize {
        fs::read_dir(self.records.path())
            .unwrap()
            .flatten()
            .filter(|entry| entry.file_name() != "vfio.lock")
            .count()
    }

    fn step(&self) -> Result<(), super::host::Error> {
        let left = self.patience.get();
        if left == 0 {
            return Err(super::host::Error::Ip { arguments: "x".to_owned(), message: "killed".to_owned() });
        }
        self.patience.set(left - 1);
        Ok(())
    }
}

impl Host for FakeHost {
    fn sysfs(&self) -> &Sysfs {
        &self.sysfs
    }
    fn proc(&self) -> &Path {
        self.proc.path()
    }
    fn records(&self) -> &Path {
        self.records.path()
    }
    fn is_up(&self, _: &str) -> bool {
        self.up.get()
    }
    fn write(&self, function: PciAddress, file: &str, text: &str) -> Result<(), super::host::Error> {
        self.step()?;
        let there = self.sysfs.function(function).unwrap();
        match file {
            "driver/unbind" => fs::remove_file(there.path().join("driver")).unwrap(),
            "sriov_numvfs" if text == "0" => {
                fs::write(there.path().join(file), text).unwrap();
                fs::remove_file(there.path().join("virtfn0")).unwrap();
                fs::remove_dir_all(self.tree.path().join("bus/pci/devices").join(VF)).unwrap();
                fs::remove_dir_all(self.tree.path().join("kernel/iommu_groups/7")).unwrap();
                *self.link.borrow_mut() = Link { mac: "00:00:00:00:00:00".to_owned(), vlan: 0 };
            }
            "sriov_numvfs" => {
                let vf = self.tree.add(VF, "igbvf", 7, &[("driver_override", "(null)\n")]);
                self.tree.make_virtual(&there, 0, &vf);
            }
            _ => fs::write(there.path().join(file), text).unwrap(),
        }
        Ok(())
    }
    fn probe(&self, function: PciAddress) -> Result<(), super::host::Error> {
        self.step()?;
        let there = self.sysfs.function(function).unwrap();
        let wanted = there.text("driver_override").filter(|text| text != "(null)" && !text.is_empty());
        let own = if function == Self::address(VF) { "igbvf" } else { "e1000e" };
        if there.driver().is_none() {
            let driver = self.tree.path().join("bus/pci/drivers").join(wanted.as_deref().unwrap_or(own));
            symlink(driver, there.path().join("driver")).unwrap();
        }
        Ok(())
    }
    fn ip(&self, arguments: &[&str]) -> Result<(), super::host::Error> {
        self.step()?;
        match arguments {
            ["link", "set", "dev", "eth0", state] => self.up.set(*state == "up"),
            ["link", "set", "dev", "eth0", "vf", "0", "mac", mac] => {
                self.link.borrow_mut().mac = (*mac).to_owned()
            }
            ["link", "set", "dev", "eth0", "vf", "0", "vlan", vlan] => {
                self.link.borrow_mut().vlan = vlan.parse().unwrap();
            }
            other => panic!("{other:?}"),
        }
        Ok(())
    }
    fn link(&self, _: &str, vf: u16) -> Result<Link, super::host::Error> {
        if self.driver(VF).is_none() && !self.tree.path().join("bus/pci/devices").join(VF).exists() {
            return Err(super::host::Error::NoVf { interface: "eth0".to_owned(), vf });
        }
        Ok(self.link.borrow().clone())
    }
}

fn everything() -> BindOptions {
    let mac = "52:54:00:aa:bb:01".parse().unwrap();
    BindOptions { virtual_functions: Some(1), mac: Some(mac), vlan: Some(10) }
}

#[test]
fn a_physical_function_is_made_into_a_bound_virtual_one_and_back() {
    let host = FakeHost::new();
    let before = host.state();
    let lines = host.bind(NIC, everything()).unwrap();
    assert_eq!(
        lines,
        [
            "eth0: up (was down)",
            "0000:01:00.0: virtual functions: 1 (were 0)",
            "eth0 VF 0: MAC address 52:54:00:aa:bb:01 (was 00:00:00:00:00:00)",
            "eth0 VF 0: VLAN 10 (was 0)",
            "0000:01:10.0: bound to vfio-pci (was bound to igbvf)",
        ]
    );
    assert_eq!(host.driver(VF).as_deref(), Some("vfio-pci"));
    assert_eq!(host.bind(NIC, everything()).unwrap(), [""; 0], "all is so already");
    let lines = host.unbind(NIC).unwrap();
    assert_eq!(
        lines,
        [
            "0000:01:10.0: bound to igbvf again",
            "0000:01:00.0: no virtual functions again",
            "eth0: down again"
        ]
    );
    assert_eq!((host.state(), host.records()), (before, 0));
    assert!(matches!(host.unbind(NIC), Err(Error::NoRecord(_))));
}

#[test]
fn a_virtual_function_that_was_there_gets_its_settings_back() {
    let host = FakeHost::new();
    host.write(FakeHost::address(NIC), "sriov_numvfs", "1").unwrap();
    *host.link.borrow_mut() = Link { mac: "52:54:00:00:00:99".to_owned(), vlan: 3 };
    let before = host.state();
    let options = BindOptions { virtual_functions: None, ..everything() };
    host.bind(VF, options).unwrap();
    host.bind(VF, BindOptions { vlan: Some(0), ..options }).unwrap();
    assert_eq!(*host.link.borrow(), Link { mac: "52:54:00:aa:bb:01".to_owned(), vlan: 0 });
    host.unbind(VF).unwrap();
    assert_eq!((host.state(), host.records()), (before, 0));
}

#[test]
fn a_binding_that_was_killed_anywhere_can_be_undone() {
    for patience in 0..8 {
        let host = FakeHost::new();
        let before = host.state();
        host.patience.set(patience);
        let bound = host.bind(NIC, everything());
        assert_eq!(bound.is_ok(), patience >= 7, "{patience}: {bound:?}");
        host.patience.set(usize::MAX);
        host.unbind(NIC).unwrap();
        assert_eq!((host.state(), host.records()), (before, 0), "{patience}");
    }
}

#[test]
fn an_undoing_that_was_killed_anywhere_can_be_repeated() {
    for patience in 0..6 {
        let host = FakeHost::new();
        let before = host.state();
        host.bind(NIC, everything()).unwrap();
        host.patience.set(patience);
        let undone = host.unbind(NIC);
        host.patience.set(usize::MAX);
        if undone.is_err() {
            host.unbind(NIC).unwrap();
        }
        assert_eq!((host.state(), host.records()), (before, 0), "{patience}");
    }
}

#[test]
fn any_other_function_is_bound_itself() {
    let host = FakeHost::new();
    let before = host.state();
    host.bind("0000:02:00.0", BindOptions::default()).unwrap();
    assert_eq!(host.driver("0000:02:00.0").as_deref(), Some("vfio-pci"));
    host.unbind("0000:02:00.0").unwrap();
    assert_eq!(host.state(), before);
}

#[test]
fn what_a_vm_uses_is_not_taken_from_it() {
    let host = FakeHost::new();
    host.bind(NIC, everything()).unwrap();
    let process = host.proc.path().join("42");
    fs::create_dir_all(process.join("fd")).unwrap();
    symlink("/dev/vfio/7", process.join("fd/3")).unwrap();
    fs::write(process.join("comm"), "ivcpu-vmm\n").unwrap();
    let error = host.unbind(NIC).unwrap_err().to_string();
    assert!(error.contains("0000:01:10.0 is in use by ivcpu-vmm (process 42)"), "{error}");
    assert_eq!(host.driver(VF).as_deref(), Some("vfio-pci"));
}

#[test]
fn what_cannot_be_done_is_said_and_changes_nothing() {
    let host = FakeHost::new();
    let before = host.state();
    let vfs = |count| BindOptions { virtual_functions: Some(count), ..Default::default() };
    for (address, options, expected) in [
        ("0000:05:00.0", BindOptions::default(), "no PCI function 0000:05:00.0"),
        ("0000:02:00.0", vfs(1), "no virtual functions to make"),
        (NIC, vfs(8), "can have 7 virtual functions at most, not 8"),
        (NIC, BindOptions { vlan: Some(4095), ..Default::default() }, "VLAN 4095"),
        ("0000:02:00.0", BindOptions { vlan: Some(1), ..Default::default() }, "has none"),
    ] {
        let error = host.bind(address, options).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!((host.state(), host.records()), (before.clone(), 0), "{address}");
    }
    host.bind(NIC, vfs(1)).unwrap();
    assert!(matches!(host.bind(NIC, vfs(2)), Err(Error::OtherNumber { now: 1, .. })));
    fs::remove_dir(host.tree.path().join("bus/pci/drivers/vfio-pci")).unwrap();
    assert!(matches!(host.bind(VF, BindOptions::default()), Err(Error::NoDriver)));
}
