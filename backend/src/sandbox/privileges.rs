//! User and capabilities.

use std::convert::Infallible;
use std::ffi::CString;
use std::str::FromStr;

use nix::unistd::{Gid, Uid, User, initgroups, setresgid, setresuid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

use super::Error;

/// A user, by name or number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserName(String);

impl FromStr for UserName {
    type Err = Infallible;

    fn from_str(name: &str) -> Result<Self, Infallible> {
        Ok(UserName(name.to_owned()))
    }
}

impl UserName {
    fn find(&self) -> Result<User, Error> {
        let found = match self.0.parse() {
            Ok(number) => User::from_uid(Uid::from_raw(number)),
            Err(_) => User::from_name(&self.0),
        };
        found
            .map_err(|source| Error::User { user: self.0.clone(), source })?
            .ok_or_else(|| Error::NoUser(self.0.clone()))
    }
}

/// Becomes `user` with that user's groups, if one is named; gives up every capability of the calling thread, and the
/// means to get one back.
pub(super) fn give_up(user: Option<&UserName>) -> Result<(), Error> {
    let refused = |what| move |source: std::io::Error| Error::Privileges { what, source };
    // Found while the files of the user database can be read.
    let user = user.map(UserName::find).transpose()?;
    let held = capabilities(None).map_err(|error| refused("read the capabilities")(error.into()))?;
    // A program without the right to do this has no capability that its bounding set could give back: no_new_privs.
    if held.effective.contains(CapabilitySet::SETPCAP) {
        for capability in CapabilitySet::all().iter() {
            // The kernel may know fewer.
            let _ = remove_capability_from_bounding_set(capability);
        }
    }
    if let Some(user) = user {
        become_user(&user).map_err(|error| refused("become another user")(error.into()))?;
    }
    // Kernels before 4.3 have no ambient set to clear.
    let _ = clear_ambient_capability_set();
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).map_err(|error| refused("give up the capabilities")(error.into()))?;
    set_no_new_privs(true).map_err(|error| refused("forbid new privileges")(error.into()))
}

/// Changes user and groups; nothing to do for who it is already.
fn become_user(user: &User) -> nix::Result<()> {
    let is_it = Uid::current() == user.uid
        && Uid::effective() == user.uid
        && Gid::current() == user.gid
        && Gid::effective() == user.gid;
    if is_it {
        return Ok(());
    }
    let name = CString::new(user.name.as_str()).map_err(|_| nix::Error::EINVAL)?;
    initgroups(&name, user.gid)?;
    setresgid(user.gid, user.gid, user.gid)?;
    setresuid(user.uid, user.uid, user.uid)
}
