//! Debian systems in folders, as an installation makes them, for what has to be installed to be seen at work.
//!
//! Made in the way of mmdebstrap: apt, with our own state, names and fetches the packages; the essential ones are unpacked by
//! tar, after which dpkg, in there, can install them, and then apt the others. Only what is made is kept: nothing of this
//! machine is changed, and nothing in there reaches the archive.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::archive::{self, Archive, partial};
use crate::lock::Lock;
use crate::private_mounts::{DEVICES, command_in, with_private_mounts};
use crate::progress::Step;

/// The smallest system: what every other package may rely on, and apt. It begins as all do now, with /bin and the like merged
/// into /usr, and a package that would merge them is not needed.
const CLEAN: [&str; 3] = ["?essential", "apt", "usr-is-merged"];
/// What the workbench has besides: the compiler that the lab's kernels name, and what their headers' own programs need.
const TOOLS: [&str; 6] = ["bash-completion", "dkms", "gcc-12", "libelf1", "lintian", "man-db"];

/// Why a system could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The archive did not give its packages.
    #[error(transparent)]
    Archive(#[from] archive::Error),
    /// A file or a mount.
    #[error("cannot make {0}: {1}")]
    File(PathBuf, #[source] io::Error),
    /// This machine does not say what it is.
    #[error("{0} names no VERSION_CODENAME: the lab needs Debian 12 or 13")]
    NoRelease(PathBuf),
    /// A program that fills the system failed.
    #[error("{what} in {root} failed:\n{said}")]
    Failed {
        /// What was done.
        what: &'static str,
        /// The folder.
        root: PathBuf,
        /// The end of what it said.
        said: String,
    },
}

/// The smallest system.
pub(super) fn clean(cache: &Path) -> Result<PathBuf, Error> {
    let release = release(Path::new("/etc/os-release"))?;
    once(cache, &format!("clean-{release}"), |making| {
        let archive = Archive::open_release(cache, &release)?;
        let debs = making.join("debs");
        archive.download_all("a clean Debian", &CLEAN, &release, None, &debs)?;
        drop(archive);
        let step = Step::start("installing a clean Debian");
        let root = making.join("root");
        fs::create_dir(&root).map_err(|e| Error::File(root.clone(), e))?;
        unpack(&debs, &root)?;
        install(&root, &debs, "dpkg --force-depends --force-unsafe-io --install /tmp/debs/*.deb")?;
        step.finish();
        Ok(())
    })
}

/// The smallest system and the tools.
pub(super) fn workbench(cache: &Path) -> Result<PathBuf, Error> {
    let clean = clean(cache)?;
    let release = release(Path::new("/etc/os-release"))?;
    once(cache, &format!("workbench-{release}"), |making| {
        let archive = Archive::open_release(cache, &release)?;
        let debs = making.join("debs");
        let present = clean.with_file_name("debs");
        let names: Vec<_> = CLEAN.into_iter().chain(TOOLS).collect();
        archive.download_all("the workbench", &names, &release, Some(&present), &debs)?;
        drop(archive);
        let step = Step::start("installing the workbench");
        let root = making.join("root");
        // Owners, modes and links as they are.
        run(Command::new("cp").arg("-a").arg(&clean).arg(&root), "copying the clean system", &root)?;
        install(
            &root,
            &debs,
            "apt-get -qq -o APT::Sandbox::User=root -o Dpkg::Options::=--force-unsafe-io -o Dpkg::Use-Pty=0 \
             --no-install-recommends install /tmp/debs/*.deb",
        )?;
        let _ = fs::remove_dir_all(&debs);
        step.finish();
        Ok(())
    })
}

/// Has `make` fill a folder if nobody has yet; a half-filled one never looks like a whole one. The system is in the folder's
/// folder `root`.
fn once(cache: &Path, name: &str, make: impl FnOnce(&Path) -> Result<(), Error>) -> Result<PathBuf, Error> {
    let systems = cache.join("systems");
    let at = systems.join(name);
    if !at.exists() {
        fs::create_dir_all(&systems).map_err(|e| Error::File(systems.clone(), e))?;
        let lock = systems.join(format!("{name}.lock"));
        let _lock =
            Lock::take(&lock, "somebody else makes this Debian system").map_err(|e| Error::File(lock, e))?;
        if !at.exists() {
            let making = partial(&at);
            let _ = fs::remove_dir_all(&making);
            fs::create_dir(&making).map_err(|e| Error::File(making.clone(), e))?;
            make(&making)?;
            fs::rename(&making, &at).map_err(|e| Error::File(at.clone(), e))?;
        }
    }
    Ok(at.join("root"))
}

/// Unpacks the packages, with nothing but a tar to do it, and makes what no package has.
fn unpack(debs: &Path, root: &Path) -> Result<(), Error> {
    let make = |result: io::Result<()>, name: &str| result.map_err(|e| Error::File(root.join(name), e));
    for name in ["bin", "sbin", "lib", "lib64"] {
        let merged = format!("usr/{name}");
        make(fs::create_dir_all(root.join(&merged)), &merged)?;
        make(symlink(&merged, root.join(name)), name)?;
    }
    let packages = fs::read_dir(debs).map_err(|e| Error::File(debs.into(), e))?;
    for package in packages {
        let package = package.map_err(|e| Error::File(debs.into(), e))?.path();
        let mut archive = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(&package)
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| Error::File(root.into(), e))?;
        let files = archive.stdout.take().map_or_else(Stdio::null, Stdio::from);
        // dpkg's own unpacking would put a folder in the place of a link to one.
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(root).args(["--keep-directory-symlink", "-x"]).stdin(files);
        run(&mut tar, "tar", root)?;
        let status = archive.wait().map_err(|e| Error::File(root.into(), e))?;
        if !status.success() {
            let said = format!("dpkg-deb cannot read {}", package.display());
            return Err(Error::Failed { what: "dpkg-deb", root: root.into(), said });
        }
    }
    for name in DEVICES {
        let name = format!("dev/{name}");
        make(File::create(root.join(&name)).map(drop), &name)?;
    }
    make(symlink("/proc/self/fd", root.join("dev/fd")), "dev/fd")
}

/// Runs a shell's `words` in the system, which sees the packages at /tmp/debs.
fn install(root: &Path, debs: &Path, words: &'static str) -> Result<(), Error> {
    with_private_mounts(|mounts| {
        let at = root.join("tmp/debs");
        let ready = || -> io::Result<()> {
            fs::create_dir_all(&at)?;
            mounts.bind(debs, &at)?;
            mounts.enter(root)
        };
        ready().map_err(|e| Error::File(root.into(), e))?;
        run(&mut command_in(root, &["sh", "-c", words]), "installing packages", root)
    })?;
    let at = root.join("tmp/debs");
    fs::remove_dir(&at).map_err(|e| Error::File(at, e))
}

fn run(command: &mut Command, what: &'static str, root: &Path) -> Result<(), Error> {
    const LINES: usize = 20;
    let output = command.stderr(Stdio::piped()).output().map_err(|e| Error::File(root.into(), e))?;
    if output.status.success() {
        return Ok(());
    }
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    let said = lines[lines.len().saturating_sub(LINES)..].join("\n");
    Err(Error::Failed { what, root: root.into(), said })
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::File("a Debian system".into(), error)
    }
}

/// The name of this machine's release.
fn release(os_release: &Path) -> Result<String, Error> {
    let text = fs::read_to_string(os_release).map_err(|e| Error::File(os_release.into(), e))?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    name.map(|name| name.trim_matches('"').to_owned()).ok_or_else(|| Error::NoRelease(os_release.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_says_its_release() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let file = dir.path().join("os-release");
        fs::write(&file, "NAME=\"Debian\"\nVERSION_CODENAME=bookworm\n").expect("written");
        assert_eq!(release(&file).expect("a release"), "bookworm");
        fs::write(&file, "NAME=\"Else\"\n").expect("written");
        assert!(matches!(release(&file), Err(Error::NoRelease(_))));
    }

    #[test]
    fn a_system_is_made_once_and_whole_or_not_at_all() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let fails = |_: &Path| Err(Error::NoRelease("x".into()));
        assert!(once(dir.path(), "s", fails).is_err());
        assert!(!dir.path().join("systems/s").exists());
        let made = once(dir.path(), "s", |making| {
            fs::create_dir(making.join("root")).map_err(|e| Error::File("root".into(), e))
        });
        assert!(made.expect("made").is_dir());
        assert!(once(dir.path(), "s", fails).is_ok(), "not made again");
    }
}
