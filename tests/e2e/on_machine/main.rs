//! Pairings that need no emulated host: they run on this machine itself, as root for their network namespaces.

mod dpdk;
mod libvirt;
mod qemu;
