//! PCI: one bus below one host bridge, its configuration space, and MSI-X. There are no interrupt pins and no bridges.

pub mod bus;
pub mod config;
pub mod msix;
pub mod window;
