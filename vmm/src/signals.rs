//! Signals that end a VM: they are blocked in all threads, and the event loop reads them from a file. So the
//! terminal and everything else is put back before the process goes.
//!
//! The first SIGTERM only presses the guest's power button, so that a service manager's stop is an orderly shutdown; the second
//! one, and any of the others, ends the VM at once.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::events;
use crate::power::{EndSignal, Ending, PowerButton};

/// SIGTERM and its like, as a readable file.
pub fn block() -> io::Result<SignalFd> {
    let set: SigSet =
        [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT].into_iter().collect();
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

/// Wakes the event loop when the VM ends, and makes a signal an end.
pub struct EndWatch {
    /// The signal the VM ends with.
    pub end: Arc<EndSignal>,
    /// From [`block`].
    pub signals: SignalFd,
    /// What the first SIGTERM presses.
    pub button: PowerButton,
    /// Whether that has happened.
    pub asked: bool,
}

impl EndWatch {
    fn received(&mut self, signal: i32) {
        if signal != libc::SIGTERM || std::mem::replace(&mut self.asked, true) {
            return self.end.give(Ending::Signal(signal));
        }
        match self.button.press() {
            Ok(()) => tracing::warn!(
                "SIGTERM: the guest's power button is pressed; a second SIGTERM ends the VM at once"
            ),
            Err(_) => self.end.give(Ending::Signal(signal)),
        }
    }
}

impl MutEventSubscriber for EndWatch {
    fn process(&mut self, events: Events, _: &mut EventOps) {
        if events.fd() == self.signals.as_raw_fd()
            && let Ok(Some(signal)) = self.signals.read_signal()
        {
            self.received(signal.ssi_signo as i32);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        events::watch(ops, self.end.event().as_raw_fd());
        events::watch(ops, self.signals.as_raw_fd());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_sigterm_ends_the_vm_and_any_other_signal_at_once() {
        let watch = || EndWatch {
            end: Arc::new(EndSignal::new().unwrap()),
            signals: SignalFd::new(&SigSet::empty()).unwrap(),
            button: PowerButton::new().unwrap(),
            asked: false,
        };
        let mut patient = watch();
        patient.received(libc::SIGTERM);
        assert_eq!((patient.end.ending(), patient.button.interrupt().read().unwrap()), (None, 1));
        patient.received(libc::SIGTERM);
        assert_eq!(patient.end.ending(), Some(Ending::Signal(libc::SIGTERM)));

        let mut hasty = watch();
        hasty.received(libc::SIGINT);
        assert_eq!(hasty.end.ending(), Some(Ending::Signal(libc::SIGINT)));
        assert!(hasty.button.interrupt().read().is_err(), "not pressed");
    }
}
