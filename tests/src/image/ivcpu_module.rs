//! Builds the guest module for one of the lab's kernels, from the shipped sources and makefile.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Error;
use crate::provision::{Kernel, Provision};
use crate::workspace::Workspace;

/// The folders of `guest-driver` that the module is built from.
const SOURCES: [&str; 2] = ["module", "include"];
/// Kbuild would add type information of the kernel's own debugger, with a tool that is not needed otherwise.
const WITHOUT_BTF: &str = "CONFIG_DEBUG_INFO_BTF_MODULES=";

/// The module for `kernel`, made anew of what the sources are now. The source tree stays clean: kbuild writes beside
/// its sources, so it gets a copy of them.
pub(super) fn build(workspace: &Workspace, provision: &Provision, kernel: Kernel) -> Result<PathBuf, Error> {
    let files = provision.kernel(kernel)?;
    let make = provision.make()?;
    let at = workspace.cache().join("module").join(kernel.name());
    for folder in SOURCES {
        copy_changed(&workspace.root().join("guest-driver").join(folder), &at.join(folder))?;
    }
    let at = at.join(SOURCES[0]);
    let output = Command::new(&make)
        .arg("-C")
        .arg(&at)
        .arg(format!("KDIR={}", files.headers.display()))
        .args(["CC=cc", WITHOUT_BTF])
        .stdin(Stdio::null())
        .output()
        .map_err(Error::file("run", &make))?;
    let module = at.join("ivcpu.ko");
    if output.status.success() && module.exists() {
        return Ok(module);
    }
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(Error::Module { release: files.release, message: text })
}

/// Copies the files that differ, so that make sees only those as new.
fn copy_changed(from: &Path, to: &Path) -> Result<(), Error> {
    fs::create_dir_all(to).map_err(Error::file("make", to))?;
    for entry in fs::read_dir(from).map_err(Error::file("read", from))? {
        let path = entry.map_err(Error::file("read", from))?.path();
        let (Some(name), true) = (path.file_name(), path.is_file()) else { continue };
        let content = fs::read(&path).map_err(Error::file("read", &path))?;
        let copy = to.join(name);
        if fs::read(&copy).is_ok_and(|old| old == content) {
            continue;
        }
        fs::write(&copy, content).map_err(Error::file("write", &copy))?;
    }
    Ok(())
}
