//! `flea types`: the target's types as a C header.

use std::{
    io::{Write as _, stdout},
    path::Path,
};

use anyhow::{Context as _, Result};
use clap::CommandFactory as _;
use flea::Session;

use crate::args::{Cli, Types};

/// `flea types`
pub fn types(args: &Types) -> Result<u8> {
    let header = match (args.pid, args.names.split_first()) {
        (Some(pid), _) => Session::attach(pid)?.types_header(&args.names)?,
        (None, Some((binary, names))) => flea::types::of_file(Path::new(binary), names)?,
        (None, None) => Cli::command()
            .error(
                clap::error::ErrorKind::MissingRequiredArgument,
                "name the target: -p PID, or a binary",
            )
            .exit(),
    };
    match &args.output {
        Some(path) => std::fs::write(path, header)
            .with_context(|| format!("cannot write {}", path.display()))?,
        None => stdout().write_all(header.as_bytes())?,
    }
    Ok(0)
}
