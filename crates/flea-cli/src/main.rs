//! The command flea.
fn main() {}
