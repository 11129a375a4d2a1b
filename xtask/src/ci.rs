//! Everything that must hold before a change lands. All steps run, whatever fails, so that
//! one run shows all that is wrong; the summary comes last.

use std::ffi::OsString;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

struct Step {
    name: &'static str,
    args: &'static [&'static str],
    env: Option<(&'static str, &'static str)>,
}

const STEPS: &[Step] = &[
    Step { name: "format", args: &["fmt", "--all", "--check"], env: None },
    Step {
        name: "lints",
        args: &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"],
        env: None,
    },
    Step { name: "tests", args: &["test", "--workspace", "--no-fail-fast"], env: None },
    Step {
        name: "documentation",
        args: &["doc", "--workspace", "--no-deps", "--lib"],
        env: Some(("RUSTDOCFLAGS", "-D warnings")),
    },
];

/// Runs all steps; fails when one fails.
pub fn run() -> Result<ExitCode> {
    let mut results: Vec<(&str, bool, Duration)> = Vec::new();
    for step in STEPS {
        println!("== {}: cargo {}", step.name, step.args.join(" "));
        let begun = Instant::now();
        let mut command = Command::new(cargo());
        command.args(step.args).envs(step.env);
        let status = command.status().with_context(|| format!("running {command:?}"))?;
        results.push((step.name, status.success(), begun.elapsed()));
    }
    println!();
    for (name, passed, took) in &results {
        let verdict = if *passed { "ok" } else { "FAILED" };
        println!("{name:14} {verdict:7} {:6.1} s", took.as_secs_f64());
    }
    let passed = results.iter().all(|(_, passed, _)| *passed);
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The cargo that runs us: of the same toolchain.
fn cargo() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}
