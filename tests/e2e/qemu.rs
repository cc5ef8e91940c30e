//! Stock QEMU takes `ivcpu-backend` as it takes any vhost-user backend.

use anyhow::{Context, Result, ensure};
use ivcpu_lab::in_host::flow::{move_both_ways, survive_killed_backends, survive_pauses};
use ivcpu_lab::in_host::{Setup, Testbed, Vmm};
use ivcpu_lab::result::Mode;
use ivcpu_lab::trial::in_emulated_host;

#[test]
fn two_queue_pairs_move_checked_bytes_and_neither_a_killed_backend_nor_a_pause_costs_a_connection()
-> Result<()> {
    in_emulated_host(|host| {
        let setup = Setup { vmm: Vmm::Qemu, mode: Mode::Stock, queue_pairs: 2, ..Setup::default() };
        let mut testbed = Testbed::start(host, &setup)?;
        move_both_ways(&mut testbed, 2, 2)?;
        let stats = testbed.backend.as_ref().context("the backend")?.stats()?;
        ensure!(stats.queues.len() == 4 && stats.total(|queue| queue.packets) > 0, "{stats:?}");
        survive_killed_backends(&mut testbed, host)?;
        survive_pauses(&mut testbed)?;
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}
