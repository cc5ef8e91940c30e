//! A guest that is no machine: this host's own TCP in a network namespace of its own, behind a TAP that testpmd forwards
//! to a vhost-user port. It is what the guest is elsewhere, so the traffic is the same.

use std::net::SocketAddr;

use anyhow::Context;

use super::namespace::Namespace;
use super::wire::TAP;
use crate::link::Link;
use crate::traffic::{End, PORT, Traffic};

/// The near end of the first cable.
pub struct NearEnd {
    namespace: Namespace,
}

impl NearEnd {
    /// Makes the namespace and its TAP, which has the guest's address and is called as the wire's is.
    pub fn set_up(queue_pairs: u16) -> anyhow::Result<Self> {
        let namespace = Namespace::create(Link::First.guest_namespace())?;
        namespace.add_tap(TAP, queue_pairs)?;
        namespace.bring_up(TAP, Link::First.guest())?;
        Ok(Self { namespace })
    }

    /// The words in front of a command that make it run in the namespace.
    pub fn enter_words() -> [String; 3] {
        Namespace::enter_words(&Link::First.guest_namespace())
    }

    /// Connects to the wire, whose end must be listening, and starts traffic.
    pub fn start_traffic(&self, traffic: Traffic) -> anyhow::Result<End> {
        let wire = SocketAddr::from((Link::First.wire(), PORT));
        self.namespace.within(move || End::connect(traffic, wire)).context("connecting to the wire")
    }
}
