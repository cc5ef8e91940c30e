//! Where the lab's own files are: the source tree, cargo's target folder, and the cache below it.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Why the workspace could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder this program was built from is gone.
    #[error("the source tree {0} is gone: run the lab from the checkout it was built in")]
    NoSources(PathBuf),
    /// The cache folder could not be made.
    #[error("cannot make the cache folder {0}: {1}")]
    Cache(PathBuf, #[source] io::Error),
    /// Cargo could not be started.
    #[error("cannot run {0:?}: {1}; is Rust on PATH?")]
    Cargo(PathBuf, #[source] io::Error),
    /// A build failed; cargo has said why.
    #[error("building {0} failed, see cargo's messages above")]
    Build(String),
}

/// The profile of what runs in the lab; cargo's alias `lab` names it too.
const LAB_PROFILE: &str = "lab-release";

/// The cargo that runs the lab; one on PATH if the lab was started without.
pub fn cargo() -> PathBuf {
    env::var_os("CARGO").unwrap_or_else(|| OsStr::new("cargo").into()).into()
}

/// The checkout this program was built from.
#[derive(Clone, Debug)]
pub struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    /// Finds the checkout, and makes the lab's cache folder in it.
    pub fn locate() -> Result<Self, Error> {
        let package = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = package.parent().unwrap_or(package).to_path_buf();
        if !root.join("Cargo.toml").is_file() {
            return Err(Error::NoSources(root));
        }
        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => root.join(dir),
            None => root.join("target"),
        };
        let workspace = Self { root, target };
        fs::create_dir_all(workspace.cache()).map_err(|e| Error::Cache(workspace.cache(), e))?;
        Ok(workspace)
    }

    /// The folder with the workspace's `Cargo.toml`.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Everything the lab downloads or makes is below this folder; deleting it costs only time.
    pub fn cache(&self) -> PathBuf {
        self.target.join("lab")
    }

    /// The folder of the programs that run in the lab: optimized, of a profile that is quicker to build than the one
    /// that is shipped.
    pub fn release(&self) -> PathBuf {
        self.target.join(LAB_PROFILE)
    }

    /// The folder of the programs that are shipped, of cargo's release profile.
    pub fn shipped(&self) -> PathBuf {
        self.target.join("release")
    }

    /// Launchers of provisioned programs (`qemu-system-x86_64`, `iperf3`, ...).
    pub fn launchers(&self) -> PathBuf {
        self.cache().join("bin")
    }

    /// Builds the programs that run in the lab. Cargo shows its own progress.
    pub fn build(&self) -> Result<(), Error> {
        // Apart, so that each is built from the same features of its dependencies as `cargo lab` itself was.
        for packages in [&["ivcpu-lab"][..], &["ivcpu-backend", "ivcpu-vmm"]] {
            let selection = packages.iter().flat_map(|package| ["--package", package]);
            let build = ["build", "--profile", LAB_PROFILE, "--bins"];
            self.cargo(build.into_iter().chain(selection), &packages.join(", "))?;
        }
        Ok(())
    }

    /// Builds the programs as they are shipped, which takes longer.
    pub fn build_shipped(&self) -> Result<(), Error> {
        let build = ["build", "--release", "--locked", "--bins"];
        let packages = ["--package", "ivcpu-backend", "--package", "ivcpu-vmm"];
        self.cargo(build.into_iter().chain(packages), "ivcpu-backend, ivcpu-vmm")
    }

    /// Builds what [`Self::test`] runs.
    pub fn build_tests(&self, arguments: &[String]) -> Result<(), Error> {
        // What follows "--" is for the test programs.
        let ours = arguments.iter().map(String::as_str).take_while(|argument| *argument != "--");
        self.cargo(["test", "--workspace", "--no-run"].into_iter().chain(ours), "the tests")
    }

    /// Runs every test, past failures: a run that boots kernels is too long to learn of one failure at a time.
    pub fn test(&self, arguments: &[String]) -> Result<(), Error> {
        let command =
            ["test", "--workspace", "--no-fail-fast"].into_iter().chain(arguments.iter().map(String::as_str));
        self.cargo(command, "or running the tests")
    }

    fn cargo<'a>(&self, arguments: impl Iterator<Item = &'a str>, what: &str) -> Result<(), Error> {
        let cargo = cargo();
        let status = Command::new(&cargo)
            .args(arguments)
            .current_dir(&self.root)
            .stdin(Stdio::null())
            .status()
            .map_err(|e| Error::Cargo(cargo.clone(), e))?;
        if status.success() { Ok(()) } else { Err(Error::Build(what.into())) }
    }
}
