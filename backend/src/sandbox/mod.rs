//! What the program can still do once it serves: as little as it needs.
//!
//! Everything that wants rights is opened first: TAP devices, sockets, io_uring. Then, in this order, while there is
//! one thread only ([`Sandbox::enter`]):
//!
//! 1. the user is changed, if one was named, and every capability is given up, for good (`no_new_privs`);
//! 2. Landlock hides all files but those that the options name;
//! 3. system-call filters are made ([`ivcpu_sandbox`]), one for each role a thread can have. Every thread puts on its own
//!    ([`Sandbox::confine`]); those that a port starts have put on the port's before, and each makes it tighter.
//!
//! A peer that takes over a poll thread then finds no file to open, no program to start, no socket to make, and no
//! memory that can be executed.

mod files;
mod privileges;
mod roles;

use std::sync::Arc;

use ivcpu_sandbox::{Filters, Program};
pub use ivcpu_sandbox::{Seccomp, violation};

pub use files::{Files, Restriction};
pub use privileges::UserName;
pub use roles::Role;

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
    /// System calls cannot be filtered.
    #[error("{0}{cause}", cause = because(.0))]
    Seccomp(#[from] ivcpu_sandbox::Error),
}

/// Why, behind a colon.
fn because(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(String::new, |source| format!(": {source}"))
}

/// How the program shall be confined.
#[derive(Debug, Default)]
pub struct Wanted<'a> {
    /// Who it shall be.
    pub user: Option<&'a UserName>,
    /// What becomes of forbidden system calls.
    pub seccomp: Seccomp,
    /// The files it may use; `None` = Landlock is not asked.
    pub files: Option<Files>,
}

/// A confined program's filters.
#[derive(Clone, Debug, Default)]
pub struct Sandbox {
    filters: Option<Arc<Filters>>,
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
        let program = Program { name: "ivcpu-backend", last_act: || () };
        let filters = Filters::arm::<Role>(program, wanted.seccomp)?;
        Ok(Sandbox { filters: filters.map(Arc::new) })
    }

    /// Puts the filter of `role` on the calling thread, for the rest of its life and for all threads it starts.
    pub fn confine(&self, role: Role) -> Result<(), Error> {
        match &self.filters {
            Some(filters) => Ok(filters.enter(role)?),
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
