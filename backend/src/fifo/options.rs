//! The words of `--fifo` and of `fifo create`.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Subcommand};
use ivcpu_abi::layout::{MAX_RINGS, REGION_ALIGN};

/// How completions leave through a FIFO region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FifoOptions {
    /// The region's file.
    pub place: Place,
    /// How long an entry may wait for a consumer that says it is awake before the driver is called.
    pub bound: Duration,
    /// For tests: no entry is ever written, so that every completion waits for the bound.
    pub lose_entries: bool,
}

/// Where a region's file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// At this path.
    Path(PathBuf),
    /// Open as this file descriptor, inherited from the program that started us.
    Inherited(RawFd),
}

impl FifoOptions {
    const BOUND: Duration = Duration::from_micros(100);
}

impl FromStr for FifoOptions {
    type Err = String;

    fn from_str(words: &str) -> Result<Self, String> {
        let (mut place, mut bound, mut lose_entries) = (None, Self::BOUND, false);
        for word in words.split(',') {
            match word.split_once('=') {
                Some(("path" | "fd", _)) if place.is_some() => {
                    return Err("one path or one fd is wanted".to_owned());
                }
                Some(("path", path)) if !path.is_empty() => place = Some(Place::Path(path.into())),
                Some(("fd", number)) => {
                    let number = number.parse().ok().filter(|number| *number > 2);
                    place = Some(Place::Inherited(number.ok_or("the fd is a number from 3 on")?));
                }
                Some(("bound_us", micros)) => {
                    let micros = micros.parse().ok().filter(|micros| (1..=1_000_000).contains(micros));
                    bound = Duration::from_micros(micros.ok_or("bound_us is 1 to 1000000 microseconds")?);
                }
                Some(("lose_entries", "on")) => lose_entries = true,
                Some(("lose_entries", "off")) => lose_entries = false,
                _ => {
                    return Err(format!(
                        "'{word}' is none of path=, fd=, bound_us= and, for tests, lose_entries=on|off"
                    ));
                }
            }
        }
        let place = place.ok_or("the region's file is missing: path=PATH or fd=N")?;
        Ok(FifoOptions { place, bound, lose_entries })
    }
}

/// What to do with FIFO regions.
#[derive(Debug, Subcommand)]
pub enum FifoCommand {
    /// Make the file of a FIFO region, for a VMM that shows it to the guest (ivshmem-plain or virtio-pmem). A whole
    /// region of this size that is there already is left as it is; a damaged one is laid out anew, unless it is in use.
    Create(CreateOptions),
}

/// A region to be made.
#[derive(Args, Debug)]
pub struct CreateOptions {
    /// The file, in shared memory: /dev/shm/NAME.
    pub path: PathBuf,

    /// Bytes of the file: a power of two, at least 2M, as the carriers want it.
    #[arg(long, value_name = "SIZE", default_value = "2M")]
    pub size: FileSize,

    /// Rings, one for each poll thread of all backends of the VM.
    #[arg(long, value_name = "N", default_value_t = 16)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=MAX_RINGS as i64), allow_negative_numbers = true)]
    pub rings: u32,

    /// Lay a region that is there already out anew, whatever is in it. Not while its VM runs: the guest's module would
    /// stop polling.
    #[arg(long)]
    pub anew: bool,
}

/// Bytes of a region's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSize(pub usize);

impl FromStr for FileSize {
    type Err = String;

    fn from_str(words: &str) -> Result<Self, String> {
        let units = [("K", 10), ("M", 20), ("G", 30)];
        let unit = units.iter().find_map(|(unit, shift)| Some((words.strip_suffix(unit)?, *shift)));
        let (number, shift) = unit.unwrap_or((words, 0));
        let bytes = number.parse::<usize>().ok().and_then(|number| number.checked_mul(1 << shift));
        match bytes {
            Some(bytes) if bytes.is_power_of_two() && bytes >= REGION_ALIGN => Ok(FileSize(bytes)),
            _ => Err("expected a power of two from 2M on, as in 2M".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_named_by_path_or_descriptor() {
        let options = FifoOptions {
            place: Place::Path("/dev/shm/f".into()),
            bound: Duration::from_micros(100),
            lose_entries: false,
        };
        assert_eq!("path=/dev/shm/f".parse(), Ok(options.clone()));
        assert_eq!(
            "fd=7,bound_us=2000,lose_entries=on".parse(),
            Ok(FifoOptions {
                place: Place::Inherited(7),
                bound: Duration::from_millis(2),
                lose_entries: true
            })
        );
        for bad in [
            "",
            "/dev/shm/f",
            "path=",
            "fd=2",
            "fd=x",
            "path=a,fd=3",
            "path=a,bound_us=0",
            "path=a,bound_us=1000001",
            "path=a,lose_entries=maybe",
            "path=a,",
            "bound_us=100",
        ] {
            assert!(bad.parse::<FifoOptions>().is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_what_both_carriers_take() {
        assert_eq!("2M".parse(), Ok(FileSize(2 << 20)));
        assert_eq!("4194304".parse(), Ok(FileSize(4 << 20)));
        assert_eq!("1G".parse(), Ok(FileSize(1 << 30)));
        for bad in ["", "M", "1M", "3M", "-2M", "2T", "99999999999999999999G", "0"] {
            assert!(bad.parse::<FileSize>().is_err(), "{bad}");
        }
    }
}
