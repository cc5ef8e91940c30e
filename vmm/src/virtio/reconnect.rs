//! Looking for a backend that was lost: a thread tries until one is there, so nobody else waits for a socket that may be
//! held by somebody who does not answer.

use std::time::Duration;
use std::{io, thread};

use super::session::Error;
use crate::chain::Chain;
use crate::sandbox::{self, Role};

/// How often a lost backend is tried.
pub const RETRY: Duration = Duration::from_millis(100);
/// The same at most, where somebody listens who is no backend for us: another VMM may have it.
const RETRY_AT_MOST: Duration = Duration::from_secs(5);

/// Starts the thread. It calls `attempt` until that succeeds, or answers `None`: nobody wants a backend any more.
pub fn start(attempt: impl Fn() -> Option<Result<(), Error>> + Send + 'static) -> io::Result<()> {
    let thread = thread::Builder::new().name("vhost-reconnect".into());
    thread.spawn(move || {
        sandbox::enter_or_exit(Role::Reconnect);
        try_until_there(&attempt);
    })?;
    Ok(())
}

fn try_until_there(attempt: &dyn Fn() -> Option<Result<(), Error>>) {
    let mut pause = RETRY;
    let mut complained = false;
    loop {
        thread::sleep(pause);
        match attempt() {
            None | Some(Ok(())) => return,
            Some(Err(Error::Connect { .. })) => pause = RETRY,
            Some(Err(error)) => {
                // Said once for each loss.
                if !std::mem::replace(&mut complained, true) {
                    tracing::warn!("{}", Chain(&error));
                }
                pause = (2 * pause).min(RETRY_AT_MOST);
            }
        }
    }
}
