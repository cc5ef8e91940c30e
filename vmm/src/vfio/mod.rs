//! Passthrough: a PCI function of the host, such as a NIC's virtual function, in the guest.
//!
//! The kernel's VFIO does the dangerous part: it lets nobody but us have the function, keeps its DMA inside guest memory by the
//! IOMMU, and turns its interrupts into writes of eventfds. Here is what the guest sees of it:
//!
//! ```text
//! guest reads and writes BAR  -> KVM memory slot over the function's own registers ([`bars`], [`mapping`]); nobody in between
//!                                except the pages with the MSI-X table, which come here
//! function reads, writes RAM  -> IOMMU, which maps guest-physical addresses to our memory ([`container`])
//! function interrupts         -> vfio-pci -> eventfd -> irqfd -> MSI-X message -> guest ([`interrupts`])
//! guest configures            -> [`config`]: BARs and MSI/MSI-X here, the rest to the function, as far as VFIO lets it
//! ```
//!
//! Before any of that, [`group`] and [`reset`] check that the function is one that can be given away, through what
//! [`sysfs`] says about it. [`bind`] makes a function one that can, and undoes that; [`list`] shows them.

pub mod attach;
pub mod bars;
pub mod bind;
pub mod command;
pub mod config;
pub mod container;
pub mod function;
pub mod group;
pub mod hardware;
pub mod holders;
pub mod interrupts;
pub mod list;
pub mod mapping;
pub mod options;
pub mod reset;
pub mod sysfs;
