//! `--exits`: counts the exits of this process's own VM from its first instruction to its end.

use std::collections::BTreeMap;
use std::str::FromStr;

use super::{Counter, Error, Rows, Snapshot};

/// How the count is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The table.
    Table,
    /// One JSON object on one line.
    Json,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "table" => Ok(Self::Table),
            "json" => Ok(Self::Json),
            _ => Err("expected table or json".to_owned()),
        }
    }
}

/// A count that runs as long as the VM.
pub struct Lifetime {
    counter: Counter,
    before: Snapshot,
    format: Format,
}

impl Lifetime {
    /// Starts to count. Call before the vCPU threads are started: they are followed as they appear.
    pub fn start(format: Format) -> Result<Self, Error> {
        let counter = Counter::start(std::process::id() as i32)?;
        let before = counter.snapshot()?;
        Ok(Self { counter, before, format })
    }

    /// The exits so far by pCPU and row; `None` where nothing may be traced. Opens no file.
    pub fn pcpus(&self) -> Result<Option<BTreeMap<u32, Rows>>, Error> {
        self.counter.pcpus()
    }

    /// The count, ready to print. Call while the vCPU threads are still there: they are told by their names.
    pub fn report(&self) -> Result<String, Error> {
        let report = (&self.counter.snapshot()? - &self.before).report();
        Ok(match self.format {
            Format::Table => report.to_string(),
            // A report is numbers and strings: there is nothing in it that JSON cannot say.
            Format::Json => serde_json::to_string(&report).unwrap_or_default() + "\n",
        })
    }
}
