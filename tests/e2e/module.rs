//! The guest module's sources, as the compiler and the kernel's checker see them, and as DKMS gets them.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use ivcpu_lab::image::ivcpu_module;
use ivcpu_lab::provision::{Kernel, Provision};
use ivcpu_lab::workspace::Workspace;

#[test]
fn neither_warnings_nor_sparse_have_anything_to_say() -> Result<()> {
    let workspace = Workspace::locate()?;
    let provision = Provision::new(&workspace);
    for kernel in [Kernel::V6_1, Kernel::V6_12] {
        ivcpu_module::check(&workspace, &provision, kernel)?;
    }
    Ok(())
}

/// What `make dkms` puts into /usr/src builds there as it is.
#[test]
fn the_dkms_tree_is_whole() -> Result<()> {
    let workspace = Workspace::locate()?;
    let provision = Provision::new(&workspace);
    let (make, headers) = (provision.make()?, provision.kernel(Kernel::V6_12)?.headers);
    let root = tempfile::tempdir()?;
    let run = |arguments: &[&str]| -> Result<()> {
        let output = Command::new(&make).args(arguments).output().context("running make")?;
        ensure!(output.status.success(), "make {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    let module = workspace.root().join("guest-driver/module").display().to_string();
    run(&["-C", &module, "dkms", &format!("DESTDIR={}", root.path().display())])?;
    let mut trees = fs::read_dir(root.path().join("usr/src"))?;
    let tree = trees.next().context("nothing in usr/src")??.path();
    run(&["-C", &tree.display().to_string(), &format!("KDIR={}", headers.display()), "CC=cc"])?;
    ensure!(tree.join("ivcpu.ko").exists(), "no ivcpu.ko in {}", tree.display());
    Ok(())
}
