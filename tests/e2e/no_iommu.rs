//! A host without an IOMMU gives no function to a VM, and says so before it changes anything.

use std::time::Duration;

use anyhow::{Result, ensure};
use ivcpu_lab::emulated_host::{EmulatedHost, Input, Options};
use ivcpu_lab::provision::{Kernel, Provision};
use ivcpu_lab::workspace::Workspace;

const UPLINK: &str = "0000:01:00.0";

#[test]
fn functions_stay_with_a_host_that_has_no_iommu() -> Result<()> {
    let workspace = Workspace::locate()?;
    let provision = Provision::new(&workspace);
    let options = Options { kernel_words: "intel_iommu=off".into(), ..Options::default() };
    let mut host = EmulatedHost::build_and_boot(&workspace, &provision, &[], &options)?;
    let program = workspace.release().join("ivcpu-vmm").display().to_string();
    // Refused before it is looked at.
    let kernel = provision.kernel(Kernel::V6_12)?.image.display().to_string();
    for arguments in [&["vfio", "bind", UPLINK][..], &["--kernel", &kernel, "--device", UPLINK]] {
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        let run = host.command([&[program.as_str()], arguments].concat());
        let status = host.run(&run, Input::Empty, Some(Duration::from_secs(30)), |error, bytes| {
            if error { errors.extend_from_slice(bytes) } else { output.extend_from_slice(bytes) }
        })?;
        let line = String::from_utf8_lossy(&errors);
        println!("{status}: {line}");
        ensure!(status == 1 && output.is_empty() && line.lines().count() == 1, "{status}: {line}");
        ensure!(line.contains(UPLINK) && line.contains("is in no IOMMU group"), "{line}");
        ensure!(line.contains("intel_iommu=on"), "what to do is not in: {line}");
    }
    Ok(())
}
