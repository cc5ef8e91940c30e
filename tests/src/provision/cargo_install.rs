//! Programs by others, from the registry that cargo knows: built once, kept in the cache.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::lock::Lock;
use crate::workspace::{self, Workspace};

/// A program as its crate makes it.
pub struct Program {
    /// The program's file name.
    pub name: &'static str,
    /// The crate that has it.
    pub package: &'static str,
    /// The one version the lab knows the ways of.
    pub version: &'static str,
    /// cargo's environment while it builds it: settings of the release profile, for a program whose speed matters less
    /// than the time its build takes.
    pub environment: &'static [(&'static str, &'static str)],
}

/// Why there is no such program.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// cargo could not be started.
    #[error("cannot run {0:?}: {1}; is Rust on PATH?")]
    Cargo(PathBuf, #[source] io::Error),
    /// cargo could not fetch or build it.
    #[error(
        "cargo could not install {package} {version}, see its messages above: it needs the crate registry and a C linker"
    )]
    Install {
        /// The crate.
        package: &'static str,
        /// Its version.
        version: &'static str,
    },
    /// A folder could not be used.
    #[error("cannot use {0}: {1}")]
    Folder(PathBuf, #[source] io::Error),
}

impl Program {
    /// Where the program is once it is installed. The version is in its path: a new one is installed beside it.
    pub fn path(&self, workspace: &Workspace) -> PathBuf {
        self.root(workspace).join("bin").join(self.name)
    }

    fn root(&self, workspace: &Workspace) -> PathBuf {
        workspace.cache().join(format!("{}-{}", self.name, self.version))
    }

    /// Has cargo build and install it if nobody has yet; cargo shows its own progress.
    pub(super) fn install(&self, workspace: &Workspace) -> Result<PathBuf, Error> {
        let program = self.path(workspace);
        if program.exists() {
            return Ok(program);
        }
        let cache = workspace.cache();
        fs::create_dir_all(&cache).map_err(|e| Error::Folder(cache.clone(), e))?;
        let lock = cache.join(format!("{}.lock", self.name));
        let _lock = Lock::take(&lock, &format!("somebody else builds {}", self.package))
            .map_err(|e| Error::Folder(lock.clone(), e))?;
        if program.exists() {
            return Ok(program);
        }
        eprintln!("lab: building {} {}, once", self.package, self.version);
        let cargo = workspace::cargo();
        let build = cache.join(format!("{}-build", self.name));
        let status = Command::new(&cargo)
            .args(["install", self.package, "--version", &format!("={}", self.version)])
            .args(["--locked", "--no-track", "--root"])
            .arg(self.root(workspace))
            .arg("--target-dir")
            .arg(&build)
            .envs(self.environment.iter().copied())
            // Away from this workspace: its configuration is not the other's.
            .current_dir("/")
            .stdin(Stdio::null())
            .status()
            .map_err(|e| Error::Cargo(cargo.clone(), e))?;
        if !status.success() {
            // What has been built stays, for the next try.
            return Err(Error::Install { package: self.package, version: self.version });
        }
        fs::remove_dir_all(&build).map_err(|e| Error::Folder(build, e))?;
        Ok(program)
    }
}

/// Settings that build soonest.
const QUICK: &[(&str, &str)] = &[
    ("CARGO_PROFILE_RELEASE_LTO", "off"),
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0"),
    ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16"),
];

/// Alioth, a virtual machine monitor, with backends of its own. Quickly built it is as good a rival as any: it hands a vhost-user
/// device's kicks and calls to KVM (ioeventfd and irqfd) and keeps interrupt controllers there, so while packets flow its
/// code does not run. (That of its backend does, which is tested and not measured.)
pub const ALIOTH: Program =
    Program { name: "alioth", package: "alioth-cli", version: "0.12.0", environment: QUICK };

/// cargo-deb, which makes a Debian package of what cargo built.
pub(super) const CARGO_DEB: Program = Program {
    name: "cargo-deb",
    package: "cargo-deb",
    version: "3.8.0",
    environment: &[
        ("CARGO_PROFILE_RELEASE_LTO", "off"),
        ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1"),
        ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16"),
    ],
};
