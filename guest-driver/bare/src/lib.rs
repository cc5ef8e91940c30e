//! A guest without an operating system that consumes the FIFO region on a real vCPU, and the VM around it.
//!
//! The guest (`guest/main.rs`) is compiled by the build script and embedded here. A [`Machine`] runs it under the
//! KVM of this machine: [`Machine::start`] gives it a job, [`Vcpu::run`] enters it until it reports. All
//! else goes through the [`Mailbox`](mailbox::Mailbox) and the FIFO region.

mod exits;
mod machine;
pub mod mailbox;
mod memory;
mod registers;

pub use exits::{Count, Exits};
pub use machine::{Error, Machine, Vcpu};
pub use memory::Memory;
