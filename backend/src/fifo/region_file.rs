//! The file of a FIFO region: made, opened, mapped, and its rings locked.
//!
//! A ring belongs to whoever holds the lock on its bytes: an open-file-description lock, which the kernel releases
//! with the last descriptor of that opening, so also when the process is killed. The file is therefore always opened
//! anew here: an inherited descriptor shares its opening, and its locks, with the program that passed it on.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use ivcpu_abi::layout::{MAGIC, MAX_RINGS, MAX_SOURCES};
use ivcpu_abi::{Geometry, Producer, Region};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl, posix_fallocate};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion};

use super::options::{CreateOptions, Place};

/// Bytes of the largest region there can be; a file may be larger.
const LARGEST: usize = match Geometry::new(MAX_RINGS as u32, MAX_SOURCES as u32) {
    Some(geometry) => geometry.used_size(),
    None => 0,
};

/// Why a region cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened.
    #[error("cannot open FIFO region {path}: {source}")]
    Open {
        /// Its path.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The system refuses something about the open file.
    #[error("cannot {what} FIFO region {path}: {source}")]
    System {
        /// What it refuses.
        what: &'static str,
        /// The file's path.
        path: PathBuf,
        /// What it says.
        #[source]
        source: io::Error,
    },
    /// The file cannot be mapped.
    #[error("cannot map FIFO region {path}: {source}")]
    Map {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: MmapRegionError,
    },
    /// Not something that can hold a region.
    #[error("FIFO region {0} is not a regular file; create one in shared memory and name that")]
    NotFile(PathBuf),
    /// The file holds no region that can be used.
    #[error("cannot use FIFO region {path}: {source}")]
    Region {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ivcpu_abi::Error,
    },
    /// A file to be laid out anew holds something else.
    #[error("{0} exists and is not a FIFO region; it is left alone, remove it first or choose another path")]
    Foreign(PathBuf),
    /// A region to be laid out anew has another size.
    #[error(
        "FIFO region {path} has {found} bytes instead of {wanted}; it is left alone because a VM may have mapped it, \
         remove it first or choose another path"
    )]
    Size {
        /// Its path.
        path: PathBuf,
        /// Bytes it has.
        found: u64,
        /// Bytes asked for.
        wanted: usize,
    },
    /// A VMM holds the header of a region to be laid out anew, or a backend one of its rings.
    #[error("FIFO region {0} is in use by a VMM or a backend; stop that first or choose another path")]
    InUse(PathBuf),
}

/// An open and mapped region.
///
/// The mapping is as long as the file was when it was opened. Whoever may write the file may also cut it, and then
/// the next access kills this process, as it does with guest memory: the VMM, which can do that, is trusted not to.
/// The guest cannot; what it can do, write every byte, is the business of `ivcpu_abi`.
#[derive(Debug)]
pub struct RegionFile {
    path: PathBuf,
    file: Arc<File>,
    region: Region,
    /// Keeps the memory of `region` mapped. Producers point into it too: see [`super::Fifo`].
    _mapping: MmapRegion,
}

impl RegionFile {
    /// Opens and checks the region at `place`.
    pub fn open(place: &Place) -> Result<Self, Error> {
        let path = place.path();
        let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let file = opened.map_err(|source| Error::Open { path: path.clone(), source })?;
        let length = length(&file, &path)?.min(LARGEST as u64) as usize;
        if length == 0 {
            // Nothing to map; the words are those for any file that is too short.
            let source = ivcpu_abi::Error::TooSmall { mapped: 0, needed: Geometry::DEFAULT.used_size() };
            return Err(Error::Region { path, source });
        }
        // SAFETY: `over` maps these bytes for as long as the region is kept, and nothing else here touches them.
        Self::over(path, file, length, |base| unsafe { Region::open(base, length) })
    }

    /// Makes the region that `options` ask for. A whole one of the same size and rings is left as it is, unless a new
    /// one is asked for: its VM may be running, and not every VMM holds a lock. What is there already is only touched
    /// when it is a region (or zeros) of the same size and nobody holds a part of it.
    pub fn create(options: &CreateOptions) -> Result<Self, Error> {
        let (path, size) = (options.path.clone(), options.size.0);
        let mut how = OpenOptions::new();
        how.read(true).write(true).create(true).truncate(false).mode(0o660).custom_flags(libc::O_NONBLOCK);
        let file = how.open(&path).map_err(|source| Error::Open { path: path.clone(), source })?;
        let system = |what| {
            let path = path.clone();
            move |errno: Errno| Error::System { what, path, source: errno.into() }
        };
        let found = length(&file, &path)?;
        // All of the file: its header, which a VMM may hold, and its rings. Released when the file is closed, at the end.
        if !try_lock(&file, 0, 0).map_err(system("lock"))? {
            return Err(Error::InUse(path));
        }
        if found == 0 {
            nix::unistd::ftruncate(&file, size as libc::off_t).map_err(system("set the size of"))?;
        } else if !may_be_replaced(&file).map_err(|source| Error::System {
            what: "read",
            path: path.clone(),
            source,
        })? {
            return Err(Error::Foreign(path));
        } else if found != size as u64 {
            return Err(Error::Size { path, found, wanted: size });
        }
        let geometry = Geometry::new(options.rings, MAX_SOURCES as u32).unwrap_or(Geometry::DEFAULT);
        if found != 0
            && !options.anew
            && let Ok(there) = Self::open(&Place::Path(path.clone()))
            && there.region.geometry() == geometry
        {
            return Ok(there);
        }
        // Memory that cannot be had is an error here, and not a signal in the middle of a session.
        posix_fallocate(&file, 0, geometry.used_size() as libc::off_t)
            .map_err(system("allocate memory for"))?;
        // SAFETY: as in `open`.
        Self::over(path, file, size, |base| unsafe { Region::create(base, size, geometry) })
    }

    /// Maps `length` bytes of `file` and makes a region of them. To `make` is promised: the bytes stay mapped, readable
    /// and writable, for as long as the result lives, and this program reaches them through the made region alone.
    fn over(
        path: PathBuf,
        file: File,
        length: usize,
        make: impl FnOnce(NonNull<u8>) -> Result<Region, ivcpu_abi::Error>,
    ) -> Result<Self, Error> {
        let file = Arc::new(file);
        let mapped = MmapRegion::from_file(FileOffset::from_arc(file.clone(), 0), length);
        let mapping = mapped.map_err(|source| Error::Map { path: path.clone(), source })?;
        // The kernel maps nothing at 0; a dangling pointer would be refused as not on a page.
        let base = NonNull::new(mapping.as_ptr()).unwrap_or(NonNull::dangling());
        match make(base) {
            Ok(region) => Ok(RegionFile { path, file, region, _mapping: mapping }),
            Err(source) => Err(Error::Region { path, source }),
        }
    }

    /// How many rings there are.
    pub fn rings(&self) -> usize {
        self.region.geometry().rings()
    }

    /// The region. What is made of it must not outlive `self`.
    #[cfg(test)]
    pub(super) fn region(&self) -> Region {
        self.region
    }

    /// Claims ring `ring`, unless another producer holds it. To be asked once a ring: a lock never keeps out its own
    /// holder. The producer must not outlive `self`, and the ring is free again when `self` is dropped.
    pub(super) fn claim(&self, ring: usize) -> Result<Option<Producer>, Error> {
        let Some((offset, length)) = self.region.geometry().lock_range(ring) else { return Ok(None) };
        match try_lock(&self.file, offset, length) {
            Ok(true) => Ok(Producer::claim(self.region, ring)),
            Ok(false) => Ok(None),
            Err(errno) => {
                Err(Error::System { what: "lock a ring of", path: self.path.clone(), source: errno.into() })
            }
        }
    }
}

impl Place {
    /// A path under which the file can be opened anew.
    pub fn path(&self) -> PathBuf {
        match self {
            Place::Path(path) => path.clone(),
            Place::Inherited(fd) => format!("/proc/self/fd/{fd}").into(),
        }
    }

    /// Checks that an inherited descriptor is a file, before descriptors of our own can take its number. A file that
    /// a path names may come later.
    pub fn check(&self) -> Result<(), Error> {
        let Place::Inherited(_) = self else { return Ok(()) };
        let path = self.path();
        let metadata =
            std::fs::metadata(&path).map_err(|source| Error::Open { path: path.clone(), source })?;
        if metadata.is_file() { Ok(()) } else { Err(Error::NotFile(path)) }
    }
}

/// Length of a regular file.
fn length(file: &File, path: &Path) -> Result<u64, Error> {
    let metadata = file.metadata().map_err(|source| Error::Open { path: path.to_owned(), source })?;
    if metadata.is_file() { Ok(metadata.len()) } else { Err(Error::NotFile(path.to_owned())) }
}

/// Takes the lock on some bytes, 0 = to the file's end; `false` when somebody else holds one on any of them.
fn try_lock(file: &File, offset: usize, length: usize) -> nix::Result<bool> {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: offset as libc::off_t,
        l_len: length as libc::off_t,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Whether nothing is lost when a region is laid out in the file: it holds one, or zeros where one would be.
fn may_be_replaced(file: &File) -> io::Result<bool> {
    let mut start = vec![0; LARGEST];
    let mut read = 0;
    while let rest @ [_, ..] = start.get_mut(read..).unwrap_or_default() {
        match file.read_at(rest, read as u64)? {
            0 => break,
            more => read += more,
        }
    }
    Ok(start.starts_with(&MAGIC.to_le_bytes()) || start.iter().all(|byte| *byte == 0))
}
