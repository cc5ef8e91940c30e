//! What `--version` says.

/// The version, and what this build can do, so that a report of a fault says both.
pub const VERSION: &str =
    concat!(env!("CARGO_PKG_VERSION"), " (features: exits, fifo, host-irqs, vfio, vhost-user-net)");
