//! Short names of cases for people; the whole key stands beside them.

use crate::in_host::Layout;
use crate::result::{Backend, CaseKey, word};

/// What tells a case from the others of its workload.
pub(super) fn label(key: &CaseKey) -> String {
    let nic = match key.backend {
        Backend::Vfio => "SR-IOV".to_owned(),
        Backend::Ivcpu => "ivcpu-backend".to_owned(),
        other => other.to_string(),
    };
    let mut words = vec![word(key.vmm), nic, key.mode.to_string()];
    if key.layout != Layout::Pinned {
        words.push(format!("{} layout", word(key.layout)));
    }
    if !key.pv_eoi {
        words.push("no PV EOI".into());
    }
    if key.queue_pairs != 1 {
        words.push(format!("{} queue pairs", key.queue_pairs));
    }
    match key.poll_us.as_deref() {
        None => {}
        Some("always") => words.push("backend spins".into()),
        Some("0") => words.push("backend never spins".into()),
        Some(us) => words.push(format!("backend spins {us} us")),
    }
    words.extend(key.ivcpu_poll_us.map(|us| format!("IVCPU polls {}", time(us))));
    words.extend(key.halt_poll_us.map(|us| format!("idle vCPUs poll {}", time(us))));
    if !key.with_bystander {
        words.push("no bystander".into());
    }
    words.join(" · ")
}

fn time(us: u64) -> String {
    if us >= 1_000_000 && us.is_multiple_of(1_000_000) {
        format!("{} s", us / 1_000_000)
    } else {
        format!("{us} us")
    }
}
