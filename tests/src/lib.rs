//! An emulated virtualization host, and the comparisons and end-to-end tests that run in it.

pub mod progress;
pub mod provision;
pub mod workspace;
