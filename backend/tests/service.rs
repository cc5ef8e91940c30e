//! What a service manager and management software see: socket activation, notifications, units, the description.

mod guest;

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use guest::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend};

const MODERN: u64 = VERSION_1 | MRG_RXBUF | EVENT_IDX;

fn share(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("share").join(name)
}

/// Starts the program as a service manager does: `sockets` from descriptor 3 on, and a socket for notifications.
fn activate(arguments: &[&str], sockets: Vec<OwnedFd>, notify: &Path) -> Child {
    let mut command = Command::new("/bin/sh");
    // The shell's own process id is what it says in LISTEN_PID, and the program takes its place.
    command
        .args(["-c", r#"export LISTEN_PID=$$; exec "$0" "$@""#, env!("CARGO_BIN_EXE_ivcpu-backend")])
        .args(arguments)
        .env("LISTEN_FDS", sockets.len().to_string())
        .env("NOTIFY_SOCKET", notify)
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    let numbers: Vec<_> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: between fork and exec only dup2 and fcntl are called, which are async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            // First out of the way, so that none is overwritten before it is moved.
            for (index, number) in numbers.iter().enumerate() {
                if libc::dup2(*number, 100 + index as i32) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            for index in 0..numbers.len() as i32 {
                libc::dup2(100 + index, 3 + index);
                libc::close(100 + index);
            }
            Ok(())
        });
    }
    command.spawn().unwrap()
}

/// The next notification.
fn told(notify: &UnixDatagram) -> String {
    let mut message = [0; 256];
    let length = notify.recv(&mut message).expect("a notification");
    String::from_utf8(message[..length].to_vec()).unwrap()
}

#[test]
fn sockets_of_a_service_manager_are_taken_by_their_paths_and_it_is_told_what_happens() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let notify = UnixDatagram::bind(path("notify")).unwrap();
    notify.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let sockets = ["b", "a", "metrics"].map(|name| UnixListener::bind(path(name)).unwrap().into());
    let words = [
        format!("--port=socket={},uplink=loop", path("a").display()),
        format!("--port=socket={},uplink=null", path("b").display()),
        format!("--metrics-socket={}", path("metrics").display()),
    ];
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let mut child = activate(&words, sockets.into(), &path("notify"));
    assert_eq!(told(&notify), "READY=1\nSTATUS=2 port(s), 0 with a frontend\n");
    let mut guest = Guest::new(1, MODERN);
    guest.connect(&path("a"));
    assert_eq!(told(&notify), "STATUS=2 port(s), 1 with a frontend\n");
    guest.fill(0);
    loop_once(&mut guest, 0, &frame(100));
    assert!(UnixStream::connect(path("metrics")).is_ok());
    guest.disconnect();
    assert_eq!(told(&notify), "STATUS=2 port(s), 0 with a frontend\n");
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(told(&notify), "STOPPING=1\n");
    assert!(child.wait().unwrap().success());
    // They are the service manager's, to be passed on again.
    assert!(["a", "b", "metrics"].iter().all(|name| path(name).exists()));
}

#[test]
fn a_socket_that_no_option_names_is_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let stray = UnixListener::bind(path("stray")).unwrap();
    let words = ["--socket-path", path("s").to_str().unwrap(), "--uplink", "null"].map(str::to_owned);
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let output = activate(&words, vec![stray.into()], Path::new("/nonexistent")).wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(said.contains("stray is none that an option names") && said.lines().count() == 1, "{said}");
    assert!(!path("s").exists());
}

#[test]
fn the_description_is_that_of_the_program() {
    let description: serde_json::Value =
        serde_json::from_slice(&std::fs::read(share("50-ivcpu-backend.json")).unwrap()).unwrap();
    let output =
        Command::new(env!("CARGO_BIN_EXE_ivcpu-backend")).arg("--print-capabilities").output().unwrap();
    let capabilities: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(description["type"], capabilities["type"]);
    let keys = ["description", "type", "binary", "tags"];
    assert!(description.as_object().unwrap().keys().all(|key| keys.contains(&key.as_str())));
    assert!(!description["description"].as_str().unwrap().is_empty());
    // The program that the unit starts, under the name it has.
    let binary = description["binary"].as_str().unwrap();
    let unit = std::fs::read_to_string(share("ivcpu-backend@.service")).unwrap();
    assert!(unit.contains(&format!("ExecStart={binary} ")));
    assert_eq!(Path::new(binary).file_name(), Path::new(env!("CARGO_BIN_EXE_ivcpu-backend")).file_name());
    assert_eq!(capabilities.as_object().unwrap().len(), 1, "network devices have nothing else");

    // What the tags say is what frontends are told; a TAP device's features need one.
    let tags = description["tags"].as_array().unwrap();
    let names = |kind: &str| -> Vec<&str> {
        let words = tags.iter().find_map(|tag| tag.as_str().unwrap().strip_prefix(kind)).unwrap();
        words.split(',').collect()
    };
    let words = ["--uplink", "null", "--queue-pairs", "2", "--mac", "52:54:00:12:34:56", "--mtu", "1500"];
    let backend = Backend::start(&words);
    let mut frontend = Frontend::connect(backend.socket(), 4).unwrap();
    frontend.set_owner().unwrap();
    let features = frontend.get_features().unwrap();
    for name in names("features=") {
        let bit = match name {
            "version-1" => 32,
            "in-order" => 35,
            "event-idx" => 29,
            "indirect-desc" => 28,
            "mrg-rxbuf" => 15,
            "status" => 16,
            "mq" => 22,
            "ctrl-vq" => 17,
            "mac" => 5,
            "mtu" => 3,
            _ => panic!("{name}"),
        };
        assert!(features & 1 << bit != 0, "{name}");
    }
    let protocol = names("protocol-features=").into_iter().map(|name| match name {
        "mq" => VhostUserProtocolFeatures::MQ,
        "reply-ack" => VhostUserProtocolFeatures::REPLY_ACK,
        "net-mtu" => VhostUserProtocolFeatures::MTU,
        "config" => VhostUserProtocolFeatures::CONFIG,
        "configure-mem-slots" => VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
        _ => panic!("{name}"),
    });
    assert_eq!(frontend.get_protocol_features().unwrap(), protocol.collect());
}

#[test]
fn the_units_are_sound_and_hardened() {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        return eprintln!("SKIPPED: there is no systemd-analyze");
    }
    // Checked as an instance, with the program of this build in place of the installed one.
    let dir = tempfile::tempdir().unwrap();
    let unit = std::fs::read_to_string(share("ivcpu-backend@.service")).unwrap();
    let here = unit.replace("/usr/bin/ivcpu-backend", env!("CARGO_BIN_EXE_ivcpu-backend"));
    let here = here.replace("Documentation=man:ivcpu-backend(1)\n", "");
    let service = dir.path().join("ivcpu-backend@web.service");
    std::fs::write(&service, here).unwrap();
    let socket = dir.path().join("ivcpu-backend@web.socket");
    std::fs::copy(share("ivcpu-backend@.socket"), &socket).unwrap();
    let analyze = |arguments: &[&str], units: &[&Path]| {
        let output = Command::new("systemd-analyze").args(arguments).args(units).output().unwrap();
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
        (output.status.success(), said)
    };
    let (sound, said) = analyze(&["verify"], &[&service, &socket]);
    let ours: Vec<_> = said.lines().filter(|line| line.contains("ivcpu-backend@web")).collect();
    assert!(sound && ours.is_empty(), "{said}");
    // In tenths; the most exposed service has 10.0, the least 0.0.
    let (low, said) = analyze(&["security", "--no-pager", "--offline=true", "--threshold=20"], &[&service]);
    assert!(low, "{said}");
}

/// The system calls of the words of a `SystemCallFilter=`, sets taken apart by the program that knows them.
fn system_calls(words: &str) -> BTreeSet<i64> {
    let mut calls = BTreeSet::new();
    for word in words.split_whitespace() {
        if word.starts_with('@') {
            let output = Command::new("systemd-analyze").args(["syscall-filter", word]).output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            let names = text.lines().skip(1).map(str::trim).filter(|name| !name.starts_with('#'));
            calls.extend(system_calls(&names.collect::<Vec<_>>().join(" ")));
        } else if let Ok(call) = word.parse::<syscalls::Sysno>() {
            calls.insert(call.id().into());
        }
    }
    calls
}

#[test]
fn the_program_needs_no_system_call_that_its_unit_forbids() {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        return eprintln!("SKIPPED: there is no systemd-analyze");
    }
    // Lists add to what was said before; one with a tilde takes away. The rest is always allowed.
    let mut allowed = system_calls("@default");
    let unit = std::fs::read_to_string(share("ivcpu-backend@.service")).unwrap();
    for words in unit.lines().filter_map(|line| line.strip_prefix("SystemCallFilter=")) {
        match words.strip_prefix('~') {
            Some(words) => allowed = &allowed - &system_calls(words),
            None => allowed.extend(system_calls(words)),
        }
    }
    assert!(allowed.len() > 200 && !allowed.contains(&libc::SYS_mount));
    let filter = SeccompFilter::new(
        allowed.into_iter().map(|call| (call, Vec::new())).collect(),
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    // What RestrictNamespaces= does: it cannot look into clone3's arguments, so glibc has to do without.
    assert!(unit.contains("RestrictNamespaces=yes"));
    let filter = SeccompFilter::new(
        [(libc::SYS_clone3, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let without_clone3: BpfProgram = filter.unwrap().try_into().unwrap();

    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ivcpu-backend"));
    command.args(["--socket-path", &path("vu"), "--stats-socket", &path("stats"), "--uplink", "loop"]);
    command.args(["--metrics-socket", &path("metrics"), "--fifo", &format!("path={}", path("none"))]);
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    // SAFETY: between fork and exec there are four system calls and no allocation.
    unsafe {
        command.pre_exec(move || {
            seccompiler::apply_filter(&without_clone3).map_err(std::io::Error::other)?;
            seccompiler::apply_filter(&program).map_err(std::io::Error::other)
        });
    }
    let mut child = command.spawn().unwrap();
    until("it listens", || Path::new(&path("stats")).exists());
    let mut guest = Guest::new(1, MODERN);
    guest.connect(Path::new(&path("vu")));
    guest.fill(0);
    (0..20).for_each(|index| loop_once(&mut guest, index, &frame(100)));
    let shown = std::io::read_to_string(UnixStream::connect(path("stats")).unwrap()).unwrap();
    assert!(shown.contains(r#""sessions":1"#), "{shown}");
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    let status = child.wait().unwrap();
    let said = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
    assert!(status.success(), "{said}");
    // That there is no region is all there is to say.
    assert!(said.lines().count() == 1 && said.contains("cannot open FIFO region"), "{said}");
    assert!(!Path::new(&path("vu")).exists());
}
