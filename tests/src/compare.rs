//! `cargo lab compare`: the matrix of cases, run in as few boots of the emulated host as it can, and their figures.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::emulated_host::{self, EmulatedHost, Input, Options};
use crate::figures::{self, Load};
use crate::image::prepare_guest;
use crate::in_host::measure::{Measured, Plan, measure, positive};
use crate::in_host::{Host, Layout, Setup, Vmm};
use crate::pcpu;
use crate::provision::{Kernel, Provision};
use crate::report;
use crate::result::{
    Backend, CaseKey, CaseResult, Figures, HostFacts, Mode, Path, Ratio, ResultFile, SCHEMA,
};
use crate::traffic::Workload;
use crate::workspace::Workspace;

/// How often one comparison may start a stuck emulated host anew.
const RESTARTS: u32 = 3;
const ALL: [Workload; 3] = [Workload::TcpOut, Workload::TcpIn, Workload::TcpRr];
/// Longer than any window: the IVCPU never sleeps in one.
const NO_SLEEP_US: u64 = 60_000_000;
/// Longer than any gap in the emulated host, also of a vCPU that has next to nothing to do.
const HALT_POLL_US: u64 = 1_000_000;
const STREAMS: [Workload; 2] = [Workload::TcpOut, Workload::TcpIn];

/// What to compare, and how long.
#[derive(Clone, Debug, clap::Args)]
pub struct CompareOptions {
    /// Write the figures to this file, too
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Length of a measured window in seconds
    #[arg(long, default_value_t = 3.0, value_parser = positive)]
    pub seconds: f64,
    /// Windows of each case, and alternations of the side-by-side pair
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    pub windows: u16,
    /// Only these modes
    #[arg(long, value_delimiter = ',')]
    pub modes: Vec<Mode>,
    /// The guest's kernel
    #[arg(long, default_value = "6.12")]
    pub kernel: Kernel,
    /// On this machine itself, which needs VMX or SVM, four CPUs (better five) and root
    #[arg(long)]
    pub native: bool,
}

/// Measures everything and prints it; false when a case failed.
pub fn compare(workspace: &Workspace, options: &CompareOptions) -> anyhow::Result<bool> {
    if let Some(path) = &options.json {
        // Better now than after ten minutes; what is in it stays until there is something better.
        let open = fs::File::options().append(true).create(true).open(path);
        open.with_context(|| format!("writing {}", path.display()))?;
    }
    let provision = Provision::new(workspace);
    provision.tools()?;
    provision.qemu()?;
    provision.make()?;
    let mut place = if options.native {
        workspace.build()?;
        prepare_guest(workspace, &provision, options.kernel)?;
        Place::Native(Box::new(Host::native()?))
    } else {
        Place::emulated(workspace, &provision, options.kernel)?
    };

    let plans = plans(options);
    let mut outcomes = Outcomes::default();
    let begin = Instant::now();
    for (number, plan) in plans.iter().enumerate() {
        eprintln!("lab: {} of {}: {}", number + 1, plans.len(), describe(plan));
        let mut measured = place.measure(plan);
        if let Err(error) = &measured {
            // A guest that the emulator lost is no figure; one that fails twice is.
            eprintln!("lab:   failed, once more: {error:#}");
            measured = place.measure(plan);
        }
        match &measured {
            Ok(measured) => eprintln!("lab:   {}", at_a_glance(plan, measured)),
            Err(error) => eprintln!("lab:   failed: {error:#}"),
        }
        outcomes.add(plan, measured.map_err(|error| format!("{error:#}")));
    }
    eprintln!("lab: measured in {} s", begin.elapsed().as_secs());

    let file = outcomes.into_result(place.facts(workspace));
    place.power_off();
    print!("{}", report::text(&file));
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&file)? + "\n";
        fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(file.complete)
}

/// What runs, in this order: the side-by-side pair in alternation, then the rest.
fn plans(options: &CompareOptions) -> Vec<Plan> {
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
    let mut plans = Vec::new();
    for round in 0..options.windows {
        let pair = if round % 2 == 0 { [&base, &outside] } else { [&outside, &base] };
        plans.extend(pair.map(|setup| plan(setup, &ALL, 1)));
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
    // Two poll threads share the backend's one pCPU: if neither ever slept, each would spin away the other's time.
    let two_pairs = Setup { queue_pairs: 2, poll_us: Some("50".into()), ..irq.clone() };
    plans.push(plan(&two_pairs, &STREAMS, options.windows));
    let without_pv_eoi = Setup { pv_eoi: false, ..irq };
    plans.push(plan(&without_pv_eoi, &ALL, options.windows));
    // The paper's backend was the NIC; ours shares the wire's pCPU here and must let it run.
    let paper = Setup { layout: Layout::Paper, poll_us: Some("50".into()), ..without_pv_eoi };
    plans.push(plan(&Setup { mode: Mode::Stock, ..paper.clone() }, &STREAMS, options.windows));
    plans.push(plan(&paper, &STREAMS, options.windows));
    plans.retain(|plan| options.modes.is_empty() || options.modes.contains(&plan.setup.mode));
    plans
}

fn key(plan: &Plan, workload: Workload) -> CaseKey {
    let setup = &plan.setup;
    CaseKey {
        vmm: setup.vmm,
        path: Path::Software,
        backend: setup.backend,
        mode: setup.mode,
        workload,
        layout: setup.layout,
        pv_eoi: setup.pv_eoi,
        queue_pairs: setup.queue_pairs,
        poll_us: setup.poll_us.clone(),
        ivcpu_poll_us: setup.ivcpu_poll_us,
        halt_poll_us: setup.halt_poll_us,
        with_bystander: plan.with_bystander,
    }
}

fn describe(plan: &Plan) -> String {
    let key = key(plan, Workload::TcpOut).to_string();
    key.replace("/tcp-out/", "/")
}

fn at_a_glance(plan: &Plan, measured: &Measured) -> String {
    let figures = plan.workloads.iter().zip(&measured.workloads).filter_map(|(workload, load)| {
        let rate = crate::statistics::median(&load.rates())?;
        Some(match workload {
            Workload::TcpOut => format!("out {rate:.0} Mbit/s"),
            Workload::TcpIn => format!("in {rate:.0} Mbit/s"),
            Workload::TcpRr => format!("ping-pong {rate:.0} us"),
        })
    });
    figures.collect::<Vec<_>>().join(", ")
}

/// Where the guests run.
enum Place<'a> {
    Native(Box<Host>),
    Emulated {
        workspace: &'a Workspace,
        provision: &'a Provision,
        host: Option<Box<EmulatedHost>>,
        kernel: String,
        restarts: u32,
    },
}

impl<'a> Place<'a> {
    fn emulated(workspace: &'a Workspace, provision: &'a Provision, guest: Kernel) -> anyhow::Result<Self> {
        let host = EmulatedHost::build_and_boot(workspace, provision, &[guest], &Options::default())?;
        let kernel = host.kernel().to_owned();
        Ok(Self::Emulated { workspace, provision, host: Some(Box::new(host)), kernel, restarts: 0 })
    }

    /// One plan, whole. A host that gets stuck is started anew and the plan measured from its beginning.
    fn measure(&mut self, plan: &Plan) -> anyhow::Result<Measured> {
        let Self::Emulated { workspace, provision, host, restarts, .. } = self else {
            let Self::Native(host) = self else { bail!("no host") };
            return measure(host, plan);
        };
        loop {
            let mut running = match host.take() {
                Some(running) => running,
                None => Box::new(EmulatedHost::boot(workspace, provision, &Options::default())?),
            };
            match measure_inside(&mut running, plan) {
                Ok(outcome) => {
                    *host = Some(running);
                    return outcome;
                }
                Err(error) if *restarts < RESTARTS => {
                    *restarts += 1;
                    eprintln!("lab:   {error}: starting the emulated host anew ({restarts} of {RESTARTS})");
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn facts(&self, workspace: &Workspace) -> HostFacts {
        let qemu = Command::new(workspace.launchers().join("qemu-system-x86_64")).arg("--version").output();
        let qemu = qemu.ok().and_then(|output| {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.lines().next().map(|line| line.trim_start_matches("QEMU emulator version ").to_owned())
        });
        match self {
            Self::Native(_) => HostFacts {
                cpus: std::thread::available_parallelism().map_or(pcpu::COUNT, usize::from),
                emulated: false,
                kernel: nix::sys::utsname::uname()
                    .map(|name| name.release().to_string_lossy().into_owned())
                    .unwrap_or_default(),
                qemu,
            },
            Self::Emulated { kernel, .. } => {
                HostFacts { cpus: pcpu::COUNT, emulated: true, kernel: kernel.clone(), qemu }
            }
        }
    }

    fn power_off(self) {
        if let Self::Emulated { host: Some(host), .. } = self
            && let Err(error) = host.power_off()
        {
            eprintln!("lab: powering the emulated host off: {error}");
        }
    }
}

/// Runs `measure` as a command of the emulated host. The outer error means that the host is of no use any more.
fn measure_inside(
    host: &mut EmulatedHost,
    plan: &Plan,
) -> Result<anyhow::Result<Measured>, emulated_host::Error> {
    let run = host.command(["ivcpu-lab".to_owned(), "measure".to_owned()].into_iter().chain(plan.words()));
    let windows = (1 + plan.workloads.len()) * plan.windows;
    let waiting = if plan.entries.is_some() { 120.0 * plan.workloads.len() as f64 } else { 0.0 };
    let deadline = Duration::from_secs_f64(120.0 + waiting + windows as f64 * (plan.seconds * 3.0 + 10.0));
    let (mut output, mut errors) = (Vec::new(), Vec::new());
    let status = host.run(&run, Input::Empty, Some(deadline), |error, bytes| {
        if error { &mut errors } else { &mut output }.extend_from_slice(bytes);
    })?;
    let errors = String::from_utf8_lossy(&errors);
    if status != 0 {
        let last = errors.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message");
        return Ok(Err(anyhow::anyhow!("{last} (logs: {})", host.share().display())));
    }
    Ok(serde_json::from_slice(&output).context("reading what the scenario measured"))
}

/// What came out of the plans so far; plans of one setup add up.
#[derive(Default)]
struct Outcomes {
    setups: Vec<(Plan, Result<Measured, String>)>,
}

impl Outcomes {
    fn add(&mut self, plan: &Plan, outcome: Result<Measured, String>) {
        let same = |known: &Plan| known.setup == plan.setup && known.with_bystander == plan.with_bystander;
        match (self.setups.iter_mut().find(|(known, _)| same(known)), outcome) {
            (None, outcome) => self.setups.push((plan.clone(), outcome)),
            (Some((_, Ok(sum))), Ok(more)) => {
                sum.control.extend(more.control);
                sum.workloads.iter_mut().zip(more.workloads).for_each(|(sum, more)| sum.extend(more));
            }
            (Some((_, known)), Err(error)) => *known = Err(error),
            (Some((_, Err(_))), Ok(_)) => {}
        }
    }

    fn into_result(self, host: HostFacts) -> ResultFile {
        let ratios = self.ratios();
        let mut cases = Vec::new();
        for (plan, outcome) in &self.setups {
            for (index, workload) in plan.workloads.iter().enumerate() {
                let (figures, error) = match outcome {
                    Ok(measured) => {
                        let load = measured.workloads.get(index).cloned().unwrap_or_default();
                        (figures::of_load(&load, &measured.control, &measured.roles), None)
                    }
                    Err(error) => (Figures::default(), Some(error.clone())),
                };
                cases.push(CaseResult { key: key(plan, *workload), figures, error });
            }
        }
        ResultFile {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            host,
            complete: cases.iter().all(|case| case.error.is_none()),
            cases,
            ratios,
        }
    }

    fn load(&self, wanted: impl Fn(&Setup) -> bool, workload: Workload) -> Option<(CaseKey, &Load)> {
        let (plan, outcome) =
            self.setups.iter().find(|(plan, _)| plan.with_bystander && wanted(&plan.setup))?;
        let index = plan.workloads.iter().position(|w| *w == workload)?;
        Some((key(plan, workload), outcome.as_ref().ok()?.workloads.get(index)?))
    }

    /// Ours over the kernel's vhost-net under stock QEMU, nobody spinning; then each use of the IVCPU over stock
    /// interrupts.
    fn ratios(&self) -> Vec<Ratio> {
        let ours = |mode: Mode, poll: &'static str| {
            move |setup: &Setup| {
                let Setup { backend, layout, pv_eoi, queue_pairs, poll_us, .. } = setup;
                (*backend, setup.mode, *layout, *pv_eoi, *queue_pairs, poll_us.as_deref())
                    == (Backend::Ivcpu, mode, Layout::Pinned, true, 1, Some(poll))
            }
        };
        let outside = |setup: &Setup| setup.backend == Backend::VhostNet;
        let mut ratios = Vec::new();
        for workload in ALL {
            let what = match workload {
                Workload::TcpRr => "median round trip",
                Workload::TcpOut | Workload::TcpIn => "throughput",
            };
            let in_turn = format!("{what}, measured one after the other");
            let mut pair = |what: &str, of: Option<(CaseKey, &Load)>, to: Option<(CaseKey, &Load)>| {
                if let (Some(of), Some(to)) = (of, to) {
                    ratios.extend(Ratio::of_pairs(what, (&of.0, &of.1.rates()), (&to.0, &to.1.rates())));
                }
            };
            let alternating = format!("{what}, in alternation");
            pair(&alternating, self.load(ours(Mode::Stock, "0"), workload), self.load(outside, workload));
            for mode in [Mode::Irq, Mode::ThreadedNapi, Mode::Fifo] {
                pair(
                    &in_turn,
                    self.load(ours(mode, "always"), workload),
                    self.load(ours(Mode::Stock, "always"), workload),
                );
            }
        }
        ratios
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::Window;

    fn options() -> CompareOptions {
        CompareOptions {
            json: None,
            seconds: 1.0,
            windows: 3,
            modes: vec![],
            kernel: Kernel::V6_12,
            native: false,
        }
    }

    fn measured(plan: &Plan, bytes: u64) -> Measured {
        let window = Window { seconds: 1.0, bytes, ..Window::default() };
        let load = Load { windows: vec![window; plan.windows], bytes_verified: Some(bytes) };
        Measured { roles: vec![], control: load.clone(), workloads: vec![load; plan.workloads.len()] }
    }

    fn facts() -> HostFacts {
        HostFacts { cpus: 5, emulated: true, kernel: "6.12".into(), qemu: None }
    }

    #[test]
    fn every_case_has_as_many_windows_and_its_own_key() {
        let mut outcomes = Outcomes::default();
        for plan in plans(&options()) {
            let measured = measured(&plan, 1000);
            outcomes.add(&plan, Ok(measured));
        }
        let file = outcomes.into_result(facts());
        assert!(file.complete);
        let mut keys: Vec<_> = file.cases.iter().map(|case| case.key.to_string()).collect();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), file.cases.len());
        let repeats = |case: &CaseResult| case.figures.repeats == Some(3);
        assert!(file.cases.iter().all(repeats), "{file:?}");
        assert_eq!(file.ratios.len(), 12);
    }

    #[test]
    fn only_the_modes_asked_for_are_measured() {
        let modes = vec![Mode::Fifo];
        let plans = plans(&CompareOptions { modes, ..options() });
        assert!(!plans.is_empty() && plans.iter().all(|plan| plan.setup.mode == Mode::Fifo));
    }

    #[test]
    fn a_failed_plan_makes_the_file_incomplete_and_no_ratio() {
        let mut outcomes = Outcomes::default();
        let plans = plans(&options());
        outcomes.add(&plans[0], Ok(measured(&plans[0], 1000)));
        outcomes.add(&plans[1], Ok(measured(&plans[1], 500)));
        outcomes.add(&plans[2], Err("the guest did not come up".into()));
        let file = outcomes.into_result(facts());
        assert!(!file.complete);
        assert!(file.ratios.is_empty());
        assert_eq!(file.cases.iter().filter(|case| case.error.is_some()).count(), 3);
    }
}
