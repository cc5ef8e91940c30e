//! The same backend and guest module under stock QEMU on KVM, with both carriers of the FIFO region. (howto.rs has them
//! under QEMU's own emulation.)

use anyhow::{Context, Result, ensure};
use ivcpu_lab::in_host::fifo_guest::{
    insert_module, kernel_log, load_module, module_counters, remove_module, scribble, send_to_loop,
};
use ivcpu_lab::in_host::flow::move_both_ways;
use ivcpu_lab::in_host::measure::queue_interrupts;
use ivcpu_lab::in_host::{
    Backend, BackendConfig, FifoRegion, Host, Layout, Net, Setup, Testbed, Vm, VmConfig, Vmm,
};
use ivcpu_lab::provision::Kernel;
use ivcpu_lab::result::{Carrier, Mode};
use ivcpu_lab::trial::{in_emulated_host, on_this_machine};

fn qemu(carrier: Carrier) -> Setup {
    Setup { vmm: Vmm::Qemu, mode: Mode::Fifo, carrier, ivcpu_poll_us: Some(60_000_000), ..Setup::default() }
}

/// Traffic both ways, delivered by entries.
fn under_stock_qemu(host: &Host, carrier: Carrier) -> Result<()> {
    let mut testbed = Testbed::start(host, &qemu(carrier))?;
    let (interrupts, before) = (testbed.vm.interrupts()?, module_counters(&mut testbed.vm)?);
    move_both_ways(&mut testbed, 1, 2)?;
    let after = module_counters(&mut testbed.vm)?;
    let irqs = queue_interrupts(&interrupts, &testbed.vm.interrupts()?, testbed.ivcpu())?;
    let entries = after.entries - before.entries;
    println!("{carrier}: {entries} entries, {irqs:?}, {}", kernel_log(&mut testbed.vm)?);
    ensure!(entries > 1000, "{carrier}: {before:?}, then {after:?}");
    ensure!(
        (irqs.ivcpu.unwrap_or(0) + irqs.other) * 20 < entries,
        "{carrier}: {entries} entries, but {irqs:?}"
    );
    ensure!(testbed.vm.power_off()?.success());
    Ok(())
}

#[test]
fn stock_qemu_with_ivshmem() -> Result<()> {
    in_emulated_host(|host| under_stock_qemu(host, Carrier::Ivshmem))
}

#[test]
fn stock_qemu_with_virtio_pmem() -> Result<()> {
    in_emulated_host(|host| under_stock_qemu(host, Carrier::VirtioPmem))
}

/// A guest that QEMU emulates on this machine, whose frames the backend sends back: needs neither KVM nor root.
fn emulated_guest(host: &Host) -> Result<(Backend, Vm, FifoRegion)> {
    let region = FifoRegion { path: host.scratch().join("fifo"), carrier: Carrier::Ivshmem };
    Backend::create_region(host, &region)?;
    let backend = Backend::start(
        host,
        &BackendConfig {
            uplink: "loop".into(),
            queue_pairs: 1,
            poll: "50".into(),
            pcpus: vec![],
            control_queue: true,
            fifo: Some(format!("path={}", region.path.display())),
        },
    )?;
    let (kernel, image) = host.guest_files(Kernel::V6_12)?;
    let config = VmConfig {
        vmm: Vmm::QemuTcg,
        kernel,
        image,
        kernel_words: String::new(),
        application_vcpus: 1,
        layout: Layout::Pinned,
        ivcpu: true,
        fifo: Some(region.clone()),
        pv_eoi: true,
        net: Net::VhostUser(backend.socket().into()),
        function: None,
        queue_pairs: 1,
        huge_pages: false,
    };
    let vm = Vm::boot(host, &config)?;
    Ok((backend, vm, region))
}

/// A region the module must not touch: one clear line says why, and the guest runs by interrupts.
#[test]
fn a_region_that_is_none_of_ours_is_refused_in_one_line() -> Result<()> {
    on_this_machine(|host| {
        let (backend, mut vm, region) = emulated_guest(host)?;
        vm.bring_up_network(1)?;
        // Its magic and its version, where docs/fifo-abi.md has them.
        let magic: [u8; 8] = *b"IVCPUFIF";
        for (word, offset, wrong, right) in [
            ("magic", 0, *b"SOMEELSE", magic),
            ("version", 8, [99, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]),
        ] {
            scribble(&region.path, offset, &wrong)?;
            ensure!(load_module(&mut vm, 1, None).is_err(), "the module took a region with a wrong {word}");
            let log = kernel_log(&mut vm)?;
            let complaints = log.lines().filter(|line| line.contains(word)).count();
            ensure!(complaints == 1, "not one line on the {word}: {log}");
            remove_module(&mut vm)?;
            scribble(&region.path, offset, &right)?;
        }
        scribble(&region.path, 8, &[99])?;
        insert_module(&mut vm, 1, None)?;
        let before = vm.interrupts()?;
        send_to_loop(&mut vm, 50)?;
        let irqs = queue_interrupts(&before, &vm.interrupts()?, Some(1)).context("the guest's interrupts")?;
        ensure!(irqs.ivcpu.unwrap_or(0) + irqs.other > 10, "no interrupts either: {irqs:?}");
        ensure!(vm.power_off()?.success());
        ensure!(backend.terminate()?.success());
        Ok(())
    })
}
