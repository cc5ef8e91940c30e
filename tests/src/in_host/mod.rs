//! What runs inside the host: in the emulated one, or natively on a machine with VMX or SVM.

pub mod agent;
