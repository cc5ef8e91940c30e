//! What `--version` says.

/// The version, and what this build can do, so that a report of a fault says both.
pub const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (features: control-queue, fifo, landlock, metrics, mtu, multi-queue, ports, seccomp, stats, systemd, tap)"
);
