//! Programs by others that ours are paired with.

use std::fs;
use std::path::{Path, PathBuf};

use super::archive::{SUITE, Selection};
use super::{ALIOTH, Error, Provision, Unpacked};

/// DPDK's drivers of what is no hardware: frontend, backend, TAP, and the pools of frames.
const DPDK_DRIVERS: [&str; 4] = ["mempool_ring", "net_tap", "net_vhost", "net_virtio"];

/// An unpacked libvirt.
#[derive(Clone, Debug)]
pub struct Libvirt {
    /// `virsh`, as a launcher; with `qemu:///embed` it is the daemon, too.
    pub virsh: PathBuf,
    /// The folder that would be installed as `/usr/share`.
    pub data: PathBuf,
}

impl Provision {
    /// DPDK's testpmd, as a launcher that any process can start by this path, with its drivers of virtual devices.
    pub fn testpmd(&self) -> Result<PathBuf, Error> {
        let dir = self.workspace.cache().join("dpdk");
        self.fetch(&dir, |archive| {
            archive.unpack("DPDK", Selection::WithDependencies(&["dpdk-dev"]), SUITE, &dir)
        })?;
        let dpdk = Unpacked::new(dir);
        let launcher = self.workspace.launchers().join("dpdk-testpmd");
        // By their bare names the loader looks for them in the folder's own libraries. (By a path DPDK would refuse them
        // wherever a folder above them may be written to by everybody, as /tmp.)
        let libraries = dpdk.path("usr/lib/x86_64-linux-gnu");
        let drivers: Result<Vec<_>, Error> =
            DPDK_DRIVERS.iter().map(|driver| dpdk_driver(&libraries, driver)).collect();
        let drivers: Vec<_> = drivers?.iter().map(|name| format!("-d {name}")).collect();
        dpdk.write_launcher(
            &launcher,
            &dpdk.loader(),
            &dpdk.find(&["usr/bin/dpdk-testpmd"])?,
            "",
            &drivers.join(" "),
        )?;
        Ok(launcher)
    }

    /// Alioth, a VMM by others that our backend is paired with. It is built from its sources.
    pub fn alioth(&self) -> Result<PathBuf, Error> {
        Ok(ALIOTH.install(&self.workspace)?)
    }

    /// libvirt with its QEMU driver.
    pub fn libvirt(&self) -> Result<Libvirt, Error> {
        let dir = self.workspace.cache().join("libvirt-qemu");
        self.fetch(&dir, |archive| {
            let packages = ["libvirt-clients", "libvirt-daemon", "libvirt-daemon-driver-qemu"];
            archive.unpack("libvirt", Selection::WithDependencies(&packages), SUITE, &dir)
        })?;
        let libvirt = Unpacked::new(dir);
        let virsh = self.workspace.launchers().join("virsh");
        let drivers = libvirt.find(&["usr/lib/x86_64-linux-gnu/libvirt/connection-driver"])?;
        let environment = format!("export LIBVIRT_DRIVER_DIR='{}'\n", drivers.display());
        libvirt.write_launcher(
            &virsh,
            &libvirt.loader(),
            &libvirt.find(&["usr/bin/virsh"])?,
            &environment,
            "",
        )?;
        Ok(Libvirt { virsh, data: libvirt.find(&["usr/share"])? })
    }
}

/// The name of a DPDK driver with the release's ABI number, by which the loader finds it.
fn dpdk_driver(libraries: &Path, driver: &str) -> Result<String, Error> {
    let prefix = format!("librte_{driver}.so.");
    let entries = fs::read_dir(libraries).map_err(|e| Error::Read(libraries.into(), e))?;
    let mut names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let is_abi = |abi: &str| abi.bytes().all(|byte| byte.is_ascii_digit());
    names
        .find(|name| name.strip_prefix(&prefix).is_some_and(is_abi))
        .ok_or_else(|| Error::Missing(libraries.join(prefix)))
}
