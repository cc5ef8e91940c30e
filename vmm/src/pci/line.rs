//! An interrupt vector's way into the guest: an eventfd, and the GSI it is tied to while the guest wants its interrupts.
//!
//! While the vector is unmasked its eventfd is tied to the GSI, and whoever writes it interrupts the guest directly. While it
//! is masked the tie is cut: a write then stays in the eventfd, and that *is* the pending bit. Tying it again delivers what
//! stayed, because KVM looks at the eventfd when it takes it. So nothing is lost and nothing is emulated.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

use crate::chain::Chain;
use crate::gsi::{Error, Message, MessageRouter};

/// One vector.
pub struct Line {
    gsi: u32,
    event: EventFd,
    connected: bool,
}

impl Line {
    /// A vector that is masked.
    pub fn new(router: &dyn MessageRouter) -> Result<Self, Error> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::EventFd)?;
        Ok(Self { gsi: router.allocate()?, event, connected: false })
    }

    /// The eventfd whose writes interrupt the guest.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Whether an interrupt came while the vector was masked.
    pub fn is_pending(&self) -> bool {
        !self.connected && is_readable(&self.event)
    }

    /// Unmasks the vector with this message, or masks it. If KVM refuses, the vector stays cut and its interrupts stay
    /// pending; a message no local APIC would understand cannot do more harm than that.
    pub fn point(&mut self, router: &dyn MessageRouter, message: Option<Message>) {
        let result = match (message, self.connected) {
            (Some(message), connected) => router
                .route(self.gsi, message)
                .and_then(|()| if connected { Ok(()) } else { router.connect(self.gsi, &self.event) }),
            (None, true) => router.disconnect(self.gsi, &self.event),
            (None, false) => Ok(()),
        };
        match result {
            Ok(()) => self.connected = message.is_some(),
            Err(error) => tracing::info!("the vector of GSI {}: {}", self.gsi, Chain(&error)),
        }
    }
}

/// Whether the eventfd was written and not yet read, without reading it.
fn is_readable(event: &EventFd) -> bool {
    // SAFETY: the descriptor is open for as long as `event` is borrowed, which is longer than the borrow made here lives.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}
