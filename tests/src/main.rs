//! ivcpu-lab: the program.

fn main() {}
