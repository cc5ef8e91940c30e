//! Unmodified distribution kernels, old and new, full and cloud flavour, boot under ivcpu-vmm, move traffic through
//! ivcpu-backend to their IVCPU, and power off.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use ivcpu_lab::in_host::{Host, Setup, Testbed};
use ivcpu_lab::provision::Kernel;
use ivcpu_lab::traffic::{Traffic, Workload};
use ivcpu_lab::trial::{in_emulated_host, provide_guest};

fn boots_and_moves_traffic(host: &Host, kernel: Kernel) -> Result<()> {
    let mut testbed = Testbed::start(host, &Setup { kernel, ..Setup::default() })?;
    for workload in [Workload::TcpOut, Workload::TcpIn] {
        let traffic = Traffic::new(workload);
        let wire_end = testbed.wire.listen(traffic)?;
        testbed.vm.start_traffic(traffic)?;
        sleep(Duration::from_secs(2));
        let guest_end = testbed.vm.stop_traffic()?;
        let wire_end = wire_end.stop();
        ensure!(guest_end.failure.is_none() && wire_end.failure.is_none(), "{guest_end:?} {wire_end:?}");
        let verified = wire_end.bytes_verified + guest_end.bytes_verified;
        ensure!(verified > 1_000_000, "{workload:?}: only {verified} bytes");
    }
    ensure!(testbed.vm.power_off()?.success());
    Ok(())
}

#[test]
fn debian_6_1() -> Result<()> {
    provide_guest(Kernel::V6_1)?;
    in_emulated_host(|host| boots_and_moves_traffic(host, Kernel::V6_1))
}

#[test]
fn debian_6_1_cloud() -> Result<()> {
    provide_guest(Kernel::V6_1Cloud)?;
    in_emulated_host(|host| boots_and_moves_traffic(host, Kernel::V6_1Cloud))
}

#[test]
fn debian_6_12_cloud() -> Result<()> {
    provide_guest(Kernel::V6_12Cloud)?;
    in_emulated_host(|host| boots_and_moves_traffic(host, Kernel::V6_12Cloud))
}
