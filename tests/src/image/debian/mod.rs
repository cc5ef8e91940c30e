//! A disk image such as distributions offer for clouds: Debian's stock kernel, its initramfs, systemd, apt; made out of
//! packages, once, with debootstrap. What is not as Debian leaves it is in `build.sh`.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::lock::Lock;
use crate::process::{self, Process};
use crate::progress::Step;
use crate::provision::{self, DEBIAN_SUITE, Provision, sha256};
use crate::workspace::Workspace;

/// The label of the root file system, which is the whole disk.
pub const LABEL: &str = "debian-root";

/// Beside what every Debian has: the cloud kernel, systemd and the power button's daemon, a network's tools. zstd packs the
/// initramfs.
const PACKAGES: [&str; 13] = [
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "zstd",
    "systemd",
    "systemd-sysv",
    "udev",
    "dbus",
    "libpam-systemd",
    "kmod",
    "e2fsprogs",
    "login",
    "iproute2",
    "netbase",
];
const BUILD: &str = include_str!("build.sh");
const SERVICE: [&str; 3] = ["ivcpu-irq", "ivcpu-irq.service", "90-ivcpu-irq.rules"];
/// A third of it is used.
const SIZE: &str = "1G";
/// The folder of the image in use is known by this name too.
const LINK: &str = "image";
/// It takes half a minute of CPU time.
const DEADLINE: Duration = Duration::from_secs(600);

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A package was not to be had.
    #[error(transparent)]
    Provision(#[from] provision::Error),
    /// A file of the lab's own.
    #[error("cannot use {0}: {1}")]
    File(PathBuf, #[source] io::Error),
    /// debootstrap changes the root folder, and device nodes belong to root.
    #[error("making the Debian image takes root's rights: run it as root")]
    NotRoot,
    /// The script did not start or end.
    #[error(transparent)]
    Process(#[from] process::Error),
    /// The script failed.
    #[error("making the Debian image failed: {last}; all it said is in {}", log.display())]
    Build {
        /// The last line.
        last: String,
        /// Everything it said.
        log: PathBuf,
    },
}

/// The image, for VMs that are started with its kernel.
#[derive(Clone, Debug)]
pub struct DebianImage {
    /// The disk, raw; the same for every VM, so one that writes is given a copy.
    pub disk: PathBuf,
    /// The bzImage.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// Names and versions of what is installed, a line each.
    pub packages: PathBuf,
}

impl DebianImage {
    /// The one that [`prepare`] made last, also where nothing can be made, as inside the emulated host.
    pub fn made(workspace: &Workspace) -> Self {
        let at = |name: &str| workspace.cache().join("debian").join(LINK).join(name);
        Self {
            disk: at("disk.img"),
            kernel: at("vmlinuz"),
            initrd: at("initrd.img"),
            packages: at("packages"),
        }
    }

    /// The words its kernel needs.
    pub fn command_line(&self) -> String {
        format!("root=LABEL={LABEL} ro console=ttyS0 quiet")
    }

    /// Where everything is, and how to boot it.
    pub fn instructions(&self) -> String {
        let (disk, kernel, initrd) = (self.disk.display(), self.kernel.display(), self.initrd.display());
        format!(
            "disk        {disk}\nkernel      {kernel}\ninitramfs   {initrd}\npackages    {}\n\n\
             A VM that writes has a disk of its own. root logs in without a password; `systemctl poweroff` ends it.\n\n    \
             cp --sparse=always {disk} debian.img\n    \
             ivcpu-vmm --kernel {kernel} \\\n        --initramfs {initrd} \\\n        \
             --cmdline '{}' --disk path=debian.img --memory size=768M --serial tty\n",
            self.packages.display(),
            self.command_line()
        )
    }

    /// A disk of one VM's own; sparse, and gone when it is dropped.
    pub fn copy_disk(&self, workspace: &Workspace) -> Result<DiskCopy, Error> {
        let cache = workspace.cache();
        let folder = tempfile::tempdir_in(&cache).map_err(|e| Error::File(cache, e))?;
        let path = folder.path().join("disk.img");
        let status = Command::new("cp")
            .args(["--reflink=auto", "--sparse=always"])
            .args([&self.disk, &path])
            .stdin(Stdio::null())
            .status()
            .map_err(|e| Error::File(path.clone(), e))?;
        if !status.success() {
            return Err(Error::File(path, io::Error::other("cp could not write it")));
        }
        Ok(DiskCopy { path, _folder: folder })
    }
}

/// A copy of the disk.
#[derive(Debug)]
pub struct DiskCopy {
    path: PathBuf,
    _folder: TempDir,
}

impl DiskCopy {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Makes the image if there is none of these packages and this recipe.
pub fn prepare(workspace: &Workspace, provision: &Provision) -> Result<DebianImage, Error> {
    let service = workspace.root().join("guest-driver/service");
    let folder = workspace.cache().join("debian");
    fs::create_dir_all(&folder).map_err(|e| Error::File(folder.clone(), e))?;
    let lock = folder.join("lock");
    let _lock = Lock::take(&lock, "the Debian image is being made").map_err(|e| Error::File(lock, e))?;

    let archive = provision.debian_packages(&PACKAGES)?;
    let mut recipe = format!("{BUILD}{LABEL} {SIZE}").into_bytes();
    for path in SERVICE.map(|name| service.join(name)).into_iter().chain([archive.index.clone()]) {
        recipe.extend(fs::read(&path).map_err(|e| Error::File(path, e))?);
    }
    // Half of the digest is plenty for a name.
    let name = format!("image-{:.32}", sha256(&recipe));
    let image = folder.join(&name);
    if !image.exists() {
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::NotRoot);
        }
        remove_others(&folder)?;
        let partial = folder.join("partial");
        build(provision, &archive.folder, &service, &partial)?;
        fs::rename(partial.join("out"), &image).map_err(|e| Error::File(image.clone(), e))?;
        fs::remove_dir_all(&partial).map_err(|e| Error::File(partial, e))?;
    }
    let made = DebianImage::made(workspace);
    let link = folder.join(LINK);
    if fs::read_link(&link).is_ok_and(|target| target == Path::new(&name)) {
        return Ok(made);
    }
    let _ = fs::remove_file(&link);
    symlink(&name, &link).map_err(|e| Error::File(link, e))?;
    Ok(made)
}

/// Removes images of another recipe and what a killed lab left.
fn remove_others(folder: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(folder).map_err(|e| Error::File(folder.into(), e))?.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name == "partial" || name.starts_with("image-") {
            fs::remove_dir_all(entry.path()).map_err(|e| Error::File(entry.path(), e))?;
        }
    }
    Ok(())
}

/// Leaves the image in the folder `out` of `partial`.
fn build(provision: &Provision, archive: &Path, service: &Path, partial: &Path) -> Result<(), Error> {
    let debootstrap = provision.debootstrap()?;
    let tools = provision.file_system_tools()?;
    let (root, out) = (partial.join("root"), partial.join("out"));
    for folder in [&root, &out] {
        fs::create_dir_all(folder).map_err(|e| Error::File(folder.clone(), e))?;
    }
    let script = partial.join("build.sh");
    fs::write(&script, BUILD).map_err(|e| Error::File(script.clone(), e))?;
    let log = partial.with_file_name("build.log");
    let output = File::create(&log).map_err(|e| Error::File(log.clone(), e))?;
    let errors = output.try_clone().map_err(|e| Error::File(log.clone(), e))?;
    let step = Step::start("making the Debian image");
    let mut process = Process::spawn("the script that makes the Debian image", "unshare", |command| {
        command
            .args(["--mount", "--pid", "--fork", "--kill-child", "sh"])
            .arg(&script)
            .env_clear()
            .envs([("LC_ALL", "C"), ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")])
            .envs([("SUITE", DEBIAN_SUITE), ("LABEL", LABEL), ("SIZE", SIZE)])
            .env("PACKAGES", PACKAGES.join(","))
            .envs([("ROOT", &*root), ("OUT", &*out), ("ARCHIVE", archive), ("SERVICE", service)])
            .env("DEBOOTSTRAP", &debootstrap.program)
            .env("DEBOOTSTRAP_DIR", &debootstrap.scripts)
            .env("MKE2FS", &tools.mke2fs)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors);
    })?;
    let status = process.wait_for(DEADLINE)?;
    step.finish();
    if !status.success() {
        let text = fs::read(&log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing").into();
        return Err(Error::Build { last, log });
    }
    Ok(())
}
