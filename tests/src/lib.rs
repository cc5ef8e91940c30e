//! An emulated virtualization host, and the comparisons and end-to-end tests that run in it.

pub mod bystander;
pub mod channel;
pub mod compare;
pub mod emulated_host;
pub mod figures;
pub mod guest;
pub mod html;
pub mod image;
pub mod in_host;
pub mod judgement;
pub mod link;
pub mod lock;
mod matrix;
pub mod pcpu;
pub mod process;
pub mod procfs;
pub mod progress;
pub mod provision;
pub mod qmp;
pub mod ratio;
pub mod report;
pub mod result;
pub mod shell;
pub mod statistics;
pub mod traffic;
pub mod trial;
pub mod workspace;
