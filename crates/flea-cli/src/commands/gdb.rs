//! `flea gdb-script`: what gdb has to know to walk through frames of ours. Modules of the
//! target cannot tell it, as the frames are in none of them.

use std::io::Write as _;

use anyhow::Result;

const SCRIPT: &str = include_str!("../gdb/flea.py");

/// Prints it.
pub fn script() -> Result<u8> {
    std::io::stdout().write_all(SCRIPT.as_bytes())?;
    Ok(0)
}
