//! The guest's NICs and their cables: each has a network of its own.

use std::hash::{DefaultHasher, Hash, Hasher};
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

    /// The network namespace of the far end. Two checkouts may use theirs at once, and one takes over only what a killed
    /// run of its own has left: the name carries the checkout's mark.
    pub fn namespace(self) -> String {
        format!("ivcpu-wire-{}-{:08x}", self as u8, checkout())
    }

    /// The network namespace of a guest that is not a machine but DPDK with this host's own TCP behind it.
    pub fn guest_namespace(self) -> String {
        format!("ivcpu-guest-{}-{:08x}", self as u8, checkout())
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

/// A mark of the checkout this was built in, the same in every process of it.
fn checkout() -> u32 {
    let mut hasher = DefaultHasher::new();
    env!("CARGO_MANIFEST_DIR").hash(&mut hasher);
    hasher.finish() as u32
}
