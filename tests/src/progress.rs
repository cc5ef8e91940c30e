//! Progress of long steps: a bar on a terminal, a few plain lines anywhere else.

use std::io::IsTerminal;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How often a plain line reports on a step that goes on.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// All bars of the terminal, so that a step's stands below the matrix's and lines above both.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// A line on stderr that no bar tears up.
pub fn line(text: &str) {
    BARS.suspend(|| eprintln!("{text}"));
}

/// Progress over the cases of a comparison.
pub struct Matrix {
    bar: ProgressBar,
    on_terminal: bool,
}

impl Matrix {
    /// Nothing is done yet.
    pub fn start(cases: usize) -> Self {
        let bar = ProgressBar::new(cases as u64);
        let on_terminal = std::io::stderr().is_terminal();
        if !on_terminal {
            bar.set_draw_target(ProgressDrawTarget::hidden());
            return Self { bar, on_terminal };
        }
        let style =
            ProgressStyle::with_template("[{bar:20}] {pos}/{len} in {elapsed}, {eta} left: {wide_msg}");
        let bar = BARS.add(bar).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_secs(1));
        Self { bar, on_terminal }
    }

    /// Names the case that is measured from now on.
    pub fn next(&self, case: &str) {
        self.bar.set_message(case.to_owned());
        if !self.on_terminal {
            let (number, cases) = (self.bar.position() + 1, self.bar.length().unwrap_or(0));
            eprintln!("lab: {number} of {cases}: {case}");
        }
    }

    /// That case is measured, or failed for good.
    pub fn done(&self) {
        self.bar.inc(1);
    }

    /// All are.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}

/// One step that takes a while.
pub struct Step {
    what: String,
    bar: Option<ProgressBar>,
    total: Option<u64>,
    started: Instant,
    reported: Instant,
}

impl Step {
    /// A step of unknown length.
    pub fn start(what: impl Into<String>) -> Self {
        Self::new(what.into(), None)
    }

    /// A step that moves `total` bytes.
    pub fn start_bytes(what: impl Into<String>, total: u64) -> Self {
        Self::new(what.into(), Some(total))
    }

    fn new(what: String, total: Option<u64>) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let (bar, template) = match total {
                Some(total) => {
                    (ProgressBar::new(total), "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}")
                }
                None => (ProgressBar::new_spinner(), "{spinner} {msg} {elapsed}"),
            };
            let bar = BARS.add(bar);
            bar.enable_steady_tick(Duration::from_millis(200));
            let style = ProgressStyle::with_template(template);
            bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())).with_message(what.clone())
        });
        if bar.is_none() {
            let size = total.map(|bytes| format!(" ({})", megabytes(bytes))).unwrap_or_default();
            eprintln!("lab: {what}{size} ...");
        }
        let now = Instant::now();
        Self { what, bar, total, started: now, reported: now }
    }

    /// Says that `done` bytes have been moved by now.
    pub fn at(&mut self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        } else if self.reported.elapsed() >= PLAIN_INTERVAL {
            self.reported = Instant::now();
            let of = self.total.map(|bytes| format!(" of {}", megabytes(bytes))).unwrap_or_default();
            eprintln!("lab: {}: {}{of}", self.what, megabytes(done));
        }
    }

    /// The step is done.
    pub fn finish(self) {
        match self.bar {
            Some(bar) => bar.finish_and_clear(),
            None if self.started.elapsed() > Duration::from_secs(3) => {
                eprintln!("lab: {}: done in {:.0} s", self.what, self.started.elapsed().as_secs_f64());
            }
            None => {}
        }
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}
