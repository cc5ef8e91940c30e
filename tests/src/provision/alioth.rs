//! Alioth, a virtual machine monitor by others, from the registry that cargo knows.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::lock::Lock;
use crate::workspace::{self, Workspace};

/// The one version the lab knows the ways of.
pub const VERSION: &str = "0.12.0";

/// Why there is no Alioth.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// cargo could not be started.
    #[error("cannot run {0:?}: {1}; is Rust on PATH?")]
    Cargo(PathBuf, #[source] io::Error),
    /// cargo could not fetch or build it.
    #[error(
        "cargo could not install alioth-cli {VERSION}, see its messages above: it needs the crate registry and a C linker"
    )]
    Install,
    /// A folder could not be used.
    #[error("cannot use {0}: {1}")]
    Folder(PathBuf, #[source] io::Error),
}

/// Where the program is once it is installed. The version is in its path: a new one is installed beside it.
pub fn program(workspace: &Workspace) -> PathBuf {
    root(workspace).join("bin/alioth")
}

fn root(workspace: &Workspace) -> PathBuf {
    workspace.cache().join(format!("alioth-{VERSION}"))
}

/// Has cargo build and install it if nobody has yet; cargo shows its own progress.
pub(super) fn install(workspace: &Workspace) -> Result<PathBuf, Error> {
    let program = program(workspace);
    if program.exists() {
        return Ok(program);
    }
    let cache = workspace.cache();
    fs::create_dir_all(&cache).map_err(|e| Error::Folder(cache.clone(), e))?;
    let lock = cache.join("alioth.lock");
    let _lock =
        Lock::take(&lock, "somebody else builds Alioth").map_err(|e| Error::Folder(lock.clone(), e))?;
    if program.exists() {
        return Ok(program);
    }
    eprintln!("lab: building Alioth {VERSION}, once");
    let cargo = workspace::cargo();
    let build = cache.join("alioth-build");
    let status = Command::new(&cargo)
        .args(["install", "alioth-cli", "--version", &format!("={VERSION}"), "--locked", "--no-track"])
        .arg("--root")
        .arg(root(workspace))
        .arg("--target-dir")
        .arg(&build)
        // Away from this workspace: its configuration is not Alioth's.
        .current_dir("/")
        .stdin(Stdio::null())
        .status()
        .map_err(|e| Error::Cargo(cargo.clone(), e))?;
    if !status.success() {
        // What has been built stays, for the next try.
        return Err(Error::Install);
    }
    fs::remove_dir_all(&build).map_err(|e| Error::Folder(build, e))?;
    Ok(program)
}
