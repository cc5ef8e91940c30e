//! A KVM virtual machine monitor with an IVCPU, a virtual CPU that takes every device interrupt.

pub mod affinity;
pub mod exits;
