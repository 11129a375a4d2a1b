//! `flea gdb-script` and `flea frames-file`: what gdb and perf have to know to walk through
//! frames of ours. Modules of the target cannot tell them, as the frames are in none of them.

use std::io::Write as _;

use anyhow::Result;

use crate::args::FramesFile;

const GDB_SCRIPT: &str = include_str!("../gdb/flea.py");

/// `flea gdb-script`: prints it.
pub fn gdb_script() -> Result<u8> {
    std::io::stdout().write_all(GDB_SCRIPT.as_bytes())?;
    Ok(0)
}

/// `flea frames-file`: makes it.
pub fn frames_file(args: &FramesFile) -> Result<u8> {
    flea::frames_file::write(&args.path)?;
    Ok(0)
}
