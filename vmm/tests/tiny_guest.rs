//! The program, with guests of a few instructions: from the first instruction to the exit status.
//!
//! They need /dev/kvm and say so where there is none. A software KVM is enough.

#[path = "guest/kernel.rs"]
mod kernel;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use kernel::{has_kvm, image};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;

/// Instructions of the guests, for the 64-bit entry point.
mod code {
    /// Writes each byte to COM1.
    pub(super) fn print(text: &[u8]) -> Vec<u8> {
        let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8
        for byte in text {
            code.extend([0xb0, *byte, 0xee]); // mov al, byte; out dx, al
        }
        code
    }

    /// Writes one byte to a port, then halts for ever.
    pub(super) fn out(port: u16, value: u8) -> Vec<u8> {
        let [low, high] = port.to_le_bytes();
        vec![0x66, 0xba, low, high, 0xb0, value, 0xee, 0xf4, 0xeb, 0xfd]
    }

    /// Switches the machine off through the ACPI sleep control register.
    pub(super) fn power_off() -> Vec<u8> {
        out(0x600, 0x34)
    }

    /// Sends back what COM1 receives, until a `q`; then switches off.
    pub(super) fn echo() -> Vec<u8> {
        let mut code = vec![
            0x66, 0xba, 0xfd, 0x03, // again: mov dx, 0x3fd
            0xec, 0xa8, 0x01, // in al, dx; test al, 1
            0x74, 0xf7, // jz again
            0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
            0xec, 0x3c, b'q', // in al, dx; cmp al, 'q'
            0x74, 0x03, // je off
            0xee, 0xeb, 0xeb, // out dx, al; jmp again
        ];
        code.extend(power_off());
        code
    }

    /// Writes a register of the first function behind the host bridge.
    pub(super) fn configure(register: u8, value: u32) -> Vec<u8> {
        let mut code = Vec::new();
        for (port, value) in [(0xcf8u16, 0x8000_0800 | u32::from(register)), (0xcfc, value)] {
            code.extend([0x66, 0xba]); // mov dx, port
            code.extend(port.to_le_bytes());
            code.push(0xb8); // mov eax, value
            code.extend(value.to_le_bytes());
            code.push(0xef); // out dx, eax
        }
        code
    }

    /// Writes the byte at an address to COM1.
    pub(super) fn print_at(address: u32) -> Vec<u8> {
        let [a, b, c, d] = address.to_le_bytes();
        vec![0x66, 0xba, 0xf8, 0x03, 0x8a, 0x04, 0x25, a, b, c, d, 0xee] // mov dx, 0x3f8; mov al, [address]; out dx, al
    }

    /// Writes a byte to an address.
    pub(super) fn store(address: u32, byte: u8) -> Vec<u8> {
        let [a, b, c, d] = address.to_le_bytes();
        vec![0xc6, 0x04, 0x25, a, b, c, d, byte] // mov byte [address], byte
    }

    /// Writes the byte that ebx points at to COM1.
    pub(super) const PRINT_AT_EBX: [u8; 7] = [0x66, 0xba, 0xf8, 0x03, 0x8a, 0x03, 0xee]; // mov dx, 0x3f8; mov al, [ebx]; out dx, al
    /// There is no interrupt table: an invalid instruction is a triple fault.
    pub(super) const CRASH: [u8; 2] = [0x0f, 0x0b];
    /// Sleeps and is never woken.
    pub(super) const SLEEP: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];
}

/// An ELF kernel with a PVH entry point, whose segment at 16 MiB is `code`.
fn elf(code: &[u8]) -> tempfile::NamedTempFile {
    const ENTRY: u64 = 16 << 20;
    let note =
        [&[4u32, 4, 18].map(u32::to_le_bytes).concat()[..], b"Xen\0", &(ENTRY as u32).to_le_bytes()].concat();
    let header = |kind: u32, offset: u64, length: usize| {
        let words = [offset, 0, ENTRY, length as u64, length as u64, 0].map(u64::to_le_bytes).concat();
        [&kind.to_le_bytes()[..], &[0; 4], &words].concat()
    };
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    bytes.extend([ENTRY, 64, 0].map(u64::to_le_bytes).concat());
    bytes.extend([0u16, 0, 64, 56, 2, 0, 0, 0].map(u16::to_le_bytes).concat());
    bytes.extend(header(4, 64 + 2 * 56, note.len()));
    bytes.extend(header(1, 64 + 2 * 56 + note.len() as u64, code.len()));
    bytes.extend(note);
    bytes.extend(code);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    file
}

fn vmm() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ivcpu-vmm"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn boot(code: &[u8], more: &[&str]) -> Output {
    let kernel = image(code);
    let words = [&["--kernel", kernel.path().to_str().unwrap(), "--memory", "size=64M"], more].concat();
    vmm().args(words).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn wait_within(child: &mut Child, limit: Duration) -> i32 {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code().expect("killed by a signal: nothing was put back");
        }
        assert!(Instant::now() < deadline, "still running");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_guest_prints_and_switches_off() {
    if !has_kvm("a_guest_prints_and_switches_off") {
        return;
    }
    let output = boot(&[code::print(b"hello\nworld"), code::power_off()].concat(), &["--cpus", "boot=2"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "hello\nworld", "{}", stderr(&output));
    assert!(stderr(&output).ends_with("ivcpu-vmm: guest powered off\n"), "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn an_elf_kernel_is_entered_as_pvh_has_it() {
    if !has_kvm("an_elf_kernel_is_entered_as_pvh_has_it") {
        return;
    }
    let kernel = elf(&[code::print(b"pvh "), code::PRINT_AT_EBX.to_vec(), code::power_off()].concat());
    let words = ["--kernel", kernel.path().to_str().unwrap(), "--memory", "size=64M,prefault=on"];
    let output = vmm().args(words).output().unwrap();
    // The first byte of the start info's magic number, which ebx points at.
    assert_eq!(String::from_utf8_lossy(&output.stdout), "pvh x", "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_vm_with_every_device_several_times_has_their_threads() {
    if !has_kvm("a_vm_with_every_device_several_times_has_their_threads") {
        return;
    }
    let kernel = image(&[code::print(b"asleep\n"), code::SLEEP.to_vec()].concat());
    let folder = tempfile::tempdir().unwrap();
    let disks: Vec<_> = (0..4)
        .map(|number| {
            let path = folder.path().join(number.to_string());
            std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
            format!("--disk=path={}", path.display())
        })
        .collect();
    let console = format!("--console=file={}", folder.path().join("console").display());
    let mut child = vmm().arg("--kernel").arg(kernel.path()).args(&disks).arg(console).spawn().unwrap();
    let mut line = [0; 7];
    if child.stdout.as_mut().unwrap().read_exact(&mut line).is_err() {
        let output = child.wait_with_output().unwrap();
        assert!(stderr(&output).contains("io_uring"), "{}", stderr(&output));
        return eprintln!("SKIPPED: {}", stderr(&output));
    }
    let wanted = ["disk0", "disk1", "disk2", "disk3"];
    let names = names_with(child.id(), |names| wanted.iter().all(|name| names.iter().any(|n| n == name)));
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    assert_eq!(wait_within(&mut child, Duration::from_secs(5)), 130);
    for name in wanted {
        assert!(names.iter().any(|there| there == name), "{name} among {names:?}");
    }
}

#[test]
fn a_reset_ends_the_process_in_order() {
    if !has_kvm("a_reset_ends_the_process_in_order") {
        return;
    }
    for (port, value) in [(0xcf9, 6), (0x64, 0xfe)] {
        let output = boot(&code::out(port, value), &[]);
        assert!(stderr(&output).contains("ivcpu-vmm: guest rebooted"), "{}", stderr(&output));
        assert_eq!(output.status.code(), Some(0));
    }
}

#[test]
fn a_crash_is_not_a_success() {
    if !has_kvm("a_crash_is_not_a_success") {
        return;
    }
    let output = boot(&code::CRASH, &[]);
    assert!(stderr(&output).contains("vCPU 0"), "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn the_console_echoes_a_pipe_and_survives_its_end() {
    if !has_kvm("the_console_echoes_a_pipe_and_survives_its_end") {
        return;
    }
    let kernel = image(&code::echo());
    let mut child = vmm().arg("--kernel").arg(kernel.path()).stdin(Stdio::piped()).spawn().unwrap();
    let text = "a line longer than the 64 bytes that the receive buffer of the serial port holds at once\n";
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(text.as_bytes()).unwrap();
    stdin.write_all(b"q").unwrap();
    drop(stdin);
    assert_eq!(wait_within(&mut child, Duration::from_secs(20)), 0);
    let mut heard = String::new();
    child.stdout.take().unwrap().read_to_string(&mut heard).unwrap();
    assert_eq!(heard, text);
}

#[test]
fn a_stray_signal_does_not_keep_a_vcpu_out_of_the_guest() {
    if !has_kvm("a_stray_signal_does_not_keep_a_vcpu_out_of_the_guest") {
        return;
    }
    let kernel = image(&[code::print(b"up\n"), code::echo()].concat());
    let mut child = vmm().arg("--kernel").arg(kernel.path()).stdin(Stdio::piped()).spawn().unwrap();
    let mut line = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
    let vcpu = thread_ids(child.id()).into_iter().find(|(_, name)| name == "vcpu0").unwrap().0;
    // SAFETY: a system call without pointers; the process is our child and not waited for, so the ids are its own.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, child.id(), vcpu, libc::SIGRTMIN()) };
    assert_eq!(sent, 0);
    std::thread::sleep(Duration::from_millis(100));
    child.stdin.take().unwrap().write_all(b"still here\nq").unwrap();
    assert_eq!(wait_within(&mut child, Duration::from_secs(20)), 0);
    let mut heard = String::new();
    child.stdout.take().unwrap().read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "still here\n");
}

/// Reads what the VMM says until it has said `words`.
fn heard(child: &mut Child, words: &str) {
    let mut lines = BufReader::new(child.stderr.as_mut().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains(words)), "it never said: {words}");
}

#[test]
fn a_signal_wakes_a_sleeping_guest_and_ends_it() {
    if !has_kvm("a_signal_wakes_a_sleeping_guest_and_ends_it") {
        return;
    }
    // The first SIGTERM presses the power button, to which this guest is deaf.
    for (signals, status) in [(&[Signal::SIGTERM, Signal::SIGTERM][..], 143), (&[Signal::SIGINT], 130)] {
        let kernel = image(&[code::print(b"asleep\n"), code::SLEEP.to_vec()].concat());
        let mut child = vmm().arg("--kernel").arg(kernel.path()).args(["--cpus", "boot=3"]).spawn().unwrap();
        let mut line = [0; 7];
        child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
        for (index, &signal) in signals.iter().enumerate() {
            if index > 0 {
                heard(&mut child, "the guest's power button is pressed");
                assert_eq!(child.try_wait().unwrap(), None);
            }
            kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        }
        assert_eq!(wait_within(&mut child, Duration::from_secs(5)), status);
    }
}

#[test]
fn serial_output_goes_where_it_is_told() {
    if !has_kvm("serial_output_goes_where_it_is_told") {
        return;
    }
    let code = [code::print(b"noted"), code::power_off()].concat();
    let file = tempfile::NamedTempFile::new().unwrap();
    let mode = format!("file={}", file.path().display());
    assert!(boot(&code, &["--serial", &mode]).stdout.is_empty());
    assert_eq!(std::fs::read(file.path()).unwrap(), b"noted");
    for mode in ["null", "off"] {
        let output = boot(&code, &["--serial", mode]);
        assert!(output.stdout.is_empty() && output.status.success(), "{mode}");
    }
}

fn thread_ids(pid: u32) -> Vec<(i32, String)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks
        .filter_map(|task| {
            let task = task.unwrap();
            let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
            Some((task.file_name().to_str()?.parse().ok()?, name.trim().to_owned()))
        })
        .collect()
}

/// The names of its threads, once `complete` or after a while: the first vCPU may run before the last thread is there, or has
/// given itself its name.
fn names_with(pid: u32, complete: impl Fn(&[String]) -> bool) -> Vec<String> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let names: Vec<_> = thread_ids(pid).into_iter().map(|(_, name)| name).collect();
        if complete(&names) || Instant::now() >= deadline {
            return names;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn an_ivcpu_is_one_vcpu_more() {
    let online = ivcpu_vmm::pin::online().unwrap();
    if !has_kvm("an_ivcpu_is_one_vcpu_more") {
        return;
    }
    let pcpu = online.last().unwrap();
    let kernel = image(&[code::print(b"asleep\n"), code::SLEEP.to_vec()].concat());
    let affinity = format!("affinity=[{pcpu}]");
    let mut child = vmm().arg("--kernel").arg(kernel.path()).args(["--ivcpu", &affinity]).spawn().unwrap();
    let mut line = [0; 7];
    child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
    let names = names_with(child.id(), |names| names.iter().any(|name| name == "ivcpu"));
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    wait_within(&mut child, Duration::from_secs(5));
    for name in ["vcpu0", "ivcpu"] {
        assert!(names.iter().any(|there| there == name), "{name} among {names:?}");
    }
    assert!(!names.iter().any(|there| there == "vcpu1"), "{names:?}");
}

#[test]
fn a_guest_finds_the_fifo_region_where_it_puts_the_bar() {
    let online = ivcpu_vmm::pin::online().unwrap();
    if !has_kvm("a_guest_finds_the_fifo_region_where_it_puts_the_bar") {
        return;
    }
    const BAR_2: u8 = 0x18;
    const COMMAND: u8 = 0x04;
    // Not RAM, and within the first GiB, which a guest has mapped from the start.
    let (first, second, ram) = (0x2000_0000, 0x2020_0000, 0x0100_0000);
    let code = [
        code::configure(BAR_2, first),
        code::configure(BAR_2 + 4, 0),
        code::configure(COMMAND, 2),
        (first..first + 8).flat_map(code::print_at).collect(),
        code::store(first + 0x1f_ffff, b'A'),
        code::configure(BAR_2, second),
        code::print_at(first),
        code::print_at(second),
        code::store(second + 0x1f_fffe, b'B'),
        code::configure(COMMAND, 0),
        code::print_at(second),
        // Where RAM is: that stays RAM, and the BAR can go elsewhere again.
        code::configure(BAR_2, ram),
        code::configure(COMMAND, 2),
        code::store(ram, b'R'),
        code::configure(BAR_2, first),
        code::print_at(first),
        code::print_at(ram),
        code::power_off(),
    ]
    .concat();
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("fifo");
    let ivcpu = format!("affinity=[{}],fifo={}", online.last().unwrap(), path.display());
    let output = boot(&code, &["--ivcpu", &ivcpu]);
    assert_eq!(output.stdout, b"IVCPUFIF\xffI\xffIR", "{}", stderr(&output));
    assert!(output.status.success(), "{}", stderr(&output));
    let region = std::fs::read(&path).unwrap();
    assert_eq!(region[0x1f_fffe..], *b"BA");
}

#[test]
fn the_terminal_is_put_back() {
    if !has_kvm("the_terminal_is_put_back") {
        return;
    }
    let pty = nix::pty::openpty(None, None).unwrap();
    let cooked = tcgetattr(&pty.slave).unwrap();
    let kernel = image(&[code::print(b"asleep\n"), code::SLEEP.to_vec()].concat());
    let stdin = Stdio::from(pty.slave.try_clone().unwrap());
    let mut child = vmm().arg("--kernel").arg(kernel.path()).stdin(stdin).spawn().unwrap();
    let mut line = [0; 7];
    child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
    let raw = tcgetattr(&pty.slave).unwrap();
    assert!(!raw.local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG));
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    wait_within(&mut child, Duration::from_secs(5));
    assert_eq!(tcgetattr(&pty.slave).unwrap(), cooked);
}
