//! A virtual function of the emulated host's igb, bound to vfio-pci by `ivcpu-vmm vfio`, which also undoes it.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

use super::Host;

const MAC: &str = "52:54:00:49:56:02";

/// Whether shared memory may come in large pages.
const LARGE_SHARED_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// A bound virtual function; what was changed for it is undone when it is dropped.
pub struct VirtualFunction {
    program: PathBuf,
    path: std::ffi::OsString,
    physical: String,
    address: String,
}

impl VirtualFunction {
    /// Makes one and binds it.
    pub fn bind(host: &Host) -> anyhow::Result<Self> {
        let program = host.binary("ivcpu-vmm");
        // It asks `ip` to set the address; a bare system has none.
        let present = std::env::var_os("PATH").unwrap_or_default();
        let path =
            std::env::join_paths([host.launcher("")].into_iter().chain(std::env::split_paths(&present)))?;
        let physical = igb()?;
        let mut function = Self { program, path, physical, address: String::new() };
        use_large_pages()?;
        // What a killed run may have left.
        let _ = function.vfio(&["unbind", &function.physical]);
        let text = function.vfio(&["bind", &function.physical, "--vfs", "1", "--mac", MAC])?;
        let ready = text.lines().find_map(|line| line.split_once(": ready"));
        function.address = ready.with_context(|| format!("no function is ready: {text}"))?.0.to_owned();
        Ok(function)
    }

    /// Its PCI address.
    pub fn address(&self) -> &str {
        &self.address
    }

    fn vfio(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = Command::new(&self.program)
            .arg("vfio")
            .args(arguments)
            .env("PATH", &self.path)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("running {}", self.program.display()))?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "ivcpu-vmm vfio {}: {}", arguments.join(" "), errors.trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for VirtualFunction {
    fn drop(&mut self) {
        // One that was never bound has nothing to undo.
        if !self.address.is_empty()
            && let Err(e) = self.vfio(&["unbind", &self.physical])
        {
            eprintln!("lab: {e:#}");
        }
    }
}

/// Has the shared memory of the guests to come made of large pages, as VMMs advise. (QEMU's own is not shared with a
/// virtual function, and the kernel's default.)
///
/// QEMU's igb drops a frame to be sent if a part of it crosses from one page to another that does not follow it in the
/// host's memory (`net_tx_pkt_add_raw_fragment_pci`): with small pages that is one frame in ten, and TCP stalls. What a
/// driver sends lies within its own large pages.
fn use_large_pages() -> anyhow::Result<()> {
    fs::write(LARGE_SHARED_PAGES, "advise").with_context(|| format!("writing {LARGE_SHARED_PAGES}"))
}

/// The address of the host's igb.
fn igb() -> anyhow::Result<String> {
    let functions = fs::read_dir("/sys/bus/pci/drivers/igb").context("the host has no igb")?;
    let names = functions.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.into_iter().find(|name| name.contains(':')).context("no function is bound to igb")
}
