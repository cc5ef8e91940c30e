//! The distribution's package archive: package lists, downloads, unpacking. Nothing is installed.

use std::cell::Cell;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, SystemTime};

use super::apt::{Apt, run};
use super::repository::Repository;
use crate::lock::Lock;
use crate::progress::Step;

/// The release everything comes from, so that hosts and guests are the same on every system.
pub const SUITE: &str = "bookworm";
/// Its backports: newer kernels and a newer QEMU.
pub(super) const BACKPORTS: &str = "bookworm-backports";

/// The archive drops a package as soon as there is a newer one, so lists are of use for a while only.
const LISTS_LAST: Duration = Duration::from_secs(24 * 60 * 60);

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
    /// A file could not be read.
    #[error("cannot read {0}: {1}")]
    Read(PathBuf, #[source] io::Error),
    /// apt downloaded a package that it has no record of.
    #[error("apt has no record of {0}: the package lists have changed meanwhile, run it again")]
    NoRecord(String),
}

/// One package file of the archive.
#[derive(Debug, PartialEq)]
struct Package {
    /// `name=version`, as `apt-get download` takes it.
    wanted: String,
    file: String,
    bytes: u64,
}

/// Packages to be unpacked together.
#[derive(Clone, Copy)]
pub(super) enum Selection<'a> {
    /// These and no others.
    Alone(&'a [&'a str]),
    /// These with everything they depend on.
    WithDependencies(&'a [&'a str]),
}

/// The archive, with our own apt state; one thread of one process at a time has it.
pub(super) struct Archive {
    apt: Apt,
    /// Empty; as old as the package lists.
    stamp: PathBuf,
    /// The package lists were fetched just now.
    fresh: Cell<bool>,
    _lock: Lock,
}

impl Archive {
    /// Waits until nobody else of this cache has it, and fetches the package lists if they are missing or old.
    pub(super) fn open(cache: &Path) -> Result<Self, Error> {
        Self::open_suites(cache.join("apt"), &[SUITE, BACKPORTS])
    }

    /// The same for another release, whose lists are kept apart.
    pub(super) fn open_release(cache: &Path, release: &str) -> Result<Self, Error> {
        if release == SUITE {
            return Self::open(cache);
        }
        Self::open_suites(cache.join(format!("apt-{release}")), &[release])
    }

    fn open_suites(dir: PathBuf, suites: &[&str]) -> Result<Self, Error> {
        fs::create_dir_all(&dir).map_err(|e| Error::Write(dir.clone(), e))?;
        let path = dir.join("lock");
        let lock =
            Lock::take(&path, "packages are being fetched already").map_err(|e| Error::Write(path, e))?;
        let apt = Apt::configure(&dir, suites)?;
        let archive = Self { apt, stamp: dir.join("updated"), fresh: Cell::new(false), _lock: lock };
        if !is_recent(&archive.stamp) {
            archive.refresh()?;
        }
        Ok(archive)
    }

    /// Whether fetching the package lists again could give anything new.
    pub(super) fn is_fresh(&self) -> bool {
        self.fresh.get()
    }

    /// Fetches the package lists.
    pub(super) fn refresh(&self) -> Result<(), Error> {
        let what = "fetching the package lists";
        let step = Step::start(what);
        // A list that cannot be had is only a warning otherwise.
        self.apt.run("apt-get", what, ["-q", "-o", "APT::Update::Error-Mode=any", "update"])?;
        step.finish();
        self.fresh.set(true);
        File::create(&self.stamp).map(drop).map_err(|e| Error::Write(self.stamp.clone(), e))
    }

    /// The package a metapackage such as `linux-image-amd64` stands for today.
    pub(super) fn kernel_of(&self, metapackage: &str, suite: &str) -> Result<String, Error> {
        let what = format!("looking up {metapackage}");
        let target = format!("{metapackage}/{suite}");
        let output = self.apt.run("apt-cache", &what, ["show", "--no-all-versions", &target])?;
        real_package(&String::from_utf8_lossy(&output.stdout))
            .ok_or_else(|| Error::NoKernel(metapackage.into(), suite.into()))
    }

    /// What the headers package of a kernel needs for building modules: the headers shared by the flavours of its
    /// release, and the build's own programs. (It also depends on a compiler and on the image.)
    pub(super) fn needed_by_headers(&self, headers: &str, suite: &str) -> Result<Vec<String>, Error> {
        let what = format!("looking up {headers}");
        let target = format!("{headers}/{suite}");
        let output = self.apt.run("apt-cache", &what, ["show", "--no-all-versions", &target])?;
        Ok(build_packages(&String::from_utf8_lossy(&output.stdout)))
    }

    /// Downloads packages of `suite` and unpacks them into `into`.
    pub(super) fn unpack(
        &self,
        what: &str,
        selection: Selection<'_>,
        suite: &str,
        into: &Path,
    ) -> Result<(), Error> {
        let packages = self.resolve(what, selection, suite)?;

        // A half-unpacked folder must never look like a whole one.
        let partial = partial(into);
        let (debs, root) = (partial.join("debs"), partial.join("root"));
        start_anew(&partial, &[&debs, &root])?;
        self.download(what, &packages, &debs)?;
        let mut step = Step::start_bytes(format!("unpacking {what}"), packages.iter().map(|p| p.bytes).sum());
        let mut done = 0;
        for package in &packages {
            let mut dpkg = Command::new("dpkg");
            dpkg.arg("-x").arg(debs.join(&package.file)).arg(&root);
            run(&mut dpkg, "dpkg", &format!("unpacking {}", package.file))?;
            done += package.bytes;
            step.at(done);
        }
        step.finish();
        fs::rename(&root, into).map_err(|e| Error::Write(into.into(), e))?;
        let _ = fs::remove_dir_all(&partial);
        Ok(())
    }

    /// Makes an archive of their own, in `into`, of packages of `suite`, those they depend on, and those no system lacks.
    pub(super) fn copy(&self, what: &str, names: &[&str], suite: &str, into: &Path) -> Result<(), Error> {
        // Of those that do the same, the one that needs least.
        let every_system = ["?essential", "?priority(required)", "usr-is-merged"];
        let names: Vec<_> = every_system.iter().chain(names).copied().collect();
        let packages = self.resolve(what, Selection::WithDependencies(&names), suite)?;
        let show = ["show", "--no-all-versions"].into_iter().chain(packages.iter().map(|p| &*p.wanted));
        let records = self.apt.run("apt-cache", &format!("looking up {what}"), show)?.stdout;
        let records = String::from_utf8_lossy(&records);

        let partial = partial(into);
        let (debs, root) = (partial.join("debs"), partial.join("root"));
        start_anew(&partial, &[&debs])?;
        self.download(what, &packages, &debs)?;
        let mut repository = Repository::create(&root)?;
        for package in &packages {
            let record = record_of(&records, &package.wanted);
            let record = record.ok_or_else(|| Error::NoRecord(package.wanted.clone()))?;
            repository.add_with_record(&debs.join(&package.file), record)?;
        }
        repository.finish(suite)?;
        fs::rename(&root, into).map_err(|e| Error::Write(into.into(), e))?;
        let _ = fs::remove_dir_all(&partial);
        Ok(())
    }

    /// Downloads what the packages `names` of `suite` depend on, and them, into the folder `into`, but for files that the folder
    /// `present` has already.
    pub(super) fn download_all(
        &self,
        what: &str,
        names: &[&str],
        suite: &str,
        present: Option<&Path>,
        into: &Path,
    ) -> Result<(), Error> {
        let mut packages = self.resolve(what, Selection::WithDependencies(names), suite)?;
        packages.retain(|package| !present.is_some_and(|folder| folder.join(&package.file).exists()));
        fs::create_dir_all(into).map_err(|e| Error::Write(into.into(), e))?;
        self.download(what, &packages, into)
    }

    fn resolve(&self, what: &str, selection: Selection<'_>, suite: &str) -> Result<Vec<Package>, Error> {
        let (words, names) = match selection {
            Selection::Alone(names) => (&["download"][..], names),
            Selection::WithDependencies(names) => (&["--no-install-recommends", "install"][..], names),
        };
        let list = ["-qq", "--print-uris", "-t", suite];
        let list = list.iter().chain(words).chain(names);
        let output = self.apt.run("apt-get", &format!("resolving {what}"), list)?;
        Ok(packages(&String::from_utf8_lossy(&output.stdout)))
    }

    fn download(&self, what: &str, packages: &[Package], into: &Path) -> Result<(), Error> {
        let mut step =
            Step::start_bytes(format!("downloading {what}"), packages.iter().map(|p| p.bytes).sum());
        let mut apt = self.apt.command("apt-get");
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
}

/// A clock that was set back makes lists old, not young for ever.
fn is_recent(stamp: &Path) -> bool {
    let age = |modified| SystemTime::now().duration_since(modified).ok();
    let modified = fs::metadata(stamp).and_then(|metadata| metadata.modified());
    modified.ok().and_then(age).is_some_and(|age| age < LISTS_LAST)
}

/// Beside `into`, so that one rename finishes the work. (The kernels' names contain dots: no extension.)
pub(super) fn partial(into: &Path) -> PathBuf {
    let mut name = OsString::from(into);
    name.push(".partial");
    name.into()
}

/// Removes what an earlier try left in `partial`, and makes `folders` in it.
fn start_anew(partial: &Path, folders: &[&Path]) -> Result<(), Error> {
    let _ = fs::remove_dir_all(partial);
    for folder in folders {
        fs::create_dir_all(folder).map_err(|e| Error::Write(folder.into(), e))?;
    }
    Ok(())
}

/// The record of the package `name=version` among those that apt printed.
fn record_of<'a>(records: &'a str, wanted: &str) -> Option<&'a str> {
    let (name, version) = wanted.split_once('=')?;
    let has = |record: &str, field: &str, value: &str| {
        record.lines().any(|line| line.strip_prefix(field).is_some_and(|rest| rest.trim() == value))
    };
    records.split("\n\n").find(|record| has(record, "Package:", name) && has(record, "Version:", version))
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

/// The packages that a headers package's record depends on for building modules.
fn build_packages(record: &str) -> Vec<String> {
    let depends = record.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
    let names = depends.split(", ").filter_map(|one| one.split(' ').next());
    let of_the_build = |name: &&str| {
        name.starts_with("linux-kbuild-") || (name.starts_with("linux-headers-") && name.ends_with("-common"))
    };
    names.filter(of_the_build).map(String::from).collect()
}

fn folder_bytes(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|m| if m.is_file() { m.len() } else { 0 }).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn record_of_one_version_of_a_package() {
        let records =
            "Package: xy\nVersion: 1\n\nPackage: x\nVersion: 2\n\nPackage: x\nVersion: 1:1\nSize: 3\n";
        assert_eq!(record_of(records, "x=1:1"), Some("Package: x\nVersion: 1:1\nSize: 3\n"));
        assert_eq!(record_of(records, "x=1"), None);
    }

    #[test]
    fn metapackage_names_its_kernel() {
        let record = "Package: linux-image-amd64\nDepends: linux-image-6.12.95+deb12-amd64 (= 6.12.95-1)\n";
        assert_eq!(real_package(record).as_deref(), Some("linux-image-6.12.95+deb12-amd64"));
        assert_eq!(real_package("Package: x\nDepends: libc6\n"), None);
    }

    #[test]
    fn headers_need_the_common_ones_and_kbuild() {
        let record = "Package: linux-headers-6.12.95+deb12-amd64\nDepends: linux-base (>= 4.12~), \
                      linux-headers-6.12.95+deb12-common (= 6.12.95-1), linux-image-6.12.95+deb12-amd64 (= 6.12.95-1) | \
                      linux-image-6.12.95+deb12-amd64-unsigned (= 6.12.95-1), linux-kbuild-6.12.95+deb12, gcc-12\n";
        assert_eq!(
            build_packages(record),
            ["linux-headers-6.12.95+deb12-common", "linux-kbuild-6.12.95+deb12"]
        );
    }

    #[test]
    fn lists_grow_old() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let stamp = dir.path().join("updated");
        assert!(!is_recent(&stamp));
        let file = File::create(&stamp).expect("the stamp");
        assert!(is_recent(&stamp));
        let now = SystemTime::now();
        file.set_modified(now - LISTS_LAST).expect("made old");
        assert!(!is_recent(&stamp));
        file.set_modified(now + LISTS_LAST).expect("put into the future");
        assert!(!is_recent(&stamp));
    }

    #[test]
    fn kernels_whose_names_begin_alike_have_folders_of_their_own() {
        assert_eq!(partial(Path::new("k/6.12-cloud")), Path::new("k/6.12-cloud.partial"));
        assert_eq!(partial(Path::new("k/6.12")), Path::new("k/6.12.partial"));
    }
}
