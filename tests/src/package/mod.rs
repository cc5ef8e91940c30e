//! `cargo lab package`: the Debian package, of the programs as they are shipped.
//!
//! What goes where stands in `[package.metadata.deb]` of vmm/Cargo.toml, for cargo-deb. What is made of other things first
//! (manual pages, completions, the module's sources as DKMS wants them) is put beside the programs.

mod c_library;
pub mod manual;
mod notices;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use flate2::Compression;
use flate2::write::GzEncoder;

use crate::lock::Lock;
use crate::provision::{self, Provision};
use crate::workspace::{self, Workspace};
use notices::Metadata;

/// The version in the package's name: the workspace's, and the package's own number within it.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "-1");

/// The crates of the programs.
const PROGRAMS: [&str; 2] = ["ivcpu-backend", "ivcpu-vmm"];

/// Why there is no package.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something to make it with.
    #[error(transparent)]
    Provision(#[from] provision::Error),
    /// The programs were not built.
    #[error(transparent)]
    Workspace(#[from] workspace::Error),
    /// A file that goes into it.
    #[error("cannot write {0}: {1}")]
    Write(PathBuf, #[source] io::Error),
    /// A file of the sources.
    #[error("cannot read {0}: {1}")]
    Read(PathBuf, #[source] io::Error),
    /// The changelog is about another version.
    #[error(
        "{0} begins with another version than {VERSION}: say there what is new, and in Cargo.toml which it is"
    )]
    Changelog(PathBuf),
    /// What cargo says of the crates was not understood.
    #[error("cannot read what cargo says of the crates: {0}")]
    Metadata(#[from] serde_json::Error),
    /// A program that makes a part of it could not be started.
    #[error("cannot run {0}: {1}")]
    Tool(PathBuf, #[source] io::Error),
    /// A program that makes a part of it failed.
    #[error("{what} failed: {said}")]
    Failed {
        /// What it was making.
        what: &'static str,
        /// What it said.
        said: String,
    },
}

/// Which programs a package has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Programs {
    /// Those that are shipped, optimized across crates, which takes minutes to build.
    Shipped,
    /// Those that run in the lab: of the same sources, and built already where tests run.
    OfTheLab,
}

impl Programs {
    fn build(self, workspace: &Workspace) -> Result<(), workspace::Error> {
        match self {
            Programs::Shipped => workspace.build_shipped(),
            Programs::OfTheLab => workspace.build(),
        }
    }

    /// Where their package is once it is made.
    pub fn package(self, workspace: &Workspace) -> PathBuf {
        let file = format!("ivcpu_{VERSION}_amd64.deb");
        match self {
            Programs::Shipped => self.folder(workspace).with_file_name("debian").join(file),
            Programs::OfTheLab => self.folder(workspace).join(file),
        }
    }

    /// The folder they are in, named after their profile.
    fn folder(self, workspace: &Workspace) -> PathBuf {
        match self {
            Programs::Shipped => workspace.shipped(),
            Programs::OfTheLab => workspace.release(),
        }
    }
}

/// Builds the programs and the package; its path.
pub fn package(workspace: &Workspace, provision: &Provision, programs: Programs) -> Result<PathBuf, Error> {
    let changelog = workspace.root().join("packaging/changelog");
    let text = fs::read_to_string(&changelog).map_err(|e| Error::Read(changelog.clone(), e))?;
    if !text.starts_with(&format!("ivcpu ({VERSION}) ")) {
        return Err(Error::Changelog(changelog));
    }
    let cargo_deb = provision.cargo_deb()?;
    let lock = workspace.cache().join("package.lock");
    let _lock = Lock::take(&lock, "somebody else makes the package").map_err(|e| Error::Write(lock, e))?;
    programs.build(workspace)?;
    let folder = programs.folder(workspace);
    stage(provision, workspace, &folder.join("package"))?;
    let package = programs.package(workspace);
    let files = PROGRAMS.map(|program| folder.join(program));
    let variant =
        c_library::variant(files.iter().map(PathBuf::as_path)).map_err(|e| Error::Read(folder.clone(), e))?;
    // It starts cargo by its name.
    let mut path = vec![workspace::cargo().parent().unwrap_or(Path::new("")).to_path_buf()];
    path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let mut command = Command::new(&cargo_deb);
    command
        .args(["--package", "ivcpu-vmm", "--no-build", "--strip", "--locked", "--quiet", "--profile"])
        .arg(folder.file_name().unwrap_or_default())
        .arg("--output")
        .arg(&package)
        .env("PATH", std::env::join_paths(path).unwrap_or_default())
        .current_dir(workspace.root());
    if let Some(variant) = variant {
        command.args(["--variant", variant]);
    }
    run(&mut command, &cargo_deb, "cargo-deb")?;
    Ok(package)
}

/// Makes what is made of other things, where vmm/Cargo.toml looks for it.
fn stage(provision: &Provision, workspace: &Workspace, stage: &Path) -> Result<(), Error> {
    // Nothing of an earlier version.
    match fs::remove_dir_all(stage) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(Error::Write(stage.into(), error));
        }
        _ => {}
    }
    manual::write(&stage.join("man"), &stage.join("completions"))
        .map_err(|e| Error::Write(stage.into(), e))?;
    let notices = notices(workspace)?.notices(&PROGRAMS);
    let at = stage.join("third-party-notices.gz");
    notices.and_then(|text| fs::write(&at, compressed(text.as_bytes())?)).map_err(|e| Error::Write(at, e))?;
    let make = provision.make()?;
    let mut command = Command::new(&make);
    command.arg("-C").arg(workspace.root().join("guest-driver/module"));
    command.args(["dkms", &format!("DESTDIR={}", stage.display())]);
    run(&mut command, &make, "putting the module's sources together")?;
    Ok(())
}

/// What the programs are made of.
fn notices(workspace: &Workspace) -> Result<Metadata, Error> {
    let cargo = workspace::cargo();
    let mut command = Command::new(&cargo);
    command.args(["metadata", "--locked", "--format-version", "1"]);
    command.args(["--filter-platform", "x86_64-unknown-linux-gnu"]).current_dir(workspace.root());
    let text = run(&mut command, &cargo, "looking up the crates' licences")?;
    Ok(serde_json::from_slice(&text)?)
}

/// As gzip -9n does it: the same text gives the same file.
fn compressed(text: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(text)?;
    encoder.finish()
}

/// Runs it; its standard output.
fn run(command: &mut Command, program: &Path, what: &'static str) -> Result<Vec<u8>, Error> {
    let output = command.stdin(Stdio::null()).output().map_err(|e| Error::Tool(program.into(), e))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(Error::Failed { what, said: String::from_utf8_lossy(&output.stderr).trim().into() })
}
