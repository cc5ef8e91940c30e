//! Bad input: one clear line on stderr, a failure as exit status, nothing left behind.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

fn backend(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ivcpu-backend"));
    command.args(arguments).stdin(Stdio::null());
    command
}

#[track_caller]
fn refused(output: &Output, with: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains(with), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with("ivcpu-backend: "), "{said}");
    // The kernel's name for an error says nothing that a plain word would not.
    assert!(!said.contains("EINVAL"), "{said}");
}

#[test]
fn a_command_line_that_is_not_understood_is_one_line_and_status_2() {
    for (arguments, with) in [
        (&[][..], "--uplink"),
        (&["--bogus"], "'--bogus'"),
        (&["--fd", "9", "--uplink", "bridge:b"], "unknown uplink"),
        (&["--fd", "9", "--uplink"], "--uplink"),
        (&["--fd", "9", "--uplink", "null", "--poll-us", "-1"], "--poll-us"),
        (&["--fd", "9", "--uplink", "null", "--queue-pairs", "-1"], "--queue-pairs"),
        (&["--fd", "-1", "--uplink", "null"], "--fd"),
        (&["--fd", "9", "--uplink", "null", "--mac", "01:00:00:00:00:00"], "multicast"),
        (&["--fd", "9", "--uplink", "null", "--socket-path", "s"], "cannot be used with"),
        (&["--fd", "9", "--uplink", "null", "stray"], "'stray'"),
        (&["--fd", "9", "--uplink", "null", "--mtu", "67"], "--mtu"),
        (&["--fd", "9", "--uplink", "null", "--client"], "cannot be used with"),
        (&["--port", "socket=s"], "uplink is missing"),
        (&["--port", "socket=s,uplink=null,color=red"], "'color' is none of"),
        (&["--port", "socket=s,uplink=null", "--uplink", "null"], "cannot be used with"),
        (&["--port", "socket=s,uplink=null", "--queue-pairs", "2"], "cannot be used with"),
        (&["--port", "socket=s,uplink=null", "--socket-path", "t"], "cannot be used with"),
    ] {
        let output = backend(arguments).output().unwrap();
        refused(&output, with);
        assert_eq!(output.status.code(), Some(2));
    }
}

#[test]
fn help_and_version_are_answers() {
    for (argument, with) in [("--help", "--poll-us"), ("--version", env!("CARGO_PKG_VERSION"))] {
        let output = backend(&[argument]).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty());
        assert!(String::from_utf8(output.stdout).unwrap().contains(with));
    }
}

#[test]
fn each_is_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let socket = socket.to_str().unwrap();
    let taken = dir.path().join("taken");
    let _listener = UnixListener::bind(&taken).unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let no_dir = dir.path().join("no/s");
    let path = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let port = |socket: &str| format!("socket={socket},uplink=null");
    for (arguments, with) in [
        (vec!["--socket-path", socket, "--uplink", "bridge:b"], "unknown uplink"),
        (vec!["--socket-path", socket, "--uplink", "null", "--poll-us", "soon"], "--poll-us"),
        (vec!["--socket-path", socket, "--uplink", "null", "--queue-pairs", "0"], "--queue-pairs"),
        (vec!["--socket-path", socket, "--uplink", "null", "--frobnicate"], "--frobnicate"),
        (
            vec!["--socket-path", socket, "--uplink", "null", "--affinity", "[999]"],
            "pCPU 999: it does not exist",
        ),
        (vec!["--socket-path", socket, "--uplink", "tap:a/b"], "a TAP name has"),
        (vec!["--socket-path", socket, "--uplink", "tap:sixteen-letters!"], "a TAP name has"),
        (vec!["--socket-path", socket], "--uplink"),
        (vec!["--uplink", "null"], "--socket-path"),
        (vec!["--socket-path", &path(&taken), "--uplink", "null"], "is in use"),
        (vec!["--socket-path", &path(&file), "--uplink", "null"], "is not a socket"),
        (vec!["--socket-path", &path(&no_dir), "--uplink", "null"], "cannot listen"),
        (vec!["--fd", "77", "--uplink", "null"], "file descriptor 77"),
        (vec!["--socket-path", socket, "--uplink", "null", "--stats-socket", &path(&taken)], "is in use"),
        (vec!["--socket-path", socket, "--uplink", "null", "--metrics-socket", &path(&taken)], "is in use"),
        (vec!["--port", &port(socket), "--port", &port(socket)], "is in use"),
        (vec!["--port", &port(socket), "--port", &port(&path(&taken))], "is in use"),
        (
            vec!["--port", &(port(socket) + ",name=a"), "--port", &(port(&path(&no_dir)) + ",name=a")],
            "two ports have the name \"a\"",
        ),
    ] {
        refused(&backend(&arguments).output().unwrap(), with);
    }
    assert!(!std::path::Path::new(socket).exists());
    assert!(file.exists() && taken.exists());
}

#[test]
fn a_tap_without_rights_names_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let mut command = backend(&["--socket-path", socket.to_str().unwrap(), "--uplink", "tap:ivtnone"]);
    if nix::unistd::geteuid().is_root() {
        command.uid(65534).gid(65534);
    }
    let output = match command.output() {
        Ok(output) => output,
        // The program lies where nobody may look.
        Err(error) => return eprintln!("SKIPPED: cannot run it as another user: {error}"),
    };
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("no rights to TAP") || said.contains("cannot open /dev/net/tun"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn capabilities_are_those_of_a_network_device() {
    let output = backend(&["--print-capabilities"]).output().unwrap();
    let capabilities: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(output.status.success());
    assert_eq!(capabilities["type"], "net");
}

/// Starts a backend with `socket` as its descriptor 99: higher than any the test has itself, which `dup2` would
/// replace.
fn with_descriptor(socket: OwnedFd) -> std::process::Child {
    let mut command = backend(&["--fd", "99", "--uplink", "null"]);
    let number = socket.as_raw_fd();
    // SAFETY: between fork and exec only dup2 is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            if libc::dup2(number, 99) < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    command.spawn().unwrap()
}

#[test]
fn an_inherited_socket_may_be_connected_or_listening() {
    use vhost::VhostBackend;
    use vhost::vhost_user::Frontend;
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut child = with_descriptor(theirs.into());
    let frontend = Frontend::from_stream(ours, 2);
    frontend.set_owner().unwrap();
    assert!(frontend.get_features().unwrap() & (1 << 32) != 0);
    drop(frontend);
    // One connection, one session.
    assert!(child.wait().unwrap().success());

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut child = with_descriptor(UnixListener::bind(&path).unwrap().into());
    for _ in 0..2 {
        let frontend = Frontend::connect(&path, 2).unwrap();
        frontend.set_owner().unwrap();
        assert!(frontend.get_features().unwrap() & (1 << 32) != 0);
    }
    child.kill().unwrap();
    child.wait().unwrap();
}
