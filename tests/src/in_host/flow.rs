//! Whether a testbed's traffic flows, and every byte of it is right.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use serde_json::json;

use super::{Host, Testbed};
use crate::traffic::{End, Traffic, Workload};

/// TCP backs off while the backend is away; its next try may be some seconds later.
const RESUME: Duration = Duration::from_secs(60);
/// Payload bytes that show a flow.
const ENOUGH: u64 = 1_000_000;

/// Sends a stream out of the guest, then one into it, over as many connections, for `seconds` each and until a megabyte has
/// arrived, every byte as it was sent.
pub fn move_both_ways(testbed: &mut Testbed, connections: u16, seconds: u64) -> anyhow::Result<()> {
    for workload in [Workload::TcpOut, Workload::TcpIn] {
        let traffic = Traffic { connections, ..Traffic::new(workload) };
        let wire_end = testbed.wire.listen(traffic)?;
        testbed.vm.start_traffic(traffic)?;
        let start = Instant::now();
        // Nothing is asked of the guest meanwhile: its answers would be exits.
        sleep(Duration::from_secs(seconds));
        loop {
            let ends = [testbed.vm.traffic_counts()?, wire_end.counts()];
            ensure!(ends.iter().all(|end| end.failure.is_none()), "{workload:?}: {ends:?}");
            let verified: u64 = ends.iter().map(|end| end.bytes_verified).sum();
            if verified > ENOUGH && ends.iter().all(|end| end.connections == u64::from(connections)) {
                break;
            }
            ensure!(start.elapsed() < RESUME, "{workload:?}: only {ends:?} in {RESUME:?}");
            sleep(Duration::from_millis(300));
        }
        let ends = [testbed.vm.stop_traffic()?, wire_end.stop()];
        ensure!(ends.iter().all(|end| end.failure.is_none()), "{workload:?}: {ends:?}");
    }
    Ok(())
}

/// Waits until the guest has received a further megabyte of a running [`Workload::TcpIn`].
pub fn wait_for_more(testbed: &mut Testbed, wire_end: &End) -> anyhow::Result<()> {
    let before = testbed.vm.traffic_counts()?.bytes_verified;
    let start = Instant::now();
    loop {
        sleep(Duration::from_millis(300));
        let counts = testbed.vm.traffic_counts()?;
        if let Some(failure) = counts.failure.or(wire_end.counts().failure) {
            bail!("the connection broke: {failure}");
        }
        if counts.bytes_verified > before + ENOUGH {
            return Ok(());
        }
        ensure!(start.elapsed() < RESUME, "no traffic for {RESUME:?}");
    }
}

/// Kills the backend twice in the midst of a stream into the guest and starts it again: the same connection
/// must carry on each time.
pub fn survive_killed_backends(testbed: &mut Testbed, host: &Host) -> anyhow::Result<()> {
    let traffic = Traffic::new(Workload::TcpIn);
    let wire_end = testbed.wire.listen(traffic)?;
    testbed.vm.start_traffic(traffic)?;
    for _ in 0..2 {
        wait_for_more(testbed, &wire_end)?;
        testbed.kill_backend()?;
        sleep(Duration::from_millis(500));
        testbed.restart_backend(host)?;
    }
    wait_for_more(testbed, &wire_end)?;
    let (status, uptime) = testbed.vm.run("cat /proc/uptime")?;
    ensure!(status == 0 && !uptime.is_empty());
    let guest_end = testbed.vm.stop_traffic()?;
    ensure!(guest_end.connections == 1 && guest_end.failure.is_none(), "{guest_end:?}");
    Ok(())
}

/// Has QEMU stop the guest twice in the midst of a stream into it and continue: the same connection must carry on.
pub fn survive_pauses(testbed: &mut Testbed) -> anyhow::Result<()> {
    let traffic = Traffic::new(Workload::TcpIn);
    let wire_end = testbed.wire.listen(traffic)?;
    testbed.vm.start_traffic(traffic)?;
    for _ in 0..2 {
        wait_for_more(testbed, &wire_end)?;
        testbed.vm.qemu()?.execute("stop", json!({}))?;
        sleep(Duration::from_millis(500));
        testbed.vm.qemu()?.execute("cont", json!({}))?;
    }
    wait_for_more(testbed, &wire_end)?;
    let guest_end = testbed.vm.stop_traffic()?;
    ensure!(guest_end.connections == 1 && guest_end.failure.is_none(), "{guest_end:?}");
    Ok(())
}
