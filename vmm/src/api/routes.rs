//! The paths of the API, and what they do to the VM.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;

use super::http::{Answer, Method};
use super::info::VmConfig;
use crate::chain::Chain;
use crate::exits::lifetime::Lifetime;
use crate::exits::{self, Counters, Row, VcpuStats};
use crate::pause::{self, Pause};
use crate::power::{EndSignal, Ending, PowerButton};

/// How long vCPUs may take to leave the guest for a pause, and then the devices to come to rest.
const PAUSE_WITHIN: Duration = Duration::from_secs(5);

/// What the API holds of the VM.
pub struct Control {
    /// The VM as it was asked for.
    pub config: VmConfig,
    /// Bytes of RAM.
    pub memory: u64,
    /// How the VM is paused.
    pub pause: Pause,
    /// How the VM is ended.
    pub end: Arc<EndSignal>,
    /// The guest's power button.
    pub button: PowerButton,
    /// KVM's counters by the vCPUs' names; none on a kernel before 5.14.
    pub counters: BTreeMap<String, VcpuStats>,
    /// The exits by pCPU and row, with `--exits`, until the VM's end. One reads at a time: the kernel knows one reader a file.
    pub exits: Arc<Mutex<Option<Lifetime>>>,
    /// Whether the VM's end was asked for.
    pub shutdown: AtomicBool,
}

#[derive(Serialize)]
struct Ping {
    build_version: &'static str,
    version: &'static str,
    pid: u32,
    features: [&'static str; 1],
}

#[derive(Serialize)]
struct Info<'a> {
    config: &'a VmConfig,
    state: &'static str,
    memory_actual_size: u64,
}

impl Control {
    /// Does what has to wait until the peer has its answer: the process may be gone a moment later.
    pub fn answered(&self) {
        if self.shutdown.load(Ordering::SeqCst) {
            self.end.give(Ending::Asked);
        }
    }

    /// KVM's counters of `vcpu0` and so on, and those of `pcpu3` and so on by the rows of the exit table.
    fn counters(&self) -> Result<BTreeMap<String, Counters>, exits::Error> {
        let of_vcpus = self.counters.iter().map(|(name, stats)| (name.clone(), stats.counters()));
        let exits = self.exits.lock().unwrap_or_else(PoisonError::into_inner);
        let pcpus = exits.as_ref().map(Lifetime::pcpus).transpose()?.flatten();
        let of_pcpus = pcpus.into_iter().flatten().map(|(pcpu, rows)| {
            let counters = Row::ALL.map(|row| (row.name().to_owned(), rows.count(row)));
            (format!("pcpu{pcpu}"), counters.into())
        });
        Ok(of_vcpus.chain(of_pcpus).collect())
    }

    /// Does what a request asks for.
    pub fn answer(&self, method: Method, path: &str) -> Answer {
        use Method::{Get, Put};
        let Some(name) = path.strip_prefix("/api/v1/") else { return not_found(path) };
        match (method, name) {
            (Get, "vmm.ping") => Answer::json(&Ping {
                build_version: concat!("v", env!("CARGO_PKG_VERSION")),
                version: env!("CARGO_PKG_VERSION"),
                pid: std::process::id(),
                features: ["kvm"],
            }),
            (Get, "vm.info") => Answer::json(&Info {
                config: &self.config,
                state: if self.pause.is_paused() { "Paused" } else { "Running" },
                memory_actual_size: self.memory,
            }),
            (Get, "vm.counters") => match self.counters() {
                Ok(counters) => Answer::json(&counters),
                Err(error) => Answer::error(500, &format!("cannot count exits: {}", Chain(&error))),
            },
            // The VM's end is the VMM's here.
            (Put, "vm.shutdown" | "vmm.shutdown") => {
                self.shutdown.store(true, Ordering::SeqCst);
                Answer::done()
            }
            (Put, "vm.power-button") => match self.button.press() {
                Ok(()) => Answer::done(),
                Err(error) => Answer::error(500, &format!("cannot press the power button: {error}")),
            },
            (Put, "vm.pause") => changed(self.pause.pause(PAUSE_WITHIN)),
            (Put, "vm.resume") => changed(self.pause.resume()),
            (Put, "vmm.ping" | "vm.info" | "vm.counters") => {
                Answer::error(405, &format!("GET {path}, not PUT"))
            }
            (Get, "vm.shutdown" | "vmm.shutdown" | "vm.power-button" | "vm.pause" | "vm.resume") => {
                Answer::error(405, &format!("PUT {path}, not GET"))
            }
            _ => not_found(path),
        }
    }
}

fn not_found(path: &str) -> Answer {
    // The path is the peer's; the end of a long one says nothing more.
    let path: String = path.chars().take(80).collect();
    Answer::error(404, &format!("this API has no {path}"))
}

/// As Cloud Hypervisor's description of its API has it: 405 for a VM that is not in the state for it.
fn changed(result: Result<(), pause::Error>) -> Answer {
    match result {
        Ok(()) => Answer::done(),
        Err(error @ (pause::Error::Stuck { .. } | pause::Error::Busy { .. })) => {
            Answer::error(500, &error.to_string())
        }
        Err(error) => Answer::error(405, &error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;
    use crate::machine::MachineOptions;

    fn control() -> Control {
        let words = ["ivcpu-vmm", "--kernel", "/k", "--memory", "size=64M", "--ivcpu", "affinity=[3]"];
        let options: MachineOptions = Cli::try_parse_from(words).unwrap().run.unwrap().into();
        Control {
            config: (&options).into(),
            memory: options.memory.size,
            pause: Pause::new(Arc::default(), Vec::new()),
            end: Arc::new(EndSignal::new().unwrap()),
            button: PowerButton::new().unwrap(),
            counters: BTreeMap::new(),
            exits: Arc::default(),
            shutdown: AtomicBool::new(false),
        }
    }

    fn json(answer: &Answer) -> serde_json::Value {
        serde_json::from_str(&answer.body).unwrap()
    }

    #[test]
    fn a_vm_is_described_as_it_was_asked_for() {
        let answer = control().answer(Method::Get, "/api/v1/vm.info");
        assert_eq!(answer.status, 200);
        let info = json(&answer);
        assert_eq!(info["state"], "Running");
        assert_eq!(info["memory_actual_size"], 64 << 20);
        assert_eq!(info["config"]["payload"]["kernel"], "/k");
        assert_eq!(info["config"]["cpus"]["boot_vcpus"], 1);
        assert_eq!(info["config"]["ivcpu"]["affinity"][0], 3);
    }

    #[test]
    fn a_pause_is_seen_and_neither_it_nor_its_end_happens_twice() {
        let control = control();
        let put = |name: &str| control.answer(Method::Put, &format!("/api/v1/{name}"));
        assert_eq!(put("vm.resume").status, 405);
        assert_eq!(put("vm.pause"), Answer::done());
        assert_eq!(json(&control.answer(Method::Get, "/api/v1/vm.info"))["state"], "Paused");
        let again = put("vm.pause");
        assert_eq!((again.status, json(&again)[0].as_str().unwrap().contains("paused already")), (405, true));
        assert_eq!(put("vm.resume"), Answer::done());
    }

    #[test]
    fn a_shutdown_ends_the_vm_in_order() {
        let control = control();
        assert_eq!(control.answer(Method::Put, "/api/v1/vm.shutdown"), Answer::done());
        assert_eq!(control.end.ending(), None, "not before the answer is out");
        control.answered();
        assert_eq!(control.end.ending(), Some(Ending::Asked));
    }

    #[test]
    fn unknown_paths_and_wrong_methods_are_told_apart() {
        let control = control();
        for (method, path, status) in [
            (Method::Get, "/api/v1/vmm.ping", 200),
            (Method::Put, "/api/v1/vmm.ping", 405),
            (Method::Get, "/api/v1/vm.pause", 405),
            (Method::Put, "/api/v1/vm.explode", 404),
            (Method::Get, "/", 404),
        ] {
            assert_eq!(control.answer(method, path).status, status, "{path}");
        }
    }
}
