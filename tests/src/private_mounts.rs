//! Work among mounts of its own: another folder as the root, a layer over a folder that stays as it is. Whatever is mounted
//! goes with the thread that mounted it.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// What the thread that works among mounts of its own has, and no other.
#[derive(Debug)]
pub struct Mounts(());

/// Does `work` in a thread with mounts of its own. It needs root.
pub fn with_private_mounts<T: Send, E: From<io::Error> + Send>(
    work: impl FnOnce(&Mounts) -> Result<T, E> + Send,
) -> Result<T, E> {
    let own = || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        // Nothing that is mounted here is seen elsewhere.
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        Ok(Mounts(()))
    };
    thread::scope(|scope| {
        let worker = scope.spawn(|| work(&own().map_err(no_mounts)?));
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn no_mounts(error: nix::Error) -> io::Error {
    let error = io::Error::from(error);
    io::Error::new(error.kind(), format!("cannot have mounts of its own (that needs root): {error}"))
}

impl Mounts {
    /// Shows `from` at `to` as well.
    pub fn bind(&self, from: &Path, to: &Path) -> io::Result<()> {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(from), to, None::<&str>, flags, None::<&str>).map_err(|e| failed("bind", to, e))
    }

    /// Shows `lower` below the empty folder `at`, with all that is changed there kept apart and in memory.
    pub fn layer(&self, lower: &Path, at: &Path) -> io::Result<Layer> {
        let memory = Some("tmpfs");
        mount(memory, at, memory, MsFlags::empty(), Some("mode=755")).map_err(|e| failed("mount", at, e))?;
        let (upper, work, root) = (at.join("upper"), at.join("work"), at.join("root"));
        for folder in [&upper, &work, &root] {
            std::fs::create_dir(folder)?;
        }
        let options =
            format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        let overlay = Some("overlay");
        mount(overlay, &root, overlay, MsFlags::empty(), Some(options.as_str()))
            .map_err(|e| failed("mount an overlay at", &root, e))?;
        Ok(Layer { root, upper })
    }

    /// Makes the Debian system below `root` ready for [`command_in`]: it sees this machine's processes, and devices that
    /// have no state.
    pub fn enter(&self, root: &Path) -> io::Result<()> {
        let proc = root.join("proc");
        self.bind(Path::new("/proc"), &proc)?;
        let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        mount(None::<&str>, &proc, None::<&str>, read_only, None::<&str>)
            .map_err(|e| failed("protect", &proc, e))?;
        for name in DEVICES {
            self.bind(&Path::new("/dev").join(name), &root.join("dev").join(name))?;
        }
        Ok(())
    }
}

/// The devices of a Debian system in a folder. (It has empty files of these names.)
pub const DEVICES: [&str; 5] = ["full", "null", "random", "urandom", "zero"];

/// A command in the Debian system below `root`.
pub fn command_in(root: &Path, words: &[&str]) -> Command {
    let mut command = Command::new("/usr/sbin/chroot");
    command.arg(root).args(words).stdin(Stdio::null()).env_clear().envs([
        ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        ("HOME", "/root"),
        ("LC_ALL", "C.UTF-8"),
        ("DEBIAN_FRONTEND", "noninteractive"),
    ]);
    command
}

/// A folder that shows another one and keeps what is changed apart.
#[derive(Debug)]
pub struct Layer {
    /// The folder.
    pub root: PathBuf,
    /// What was changed: files that are new or different, and a character device 0, 0 for each that is gone.
    pub upper: PathBuf,
}

fn failed(what: &str, at: &Path, error: nix::Error) -> io::Error {
    let error = io::Error::from(error);
    io::Error::new(error.kind(), format!("cannot {what} {}: {error}", at.display()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Tests run as root, as those of the namespaces do.
    #[test]
    fn a_layer_keeps_changes_apart_and_goes_with_its_thread() {
        let (lower, at) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(lower.path().join("kept"), "old").unwrap();
        fs::write(lower.path().join("gone"), "old").unwrap();
        with_private_mounts(|mounts| {
            let layer = mounts.layer(lower.path(), at.path())?;
            fs::write(layer.root.join("kept"), "new")?;
            fs::remove_file(layer.root.join("gone"))?;
            assert_eq!(fs::read_to_string(layer.upper.join("kept"))?, "new");
            assert!(layer.upper.join("gone").symlink_metadata().is_ok(), "a whiteout");
            io::Result::Ok(())
        })
        .unwrap();
        assert_eq!(fs::read_to_string(lower.path().join("kept")).unwrap(), "old");
        assert!(lower.path().join("gone").exists());
        assert_eq!(at.path().read_dir().unwrap().count(), 0, "nothing is mounted there any more");
    }
}
