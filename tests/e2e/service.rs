//! The guest's interrupt service, on made-up files, under every shell it must work with.

use std::env;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use ivcpu_lab::provision::{BUSYBOX, Provision};
use ivcpu_lab::workspace::Workspace;

#[test]
fn the_service_moves_what_can_be_moved_under_every_shell() -> Result<()> {
    let workspace = Workspace::locate()?;
    // The busybox that guests have, whatever is installed here.
    let shells = tempfile::tempdir().context("making a temporary folder")?;
    let busybox = Provision::new(&workspace).tools()?.find(BUSYBOX)?;
    symlink(busybox, shells.path().join("busybox")).context("linking to busybox")?;
    let present = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([PathBuf::from(shells.path())].into_iter().chain(env::split_paths(&present)))?;

    let script = workspace.root().join("guest-driver/service/test");
    let output = Command::new("sh").arg(&script).env("PATH", path).output().context("running sh")?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}: {stdout}{stderr}", script.display());
    for shell in ["dash", "busybox ash"] {
        ensure!(
            stdout.lines().any(|line| line == format!("ok: {shell}")),
            "not tested under {shell}: {stdout}"
        );
    }
    Ok(())
}
