//! A Debian disk image, as it is for everyday use, under ivcpu-vmm: systemd boots it from our disk to a login prompt, apt
//! installs packages over our network, as docs/standalone.md says; both devices interrupt the IVCPU, and what is left after the power-off is clean.
//! One of the packages is our own: its backend is a service of that systemd, as docs/install.md says, until it is purged.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ivcpu_lab::emulated_host::{EmulatedHost, Options};
use ivcpu_lab::guide;
use ivcpu_lab::image::debian::{self, DebianImage, DiskCopy};
use ivcpu_lab::in_host::measure::queue_interrupts;
use ivcpu_lab::in_host::{Cable, Host, Login, TAP, Wire};
use ivcpu_lab::link::{Link, PREFIX};
use ivcpu_lab::package::{Programs, package};
use ivcpu_lab::pcpu;
use ivcpu_lab::process::Process;
use ivcpu_lab::procfs::{Interrupt, virtio_interrupts};
use ivcpu_lab::provision::{BUSYBOX, Provision, Repository};
use ivcpu_lab::traffic::content_of;
use ivcpu_lab::trial::in_emulated_host_of_its_own;
use ivcpu_lab::workspace::Workspace;

const BOOT: Duration = Duration::from_secs(300);
/// A command in the guest, apt's among them.
const COMMAND: Duration = Duration::from_secs(90);
/// The package that apt installs, and its one file.
const PACKAGE: &str = "ivcpu-trial";
const FILE: &str = "/usr/share/ivcpu-trial/content";
const FILE_BYTES: usize = 2 << 20;
/// The guest's first CPUs are the application's.
const IVCPU: usize = pcpu::APPLICATION.len();

/// Makes the package, and an archive that has it and ours, out of files in `scratch`.
fn make_repository(scratch: &Path, ours: &Path) -> Result<PathBuf> {
    let (tree, deb) = (scratch.join("tree"), scratch.join(format!("{PACKAGE}_1_all.deb")));
    let file = tree.join(FILE.trim_start_matches('/'));
    for folder in [file.parent(), Some(&*tree.join("DEBIAN"))].into_iter().flatten() {
        fs::create_dir_all(folder)?;
    }
    fs::write(&file, content_of(FILE_BYTES))?;
    let control = format!(
        "Package: {PACKAGE}\nVersion: 1\nArchitecture: all\nMaintainer: the lab <root@localhost>\nDescription: a file\n"
    );
    fs::write(tree.join("DEBIAN/control"), control)?;
    let mut build = Command::new("dpkg-deb");
    build.args(["-Znone", "--root-owner-group", "--build"]).args([&tree, &deb]);
    let output = build.stdin(Stdio::null()).output().context("running dpkg-deb")?;
    ensure!(output.status.success(), "dpkg-deb: {}", String::from_utf8_lossy(&output.stderr));
    let folder = scratch.join("archive");
    let mut repository = Repository::create(&folder)?;
    repository.add(&deb)?;
    // The archive takes what it is given.
    let copy = scratch.join(ours.file_name().context("a package has a name")?);
    fs::copy(ours, &copy).with_context(|| format!("copying {}", ours.display()))?;
    repository.add(&copy)?;
    repository.finish("trial")?;
    Ok(folder)
}

/// Servers on the wire: addresses for guests, and files. Ended when dropped.
fn start_servers(host: &Host, repository: &Path) -> Result<[Process; 2]> {
    let busybox = Provision::new(&Workspace::locate()?).tools()?.find(BUSYBOX)?.display().to_string();
    let scratch = host.scratch();
    let (leases, configuration) = (scratch.join("leases"), scratch.join("udhcpd.conf"));
    let (wire, guest) = (Link::First.wire(), Link::First.guest());
    fs::write(&leases, "")?;
    let text = format!(
        "interface {TAP}\nstart {guest}\nend {guest}\noption subnet 255.255.255.0\noption lease 3600\n\
         lease_file {}\npidfile {}\n",
        leases.display(),
        scratch.join("udhcpd.pid").display()
    );
    fs::write(&configuration, text)?;
    let serve = |name: &str, words: &[&str]| -> Result<Process> {
        let log = host.log(&format!("{name}.log"))?;
        let errors = log.try_clone()?;
        let [program, enter @ ..] = Wire::enter_words();
        Ok(Process::spawn(name, program, |command| {
            command.args(enter).args([&busybox, name]).args(words);
            command.stdin(Stdio::null()).stdout(log).stderr(errors);
        })?)
    };
    let http = format!("{wire}:80");
    let repository = repository.display().to_string();
    Ok([
        serve("udhcpd", &["-f", &configuration.display().to_string()])?,
        serve("httpd", &["-f", "-p", &http, "-h", &repository])?,
    ])
}

/// The commands of the page's block `name`, and before them what it calls yours, with this host's values.
fn as_written(host: &Host, image: &DebianImage, name: &str) -> Result<Vec<String>> {
    let commands = guide::commands(&Workspace::locate()?, "standalone.md", name)?;
    let script = format!(
        "set -e\nPATH='{}':\"$PATH\"\nSOCKET='{}' UPLINK=tap:{TAP}\nKERNEL='{}' INITRD='{}' DISK=/dev/vda\nexec {commands}",
        host.binary("").display(),
        socket(host).display(),
        image.kernel.display(),
        image.initrd.display()
    );
    Ok(["sh".into(), "-euc".into(), script].into())
}

fn socket(host: &Host) -> PathBuf {
    host.scratch().join("net.sock")
}

/// The backend, in the wire's namespace, once it listens.
fn start_backend(host: &Host, image: &DebianImage) -> Result<Process> {
    let words = as_written(host, image, "backend")?;
    let log = host.log("backend.log")?;
    let [program, enter @ ..] = Wire::enter_words();
    let mut backend = Process::spawn("ivcpu-backend", program, |command| {
        command.args(enter).args(words).stdin(Stdio::null()).stderr(log);
    })?;
    backend.wait_for_socket(&socket(host), Duration::from_secs(15)).context("see backend.log")?;
    Ok(backend)
}

/// What the guest calls its one virtio device with that driver.
fn device(guest: &mut Login, driver: &str) -> Result<String> {
    let found = guest.run(&format!("ls /sys/bus/virtio/drivers/{driver}"), COMMAND)?;
    let name = found.split_whitespace().find(|name| name.starts_with("virtio"));
    Ok(name.with_context(|| format!("no device of {driver}: {found}"))?.to_owned())
}

fn interrupts(guest: &mut Login) -> Result<Vec<Interrupt>> {
    Ok(virtio_interrupts(&guest.run("cat /proc/interrupts", COMMAND)?))
}

/// What a device's queues did from one reading to the next was on the IVCPU, all but the few on their way when they moved.
fn on_the_ivcpu(device: &str, before: &[Interrupt], after: &[Interrupt]) -> Result<()> {
    let of_device = |all: &[Interrupt]| -> Vec<Interrupt> {
        all.iter().filter(|interrupt| interrupt.name.starts_with(&format!("{device}-"))).cloned().collect()
    };
    let irqs = queue_interrupts(&of_device(before), &of_device(after), Some(IVCPU))?;
    println!("{device}: {irqs:?}");
    ensure!(irqs.ivcpu > Some(20) && irqs.other <= 2, "{device}: {irqs:?}, {after:?}");
    Ok(())
}

/// Asks a backend for its features, as a frontend begins: request 1 of version 1, without content. The answer is
/// as long as its header and a number.
const SAY_HELLO: &str = concat!(
    "perl -MIO::Socket::UNIX -e '",
    "alarm 60; $socket = IO::Socket::UNIX->new(\"/run/ivcpu/net0.sock\") or die \"connect: $!\"; ",
    "syswrite $socket, pack(\"V3\", 1, 1, 0); read($socket, $answer, 20) == 20 or die \"no answer: $!\"; ",
    "($request, $flags, $size, $features) = unpack \"V3Q<\", $answer; print \"$request $flags $size $features\"'",
);

/// The backend of the package under systemd: started by its socket, confined, stopped, and gone with the package.
fn is_a_service(workspace: &Workspace, guest: &mut Login) -> Result<()> {
    let commands = guide::commands(workspace, "install.md", "service")?;
    for command in commands.lines() {
        guest.run(command, COMMAND)?;
    }
    let mut run = |command: &str| guest.run(command, COMMAND);
    ensure!(
        run("systemctl is-active ivcpu-backend@net0.service || :")? == "inactive",
        "it waits for a frontend"
    );
    let answer = run(SAY_HELLO)?;
    let numbers: Vec<u64> =
        answer.split_whitespace().map(str::parse).collect::<Result<_, _>>().context(answer)?;
    let [1, 5, 8, features] = numbers[..] else { bail!("another answer: {numbers:?}") };
    ensure!(features & (1 << 32) != 0, "no VERSION_1: {features:#x}");

    // It may have answered before systemd has read that it is ready: joined to the start that is under way, this waits for it.
    run("systemctl start ivcpu-backend@net0.service")?;
    let process = run("systemctl show --property MainPID --value ivcpu-backend@net0.service")?;
    let status = run(&format!("cat /proc/{process}/status"))?;
    for expected in
        ["NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000", "CapPrm:\t0000000000000000"]
    {
        ensure!(status.contains(expected), "{expected:?} is not in {status}");
    }
    ensure!(!status.contains("Uid:\t0"), "it runs as root: {status}");
    run("ip link show tap0")?;
    run("test -S /run/ivcpu-net0/metrics")?;

    // The socket stays systemd's, and the next frontend starts the service again.
    run("systemctl stop ivcpu-backend@net0.service")?;
    let properties = "Result,ActiveState,NRestarts";
    let result = run(&format!("systemctl show --property {properties} --value ivcpu-backend@net0.service"))?;
    ensure!(
        result.split_whitespace().all(|word| ["success", "inactive", "0"].contains(&word)),
        "it ended with {result}"
    );
    run(SAY_HELLO)?;
    let said = run("journalctl --quiet --no-pager --output cat _COMM=ivcpu-backend")?;
    ensure!(said.is_empty(), "the backend says {said}");
    // Enabled, and at work.
    run("apt-get -q -y purge ivcpu")?;
    let left = run("systemctl list-units --all --no-legend --plain 'ivcpu-backend*'")?;
    ensure!(left.is_empty(), "purged, and units are left: {left}");
    let left = run("find /etc /run /usr /var/lib -xdev -name '*ivcpu-backend*' -o -path '/etc/ivcpu*'")?;
    ensure!(left.is_empty(), "purged, and files are left: {left}");
    Ok(())
}

fn works_day_to_day(host: &Host) -> Result<()> {
    let begin = Instant::now();
    let at = |what: &str| println!("{:5.1} s: {what}", begin.elapsed().as_secs_f64());
    let workspace = Workspace::locate()?;
    let repository = make_repository(host.scratch(), &Programs::OfTheLab.package(&workspace))?;
    let _wire = Wire::set_up(Cable::Tap(1))?;
    let image = DebianImage::made(&workspace);
    let backend = start_backend(host, &image)?;
    let _servers = start_servers(host, &repository)?;
    let mut guest = Login::start(host, &as_written(host, &image, "vmm")?)?;
    guest.log_in(BOOT)?;
    at("logged in");

    let root = guest.run("findmnt --noheadings --output SOURCE,FSTYPE /", COMMAND)?;
    ensure!(root.split_whitespace().eq(["/dev/vda", "ext4"]), "the root file system is {root}");
    guest.run("systemctl is-active ivcpu-irq", COMMAND)?;
    let (wire, address) = (Link::First.wire(), format!("{}/{PREFIX}", Link::First.guest()));
    let wait = format!("until ip -4 -oneline address | grep -F 'inet {address}'; do sleep 1; done");
    guest.run(&wait, COMMAND)?;
    at("has its address");

    let (disk, net) = (device(&mut guest, "virtio_blk")?, device(&mut guest, "virtio_net")?);
    let before = interrupts(&mut guest)?;
    let source =
        format!("echo 'deb [trusted=yes] http://{wire}/ trial main' > /etc/apt/sources.list.d/trial.list");
    guest.run(&source, COMMAND)?;
    guest.run("apt-get -q update", COMMAND)?;
    at("apt-get update");
    guest.run(&format!("apt-get -q -y --no-install-recommends install {PACKAGE} ivcpu"), COMMAND)?;
    at("apt-get install");
    // What is read again comes from the disk.
    guest.run("sync; echo 3 > /proc/sys/vm/drop_caches", COMMAND)?;
    guest.run(&format!("dpkg --verify {PACKAGE} ivcpu"), COMMAND)?;
    let after = interrupts(&mut guest)?;
    for device in [&disk, &net] {
        on_the_ivcpu(device, &before, &after)?;
    }
    is_a_service(&workspace, &mut guest)?;
    at("the backend was a service");
    let failed = guest.run("systemctl --failed --no-legend --plain", COMMAND)?;
    ensure!(failed.is_empty(), "units that failed: {failed}");
    let errors = guest.run("dmesg --level emerg,alert,crit | cat", COMMAND)?;
    ensure!(errors.is_empty(), "the kernel says {errors}");

    at("powering off");
    let status = guest.power_off(COMMAND)?;
    at("off");
    ensure!(status.success(), "the VMM ended with {status}");
    ensure!(backend.terminate()?.success());
    Ok(())
}

/// An emulated host whose disk is a fresh copy of the image.
fn boot_with_disk() -> Result<(EmulatedHost, DiskCopy)> {
    let workspace = Workspace::locate()?;
    let provision = Provision::new(&workspace);
    package(&workspace, &provision, Programs::OfTheLab)?;
    let disk = debian::prepare(&workspace, &provision)?.copy_disk(&workspace)?;
    let options = Options { disk: Some(disk.path().into()), ..Options::default() };
    Ok((EmulatedHost::build_and_boot(&workspace, &provision, &[], &options)?, disk))
}

fn output(command: &mut Command) -> Result<(bool, Vec<u8>)> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("running {command:?}"))?;
    Ok((output.status.success(), output.stdout))
}

/// Unmounted, nothing wrong in it, and the package's file is there, every byte.
fn is_clean_and_has_the_file(disk: &Path) -> Result<()> {
    let tools = Provision::new(&Workspace::locate()?).file_system_tools()?;
    let (clean, text) = output(Command::new(&tools.e2fsck).arg("-n").arg(disk))?;
    let text = String::from_utf8_lossy(&text).into_owned();
    ensure!(clean && text.contains(": clean, "), "its state: {text}");
    let (clean, text) = output(Command::new(&tools.e2fsck).arg("-fn").arg(disk))?;
    let text = String::from_utf8_lossy(&text).into_owned();
    ensure!(clean, "a full check: {text}");
    println!("{}", text.lines().last().unwrap_or_default());
    let (_, content) = output(Command::new(&tools.debugfs).arg("-R").arg(format!("cat {FILE}")).arg(disk))?;
    ensure!(content == content_of(FILE_BYTES), "{} bytes that are not {FILE}", content.len());
    Ok(())
}

#[test]
fn boots_from_our_disk_installs_over_our_network_and_ends_clean() -> Result<()> {
    let Some((host, disk)) = in_emulated_host_of_its_own(boot_with_disk, |host| works_day_to_day(host))?
    else {
        // Inside.
        return Ok(());
    };
    host.power_off()?;
    is_clean_and_has_the_file(disk.path())
}
