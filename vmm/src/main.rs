//! ivcpu-vmm: the program.

fn main() {}
