//! The torture run and the cycles, shortly: that they pass, and that they fail where they must.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Result, ensure};
use flea_fixtures::{Tool, require};

/// `flea` of the same build: cargo builds it for tests of its own crate only.
fn flea() -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status =
        Command::new(cargo).args(["build", "--quiet", "--package", "flea-cli"]).status()?;
    ensure!(status.success(), "building flea: {status}");
    Ok(Path::new(env!("CARGO_BIN_EXE_xtask")).with_file_name("flea"))
}

fn xtask(args: &[&str]) -> Result<(Output, String)> {
    let output = Command::new(env!("CARGO_BIN_EXE_xtask")).args(args).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok((output, text))
}

/// Tests run on busy machines: what counts as a hang here is long.
const HANG: &str = "30";

/// All targets, some seconds each: they answer right, lose no byte, and keep nothing of ours.
#[test]
fn all_targets_live() -> Result<()> {
    let flea = flea()?;
    let words = ["torture", "--seconds", "32", "--seed", "5", "--hang", HANG, "--flea"];
    let flea = flea.to_str().unwrap();
    let (output, text) = xtask(&[&words[..], &[flea]].concat())?;
    assert_eq!(output.status.code(), Some(0), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for target in ["redis", "cpp", "postgres", "rust"] {
        let total = text.lines().rfind(|line| line.starts_with(target)).unwrap();
        // A target whose program is missing was skipped, which its bout said.
        let ran = text.contains(&format!("{target} (seed"));
        assert_eq!(ran, !total.contains("rounds 0,"), "{text}");
    }
    Ok(())
}

/// A `flea` that fails is not taken for one that passes.
#[test]
fn a_controller_that_fails_is_a_failure() -> Result<()> {
    if require(Tool::Gxx).is_none() {
        return Ok(());
    }
    let words = ["torture", "--seconds", "20", "--only", "cpp", "--hang", HANG, "--flea"];
    let (output, text) = xtask(&[&words[..], &["/bin/false"]].concat())?;
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("again: cargo xtask torture --only cpp --seed"), "{text}");
    Ok(())
}

#[test]
fn three_hundred_cycles_stay_flat() -> Result<()> {
    if require(Tool::Gcc).is_none() {
        return Ok(());
    }
    let (output, text) = xtask(&["cycles", "--count", "300"])?;
    assert_eq!(output.status.code(), Some(0), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("300 cycles, "), "{text}");
    Ok(())
}
