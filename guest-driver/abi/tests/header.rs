//! The C header is what the crate's layout prints.

#[path = "../examples/c_header.rs"]
#[allow(dead_code, unreachable_pub, reason = "the example is a program of its own")]
mod c_header;

#[test]
fn the_c_header_equals_the_layout() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../include/ivcpu_fifo.h");
    let file = std::fs::read_to_string(path).unwrap();
    for (file, layout) in file.lines().zip(c_header::render().lines()) {
        assert_eq!(file, layout, "print ivcpu_fifo.h anew, see examples/c_header.rs");
    }
    assert_eq!(file, c_header::render());
}
