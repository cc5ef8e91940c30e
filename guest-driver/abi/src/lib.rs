//! The shared FIFO region through which a virtio backend hands completions to the IVCPU without an interrupt.
//!
//! The backend's poll threads are the producers, one a ring ([`Producer`]); the IVCPU, an extra vCPU of the
//! guest, is the consumer of all rings ([`Consumer`]). A completion says "look at the used ring of this
//! virtqueue"; it takes the place of an interrupt, one for one. While the consumer is awake nothing else
//! happens; while it sleeps the producer is told to signal the virtqueue's ordinary `call`, whose interrupt
//! wakes it.
//!
//! `docs/fifo-abi.md` specifies the region for other implementations. In this crate [`layout`] says where
//! everything lies, `region` is the memory (and the only unsafe code), `spsc` is one ring, `sleep` holds the
//! fences, `watch` the producer's clocks.
//!
//! The crate needs neither the standard library nor an allocator.

#![no_std]
#![deny(unsafe_code)]

#[cfg(test)]
extern crate std;

mod consumer;
pub mod layout;
mod producer;
#[allow(unsafe_code)]
mod region;
mod sleep;
mod spsc;
mod watch;

pub use consumer::{Completion, Consumer, Sleep};
pub use layout::{Binding, Geometry, State};
pub use producer::{Overdue, Producer, Push, Reason, Source};
pub use region::{Error, Region};
