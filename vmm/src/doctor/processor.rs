//! Processors and KVM.

use std::fs::File;
use std::io::ErrorKind;

use super::{Check, Root};
use crate::pin::PcpuList;

/// Above this an idle vCPU keeps its pCPU busy for longer than any wake-up it saves, ns.
const LONG_HALT_POLL_NS: u64 = 1_000_000;

/// VMX or SVM.
pub(super) fn virtualization(root: &Root) -> Check {
    let name = "virtualization";
    let cpuinfo = root.text("proc/cpuinfo");
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    match (has("vmx"), has("svm")) {
        (true, _) => Check::ok(name, "VMX"),
        (_, true) => Check::ok(name, "SVM"),
        _ => Check::bad(
            name,
            "the processor shows neither VMX nor SVM",
            "switch it on in the firmware, or nested virtualization in the outer VM",
        ),
    }
}

/// /dev/kvm.
pub(super) fn kvm(root: &Root) -> Check {
    let name = "/dev/kvm";
    match File::options().read(true).write(true).open(root.path("dev/kvm")) {
        Ok(_) => Check::ok(name, "may be used"),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            Check::bad(name, "may not be used by this user", "run as root, or join the group kvm")
        }
        Err(error) => {
            Check::bad(name, format!("cannot be opened ({error})"), "modprobe kvm_intel or kvm_amd")
        }
    }
}

/// Room for an IVCPU.
pub(super) fn pcpus(root: &Root) -> Check {
    let name = "pCPUs";
    match count(&root.text("sys/devices/system/cpu/online")) {
        0 | 1 => {
            Check::bad(name, "one is online", "an IVCPU needs a pCPU of its own beside the application's")
        }
        online => Check::ok(name, format!("{online} are online")),
    }
}

/// pCPUs that the scheduler leaves alone.
pub(super) fn isolated(root: &Root) -> Check {
    let name = "isolated pCPUs";
    let list = root.text("sys/devices/system/cpu/isolated");
    if count(&list) > 0 {
        return Check::ok(name, list);
    }
    Check::warn(
        name,
        "none: the host may run other programs on the IVCPU's pCPU",
        "boot the host with isolcpus=domain,N or keep others away with a cpuset",
    )
}

/// Posted interrupts and AVIC: good to know, not needed.
pub(super) fn interrupt_virtualization(root: &Root) -> Check {
    let name = "interrupt virtualization";
    let on = |file: &str| matches!(root.text(file).as_str(), "Y" | "1");
    let found = if on("sys/module/kvm_intel/parameters/enable_apicv") {
        "APICv is on: the processor posts interrupts itself where it can, and an IVCPU gains less"
    } else if on("sys/module/kvm_amd/parameters/avic") {
        "AVIC is on: the processor posts interrupts itself where it can, and an IVCPU gains less"
    } else {
        "off: each interrupt costs exits, which an IVCPU takes off the application"
    };
    if root.names("sys/module").iter().any(|module| matches!(module.as_str(), "kvm_intel" | "kvm_amd")) {
        Check::ok(name, found)
    } else {
        Check::warn(name, "not known", "load kvm_intel or kvm_amd")
    }
}

/// How long the host polls before a halted vCPU sleeps.
pub(super) fn halt_polling(root: &Root) -> Check {
    let name = "halt polling";
    match root.text("sys/module/kvm/parameters/halt_poll_ns").parse::<u64>() {
        Ok(0) => Check::ok(name, "off: an idle IVCPU sleeps at once"),
        Ok(ns) if ns <= LONG_HALT_POLL_NS => {
            Check::ok(name, format!("an idle IVCPU polls for up to {} us before it sleeps", ns / 1000))
        }
        Ok(ns) => Check::warn(
            name,
            format!("an idle IVCPU keeps its pCPU busy for {} us before it sleeps", ns / 1000),
            "echo 200000 > /sys/module/kvm/parameters/halt_poll_ns",
        ),
        Err(_) => Check::warn(name, "not known", "load kvm"),
    }
}

/// How many pCPUs a list of the kernel's has.
fn count(list: &str) -> usize {
    format!("[{list}]").parse::<PcpuList>().map_or(0, |list| list.0.len())
}
