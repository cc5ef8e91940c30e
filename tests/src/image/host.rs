//! The emulated host's image: enough to mount the machine's own root over 9p and start the agent in it.

use std::path::{Path, PathBuf};

use super::modules::Modules;
use super::{Error, Image};
use crate::provision::{BUSYBOX, KernelFiles, Unpacked};

const INIT: &str = include_str!("host-init.sh");

/// i2c_i801 is the driver of a function of the chipset, whose IOMMU group holds others.
const MODULES: [&str; 14] = [
    "9pnet_virtio",
    "9p",
    "virtio_console",
    "kvm_amd",
    "tun",
    "vhost_net",
    "veth",
    "bridge",
    "virtio_net",
    "virtio_blk",
    "igb",
    "vfio_pci",
    "vfio_iommu_type1",
    "i2c_i801",
];

/// Writes the image to `path`. `visible` are folders of the machine that must be seen in the emulated host even
/// if they lie below `/tmp` or `/run`, which are fresh there; `agent` is the lab's own program.
pub fn build_host(
    path: &Path,
    kernel: &KernelFiles,
    tools: &Unpacked,
    visible: &[PathBuf],
    agent: &Path,
) -> Result<(), Error> {
    let mut image = Image::default();
    image.copy(&tools.find(BUSYBOX)?, "bin/busybox", 0o755)?;
    let mut load = String::new();
    for module in Modules::of(kernel)?.in_loading_order(&MODULES)? {
        // Nested paging in the guests' guests is not wanted, and AVIC would hide the exits that are counted.
        let options = if module.name == "kvm_amd" { " nested=0 avic=0" } else { "" };
        load += &format!("/modules/{}.ko{options}\n", module.name);
        image
            .file(&format!("modules/{}.ko", module.name), 0o644, &module.content)
            .map_err(Error::file("add", path))?;
    }
    let visible: String = visible.iter().map(|folder| format!("{}\n", folder.display())).collect();
    let agent = format!("{}\n", agent.display());
    for (name, mode, content) in [
        ("init", 0o755, INIT),
        ("load", 0o644, &load),
        ("visible", 0o644, &visible),
        ("agent", 0o644, &agent),
    ] {
        image.file(name, mode, content.as_bytes()).map_err(Error::file("add", path))?;
    }
    for folder in ["proc", "sys", "dev", "root9p", "host"] {
        image.folder(folder).map_err(Error::file("add", path))?;
    }
    image.write(path)
}
