//! Which cases are compared, and in which order.

use crate::compare::CompareOptions;
use crate::in_host::plan::Plan;
use crate::in_host::{Layout, Setup, Vmm};
use crate::report;
use crate::result::{Backend, Mode, Path};
use crate::traffic::Workload;

/// Every workload.
pub(crate) const ALL: [Workload; 3] = [Workload::TcpOut, Workload::TcpIn, Workload::TcpRr];
/// Longer than any window: the IVCPU never sleeps in one.
const NO_SLEEP_US: u64 = 60_000_000;
/// Longer than any gap in the emulated host, also of a vCPU that has next to nothing to do.
const HALT_POLL_US: u64 = 1_000_000;
const STREAMS: [Workload; 2] = [Workload::TcpOut, Workload::TcpIn];

/// What runs, in this order: the side-by-side pair in alternation, then the rest.
pub(crate) fn plans(options: &CompareOptions) -> Vec<Plan> {
    let base =
        Setup { mode: Mode::Stock, poll_us: Some("0".into()), kernel: options.kernel, ..Setup::default() };
    let spinning = Setup { poll_us: Some("always".into()), ..base.clone() };
    let irq = Setup { mode: Mode::Irq, ..spinning.clone() };
    let outside = Setup { vmm: Vmm::Qemu, backend: Backend::VhostNet, poll_us: None, ..base.clone() };
    let plan = |setup: &Setup, workloads: &[Workload], windows: u16| Plan {
        setup: setup.clone(),
        workloads: workloads.to_vec(),
        windows: windows.into(),
        seconds: options.seconds,
        entries: None,
        with_bystander: true,
    };
    let in_alternation = |one: &Setup, other: &Setup| -> Vec<Plan> {
        let order = |round| if round % 2 == 0 { [one, other] } else { [other, one] };
        (0..options.windows).flat_map(order).map(|setup| plan(setup, &ALL, 1)).collect()
    };
    let mut plans = in_alternation(&base, &outside);
    // VMMs by others, our backend.
    for vmm in [Vmm::Qemu, Vmm::Alioth] {
        plans.push(plan(&Setup { vmm, ..base.clone() }, &ALL, options.windows));
    }
    plans.push(plan(&spinning, &ALL, options.windows));
    plans.push(plan(&irq, &ALL, options.windows));
    plans.push(plan(&Setup { mode: Mode::ThreadedNapi, ..irq.clone() }, &ALL, options.windows));
    // Spinning without end, so that the control spins too.
    let fifo = Setup { mode: Mode::Fifo, ivcpu_poll_us: Some(NO_SLEEP_US), ..irq.clone() };
    plans.push(plan(&fifo, &ALL, options.windows));
    // As users run it: asleep when there is nothing to do.
    plans.push(plan(&Setup { ivcpu_poll_us: None, ..fifo.clone() }, &ALL, options.windows));
    // Exits alone: no bystander that an IPI could interrupt, so each IPI that is left wakes a halted vCPU.
    let alone = |setup: &Setup| Plan { with_bystander: false, ..plan(setup, &ALL, options.windows) };
    plans.push(alone(&irq));
    let enough = |setup: &Setup| Plan { entries: Some(report::ENOUGH_ENTRIES), ..alone(setup) };
    plans.push(enough(&fifo));
    plans.push(enough(&Setup { halt_poll_us: Some(HALT_POLL_US), ..fifo.clone() }));
    plans.push(enough(&Setup { vmm: Vmm::Qemu, ..fifo }));
    // The paper's own experiment: a virtual function, under stock QEMU in alternation with ours, then with the IVCPU.
    let vf = Setup { backend: Backend::Vfio, poll_us: None, ..base.clone() };
    plans.extend(in_alternation(&vf, &Setup { vmm: Vmm::Qemu, ..vf.clone() }));
    plans.push(plan(&Setup { mode: Mode::Irq, ..vf.clone() }, &ALL, options.windows));
    let polled = Setup { mode: Mode::Poll, ivcpu_poll_us: Some(NO_SLEEP_US), ..vf.clone() };
    plans.push(plan(&polled, &ALL, options.windows));
    // Exits alone, and with PV EOI off: the paper's shape.
    let vf_without_pv_eoi = Setup { mode: Mode::Irq, pv_eoi: false, ..vf };
    plans.push(alone(&vf_without_pv_eoi));
    plans.push(enough(&polled));
    // Two poll threads share the backend's one pCPU: if neither ever slept, each would spin away the other's time.
    let two_pairs = Setup { queue_pairs: 2, poll_us: Some("50".into()), ..irq.clone() };
    plans.push(plan(&two_pairs, &STREAMS, options.windows));
    let without_pv_eoi = Setup { pv_eoi: false, ..irq };
    plans.push(plan(&without_pv_eoi, &ALL, options.windows));
    // The paper's backend was the NIC; ours shares the wire's pCPU here and must let it run.
    let paper = Setup { layout: Layout::Paper, poll_us: Some("50".into()), ..without_pv_eoi };
    plans.push(plan(&Setup { mode: Mode::Stock, ..paper.clone() }, &STREAMS, options.windows));
    plans.push(plan(&paper, &STREAMS, options.windows));
    plans.retain(|plan| {
        let (mode, path) = (plan.setup.mode, plan.setup.backend.path());
        // Natively nobody has said which NIC may be taken, and where its cable ends.
        (!options.native || path == Path::Software)
            && (options.modes.is_empty() || options.modes.contains(&mode))
            && (options.paths.is_empty() || options.paths.contains(&path))
    });
    plans
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::provision::Kernel;

    /// Three windows of every mode.
    pub(crate) fn options() -> CompareOptions {
        CompareOptions {
            json: None,
            html: None,
            seconds: 1.0,
            windows: 3,
            modes: vec![],
            paths: vec![],
            kernel: Kernel::V6_12,
            native: false,
        }
    }

    #[test]
    fn every_base_is_there_and_natively_no_nic_is_taken() {
        let bases = |options: &CompareOptions| {
            let plans = plans(options);
            let stock = plans.iter().filter(|plan| plan.setup.mode == Mode::Stock);
            stock.map(|plan| (plan.setup.vmm, plan.setup.backend)).collect::<Vec<_>>()
        };
        let all = bases(&options());
        for base in [
            (Vmm::IvcpuVmm, Backend::Ivcpu),
            (Vmm::IvcpuVmm, Backend::Vfio),
            (Vmm::Qemu, Backend::VhostNet),
            (Vmm::Qemu, Backend::Ivcpu),
            (Vmm::Qemu, Backend::Vfio),
            (Vmm::Alioth, Backend::Ivcpu),
        ] {
            assert!(all.contains(&base), "{base:?}");
        }
        let native = bases(&CompareOptions { native: true, ..options() });
        assert!(!native.is_empty() && native.iter().all(|(_, backend)| *backend != Backend::Vfio));
    }

    #[test]
    fn only_the_modes_and_paths_asked_for_are_measured() {
        let (modes, paths) = (vec![Mode::Irq], vec![Path::Sriov]);
        let plans = plans(&CompareOptions { modes, paths, ..options() });
        let asked_for = |setup: &Setup| (setup.mode, setup.backend) == (Mode::Irq, Backend::Vfio);
        assert!(!plans.is_empty() && plans.iter().all(|plan| asked_for(&plan.setup)));
    }
}
