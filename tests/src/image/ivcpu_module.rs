//! Builds the guest module for one of the lab's kernels, from the shipped sources and makefile.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Error;
use crate::provision::{Kernel, Provision};
use crate::workspace::Workspace;

/// The folders of `guest-driver` that the module is built from.
const SOURCES: [&str; 2] = ["module", "include"];

/// The module for `kernel`, made anew of what the sources are now. The source tree stays clean: kbuild writes beside
/// its sources, so it gets a copy of them.
pub fn build(workspace: &Workspace, provision: &Provision, kernel: Kernel) -> Result<PathBuf, Error> {
    let at = sources(workspace, kernel, "module")?;
    make(provision, kernel, &at, &["module"])?;
    Ok(at.join("ivcpu.ko"))
}

/// Builds it with all warnings and sparse; what they said is an error.
pub fn check(workspace: &Workspace, provision: &Provision, kernel: Kernel) -> Result<(), Error> {
    let sparse = format!("SPARSE={}", provision.sparse()?.display());
    let at = sources(workspace, kernel, "module-check")?;
    let said = make(provision, kernel, &at, &["check", &sparse])?;
    if said.is_empty() {
        return Ok(());
    }
    Err(Error::Module { release: provision.kernel(kernel)?.release, message: said })
}

/// A copy of the sources for one kernel: kbuild writes beside its sources, and the source tree stays clean.
fn sources(workspace: &Workspace, kernel: Kernel, folder: &str) -> Result<PathBuf, Error> {
    let at = workspace.cache().join(folder).join(kernel.name());
    for folder in SOURCES {
        copy_changed(&workspace.root().join("guest-driver").join(folder), &at.join(folder))?;
    }
    // The module's version is that of the workspace, which its makefile compares.
    copy_changed_file(&workspace.root().join("Cargo.toml"), &at.with_file_name("Cargo.toml"))?;
    Ok(at.join(SOURCES[0]))
}

/// Runs make in `at`; what it and the compiler said on standard error.
fn make(provision: &Provision, kernel: Kernel, at: &Path, words: &[&str]) -> Result<String, Error> {
    let files = provision.kernel(kernel)?;
    let make = provision.make()?;
    let output = Command::new(&make)
        .arg("-C")
        .arg(at)
        .arg(format!("KDIR={}", files.headers.display()))
        .arg("CC=cc")
        .args(words)
        .stdin(Stdio::null())
        .output()
        .map_err(Error::file("run", &make))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        Ok(said)
    } else {
        Err(Error::Module { release: files.release, message: said })
    }
}

/// Copies the files that differ, so that make sees only those as new.
fn copy_changed(from: &Path, to: &Path) -> Result<(), Error> {
    fs::create_dir_all(to).map_err(Error::file("make", to))?;
    for entry in fs::read_dir(from).map_err(Error::file("read", from))? {
        let path = entry.map_err(Error::file("read", from))?.path();
        if let (Some(name), true) = (path.file_name(), path.is_file()) {
            copy_changed_file(&path, &to.join(name))?;
        }
    }
    Ok(())
}

fn copy_changed_file(from: &Path, to: &Path) -> Result<(), Error> {
    let content = fs::read(from).map_err(Error::file("read", from))?;
    if fs::read(to).is_ok_and(|old| old == content) {
        return Ok(());
    }
    fs::write(to, content).map_err(Error::file("write", to))
}
