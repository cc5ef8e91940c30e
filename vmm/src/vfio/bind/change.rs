//! One change to the host, and how it is undone. Undoing looks at what is there, so it can be done twice, or without the change
//! having been made.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::host::{Error, Host};
use crate::pci::address::PciAddress;

/// A change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "snake_case")]
pub enum Change {
    /// An interface that was down is up.
    Up {
        /// Its name.
        interface: String,
    },
    /// A physical function without virtual functions has some.
    VirtualFunctions {
        /// The physical function.
        function: PciAddress,
        /// How many.
        count: u16,
    },
    /// The MAC address of a virtual function.
    Mac {
        /// The physical function's interface.
        interface: String,
        /// Which virtual function.
        vf: u16,
        /// The new one.
        mac: String,
        /// The former one.
        former: String,
    },
    /// The VLAN of a virtual function.
    Vlan {
        /// The physical function's interface.
        interface: String,
        /// Which virtual function.
        vf: u16,
        /// The new one; 0 is none.
        vlan: u16,
        /// The former one.
        former: u16,
    },
    /// A function is bound to vfio-pci.
    Driver {
        /// Which.
        function: PciAddress,
        /// The driver it had.
        former: Option<String>,
        /// The only driver it was allowed.
        former_override: Option<String>,
    },
}

const VFIO_PCI: &str = "vfio-pci";
/// What empties `driver_override`.
const NO_OVERRIDE: &str = "\n";

impl Change {
    /// What it changes.
    pub fn subject(&self) -> String {
        match self {
            Self::Up { interface } => interface.clone(),
            Self::Mac { interface, vf, .. } | Self::Vlan { interface, vf, .. } => {
                format!("{interface} VF {vf}")
            }
            Self::VirtualFunctions { function, .. } | Self::Driver { function, .. } => function.to_string(),
        }
    }

    /// Makes it.
    pub fn make(&self, host: &impl Host) -> Result<(), Error> {
        match self {
            Self::Up { interface } => host.ip(&["link", "set", "dev", interface, "up"]),
            Self::VirtualFunctions { function, count } => {
                host.write(*function, "sriov_numvfs", &count.to_string())
            }
            Self::Mac { interface, vf, mac, .. } => set_mac(host, interface, *vf, mac),
            Self::Vlan { interface, vf, vlan, .. } => set_vlan(host, interface, *vf, *vlan),
            Self::Driver { function, former, .. } => {
                host.write(*function, "driver_override", VFIO_PCI)?;
                if former.is_some() {
                    host.write(*function, "driver/unbind", &function.to_string())?;
                }
                host.probe(*function)
            }
        }
    }

    /// Undoes it; says what is so now.
    pub fn undo(&self, host: &impl Host) -> Result<String, Error> {
        match self {
            Self::Up { interface } => {
                // It may be gone with its driver.
                if host.is_up(interface) {
                    host.ip(&["link", "set", "dev", interface, "down"])?;
                }
                Ok("down again".to_owned())
            }
            Self::VirtualFunctions { function, .. } => {
                let there = host.sysfs().function(*function);
                if there.is_ok_and(|function| function.virtual_function_count() != 0) {
                    host.write(*function, "sriov_numvfs", "0")?;
                }
                Ok("no virtual functions again".to_owned())
            }
            Self::Mac { interface, vf, mac, former } => {
                if host.link(interface, *vf).is_ok_and(|now| now.mac == *mac) {
                    set_mac(host, interface, *vf, former)?;
                }
                Ok(format!("MAC address {former} again"))
            }
            Self::Vlan { interface, vf, vlan, former } => {
                if host.link(interface, *vf).is_ok_and(|now| now.vlan == *vlan) {
                    set_vlan(host, interface, *vf, *former)?;
                }
                Ok(format!("VLAN {former} again"))
            }
            Self::Driver { function, former, former_override } => {
                let Ok(there) = host.sysfs().function(*function) else { return Ok("is gone".to_owned()) };
                if there.text("driver_override").as_deref() == Some(VFIO_PCI) {
                    host.write(
                        *function,
                        "driver_override",
                        former_override.as_deref().unwrap_or(NO_OVERRIDE),
                    )?;
                }
                if there.driver().as_deref() == Some(VFIO_PCI) {
                    host.write(*function, "driver/unbind", &function.to_string())?;
                }
                if former.is_some() && there.driver().is_none() {
                    host.probe(*function)?;
                }
                Ok(match there.driver() {
                    Some(driver) => format!("bound to {driver} again"),
                    None => "bound to no driver again".to_owned(),
                })
            }
        }
    }
}

fn set_mac(host: &impl Host, interface: &str, vf: u16, mac: &str) -> Result<(), Error> {
    host.ip(&["link", "set", "dev", interface, "vf", &vf.to_string(), "mac", mac])
}

fn set_vlan(host: &impl Host, interface: &str, vf: u16, vlan: u16) -> Result<(), Error> {
    host.ip(&["link", "set", "dev", interface, "vf", &vf.to_string(), "vlan", &vlan.to_string()])
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Up { .. } => write!(f, "up (was down)"),
            Self::VirtualFunctions { count, .. } => write!(f, "virtual functions: {count} (were 0)"),
            Self::Mac { mac, former, .. } => write!(f, "MAC address {mac} (was {former})"),
            Self::Vlan { vlan, former, .. } => write!(f, "VLAN {vlan} (was {former})"),
            Self::Driver { former, .. } => {
                write!(f, "bound to {VFIO_PCI} (was bound to {})", former.as_deref().unwrap_or("no driver"))
            }
        }
    }
}
