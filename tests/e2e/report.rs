//! The HTML report in a real browser: every chart draws what the result file holds, nothing is asked of a network,
//! nobody complains, and a phone need not scroll sideways.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result, bail, ensure};
use ivcpu_lab::figures::{Load, Window, of_load};
use ivcpu_lab::html::{ReportOptions, report};
use ivcpu_lab::in_host::{Layout, Vmm};
use ivcpu_lab::process::Process;
use ivcpu_lab::provision::Provision;
use ivcpu_lab::ratio::Ratio;
use ivcpu_lab::result::{Backend, CaseKey, CaseResult, Figures, HostFacts, Mode, ResultFile, Role, SCHEMA};
use ivcpu_lab::traffic::{Latency, Workload};
use ivcpu_lab::workspace::Workspace;
use ivcpu_vmm::exits::{Row, Rows};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};

/// Longer than any answer takes on a busy machine, in milliseconds.
const PATIENCE_MS: u16 = 60_000;
const HOSTILE: &str = "</svg></style><script>alert(1)</script><img src=http://192.0.2.1/x> & \"more\"";

/// A browser at the other end of two pipes. The crates for this protocol bring an async runtime, or fetch the
/// protocol's description while they are built; a dozen calls need neither.
struct Browser {
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    _process: Process,
    calls: u64,
    session: Option<String>,
    events: Vec<Value>,
}

impl Browser {
    fn start(launcher: &Path, profile: &Path) -> Result<Self> {
        let mut process = Process::spawn("the browser", "sh", |command| {
            // The browser speaks over descriptors 3 and 4.
            command.args(["-c", "exec \"$0\" \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1"]).arg(launcher);
            command.args(["--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]);
            command.args(["--proxy-server=127.0.0.1:9", "--host-resolver-rules=MAP * ~NOTFOUND"]);
            command.arg(format!("--user-data-dir={}", profile.display()));
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        })?;
        let to = process.child().stdin.take().context("the browser's input")?;
        let from = BufReader::new(process.child().stdout.take().context("the browser's output")?);
        let mut browser = Self { to, from, _process: process, calls: 0, session: None, events: Vec::new() };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }))?;
        let attached = json!({ "targetId": target["targetId"], "flatten": true });
        let session = browser.call("Target.attachToTarget", attached)?;
        browser.session = session["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Network", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}))?;
        }
        Ok(browser)
    }

    fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        self.calls += 1;
        let mut message = json!({ "id": self.calls, "method": method, "params": params });
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        self.to.write_all(format!("{message}\0").as_bytes()).with_context(|| format!("calling {method}"))?;
        loop {
            let mut message = self.message().with_context(|| format!("waiting for {method}"))?;
            if message["id"] == json!(self.calls) {
                ensure!(message["error"].is_null(), "{method}: {}", message["error"]);
                return Ok(message["result"].take());
            }
            self.events.push(message);
        }
    }

    fn message(&mut self) -> Result<Value> {
        if self.from.buffer().is_empty() {
            let mut waiting = [PollFd::new(self.from.get_ref().as_fd(), PollFlags::POLLIN)];
            ensure!(poll(&mut waiting, PollTimeout::from(PATIENCE_MS))? == 1, "the browser says nothing");
        }
        let mut bytes = Vec::new();
        self.from.read_until(0, &mut bytes)?;
        ensure!(bytes.pop() == Some(0), "the browser has ended");
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// Opens a file on a screen of this width and returns what happened meanwhile.
    fn open(&mut self, page: &Path, width: u32) -> Result<Vec<Value>> {
        let screen = json!({ "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": true });
        self.call("Emulation.setDeviceMetricsOverride", screen)?;
        self.events.clear();
        self.call("Page.navigate", json!({ "url": format!("file://{}", page.display()) }))?;
        while !self.events.iter().any(|event| event["method"] == "Page.loadEventFired") {
            let event = self.message().context("waiting for the page to load")?;
            self.events.push(event);
        }
        // What the page has caused by now arrives before this answer.
        self.evaluate("document.fonts.ready.then(() => 0)")?;
        Ok(std::mem::take(&mut self.events))
    }

    fn evaluate(&mut self, script: &str) -> Result<Value> {
        let params = json!({ "expression": script, "returnByValue": true, "awaitPromise": true });
        let mut answer = self.call("Runtime.evaluate", params)?;
        ensure!(answer["exceptionDetails"].is_null(), "{script}: {answer}");
        Ok(answer["result"]["value"].take())
    }

    /// Whether something is wider than the screen.
    fn overflows(&mut self) -> Result<bool> {
        let script = "document.documentElement.scrollWidth > document.documentElement.clientWidth";
        self.evaluate(script)?.as_bool().context("whether the page overflows")
    }
}

fn requests(events: &[Value]) -> Vec<String> {
    let sent = events.iter().filter(|event| event["method"] == "Network.requestWillBeSent");
    sent.map(|event| event["params"]["request"]["url"].as_str().unwrap_or_default().to_owned()).collect()
}

/// Errors and warnings of the console, and exceptions.
fn complaints(events: &[Value]) -> Vec<String> {
    let is_bad = |level: &Value| level == "error" || level == "warning" || level == "assert";
    let complains = |event: &&Value| match event["method"].as_str() {
        Some("Runtime.exceptionThrown") => true,
        Some("Runtime.consoleAPICalled") => is_bad(&event["params"]["type"]),
        Some("Log.entryAdded") => is_bad(&event["params"]["entry"]["level"]),
        _ => false,
    };
    events.iter().filter(complains).map(Value::to_string).collect()
}

fn key(vmm: Vmm, backend: Backend, mode: Mode, workload: Workload) -> CaseKey {
    CaseKey {
        vmm,
        path: backend.path(),
        backend,
        mode,
        workload,
        layout: Layout::Pinned,
        pv_eoi: true,
        queue_pairs: 1,
        poll_us: (backend == Backend::Ivcpu).then(|| "always".into()),
        ivcpu_poll_us: (mode == Mode::Fifo || mode == Mode::Poll).then_some(60_000_000),
        halt_poll_us: None,
        with_bystander: true,
    }
}

/// Three windows and their control. Some rows have more exits without traffic than with it.
fn figures(workload: Workload, seed: u64) -> Figures {
    let window = |traffic: bool, n: u64| {
        let mut exits: BTreeMap<u32, Rows> = BTreeMap::new();
        for pcpu in 0..5 {
            let rows = exits.entry(pcpu).or_default();
            rows.add(Row::ExternalIntr, if traffic { 1000 * u64::from(pcpu) + seed } else { 900 });
            rows.add(Row::Timer, if traffic { 400 } else { 450 + n });
            rows.add(Row::Msr, u64::from(traffic));
        }
        let streams = workload != Workload::TcpRr;
        let latency = Latency { p50: 90.0 + seed as f64, p99: 900.0, p999: 20_000.0 };
        Window {
            seconds: 1.0,
            exits,
            packets: if traffic { 4000 } else { 0 },
            bytes: if traffic && streams { 1_000_000 * (100 + n + seed) } else { 0 },
            transactions: if traffic && !streams { 800 } else { 0 },
            latency_us: (traffic && !streams).then_some(latency),
            cpu_seconds: vec![1.0; 5],
            bystander_rate: Some(if traffic { 60.0 + n as f64 } else { 100.0 }),
            ..Window::default()
        }
    };
    let load = |traffic| Load { windows: (0..3).map(|n| window(traffic, n)).collect(), bytes_verified: None };
    let roles = [Role::App, Role::App, Role::Backend, Role::Ivcpu, Role::Wire];
    of_load(&load(true), &load(false), &roles)
}

/// Every mode and path; one case failed, of another nothing is known.
fn comparison() -> ResultFile {
    let setups = [
        (Vmm::IvcpuVmm, Backend::Ivcpu, Mode::Stock),
        (Vmm::Qemu, Backend::VhostNet, Mode::Stock),
        (Vmm::IvcpuVmm, Backend::Ivcpu, Mode::Irq),
        (Vmm::IvcpuVmm, Backend::Ivcpu, Mode::ThreadedNapi),
        (Vmm::IvcpuVmm, Backend::Ivcpu, Mode::Fifo),
        (Vmm::Qemu, Backend::Ivcpu, Mode::Fifo),
        (Vmm::IvcpuVmm, Backend::Vfio, Mode::Stock),
        (Vmm::IvcpuVmm, Backend::Vfio, Mode::Irq),
        (Vmm::IvcpuVmm, Backend::Vfio, Mode::Poll),
    ];
    let mut cases = Vec::new();
    for workload in [Workload::TcpOut, Workload::TcpIn, Workload::TcpRr] {
        for (seed, (vmm, backend, mode)) in (0u64..).zip(setups) {
            let figures = figures(workload, seed);
            cases.push(CaseResult { key: key(vmm, backend, mode, workload), figures, error: None });
        }
    }
    let failed = key(Vmm::Qemu, Backend::Vfio, Mode::Stock, Workload::TcpOut);
    cases.push(CaseResult { key: failed, figures: Figures::default(), error: Some(HOSTILE.into()) });
    let unknown = key(Vmm::Qemu, Backend::Vfio, Mode::Irq, Workload::TcpIn);
    cases.push(CaseResult { key: unknown, figures: Figures::default(), error: None });
    let ratios = Ratio::of_pairs("throughput", (&cases[0].key, &[2.0, 3.0]), (&cases[1].key, &[1.0, 2.0]));
    let mut ratios: Vec<_> = ratios.into_iter().collect();
    ratios.extend(ratios.first().cloned().map(|ratio| Ratio { of: HOSTILE.into(), ..ratio }));
    let host = HostFacts { cpus: 5, emulated: true, kernel: HOSTILE.into(), qemu: None };
    ResultFile { schema: SCHEMA, version: "0".into(), host, complete: false, cases, ratios }
}

/// How many marks each chart must have.
fn expected(file: &ResultFile) -> [(&'static str, usize); 6] {
    let count = |marks: fn(&Figures) -> usize| file.cases.iter().map(|case| marks(&case.figures)).sum();
    [
        // The traffic of figures() changes three rows on each pCPU.
        ("exits", count(|f| f.pcpus.len() * 3)),
        ("throughput", count(|f| usize::from(f.mbps.is_some()))),
        ("latency", count(|f| if f.latency_us.is_some() { 3 } else { 0 })),
        ("bystander", count(|f| usize::from(f.bystander.is_some()))),
        ("price-gb", count(|f| usize::from(f.cpu_seconds_per_gb.is_some()))),
        ("price-transactions", count(|f| usize::from(f.cpu_seconds_per_1k_transactions.is_some()))),
    ]
}

#[test]
fn the_report_in_a_browser() -> Result<()> {
    let launcher = Provision::new(&Workspace::locate()?).browser()?;
    let dir = tempfile::tempdir()?;
    let (json, html) = (dir.path().join("result.json"), dir.path().join("report.html"));
    let file = comparison();
    fs::write(&json, serde_json::to_string(&file)?)?;
    report(&ReportOptions { json, html: html.clone() })?;
    let mut browser = Browser::start(&launcher, &dir.path().join("profile"))?;

    for width in [1200, 360] {
        let events = browser.open(&html, width)?;
        assert_eq!(requests(&events), [format!("file://{}", html.display())]);
        assert_eq!(complaints(&events), [""; 0]);
        assert!(!browser.overflows()?, "at {width} pixels the page scrolls sideways");
        for (chart, marks) in expected(&file) {
            let script = format!(
                "[...document.querySelectorAll('[data-chart=\"{chart}\"] .mark')].map(m => m.getBoundingClientRect()) \
                 .filter(r => r.width > 0 && r.height > 0 && r.left >= 0 && r.right <= innerWidth + 1).length"
            );
            assert!(marks > 0);
            assert_eq!(browser.evaluate(&script)?, json!(marks), "{chart} at {width} pixels");
        }
    }
    let paper = "[...document.querySelectorAll('[data-table=paper] tbody tr')].map(r => r.children.length)";
    // A name, four pCPUs of the paper's, five of ours.
    assert_eq!(browser.evaluate(paper)?, json!([10, 10, 10, 10, 10]));
    let ratios = browser.evaluate("document.querySelectorAll('[data-table=ratios] tbody tr').length")?;
    assert_eq!(ratios, json!(file.ratios.len()));
    let hostile = browser.evaluate("document.querySelectorAll('script, img').length")?;
    assert_eq!(hostile, json!(0), "text of the file became markup");
    let text = browser.evaluate("document.body.innerText")?;
    assert!(text.as_str().is_some_and(|text| text.contains(HOSTILE)), "the error is not on the page");
    assert_eq!(browser.evaluate("document.querySelectorAll('details').length")?, json!(file.cases.len()));
    let pdf = browser.call("Page.printToPDF", json!({}))?;
    // Base64 of "%PDF-".
    let pdf = pdf["data"].as_str().unwrap_or_default();
    assert!(pdf.starts_with("JVBERi0") && pdf.len() > 20_000, "not a printed page: {} bytes", pdf.len());

    // A page that does everything wrong is found out: the eyes above are open.
    let wrong = dir.path().join("wrong.html");
    let text = "<img src='http://192.0.2.1/x'><div style='width:2000px'>x</div><script>console.error(1); throw 2</script>";
    fs::write(&wrong, text)?;
    let events = browser.open(&wrong, 360)?;
    if requests(&events).len() != 2 || complaints(&events).len() < 2 || !browser.overflows()? {
        bail!("a bad page went unnoticed: {events:?}");
    }
    Ok(())
}
