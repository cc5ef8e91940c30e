//! What to measure, as the command line of `ivcpu-lab measure` says it.

use super::{Host, Setup};
use crate::result::word;
use crate::traffic::Workload;

/// What to measure.
#[derive(Clone, Debug, clap::Args)]
pub struct Plan {
    /// What to boot.
    #[command(flatten)]
    pub setup: Setup,
    /// What flows, one after the other
    #[arg(long, value_delimiter = ',', default_value = "tcp-out,tcp-in,tcp-rr")]
    pub workloads: Vec<Workload>,
    /// Windows of each workload, and of the control
    #[arg(long, default_value_t = 1)]
    pub windows: usize,
    /// Length of a window in seconds
    #[arg(long, default_value_t = 3.0, value_parser = positive)]
    pub seconds: f64,
    /// Instead of that, one window of each workload that ends with so many FIFO entries, in `poll` mode so many frames
    /// (or after 90 seconds)
    #[arg(long)]
    pub entries: Option<u64>,
    /// Whether the bystander runs beside the traffic; it always does in the control
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub with_bystander: bool,
}

/// Parses a number of seconds above 0.
pub fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds.is_finite() && seconds > 0.0 => Ok(seconds),
        _ => Err("a number of seconds above 0".into()),
    }
}

impl Plan {
    /// Whether something outside the guest takes what it leaves of the application's pCPUs while traffic flows. (Idle
    /// vCPUs that poll leave nothing.)
    pub(super) fn fills_idle_pcpus(&self, host: &Host) -> bool {
        host.is_emulated() && !self.with_bystander && self.setup.halt_poll_us.is_none()
    }

    /// The words that make `ivcpu-lab measure` carry the plan out.
    pub fn words(&self) -> Vec<String> {
        let Self { setup, workloads, windows, seconds, entries, with_bystander } = self;
        let workloads: Vec<_> = workloads.iter().map(|workload| word(*workload)).collect();
        let mut words = vec![
            format!("--vmm={}", word(setup.vmm)),
            format!("--backend={}", word(setup.backend)),
            format!("--mode={}", word(setup.mode)),
            format!("--carrier={}", word(setup.carrier)),
            format!("--layout={}", word(setup.layout)),
            format!("--pv-eoi={}", setup.pv_eoi),
            format!("--queue-pairs={}", setup.queue_pairs),
            format!("--kernel={}", word(setup.kernel)),
            format!("--workloads={}", workloads.join(",")),
            format!("--windows={windows}"),
            format!("--seconds={seconds}"),
            format!("--with-bystander={with_bystander}"),
        ];
        words.extend(entries.iter().map(|entries| format!("--entries={entries}")));
        words.extend(setup.poll_us.iter().map(|us| format!("--poll-us={us}")));
        words.extend(setup.ivcpu_poll_us.iter().map(|us| format!("--ivcpu-poll-us={us}")));
        words.extend(setup.fifo_option.iter().map(|option| format!("--fifo-option={option}")));
        words.extend(setup.without_module.then(|| "--without-module".to_owned()));
        words.extend(setup.with_function.then(|| "--with-function".to_owned()));
        words.extend(setup.halt_poll_us.iter().map(|us| format!("--halt-poll-us={us}")));
        words
    }
}
