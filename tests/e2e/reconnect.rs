//! Whoever of the two is killed, the other carries on.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ivcpu_lab::in_host::{Setup, Testbed};
use ivcpu_lab::traffic::{End, Traffic, Workload};
use ivcpu_lab::trial::in_emulated_host;

/// TCP backs off while the backend is away; its next try may be some seconds later.
const RESUME: Duration = Duration::from_secs(60);

/// Waits until the guest has received a further megabyte.
fn wait_for_traffic(testbed: &mut Testbed, wire_end: &End) -> Result<()> {
    let before = testbed.vm.traffic_counts()?.bytes_verified;
    let start = Instant::now();
    loop {
        sleep(Duration::from_millis(300));
        let counts = testbed.vm.traffic_counts()?;
        if let Some(failure) = counts.failure.or(wire_end.counts().failure) {
            anyhow::bail!("the connection broke: {failure}");
        }
        if counts.bytes_verified > before + 1_000_000 {
            return Ok(());
        }
        ensure!(start.elapsed() < RESUME, "no traffic for {RESUME:?}");
    }
}

#[test]
fn a_killed_backend_costs_a_pause_but_no_connection() -> Result<()> {
    in_emulated_host(|host| {
        let mut testbed = Testbed::start(host, &Setup::default())?;
        let traffic = Traffic::new(Workload::TcpIn);
        let wire_end = testbed.wire.listen(traffic)?;
        testbed.vm.start_traffic(traffic)?;
        for _ in 0..3 {
            wait_for_traffic(&mut testbed, &wire_end)?;
            testbed.kill_backend()?;
            sleep(Duration::from_millis(500));
            testbed.restart_backend(host)?;
        }
        wait_for_traffic(&mut testbed, &wire_end)?;
        let (status, uptime) = testbed.vm.run("cat /proc/uptime")?;
        ensure!(status == 0 && !uptime.is_empty());
        let guest_end = testbed.vm.stop_traffic()?;
        ensure!(guest_end.connections == 1 && guest_end.failure.is_none(), "{guest_end:?}");
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}

#[test]
fn a_backend_serves_one_vm_after_the_other() -> Result<()> {
    in_emulated_host(|host| {
        let mut testbed = Testbed::start(host, &Setup::default())?;
        for _ in 0..3 {
            let traffic = Traffic::new(Workload::TcpIn);
            let wire_end = testbed.wire.listen(traffic)?;
            testbed.vm.start_traffic(traffic)?;
            wait_for_traffic(&mut testbed, &wire_end)?;
            drop(wire_end);
            testbed = testbed.replace_vm(host)?;
        }
        let sessions =
            testbed.backend.as_ref().map(|backend| backend.stats()).transpose()?.map(|s| s.sessions);
        ensure!(sessions == Some(4), "{sessions:?} sessions");
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}
