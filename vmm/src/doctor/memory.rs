//! Guest memory.

use super::{Check, Root};

/// CAP_IPC_LOCK as a bit.
const IPC_LOCK: u64 = 1 << 14;

/// Huge pages, set aside or transparent.
pub(super) fn huge_pages(root: &Root) -> Check {
    let name = "huge pages";
    let free: u64 = root.text("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").parse().unwrap_or(0);
    let shmem = root.text("sys/kernel/mm/transparent_hugepage/shmem_enabled");
    let transparent =
        ["[always]", "[within_size]", "[advise]", "[force]"].iter().any(|mode| shmem.contains(mode));
    match (free, transparent) {
        (1.., _) => Check::ok(name, format!("{} MiB are free (--memory hugepages=on)", free * 2)),
        (0, true) => Check::ok(name, "the kernel may use transparent ones for guest memory"),
        (0, false) => Check::warn(
            name,
            "none: guest memory takes many more exits to fill, and misses the TLB more often",
            "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, or set some aside in /proc/sys/vm/nr_hugepages",
        ),
    }
}

/// How much memory may be locked, as passthrough does with all of a guest's.
pub(super) fn locked(root: &Root) -> Check {
    let name = "locked memory";
    let status = root.text("proc/self/status");
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = capabilities.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or(0);
    let limits = root.text("proc/self/limits");
    let limit = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
    let soft = limit.and_then(|limit| limit.split_whitespace().next()).unwrap_or("0");
    if capabilities & IPC_LOCK != 0 || soft == "unlimited" {
        return Check::ok(name, "as much as a guest has may be locked for passthrough");
    }
    let mebibytes = soft.parse::<u64>().unwrap_or(0) >> 20;
    Check::warn(
        name,
        format!("{mebibytes} MiB may be locked, and --device locks all of a guest's memory"),
        "ulimit -l unlimited, LimitMEMLOCK=infinity in a systemd unit, or CAP_IPC_LOCK",
    )
}
