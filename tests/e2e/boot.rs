//! The lab itself: the emulated host boots and runs commands, and a stock guest on stock QEMU and vhost-net moves
//! checked traffic both ways in it. What is measured elsewhere rests on this.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use ivcpu_lab::emulated_host::Input;
use ivcpu_lab::in_host::measure::queue_interrupts;
use ivcpu_lab::in_host::{Cable, Host, Layout, Net, Vm, VmConfig, Vmm, Wire};
use ivcpu_lab::pcpu;
use ivcpu_lab::provision::Kernel;
use ivcpu_lab::traffic::{Counts, Traffic, Workload};
use ivcpu_lab::trial::{in_emulated_host, with_emulated_host};

#[test]
fn commands_pass_their_output_and_status_through() -> Result<()> {
    with_emulated_host(|host| {
        let run = host.command(["sh", "-c", "nproc; ls /dev/kvm >&2; exit 7"]);
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        let status = host.run(&run, Input::Empty, Some(Duration::from_secs(60)), |error, bytes| {
            if error { errors.extend_from_slice(bytes) } else { output.extend_from_slice(bytes) }
        })?;
        assert_eq!(status, 7);
        assert_eq!(String::from_utf8_lossy(&output), format!("{}\n", pcpu::COUNT));
        assert_eq!(String::from_utf8_lossy(&errors), "/dev/kvm\n");
        Ok(())
    })
}

#[test]
fn a_command_that_cannot_start_says_why() -> Result<()> {
    with_emulated_host(|host| {
        let status = host.run(&host.command(["/absent"]), Input::Empty, None, |_, _| ())?;
        assert_eq!(status, 127);
        Ok(())
    })
}

#[test]
fn emulator_time_of_a_busy_pcpu_grows() -> Result<()> {
    in_emulated_host(|host| {
        let before = host.outside.cpu_times()?;
        ensure!(before.len() == pcpu::COUNT, "{} pCPUs", before.len());
        let bystander = ivcpu_lab::bystander::Bystander::start(&[pcpu::IVCPU], false)?;
        sleep(Duration::from_secs(2));
        drop(bystander);
        let after = host.outside.cpu_times()?;
        let busy = after[pcpu::IVCPU] - before[pcpu::IVCPU];
        let idle = after[pcpu::BACKEND] - before[pcpu::BACKEND];
        ensure!(busy > 5 * idle, "busy pCPU {busy} ns, idle pCPU {idle} ns");
        Ok(())
    })
}

fn stock_guest(host: &Host) -> Result<VmConfig> {
    let (kernel, image) = host.guest_files(Kernel::V6_12)?;
    Ok(VmConfig {
        vmm: Vmm::Qemu,
        kernel,
        image,
        kernel_words: String::new(),
        application_vcpus: 2,
        layout: Layout::Pinned,
        fifo: None,
        ivcpu: false,
        pv_eoi: true,
        net: Net::VhostNet,
        function: None,
        queue_pairs: 2,
        huge_pages: false,
    })
}

/// Lets traffic flow for a while; what the guest's and the wire's end did.
fn exchange(vm: &mut Vm, wire: &Wire, traffic: Traffic) -> Result<(Counts, Counts)> {
    let wire_end = wire.listen(traffic)?;
    vm.start_traffic(traffic)?;
    sleep(Duration::from_secs(3));
    let guest_end = vm.stop_traffic()?;
    let wire_end = wire_end.stop();
    ensure!(guest_end.failure.is_none(), "in the guest: {:?}", guest_end.failure);
    ensure!(wire_end.failure.is_none(), "on the wire: {:?}", wire_end.failure);
    Ok((guest_end, wire_end))
}

#[test]
fn a_stock_guest_moves_checked_bytes_over_two_queue_pairs_beside_a_bystander() -> Result<()> {
    in_emulated_host(|host| {
        let wire = Wire::set_up(Cable::Tap(2))?;
        let mut vm = Vm::boot(host, &stock_guest(host)?)?;
        vm.bring_up_network(2)?;
        vm.start_bystander(&[0, 1], true)?;
        let (before, interrupts) = (vm.iterations()?, vm.interrupts()?);
        let traffic = Traffic { connections: 2, ..Traffic::new(Workload::TcpOut) };
        let (guest_end, wire_end) = exchange(&mut vm, &wire, traffic)?;
        ensure!((guest_end.connections, wire_end.connections) == (2, 2));
        ensure!(wire_end.bytes_verified > 1_000_000, "{wire_end:?}");
        let after = vm.iterations()?;
        ensure!(after.iter().zip(&before).all(|(after, before)| after > before), "{before:?} {after:?}");
        let (guest_end, _) = exchange(&mut vm, &wire, Traffic::new(Workload::TcpIn))?;
        ensure!(guest_end.bytes_verified > 1_000_000, "in: {guest_end:?}");
        let (guest_end, _) = exchange(&mut vm, &wire, Traffic::new(Workload::TcpRr))?;
        ensure!(guest_end.transactions > 20 && guest_end.latency_us.is_some(), "ping-pong: {guest_end:?}");

        let after = vm.interrupts()?;
        ensure!(after.iter().filter(|interrupt| interrupt.is_queue()).count() >= 4);
        ensure!(queue_interrupts(&interrupts, &after, None)?.other > 0, "no queue interrupt: {after:?}");
        for tool in ["iperf3 --version", "sockperf --version", "ethtool --version", "/usr/bin/ip -V"] {
            let (status, text) = vm.run(tool)?;
            ensure!(status == 0, "{tool} in the guest: {text}");
        }
        let (status, text) = vm.run("ethtool -l eth0 | grep -c 'Combined:.*2'")?;
        ensure!((status, text.trim()) == (0, "2"), "{text}");
        ensure!(vm.power_off()?.success());
        Ok(())
    })
}
