//! The result file of a comparison: one JSON object whose field names are fixed, so that the results of different
//! versions can be compared. Unknown is `null`, never 0. Times are seconds, rates Mbit/s, latencies microseconds,
//! counts integers.

use std::fmt;

use clap::ValueEnum;
use ivcpu_vmm::exits::Rows;
use serde::{Deserialize, Serialize};

use crate::in_host::{Layout, Vmm};
use crate::ratio::Ratio;
use crate::traffic::{Latency, Workload};

/// Version of the file's layout.
pub const SCHEMA: u32 = 1;

/// One comparison.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ResultFile {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Product version.
    pub version: String,
    /// What it ran on.
    pub host: HostFacts,
    /// False when a case failed; its entry then has `error`.
    pub complete: bool,
    /// One entry a case, in the order they ran.
    pub cases: Vec<CaseResult>,
    /// Side-by-side figures of one run.
    pub ratios: Vec<Ratio>,
}

/// The virtualization host of a comparison.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HostFacts {
    /// Physical CPUs of the host, emulated ones in the lab.
    pub cpus: usize,
    /// True in the lab's emulated host: times then compare only within one run.
    pub emulated: bool,
    /// The host's kernel release.
    pub kernel: String,
    /// The QEMU that emulates the host or serves as base.
    pub qemu: Option<String>,
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
        pub enum $name { $($(#[$vdoc])* #[serde(rename = $word)] #[value(name = $word)] $variant),+ }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $(Self::$variant => $word),+ })
            }
        }
    };
}

words! {
    /// How frames reach the wire.
    Path {
        /// A virtio NIC served by software.
        Software = "software",
        /// A virtual function of the host's NIC, passed through.
        Sriov = "sriov",
    }
}
words! {
    /// Who serves the virtio NIC.
    Backend {
        /// `ivcpu-backend` over vhost-user.
        Ivcpu = "ivcpu",
        /// The kernel's vhost-net.
        VhostNet = "vhost-net",
        /// None: VFIO gives the guest a virtual function.
        Vfio = "vfio",
    }
}
words! {
    /// How completions reach the guest.
    Mode {
        /// Interrupts wherever the guest put them.
        Stock = "stock",
        /// Every device interrupt on the IVCPU.
        Irq = "irq",
        /// Entries of the shared FIFO, polled by the IVCPU; an interrupt only while it sleeps.
        Fifo = "fifo",
        /// The IVCPU polls the NIC's NAPI contexts; its interrupts stay off while there is traffic.
        Poll = "poll",
        /// The nearest thing a stock kernel has: NAPI in threads pinned to the IVCPU, its interrupts there too.
        ThreadedNapi = "threaded-napi",
    }
}
impl Backend {
    /// How its frames reach the wire.
    pub fn path(self) -> Path {
        match self {
            Backend::Vfio => Path::Sriov,
            Backend::Ivcpu | Backend::VhostNet => Path::Software,
        }
    }
}

impl Mode {
    /// Whether the guest has an IVCPU.
    pub fn has_ivcpu(self) -> bool {
        self != Mode::Stock
    }
}

words! {
    /// What shows the FIFO region to the guest.
    Carrier {
        /// BAR 2 of an ivshmem-plain PCI function.
        Ivshmem = "ivshmem",
        /// The range of a virtio-pmem device; not with `ivcpu-vmm`.
        VirtioPmem = "virtio-pmem",
    }
}
words! {
    /// What a physical CPU is for in a case.
    Role {
        /// Runs application vCPUs.
        App = "app",
        /// Runs the IVCPU.
        Ivcpu = "ivcpu",
        /// Runs the backend's poll threads.
        Backend = "backend",
        /// Runs the far end of the cable.
        Wire = "wire",
        /// Everything else.
        Other = "other",
    }
}

/// What a case compares; two cases of one file never share a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaseKey {
    /// Who runs the virtual machine.
    pub vmm: Vmm,
    /// How frames reach the wire.
    pub path: Path,
    /// Who serves the NIC.
    pub backend: Backend,
    /// How completions reach the guest.
    pub mode: Mode,
    /// The traffic.
    pub workload: Workload,
    /// Where the virtual CPUs may run.
    pub layout: Layout,
    /// Whether the guest may skip EOI exits (`KVM_FEATURE_PV_EOI`).
    pub pv_eoi: bool,
    /// Queue pairs of the NIC.
    pub queue_pairs: u16,
    /// The backend's `--poll-us`: microseconds or `always`; null where the backend has no such choice.
    pub poll_us: Option<String>,
    /// The guest module's `poll_us`; null for its default, and in modes without it.
    pub ivcpu_poll_us: Option<u64>,
    /// Microseconds an idle application vCPU polls before it halts; null for the guest's own choice.
    pub halt_poll_us: Option<u64>,
    /// Whether the bystander runs beside the traffic (it always does in the control).
    pub with_bystander: bool,
}

impl fmt::Display for CaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, backend, mode, pv_eoi, queue_pairs, poll_us, ivcpu_poll_us, halt_poll_us, .. } =
            self;
        let (vmm, workload, layout) = (word(self.vmm), word(self.workload), word(self.layout));
        write!(f, "{vmm}/{path}/{backend}/{mode}/{workload}/{layout}")?;
        write!(f, "/pv_eoi={}/queue_pairs={queue_pairs}", if *pv_eoi { "on" } else { "off" })?;
        if let Some(us) = poll_us {
            write!(f, "/poll_us={us}")?;
        }
        if let Some(us) = ivcpu_poll_us {
            write!(f, "/ivcpu_poll_us={us}")?;
        }
        if let Some(us) = halt_poll_us {
            write!(f, "/halt_poll_us={us}")?;
        }
        if self.with_bystander { Ok(()) } else { f.write_str("/no-bystander") }
    }
}

/// The word that stands for a value on the command line and in the file.
pub fn word(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |word| word.get_name().to_owned())
}

/// One case: what it compares and what was measured. Every figure is null when the case failed or cannot know it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CaseResult {
    /// What the case compares.
    #[serde(flatten)]
    pub key: CaseKey,
    /// What was measured.
    #[serde(flatten)]
    pub figures: Figures,
    /// Why the case failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

/// Device interrupts of the NIC as the guest counts them (`/proc/interrupts`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestIrqs {
    /// Taken by the IVCPU; null where there is none.
    pub ivcpu: Option<u64>,
    /// Taken by application vCPUs.
    pub other: u64,
}

/// What the guest module did with the NAPI contexts it polls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Polled {
    /// Packets its polls brought.
    pub packets: u64,
    /// Times the contexts were given back to their interrupts.
    pub sleeps: u64,
    /// Runs of igbvf's transmit handler without an interrupt.
    pub handler_runs: u64,
}

/// FIFO counters; all null in modes without one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fifo {
    /// Completions put in as entries.
    pub entries: Option<u64>,
    /// Completions that an entry already there covered.
    pub merged: Option<u64>,
    /// Interrupts sent to wake a sleeping IVCPU.
    pub wakeups: Option<u64>,
    /// Interrupts sent because an entry was too old.
    pub fallbacks: Option<u64>,
}

/// One physical CPU over the case's windows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pcpu {
    /// Its number on the host.
    pub pcpu: u32,
    /// What it was for.
    pub role: Role,
    /// Exits while traffic flowed, summed over the repeats.
    pub exits: Rows,
    /// Exits with the same spinning threads and no traffic, scaled to the same time.
    pub control: Rows,
    /// Largest less smallest control window, a row, scaled to the summed windows; null where there was only one.
    pub control_spread: Option<Rows>,
    /// Standard deviation of the device exits ([`Figures::DEVICE_ROWS`]) over the control windows, scaled to the summed
    /// windows; null where there was only one.
    pub control_sigma: Option<f64>,
    /// Interrupts of this pCPU's own timer, each an `EXTERNAL_INTR` exit if a guest ran.
    pub timer_interrupts: TimerInterrupts,
    /// CPU time this pCPU used over the windows with traffic: busy time natively, the time of the emulator's thread
    /// in the lab.
    pub cpu_seconds: Option<f64>,
}

/// Interrupts of one pCPU's own timer: its ticks, and the timers of the guest's CPUs. How many of these fall together,
/// and so how many interrupts they make, depends on how promptly the (emulated) pCPU runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TimerInterrupts {
    /// Over the windows with traffic.
    pub traffic: u64,
    /// Over the control, scaled to the same time.
    pub control: u64,
}

/// The bystander: a fixed integer loop on every application vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bystander {
    /// Iterations per CPU second of the application pCPUs with traffic, over the same without.
    pub share: f64,
}

/// What a case measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Figures {
    /// Length of all measured windows together.
    pub seconds: Option<f64>,
    /// TCP payload of a stream.
    pub mbps: Option<f64>,
    /// Round trips of a ping-pong.
    pub latency_us: Option<Latency>,
    /// Round trips completed in the windows.
    pub transactions: Option<u64>,
    /// virtio frames in both directions; a frame may hold many TCP segments.
    pub packets: Option<u64>,
    /// TCP payload bytes moved in the windows.
    pub bytes: Option<u64>,
    /// Payload bytes that the receiving end compared with what was sent, over the whole stream (its start and end lie
    /// outside the windows), all of them right.
    pub bytes_verified: Option<u64>,
    /// Notifications that virtio's suppression rule asked for.
    pub completions: Option<u64>,
    /// Kicks that reached the backend.
    pub kicks: Option<u64>,
    /// FIFO counters.
    pub fifo: Fifo,
    /// Who took the NIC's interrupts, as the guest counts.
    pub guest_irqs: Option<GuestIrqs>,
    /// Those of receive queues alone; 0 where one interrupt serves both directions.
    pub receive_irqs: Option<GuestIrqs>,
    /// Those of transmit queues alone. In `poll` mode the guest counts [`Polled::handler_runs`] among them.
    pub transmit_irqs: Option<GuestIrqs>,
    /// Device interrupts that the guest's local APICs accepted, as the host counts.
    pub device_interrupts: Option<u64>,
    /// What the guest module polled; null but in `poll` mode.
    pub polled: Option<Polled>,
    /// Share of the device interrupts that the IVCPU's local APIC accepted, as the host counts.
    pub accepted_by_ivcpu: Option<f64>,
    /// One entry a physical CPU of the host.
    pub pcpus: Vec<Pcpu>,
    /// Sum of all rows.
    pub exits_total: Option<u64>,
    /// KVM's own counter over the same windows.
    pub kvm_exits: Option<u64>,
    /// The application that has nothing to do with the network.
    pub bystander: Option<Bystander>,
    /// CPU seconds of the application pCPUs, without the bystander's part.
    pub application_cpu_seconds: Option<f64>,
    /// CPU seconds of the application pCPUs (without the bystander's part), the IVCPU and the backend for 10^9 bytes.
    pub cpu_seconds_per_gb: Option<f64>,
    /// The same for 1,000 round trips.
    pub cpu_seconds_per_1k_transactions: Option<f64>,
    /// Measured windows.
    pub repeats: Option<u32>,
    /// (largest - smallest) / median of throughput or median latency over the repeats.
    pub spread: Option<f64>,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Some case.
    pub(crate) fn key() -> CaseKey {
        CaseKey {
            vmm: Vmm::IvcpuVmm,
            path: Path::Software,
            backend: Backend::Ivcpu,
            mode: Mode::Irq,
            workload: Workload::TcpOut,
            layout: Layout::Pinned,
            pv_eoi: false,
            queue_pairs: 1,
            poll_us: Some("always".into()),
            ivcpu_poll_us: None,
            halt_poll_us: None,
            with_bystander: true,
        }
    }

    #[test]
    fn unknown_figures_are_null_in_the_file() {
        let case = CaseResult {
            key: key(),
            figures: Figures::default(),
            error: Some("guest never answered".into()),
        };
        let json = serde_json::to_value(&case).unwrap();
        assert_eq!(json["mbps"], serde_json::Value::Null);
        assert_eq!(json["fifo"]["entries"], serde_json::Value::Null);
        assert_eq!(json["error"], "guest never answered");
        assert_eq!(json["workload"], "tcp-out");
    }
}
