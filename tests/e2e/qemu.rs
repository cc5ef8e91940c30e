//! Stock QEMU takes `ivcpu-backend` as it takes any vhost-user backend.

use anyhow::{Result, ensure};
use ivcpu_lab::in_host::flow::{move_both_ways, survive_killed_backends};
use ivcpu_lab::in_host::{Host, Setup, Testbed, Vmm};
use ivcpu_lab::result::{Backend, Mode};
use ivcpu_lab::trial::in_emulated_host;

fn stock_qemu(queue_pairs: u16) -> Setup {
    Setup { vmm: Vmm::Qemu, backend: Backend::Ivcpu, mode: Mode::Stock, queue_pairs, ..Setup::default() }
}

fn moves_checked_bytes_both_ways(host: &Host, queue_pairs: u16) -> Result<()> {
    let mut testbed = Testbed::start(host, &stock_qemu(queue_pairs))?;
    move_both_ways(&mut testbed, queue_pairs, 2)?;
    let stats = testbed.backend.as_ref().map(|backend| backend.stats()).transpose()?;
    let moved: Vec<_> = stats.iter().flat_map(|stats| &stats.queues).map(|queue| queue.packets).collect();
    ensure!(moved.iter().sum::<u64>() > 0, "the backend moved {moved:?} frames");
    ensure!(testbed.vm.power_off()?.success());
    Ok(())
}

#[test]
fn two_queue_pairs() -> Result<()> {
    in_emulated_host(|host| moves_checked_bytes_both_ways(host, 2))
}

#[test]
fn a_killed_backend_costs_a_pause_but_no_connection() -> Result<()> {
    in_emulated_host(|host| {
        let mut testbed = Testbed::start(host, &stock_qemu(1))?;
        survive_killed_backends(&mut testbed, host)?;
        ensure!(testbed.vm.power_off()?.success());
        Ok(())
    })
}
