//! The emulated host's console: watched for signs of a stall, kept and quoted when something went wrong.

use std::fs;
use std::io::{self, BufRead, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;

use super::Event;

/// Copies the console into `log` and reports stalls, and its end.
pub(super) fn watch_console(mut output: impl BufRead, log: &mut impl Write, events: &Sender<Event>) {
    let mut line = Vec::new();
    while matches!(output.read_until(b'\n', &mut line), Ok(length) if length > 0) {
        let _: io::Result<()> = log.write_all(&line);
        let text = String::from_utf8_lossy(&line);
        if is_stall(&text) {
            let _ = events.send(Event::Stalled(text.trim().into()));
        }
        line.clear();
    }
    let _ = events.send(Event::PoweredOff);
}

/// Whether the emulated host's kernel complains of a pCPU or a task that stands still, or has died.
fn is_stall(line: &str) -> bool {
    const SIGNS: [&str; 6] = [
        "detected stalls",
        "self-detected stall",
        "soft lockup",
        "hard LOCKUP",
        "Kernel panic",
        // "INFO: task ... blocked for more than ... seconds."
        "blocked for more than",
    ];
    SIGNS.iter().any(|sign| line.contains(sign))
}

/// Puts the console of a stuck host where the next boot does not overwrite it. The emulator has it open and
/// goes on writing to it.
pub(super) fn keep_console(console: &Path) -> PathBuf {
    let kept = console.with_file_name("host-console-stuck.log");
    match fs::rename(console, &kept) {
        Ok(()) => kept,
        Err(_) => console.into(),
    }
}

/// The end of what a kernel said on its console (the host's, or a guest's with what its VMM said), and before it the kernel's own word on why it stands still or died; not the
/// emulator's list, at each start, of what it does not emulate.
pub(crate) fn last_lines(console: &Path) -> String {
    let text = fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let of_interest =
        |line: &&str| !line.is_empty() && !line.contains("TCG doesn't support requested feature");
    let lines: Vec<_> = text.lines().map(str::trim).filter(of_interest).collect();
    let (before, end) = lines.split_at(lines.len().saturating_sub(3));
    let reason = before.iter().rfind(|line| is_stall(line));
    let quoted: Vec<_> = reason.into_iter().chain(end).copied().collect();
    if quoted.is_empty() { "nothing".into() } else { quoted.join(" | ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stalls_among_other_messages() {
        assert!(is_stall("[   24.1] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:"));
        assert!(is_stall("[  243.0] INFO: task ivcpu-vmm:252 blocked for more than 30 seconds."));
        assert!(!is_stall("[    1.0] igb 0000:01:00.0: added PHC on eth0"));
    }

    #[test]
    fn console_ends_with_power_off() {
        let (sender, events) = std::sync::mpsc::channel();
        let mut log = Vec::new();
        watch_console(&b"one\nwatchdog: BUG: soft lockup - CPU#2 stuck\nlast"[..], &mut log, &sender);
        drop(sender);
        let seen: Vec<_> = events.iter().collect();
        assert!(
            matches!(&seen[..], [Event::Stalled(text), Event::PoweredOff] if text.contains("soft lockup"))
        );
        assert!(log.ends_with(b"last"));
    }

    #[test]
    fn console_of_a_stuck_host_is_kept_and_quoted_without_the_emulators_warnings() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let console = dir.path().join("host-console.log");
        let warning = "qemu: warning: TCG doesn't support requested feature: CPUID.01H\n";
        fs::write(&console, format!("one\ntwo\r\n\nthree\nfour\n{warning}{warning}")).expect("written");
        assert_eq!(last_lines(&console), "two | three | four");
        fs::write(&console, "Kernel panic - not syncing\nregisters\ncalls\nmore\nend").expect("written");
        assert_eq!(last_lines(&console), "Kernel panic - not syncing | calls | more | end");
        let kept = keep_console(&console);
        assert!(!console.exists());
        assert_eq!(last_lines(&kept), "Kernel panic - not syncing | calls | more | end");
        fs::write(&kept, warning).expect("written");
        assert_eq!(last_lines(&kept), "nothing");
    }
}
