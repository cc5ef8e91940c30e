//! What `--device` needs.

use super::{Check, Root};

/// An IOMMU that is on.
pub(super) fn iommu(root: &Root) -> Check {
    let name = "IOMMU";
    let units = root.names("sys/class/iommu");
    if units.is_empty() {
        return Check::warn(
            name,
            "off, so no passthrough",
            "switch it on in the firmware (VT-d, AMD-Vi); on Intel boot with intel_iommu=on",
        );
    }
    Check::ok(name, units.join(", "))
}

/// Interrupt remapping: without it a guest could send the host any interrupt.
pub(super) fn interrupt_remapping(root: &Root) -> Check {
    let name = "interrupt remapping";
    if root.text("proc/interrupts").contains(" IR-") {
        return Check::ok(name, "on");
    }
    Check::warn(
        name,
        "off, so VFIO gives no function away",
        "switch it on in the firmware (VT-d, x2APIC), or accept the risk with vfio_iommu_type1.allow_unsafe_interrupts=1",
    )
}

/// The modules.
pub(super) fn vfio(root: &Root) -> Check {
    let name = "VFIO";
    if root.path("sys/bus/pci/drivers/vfio-pci").exists() && root.path("dev/vfio/vfio").exists() {
        return Check::ok(name, "vfio-pci is loaded");
    }
    Check::warn(name, "not loaded", "modprobe vfio-pci vfio_iommu_type1")
}

/// The newer interface, which is not used.
pub(super) fn iommufd(root: &Root) -> Check {
    let there = root.path("dev/iommu").exists();
    Check::ok(
        "iommufd",
        if there { "there, not needed (VFIO groups are used)" } else { "not there, not needed" },
    )
}

/// NICs with virtual functions.
pub(super) fn virtual_functions(root: &Root) -> Check {
    let name = "virtual functions";
    let functions = root.sysfs().functions().unwrap_or_default();
    let found: Vec<_> = functions
        .iter()
        .filter(|function| function.most_virtual_functions() > 0)
        .map(|function| {
            let (now, most) = (function.virtual_function_count(), function.most_virtual_functions());
            format!("{}: {now} of {most} made", function.address)
        })
        .collect();
    if found.is_empty() {
        return Check::warn(
            name,
            "no device shows any",
            "switch SR-IOV on in the firmware and the NIC's own settings, and load its driver",
        );
    }
    Check::ok(name, found.join(", "))
}
