//! ivcpu-backend: the program.

fn main() {}
