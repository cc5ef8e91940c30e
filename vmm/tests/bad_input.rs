//! Bad input: one clear line that says what to do, a status that is not success, and nothing left behind.

use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

/// Runs the program with these words; checks the shape of the answer and returns its one line.
fn refused(words: &[&str]) -> String {
    let output =
        Command::new(env!("CARGO_BIN_EXE_ivcpu-vmm")).args(words).stdin(Stdio::null()).output().unwrap();
    let line = String::from_utf8(output.stderr).unwrap();
    assert!(matches!(output.status.code(), Some(1 | 2)), "{words:?}: {:?} {line}", output.status);
    assert_eq!(line.lines().count(), 1, "{words:?}: {line}");
    assert!(line.starts_with("ivcpu-vmm: "), "{line}");
    assert!(output.stdout.is_empty());
    line
}

/// The same, for what is met only after KVM was opened.
fn refused_with_kvm(words: &[&str]) -> String {
    let line = refused(words);
    if line.contains("/dev/kvm") {
        eprintln!("SKIPPED {words:?}: no usable /dev/kvm");
        return String::new();
    }
    line
}

fn assert_says(line: &str, expected: &str) {
    assert!(line.is_empty() || line.contains(expected), "{line}");
}

#[test]
fn options_that_are_not_understood() {
    for (words, expected) in [
        (&[][..], "--kernel"),
        (&["--kernel"], "--kernel"),
        (&["--colonel", "x"], "--colonel"),
        (&["--kernel", "x", "--cpus", "boot=0"], "1 to 253"),
        (&["--kernel", "x", "--cpus", "boot=1,affinity=[0@[99999]]"], "99999"),
        (&["--kernel", "x", "--memory", "size=lots"], "such as 512M"),
        (&["--kernel", "x", "--net", "tap=tap0"], "unknown sub-option `tap`"),
        (&["--kernel", "x", "--ivcpu", "affinity=[0],fast=on"], "unknown sub-option `fast`"),
        (&["--kernel", "x", "stray"], "stray"),
    ] {
        assert_says(&refused(words), expected);
    }
}

#[test]
fn pcpus_that_are_not_there_or_shared() {
    assert_says(
        &refused(&["--kernel", "x", "--ivcpu", "affinity=[1000]"]),
        "pCPU 1000, wanted for the IVCPU",
    );
    assert_says(
        &refused(&["--kernel", "x", "--cpus", "boot=1,affinity=[0@[1000]]"]),
        "pCPU 1000, wanted for vCPU 0",
    );
    let words = ["--kernel", "x", "--cpus", "boot=1,affinity=[0@[0]]", "--ivcpu", "affinity=[0]"];
    assert_says(&refused(&words), "the IVCPU needs a pCPU of its own");
}

#[test]
fn kernels_that_are_none() {
    assert_says(&refused_with_kvm(&["--kernel", "/nonexistent"]), "cannot read the kernel /nonexistent");
    assert_says(&refused_with_kvm(&["--kernel", "/etc"]), "cannot read the kernel /etc");
    assert_says(&refused_with_kvm(&["--kernel", "/etc/passwd"]), "/etc/passwd is not a bzImage");
}

#[test]
fn backends_that_are_none() {
    let directory = tempfile::tempdir().unwrap();
    let absent = format!("vhost_user=true,socket={}/absent", directory.path().display());
    assert_says(&refused_with_kvm(&["--kernel", "x", "--net", &absent]), "start the backend first");

    let path = directory.path().join("hangs-up");
    let listener = UnixListener::bind(&path).unwrap();
    let peer = std::thread::spawn(move || drop(listener.accept()));
    let net = format!("vhost_user=true,socket={}", path.display());
    let line = refused_with_kvm(&["--kernel", "x", "--net", &net]);
    assert_says(&line, "no other VMM connected to it?");
    if !line.is_empty() {
        peer.join().unwrap();
    }

    let path = directory.path().join("silent");
    let _listener = UnixListener::bind(&path).unwrap();
    let net = format!("vhost_user=true,socket={}", path.display());
    let output = Command::new(env!("CARGO_BIN_EXE_ivcpu-vmm"))
        .args(["--kernel", "x", "--net", &net])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "a peer that never answers is given up");
}

#[test]
fn a_serial_file_that_cannot_be_made() {
    assert_says(
        &refused_with_kvm(&["--kernel", "x", "--serial", "file=/nonexistent/log"]),
        "cannot create the serial output file",
    );
}
