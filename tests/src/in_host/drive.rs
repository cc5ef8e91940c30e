//! One guest, one kind of traffic, a few figures: to look at things by hand, and the shortest example of how a
//! scenario is put together.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::ValueEnum;
use serde::Serialize;

use super::{Backend, BackendConfig, Host, Layout, Net, TAP, Vm, VmConfig, Vmm, Wire};
use crate::pcpu;
use crate::procfs::Interrupt;
use crate::provision::Kernel;
use crate::traffic::{Counts, Latency, Traffic, Workload};

/// Time for traffic to become steady.
const WARM_UP: Duration = Duration::from_secs(1);

/// What feeds the guest's network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Feed {
    /// `ivcpu-backend` over vhost-user.
    Ivcpu,
    /// The kernel's vhost-net (QEMU only).
    VhostNet,
}

/// What to run.
#[derive(Clone, Debug, clap::Args)]
pub struct DriveOptions {
    /// Who runs the guest
    #[arg(long, default_value = "ivcpu-vmm")]
    pub vmm: Vmm,
    /// What feeds its network device
    #[arg(long, default_value = "ivcpu")]
    pub backend: Feed,
    /// The guest's kernel
    #[arg(long, default_value = "6.12")]
    pub kernel: Kernel,
    /// What flows
    #[arg(long, default_value = "tcp-out")]
    pub workload: Workload,
    /// Length of the measured window in seconds
    #[arg(long, default_value_t = 5)]
    pub seconds: u64,
    /// Queue pairs, and connections
    #[arg(long, default_value_t = 1)]
    pub queue_pairs: u16,
    /// Give the guest an IVCPU, and start the interrupt service in it
    #[arg(long)]
    pub ivcpu: bool,
    /// Turn paravirtual end of interrupt off
    #[arg(long)]
    pub no_pv_eoi: bool,
    /// The backend's --poll-us
    #[arg(long, default_value = "50")]
    pub poll_us: String,
    /// Run a bystander on the application vCPUs
    #[arg(long)]
    pub bystander: bool,
    /// More words for the guest's kernel command line
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    pub kernel_words: String,
    /// On this machine itself, which needs VMX or SVM
    #[arg(long)]
    pub native: bool,
}

/// The figures of one run.
#[derive(Debug, Serialize)]
pub struct Figures {
    /// Seconds from the VMM's start to the agent's hello.
    pub boot_seconds: f64,
    /// Length of the window.
    pub seconds: f64,
    /// Verified payload, in megabits a second.
    pub mbps: f64,
    /// Verified payload bytes.
    pub bytes_verified: u64,
    /// Round trips.
    pub transactions: u64,
    /// Round-trip times.
    pub latency_us: Option<Latency>,
    /// The virtio devices' interrupts in the window.
    pub interrupts: Vec<Interrupt>,
    /// Real CPU seconds each pCPU had in the window.
    pub cpu_seconds: Vec<f64>,
    /// Bystander iterations per CPU second, for each application vCPU.
    pub bystander: Option<Vec<f64>>,
}

/// Boots, drives, measures, powers off.
pub fn drive(options: &DriveOptions) -> anyhow::Result<Figures> {
    let mut host = if options.native { Host::native()? } else { Host::emulated()? };
    let wire = Wire::set_up(options.queue_pairs)?;
    let backend = match options.backend {
        Feed::VhostNet if options.vmm != Vmm::Qemu => bail!("vhost-net is for --vmm qemu only"),
        Feed::VhostNet => None,
        Feed::Ivcpu => Some(Backend::start(
            &host,
            &BackendConfig {
                uplink: format!("tap:{TAP}"),
                queue_pairs: options.queue_pairs,
                poll: options.poll_us.clone(),
                pcpus: vec![pcpu::BACKEND],
            },
        )?),
    };
    let (kernel, image) = host.guest_files(options.kernel)?;
    let config = VmConfig {
        vmm: options.vmm,
        kernel,
        image,
        kernel_words: options.kernel_words.clone(),
        application_vcpus: pcpu::APPLICATION.len(),
        layout: Layout::Pinned,
        ivcpu: options.ivcpu,
        pv_eoi: !options.no_pv_eoi,
        net: backend.as_ref().map_or(Net::VhostNet, |backend| Net::VhostUser(backend.socket().into())),
        queue_pairs: options.queue_pairs,
    };
    let mut vm = Vm::boot(&host, &config)?;
    vm.bring_up_network(options.queue_pairs)?;
    if options.ivcpu {
        vm.start_service()?;
    }
    let traffic = Traffic { connections: options.queue_pairs, ..Traffic::new(options.workload) };
    let wire_end = wire.listen(traffic)?;
    vm.start_traffic(traffic)?;
    if options.bystander {
        let vcpus: Vec<_> = (0..config.application_vcpus).collect();
        vm.start_bystander(&vcpus, true)?;
    }
    thread::sleep(WARM_UP);

    let before = Sample::take(&mut host, &mut vm, options)?;
    let wire_before = wire_end.counts();
    vm.reset_latency()?;
    let start = Instant::now();
    thread::sleep(Duration::from_secs(options.seconds));
    let wire_after = wire_end.counts();
    let seconds = start.elapsed().as_secs_f64();
    let after = Sample::take(&mut host, &mut vm, options)?;

    let guest_end = vm.stop_traffic()?;
    let wire_end = wire_end.stop();
    if let Some(failure) = guest_end.failure.or(wire_end.failure) {
        bail!("the traffic failed: {failure}");
    }
    let boot_seconds = vm.boot_time().as_secs_f64();
    let status = vm.power_off()?;
    if !status.success() {
        bail!("the VMM ended with {status} after the guest's power-off");
    }
    let verified = match options.workload {
        Workload::TcpOut | Workload::TcpRr => wire_after.bytes_verified - wire_before.bytes_verified,
        Workload::TcpIn => after.counts.bytes_verified - before.counts.bytes_verified,
    };
    let cpu_seconds: Vec<_> = after
        .cpu_times
        .iter()
        .zip(&before.cpu_times)
        .map(|(after, before)| (after - before) as f64 / 1e9)
        .collect();
    let bystander = after.iterations.zip(before.iterations).map(|(after, before)| {
        let iterations = after.iter().zip(before).map(|(after, before)| (after - before) as f64);
        iterations.zip(pcpu::APPLICATION).map(|(iterations, pcpu)| iterations / cpu_seconds[pcpu]).collect()
    });
    Ok(Figures {
        boot_seconds,
        seconds,
        mbps: verified as f64 * 8.0 / seconds / 1e6,
        bytes_verified: verified,
        transactions: after.counts.transactions - before.counts.transactions,
        latency_us: after.counts.latency_us,
        interrupts: taken_between(&before.interrupts, &after.interrupts)?,
        cpu_seconds,
        bystander,
    })
}

/// What is read at each end of the window.
struct Sample {
    counts: Counts,
    interrupts: Vec<Interrupt>,
    cpu_times: Vec<u64>,
    iterations: Option<Vec<u64>>,
}

impl Sample {
    fn take(host: &mut Host, vm: &mut Vm, options: &DriveOptions) -> anyhow::Result<Self> {
        Ok(Self {
            interrupts: vm.interrupts()?,
            counts: vm.traffic_counts()?,
            iterations: if options.bystander { Some(vm.iterations()?) } else { None },
            cpu_times: host.outside.cpu_times()?,
        })
    }
}

/// Interrupts taken from `before` to `after`.
pub fn taken_between(before: &[Interrupt], after: &[Interrupt]) -> anyhow::Result<Vec<Interrupt>> {
    let difference = |later: &Interrupt| {
        let earlier = before.iter().find(|earlier| earlier.name == later.name);
        let earlier = earlier.with_context(|| format!("interrupt {} appeared in the window", later.name))?;
        let taken = later.taken.iter().zip(&earlier.taken).map(|(later, earlier)| later - earlier).collect();
        Ok(Interrupt { name: later.name.clone(), taken })
    };
    after.iter().map(difference).collect()
}
