//! Compiles the guest and the ABI crate under it, with nothing but the compiler that compiles this crate.
//!
//! Cargo cannot: a program without the standard library has to be built with `panic=abort`, which a profile can
//! only set for the whole workspace. No other target is needed: what is specific to Linux is what is left out.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const ABI: &str = "../abi/src/lib.rs";
const GUEST: &str = "guest/main.rs";
const LINKER_SCRIPT: &str = "guest/image.ld";

fn main() {
    for input in ["../abi/src", "guest", "src/mailbox.rs", "build.rs"] {
        println!("cargo::rerun-if-changed={input}");
    }
    let out = PathBuf::from(variable("OUT_DIR"));
    let library = out.join("libivcpu_abi.rlib");
    let script = Path::new(&variable("CARGO_MANIFEST_DIR")).join(LINKER_SCRIPT);
    rustc(ABI, &library, ["--crate-name=ivcpu_abi".into(), "--crate-type=rlib".into()]);
    rustc(
        GUEST,
        &out.join("guest"),
        [
            "--crate-name=guest".into(),
            "--crate-type=bin".into(),
            format!("--extern=ivcpu_abi={}", library.display()),
            "-Crelocation-model=static".into(),
            format!("-Clink-args=-nostdlib -static -no-pie -Wl,--build-id=none,-T{}", script.display()),
        ],
    );
}

fn rustc<const N: usize>(source: &str, output: &Path, options: [String; N]) {
    let status = Command::new(variable("RUSTC"))
        .args([
            "--edition=2024",
            "--target",
            &variable("TARGET"),
            "-Copt-level=3",
            "-Cpanic=abort",
            "-Cstrip=debuginfo",
        ])
        .args(options)
        .arg("-o")
        .arg(output)
        .arg(source)
        .status()
        .unwrap_or_else(|error| panic!("cannot run the compiler for {source}: {error}"));
    assert!(status.success(), "{source} does not compile, see above");
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| panic!("{name} is what Cargo tells a build script: {error}"))
}
