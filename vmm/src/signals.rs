//! Signals that end a VM: they are blocked in all threads, and the event loop reads them from a file. So the
//! terminal and everything else is put back before the process goes.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::events;
use crate::power::{EndSignal, Ending};

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
}

impl MutEventSubscriber for EndWatch {
    fn process(&mut self, events: Events, _: &mut EventOps) {
        if events.fd() == self.signals.as_raw_fd()
            && let Ok(Some(signal)) = self.signals.read_signal()
        {
            self.end.give(Ending::Signal(signal.ssi_signo as i32));
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        events::watch(ops, self.end.event().as_raw_fd());
        events::watch(ops, self.signals.as_raw_fd());
    }
}
