//! `cargo lab compare`: the matrix of cases, run in as few boots of the emulated host as it can, and their figures.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::emulated_host::{self, EmulatedHost, Input, Options};
use crate::figures::{self, Load};
use crate::html;
use crate::image::prepare_guest;
use crate::in_host::measure::{Measured, measure};
use crate::in_host::plan::{Plan, positive};
use crate::in_host::{Host, Layout, Setup, Vmm};
use crate::matrix::{ALL, plans};
use crate::pcpu;
use crate::progress::{self, Matrix};
use crate::provision::{Kernel, Provision};
use crate::ratio::Ratio;
use crate::report;
use crate::result::{Backend, CaseKey, CaseResult, Figures, HostFacts, Mode, Path, ResultFile, SCHEMA};
use crate::traffic::Workload;
use crate::workspace::Workspace;

/// How often a case that failed is measured again.
const AGAIN: u32 = 2;
/// How often one comparison may start a stuck emulated host anew.
const RESTARTS: u32 = 3;

/// What to compare, and how long.
#[derive(Clone, Debug, clap::Args)]
pub struct CompareOptions {
    /// Write the figures to this file, too
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write a page with charts to this file, too
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Length of a measured window in seconds
    #[arg(long, default_value_t = 2.0, value_parser = positive)]
    pub seconds: f64,
    /// Windows of each case, and alternations of the side-by-side pair
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    pub windows: u16,
    /// Only these modes
    #[arg(long, value_delimiter = ',')]
    pub modes: Vec<Mode>,
    /// Only these paths
    #[arg(long, value_delimiter = ',')]
    pub paths: Vec<Path>,
    /// The guest's kernel
    #[arg(long, default_value = "6.12")]
    pub kernel: Kernel,
    /// On this machine itself, which needs VMX or SVM, four CPUs (better five) and root
    #[arg(long)]
    pub native: bool,
}

/// Measures everything and prints it; false when a case failed.
pub fn compare(workspace: &Workspace, options: &CompareOptions) -> anyhow::Result<bool> {
    for path in options.json.iter().chain(&options.html) {
        // Better now than after ten minutes; what is in it stays until there is something better.
        let open = fs::File::options().append(true).create(true).open(path);
        open.with_context(|| format!("writing {}", path.display()))?;
    }
    let provision = Provision::new(workspace);
    provision.tools()?;
    provision.qemu()?;
    provision.make()?;
    let plans = plans(options);
    if plans.iter().any(|plan| plan.setup.vmm == Vmm::Alioth) {
        provision.alioth()?;
    }
    let mut place = if options.native {
        workspace.build()?;
        prepare_guest(workspace, &provision, options.kernel)?;
        Place::Native(Box::new(Host::native()?))
    } else {
        Place::emulated(workspace, &provision, options.kernel)?
    };

    let mut outcomes = Outcomes::default();
    let begin = Instant::now();
    let matrix = Matrix::start(plans.len());
    for plan in &plans {
        matrix.next(&describe(plan));
        let mut measured = place.measure(plan);
        for _ in 0..AGAIN {
            // A guest that the emulator lost is no figure; one that always fails is.
            let Err(error) = &measured else { break };
            progress::line(&format!("lab:   failed, once more: {error:#}"));
            measured = place.measure(plan);
        }
        match &measured {
            Ok(measured) => progress::line(&format!("lab:   {}", at_a_glance(plan, measured))),
            Err(error) => progress::line(&format!("lab:   failed: {error:#}")),
        }
        outcomes.add(plan, measured.map_err(|error| format!("{error:#}")));
        matrix.done();
    }
    matrix.finish();
    eprintln!("lab: measured in {} s", begin.elapsed().as_secs());

    let file = outcomes.into_result(place.facts(workspace));
    place.power_off();
    print!("{}", report::text(&file));
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&file)? + "\n";
        fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = &options.html {
        html::write(&file, path)?;
    }
    Ok(file.complete)
}

fn key(plan: &Plan, workload: Workload) -> CaseKey {
    let setup = &plan.setup;
    CaseKey {
        vmm: setup.vmm,
        path: setup.backend.path(),
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
                    // After a failure the far end of the cable may still be held by what was left behind.
                    *host = outcome.is_ok().then_some(running);
                    return outcome;
                }
                Err(error) if *restarts < RESTARTS => {
                    *restarts += 1;
                    progress::line(&format!(
                        "lab:   {error}: starting the emulated host anew ({restarts} of {RESTARTS})"
                    ));
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
        let passed_through = |vmm: Vmm, mode: Mode| {
            move |setup: &Setup| (setup.backend, setup.vmm, setup.mode) == (Backend::Vfio, vmm, mode)
        };
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
            let stock = self.load(passed_through(Vmm::IvcpuVmm, Mode::Stock), workload);
            pair(&alternating, stock.clone(), self.load(passed_through(Vmm::Qemu, Mode::Stock), workload));
            let [irq, poll] =
                [Mode::Irq, Mode::Poll].map(|mode| self.load(passed_through(Vmm::IvcpuVmm, mode), workload));
            pair(&in_turn, irq.clone(), stock.clone());
            pair(&in_turn, poll.clone(), stock);
            pair(&in_turn, poll, irq);
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
    use crate::matrix::tests::options;

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
        assert_eq!(file.ratios.len(), 24);
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
