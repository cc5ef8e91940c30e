//! Which C library the programs were built with, and so which Debian they need.

use std::fs;
use std::io;
use std::path::Path;

use object::Endianness;
use object::elf::FileHeader64;
use object::read::elf::FileHeader;

/// A version of glibc: 2.36 is `(2, 36)`.
type Version = (u32, u32);

/// Debian 12's.
const DEBIAN_12: Version = (2, 36);

/// The variant of the package's description in vmm/Cargo.toml that goes with `programs`; none for Debian 12.
pub(super) fn variant<'a>(programs: impl Iterator<Item = &'a Path>) -> io::Result<Option<&'static str>> {
    let mut newest = DEBIAN_12;
    for program in programs {
        newest = newest.max(needed(&fs::read(program)?).map_err(io::Error::other)?);
    }
    Ok((newest > DEBIAN_12).then_some("debian-13"))
}

/// The newest version of glibc that a program has a symbol of. Those that it could do without count, as they do for
/// dpkg-shlibdeps.
fn needed(program: &[u8]) -> object::Result<Version> {
    let header = FileHeader64::<Endianness>::parse(program)?;
    let endian = header.endian()?;
    let sections = header.sections(endian, program)?;
    let mut newest = (0, 0);
    let Some((mut files, names)) = sections.gnu_verneed(endian, program)? else { return Ok(newest) };
    let names = sections.strings(endian, program, names)?;
    while let Some((_, mut versions)) = files.next()? {
        while let Some(version) = versions.next()? {
            let name = version.name(endian, names)?;
            newest = newest.max(std::str::from_utf8(name).ok().and_then(glibc).unwrap_or_default());
        }
    }
    Ok(newest)
}

/// The version behind a name such as `GLIBC_2.2.5`.
fn glibc(name: &str) -> Option<Version> {
    let mut numbers = name.strip_prefix("GLIBC_")?.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_numbers() {
        assert_eq!(glibc("GLIBC_2.2.5"), Some((2, 2)));
        assert_eq!(glibc("GLIBC_2.34"), Some((2, 34)));
        for other in ["GLIBC_PRIVATE", "GCC_3.0", "GLIBC_2"] {
            assert_eq!(glibc(other), None);
        }
        assert!((2, 4) < (2, 34));
    }

    #[test]
    fn this_program_needs_one() {
        let own = fs::read(std::env::current_exe().expect("its path")).expect("its content");
        let version = needed(&own).expect("an ELF file");
        assert!(((2, 28)..(3, 0)).contains(&version), "{version:?}");
        assert!(needed(b"no ELF file").is_err());
    }
}
