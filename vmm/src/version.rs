//! What `--version` says.

/// The version, and what this build can do, so that a report of a fault says both.
pub const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (features: api, block, console, exits, fifo, host-irqs, landlock, pvh, rng, seccomp, vfio, vhost-user-net)"
);
