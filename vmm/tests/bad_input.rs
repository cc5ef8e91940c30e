//! Bad input: one clear line that says what to do, a status that is not success, and nothing left behind.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::stat::Mode;

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

/// A bzImage that is just enough to be loaded, and whose header promises `paragraphs` times 16 bytes after the setup.
fn kernel(paragraphs: u8) -> tempfile::NamedTempFile {
    let mut bytes = vec![0u8; 1024];
    bytes[0x1f1] = 1; // one setup sector
    bytes[0x1f4] = paragraphs;
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    bytes[0x211] = 1; // loaded high
    bytes[0x236] = 1; // 64-bit entry
    bytes[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes()); // longest command line
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    file
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
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
        (&["--kernel", "x", "--disk", "readonly=on"], "`path=` is missing"),
        (&["--kernel", "x", "--disk", "path=a,format=qcow2"], "unknown sub-option `format`"),
        (&["--kernel", "x", "--memory", "hugepages=on,hugepage_size=3M"], "expected 2M or 1G"),
        (&["--kernel", "x", "--console", "pty"], "expected off, tty or file=PATH"),
        (&["--kernel", "x", "--rng", "off=1"], "unknown sub-option `off`"),
        (&["--kernel", "x", "--console", "tty"], "both want the terminal"),
        (&["--kernel", "x", "--ivcpu", "affinity=[0],fast=on"], "unknown sub-option `fast`"),
        (&["--kernel", "x", "--device", "eth0"], "`eth0` is not the address of a PCI function"),
        (&["--kernel", "x", "--device", "path=01:10.0,iommu=on"], "unknown sub-option `iommu`"),
        (&["vfio", "bind", "01:10"], "`01:10` is not the address of a PCI function"),
        (&["vfio", "bind", "01:10.0", "--mac", "1"], "such as 52:54:00:12:34:56"),
        (&["doctor", "--fast"], "--fast"),
        (&["--kernel", "x", "--seccomp", "maybe"], "expected true, false or log"),
        (&["--kernel", "x", "--landlock", "log"], "'log' for '--landlock"),
        (&["--kernel", "x", "--api-socket", ""], "--api-socket"),
        (&["--kernel", "x", "stray"], "stray"),
    ] {
        assert_says(&refused(words), expected);
    }
}

#[test]
fn functions_that_are_not_there() {
    // The last function of the last bus.
    let nowhere = "0000:ff:1f.7";
    for words in [&["--kernel", "x", "--device", nowhere][..], &["vfio", "bind", nowhere]] {
        assert_says(&refused(words), "the host has no PCI function 0000:ff:1f.7");
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
    assert_says(&refused(&["--kernel", "/nonexistent"]), "cannot read the kernel /nonexistent");
    assert_says(&refused(&["--kernel", "/etc"]), "the kernel /etc is not a regular file");
    assert_says(&refused_with_kvm(&["--kernel", "/etc/passwd"]), "/etc/passwd is not a bzImage");
    let cut_off = kernel(1);
    assert_says(&refused_with_kvm(&["--kernel", path(cut_off.path())]), "is cut off");
}

#[test]
fn files_that_would_never_end() {
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
    let kernel = kernel(0);
    for endless in [path(&pipe), "/dev/zero"] {
        assert_says(&refused(&["--kernel", endless]), "is not a regular file");
        let words = ["--kernel", path(kernel.path()), "--initramfs", endless];
        assert_says(&refused(&words), "is not a regular file");
    }
    let serial = format!("file={}", pipe.display());
    assert_says(
        &refused_with_kvm(&["--kernel", path(kernel.path()), "--serial", &serial]),
        "neither a regular file nor a character device",
    );
}

#[test]
fn backends_that_are_none() {
    let kernel = kernel(0);
    let kernel = path(kernel.path());
    let directory = tempfile::tempdir().unwrap();
    let absent = format!("vhost_user=true,socket={}/absent", directory.path().display());
    assert_says(&refused_with_kvm(&["--kernel", kernel, "--net", &absent]), "start the backend first");

    let socket = directory.path().join("hangs-up");
    let listener = UnixListener::bind(&socket).unwrap();
    let peer = std::thread::spawn(move || drop(listener.accept()));
    let net = format!("vhost_user=true,socket={}", socket.display());
    let line = refused_with_kvm(&["--kernel", kernel, "--net", &net]);
    assert_says(&line, "no other VMM connected to it?");
    if !line.is_empty() {
        peer.join().unwrap();
    }

    let socket = directory.path().join("silent");
    let _listener = UnixListener::bind(&socket).unwrap();
    let net = format!("vhost_user=true,socket={}", socket.display());
    let line = refused_with_kvm(&["--kernel", kernel, "--net", &net]);
    assert_says(&line, "does not answer within 3 s; another VMM is probably connected to it");
}

#[test]
fn fifo_regions_that_are_none() {
    let kernel = kernel(0);
    let online = ivcpu_vmm::pin::online().unwrap();
    let refused = |fifo: &Path, more: &str| {
        let ivcpu = format!("affinity=[{}],fifo={}{more}", online.last().unwrap(), fifo.display());
        refused(&["--kernel", path(kernel.path()), "--ivcpu", &ivcpu])
    };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("fifo");
    assert_says(&refused(&folder.path().join("missing/fifo"), ""), "its folder must exist");
    assert_says(&refused(Path::new("/dev/zero"), ""), "is not a regular file");
    assert_says(&refused(&file, ",fifo_size=3M"), "expected a power of two from 2M to 1G");
    assert!(!file.exists());
    std::fs::write(&file, "short").unwrap();
    assert_says(&refused(&file, ""), "has 5 bytes and needs a power of two from 2M to 1G");
    std::fs::write(&file, vec![b'x'; 2 << 20]).unwrap();
    assert_says(&refused(&file, ",fifo_size=4M"), "fifo_size= says 4194304");
    assert_says(&refused(&file, ""), "no FIFO region: it starts with 0x7878787878787878");
}

#[test]
fn disks_that_are_none() {
    let kernel = kernel(0);
    let refused = |disk: &str| refused(&["--kernel", path(kernel.path()), "--disk", disk]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("disk");
    let file = path(&file);
    assert_says(&refused(&format!("path={file}")), "cannot open the disk image");
    assert_says(&refused("path=/etc"), "neither a regular file nor a block device");
    std::fs::write(file, [0; 1000]).unwrap();
    assert_says(&refused(&format!("path={file}")), "has 1000 bytes, which are no whole sectors");
    std::fs::write(file, [0; 1024]).unwrap();
    let words = [
        "--kernel",
        path(kernel.path()),
        "--disk",
        &format!("path={file}"),
        "--disk",
        &format!("path={file}"),
    ];
    assert_says(&self::refused(&words), "in use, by another VM or as another disk");
    let options = format!("path={file},readonly=on").parse().unwrap();
    let _reader = ivcpu_vmm::virtio::block::image::Image::open(&options).unwrap();
    assert_says(&refused(&format!("path={file}")), "only disks that are all readonly=on can share one");
}

#[test]
fn huge_pages_that_are_not_there() {
    let kernel = kernel(0);
    // More than there can be.
    let words = ["--kernel", path(kernel.path()), "--memory", "size=1T,hugepages=on"];
    assert_says(&refused_with_kvm(&words), "the VM needs 524288 huge pages of 2M");
}

#[test]
fn a_source_of_randomness_that_is_none() {
    let kernel = kernel(0);
    let words = ["--kernel", path(kernel.path()), "--rng", "src=/etc/passwd"];
    assert_says(&refused_with_kvm(&words), "is no character device");
}

#[test]
fn a_serial_file_that_cannot_be_made() {
    assert_says(
        &refused_with_kvm(&["--kernel", path(kernel(0).path()), "--serial", "file=/nonexistent/log"]),
        "cannot create the serial output file",
    );
}
