//! `cargo xtask simulate`: the crate flea-simulate, built optimised and run. It is no dependency of
//! this program: with it, the library would be built with what only the simulator needs.

use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};

/// Passes the options on; the exit code is 1 where something failed.
pub fn run(options: &[&str]) -> Result<ExitCode> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["run", "--quiet", "--release", "--package", "flea-simulate", "--"]);
    command.args(options);
    let status = command.status().with_context(|| format!("running {command:?}"))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
