//! Faults of the emulation end in a clear error, never in a hang or a result.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ivcpu_lab::emulated_host::{EmulatedHost, Error, Input, Options};
use ivcpu_lab::provision::Provision;
use ivcpu_lab::workspace::Workspace;

fn boot_with(options: Options) -> Result<Error> {
    let workspace = Workspace::locate()?;
    match EmulatedHost::build_and_boot(&workspace, &Provision::new(&workspace), &[], &options) {
        Ok(_) => anyhow::bail!("a host that cannot come up came up"),
        Err(e) => Ok(e),
    }
}

#[test]
fn a_host_that_is_never_ready_is_given_up() -> Result<()> {
    // Nothing boots in a quarter of a second: it is started so many times, and that is that.
    let ready = Duration::from_millis(250);
    let error = boot_with(Options { ready, attempts: 3, ..Options::default() })?;
    assert!(matches!(error, Error::NeverReady { attempts: 3, .. }), "{error}");
    Ok(())
}

#[test]
fn a_host_whose_kernel_panics_does_not_wait_for_the_deadline() -> Result<()> {
    let ready = Duration::from_secs(300);
    let kernel_words = "rdinit=/absent root=/dev/absent".to_owned();
    // A start may also stall before its kernel gets to the panic.
    let start = Instant::now();
    for _ in 0..4 {
        let options =
            Options { ready, attempts: 1, kernel_words: kernel_words.clone(), ..Options::default() };
        let error = boot_with(options)?;
        if matches!(&error, Error::NeverReady { last, .. } if last.contains("Kernel panic")) {
            ensure!(start.elapsed() < ready, "{:?}", start.elapsed());
            return Ok(());
        }
        eprintln!("{error}");
    }
    bail!("no start came to its panic");
}

#[test]
fn a_command_beyond_its_deadline_is_ended_and_so_is_one_in_a_silent_host() -> Result<()> {
    let workspace = Workspace::locate()?;
    let options = Options { silence: Duration::from_secs(6), ..Options::default() };
    let mut host = EmulatedHost::build_and_boot(&workspace, &Provision::new(&workspace), &[], &options)?;
    let sleep = host.command(["sleep", "600"]);
    let error =
        host.run(&sleep, Input::Empty, Some(Duration::from_secs(2)), |_, _| ()).expect_err("it sleeps on");
    assert!(matches!(error, Error::Deadline(..)), "{error}");
    // The command stops its parent, the agent, which then no longer says that it is alive.
    let stop = host.command(["sh", "-c", "kill -STOP $PPID; sleep 600"]);
    let error = host.run(&stop, Input::Empty, None, |_, _| ()).expect_err("the agent is stopped");
    assert!(matches!(&error, Error::Stuck { console, .. } if console.exists()), "{error}");
    Ok(())
}

#[test]
fn a_killed_lab_leaves_no_emulated_host() -> Result<()> {
    let mut lab = Command::new(env!("CARGO_BIN_EXE_ivcpu-lab"))
        .args(["shell", "--", "sh", "-c", "echo up; sleep 600"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut said = String::new();
    let output = lab.stdout.take().context("the lab's standard output")?;
    BufReader::new(output).read_line(&mut said)?;
    let hosts = children(lab.id());
    lab.kill()?;
    lab.wait()?;
    ensure!(said == "up\n", "the lab said {said:?}");
    ensure!(!hosts.is_empty(), "the lab had no child");
    let start = Instant::now();
    while hosts.iter().any(|host| Path::new("/proc").join(host).exists()) {
        ensure!(start.elapsed() < Duration::from_secs(30), "{hosts:?} outlived the lab");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Process ids of the children of every thread of `process`.
fn children(process: u32) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().map(String::from).collect::<Vec<_>>()).collect()
}
