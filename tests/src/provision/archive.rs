//! The distribution's package archive, read through an apt state of our own.
//!
//! The system's apt configuration says where the archive is and how to reach it (proxy, credentials); sources,
//! lists and downloads are ours, below the cache folder, so nothing of the system changes and nothing is
//! installed. An empty dpkg status makes apt resolve *complete* sets of packages, C library included: what we
//! unpack runs the same whatever is installed beside it.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use crate::progress::Step;

/// The release everything comes from, so that hosts and guests are the same on every system.
pub(super) const SUITE: &str = "bookworm";
/// Its backports: newer kernels and a newer QEMU.
pub(super) const BACKPORTS: &str = "bookworm-backports";

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Why a package could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tool of the distribution is missing or cannot be started.
    #[error("cannot run {0}: {1}; the lab needs a Debian system with apt and dpkg")]
    Tool(&'static str, #[source] io::Error),
    /// A tool of the distribution failed.
    #[error("{what} failed: {message}")]
    Failed {
        /// What was being done.
        what: String,
        /// The last line the tool printed.
        message: String,
    },
    /// apt knows no Debian archive.
    #[error(
        "apt's configuration names no Debian archive (`apt-get indextargets` lists none with a plain release): \
         add one to /etc/apt/sources.list"
    )]
    NoArchive,
    /// A metapackage without the dependency that names the real one.
    #[error("package {0} of {1} depends on no kernel image: the archive has changed, please report it")]
    NoKernel(String, String),
    /// A file could not be written.
    #[error("cannot write {0}: {1}")]
    Write(PathBuf, #[source] io::Error),
}

/// One package file of the archive.
#[derive(Debug, PartialEq)]
struct Package {
    /// `name=version`, as `apt-get download` takes it.
    wanted: String,
    file: String,
    bytes: u64,
}

/// The archive, with our own apt state.
pub(super) struct Archive {
    dir: PathBuf,
}

impl Archive {
    /// Writes the private configuration and fetches the package lists, once per cache.
    pub(super) fn open(cache: &Path) -> Result<Self, Error> {
        let dir = cache.join("apt");
        let archive = Self { dir };
        for folder in ["state/lists/partial", "cache/archives/partial"] {
            let folder = archive.dir.join(folder);
            fs::create_dir_all(&folder).map_err(|e| Error::Write(folder, e))?;
        }
        archive.write("status", "")?;
        archive.write("sources.list", &sources_list(&system_archive()?))?;
        let stamp = archive.dir.join("updated");
        if !stamp.exists() {
            let step = Step::start("fetching the package lists");
            archive.run("apt-get", "fetching the package lists", ["-q", "update"])?;
            step.finish();
            archive.write("updated", "")?;
        }
        Ok(archive)
    }

    /// The package a metapackage such as `linux-image-amd64` stands for today.
    pub(super) fn kernel_of(&self, metapackage: &str, suite: &str) -> Result<String, Error> {
        let what = format!("looking up {metapackage}");
        let target = format!("{metapackage}/{suite}");
        let output = self.run("apt-cache", &what, ["show", "--no-all-versions", &target])?;
        real_package(&String::from_utf8_lossy(&output.stdout))
            .ok_or_else(|| Error::NoKernel(metapackage.into(), suite.into()))
    }

    /// Downloads `packages` alone and unpacks them into `into`.
    pub(super) fn unpack(
        &self,
        what: &str,
        packages: &[&str],
        suite: &str,
        into: &Path,
    ) -> Result<(), Error> {
        let list = ["-qq", "--print-uris", "-t", suite, "download"];
        self.unpack_listed(what, list.iter().chain(packages), into)
    }

    /// Downloads `packages` with everything they depend on and unpacks all of it into `into`.
    pub(super) fn unpack_closed(
        &self,
        what: &str,
        packages: &[&str],
        suite: &str,
        into: &Path,
    ) -> Result<(), Error> {
        let list = ["-qq", "--print-uris", "--no-install-recommends", "-t", suite, "install"];
        self.unpack_listed(what, list.iter().chain(packages), into)
    }

    fn unpack_listed<'a>(
        &self,
        what: &str,
        list: impl Iterator<Item = &'a &'a str>,
        into: &Path,
    ) -> Result<(), Error> {
        let output = self.run("apt-get", &format!("resolving {what}"), list)?;
        let packages = packages(&String::from_utf8_lossy(&output.stdout));
        let debs = self.dir.join("debs");
        let _ = fs::remove_dir_all(&debs);
        fs::create_dir_all(&debs).map_err(|e| Error::Write(debs.clone(), e))?;
        self.download(what, &packages, &debs)?;

        // A half-unpacked folder must never look like a whole one.
        let partial = into.with_extension("partial");
        let _ = fs::remove_dir_all(&partial);
        fs::create_dir_all(&partial).map_err(|e| Error::Write(partial.clone(), e))?;
        let mut step = Step::start_bytes(format!("unpacking {what}"), packages.iter().map(|p| p.bytes).sum());
        let mut done = 0;
        for package in &packages {
            let mut dpkg = Command::new("dpkg");
            dpkg.arg("-x").arg(debs.join(&package.file)).arg(&partial);
            run(&mut dpkg, "dpkg", &format!("unpacking {}", package.file))?;
            done += package.bytes;
            step.at(done);
        }
        step.finish();
        let _ = fs::remove_dir_all(&debs);
        fs::rename(&partial, into).map_err(|e| Error::Write(into.into(), e))
    }

    fn download(&self, what: &str, packages: &[Package], into: &Path) -> Result<(), Error> {
        let mut step =
            Step::start_bytes(format!("downloading {what}"), packages.iter().map(|p| p.bytes).sum());
        let mut apt = self.command("apt-get");
        apt.args(["-q", "download"]).args(packages.iter().map(|p| &p.wanted)).current_dir(into);
        let worker = thread::spawn({
            let what = format!("downloading {what}");
            move || run(&mut apt, "apt-get", &what)
        });
        while !worker.is_finished() {
            thread::sleep(Duration::from_millis(200));
            step.at(folder_bytes(into));
        }
        let outcome = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        step.finish();
        outcome.map(drop)
    }

    fn run(
        &self,
        tool: &'static str,
        what: &str,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Result<Output, Error> {
        run(self.command(tool).args(arguments), tool, what)
    }

    fn command(&self, tool: &str) -> Command {
        let mut command = Command::new(tool);
        let at = |name: &str| self.dir.join(name).display().to_string();
        for option in [
            format!("Dir::Etc::sourcelist={}", at("sources.list")),
            "Dir::Etc::sourceparts=/dev/null".into(),
            "Dir::Etc::preferencesparts=/dev/null".into(),
            "Dir::Etc::preferences=/dev/null".into(),
            format!("Dir::State={}", at("state")),
            format!("Dir::State::status={}", at("status")),
            format!("Dir::Cache={}", at("cache")),
            "APT::Architecture=amd64".into(),
            "APT::Architectures=amd64".into(),
            "APT::Sandbox::User=root".into(),
            "APT::Update::Post-Invoke-Success::=true".into(),
            "Acquire::Retries=3".into(),
        ] {
            command.arg("-o").arg(option);
        }
        command.env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    fn write(&self, name: &str, text: &str) -> Result<(), Error> {
        let path = self.dir.join(name);
        fs::write(&path, text).map_err(|e| Error::Write(path, e))
    }
}

fn run(command: &mut Command, tool: &'static str, what: &str) -> Result<Output, Error> {
    let output = command.output().map_err(|e| Error::Tool(tool, e))?;
    if output.status.success() {
        return Ok(output);
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let message = text.lines().rev().find(|line| line.starts_with("E:")).or(text.lines().last());
    Err(Error::Failed { what: what.into(), message: message.unwrap_or("no message").trim().into() })
}

/// The URI of the Debian archive this system uses.
fn system_archive() -> Result<String, Error> {
    let format = "$(RELEASE) $(COMPONENT) $(REPO_URI)";
    let mut apt = Command::new("apt-get");
    apt.args(["indextargets", "--format", format, "Created-By: Packages"]).env("LC_ALL", "C");
    let output = run(&mut apt, "apt-get", "reading apt's configuration")?;
    main_archive(&String::from_utf8_lossy(&output.stdout)).ok_or(Error::NoArchive)
}

/// Picks the main archive: the one that serves a plain Debian release (not its security or update suites, and
/// not a third party's repository).
fn main_archive(targets: &str) -> Option<String> {
    const RELEASES: [&str; 8] =
        ["bookworm", "trixie", "forky", "stable", "oldstable", "testing", "unstable", "sid"];
    targets.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (release, component, uri) = (words.next()?, words.next()?, words.next()?);
        (component == "main" && RELEASES.contains(&release)).then(|| uri.to_string())
    })
}

fn sources_list(uri: &str) -> String {
    let signed = if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
    [SUITE, BACKPORTS].map(|suite| format!("deb {signed}{uri} {suite} main\n")).concat()
}

/// Reads `apt-get --print-uris`: `'URI' FILE BYTES HASH`.
fn packages(uris: &str) -> Vec<Package> {
    uris.lines()
        .filter_map(|line| {
            let mut words = line.strip_prefix('\'')?.split_whitespace().skip(1);
            let (file, bytes) = (words.next()?, words.next()?.parse().ok()?);
            let mut parts = file.split('_');
            let (name, version) = (parts.next()?, parts.next()?.replace("%3a", ":"));
            Some(Package { wanted: format!("{name}={version}"), file: file.into(), bytes })
        })
        .collect()
}

/// The first kernel image a metapackage's record depends on.
fn real_package(record: &str) -> Option<String> {
    let depends = record.lines().find_map(|line| line.strip_prefix("Depends: "))?;
    let name = depends.split([',', ' ']).find(|word| word.starts_with("linux-image-"))?;
    Some(name.into())
}

fn folder_bytes(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|m| if m.is_file() { m.len() } else { 0 }).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn main_archive_among_security_and_third_parties() {
        let targets = "nodistro main http://a.example/\n\
                       bookworm-security main http://b.example/security/\n\
                       bookworm contrib http://c.example/debian/\n\
                       bookworm main http://c.example/debian/\n";
        assert_eq!(main_archive(targets).as_deref(), Some("http://c.example/debian/"));
        assert_eq!(main_archive("nodistro main http://a.example/\n"), None);
    }

    #[test]
    fn package_versions_with_an_epoch() {
        let uris = "'http://a.example/q.deb' qemu_1%3a10.0.2+ds-2_amd64.deb 4711 SHA256:00\nnoise\n";
        let expected = Package {
            wanted: "qemu=1:10.0.2+ds-2".into(),
            file: "qemu_1%3a10.0.2+ds-2_amd64.deb".into(),
            bytes: 4711,
        };
        assert_eq!(packages(uris), [expected]);
    }

    #[test]
    fn metapackage_names_its_kernel() {
        let record = "Package: linux-image-amd64\nDepends: linux-image-6.12.95+deb12-amd64 (= 6.12.95-1)\n";
        assert_eq!(real_package(record).as_deref(), Some("linux-image-6.12.95+deb12-amd64"));
        assert_eq!(real_package("Package: x\nDepends: libc6\n"), None);
    }
}
