//! Our VMM with DPDK's vhost-user backend, net_vhost, which testpmd connects to the wire's TAP.

use anyhow::{Result, ensure};
use ivcpu_lab::in_host::flow::{move_both_ways, wait_for_more};
use ivcpu_lab::in_host::testpmd::{Testpmd, TestpmdConfig};
use ivcpu_lab::in_host::{Cable, Setup, TAP, Testbed, Wire};
use ivcpu_lab::provision::Provision;
use ivcpu_lab::traffic::{Traffic, Workload};
use ivcpu_lab::trial::in_emulated_host;
use ivcpu_lab::workspace::Workspace;

const QUEUE_PAIRS: u16 = 2;

#[test]
fn our_vmm_moves_checked_bytes_through_net_vhost_and_each_outlives_the_other() -> Result<()> {
    // Outside this fetches it; inside it is there.
    Provision::new(&Workspace::locate()?).testpmd()?;
    in_emulated_host(|host| {
        let socket = host.scratch().join("dpdk.sock");
        let config = TestpmdConfig {
            enter: Wire::enter_words().into(),
            devices: vec![
                format!("net_vhost0,iface={},queues={QUEUE_PAIRS}", socket.display()),
                format!("net_tap0,iface={TAP}"),
            ],
            queues: QUEUE_PAIRS,
            forward: "io",
            frame: 64,
        };
        let forward = || -> Result<Testpmd> {
            let mut testpmd = Testpmd::start(host, &config)?;
            testpmd.command("start")?;
            Ok(testpmd)
        };
        let wire = Wire::set_up(Cable::Tap(QUEUE_PAIRS))?;
        let testpmd = forward()?;
        let setup = Setup { queue_pairs: QUEUE_PAIRS, ..Setup::default() };
        let mut testbed = Testbed::with_foreign_backend(host, &setup, socket.clone(), wire)?;
        move_both_ways(&mut testbed, QUEUE_PAIRS, 0)?;

        let traffic = Traffic::new(Workload::TcpIn);
        let wire_end = testbed.wire.listen(traffic)?;
        testbed.vm.start_traffic(traffic)?;
        wait_for_more(&mut testbed, &wire_end)?;
        testpmd.kill()?;
        // What it leaves there it would not bind to.
        std::fs::remove_file(&socket)?;
        let testpmd = forward()?;
        wait_for_more(&mut testbed, &wire_end)?;

        let replaced = testbed.replace_vm(host);
        drop(wire_end);
        let mut testbed = replaced?;
        move_both_ways(&mut testbed, QUEUE_PAIRS, 0)?;
        ensure!(testbed.vm.power_off()?.success());
        testpmd.quit()
    })
}
