//! What the program can still do once it serves: as little as it needs.
//!
//! Everything that wants rights is opened first: TAP devices, sockets, io_uring. Then, in this order, while there is
//! one thread only ([`Sandbox::enter`]):
//!
//! 1. the user is changed, if one was named, and every capability is given up, for good (`no_new_privs`);
//! 2. Landlock hides all files but those that the options name;
//! 3. system-call filters are made, one for each role a thread can have. Every thread puts on its own
//!    ([`Sandbox::confine`]); those that a port starts have put on the port's before, and each makes it tighter.
//!
//! A peer that takes over a poll thread then finds no file to open, no program to start, no socket to make, and no
//! memory that can be executed.

mod files;
mod privileges;
mod roles;
mod trap;

use std::str::FromStr;
use std::sync::Arc;

pub use files::{Files, Restriction};
pub use privileges::UserName;
pub use roles::Role;
pub use trap::EXIT_STATUS;

use roles::Filters;

/// Why the program cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such user.
    #[error("--user {0}: there is no such user; name one that /etc/passwd or another user database has")]
    NoUser(String),
    /// The user database cannot be read.
    #[error("--user {user}: cannot look it up: {source}")]
    User {
        /// What was asked for.
        user: String,
        /// What the system says.
        #[source]
        source: nix::Error,
    },
    /// Rights cannot be given up.
    #[error("cannot {what}: {source}; --user wants a start as root")]
    Privileges {
        /// Which step.
        what: &'static str,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// Landlock refuses.
    #[error("cannot hide files with Landlock: {0}; say --landlock false to go without")]
    Landlock(#[from] landlock::RulesetError),
    /// The filters cannot be made or put on.
    #[error("cannot filter system calls: {0}; say --seccomp false to go without")]
    Seccomp(#[source] seccompiler::Error),
    /// The handler that names a forbidden system call cannot be installed.
    #[error("cannot catch SIGSYS: {0}")]
    Handler(vmm_sys_util::errno::Error),
}

impl From<seccompiler::BackendError> for Error {
    fn from(error: seccompiler::BackendError) -> Self {
        Error::Seccomp(error.into())
    }
}

/// What becomes of a forbidden system call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SeccompMode {
    /// Its name is written to stderr and the program ends with [`EXIT_STATUS`].
    #[default]
    Enforce,
    /// The kernel's audit log has it.
    Log,
    /// None is forbidden.
    Off,
}

impl FromStr for SeccompMode {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "true" => Ok(SeccompMode::Enforce),
            "log" => Ok(SeccompMode::Log),
            "false" => Ok(SeccompMode::Off),
            _ => Err("expected true, false or log".to_owned()),
        }
    }
}

/// How the program shall be confined.
#[derive(Debug, Default)]
pub struct Wanted<'a> {
    /// Who it shall be.
    pub user: Option<&'a UserName>,
    /// What becomes of forbidden system calls.
    pub seccomp: SeccompMode,
    /// The files it may use; `None` = Landlock is not asked.
    pub files: Option<Files>,
}

/// A confined program's filters.
#[derive(Clone, Debug, Default)]
pub struct Sandbox {
    filters: Option<Arc<Filters>>,
}

/// Has all threads share the allocator's first arena. glibc shrinks the arenas it makes for other threads, and opens a file of
/// /proc before it does so for the first time (`check_may_shrink_heap`), which the filters forbid.
fn use_one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call sets a number of the allocator's; no other thread runs yet that could be using it.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

impl Sandbox {
    /// Confines the program. To be called while it has one thread, after everything that wants rights was opened.
    pub fn enter(wanted: &Wanted<'_>) -> Result<Self, Error> {
        privileges::give_up(wanted.user)?;
        if let Some(files) = &wanted.files {
            match files.restrict()? {
                Restriction::Full => {}
                Restriction::Partial => {
                    tracing::info!("this kernel's Landlock knows a part of what is asked of it")
                }
                Restriction::None => tracing::info!("this kernel has no Landlock: files are not hidden"),
            }
        }
        if wanted.seccomp == SeccompMode::Off {
            return Ok(Sandbox::default());
        }
        use_one_arena();
        trap::install().map_err(Error::Handler)?;
        Ok(Sandbox { filters: Some(Arc::new(Filters::new(wanted.seccomp)?)) })
    }

    /// Puts the filter of `role` on the calling thread, for the rest of its life and for all threads it starts.
    pub fn confine(&self, role: Role) -> Result<(), Error> {
        match &self.filters {
            Some(filters) => seccompiler::apply_filter(filters.program(role)).map_err(Error::Seccomp),
            None => Ok(()),
        }
    }

    /// Makes the filter of a thread that a port started tighter. Where that fails the port's own filter stays, which
    /// the thread has from its start.
    pub fn tighten(&self, role: Role) {
        if let Err(error) = self.confine(role) {
            tracing::warn!("a thread keeps the wider filter of its port: {error}");
        }
    }
}
