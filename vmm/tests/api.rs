//! The API of a VM that runs a guest of a few instructions.

mod guest;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use guest::kernel::{has_kvm, image};
use guest::{CHATTER, Vmm, wait_until};

/// A chattering guest with an API socket.
struct Served {
    vmm: Vmm,
    socket: PathBuf,
    output: PathBuf,
    _kernel: tempfile::NamedTempFile,
    _folder: tempfile::TempDir,
}

impl Served {
    fn start(more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (socket, output) = (folder.path().join("api"), folder.path().join("output"));
        let kernel = image(&CHATTER);
        let serial = format!("file={}", output.display());
        let path = format!("path={}", socket.display());
        let words = [&["--serial", &serial, "--api-socket", &path], more].concat();
        let vmm = Vmm::start(kernel.path(), &words);
        let served = Self { vmm, socket, output, _kernel: kernel, _folder: folder };
        wait_until("the guest says something", || served.said() > 0);
        served
    }

    /// How much the guest has said.
    fn said(&self) -> u64 {
        std::fs::metadata(&self.output).map_or(0, |metadata| metadata.len())
    }

    fn get(&self, name: &str) -> (u16, serde_json::Value) {
        request(&self.socket, "GET", name)
    }

    fn put(&self, name: &str) -> (u16, serde_json::Value) {
        request(&self.socket, "PUT", name)
    }
}

fn request(socket: &Path, method: &str, name: &str) -> (u16, serde_json::Value) {
    let mut stream = UnixStream::connect(socket).unwrap();
    write!(stream, "{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let value = if body.is_empty() { serde_json::Value::Null } else { serde_json::from_str(body).unwrap() };
    (status, value)
}

#[test]
fn a_paused_guest_stands_still_until_it_is_resumed() {
    if !has_kvm("a_paused_guest_stands_still_until_it_is_resumed") {
        return;
    }
    let mut served = Served::start(&["--cpus", "boot=3"]);
    for _ in 0..3 {
        assert_eq!(served.put("vm.pause").0, 204);
        assert_eq!(served.get("vm.info").1["state"], "Paused");
        let before = served.said();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(served.said(), before);
        let (status, why) = served.put("vm.pause");
        assert_eq!(
            (status, why[0].as_str()),
            (405, Some("the VM is paused already; resume it with vm.resume"))
        );

        assert_eq!(served.put("vm.resume").0, 204);
        assert_eq!(served.get("vm.info").1["state"], "Running");
        wait_until("the guest goes on", || served.said() > before);
        assert_eq!(served.put("vm.resume").0, 405);
    }
    // A paused VM can be ended.
    assert_eq!(served.put("vm.pause").0, 204);
    assert_eq!(served.put("vm.shutdown").0, 204);
    assert_eq!(served.vmm.status(), Some(0));
    assert!(!served.socket.exists());
    let mut last = String::new();
    served.vmm.0.stderr.take().unwrap().read_to_string(&mut last).unwrap();
    assert!(last.ends_with("ivcpu-vmm: shut down through the API\n"), "{last}");
}

#[test]
fn a_vm_says_what_it_is_and_counts_its_exits() {
    if !has_kvm("a_vm_says_what_it_is_and_counts_its_exits") {
        return;
    }
    let served = Served::start(&[]);
    let (status, ping) = served.get("vmm.ping");
    assert_eq!((status, ping["pid"].as_u64()), (200, Some(u64::from(served.vmm.0.id()))));
    let (status, info) = served.get("vm.info");
    assert_eq!(status, 200);
    assert_eq!(info["memory_actual_size"], 64 << 20);
    assert_eq!(info["config"]["serial"]["file"], served.output.to_str().unwrap());
    // Each byte the guest says is an exit.
    let exits = || served.get("vm.counters").1["vcpu0"]["exits"].as_u64().unwrap();
    let (before, said) = (exits(), served.said());
    wait_until("the guest says more", || served.said() >= said + 50);
    assert!(exits() >= before + 50);
}

#[test]
fn a_request_that_is_none_or_never_ends_harms_nobody() {
    if !has_kvm("a_request_that_is_none_or_never_ends_harms_nobody") {
        return;
    }
    let served = Served::start(&[]);
    let silent = UnixStream::connect(&served.socket).unwrap();
    let mut flood = UnixStream::connect(&served.socket).unwrap();
    // It is cut off somewhere in the middle.
    let _ = flood.write_all(&[b'x'; 1 << 20]);
    assert_eq!(served.get("vmm.ping").0, 200);
    assert_eq!(served.get("vm.nothing").0, 404);
    assert_eq!(served.put("vm.info").0, 405);
    drop(silent);
    let before = served.said();
    wait_until("the guest goes on", || served.said() > before);
}

#[test]
fn the_socket_is_private_and_never_taken_from_another_vm() {
    if !has_kvm("the_socket_is_private_and_never_taken_from_another_vm") {
        return;
    }
    let served = Served::start(&[]);
    let mode = std::fs::metadata(&served.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let kernel = image(&CHATTER);
    let mut second = Vmm::start(kernel.path(), &["--api-socket", served.socket.to_str().unwrap()]);
    assert_eq!(second.status(), Some(1));
    let mut why = String::new();
    second.0.stderr.take().unwrap().read_to_string(&mut why).unwrap();
    assert!(why.contains("somebody serves the API socket") && why.lines().count() == 1, "{why}");
    assert_eq!(served.get("vmm.ping").0, 200);
}

#[test]
fn a_socket_that_a_killed_vm_left_is_used_again() {
    if !has_kvm("a_socket_that_a_killed_vm_left_is_used_again") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api");
    drop(UnixListener::bind(&socket).unwrap());
    let kernel = image(&CHATTER);
    let words = ["--serial", "null", "--api-socket", socket.to_str().unwrap()];
    let _vmm = Vmm::start(kernel.path(), &words);
    wait_until("the socket is served", || UnixStream::connect(&socket).is_ok());
    assert_eq!(request(&socket, "GET", "vmm.ping").0, 200);
}
