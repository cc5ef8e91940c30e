//! A KVM virtual machine monitor with an IVCPU, a virtual CPU that takes every device interrupt.
//!
//! A path says the concept: [`machine`] wires the parts together, [`boot`] plays the firmware, [`vcpu`] is KVM's run loop,
//! [`pci`] and [`virtio`] are what a guest sees of its devices, [`ivcpu`] and [`pin`] say who runs where, [`fifo`]
//! and [`ivshmem`] bring the region for exitless completions to the guest, [`vfio`] brings the host's own functions,
//! [`sandbox`] confines all of it, and [`api`] lets other programs look at the VM and change its state.

pub mod affinity;
pub mod api;
pub mod boot;
pub mod chain;
pub mod cli;
pub mod devices;
pub mod doctor;
pub mod events;
pub mod exits;
pub mod fifo;
pub mod gsi;
pub mod ivcpu;
pub mod ivshmem;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod pause;
pub mod pci;
pub mod pin;
pub mod placement;
pub mod power;
pub mod sandbox;
pub mod serial;
pub mod signals;
pub mod slot;
pub mod suboption;
pub mod terminal;
pub mod vcpu;
pub mod version;
pub mod vfio;
pub mod virtio;
