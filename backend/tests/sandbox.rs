//! What the running program can still do, and what happens when it tries more.

mod guest;

use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Command, Output, Stdio};

use guest::*;
use ivcpu_backend::sandbox::violation::EXIT_STATUS;
use ivcpu_backend::sandbox::{Files, Role, Sandbox, Seccomp, Wanted};

const MODERN: u64 = VERSION_1 | MRG_RXBUF | EVENT_IDX;

/// A line of `/proc/PID/task/*/status`, for each thread with its name.
fn status(backend: &Backend, line: &str) -> Vec<(String, String)> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", backend.child.id())).unwrap();
    let of = |text: &str, line: &str| {
        text.lines().find_map(|words| words.strip_prefix(line)).unwrap().trim().to_owned()
    };
    tasks
        .map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap())
        .map(|text| (of(&text, "Name:"), of(&text, line)))
        .collect()
}

#[test]
fn no_thread_has_a_capability_and_each_has_a_filter() {
    let backend = Backend::start(&["--uplink", "loop", "--queue-pairs", "2", "--affinity", "[0-1]"]);
    let mut guest = Guest::new(2, MODERN);
    guest.connect(&backend.socket());
    guest.fill(0);
    loop_once(&mut guest, 0, &frame(64));
    let names: Vec<_> = status(&backend, "Name:").into_iter().map(|(name, _)| name).collect();
    for expected in ["signals", "stats", "port0", "door", "vhost-user", "poll0", "poll1"] {
        assert!(names.iter().any(|name| name == expected), "{expected} is not among {names:?}");
    }
    for (line, expected) in [
        ("CapEff:", "0000000000000000"),
        ("CapPrm:", "0000000000000000"),
        ("CapInh:", "0000000000000000"),
        ("CapAmb:", "0000000000000000"),
        ("NoNewPrivs:", "1"),
        ("Seccomp:", "2"),
    ] {
        for (thread, value) in status(&backend, line) {
            assert_eq!(value, expected, "{thread}: {line}");
        }
    }
    // Those of a session have their port's and one of their own.
    let filters = status(&backend, "Seccomp_filters:");
    for (thread, count) in filters {
        let own = ["door", "vhost-user", "poll0", "poll1", "vring_worker"].contains(&thread.as_str());
        assert_eq!(count, if own { "2" } else { "1" }, "{thread}");
    }
}

/// glibc opens a file when it shrinks a thread's own arena, and no filter allows that.
#[test]
fn no_thread_has_an_arena_of_its_own() {
    // With pinning, which is tried out by a thread before the filters.
    let backend = Backend::start(&["--uplink", "loop", "--affinity", "[0]"]);
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", backend.child.id())).unwrap();
    // What an arena has not used yet ends where its 64 MiB do.
    let arenas = maps.lines().filter(|line| line.contains(" ---p ")).filter(|line| {
        let (_, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        u64::from_str_radix(end, 16).unwrap() % (64 << 20) == 0
    });
    assert_eq!(arenas.count(), 0, "{maps}");
}

#[test]
fn without_filters_there_are_none_and_a_mode_that_does_not_exist_is_refused() {
    let backend = Backend::start(&["--uplink", "loop", "--seccomp", "false", "--landlock", "false"]);
    assert!(status(&backend, "Seccomp:").iter().all(|(_, mode)| mode == "0"));
    assert!(status(&backend, "CapEff:").iter().all(|(_, held)| held == "0000000000000000"));
    let refused = |words: &[&str], with: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ivcpu-backend"));
        let output = command.args(["--fd", "9", "--uplink", "null"]).args(words).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(with) && said.lines().count() == 1, "{said}");
    };
    refused(&["--seccomp", "maybe"], "expected true, false or log");
    refused(&["--landlock", "perhaps"], "--landlock");
}

#[test]
fn it_becomes_the_user_it_is_told_and_serves_on() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("SKIPPED: only root can become another user");
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let words = [
        "--socket-path",
        &path("vu"),
        "--uplink",
        "loop",
        "--user",
        "nobody",
        "--fifo",
        &format!("path={}", path("fifo")),
    ];
    let backend = Backend::start_in(tempfile::tempdir().unwrap(), &words);
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    for (line, id) in [("Uid:", nobody.uid.as_raw()), ("Gid:", nobody.gid.as_raw())] {
        let id = id.to_string();
        for (thread, ids) in status(&backend, line) {
            assert!(ids.split_whitespace().all(|one| one == id), "{thread}: {ids}");
        }
    }
    assert!(
        status(&backend, "Groups:").iter().all(|(_, groups)| !groups.split(' ').any(|group| group == "0"))
    );
    for _ in 0..3 {
        let mut guest = Guest::new(1, MODERN);
        guest.connect(&dir.path().join("vu"));
        guest.fill(0);
        loop_once(&mut guest, 0, &frame(64));
    }
    assert!(backend.said().contains("cannot open FIFO region"), "{}", backend.said());
    assert_eq!(std::fs::metadata(path("vu")).unwrap().uid(), 0, "opened before");
    let output = Command::new(env!("CARGO_BIN_EXE_ivcpu-backend"))
        .args(["--socket-path", &path("other"), "--uplink", "null", "--user", "no-such-user"])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("there is no such user"), "{said}");
    assert!(!dir.path().join("other").exists());
}

/// Runs [`child`] of this test executable in a process of its own.
fn run_child(what: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env("IVCPU_SANDBOX_CHILD", what)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Not a test of its own: what others run in a process that ends by it.
#[test]
fn child() {
    let Ok(what) = std::env::var("IVCPU_SANDBOX_CHILD") else { return };
    let seccomp = if what == "log" { Seccomp::Log } else { Seccomp::True };
    // The test harness has threads already; the one that is confined is started by the one that confines.
    let here = std::env::temp_dir();
    let (open, hidden) = (here.join("ivcpu-sandbox-open"), "/etc/passwd");
    let mut files = Files::default();
    if what == "files" {
        std::fs::write(&open, "x").unwrap();
        files.share(&open);
    }
    let seccomp = if what == "files" { Seccomp::False } else { seccomp };
    let sandbox = Sandbox::enter(&Wanted { user: None, seccomp, files: Some(files) }).unwrap();
    std::thread::Builder::new()
        .name("victim".into())
        .spawn(move || {
            if what == "files" {
                let denied = |path: &str| std::fs::File::open(path).map(drop).map_err(|error| error.kind());
                println!("{:?} {:?}", denied(hidden), denied(open.to_str().unwrap()));
                std::fs::remove_file(&open).unwrap_err();
                return;
            }
            sandbox.confine(Role::Poll).unwrap();
            match what.as_str() {
                // SAFETY: it takes no pointers.
                "enforce" | "log" => drop(unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) }),
                _ => {
                    let page = std::ptr::null_mut();
                    let (access, flags) = (libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                    // SAFETY: an anonymous mapping at an address of the kernel's choice.
                    unsafe { libc::mmap(page, 4096, access, flags, -1, 0) };
                }
            }
            let line = b"went on\n";
            // SAFETY: the line outlives the call.
            unsafe { libc::write(std::io::stderr().as_raw_fd(), line.as_ptr().cast(), line.len()) };
            // SAFETY: it takes no pointers.
            unsafe { libc::_exit(0) };
        })
        .unwrap()
        .join()
        .unwrap();
}

#[test]
fn a_forbidden_system_call_is_named_and_ends_the_program_with_a_status_of_its_own() {
    for (what, name) in [("enforce", "socket (41)"), ("executable", "mmap (9)")] {
        let output = run_child(what);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(EXIT_STATUS.into()), "{said}");
        let expected = format!("ivcpu-backend: the poll thread made the forbidden system call {name};");
        assert!(said.contains(&expected) && !said.contains("went on"), "{said}");
    }
    assert_eq!(EXIT_STATUS, 159);
    let output = run_child("log");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains("went on"), "{said}");
    let expected =
        "ivcpu-backend: the poll thread made the system call socket (41), which --seccomp true forbids\n";
    assert!(said.contains(expected), "{said}");
}

#[test]
fn files_that_no_option_names_are_hidden() {
    let output = run_child("files");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let _ = std::fs::remove_file(std::env::temp_dir().join("ivcpu-sandbox-open"));
    if said.contains("Ok(()) Ok(())") {
        return eprintln!("SKIPPED: this kernel has no Landlock");
    }
    assert!(
        said.contains("Err(PermissionDenied) Ok(())"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
