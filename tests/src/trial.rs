//! End-to-end tests whose bodies run inside the emulated host.
//!
//! The machine's files are visible in there, so the test executable runs itself again inside, asking for the one
//! test it is in; all tests of an executable share one emulated host.

use std::any::type_name_of_val;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};

use crate::emulated_host::{EmulatedHost, Error, Input, Options};
use crate::image::{self, prepare_guest};
use crate::in_host::Host;
use crate::provision::{Kernel, Provision};
use crate::workspace::Workspace;

/// Set in the environment of a test that runs inside.
const INSIDE: &str = "IVCPU_LAB_INSIDE";
/// Emulated hosts that one test may lose.
const REPLACEMENTS: u32 = 3;
/// What is said of a guest that crashed, by ivcpu-vmm, by QEMU and by the guest's kernel.
const GUEST_CRASHES: [&str; 3] =
    ["triple-faulted", "guest-reset", "Kernel panic - not syncing: Fatal exception in interrupt"];
/// Longest a test may take inside.
const DEADLINE: Duration = Duration::from_secs(600);

/// Gives `body` the emulated host this executable's tests share.
pub fn with_emulated_host<T>(body: impl FnOnce(&mut EmulatedHost) -> anyhow::Result<T>) -> anyhow::Result<T> {
    static SHARED: Mutex<Option<EmulatedHost>> = Mutex::new(None);
    // A test that panicked while it had the host took it along.
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    let mut host = match shared.take() {
        Some(host) => host,
        None => boot(&[Kernel::V6_12])?,
    };
    let outcome = body(&mut host);
    // Whatever failed in it may be its own fault; only a command that did not start leaves it as it was.
    let useless = outcome.as_ref().is_err_and(|e| !matches!(e.downcast_ref(), Some(Error::NotStarted(..))));
    if !useless {
        *shared = Some(host);
    }
    outcome
}

/// Builds and provisions what the tests need, and boots.
pub fn boot(guest_kernels: &[Kernel]) -> anyhow::Result<EmulatedHost> {
    let workspace = Workspace::locate()?;
    let provision = Provision::new(&workspace);
    Ok(EmulatedHost::build_and_boot(&workspace, &provision, guest_kernels, &Options::default())?)
}

/// Builds and provisions the same, and gives `body` this machine. No emulated host of this checkout runs meanwhile.
pub fn on_this_machine<T>(body: impl FnOnce(&mut Host) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let prepare = |workspace: &Workspace, provision: &Provision| {
        provision.qemu()?;
        prepare_guest(workspace, provision, Kernel::V6_12)
    };
    prepared(prepare, body)
}

/// The same for a `body` whose only guests are DPDK's.
pub fn with_testpmd<T>(body: impl FnOnce(&mut Host) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let prepare = |_: &Workspace, provision: &Provision| {
        provision.tools()?;
        provision.testpmd()?;
        Ok(())
    };
    prepared(prepare, body)
}

fn prepared<T>(
    prepare: impl FnOnce(&Workspace, &Provision) -> Result<(), image::Error>,
    body: impl FnOnce(&mut Host) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let workspace = Workspace::locate()?;
    let provision = Provision::new(&workspace);
    let _lock = crate::emulated_host::lock(&workspace)?;
    workspace.build()?;
    prepare(&workspace, &provision)?;
    body(&mut Host::for_emulated_guests()?)
}

/// Runs `body`, a closure written in a test function, inside the emulated host. A host that gets stuck or dies is replaced,
/// three times at most, and the test run again; so is one in which a guest triple-faulted or its kernel died in an interrupt, which the emulator
/// makes guests of any VMM do once in some ten to twenty starts, and its own kernel too. A test that fails otherwise is run once more, in a fresh host: the emulator's faults also
/// show as a guest that stands still. Every failure is printed; a test that fails twice, or crashes its guest each time, has failed.
pub fn in_emulated_host<F>(body: F) -> anyhow::Result<()>
where
    F: FnOnce(&mut Host) -> anyhow::Result<()>,
{
    in_emulated_host_with_guest(Kernel::V6_12, body)
}

/// The same for a `body` that boots a guest with another kernel than the usual one.
pub fn in_emulated_host_with_guest<F>(kernel: Kernel, body: F) -> anyhow::Result<()>
where
    F: FnOnce(&mut Host) -> anyhow::Result<()>,
{
    if std::env::var_os(INSIDE).is_some() {
        return body(&mut Host::emulated()?);
    }
    let name = test_name(type_name_of_val(&body))?;
    until_it_is_the_tests_fault(name, || run_inside(name, kernel))
}

/// The same in an emulated host that no other test sees. `boot` makes it, with whatever belongs to it, anew for each try; after
/// `body` has passed, both are given back. Inside nothing is.
pub fn in_emulated_host_of_its_own<T, F>(
    boot: impl Fn() -> anyhow::Result<(EmulatedHost, T)>,
    body: F,
) -> anyhow::Result<Option<(EmulatedHost, T)>>
where
    F: FnOnce(&mut Host) -> anyhow::Result<()>,
{
    if std::env::var_os(INSIDE).is_some() {
        body(&mut Host::emulated()?)?;
        return Ok(None);
    }
    let name = test_name(type_name_of_val(&body))?;
    until_it_is_the_tests_fault(name, || {
        let (mut host, more) = boot()?;
        run_test(&mut host, name)?;
        Ok(Some((host, more)))
    })
}

fn is_guest_crash(error: &anyhow::Error) -> bool {
    let said = format!("{error:#}");
    GUEST_CRASHES.iter().any(|crash| said.contains(crash))
}

/// Tries the test `name` until it passes, or fails in a way, or as often, as the emulator does not.
fn until_it_is_the_tests_fault<T>(
    name: &str,
    mut run: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let mut failed = false;
    let mut lost = 0;
    loop {
        let error = match run() {
            Ok(passed) => return Ok(passed),
            Err(error) => error,
        };
        match error.downcast_ref() {
            // The emulator's fault, not the test's: it stands still, or died of an assertion of its own.
            Some(Error::Stuck { .. } | Error::Gone(_)) if lost < REPLACEMENTS => lost += 1,
            None if lost < REPLACEMENTS && is_guest_crash(&error) => lost += 1,
            None if !failed => failed = true,
            _ => return Err(error),
        }
        // Past the test framework, which keeps what a test prints to itself unless the test fails.
        let _ = writeln!(io::stderr(), "lab: {error:#}: running {name} again in a fresh emulated host");
    }
}

fn run_inside(name: &str, kernel: Kernel) -> anyhow::Result<()> {
    with_emulated_host(|host| {
        if kernel != Kernel::V6_12 {
            let workspace = Workspace::locate()?;
            prepare_guest(&workspace, &Provision::new(&workspace), kernel)?;
        }
        run_test(host, name)
    })
}

/// Runs the test `name` of this executable inside `host`.
fn run_test(host: &mut EmulatedHost, name: &str) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("finding the test executable")?;
    let program = program.display().to_string();
    let mut run = host.command([program.as_str(), "--exact", name, "--nocapture", "--test-threads=1"]);
    run.environment.push((INSIDE.into(), "1".into()));
    let mut output = Vec::new();
    let status = host.run(&run, Input::Empty, Some(DEADLINE), |_, bytes| output.extend_from_slice(bytes))?;
    let output = String::from_utf8_lossy(&output);
    if status != 0 {
        bail!("{name} failed inside the emulated host with status {status}:\n{output}");
    }
    // A name that matches nothing would also "pass".
    if !output.contains("1 passed") {
        bail!("the test executable does not know the test {name}:\n{output}");
    }
    print!("{output}");
    Ok(())
}

/// `crate::module::test::{{closure}}` is the test `module::test`.
fn test_name(closure: &str) -> anyhow::Result<&str> {
    let strange = || anyhow!("{closure} is not a closure in a test function");
    let path = closure.strip_suffix("::{{closure}}").ok_or_else(strange)?;
    path.split_once("::").map(|(_, name)| name).ok_or_else(strange)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_tests_from_their_closures() {
        assert_eq!(test_name("boot::guest_boots::{{closure}}").expect("a test"), "guest_boots");
        assert_eq!(test_name("irq::with::two::{{closure}}").expect("a test"), "with::two");
        assert!(test_name("boot::function").is_err());
    }
}
