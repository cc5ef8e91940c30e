//! What a Debian disk image is made with.

use std::path::PathBuf;

use super::archive::{SUITE, Selection};
use super::{Error, Provision, Unpacked, repository, sha256};

/// A folder that apt and debootstrap take packages from.
#[derive(Clone, Debug)]
pub struct PackageArchive {
    /// The folder.
    pub folder: PathBuf,
    /// Its list of packages, with their versions and digests.
    pub index: PathBuf,
}

/// debootstrap.
#[derive(Clone, Debug)]
pub struct Debootstrap {
    /// The program.
    pub program: PathBuf,
    /// What it calls `DEBOOTSTRAP_DIR`.
    pub scripts: PathBuf,
}

/// The programs for ext4.
#[derive(Clone, Debug)]
pub struct FileSystemTools {
    /// Makes a file system.
    pub mke2fs: PathBuf,
    /// Checks one.
    pub e2fsck: PathBuf,
    /// Looks into one.
    pub debugfs: PathBuf,
}

impl Provision {
    /// Packages of the release, with everything they need, as an archive that an image is made of.
    pub fn debian_packages(&self, names: &[&str]) -> Result<PackageArchive, Error> {
        // Other packages are another archive.
        let name = format!("packages-{:.32}", sha256(names.join(" ").as_bytes()));
        let folder = self.workspace.cache().join("debian").join(name);
        self.fetch(&folder, |archive| archive.copy("the Debian image's packages", names, SUITE, &folder))?;
        let index = folder.join("dists").join(SUITE).join(repository::INDEX);
        Ok(PackageArchive { folder, index })
    }

    /// debootstrap, which is a script.
    pub fn debootstrap(&self) -> Result<Debootstrap, Error> {
        let dir = self.workspace.cache().join("debootstrap");
        self.fetch(&dir, |archive| {
            archive.unpack("debootstrap", Selection::Alone(&["debootstrap"]), SUITE, &dir)
        })?;
        let unpacked = Unpacked::new(dir);
        let program = unpacked.find(&["usr/sbin/debootstrap"])?;
        Ok(Debootstrap { program, scripts: unpacked.find(&["usr/share/debootstrap"])? })
    }

    /// The programs that make and check ext4, as launchers.
    pub fn file_system_tools(&self) -> Result<FileSystemTools, Error> {
        let dir = self.workspace.cache().join("e2fsprogs");
        self.fetch(&dir, |archive| {
            archive.unpack("e2fsprogs", Selection::WithDependencies(&["e2fsprogs"]), SUITE, &dir)
        })?;
        let tools = Unpacked::new(dir);
        let configuration = tools.find(&["etc/mke2fs.conf"])?;
        let environment = format!("export MKE2FS_CONFIG='{}'\n", configuration.display());
        let launcher = |name: &str| {
            let launcher = self.workspace.launchers().join(name);
            let program = tools.find(&[&format!("usr/sbin/{name}"), &format!("sbin/{name}")])?;
            tools.write_launcher(&launcher, &tools.loader(), &program, &environment, "")?;
            Ok::<_, Error>(launcher)
        };
        Ok(FileSystemTools {
            mke2fs: launcher("mke2fs")?,
            e2fsck: launcher("e2fsck")?,
            debugfs: launcher("debugfs")?,
        })
    }
}
