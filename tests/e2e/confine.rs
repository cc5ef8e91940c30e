//! A VM in its sandbox, as it is by default: it does all it should, talks over its virtio console, says so over its API, and is
//! switched off by SIGTERM.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ivcpu_lab::in_host::{Backend, BackendConfig, Cable, Host, TAP, Vm, Wire};
use ivcpu_lab::pcpu;
use ivcpu_lab::provision::Kernel;
use ivcpu_lab::traffic::{Traffic, Workload};
use ivcpu_lab::trial::in_emulated_host;
use nix::sys::signal::Signal;
use serde_json::Value;

/// What the guest does when its button is pressed, as a distribution's logind or acpid would.
const HEED_THE_BUTTON: &str = "for event in /sys/class/input/event*; do
    grep -q 'Power Button' $event/device/name && button=/dev/input/${event##*/}
done
[ -n \"$button\" ] || exit 1
(head -c 1 $button && poweroff -f) > /dev/null 2>&1 < /dev/null &";

fn start(host: &Host, backend: &Backend, socket: &Path) -> Result<Vm> {
    let (kernel, image) = host.guest_files(Kernel::V6_12)?;
    let net = format!("vhost_user=true,socket={}", backend.socket().display());
    let words = [
        ("--kernel", kernel.display().to_string()),
        ("--initramfs", image.display().to_string()),
        ("--cmdline", "console=hvc0 quiet panic=-1".into()),
        ("--serial", "null".into()),
        ("--console", "tty".into()),
        ("--memory", "size=512M".into()),
        ("--cpus", "boot=2,affinity=[0@[0],1@[1]]".into()),
        ("--ivcpu", format!("affinity=[{}]", pcpu::IVCPU)),
        ("--net", net),
        ("--api-socket", socket.display().to_string()),
        ("--exits", "json".into()),
    ];
    let options = words.into_iter().flat_map(|(name, value)| [name.to_owned(), value]);
    let program = host.binary("ivcpu-vmm").display().to_string();
    Vm::boot_by(host, &std::iter::once(program).chain(options).collect::<Vec<_>>(), 3)
}

/// A request to the API: status and JSON.
fn request(socket: &Path, method: &str, name: &str) -> Result<(u16, Value)> {
    let mut stream = UnixStream::connect(socket).context("connecting to the API")?;
    write!(stream, "{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("an answer has a header")?;
    let status = head.split(' ').nth(1).context("an answer has a status")?.parse()?;
    Ok((status, serde_json::from_str(body).unwrap_or(Value::Null)))
}

/// The exits of all vCPUs so far as KVM counts them, and by row on the pCPUs that ran them.
fn exits(socket: &Path) -> Result<(u64, u64)> {
    let (status, counters) = request(socket, "GET", "vm.counters")?;
    ensure!(status == 200, "{counters}");
    let counters = counters.as_object().context("counters")?;
    let of_vcpus =
        ["vcpu0", "vcpu1", "ivcpu"].map(|name| counters.get(name).and_then(|c| c["exits"].as_u64()));
    let of_vcpus = of_vcpus.into_iter().sum::<Option<u64>>().with_context(|| format!("{counters:?}"))?;
    let pcpus = counters.iter().filter(|(name, _)| name.starts_with("pcpu"));
    let of_pcpus = pcpus.filter_map(|(_, rows)| rows.as_object()).flat_map(|rows| rows.values());
    let halts = &counters.get(&format!("pcpu{}", pcpu::IVCPU)).context("the IVCPU's pCPU")?["HLT"];
    ensure!(halts.as_u64() > Some(0), "{counters:?}");
    Ok((of_vcpus, of_pcpus.filter_map(Value::as_u64).sum()))
}

#[test]
fn a_confined_vm_moves_traffic_is_paused_and_heeds_its_power_button() -> Result<()> {
    in_emulated_host(|host| {
        let wire = Wire::set_up(Cable::Tap(1))?;
        let backend = Backend::start(
            host,
            &BackendConfig {
                uplink: format!("tap:{TAP}"),
                queue_pairs: 1,
                poll: "50".into(),
                pcpus: vec![pcpu::BACKEND],
                control_queue: true,
                fifo: None,
            },
        )?;
        let socket = host.scratch().join("api.sock");
        let mut vm = start(host, &backend, &socket)?;
        for task in fs::read_dir(format!("/proc/{}/task", vm.id()))? {
            let status = fs::read_to_string(task?.path().join("status"))?;
            ensure!(status.contains("Seccomp:\t2\n") && status.contains("NoNewPrivs:\t1\n"), "{status}");
        }
        let log = fs::read_to_string(host.log_path("guest.log"))?;
        ensure!(!log.contains("no landlock"), "Debian's kernels have landlock: {log}");

        vm.bring_up_network(1)?;
        vm.start_service()?;
        ensure!(request(&socket, "PUT", "vm.pause")?.0 == 204);
        ensure!(request(&socket, "GET", "vm.info")?.1["state"] == "Paused");
        let before = exits(&socket)?;
        sleep(Duration::from_millis(300));
        ensure!(exits(&socket)? == before, "a paused guest has no exits");
        let (of_vcpus, of_pcpus) = before;
        ensure!(
            of_vcpus.abs_diff(of_pcpus) <= of_vcpus / 100,
            "{of_pcpus} exits in rows, {of_vcpus} counted by KVM"
        );
        ensure!(request(&socket, "PUT", "vm.resume")?.0 == 204);
        ensure!(vm.run("true")?.0 == 0, "the guest goes on");
        let after = exits(&socket)?;
        ensure!(after.0 > before.0 && after.1 > before.1, "{before:?} {after:?}");

        // Its backend has the rings again.
        let traffic = Traffic::new(Workload::TcpOut);
        let wire_end = wire.listen(traffic)?;
        vm.start_traffic(traffic)?;
        sleep(Duration::from_secs(1));
        let (guest_end, wire_end) = (vm.stop_traffic()?, wire_end.stop());
        ensure!(guest_end.failure.is_none() && wire_end.failure.is_none(), "{guest_end:?} {wire_end:?}");
        ensure!(wire_end.bytes_verified > 0, "{wire_end:?}");

        let (status, text) = vm.run(HEED_THE_BUTTON)?;
        ensure!(status == 0, "no power button in the guest: {text}");
        ensure!(vm.end_by(Signal::SIGTERM)?.success(), "the guest switched itself off");
        ensure!(!socket.exists(), "the socket goes with the VM");
        // Landlock leaves the count of exits what it needs, to the end.
        let log = fs::read_to_string(host.log_path("guest.log"))?;
        let report = log.lines().rev().find(|line| line.starts_with("{\"pcpus\"")).context("the exits")?;
        let report: Value = serde_json::from_str(report)?;
        let instances = fs::read_dir("/sys/kernel/tracing/instances")?.collect::<Result<Vec<_>, _>>()?;
        let ours =
            instances.iter().filter(|instance| instance.file_name().to_string_lossy().starts_with("ivcpu-"));
        ensure!(ours.count() == 0, "still counted: {instances:?}");
        ensure!(report["exits_total"].as_u64().is_some_and(|exits| exits > 1000), "{report}");
        Ok(())
    })
}
