//! A guest's image: a stock kernel's modules, the traffic tools, and the lab's own program as the guest agent.
//!
//! Nothing in it writes `/proc/irq`: where interrupts go is up to the guest kernel and to the shipped service.

use std::path::Path;
use std::process::{Command, Stdio};

use super::modules::Modules;
use super::{Error, Image};
use crate::provision::{BUSYBOX, KernelFiles, TOOLS, Unpacked, listed_libraries};

const INIT: &str = include_str!("guest-init.sh");

/// Where the shipped interrupt service lies in the guest.
pub const SERVICE: &str = "/usr/sbin/ivcpu-irq";

/// Where the shipped guest module lies in the guest.
pub const MODULE: &str = "/modules/ivcpu.ko";

/// Loaded at start. virtio_pmem is one of the FIFO region's two carriers.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_net", "virtio_console", "virtio_pmem"];

/// There to be loaded by a test that wants it: their paths, in order, are in `/on-request`.
const ON_REQUEST: [&str; 2] = ["virtio_blk", "virtio_rng"];

/// What goes into a guest's image.
pub(super) struct Contents<'a> {
    /// The guest's kernel.
    pub(super) kernel: &'a KernelFiles,
    /// The unpacked tools.
    pub(super) tools: &'a Unpacked,
    /// The lab's own program.
    pub(super) agent: &'a Path,
    /// The shipped interrupt service.
    pub(super) service: &'a Path,
    /// The shipped guest module, built for the kernel. Loaded on request only.
    pub(super) module: &'a Path,
    /// Whether the kernel has the driver of the host's virtual functions.
    pub(super) igbvf: bool,
}

/// Writes the image to `path`.
pub(super) fn build(path: &Path, contents: &Contents<'_>) -> Result<(), Error> {
    let mut image = Image::default();
    let tools = contents.tools;
    image.copy(&tools.find(BUSYBOX)?, "bin/busybox", 0o755)?;
    image.file("init", 0o755, INIT.as_bytes()).map_err(Error::file("add", path))?;
    let igbvf = contents.igbvf.then_some("igbvf");
    let names: Vec<_> = MODULES.into_iter().chain(igbvf).collect();
    let modules = Modules::of(contents.kernel)?;
    let at_start = modules.in_loading_order(&names)?.len();
    let all: Vec<_> = names.into_iter().chain(ON_REQUEST).collect();
    // The order begins with what is loaded at start.
    let (mut load, mut on_request) = (String::new(), String::new());
    for (number, module) in modules.in_loading_order(&all)?.into_iter().enumerate() {
        let name = format!("modules/{}.ko", module.name);
        let list = if number < at_start { &mut load } else { &mut on_request };
        *list += &format!("/{name}\n");
        image.file(&name, 0o644, &module.content).map_err(Error::file("add", path))?;
    }
    for (name, list) in [("load", load), ("on-request", on_request)] {
        image.file(name, 0o644, list.as_bytes()).map_err(Error::file("add", path))?;
    }
    add_agent(&mut image, contents.agent)?;
    add_tools(&mut image, tools, path)?;
    image.copy(contents.service, SERVICE, 0o755)?;
    image.copy(contents.module, MODULE, 0o644)?;
    for folder in ["proc", "sys", "dev", "tmp", "run", "etc"] {
        image.folder(folder).map_err(Error::file("add", path))?;
    }
    image.write(path)
}

/// The lab's program, without its debugging information (most of its size), and this machine's libraries for it.
fn add_agent(image: &mut Image, agent: &Path) -> Result<(), Error> {
    let scratch = tempfile::tempdir().map_err(Error::file("make", Path::new("a temporary folder")))?;
    let stripped = scratch.path().join("ivcpu-lab");
    let strip = Command::new("strip").arg("-o").arg(&stripped).arg(agent).stdin(Stdio::null()).output();
    let small = strip.is_ok_and(|output| output.status.success());
    image.copy(if small { &stripped } else { agent }, "bin/ivcpu-lab", 0o755)?;

    let failed = |why: String| Error::Libraries(agent.into(), why);
    let ldd =
        Command::new("ldd").arg(agent).stdin(Stdio::null()).output().map_err(|e| failed(e.to_string()))?;
    let text = String::from_utf8_lossy(&ldd.stdout);
    if !ldd.status.success() || text.contains("not found") {
        return Err(failed(text.trim().into()));
    }
    for library in listed_libraries(&text) {
        image.copy(&library, &library.display().to_string(), 0o755)?;
    }
    Ok(())
}

/// The tools with their own loader and libraries, so that they never meet the machine's C library.
fn add_tools(image: &mut Image, tools: &Unpacked, path: &Path) -> Result<(), Error> {
    const LIBRARIES: &str = "/tools/lib";
    let mut added = Vec::new();
    for (name, places) in TOOLS {
        let program = tools.find(places)?;
        image.copy(&program, &format!("/tools/bin/{name}"), 0o755)?;
        let mut loader = String::new();
        for library in tools.libraries(&program)? {
            let file = library.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if file.starts_with("ld-linux") {
                loader = format!("{LIBRARIES}/{file}");
            }
            if !added.contains(&file) {
                image.copy(&library, &format!("{LIBRARIES}/{file}"), 0o755)?;
                added.push(file);
            }
        }
        let launcher =
            format!("#!/bin/busybox sh\nexec {loader} --library-path {LIBRARIES} /tools/bin/{name} \"$@\"\n");
        image
            .file(&format!("usr/bin/{name}"), 0o755, launcher.as_bytes())
            .map_err(Error::file("add", path))?;
    }
    Ok(())
}
