//! A package archive in a folder, as small as apt and debootstrap accept one: a pool of packages, one index, and an unsigned
//! release file. Whoever uses it has to be told to trust it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use super::apt::run;
use super::archive;

/// Where the index lies in the folder.
pub(super) const INDEX: &str = "main/binary-amd64/Packages";
/// Fields of a record that say where and what the package file is.
const FILE_FIELDS: [&str; 8] =
    ["Filename", "Size", "MD5sum", "SHA1", "SHA256", "SHA512", "Description-md5", "APT-Sources"];

/// An archive under construction.
pub struct Repository {
    folder: PathBuf,
    index: String,
}

impl Repository {
    /// An empty one in `folder`, which is made.
    pub fn create(folder: &Path) -> Result<Self, archive::Error> {
        let pool = folder.join("pool");
        fs::create_dir_all(&pool).map_err(|e| archive::Error::Write(pool, e))?;
        Ok(Self { folder: folder.into(), index: String::new() })
    }

    /// Moves the package file `deb` into the pool, with the record it carries itself.
    pub fn add(&mut self, deb: &Path) -> Result<(), archive::Error> {
        let what = format!("reading {}", deb.display());
        let output = run(Command::new("dpkg-deb").arg("--field").arg(deb), "dpkg-deb", &what)?;
        self.add_with_record(deb, &String::from_utf8_lossy(&output.stdout))
    }

    /// Moves the package file `deb` into the pool, with a record of an archive it was in before.
    pub(super) fn add_with_record(&mut self, deb: &Path, record: &str) -> Result<(), archive::Error> {
        let name = deb.file_name().unwrap_or_default().to_string_lossy();
        let file = format!("pool/{name}");
        let content = fs::read(deb).map_err(|e| archive::Error::Read(deb.into(), e))?;
        let to = self.folder.join(&file);
        fs::rename(deb, &to).map_err(|e| archive::Error::Write(to, e))?;
        self.index += &without_file_fields(record);
        self.index += &format!("Filename: {file}\nSize: {}\nSHA256: {}\n\n", content.len(), sha256(&content));
        Ok(())
    }

    /// Writes index and release file of `suite`.
    pub fn finish(self, suite: &str) -> Result<(), archive::Error> {
        let dists = self.folder.join("dists").join(suite);
        let write = |path: PathBuf, text: &str| {
            let folder = path.parent().unwrap_or(&path);
            let written = fs::create_dir_all(folder).and_then(|()| fs::write(&path, text));
            written.map_err(|e: io::Error| archive::Error::Write(path, e))
        };
        write(dists.join(INDEX), &self.index)?;
        let (size, hash) = (self.index.len(), sha256(self.index.as_bytes()));
        // A date far back: nothing here expires.
        let release = format!(
            "Suite: {suite}\nCodename: {suite}\nComponents: main\nArchitectures: amd64\n\
             Date: Thu, 01 Jan 1970 00:00:00 +0000\nSHA256:\n {hash} {size} {INDEX}\n"
        );
        write(dists.join("Release"), &release)
    }
}

/// The SHA-256 of `content`, in hexadecimal.
pub(crate) fn sha256(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A record's other fields, each line ended.
fn without_file_fields(record: &str) -> String {
    let mut text = String::new();
    let mut kept = true;
    for line in record.trim().lines() {
        // A field goes on in lines that begin with white space.
        if !line.starts_with([' ', '\t']) {
            let name = line.split(':').next().unwrap_or_default();
            kept = !FILE_FIELDS.iter().any(|field| field.eq_ignore_ascii_case(name));
        }
        if kept {
            text += line;
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_says_where_the_package_is_now() {
        let record = "Package: x\nFilename: pool/main/x.deb\nSize: 1\nDescription: one\n two\nSHA256: 00\n 11\nTag: t\n";
        assert_eq!(without_file_fields(record), "Package: x\nDescription: one\n two\nTag: t\n");
    }

    #[test]
    fn the_release_file_names_the_index_as_it_is() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let deb = dir.path().join("x_1_all.deb");
        fs::write(&deb, "not empty").expect("written");
        let folder = dir.path().join("archive");
        let mut repository = Repository::create(&folder).expect("made");
        repository.add_with_record(&deb, "Package: x\nVersion: 1\n").expect("added");
        repository.finish("trial").expect("finished");

        let index = fs::read(folder.join("dists/trial").join(INDEX)).expect("the index");
        let text = String::from_utf8_lossy(&index);
        let hash = sha256(b"not empty");
        assert_eq!(
            text,
            format!("Package: x\nVersion: 1\nFilename: pool/x_1_all.deb\nSize: 9\nSHA256: {hash}\n\n")
        );
        assert!(!deb.exists() && folder.join("pool/x_1_all.deb").exists());
        let release = fs::read_to_string(folder.join("dists/trial/Release")).expect("the release file");
        assert!(release.contains(&format!("\n {} {} {INDEX}\n", sha256(&index), index.len())), "{release}");
    }

    #[test]
    fn hash_of_nothing() {
        // FIPS 180-4's well-known value.
        assert_eq!(sha256(b""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }
}
