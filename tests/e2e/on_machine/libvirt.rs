//! libvirt's own QEMU driver takes the domain of docs/pairing.md, checks it, and runs it: QEMU comes up with the region and
//! connects to our backend.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use ivcpu_lab::in_host::{Backend, BackendConfig, FifoRegion, Host};
use ivcpu_lab::provision::{Libvirt, Provision};
use ivcpu_lab::result::Carrier;
use ivcpu_lab::trial::on_this_machine;
use ivcpu_lab::workspace::Workspace;

/// What libvirt puts into /dev/shm for a `<shmem>`, under a name that no other run has; gone when dropped.
struct SharedMemory(PathBuf);

impl SharedMemory {
    fn name() -> String {
        format!("ivcpu-fifo-{}", std::process::id())
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The page's domain with what is this machine's put in, each replaced exactly once: the emulator and the paths, and emulated
/// vCPUs that float, because here is neither KVM nor a pCPU for each.
fn domain(host: &Host, backend: &Backend) -> Result<String> {
    let mut xml = fs::read_to_string(Workspace::locate()?.root().join("docs/libvirt-domain.xml"))?;
    let disk = host.scratch().join("guest.img");
    File::create(&disk)?.set_len(1 << 20)?;
    let devices =
        format!("<devices>\n<emulator>{}</emulator>", host.launcher("qemu-system-x86_64").display());
    for (from, to) in [
        ("<domain type='kvm'>", "<domain type='qemu'>"),
        ("<cpu mode='host-passthrough'/>", "<cpu mode='maximum'/>"),
        ("<hint-dedicated state='on'/>", ""),
        ("<devices>", &devices),
        ("/var/lib/libvirt/images/guest.img", &disk.display().to_string()),
        ("/run/ivcpu/net.sock", &backend.socket().display().to_string()),
        ("<shmem name='ivcpu-fifo'>", &format!("<shmem name='{}'>", SharedMemory::name())),
    ] {
        ensure!(xml.matches(from).count() == 1, "the page's domain has not one {from}");
        xml = xml.replace(from, to);
    }
    for element in ["cputune", "kvm"] {
        let (from, to) = (format!("<{element}>"), format!("</{element}>"));
        let (before, rest) = xml.split_once(&from).with_context(|| format!("no {from}"))?;
        let (_, after) = rest.split_once(&to).with_context(|| format!("no {to}"))?;
        xml = format!("{before}{after}");
    }
    Ok(xml)
}

/// Runs commands in one `virsh` that is libvirt's daemon, too; what it starts ends with it.
fn virsh(libvirt: &Libvirt, host: &Host, commands: &str) -> Result<Output> {
    let root = host.scratch().join("libvirt");
    fs::create_dir_all(root.join("etc"))?;
    // Without a daemon there is no keeper of logs.
    fs::write(root.join("etc/qemu.conf"), "stdio_handler = \"file\"\n")?;
    // libvirt finds its data by the path it is installed at: shown there to it alone. As nobody in particular it wants no
    // user of its own for QEMU, and no control groups.
    let script = "mount -t overlay -o \"lowerdir=$DATA:/usr/share\" overlay /usr/share && \
                  exec unshare --user \"$VIRSH\" -c \"qemu:///embed?root=$HOME\" \"$COMMANDS\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).stdin(Stdio::null()).current_dir("/");
    command.env("DATA", &libvirt.data).env("VIRSH", &libvirt.virsh).env("COMMANDS", commands);
    for folder in ["HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"] {
        command.env(folder, &root);
    }
    command.output().context("running unshare")
}

#[test]
fn libvirt_checks_and_runs_the_domain_of_the_page() -> Result<()> {
    let libvirt = Provision::new(&Workspace::locate()?).libvirt()?;
    on_this_machine(|host| {
        let memory = SharedMemory(PathBuf::from("/dev/shm").join(SharedMemory::name()));
        let region = FifoRegion { path: memory.0.clone(), carrier: Carrier::Ivshmem };
        Backend::create_region(host, &region)?;
        let config = BackendConfig {
            uplink: "loop".into(),
            queue_pairs: 1,
            poll: "50".into(),
            pcpus: vec![],
            control_queue: true,
            fifo: Some(format!("path={}", memory.0.display())),
        };
        let backend = Backend::start(host, &config)?;
        let file = host.scratch().join("domain.xml");
        let path = file.display();
        let xml = domain(host, &backend)?;

        fs::write(&file, xml.replace("ivshmem-plain", "ivshmem-plane"))?;
        let refused = virsh(&libvirt, host, &format!("define --validate {path}"))?;
        ensure!(!refused.status.success(), "a model that libvirt does not know is accepted");

        fs::write(&file, &xml)?;
        let commands = format!(
            "define --validate {path}; start ivcpu-example; domstate ivcpu-example; destroy ivcpu-example"
        );
        let output = virsh(&libvirt, host, &commands)?;
        let said = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && said.contains("running"), "{said}{errors}");
        ensure!(backend.stats()?.sessions == 1, "its QEMU did not connect: {said}{errors}");
        ensure!(backend.terminate()?.success());
        Ok(())
    })
}
