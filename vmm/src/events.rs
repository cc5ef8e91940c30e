//! The event loop's small change.

use std::os::fd::RawFd;

use event_manager::{EventOps, EventSet, Events};

/// Calls the subscriber when `fd` is readable. A file that cannot be watched is a bug here or a system out of memory; the
/// VM runs on without it, and the log says so.
pub fn watch(ops: &mut EventOps, fd: RawFd) {
    if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
        tracing::error!("cannot watch file {fd}: {error:?}");
    }
}
