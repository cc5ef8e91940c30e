//! `ivcpu-vmm doctor` as a command.

use clap::Args;

use super::{Diagnosis, Root};

/// Say what of this host is ready for an IVCPU, and what to do about the rest. The exit status is 0 if a VM with one can run,
/// 1 if not; warnings do not count
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print JSON instead of lines
    #[arg(long)]
    json: bool,
}

/// Looks and prints; says whether the host is ready.
pub fn run(args: &DoctorArgs) -> serde_json::Result<bool> {
    let diagnosis = Diagnosis::of(&Root::at("/"));
    if args.json {
        println!("{}", serde_json::to_string(&diagnosis)?);
    } else {
        print!("{diagnosis}");
    }
    Ok(diagnosis.is_ready())
}
