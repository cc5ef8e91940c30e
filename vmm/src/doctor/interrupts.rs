//! What moves the host's interrupts, and what counts exits.

use nix::unistd::{AccessFlags, access};

use super::{Check, Root};

/// irqbalance.
pub(super) fn balancer(root: &Root) -> Check {
    let name = "irqbalance";
    let is_balancer = |pid: &String| root.text(&format!("proc/{pid}/comm")) == "irqbalance";
    let mut processes =
        root.names("proc").into_iter().filter(|name| name.bytes().all(|b| b.is_ascii_digit()));
    match processes.find(is_balancer) {
        None => Check::ok(name, "does not run"),
        Some(pid) => Check::warn(
            name,
            format!(
                "runs (process {pid}) and may move interrupts off the IVCPU's pCPU; they are moved back every 2 s"
            ),
            "stop it, or set IRQBALANCE_BANNED_CPULIST to the IVCPU's pCPU",
        ),
    }
}

/// The tracepoints that `ivcpu-vmm exits` counts with.
pub(super) fn tracing(root: &Root) -> Check {
    let name = "tracing";
    let instances = root.path("sys/kernel/tracing/instances");
    if !instances.exists() {
        return Check::warn(
            name,
            "exits cannot be counted: no tracefs",
            "as root, mount -t tracefs none /sys/kernel/tracing",
        );
    }
    if access(&instances, AccessFlags::W_OK).is_err() {
        return Check::warn(
            name,
            "exits cannot be counted by this user",
            "run as root (kernel lockdown forbids it too)",
        );
    }
    if !root.path("sys/kernel/tracing/events/kvm/kvm_exit").exists() {
        return Check::warn(name, "exits cannot be counted: KVM's tracepoints are not there", "load kvm");
    }
    Check::ok(name, "exits can be counted")
}
