//! Prints `guest-driver/include/ivcpu_fifo.h` from the crate's layout:
//!
//!     cargo run -p ivcpu-abi --example c_header > guest-driver/include/ivcpu_fifo.h

use ivcpu_abi::layout;

const LAYOUT_SOURCE: &str = include_str!("../src/layout.rs");

/// `[("NAME", value), ...]` of constants of the layout.
macro_rules! values {
    ($($name:ident)*) => { [$((stringify!($name), layout::$name as u64)),*] };
}

/// The whole header: every constant of the layout, documented as in the layout.
pub fn render() -> String {
    let values = values![
        LINE MAGIC VERSION FEATURES MAGIC_AT VERSION_AT FEATURES_AT REGION_SIZE_AT RINGS_AT SOURCES_AT
        RING_OFFSET_AT RING_STRIDE_AT STATE_AT OWNER_AT HINTS_AT SUMMARY_AT HEADER_SIZE RING_HEAD_AT
        RING_PENDING_AT RING_DIRECTORY_AT RING_SLOTS_AT RING_STRIDE MAX_RINGS MAX_SOURCES REGION_ALIGN
        HINT_CONTENDED STATE_ABSENT STATE_AWAKE STATE_SLEEPING STATE_MASK BINDING_ADDRESS_MASK
        BINDING_GENERATION_SHIFT GENERATION_MASK ENTRY_SEQUENCE_SHIFT FIRST_SEQUENCE
    ];
    let mut header = String::from(
        "/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */\n\
         /*\n\
         \x20* Layout of the ivcpu FIFO region, see docs/fifo-abi.md.\n\
         \x20* Printed from guest-driver/abi/src/layout.rs by its example c_header; do not edit.\n\
         \x20*/\n\
         #ifndef IVCPU_FIFO_H\n\
         #define IVCPU_FIFO_H\n\n",
    );
    let mut comment = Vec::new();
    for line in LAYOUT_SOURCE.lines() {
        if let Some(text) = line.strip_prefix("/// ") {
            comment.push(in_c_words(text));
        } else if let Some(name) = line.strip_prefix("pub const ").and_then(|rest| rest.split(':').next()) {
            let (_, value) = values.iter().find(|(other, _)| *other == name).unwrap_or_else(|| {
                panic!("constant {name} of layout.rs is missing in the list of examples/c_header.rs")
            });
            header += &format!("/* {} */\n", comment.join("\n * "));
            let suffix = if u32::try_from(*value).is_ok() { "u" } else { "ull" };
            header += &format!("#define IVCPU_{name} {value:#x}{suffix}\n");
            comment.clear();
        } else {
            comment.clear();
        }
    }
    header + "\n#endif /* IVCPU_FIFO_H */\n"
}

/// A line of rustdoc without its link brackets, constants under their C names.
fn in_c_words(text: &str) -> String {
    text.split_inclusive("`]")
        .map(|part| match part.strip_suffix("`]").and_then(|part| part.rsplit_once("[`")) {
            Some((before, name)) if name.chars().any(char::is_lowercase) => format!("{before}{name}"),
            Some((before, name)) => format!("{before}IVCPU_{name}"),
            None => part.to_owned(),
        })
        .collect::<String>()
        .replace('`', "")
}

fn main() {
    print!("{}", render());
}
