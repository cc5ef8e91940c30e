//! The commands of docs/pairing.md, run as they stand there: only what the page calls yours is set to what this
//! machine has.

use std::fs;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ivcpu_lab::guide;
use ivcpu_lab::in_host::fifo_guest::{load_module, module_counters, send_to_loop};
use ivcpu_lab::in_host::{Host, Vm};
use ivcpu_lab::process::Process;
use ivcpu_lab::provision::{Kernel, Provision};
use ivcpu_lab::trial::on_this_machine;
use ivcpu_lab::workspace::Workspace;
use nix::sys::signal::Signal;

/// The page's block of commands with this name.
fn block(name: &str) -> Result<String> {
    guide::commands(&Workspace::locate()?, "pairing.md", name)
}

/// What the page calls yours: the same names, this machine's values.
fn settings(host: &Host) -> Result<String> {
    let (kernel, image) = host.guest_files(Kernel::V6_12)?;
    let scratch = host.scratch().display();
    let ours = format!(
        "UPLINK=loop\nACCEL='-accel tcg,thread=multi -cpu max'\nKERNEL='{}' INITRD='{}' WORDS='console=ttyS0 quiet panic=-1'\n\
         SOCKET='{scratch}/net.sock' FIFO='{scratch}/fifo'\n",
        kernel.display(),
        image.display()
    );
    let names = |text: &str| -> Vec<String> {
        let mut names: Vec<_> = text
            .split_whitespace()
            .filter_map(|word| Some(word.split_once('=')?.0.to_owned()))
            .filter(|name| !name.is_empty() && name.chars().all(|c| c.is_ascii_uppercase()))
            .collect();
        names.sort();
        names
    };
    let page = block("settings")?;
    ensure!(names(&page) == names(&ours), "the page's settings are not those this test makes: {page}");
    let path = format!("{}:{}", host.binary("").display(), host.launcher("").display());
    Ok(format!("PATH='{path}':\"$PATH\"\n{ours}"))
}

/// A shell that ends what it started when it is asked to end.
struct Shell(Process);

impl Drop for Shell {
    fn drop(&mut self) {
        self.0.signal(Signal::SIGTERM);
        let _ = self.0.wait_for(Duration::from_secs(5));
    }
}

fn works_as_written(host: &Host, carrier: &str) -> Result<()> {
    let settings = settings(host)?;
    // The page leaves the backend in the background; its shell waits, and takes it along when it has to go.
    let script = format!("set -e\n{settings}trap 'kill $!' TERM\n{}wait\n", block("backend")?);
    let _backend = Shell(Process::spawn("the backend's shell", "sh", |command| {
        command.args(["-c", &script]).stdin(Stdio::null());
    })?);
    let socket = host.scratch().join("net.sock");
    let start = Instant::now();
    while !socket.exists() {
        ensure!(start.elapsed() < Duration::from_secs(15), "no backend on {}", socket.display());
        sleep(Duration::from_millis(20));
    }
    let script = format!("set -e\n{settings}exec {}", block(carrier)?);
    let mut vm = Vm::boot_by(host, &["sh".into(), "-c".into(), script], 3)?;
    vm.bring_up_network(1)?;
    load_module(&mut vm, 2, None)?;
    send_to_loop(&mut vm, 200)?;
    let counters = module_counters(&mut vm)?;
    ensure!(counters.entries >= 200, "{counters:?}");
    ensure!(vm.power_off()?.success());
    Ok(())
}

#[test]
fn qemu_with_ivshmem() -> Result<()> {
    on_this_machine(|host| works_as_written(host, "ivshmem"))
}

#[test]
fn qemu_with_virtio_pmem() -> Result<()> {
    on_this_machine(|host| works_as_written(host, "virtio-pmem"))
}

#[test]
fn libvirts_schema_accepts_the_domain() -> Result<()> {
    let workspace = Workspace::locate()?;
    let (xmllint, schema) = Provision::new(&workspace).libvirt_schema()?;
    let validate = |xml: &str| -> Result<(bool, String)> {
        let file = tempfile::NamedTempFile::new()?;
        fs::write(file.path(), xml)?;
        let output = Command::new(&xmllint)
            .args(["--noout", "--relaxng"])
            .arg(&schema)
            .arg(file.path())
            .output()
            .with_context(|| format!("running {}", xmllint.display()))?;
        Ok((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    let xml = fs::read_to_string(workspace.root().join("docs/libvirt-domain.xml"))?;
    let (valid, why) = validate(&xml)?;
    ensure!(valid, "{why}");
    let (valid, _) = validate(&xml.replace("ivshmem-plain", "ivshmem-plane"))?;
    ensure!(!valid, "a model that libvirt does not know is accepted");
    Ok(())
}
