//! An exit is COUNTED here: by the kernel, in a tracefs instance of our own.
//!
//! An instance has its own triggers and its own list of threads, so nobody else's tracing is disturbed and two counters
//! run side by side. Its events stay switched off: a `hist` trigger counts without writing to the trace buffer.
//!
//! Two instances are needed. The first sees only the VM's threads (`set_event_pid`; with `event-fork` a thread started
//! later is added by the kernel as it is born). The second sees every thread, because an interrupt for a vCPU is accepted
//! wherever its sender happens to run: in a backend's thread, or in an interrupt handler on top of anything.
//!
//! Whoever counts keeps files of each instance open: the kernel refuses to remove it meanwhile, and a process that gave up opening
//! files can still read its counts. Killed, it lets go, and the next run removes what is left.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::Error;
use super::hist::Hist;
use super::reasons::MSR_FILTER;

const PREFIX: &str = "ivcpu-";
/// Where tracefs is mounted; the second is the place before Linux 4.1, still made by debugfs.
pub const TRACEFS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// A tracepoint with the keys it is counted by.
pub(super) struct Counted {
    event: &'static str,
    pub(super) keys: &'static [&'static str],
}

pub(super) const EXITS: Counted = Counted { event: "kvm_exit", keys: &["common_cpu", "isa", "exit_reason"] };
pub(super) const MSRS: Counted = Counted { event: "kvm_msr", keys: &["common_cpu", "ecx", "write"] };
pub(super) const APIC: Counted = Counted { event: "kvm_apic", keys: &["common_cpu", "reg", "rw"] };
pub(super) const HYPERCALLS: Counted = Counted { event: "kvm_hypercall", keys: &["common_cpu", "nr"] };
pub(super) const INJECTED: Counted = Counted { event: "kvm_inj_virq", keys: &["common_pid", "vector"] };
pub(super) const ACCEPTED: Counted = Counted { event: "kvm_apic_accept_irq", keys: &["apicid", "vec"] };

/// The running count for one VM's threads.
pub(super) struct Trace {
    vm: Instance,
    host: Instance,
}

/// Everything counted since [`Trace::start`].
pub(super) struct Counts {
    pub(super) exits: Hist,
    pub(super) msrs: Hist,
    pub(super) apic: Hist,
    pub(super) hypercalls: Hist,
    pub(super) injected: Hist,
    pub(super) accepted: Hist,
}

impl Trace {
    /// Starts to count for the threads that `threads` lists (it is asked again until nothing new turns up).
    pub(super) fn start(threads: impl Fn() -> Result<Vec<i32>, Error>) -> Result<Trace, Error> {
        let tracefs = mounted()?;
        remove_leftovers(&tracefs);
        let mut trace =
            Trace { vm: Instance::create(&tracefs, "vm")?, host: Instance::create(&tracefs, "host")? };
        trace.vm.follow(threads)?;

        let pcpus = configured_cpus();
        trace.vm.count(&EXITS, 64 * pcpus, "")?;
        trace.vm.count(&MSRS, 64 * pcpus, MSR_FILTER)?;
        trace.vm.count(&APIC, 64 * pcpus, "")?;
        trace.vm.count(&HYPERCALLS, 16 * pcpus, "")?;
        // An injection that a fault cut short is repeated; kernels since 5.19 mark the repetition.
        let first_only = if trace.vm.has_field(&INJECTED, "reinjected") { "reinjected == 0" } else { "" };
        trace.vm.count(&INJECTED, 64 * pcpus, first_only)?;
        trace.host.count(&ACCEPTED, 64 * pcpus, "")?;
        Ok(trace)
    }

    /// Reads `kvm_exit` alone, the count whose moment matters.
    pub(super) fn exits(&self) -> Result<Hist, Error> {
        self.vm.read(&EXITS)
    }

    /// Reads the counts that go with `exits`.
    pub(super) fn counts(&self, exits: Hist) -> Result<Counts, Error> {
        // kvm_apic before kvm_msr: an access that falls between the two must not look like one without an MSR.
        let apic = self.vm.read(&APIC)?;
        Ok(Counts {
            exits,
            apic,
            msrs: self.vm.read(&MSRS)?,
            hypercalls: self.vm.read(&HYPERCALLS)?,
            injected: self.vm.read(&INJECTED)?,
            accepted: self.host.read(&ACCEPTED)?,
        })
    }
}

impl Counts {
    /// Events that found no room in a histogram.
    pub(super) fn dropped(&self) -> u64 {
        [&self.exits, &self.msrs, &self.apic, &self.hypercalls, &self.injected, &self.accepted]
            .iter()
            .map(|hist| hist.dropped)
            .sum()
    }
}

/// A tracefs instance, removed on drop.
struct Instance {
    path: PathBuf,
    /// An open file of the instance; `None` only while it is being removed.
    hold: Option<File>,
    /// The running counts, by their events.
    counts: BTreeMap<&'static str, Count>,
}

/// A running count.
struct Count {
    path: PathBuf,
    file: File,
}

impl Instance {
    fn create(tracefs: &Path, role: &str) -> Result<Instance, Error> {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let path = tracefs.join("instances").join(format!("{PREFIX}{}-{role}{serial}", std::process::id()));
        fs::create_dir(&path).map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => Error::NotPermitted { path: path.clone() },
            _ => Error::Tracefs { doing: "make the tracing instance", path: path.clone(), source },
        })?;
        let mut instance = Instance { hold: None, counts: BTreeMap::new(), path };
        instance.hold = Some(open(&instance.path.join("tracing_on"))?);
        // Nothing is ever written to the buffer, so the smallest will do. Best effort: it only saves memory.
        let _ = instance.write("buffer_size_kb", "4");
        Ok(instance)
    }

    /// Limits the instance to the listed threads and those they start.
    fn follow(&self, threads: impl Fn() -> Result<Vec<i32>, Error>) -> Result<(), Error> {
        self.write("options/event-fork", "1")?;
        let mut known = Vec::new();
        loop {
            let new: Vec<i32> = threads()?.into_iter().filter(|tid| !known.contains(tid)).collect();
            if new.is_empty() {
                return Ok(());
            }
            // Must not fail: without a list the instance would see every VM. The kernel takes ids of threads that are gone.
            for tid in &new {
                self.append("set_event_pid", &tid.to_string())?;
            }
            known.extend(new);
        }
    }

    fn count(&mut self, what: &Counted, entries: usize, filter: &str) -> Result<(), Error> {
        let file = format!("events/kvm/{}/trigger", what.event);
        if !self.path.join(&file).exists() {
            return Err(Error::NoTracepoint { event: what.event });
        }
        let path = self.path.join(format!("events/kvm/{}/hist", what.event));
        if !path.exists() {
            return Err(Error::NoHistograms);
        }
        let mut trigger = format!("hist:keys={}:size={}", what.keys.join(","), hist_size(entries));
        if !filter.is_empty() {
            trigger.push_str(" if ");
            trigger.push_str(filter);
        }
        self.write(&file, &trigger)?;
        self.counts.insert(what.event, Count { file: open(&path)?, path });
        Ok(())
    }

    fn read(&self, what: &Counted) -> Result<Hist, Error> {
        let Count { path, file } =
            self.counts.get(what.event).ok_or(Error::NoTracepoint { event: what.event })?;
        let text =
            read(file).map_err(|source| Error::Tracefs { doing: "read", path: path.clone(), source })?;
        Hist::parse(&text, what.keys).map_err(|source| Error::Hist { path: path.clone(), source })
    }

    fn has_field(&self, what: &Counted, field: &str) -> bool {
        fs::read_to_string(self.path.join(format!("events/kvm/{}/format", what.event)))
            .is_ok_and(|format| format.contains(&format!(" {field};")))
    }

    fn write(&self, file: &str, text: &str) -> Result<(), Error> {
        let path = self.path.join(file);
        fs::write(&path, text).map_err(|source| Error::Tracefs { doing: "write to", path, source })
    }

    fn append(&self, file: &str, text: &str) -> Result<(), Error> {
        let path = self.path.join(file);
        let mut options = fs::OpenOptions::new();
        let appended = options.append(true).open(&path).and_then(|mut file| file.write_all(text.as_bytes()));
        appended.map_err(|source| Error::Tracefs { doing: "append to", path, source })
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.hold = None;
        self.counts.clear();
        if let Err(error) = fs::remove_dir(&self.path) {
            tracing::warn!("cannot remove the tracing instance {}: {error}", self.path.display());
        }
    }
}

fn open(path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|source| Error::Tracefs { doing: "open", path: path.to_owned(), source })
}

/// All of a file from its begin, wherever it was read to before: the kernel writes the text anew for whoever reads at 0. There must be
/// one reader at a time.
fn read(file: &File) -> io::Result<String> {
    let mut text = Vec::new();
    loop {
        let begin = text.len();
        text.resize(begin + (16 << 10), 0);
        let read = match file.read_at(text.get_mut(begin..).unwrap_or_default(), begin as u64) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Ok(0) => {
                text.truncate(begin);
                return String::from_utf8(text)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error));
            }
            other => other?,
        };
        text.truncate(begin + read);
    }
}

fn mounted() -> Result<PathBuf, Error> {
    let mut refused = None;
    for mount in TRACEFS.map(Path::new) {
        match fs::read_dir(mount.join("instances")) {
            Ok(_) => return Ok(mount.to_owned()),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                refused.get_or_insert(mount);
            }
            Err(_) => {}
        }
    }
    Err(refused.map_or(Error::NoTracefs, |mount| Error::NotPermitted { path: mount.to_owned() }))
}

/// Removes the instances of runs that were killed.
fn remove_leftovers(tracefs: &Path) {
    let Ok(instances) = fs::read_dir(tracefs.join("instances")) else { return };
    for instance in instances.flatten() {
        let name = instance.file_name();
        let Some(owner) = name.to_str().and_then(owner) else { continue };
        // Alive in another pid namespace? Then its open file makes the removal fail, which is as it should be.
        if !Path::new("/proc").join(owner.to_string()).exists() && fs::remove_dir(instance.path()).is_ok() {
            tracing::info!("removed the tracing instance {name:?} of a run that was killed");
        }
    }
}

/// The process that made the instance `name`, if it is one of ours.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

/// The `size` of a histogram: a power of two within the kernel's limits, with room to spare for its hashing.
fn hist_size(entries: usize) -> usize {
    (2 * entries).next_power_of_two().clamp(2048, 1 << 17)
}

fn configured_cpus() -> usize {
    match nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_CONF) {
        Ok(Some(cpus)) => usize::try_from(cpus).unwrap_or(1),
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_file_is_read_whole_and_again() {
        let mut file = tempfile::tempfile().unwrap();
        let text = "0123456789abcdef".repeat(3000);
        file.write_all(text.as_bytes()).unwrap();
        for _ in 0..2 {
            assert_eq!(read(&file).unwrap(), text);
        }
    }

    #[test]
    fn only_our_own_instances_have_an_owner() {
        assert_eq!(owner("ivcpu-4711-vm0"), Some(4711));
        assert_eq!(owner("ivcpu--vm0"), None);
        assert_eq!(owner("perf-4711"), None);
    }

    #[test]
    fn a_histogram_has_a_size_the_kernel_takes() {
        assert_eq!(hist_size(5), 2048);
        assert_eq!(hist_size(64 * 100), 16384);
        assert_eq!(hist_size(usize::MAX / 4), 1 << 17);
    }
}
