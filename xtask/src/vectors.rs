//! `cargo xtask vectors FILE.jsonl`: anybody's suite of programs; see the crate flea-vectors.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use flea_vectors::worker::{Pool, serve};

/// What one program may take; the longest loops of verified programs take less than a second.
const PATIENCE_SECONDS: u64 = 10;

/// Answers the lines of a file on stdout, in their order.
pub fn run(options: &[&str]) -> Result<ExitCode> {
    let (file, seconds) = match options {
        [file] => (*file, PATIENCE_SECONDS),
        ["--seconds", seconds, file] => (*file, seconds.parse().context("--seconds")?),
        _ => bail!("{}", crate::USAGE),
    };
    let lines = BufReader::new(File::open(file).with_context(|| format!("cannot read {file}"))?);
    let mut pool = Pool::new(worker, Duration::from_secs(seconds));
    let mut out = std::io::stdout().lock();
    for line in lines.lines() {
        let line = line.with_context(|| format!("cannot read {file}"))?;
        if !line.trim().is_empty() {
            writeln!(out, "{}", serde_json::to_string(&pool.answer(&line)?)?)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The process in which programs run.
pub fn work() -> Result<ExitCode> {
    serve()?;
    Ok(ExitCode::SUCCESS)
}

fn worker() -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["vectors", "--worker"]);
    Ok(command)
}
