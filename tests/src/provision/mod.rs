//! Brings kernels, QEMU and tools from the distribution's archive into the cache folder, each once.

mod apt;
mod archive;
mod cargo_install;
mod debian;
mod peers;
mod repository;
mod system;
mod unpacked;
mod vmlinux;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::workspace::Workspace;
use archive::{Archive, BACKPORTS, SUITE, Selection};
pub use archive::{Error as ArchiveError, SUITE as DEBIAN_SUITE};
pub use cargo_install::ALIOTH;
use cargo_install::CARGO_DEB;
pub use debian::{Debootstrap, FileSystemTools, PackageArchive};
pub use peers::Libvirt;
pub use repository::Repository;
pub(crate) use repository::sha256;
pub use unpacked::{Unpacked, listed_libraries};

/// Why something the lab needs could not be provided.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The archive did not give it.
    #[error(transparent)]
    Archive(#[from] archive::Error),
    /// A package does not hold the file it always held.
    #[error("the unpacked packages have no {0}: delete target/lab and run `cargo lab provision` again")]
    Missing(PathBuf),
    /// The dynamic loader could not resolve a program's libraries.
    #[error("cannot list the libraries of {0}: {1}")]
    Loader(PathBuf, String),
    /// cargo did not install a program.
    #[error(transparent)]
    Cargo(#[from] cargo_install::Error),
    /// A Debian system could not be made.
    #[error(transparent)]
    System(#[from] system::Error),
    /// A file could not be written.
    #[error("cannot write {0}: {1}")]
    Write(PathBuf, #[source] io::Error),
    /// A kernel could not be unpacked.
    #[error("cannot unpack the kernel {0}: {1}")]
    Unpack(PathBuf, #[source] io::Error),
    /// A folder could not be read.
    #[error("cannot read {0}: {1}")]
    Read(PathBuf, #[source] io::Error),
}

/// A distribution kernel the lab can boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
pub enum Kernel {
    /// Debian's 6.12, every driver.
    #[value(name = "6.12")]
    #[serde(rename = "6.12")]
    V6_12,
    /// Debian's 6.12 for cloud guests.
    #[value(name = "6.12-cloud")]
    #[serde(rename = "6.12-cloud")]
    V6_12Cloud,
    /// Debian's 6.1, every driver.
    #[value(name = "6.1")]
    #[serde(rename = "6.1")]
    V6_1,
    /// Debian's 6.1 for cloud guests.
    #[value(name = "6.1-cloud")]
    #[serde(rename = "6.1-cloud")]
    V6_1Cloud,
}

impl Kernel {
    /// The name it goes by on the command line and in file names.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::V6_12 => "6.12",
            Kernel::V6_12Cloud => "6.12-cloud",
            Kernel::V6_1 => "6.1",
            Kernel::V6_1Cloud => "6.1-cloud",
        }
    }

    /// Whether it has drivers for virtual functions (cloud flavours lack igbvf).
    pub fn has_igbvf(self) -> bool {
        matches!(self, Kernel::V6_12 | Kernel::V6_1)
    }

    fn metapackage(self) -> (&'static str, &'static str) {
        match self {
            Kernel::V6_12 => ("linux-image-amd64", BACKPORTS),
            Kernel::V6_12Cloud => ("linux-image-cloud-amd64", BACKPORTS),
            Kernel::V6_1 => ("linux-image-amd64", SUITE),
            Kernel::V6_1Cloud => ("linux-image-cloud-amd64", SUITE),
        }
    }
}

/// An unpacked kernel.
#[derive(Clone, Debug)]
pub struct KernelFiles {
    /// The bzImage.
    pub image: PathBuf,
    /// The same kernel unpacked, which boots sooner: of the one that most guests run. The
    /// others are booted as they are.
    pub vmlinux: Option<PathBuf>,
    /// `lib/modules/RELEASE`.
    pub modules: PathBuf,
    /// What `uname -r` says in it.
    pub release: String,
    /// The folder that kbuild makes modules for it from.
    pub headers: PathBuf,
}

impl KernelFiles {
    /// What boots soonest.
    pub fn quickest(&self) -> &Path {
        self.vmlinux.as_ref().unwrap_or(&self.image)
    }
}

/// Provides what the lab needs, fetching what the cache lacks.
pub struct Provision {
    workspace: Workspace,
}

impl Provision {
    /// Nothing is fetched until it is asked for.
    pub fn new(workspace: &Workspace) -> Self {
        Self { workspace: workspace.clone() }
    }

    /// The kernel `kernel`, with what modules for it are built from. Both come in one go: the archive keeps only the
    /// newest of each.
    pub fn kernel(&self, kernel: Kernel) -> Result<KernelFiles, Error> {
        let dir = self.workspace.cache().join("linux").join(kernel.name());
        self.fetch(&dir, |archive| {
            let (metapackage, suite) = kernel.metapackage();
            let image = archive.kernel_of(metapackage, suite)?;
            let headers = image.replace("linux-image-", "linux-headers-");
            let mut packages = archive.needed_by_headers(&headers, suite)?;
            packages.extend([image, headers]);
            let packages: Vec<_> = packages.iter().map(String::as_str).collect();
            archive.unpack(&format!("kernel {}", kernel.name()), Selection::Alone(&packages), suite, &dir)
        })?;
        let unpacked = Unpacked::new(dir);
        let modules = unpacked.find(&["lib/modules", "usr/lib/modules"])?;
        let mut entries = fs::read_dir(&modules).map_err(|e| Error::Read(modules.clone(), e))?;
        let release = match entries.next() {
            Some(Ok(entry)) => entry.file_name().to_string_lossy().into_owned(),
            _ => return Err(Error::Missing(modules)),
        };
        let image = unpacked.path(&format!("boot/vmlinuz-{release}"));
        let headers = unpacked.path(&format!("usr/src/linux-headers-{release}"));
        relocate_headers(&headers)?;
        let vmlinux = (kernel == Kernel::V6_12).then(|| unpacked.path("boot/vmlinux"));
        if let Some(vmlinux) = &vmlinux {
            vmlinux::unpack(&image, vmlinux).map_err(|e| Error::Unpack(image.clone(), e))?;
        }
        Ok(KernelFiles { image, vmlinux, modules: modules.join(&release), release, headers })
    }

    /// GNU make. It needs nothing but a C library as old as the one it was built with.
    pub fn make(&self) -> Result<PathBuf, Error> {
        let dir = self.workspace.cache().join("make");
        self.fetch(&dir, |archive| archive.unpack("make", Selection::Alone(&["make"]), SUITE, &dir))?;
        Unpacked::new(dir).find(&["usr/bin/make"])
    }

    /// The programs that run in hosts and guests: busybox, iperf3, sockperf, ethtool, ip.
    pub fn tools(&self) -> Result<Unpacked, Error> {
        let dir = self.workspace.cache().join("tools");
        let packages = ["busybox-static", "ethtool", "iperf3", "iproute2", "sockperf"];
        self.fetch(&dir, |archive| {
            archive.unpack("tools", Selection::WithDependencies(&packages), SUITE, &dir)
        })?;
        let tools = Unpacked::new(dir);
        for (name, places) in TOOLS {
            let launcher = self.workspace.launchers().join(name);
            tools.write_launcher(&launcher, &tools.loader(), &tools.find(places)?, "", "")?;
        }
        Ok(tools)
    }

    /// QEMU, as a launcher that any process can start by this path.
    pub fn qemu(&self) -> Result<PathBuf, Error> {
        let dir = self.workspace.cache().join("qemu");
        self.fetch(&dir, |archive| {
            archive.unpack("QEMU", Selection::WithDependencies(&["qemu-system-x86"]), BACKPORTS, &dir)
        })?;
        let qemu = Unpacked::new(dir);
        let launcher = self.workspace.launchers().join("qemu-system-x86_64");
        let at = |path: &str| format!("'{}'", qemu.path(path).display());
        let modules = format!("export QEMU_MODULE_DIR={}\n", at("usr/lib/x86_64-linux-gnu/qemu"));
        let data = ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"];
        let data: Vec<_> = data.iter().map(|folder| format!("-L {}", at(folder))).collect();
        qemu.write_launcher(
            &launcher,
            &qemu.loader(),
            &qemu.find(&["usr/bin/qemu-system-x86_64"])?,
            &modules,
            &data.join(" "),
        )?;
        Ok(launcher)
    }

    /// cargo-deb, built from its sources too.
    pub fn cargo_deb(&self) -> Result<PathBuf, Error> {
        Ok(CARGO_DEB.install(&self.workspace)?)
    }

    /// The smallest Debian system, of this machine's release, in a folder. It takes root.
    pub fn clean_system(&self) -> Result<PathBuf, Error> {
        Ok(system::clean(&self.workspace.cache())?)
    }

    /// The same with what builds kernel modules and reads manual pages, and lintian.
    pub fn workbench(&self) -> Result<PathBuf, Error> {
        Ok(system::workbench(&self.workspace.cache())?)
    }

    /// A browser without a window, as a launcher, with a font.
    pub fn browser(&self) -> Result<PathBuf, Error> {
        let dir = self.workspace.cache().join("browser");
        self.fetch(&dir, |archive| {
            let packages = Selection::WithDependencies(&["chromium-headless-shell", "fonts-dejavu-core"]);
            archive.unpack("a browser", packages, SUITE, &dir)
        })?;
        let browser = Unpacked::new(dir);
        let launcher = self.workspace.launchers().join("chromium-headless-shell");
        let program = browser.find(&["usr/lib/chromium/chromium-headless-shell"])?;
        // Its fonts are the folder's, and what it starts of itself goes through the launcher again.
        let fonts = font_configuration(&browser)?;
        let environment = format!("export FONTCONFIG_FILE='{}'\n", fonts.display());
        let arguments = "--browser-subprocess-path=\"$0\" --no-zygote";
        let loader = browser.loader_beside(&program)?;
        browser.write_launcher(&launcher, &loader, &program, &environment, arguments)?;
        Ok(launcher)
    }

    /// sparse, the kernel's own checker of C sources: the program alone, which needs nothing but a C library.
    pub fn sparse(&self) -> Result<PathBuf, Error> {
        let dir = self.workspace.cache().join("sparse");
        self.fetch(&dir, |archive| archive.unpack("sparse", Selection::Alone(&["sparse"]), SUITE, &dir))?;
        Unpacked::new(dir).find(&["usr/bin/sparse"])
    }

    /// libxml2's validator, as a launcher, and libvirt's schema of a domain: what `virt-xml-validate` puts together.
    pub fn libvirt_schema(&self) -> Result<(PathBuf, PathBuf), Error> {
        let (schemas, xmllint) =
            (self.workspace.cache().join("libvirt"), self.workspace.cache().join("xmllint"));
        self.fetch(&schemas, |archive| {
            archive.unpack("libvirt's schemas", Selection::Alone(&["libvirt0"]), SUITE, &schemas)
        })?;
        self.fetch(&xmllint, |archive| {
            let packages = Selection::WithDependencies(&["libxml2-utils"]);
            archive.unpack("xmllint", packages, SUITE, &xmllint)
        })?;
        let xmllint = Unpacked::new(xmllint);
        let launcher = self.workspace.launchers().join("xmllint");
        xmllint.write_launcher(&launcher, &xmllint.loader(), &xmllint.find(&["usr/bin/xmllint"])?, "", "")?;
        Ok((launcher, Unpacked::new(schemas).find(&["usr/share/libvirt/schemas/domain.rng"])?))
    }

    /// Has `unpack` make `dir` out of the archive's packages if nobody has yet. The archive is given back at once:
    /// whoever held it for longer, waiting for something else, could wait for one who waits for the archive.
    fn fetch(
        &self,
        dir: &Path,
        unpack: impl Fn(&Archive) -> Result<(), archive::Error>,
    ) -> Result<(), Error> {
        if dir.exists() {
            return Ok(());
        }
        let archive = Archive::open(&self.workspace.cache())?;
        if dir.exists() {
            // Someone else fetched it while we waited.
            return Ok(());
        }
        let parent = dir.parent().unwrap_or(dir);
        fs::create_dir_all(parent).map_err(|e| Error::Write(parent.into(), e))?;
        match unpack(&archive) {
            Err(error @ archive::Error::Failed { .. }) if !archive.is_fresh() => {
                eprintln!("lab: {error}: once more with new package lists");
                archive.refresh()?;
                Ok(unpack(&archive)?)
            }
            outcome => Ok(outcome?),
        }
    }
}

/// A configuration that knows the unpacked fonts and no others.
fn font_configuration(unpacked: &Unpacked) -> Result<PathBuf, Error> {
    let path = unpacked.path("fonts.conf");
    let text = format!(
        "<?xml version=\"1.0\"?>\n<fontconfig><dir>{}</dir><cachedir>{}</cachedir></fontconfig>\n",
        unpacked.path("usr/share/fonts").display(),
        unpacked.path("var/cache/fontconfig").display()
    );
    fs::write(&path, text).map_err(|e| Error::Write(path.clone(), e))?;
    Ok(path)
}

/// A headers package includes the common headers' makefile by the path they are installed at; here it is another.
fn relocate_headers(headers: &Path) -> Result<(), Error> {
    let makefile = headers.join("Makefile");
    let text = fs::read_to_string(&makefile).map_err(|e| Error::Read(makefile.clone(), e))?;
    let missing = || Error::Missing(makefile.clone());
    let included = Path::new(text.trim().strip_prefix("include ").ok_or_else(missing)?);
    let common = included.parent().and_then(Path::file_name).ok_or_else(missing)?;
    let here = headers.with_file_name(common).join("Makefile");
    if here == included {
        return Ok(());
    }
    if !here.is_file() {
        return Err(Error::Missing(here));
    }
    // A new file in its place: other checkouts may have hard links to the old one.
    let write = fs::remove_file(&makefile)
        .and_then(|()| fs::write(&makefile, format!("include {}\n", here.display())));
    write.map_err(|e| Error::Write(makefile, e))
}

/// Dynamically linked programs of the tools, and the places releases keep them in.
pub const TOOLS: [(&str, &[&str]); 4] = [
    ("ethtool", &["usr/sbin/ethtool", "sbin/ethtool"]),
    ("ip", &["usr/bin/ip", "bin/ip", "usr/sbin/ip"]),
    ("iperf3", &["usr/bin/iperf3"]),
    ("sockperf", &["usr/bin/sockperf"]),
];

/// The one program that needs no library.
pub const BUSYBOX: &[&str] = &["usr/bin/busybox", "bin/busybox"];
