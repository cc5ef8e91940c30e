//! Whoever of the two is killed, the other carries on.

use anyhow::{Result, ensure};
use ivcpu_lab::in_host::flow::{survive_killed_backends, wait_for_more};
use ivcpu_lab::in_host::{Setup, Testbed};
use ivcpu_lab::traffic::{Traffic, Workload};
use ivcpu_lab::trial::in_emulated_host;

#[test]
fn a_killed_backend_costs_no_connection_and_then_serves_one_vm_after_the_other() -> Result<()> {
    in_emulated_host(|host| {
        let mut testbed = Testbed::start(host, &Setup::default())?;
        survive_killed_backends(&mut testbed, host)?;
        for _ in 0..2 {
            let traffic = Traffic::new(Workload::TcpIn);
            let wire_end = testbed.wire.listen(traffic)?;
            testbed.vm.start_traffic(traffic)?;
            wait_for_more(&mut testbed, &wire_end)?;
            drop(wire_end);
            testbed = testbed.replace_vm(host)?;
        }
        let sessions =
            testbed.backend.as_ref().map(|backend| backend.stats()).transpose()?.map(|s| s.sessions);
        // Of the backend that was started last: the first VM, and two that came after it.
        ensure!(sessions == Some(3), "{sessions:?} sessions");
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}
