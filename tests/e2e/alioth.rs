//! A stranger's VMM with our backend, and its backend with our VMM: Alioth, as cargo installs it, brings both sides.

use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ivcpu_lab::in_host::flow::{exchange, move_both_ways, wait_for_more};
use ivcpu_lab::in_host::measure::queue_interrupts;
use ivcpu_lab::in_host::{Cable, Host, Setup, TAP, Testbed, Vmm, Wire};
use ivcpu_lab::process::Process;
use ivcpu_lab::provision::Provision;
use ivcpu_lab::result::Mode;
use ivcpu_lab::traffic::{Traffic, Workload};
use ivcpu_lab::trial::in_emulated_host;
use ivcpu_lab::workspace::Workspace;
use nix::sys::signal::Signal;

#[test]
fn alioth_moves_checked_bytes_and_its_interrupts_are_on_the_ivcpu() -> Result<()> {
    // Outside this builds it; inside it is there.
    Provision::new(&Workspace::locate()?).alioth()?;
    in_emulated_host(|host| {
        let setup = Setup { vmm: Vmm::Alioth, mode: Mode::Irq, ..Setup::default() };
        let mut testbed = Testbed::start(host, &setup)?;
        let before = testbed.vm.interrupts()?;
        move_both_ways(&mut testbed, 1, 2)?;
        let irqs = queue_interrupts(&before, &testbed.vm.interrupts()?, testbed.ivcpu())?;
        // The guest's service may be a moment behind the driver.
        let on_ivcpu = irqs.ivcpu.unwrap_or(0);
        ensure!(on_ivcpu > 100 && irqs.other * 99 <= on_ivcpu, "{irqs:?}");
        let status = testbed.vm.power_off()?;
        ensure!(status.success(), "Alioth ended with {status}");
        Ok(())
    })
}

/// `alioth vu net` on the wire's TAP, once it listens.
fn alioth_backend(host: &Host, socket: &Path) -> Result<Process> {
    // It would not bind to what a killed one leaves; and it wants an MTU, whatever its help says.
    let _ = std::fs::remove_file(socket);
    let [nsenter, words @ ..] = Wire::enter_words();
    let program = host.alioth()?;
    let log = host.log("backend.log")?;
    let mut backend = Process::spawn("alioth vu net", nsenter, |command| {
        command.args(words).arg(program).args(["vu", "--socket"]).arg(socket);
        command.args(["net", "--param", &format!("if={TAP},mac=52:54:00:49:56:01,mtu=1500")]);
        command.stdin(Stdio::null()).stderr(log);
    })?;
    let start = Instant::now();
    while !socket.exists() {
        ensure!(
            backend.try_wait()?.is_none() && start.elapsed() < Duration::from_secs(15),
            "see backend.log"
        );
        sleep(Duration::from_millis(10));
    }
    Ok(backend)
}

#[test]
fn our_vmm_moves_checked_bytes_through_alioths_backend_and_outlives_it() -> Result<()> {
    Provision::new(&Workspace::locate()?).alioth()?;
    in_emulated_host(|host| {
        let socket = host.scratch().join("alioth.sock");
        let wire = Wire::set_up(Cable::Tap(1))?;
        let mut backend = alioth_backend(host, &socket)?;
        let mut testbed = Testbed::with_foreign_backend(host, &Setup::default(), socket.clone(), wire)?;
        exchange(&mut testbed, 1)?;

        let traffic = Traffic::new(Workload::TcpIn);
        let wire_end = testbed.wire.listen(traffic)?;
        testbed.vm.start_traffic(traffic)?;
        wait_for_more(&mut testbed, &wire_end)?;
        backend.signal(Signal::SIGKILL);
        backend.wait_for(Duration::from_secs(10))?;
        let _backend = alioth_backend(host, &socket)?;
        wait_for_more(&mut testbed, &wire_end)?;
        drop(wire_end);
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}
