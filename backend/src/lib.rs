//! A vhost-user net backend: poll threads move a guest's frames, the guest is interrupted only when its driver asks.
//!
//! The way of a frame from the guest: [`worker`] finds it, [`from_guest`] takes it off its ring ([`ring`],
//! [`memory`]) and hands it to the [`uplink`]; [`completion`] tells the driver, through the [`fifo`] if there is one. Frames to the guest come through
//! [`to_guest`] and leave by the same door. [`daemon`] opens what the ports need and confines the program ([`sandbox`]);
//! [`serving`] is a port's life, [`session`] a frontend's; [`device`] and [`vring`] are what the vhost-user-backend crate
//! talks to, [`door`] what stands before it.

pub mod affinity;
pub mod cli;
pub mod completion;
pub mod daemon;
pub mod device;
pub mod door;
pub mod fifo;
pub mod from_guest;
pub mod lost_memory;
pub mod mapped;
pub mod memory;
pub mod metrics;
pub mod notify;
pub mod port;
pub mod ring;
pub mod sandbox;
pub mod serving;
pub mod session;
pub mod show;
pub mod socket;
pub mod stats;
pub mod to_guest;
pub mod uplink;
pub mod version;
pub mod vring;
pub mod worker;
