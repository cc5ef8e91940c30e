//! The image behind a disk: a raw file or a block device, opened, locked and measured before the VM is made.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};

use super::options::DiskOptions;

/// Bytes of a sector, the unit of virtio's block requests.
pub const SECTOR: u64 = 512;

/// How long a lock may take. A VMM that was killed has its image open until the kernel has ended its last requests.
const LOCK_WITHIN: Duration = Duration::from_millis(500);
/// What a qcow2 image begins with.
const QCOW: [u8; 4] = *b"QFI\xfb";

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be opened.
    #[error("cannot open the disk image {path}{}", writing(*.readonly))]
    Open {
        /// Its path.
        path: PathBuf,
        /// Whether only to read it.
        readonly: bool,
        /// The error.
        source: io::Error,
    },
    /// A directory, a pipe or the like.
    #[error("the disk image {0} is neither a regular file nor a block device; give one of these")]
    NotADisk(PathBuf),
    /// No whole number of sectors.
    #[error(
        "the disk image {path} has {size} bytes, which are no whole sectors of 512; give a raw image (truncate --size=%512 rounds its size up)"
    )]
    Size {
        /// Its path.
        path: PathBuf,
        /// Its size, bytes.
        size: u64,
    },
    /// Somebody else has it.
    #[error(
        "the disk image {path} is in use, by another VM or as another disk of this one; {}",
        if *.readonly { "one of them writes to it" } else { "only disks that are all readonly=on can share one" }
    )]
    InUse {
        /// Its path.
        path: PathBuf,
        /// Whether it was to be read only.
        readonly: bool,
    },
    /// No O_DIRECT.
    #[error("the file system of the disk image {path} has no direct I/O; leave out direct=on")]
    Direct {
        /// Its path.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
}

fn writing(readonly: bool) -> &'static str {
    if readonly { "" } else { " for writing (readonly=on only reads)" }
}

/// An image that is ours.
#[derive(Debug)]
pub struct Image {
    /// The file. Its lock goes with it.
    pub file: File,
    /// The same without the page cache, for requests that are aligned.
    pub direct: Option<File>,
    /// Its path, for messages.
    pub path: PathBuf,
    /// Sectors.
    pub sectors: u64,
    /// Whether it is only read.
    pub readonly: bool,
    /// Whether space can be given back.
    pub discards: bool,
}

impl Image {
    /// Opens and locks it.
    pub fn open(options: &DiskOptions) -> Result<Self, Error> {
        let DiskOptions { path, readonly, direct, .. } = options;
        let (path, readonly) = (path.as_path(), *readonly);
        let failed = |source| Error::Open { path: path.into(), readonly, source };
        let kind = fs::metadata(path).map_err(failed)?.file_type();
        // A block device that is mounted, or otherwise the host's own, must not be written behind its back.
        let exclusive = if kind.is_block_device() && !readonly { libc::O_EXCL } else { 0 };
        // A pipe would block until somebody writes to it.
        let mut file = OpenOptions::new()
            .read(true)
            .write(!readonly && !kind.is_dir())
            .custom_flags(libc::O_NONBLOCK | exclusive)
            .open(path)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EBUSY) => Error::InUse { path: path.into(), readonly },
                _ => failed(source),
            })?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::NotADisk(path.into()));
        }
        // io_uring would give up where it should wait.
        fcntl(&file, FcntlArg::F_SETFL(OFlag::empty())).map_err(|error| failed(error.into()))?;
        lock(&file, path, readonly)?;
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(Error::Size { path: path.into(), size });
        }
        warn_of_qcow(&mut file, path);
        let direct = if *direct { Some(reopen_direct(&file, path, readonly)?) } else { None };
        let discards = !readonly && (kind.is_block_device() || can_punch(&file, size));
        Ok(Self { file, direct, path: path.into(), sectors: size / SECTOR, readonly, discards })
    }
}

/// Locks all of it: one writer, or any number of readers. The lock belongs to the open file, so it ends with the process.
fn lock(file: &File, path: &Path, readonly: bool) -> Result<(), Error> {
    let kind = if readonly { libc::F_RDLCK } else { libc::F_WRLCK };
    let lock =
        libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    let begin = Instant::now();
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
            Ok(_) => return Ok(()),
            Err(Errno::EAGAIN | Errno::EACCES) if begin.elapsed() < LOCK_WITHIN => {
                sleep(Duration::from_millis(20));
            }
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(Error::InUse { path: path.into(), readonly }),
            // Some network file systems have no locks; that is no reason not to run.
            Err(error) => {
                tracing::warn!("cannot lock {}: {error}; see that nobody else uses it", path.display());
                return Ok(());
            }
        }
    }
}

/// The guest's own bytes may look like anything, so this is no more than a hint.
fn warn_of_qcow(file: &mut File, path: &Path) {
    let mut magic = [0; QCOW.len()];
    if file.rewind().and_then(|()| file.read_exact(&mut magic)).is_ok() && magic == QCOW {
        tracing::warn!(
            "{} looks like a qcow2 image, and is shown to the guest as it is; `qemu-img convert -O raw` makes a raw one",
            path.display()
        );
    }
}

/// The same file once more: not by its path, which may lead elsewhere by now.
fn reopen_direct(file: &File, path: &Path, readonly: bool) -> Result<File, Error> {
    let again = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new()
        .read(true)
        .write(!readonly)
        .custom_flags(libc::O_DIRECT)
        .open(again)
        .map_err(|source| Error::Direct { path: path.into(), source })
}

/// Whether the file system can make holes: tried behind the end, where there is nothing to lose.
fn can_punch(file: &File, size: u64) -> bool {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    i64::try_from(size).is_ok_and(|end| fallocate(file, flags, end, 4096).is_ok())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn options(path: &Path, more: &str) -> DiskOptions {
        format!("path={}{more}", path.display()).parse().unwrap()
    }

    fn image(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let refused = |path: &Path, more| Image::open(&options(path, more)).unwrap_err();
        for more in ["", ",readonly=on"] {
            assert!(matches!(refused(&folder.path().join("absent"), more), Error::Open { .. }));
            for path in [folder.path(), &pipe, Path::new("/dev/null")] {
                assert!(matches!(refused(path, more), Error::NotADisk(_)), "{path:?}");
            }
            for size in [0, 1, 513] {
                assert!(matches!(refused(image(size).path(), more), Error::Size { .. }), "{size}");
            }
        }
    }

    #[test]
    fn one_writer_or_many_readers() {
        let file = image(4096);
        let open = |more| Image::open(&options(file.path(), more));
        let writer = open("").unwrap();
        assert_eq!((writer.sectors, writer.readonly), (8, false));
        for more in ["", ",readonly=on"] {
            assert!(matches!(open(more), Err(Error::InUse { .. })), "beside a writer: {more}");
        }
        drop(writer);
        let reader = open(",readonly=on").unwrap();
        assert!(reader.readonly && !reader.discards);
        assert!(open(",readonly=on").is_ok());
        assert!(matches!(open(""), Err(Error::InUse { .. })), "beside a reader");
        assert!((&reader.file).write(b"x").is_err());
    }
}
