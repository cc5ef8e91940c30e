//! The FIFO region's file: made or checked when the VM starts, mapped shared, and this VM's alone while it runs.
//!
//! Backends map the same file, and the guest finds it in BAR 2 of [`crate::ivshmem`]. What is in it is for them;
//! all the VMM ever writes is a new region, and "no consumer" when the guest starts and ends.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use ivcpu_abi::layout::HEADER_SIZE;
use ivcpu_abi::{Geometry, Region};
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use vm_memory::{FileOffset, MmapRegion};

/// Bytes of a region that is made without being told how many.
const DEFAULT_SIZE: u64 = 2 << 20;
/// Fewest bytes: virtio-pmem, the other way to show the same file to a guest, takes multiples of this.
const MIN_SIZE: u64 = 2 << 20;
/// Most bytes. A region of the present version uses 516 KiB at most.
const MAX_SIZE: u64 = 1 << 30;
/// Who may use the file, before the umask: owner and group, so that a backend may be another user.
const MODE: u32 = 0o660;

/// `fifo=PATH[,fifo_size=2M]` of `--ivcpu`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FifoOptions {
    /// The file, best in /dev/shm.
    pub path: PathBuf,
    /// Its size in bytes: that of a new one, or what an old one must have.
    pub size: Option<u64>,
}

/// Whether a region may have this many bytes: as a PCI BAR, a power of two.
pub fn is_size(size: u64) -> bool {
    size.is_power_of_two() && (MIN_SIZE..=MAX_SIZE).contains(&size)
}

/// Why there is no region.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There was no file, and none could be made.
    #[error(
        "cannot make the FIFO region {} ({step}); its folder must exist, be writable and have {size} bytes left",
        path.display()
    )]
    Make {
        /// The file.
        path: PathBuf,
        /// What failed.
        step: &'static str,
        /// Bytes wanted.
        size: u64,
        /// The error.
        source: io::Error,
    },
    /// The file could not be opened or looked at.
    #[error("cannot open the FIFO region {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// A folder, pipe or device.
    #[error("the FIFO region {} is not a regular file; name one, best in /dev/shm", .0.display())]
    NotAFile(PathBuf),
    /// A size that no BAR can have.
    #[error(
        "the FIFO region {} has {size} bytes and needs a power of two from 2M to 1G; name a file that is not there yet",
        path.display()
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// Another size than asked for.
    #[error(
        "the FIFO region {} has {size} bytes, fifo_size= says {wanted}; leave fifo_size= out, or name another file",
        path.display()
    )]
    OtherSize {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// The size asked for.
        wanted: u64,
    },
    /// Another VMM has it.
    #[error("the FIFO region {} belongs to another running VM; each VM needs a file of its own", .0.display())]
    InUse(PathBuf),
    /// The file has holes, and its file system no room to fill them.
    #[error(
        "cannot reserve the {size} bytes of the FIFO region {}; make room there, or put it into /dev/shm",
        path.display()
    )]
    Reserve {
        /// The file.
        path: PathBuf,
        /// Bytes wanted.
        size: u64,
        /// The error.
        source: io::Error,
    },
    /// It could not be mapped into this process.
    #[error("cannot map the FIFO region {}", path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// The error.
        source: vm_memory::mmap::MmapRegionError,
    },
    /// What is in the file is something else.
    #[error("cannot use {} as FIFO region; name a file that is not there yet", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ivcpu_abi::Error,
    },
}

/// The region of one VM.
#[derive(Debug)]
pub struct Fifo {
    region: Region,
    /// Kept as long as `region`; holds the file open, and with it the lock.
    mapping: Arc<MmapRegion>,
}

impl Fifo {
    /// Opens the region, makes it if there is none, and marks its consumer absent: this VM's has not started yet.
    pub fn open(options: &FifoOptions) -> Result<Self, Error> {
        let path = &options.path;
        let at = |source| Error::Open { path: path.clone(), source };
        let file = match open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make(path, options.size.unwrap_or(DEFAULT_SIZE))?;
                open(path)
            }
            opened => opened,
        };
        let file = file.map_err(at)?;
        let metadata = file.metadata().map_err(at)?;
        if !metadata.is_file() {
            return Err(Error::NotAFile(path.clone()));
        }
        let size = metadata.len();
        if !is_size(size) {
            return Err(Error::Size { path: path.clone(), size });
        }
        if let Some(wanted) = options.size.filter(|&wanted| wanted != size) {
            return Err(Error::OtherSize { path: path.clone(), size, wanted });
        }
        lock(&file, path)?;
        // A page that is not there when it is touched would be a SIGBUS, here or in a backend.
        reserve(&file, size).map_err(|source| Error::Reserve { path: path.clone(), size, source })?;
        let (base, mapping) = map(file, size, path)?;
        // SAFETY: `base` is the start of `mapping`, as large as said and kept beside the handle; this process
        // reaches its bytes through the handle only.
        let region = unsafe { Region::open(base, mapping.size()) }
            .map_err(|source| Error::Content { path: path.clone(), source })?;
        region.forget_consumer();
        Ok(Self { region, mapping: Arc::new(mapping) })
    }

    /// Its bytes.
    pub fn size(&self) -> u64 {
        self.mapping.size() as u64
    }

    /// The mapping, for KVM to show to the guest.
    pub fn mapping(&self) -> Arc<MmapRegion> {
        Arc::clone(&self.mapping)
    }
}

/// The guest is gone, and its consumer with it: producers need not find that out by their clocks.
impl Drop for Fifo {
    fn drop(&mut self) {
        self.region.forget_consumer();
    }
}

fn open(path: &Path) -> io::Result<File> {
    // Not blocking, for the case that it is a pipe.
    OpenOptions::new().read(true).write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)
}

/// Makes a complete region and only then gives it its name, so that nobody finds half of one.
fn make(path: &Path, size: u64) -> Result<(), Error> {
    let failed = |step| move |source| Error::Make { path: path.to_path_buf(), step, size, source };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = tempfile::Builder::new()
        .prefix(".ivcpu-fifo-")
        .permissions(Permissions::from_mode(MODE))
        .tempfile_in(folder)
        .map_err(failed("create a file"))?;
    file.as_file().set_len(size).map_err(failed("set its size"))?;
    reserve(file.as_file(), size).map_err(failed("reserve its memory"))?;
    let (base, mapping) = map(file.as_file().try_clone().map_err(failed("map it"))?, size, path)?;
    // SAFETY: `base` is the start of `mapping`, as large as said; the file has no name yet, so nobody else has it.
    unsafe { Region::create(base, mapping.size(), Geometry::DEFAULT) }
        .map_err(|source| Error::Content { path: path.to_path_buf(), source })?;
    match file.persist_noclobber(path) {
        Ok(_) => Ok(()),
        // Somebody else made it meanwhile; it is looked at like any that was there.
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(failed("give it its name")(error.error)),
    }
}

/// Takes the header for this VM: two consumers of one region would take each other's completions. Producers lock the
/// rings, which follow. The lock goes with the file, so with the process, however that ends.
fn lock(file: &File, path: &Path) -> Result<(), Error> {
    let header = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: HEADER_SIZE as libc::off_t,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&header)) {
        Ok(_) => Ok(()),
        Err(nix::Error::EAGAIN | nix::Error::EACCES) => Err(Error::InUse(path.to_path_buf())),
        Err(error) => Err(Error::Open { path: path.to_path_buf(), source: error.into() }),
    }
}

fn reserve(file: &File, size: u64) -> io::Result<()> {
    Ok(fallocate(file, FallocateFlags::empty(), 0, size as libc::off_t)?)
}

fn map(file: File, size: u64, path: &Path) -> Result<(NonNull<u8>, MmapRegion), Error> {
    let failed = |source| Error::Map { path: path.to_path_buf(), source };
    let mapping = MmapRegion::from_file(FileOffset::new(file, 0), size as usize).map_err(failed)?;
    let base = NonNull::new(mapping.as_ptr())
        .ok_or_else(|| failed(vm_memory::mmap::MmapRegionError::InvalidPointer))?;
    Ok((base, mapping))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use ivcpu_abi::layout::{HINTS_AT, STATE_ABSENT, STATE_AT, STATE_AWAKE, STATE_MASK, VERSION_AT};

    use super::*;

    fn options(path: &Path, size: Option<u64>) -> FifoOptions {
        FifoOptions { path: path.to_path_buf(), size }
    }

    fn scratch() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("fifo");
        (folder, path)
    }

    fn word(path: &Path, at: usize) -> u32 {
        u32::from_le_bytes(fs::read(path).unwrap()[at..at + 4].try_into().unwrap())
    }

    fn overwrite(path: &Path, at: usize, value: u32) {
        let mut bytes = fs::read(path).unwrap();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn a_missing_file_is_made_and_nothing_else_is_left() {
        let (folder, path) = scratch();
        let fifo = Fifo::open(&options(&path, None)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 2 << 20);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        assert_eq!((fifo.region.geometry(), fifo.mapping().size()), (Geometry::DEFAULT, 2 << 20));
        drop(fifo);
        Fifo::open(&options(&path, Some(2 << 20))).unwrap();
        let other = Fifo::open(&options(&folder.path().join("other"), Some(4 << 20))).unwrap();
        assert_eq!(other.mapping().size(), 4 << 20);
    }

    #[test]
    fn a_file_that_is_there_is_kept_and_its_consumer_forgotten() {
        let (_folder, path) = scratch();
        drop(Fifo::open(&options(&path, None)).unwrap());
        for _ in 0..2 {
            overwrite(&path, STATE_AT, STATE_AWAKE);
            overwrite(&path, HINTS_AT, 1);
            let fifo = Fifo::open(&options(&path, None)).unwrap();
            assert_eq!(word(&path, STATE_AT) & STATE_MASK, STATE_ABSENT, "at start");
            assert_eq!(word(&path, HINTS_AT), 1, "not made anew");
            let state = fifo.mapping().as_ptr().wrapping_add(STATE_AT).cast::<u32>();
            // SAFETY: inside the mapping, which `fifo` keeps.
            unsafe { state.write_volatile(STATE_AWAKE) };
            drop(fifo);
            assert_eq!(word(&path, STATE_AT) & STATE_MASK, STATE_ABSENT, "at the end");
        }
    }

    #[test]
    fn what_is_no_region_is_refused_and_left_alone() {
        let (folder, path) = scratch();
        assert!(matches!(Fifo::open(&options(folder.path(), None)), Err(Error::Open { .. })));
        assert!(matches!(Fifo::open(&options(Path::new("/dev/null"), None)), Err(Error::NotAFile(_))));
        let lost = folder.path().join("missing/fifo");
        assert!(matches!(Fifo::open(&options(&lost, None)), Err(Error::Make { .. })));

        for size in [0, 4096, 3 << 20, 4 << 30] {
            File::create(&path).unwrap().set_len(size).unwrap();
            assert!(matches!(Fifo::open(&options(&path, None)), Err(Error::Size { .. })), "{size}");
        }
        File::create(&path).unwrap().set_len(2 << 20).unwrap();
        let opened = Fifo::open(&options(&path, None));
        assert!(matches!(opened, Err(Error::Content { source: ivcpu_abi::Error::Magic(0), .. })));

        fs::remove_file(&path).unwrap();
        drop(Fifo::open(&options(&path, None)).unwrap());
        let opened = Fifo::open(&options(&path, Some(4 << 20)));
        assert!(matches!(opened, Err(Error::OtherSize { size: 0x20_0000, wanted: 0x40_0000, .. })));
        overwrite(&path, VERSION_AT, 2);
        let opened = Fifo::open(&options(&path, None));
        assert!(matches!(opened, Err(Error::Content { source: ivcpu_abi::Error::Version(2), .. })));
        assert_eq!(word(&path, VERSION_AT), 2);
    }

    #[test]
    fn two_vms_do_not_share_a_region() {
        let (_folder, path) = scratch();
        let first = Fifo::open(&options(&path, None)).unwrap();
        assert!(matches!(Fifo::open(&options(&path, None)), Err(Error::InUse(_))));
        drop(first);
        Fifo::open(&options(&path, None)).unwrap();
    }
}
