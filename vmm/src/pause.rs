//! A pause: first the vCPUs leave the guest, then the devices that work by themselves come to rest.
//!
//! vCPUs pass a gate before they enter the guest. How a pause reaches one: the gate is closed first, then the thread gets the signal that
//! takes it out of the guest (`vcpu.rs` says why none is missed). Before it goes back it finds the gate closed and waits there, holding
//! no lock of a device. No request is made any more then, and disks finish those that they have, and backends let go of
//! their rings. Resuming is the other way round.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::unistd::{getpid, gettid};
use vmm_sys_util::signal::SIGRTMIN;

/// Why a VM cannot be paused or resumed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Twice.
    #[error("the VM is paused already; resume it with vm.resume")]
    AlreadyPaused,
    /// There is nothing to resume.
    #[error("the VM is not paused")]
    NotPaused,
    /// A vCPU is busy outside the guest: with a backend that does not answer, or a console that nobody reads.
    #[error("{left} vCPUs did not leave the guest within {} s, so the VM runs on; is a backend or the console stuck?", within.as_secs())]
    Stuck {
        /// How many.
        left: usize,
        /// The time they had.
        within: Duration,
    },
    /// A device has work that does not end.
    #[error("{device} did not come to rest within {} s, so the VM runs on; is its storage, or its backend, stuck?", within.as_secs())]
    Busy {
        /// Which.
        device: String,
        /// The time it had.
        within: Duration,
    },
    /// The VM is about to end.
    #[error("the VM is ending")]
    Ending,
}

/// A device that works by itself, while no vCPU runs too.
pub trait Pausable: Send {
    /// Brings what was asked of it to its end, and begins nothing new; whether that was done within the time given. If it was
    /// not, [`Pausable::resume`] follows.
    fn pause(&self, within: Duration) -> bool;
    /// Goes on.
    fn resume(&self);
    /// Its name in messages.
    fn name(&self) -> String;
}

/// What pauses and resumes a VM.
pub struct Pause {
    gate: Arc<Gate>,
    devices: Vec<Box<dyn Pausable>>,
}

impl Pause {
    /// For the vCPUs that pass `gate`, and `devices`.
    pub fn new(gate: Arc<Gate>, devices: Vec<Box<dyn Pausable>>) -> Self {
        Self { gate, devices }
    }

    /// Whether the VM is paused.
    pub fn is_paused(&self) -> bool {
        self.gate.is_paused()
    }

    /// Returns when nothing of the VM runs any more. `within` is the time that the vCPUs have, and then the devices.
    pub fn pause(&self, within: Duration) -> Result<(), Error> {
        self.gate.pause(within)?;
        let deadline = Instant::now() + within;
        let rests = |device: &dyn Pausable| device.pause(deadline.saturating_duration_since(Instant::now()));
        match self.devices.iter().find(|device| !rests(device.as_ref())) {
            None => self.gate.ended().map_or(Ok(()), Err),
            Some(device) => {
                // Unless the VM has ended meanwhile, which lets everything go on, too.
                self.devices.iter().for_each(|device| device.resume());
                let undone = self.gate.resume();
                Err(undone
                    .err()
                    .and(self.gate.ended())
                    .unwrap_or(Error::Busy { device: device.name(), within }))
            }
        }
    }

    /// Lets everything go on.
    pub fn resume(&self) -> Result<(), Error> {
        if !self.gate.is_paused() {
            return Err(Error::NotPaused);
        }
        self.devices.iter().for_each(|device| device.resume());
        self.gate.resume()
    }
}

#[derive(Debug, Default)]
struct State {
    paused: bool,
    ending: bool,
    /// The threads that pass here.
    threads: BTreeSet<libc::pid_t>,
    /// How many of them wait.
    waiting: usize,
}

/// The gate of one VM.
#[derive(Debug, Default)]
pub struct Gate {
    /// Whether it is closed: what every entry into the guest looks at.
    closed: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// The calling thread will pass here.
    pub fn join(&self) -> Member<'_> {
        let thread = gettid().as_raw();
        self.lock().threads.insert(thread);
        Member { gate: self, thread }
    }

    /// Whether the VM is paused.
    pub fn is_paused(&self) -> bool {
        self.lock().paused
    }

    /// The error of whoever comes too late, if the VM is ending.
    fn ended(&self) -> Option<Error> {
        self.lock().ending.then_some(Error::Ending)
    }

    /// Takes all vCPUs out of the guest and keeps them; returns when they are out.
    pub fn pause(&self, within: Duration) -> Result<(), Error> {
        let mut state = self.lock();
        match &*state {
            State { ending: true, .. } => return Err(Error::Ending),
            State { paused: true, .. } => return Err(Error::AlreadyPaused),
            _ => {}
        }
        state.paused = true;
        self.closed.store(true, Ordering::SeqCst);
        for &thread in &state.threads {
            kick(thread);
        }
        let deadline = Instant::now() + within;
        while state.paused && state.waiting < state.threads.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let left = state.threads.len() - state.waiting;
                self.open(&mut state);
                return Err(Error::Stuck { left, within });
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.ending { Err(Error::Ending) } else { Ok(()) }
    }

    /// Lets the vCPUs go back.
    pub fn resume(&self) -> Result<(), Error> {
        let mut state = self.lock();
        if !state.paused {
            return Err(Error::NotPaused);
        }
        self.open(&mut state);
        Ok(())
    }

    /// Opens the gate for good: the VM ends.
    pub fn end(&self) {
        let mut state = self.lock();
        state.ending = true;
        self.open(&mut state);
    }

    fn open(&self, state: &mut State) {
        state.paused = false;
        self.closed.store(false, Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread that passes a gate, until it is dropped.
#[derive(Debug)]
pub struct Member<'a> {
    gate: &'a Gate,
    thread: libc::pid_t,
}

impl Member<'_> {
    /// Waits while the gate is closed; says whether it had to.
    pub fn pass(&self) -> bool {
        if !self.gate.closed.load(Ordering::SeqCst) {
            return false;
        }
        let mut state = self.gate.lock();
        if !state.paused {
            return false;
        }
        state.waiting += 1;
        self.gate.changed.notify_all();
        while state.paused {
            state = self.gate.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting -= 1;
        true
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        self.gate.lock().threads.remove(&self.thread);
        self.gate.changed.notify_all();
    }
}

/// Sends a thread of this process the signal that takes vCPUs out of the guest.
fn kick(thread: libc::pid_t) {
    // SAFETY: a system call without pointers. A thread that has just ended is not found; its id cannot be another's of
    // this process yet, because `Member::drop` takes it off the list, under the lock that is held here, before the thread ends.
    unsafe { libc::syscall(libc::SYS_tgkill, getpid().as_raw(), thread, SIGRTMIN()) };
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::thread;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn nobody_passes_a_closed_gate_and_everybody_an_open_one() {
        crate::vcpu::install_signal_handler().unwrap();
        let (gate, passed, end) =
            (Arc::<Gate>::default(), Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let threads = [(); 3].map(|()| {
            let (gate, passed, end) = (Arc::clone(&gate), Arc::clone(&passed), Arc::clone(&end));
            thread::spawn(move || {
                let member = gate.join();
                while !end.load(Ordering::SeqCst) {
                    member.pass();
                    passed.fetch_add(1, Ordering::SeqCst);
                }
            })
        });
        let count = || passed.load(Ordering::SeqCst);
        for _ in 0..20 {
            gate.pause(SOON).unwrap();
            let before = count();
            assert!(gate.is_paused());
            assert_eq!(gate.pause(SOON), Err(Error::AlreadyPaused));
            thread::sleep(Duration::from_millis(2));
            assert_eq!(count(), before);
            gate.resume().unwrap();
            assert_eq!(gate.resume(), Err(Error::NotPaused));
            while count() == before {
                thread::yield_now();
            }
        }
        gate.pause(SOON).unwrap();
        end.store(true, Ordering::SeqCst);
        gate.end();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(gate.pause(SOON), Err(Error::Ending));
    }

    /// Comes to rest, or not; and says what it was told.
    struct Device(bool, Arc<Mutex<Vec<&'static str>>>);

    impl Pausable for Device {
        fn pause(&self, _: Duration) -> bool {
            self.1.lock().unwrap().push("pause");
            self.0
        }

        fn resume(&self) {
            self.1.lock().unwrap().push("resume");
        }

        fn name(&self) -> String {
            "the disk".into()
        }
    }

    #[test]
    fn devices_rest_with_the_vcpus_and_one_that_does_not_fails_the_pause() {
        let pause = |rests: bool| {
            let told = Arc::default();
            let pause = Pause::new(Arc::default(), vec![Box::new(Device(rests, Arc::clone(&told)))]);
            (pause, told)
        };
        let (restful, told) = pause(true);
        assert_eq!(restful.resume(), Err(Error::NotPaused));
        restful.pause(SOON).unwrap();
        assert!(restful.is_paused());
        assert_eq!(restful.pause(SOON), Err(Error::AlreadyPaused));
        restful.resume().unwrap();
        assert_eq!(*told.lock().unwrap(), ["pause", "resume"]);
        let (restless, told) = pause(false);
        assert_eq!(restless.pause(SOON), Err(Error::Busy { device: "the disk".into(), within: SOON }));
        assert!(!restless.is_paused());
        assert_eq!(*told.lock().unwrap(), ["pause", "resume"]);
    }

    #[test]
    fn a_thread_that_is_stuck_fails_the_pause_and_the_others_go_on() {
        crate::vcpu::install_signal_handler().unwrap();
        let gate = Gate::default();
        let within = Duration::from_millis(20);
        thread::scope(|scope| {
            let member = gate.join();
            assert_eq!(gate.pause(within), Err(Error::Stuck { left: 1, within }));
            assert!(!gate.is_paused() && !member.pass());
            scope.spawn(|| drop(gate.join())).join().unwrap();
        });
        gate.pause(SOON).unwrap();
    }
}
