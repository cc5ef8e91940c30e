//! What runs inside the emulated host. One executable, so that all of it shares one: a boot costs more than most tests.

mod alioth;
mod boot;
mod confine;
mod disk;
mod dpdk;
mod fifo;
mod host_irqs;
mod huge_pages;
mod irq;
mod kernels;
mod passthrough;
mod poll;
mod qemu;
mod reconnect;
mod sriov;
mod two_nics;
