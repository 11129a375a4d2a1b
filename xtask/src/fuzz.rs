//! `cargo xtask fuzz`: the crate flea-fuzz, built with every check and yet fast, and run. It is no
//! dependency of this program: with it, the verifier would be built with what only fuzzers need.

use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};

/// Passes the options on; the exit code is 1 where something failed.
pub fn run(options: &[&str]) -> Result<ExitCode> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["run", "--quiet", "--profile", "fuzz", "--package", "flea-fuzz", "--"]);
    command.args(options);
    let status = command.status().with_context(|| format!("running {command:?}"))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
