//! Reads what tracefs prints for a `hist` trigger.
//!
//! ```text
//! # trigger info: hist:keys=common_cpu,exit_reason,isa:vals=hitcount:sort=hitcount:size=2048 [active]
//! { common_cpu:          0, exit_reason:        123, isa:          2 } hitcount:      11003
//! Totals:
//!     Hits: 57284
//!     Entries: 65
//!     Dropped: 0
//! ```

use std::collections::BTreeMap;

/// A histogram: how often each combination of key values was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Hist {
    /// Hits by the values of the keys, in the order they were asked for.
    pub(super) counts: BTreeMap<Vec<u64>, u64>,
    /// Events that found no room: with any of these the counts are no longer exact.
    pub(super) dropped: u64,
}

/// A line that is not what a `hist` file holds.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("unexpected line {line:?} in a hist file")]
pub struct HistError {
    line: String,
}

impl Hist {
    /// Reads the text of a `hist` file whose trigger has the keys `keys`.
    pub(super) fn parse(text: &str, keys: &[&str]) -> Result<Hist, HistError> {
        let mut hist = Hist::default();
        for line in text.lines().map(str::trim) {
            let bad = || HistError { line: line.to_owned() };
            if let Some(entry) = line.strip_prefix('{') {
                let (values, count) = parse_entry(entry, keys).ok_or_else(bad)?;
                *hist.counts.entry(values).or_insert(0) += count;
            } else if let Some(dropped) = line.strip_prefix("Dropped:") {
                hist.dropped = dropped.trim().parse().map_err(|_| bad())?;
            }
        }
        Ok(hist)
    }
}

/// `a: 1, b: 2 } hitcount: 3` with the keys `a`, `b` gives ([1, 2], 3).
fn parse_entry(entry: &str, keys: &[&str]) -> Option<(Vec<u64>, u64)> {
    let (fields, hits) = entry.split_once('}')?;
    let count = hits.trim().strip_prefix("hitcount:")?.trim().parse().ok()?;
    let values = fields
        .split(',')
        .zip(keys)
        .map(|(field, key)| {
            let (name, value) = field.split_once(':')?;
            if name.trim() == *key { value.trim().parse().ok() } else { None }
        })
        .collect::<Option<Vec<u64>>>()?;
    (values.len() == keys.len()).then_some((values, count))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: [&str; 3] = ["common_cpu", "isa", "exit_reason"];

    #[test]
    fn a_recorded_histogram_adds_up_to_its_own_total() {
        let text = include_str!("fixtures/x2apic/kvm_exit.hist");
        let hist = Hist::parse(text, &KEYS).unwrap();
        assert!(text.contains(&format!("Hits: {}", hist.counts.values().sum::<u64>())));
        assert!(text.contains(&format!("Entries: {}", hist.counts.len())));
        assert_eq!(hist.dropped, 0);
    }

    #[test]
    fn an_empty_histogram_has_no_entries() {
        let hist =
            Hist::parse(include_str!("fixtures/xapic/kvm_hypercall.hist"), &["common_cpu", "nr"]).unwrap();
        assert_eq!(hist, Hist::default());
    }

    #[test]
    fn lost_events_are_reported() {
        let hist = Hist::parse("Totals:\n    Hits: 9\n    Entries: 2\n    Dropped: 7\n", &KEYS).unwrap();
        assert_eq!(hist.dropped, 7);
    }

    #[test]
    fn a_line_with_other_keys_is_refused() {
        for line in [
            "{ common_cpu: 0, exit_reason: 1, isa: 2 } hitcount: 3",
            "{ common_cpu: 0 } hitcount: 3",
            "{ common_cpu: 0, isa: 2, exit_reason: IRQ } hitcount: 3",
            "{ common_cpu: 0, isa: 2, exit_reason: 1 } hitcount:",
            "{ common_cpu: 0, isa: 2, exit_reason: 1",
            "Dropped: many",
        ] {
            assert_eq!(Hist::parse(line, &KEYS), Err(HistError { line: line.to_owned() }));
        }
    }
}
