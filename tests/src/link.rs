//! The guest's NICs and their cables: each has a network of its own.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// Length of a network's prefix.
pub const PREFIX: u8 = 24;

/// A NIC of the guest, and the far end of its cable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Link {
    /// The guest's only NIC, or its software NIC where it has a virtual function too.
    #[default]
    First,
    /// A virtual function beside a software NIC.
    Second,
}

impl Link {
    /// The guest's name for it: drivers make their interfaces as they are loaded, virtio's first.
    pub fn interface(self) -> &'static str {
        match self {
            Self::First => "eth0",
            Self::Second => "eth1",
        }
    }

    /// The network namespace of the far end.
    pub fn namespace(self) -> &'static str {
        match self {
            Self::First => "ivcpu-wire",
            Self::Second => "ivcpu-wire-2",
        }
    }

    /// The wire's address.
    pub const fn wire(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self as u8, 1)
    }

    /// The guest's address.
    pub const fn guest(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self as u8, 2)
    }
}
