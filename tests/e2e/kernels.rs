//! Unmodified distribution kernels, old and new, full and cloud flavour, boot under ivcpu-vmm, move traffic through
//! ivcpu-backend to their IVCPU, through the FIFO with the module built for each, and power off. (6.1's full flavour is in poll.rs, 6.12's everywhere else.)

use anyhow::{Result, ensure};
use ivcpu_lab::in_host::fifo_guest::{kernel_log, module_counters, remove_module};
use ivcpu_lab::in_host::flow::move_both_ways;
use ivcpu_lab::in_host::{Host, Setup, Testbed};
use ivcpu_lab::provision::Kernel;
use ivcpu_lab::result::Mode;
use ivcpu_lab::trial::in_emulated_host_with_guest;

fn boots_and_moves_traffic(host: &Host, kernel: Kernel) -> Result<()> {
    let mut testbed = Testbed::start(host, &Setup { kernel, mode: Mode::Fifo, ..Setup::default() })?;
    move_both_ways(&mut testbed, 1, 1)?;
    let counters = module_counters(&mut testbed.vm)?;
    ensure!(counters.entries > 100 && counters.delivered > 0, "{counters:?}");
    remove_module(&mut testbed.vm)?;
    move_both_ways(&mut testbed, 1, 1)?;
    kernel_log(&mut testbed.vm)?;
    ensure!(testbed.vm.power_off()?.success());
    Ok(())
}

#[test]
fn debian_6_1_cloud() -> Result<()> {
    in_emulated_host_with_guest(Kernel::V6_1Cloud, |host| boots_and_moves_traffic(host, Kernel::V6_1Cloud))
}

#[test]
fn debian_6_12_cloud() -> Result<()> {
    in_emulated_host_with_guest(Kernel::V6_12Cloud, |host| boots_and_moves_traffic(host, Kernel::V6_12Cloud))
}
