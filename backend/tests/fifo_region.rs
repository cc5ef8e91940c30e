//! Regions that cannot be used, regions that several want, and the command that makes them.

mod guest;
#[allow(dead_code, reason = "shared with the tests of the data path, which use more of it")]
mod region;

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use guest::*;
use ivcpu_abi::layout;
use region::*;

const MODERN: u64 = VERSION_1 | MRG_RXBUF | EVENT_IDX;

fn fifo(path: &Path) -> String {
    format!("path={},bound_us=1000000", path.display())
}

/// Moves frames through the backend, told by calls and by the FIFO if there is a consumer.
fn traffic(ivcpu: &mut Ivcpu, backend: &Backend) {
    ivcpu.connect(&backend.socket());
    if ivcpu.guest.queues[0].available.0 == 0 {
        ivcpu.guest.fill(0);
    }
    for index in 0..50 {
        ivcpu.loop_once(index, true);
    }
}

#[test]
fn a_region_of_no_use_is_one_warning_and_the_session_calls() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    let damaged = |name: &str, offset: usize, byte: u8| {
        let path = dir.path().join(name);
        assert!(create(&path, &[]).status.success());
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[byte], offset as u64).unwrap();
        path
    };
    let cut = dir.path().join("short");
    assert!(create(&cut, &[]).status.success());
    let short = std::fs::File::options().write(true).open(&cut).unwrap();
    short.set_len(layout::HEADER_SIZE as u64).unwrap();
    let empty = dir.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    for (path, with) in [
        (missing, "No such file"),
        (damaged("magic", layout::MAGIC_AT, b'X'), "no FIFO region"),
        (damaged("version", layout::VERSION_AT, 9), "has version 9, this program speaks 1"),
        (damaged("features", layout::FEATURES_AT, 1), "unknown features"),
        (damaged("rings", layout::RINGS_AT, 200), "makes no sense"),
        (cut, "has 4096 bytes and needs"),
        (empty, "has 0 bytes and needs"),
        (dir.path().to_owned(), "Is a directory"),
        ("/dev/null".into(), "not a regular file"),
    ] {
        let backend = Backend::start(&["--uplink", "loop", "--fifo", &fifo(&path)]);
        let mut ivcpu = Ivcpu::new(Guest::new(1, MODERN), None);
        traffic(&mut ivcpu, &backend);
        let said = backend.said();
        assert!(said.contains(with) && said.contains(path.to_str().unwrap()), "{said}");
        assert!(said.lines().count() == 1 && said.contains("WARN"), "{said}");
        assert_eq!(backend.stats()["fifo"], serde_json::Value::Null);
        let sum = |counter: &str| backend.count(0, counter) + backend.count(1, counter);
        assert_eq!((sum("calls"), sum("wakeups")), (sum("completions"), 0));
    }
}

#[test]
fn a_region_is_opened_anew_for_each_session() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    let backend = Backend::start(&["--uplink", "loop", "--fifo", &fifo(&path)]);
    let mut ivcpu = Ivcpu::new(Guest::new(1, MODERN), None);
    traffic(&mut ivcpu, &backend);
    for _ in 0..2 {
        ivcpu.guest.disconnect();
        until("the session is over", || backend.stats()["fifo"].is_null());
        let _ = std::fs::remove_file(&path);
        let (_, shared) = Shared::create(dir.path(), 1);
        ivcpu.consumer = Some(shared.consumer());
        traffic(&mut ivcpu, &backend);
        assert_eq!(backend.stats()["fifo"]["rings"], 1);
    }
    assert_eq!(backend.said().lines().count(), 1);
}

#[test]
fn a_ring_has_one_owner_until_it_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, shared) = Shared::create(dir.path(), 2);
    let start = || Backend::start(&["--uplink", "loop", "--fifo", &fifo(&path)]);
    let rings = |backend: &Backend| backend.stats()["fifo"]["rings"].as_u64();
    let (first, second, third) = (start(), start(), start());
    let mut guests = [(); 3].map(|()| Ivcpu::new(Guest::new(1, MODERN), None));
    let [one, two, three] = &mut guests;
    let idle = third.entries("task");
    traffic(one, &first);
    traffic(two, &second);
    traffic(three, &third);
    assert_eq!([&first, &second, &third].map(rings), [Some(1), Some(1), None]);
    let said = third.said();
    assert!(said.lines().count() == 1 && said.contains("0 free rings for 1 poll threads"), "{said}");
    assert_eq!((first.said(), second.said()), (String::new(), String::new()));

    refused(&create(&path, &["--rings", "2"]), "is in use by a VMM or a backend");

    // Dropped is killed with SIGKILL, in the middle of its session.
    drop(second);
    three.guest.disconnect();
    until("the session is over", || third.entries("task") == idle);
    three.consumer = Some(shared.consumer());
    traffic(three, &third);
    assert_eq!(rings(&third), Some(1));
    assert!(three.delivered.iter().all(|count| *count > 1));
}

#[test]
fn frames_flow_again_through_the_fifo_after_the_backend_was_killed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, shared) = Shared::create(dir.path(), 1);
    let mut backend = Backend::start(&["--uplink", "loop", "--fifo", &fifo(&path)]);
    let mut ivcpu = Ivcpu::new(Guest::new(1, MODERN), Some(shared.consumer()));
    traffic(&mut ivcpu, &backend);
    for round in 0..5u16 {
        // Killed with a completion under way.
        ivcpu.guest.send(1, 50 + round, &[50; 100]);
        backend.kill_and_restart();
        ivcpu.guest.disconnect();
        ivcpu.connect(&backend.socket());
        // What was in flight may have come back or be lost, as on a wire; its transmission must have been completed.
        until("the frame is out", || {
            ivcpu.poll();
            ivcpu.take_calls();
            !ivcpu.used[1].is_empty()
        });
        std::thread::sleep(std::time::Duration::from_millis(20));
        ivcpu.poll();
        for (head, _) in std::mem::take(&mut ivcpu.used[0]) {
            ivcpu.guest.offer(0, head as u16);
        }
        ivcpu.used[1].clear();
        ivcpu.forget_calls();
        for index in 0..50 {
            ivcpu.loop_once(index, false);
        }
        assert_eq!(backend.stats()["fifo"]["rings"], 1);
    }
    assert_eq!(backend.said(), "");
}

#[test]
fn an_inherited_descriptor_is_opened_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (path, shared) = Shared::create(dir.path(), 1);
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let number = file.as_raw_fd();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let socket = theirs.as_raw_fd();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ivcpu-backend"));
    let stats = dir.path().join("stats");
    command.args(["--fd", "98", "--uplink", "null", "--fifo", "fd=99", "--stats-socket"]).arg(&stats);
    command.stdin(Stdio::null());
    // SAFETY: between fork and exec only dup2 is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            let copies = [(socket, 98), (number, 99)].map(|(from, to)| libc::dup2(from, to));
            if copies.contains(&-1) { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    let mut child = command.spawn().unwrap();
    drop(theirs);
    let frontend = vhost::vhost_user::Frontend::from_stream(ours, 2);
    use vhost::VhostBackend;
    frontend.set_owner().unwrap();
    // Its ring is locked although this process has the very same opening of the file.
    until("the ring is claimed", || {
        // It may not listen yet.
        std::os::unix::net::UnixStream::connect(&stats).is_ok_and(|stats| {
            let stats: serde_json::Value = serde_json::from_reader(stats).unwrap();
            stats["fifo"]["rings"] == 1
        })
    });
    refused(&create(&path, &["--rings", "1"]), "is in use by a VMM or a backend");
    drop((frontend, file));
    assert!(child.wait().unwrap().success());
    assert!(shared.bindings().is_empty());
    assert!(create(&path, &["--rings", "1"]).status.success());
}

#[track_caller]
fn refused(output: &Output, with: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && output.stdout.is_empty());
    assert!(said.contains(with) && said.starts_with("ivcpu-backend: "), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn what_is_there_is_laid_out_anew_only_when_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    let blank = dir.path().join("blank");
    std::fs::write(&blank, vec![0; 2 << 20]).unwrap();
    let state = |path: &Path| std::fs::read(path).unwrap()[layout::STATE_AT];
    let write = |path: &Path, offset: usize, byte: u8| {
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.write_all_at(&[byte], offset as u64).unwrap();
    };
    for path in [&path, &blank] {
        let make = |more: &[&str]| {
            let output = create(path, &[&["--size", "2M", "--rings", "5"], more].concat());
            assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        };
        make(&[]);
        let bytes = std::fs::read(path).unwrap();
        assert_eq!((bytes.len(), bytes[layout::RINGS_AT]), (2 << 20, 5));
        assert!(bytes.starts_with(b"IVCPUFIF"));
        // A consumer said "awake": its VM may be running, so nothing is touched unless that is asked for.
        write(path, layout::STATE_AT, 1);
        make(&[]);
        assert_eq!(state(path), 1);
        make(&["--anew"]);
        assert_eq!(state(path), 0);
        // Damaged beyond use.
        write(path, layout::STATE_AT, 1);
        write(path, layout::RINGS_AT, 0);
        make(&[]);
        assert_eq!(state(path), 0);
    }
    let precious = dir.path().join("precious");
    std::fs::write(&precious, "precious").unwrap();
    let full = dir.path().join("no/fifo");
    for (path, arguments, with) in [
        (&path, &["--size", "4M"][..], "has 2097152 bytes instead of 4194304"),
        (&precious, &[], "is not a FIFO region; it is left alone"),
        (&full, &[], "cannot open FIFO region"),
        (&dir.path().to_owned(), &[], "Is a directory"),
        (&"/dev/null".into(), &[], "not a regular file"),
        (&path, &["--size", "3M"], "a power of two"),
        (&path, &["--rings", "0"], "--rings"),
        (&path, &["--rings", "65"], "--rings"),
        (&path, &["--size", "0M"], "--size"),
    ] {
        refused(&create(path, arguments), with);
    }
    assert_eq!(std::fs::read(&precious).unwrap(), b"precious");
}

#[test]
fn words_that_are_not_understood_are_one_line() {
    let run = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_ivcpu-backend")).args(arguments).output().unwrap()
    };
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let serve = ["--socket-path", socket.to_str().unwrap(), "--uplink", "null", "--fifo"];
    for (fifo, with) in [
        ("/dev/shm/f", "none of path="),
        ("path=", "none of path="),
        ("fd=0", "a number from 3 on"),
        ("fd=77", "cannot open FIFO region /proc/self/fd/77"),
        ("bound_us=5", "path=PATH or fd=N"),
        ("path=a,bound_us=0", "1 to 1000000"),
    ] {
        refused(&run(&[&serve[..], &[fifo]].concat()), with);
    }
    refused(&run(&["fifo"]), "create");
    refused(&run(&["fifo", "create"]), "<PATH>");
    refused(&run(&["fifo", "destroy", "x"]), "'destroy'");
    assert!(!socket.exists());
}
