//! ivcpu-lab: the program.

use ivcpu_lab::provision::*;
use ivcpu_lab::workspace::Workspace;
fn main() -> anyhow::Result<()> {
    let w = Workspace::locate()?;
    let p = Provision::new(&w);
    eprintln!("{:?}", p.tools()?);
    eprintln!("{:?}", p.qemu()?);
    eprintln!("{:?}", p.kernel(Kernel::V6_12)?);
    Ok(())
}
