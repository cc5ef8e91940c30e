//! PCI: one bus below one host bridge, its configuration space, and message-signalled interrupts. There are no interrupt pins
//! and no bridges.

pub mod address;
pub mod bus;
pub mod config;
pub mod line;
pub mod msi;
pub mod msix;
pub mod window;
