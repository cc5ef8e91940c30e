//! An emulated virtualization host, and the comparisons and end-to-end tests that run in it.

pub mod bystander;
pub mod channel;
pub mod emulated_host;
pub mod guest;
pub mod image;
pub mod in_host;
pub mod pcpu;
pub mod process;
pub mod procfs;
pub mod progress;
pub mod provision;
pub mod qmp;
pub mod shell;
pub mod traffic;
pub mod trial;
pub mod workspace;
