//! The guest's interrupt service, on made-up files, under every shell of this machine it must work with.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use ivcpu_lab::workspace::Workspace;

#[test]
fn the_service_moves_what_can_be_moved_under_every_shell() -> Result<()> {
    let script = Workspace::locate()?.root().join("guest-driver/service/test");
    let output = Command::new("sh").arg(&script).output().context("running sh")?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}: {stdout}{stderr}", script.display());
    Ok(())
}
