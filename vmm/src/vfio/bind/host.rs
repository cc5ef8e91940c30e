//! The host as binding changes it: files of sysfs, and `ip` of iproute2 for what netlink is needed for. The command speaks
//! every vendor's and every kernel's dialect of virtual function settings, and what it does can be repeated by hand.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use crate::pci::address::PciAddress;
use crate::vfio::sysfs::Sysfs;

/// What can go wrong with one change.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file does not take the value.
    #[error("writing {path}")]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The command is not there.
    #[error("running `ip` (of the package iproute2)")]
    NoIp(#[source] io::Error),
    /// The command failed.
    #[error("`ip {arguments}`: {message}")]
    Ip {
        /// What it was given.
        arguments: String,
        /// What it said.
        message: String,
    },
    /// The interface does not say what it has set.
    #[error("interface {interface} has no VF {vf}")]
    NoVf {
        /// The interface.
        interface: String,
        /// Which virtual function.
        vf: u16,
    },
}

/// What a physical function has set for a virtual one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// MAC address.
    pub mac: String,
    /// VLAN; 0 is none.
    pub vlan: u16,
}

/// What binding reads and changes.
pub trait Host {
    /// The PCI functions.
    fn sysfs(&self) -> &Sysfs;
    /// The processes.
    fn proc(&self) -> &Path;
    /// Where records are kept.
    fn records(&self) -> &Path;
    /// Whether an interface is up.
    fn is_up(&self, interface: &str) -> bool;
    /// Writes one of a function's files.
    fn write(&self, function: PciAddress, file: &str, text: &str) -> Result<(), Error>;
    /// Has the kernel look for a driver.
    fn probe(&self, function: PciAddress) -> Result<(), Error>;
    /// Runs `ip`.
    fn ip(&self, arguments: &[&str]) -> Result<(), Error>;
    /// What is set for a virtual function.
    fn link(&self, interface: &str, vf: u16) -> Result<Link, Error>;
}

/// This host.
#[derive(Debug, Default)]
pub struct ThisHost(Sysfs);

impl Host for ThisHost {
    fn sysfs(&self) -> &Sysfs {
        &self.0
    }

    fn proc(&self) -> &Path {
        Path::new("/proc")
    }

    fn records(&self) -> &Path {
        Path::new("/run/ivcpu")
    }

    fn is_up(&self, interface: &str) -> bool {
        let flags = fs::read_to_string(Path::new("/sys/class/net").join(interface).join("flags"));
        let flags = flags.unwrap_or_default();
        u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16).is_ok_and(|flags| flags & 1 != 0)
    }

    fn write(&self, function: PciAddress, file: &str, text: &str) -> Result<(), Error> {
        let path = self.0.pci_bus().join("devices").join(function.to_string()).join(file);
        fs::write(&path, text).map_err(|source| Error::Write { path, source })
    }

    fn probe(&self, function: PciAddress) -> Result<(), Error> {
        let path = self.0.pci_bus().join("drivers_probe");
        fs::write(&path, function.to_string()).map_err(|source| Error::Write { path, source })
    }

    fn ip(&self, arguments: &[&str]) -> Result<(), Error> {
        ip(arguments).map(drop)
    }

    fn link(&self, interface: &str, vf: u16) -> Result<Link, Error> {
        let json = ip(&["-json", "link", "show", "dev", interface])?;
        parse_link(&json, vf).ok_or_else(|| Error::NoVf { interface: interface.to_owned(), vf })
    }
}

fn ip(arguments: &[&str]) -> Result<Vec<u8>, Error> {
    let output = Command::new("ip").args(arguments).output().map_err(Error::NoIp)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let message = String::from_utf8_lossy(&output.stderr);
    let words: Vec<_> = message.split_whitespace().collect();
    Err(Error::Ip { arguments: arguments.join(" "), message: words.join(" ") })
}

#[derive(Deserialize)]
struct Interface {
    #[serde(default)]
    vfinfo_list: Vec<VfInfo>,
}

#[derive(Deserialize)]
struct VfInfo {
    vf: u16,
    /// Called `mac` before iproute2 5.4.
    #[serde(alias = "mac")]
    address: String,
    #[serde(default)]
    vlan_list: Vec<VlanInfo>,
}

#[derive(Deserialize)]
struct VlanInfo {
    #[serde(default)]
    vlan: u16,
}

fn parse_link(json: &[u8], vf: u16) -> Option<Link> {
    let interfaces: Vec<Interface> = serde_json::from_slice(json).ok()?;
    let info =
        interfaces.into_iter().flat_map(|interface| interface.vfinfo_list).find(|info| info.vf == vf)?;
    Some(Link { mac: info.address, vlan: info.vlan_list.first().map_or(0, |info| info.vlan) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ip_says_of_virtual_functions_is_read() {
        let json = br#"[{"ifindex":2,"ifname":"eth0","vfinfo_list":[
            {"vf":0,"link_type":"ether","address":"52:54:00:aa:bb:01","broadcast":"ff:ff:ff:ff:ff:ff","spoofchk":true},
            {"vf":1,"link_type":"ether","address":"52:54:00:aa:bb:02","vlan_list":[{"vlan":10,"qos":0}],"spoofchk":true}]}]"#;
        let link = |mac: &str, vlan| Some(Link { mac: mac.to_owned(), vlan });
        assert_eq!(parse_link(json, 0), link("52:54:00:aa:bb:01", 0));
        assert_eq!(parse_link(json, 1), link("52:54:00:aa:bb:02", 10));
        assert_eq!(parse_link(json, 2), None);
        assert_eq!(parse_link(b"[{}]", 0), None);
        assert_eq!(parse_link(b"Device \"eth9\" does not exist.", 0), None);
    }
}
