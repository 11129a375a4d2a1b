//! Objects made by clang that follow the target's pointers, in a thread that blocks every signal,
//! and one that writes to its memory.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use flea_fixtures::{Running, Tool, require};
use support::{TempFile, Tracing, ask, assert_clean, compile_bpf, flea};

/// The program of `typed/target.c`, waiting for commands. `None`, said on stderr, without gcc.
fn start() -> Result<Option<(TempFile, Running)>> {
    let Some(gcc) = require(Tool::Gcc) else { return Ok(None) };
    let program = TempFile::new("typed-target");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/typed/target.c");
    let output = Command::new(gcc)
        .args(["-g", "-O2", "-Wall", "-pthread", "-o"])
        .args([&program.0, &source])
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut running = Running::start(&mut Command::new(&program.0))?;
    running.expect_line("ready")?;
    Ok(Some((program, running)))
}

fn expect(target: &mut Running, command: &str, answer: &str) -> Result<()> {
    target.send(command)?;
    target.expect_line(answer).with_context(|| format!("after `{command}`"))
}

fn finish(mut target: Running) -> Result<()> {
    assert_clean(target.pid())?;
    target.close_stdin();
    let status = target.wait()?;
    ensure!(status.code() == Some(7), "it ended with {status}");
    Ok(())
}

#[test]
fn fields_of_the_targets_data() -> Result<()> {
    let Some(object) = compile_bpf("typed.bpf.c", "v3")? else { return Ok(()) };
    let Some((_file, mut target)) = start()? else { return Ok(()) };
    let file = object.0.to_str().context("a path")?;
    let tracing = Tracing::attach(&["run", file], target.pid())?;
    expect(&mut target, "list", "visited -1 first")?;
    expect(&mut target, "null", "visited -1 ")?;
    expect(&mut target, "broken", "visited -1 first")?;
    expect(&mut target, "half", "visited -1 first")?;
    expect(&mut target, "stack", "visited -2 second")?;
    expect(&mut target, "next", "found second")?;
    let records = tracing.stop()?;
    records.assert_complete()?;
    let lines: Vec<_> = records.of("printk").map(|r| r["message"].as_str().unwrap()).collect();
    let expected = [
        // list
        "at -1 10, flags 5 kind 17, number 100, 1",
        "next o, x -2, corner -7 70",
        "last third 6",
        // null; zeros at the end of a line are not printed
        "at 0 0, flags 0 kind 0, number 0, ",
        "next \0, x 0, corner 0 0",
        "last  -14",
        // broken
        "at -1 10, flags 5 kind 17, number 100, 1",
        "next \0, x 0, corner -7 0",
        "last  -14",
        // half: what is behind the union's begin is not there
        "at -1 10, flags 5 kind 17, number 0, 1",
        "next o, x -2, corner 0 70",
        "last third 6",
        // stack
        "at -2 20, flags 6 kind 18, number 200, 2",
        "next r, x -3, corner 0 0",
        "last  -14",
        // next
        "found s behind f, 1 on",
    ];
    assert_eq!(lines, expected);
    finish(target)
}

#[test]
fn a_register_cast_to_what_it_leads_to() -> Result<()> {
    let Some(object) = compile_bpf("cast.bpf.c", "v3")? else { return Ok(()) };
    let Some((_file, mut target)) = start()? else { return Ok(()) };
    let file = object.0.to_str().context("a path")?;
    let tracing = Tracing::attach(&["run", file], target.pid())?;
    expect(&mut target, "list", "visited -1 first")?;
    expect(&mut target, "broken", "visited -1 first")?;
    expect(&mut target, "stack", "visited -2 second")?;
    let records = tracing.stop()?;
    records.assert_complete()?;
    let lines: Vec<_> = records.of("printk").map(|r| r["message"].as_str().unwrap()).collect();
    assert_eq!(lines, ["i 10 then 30", "i 10 then 0", "e 20 then 0"]);
    finish(target)
}

#[test]
fn writing_needs_leave() -> Result<()> {
    let Some(object) = compile_bpf("writes.bpf.c", "v3")? else { return Ok(()) };
    let Some((_file, mut target)) = start()? else { return Ok(()) };
    let file = object.0.to_str().context("a path")?;
    let pid = target.pid().to_string();

    let refused = flea().args(["run", file, "-p", &pid]).output()?;
    let said = String::from_utf8(refused.stderr)?;
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot use helper bpf_probe_write_user"), "{said}");
    assert!(said.contains("--allow-write"), "{said}");
    expect(&mut target, "list", "visited -1 first")?;
    assert_clean(target.pid())?;

    let tracing = Tracing::attach(&["run", file, "--allow-write"], target.pid())?;
    let attached = ask(&["ps", "-p", &pid])?;
    assert_eq!(attached.one("attached", "visit")?["writes_target"], true);
    expect(&mut target, "stack", "visited 77 second")?;
    let records = tracing.stop()?;
    let lines: Vec<_> = records.of("printk").map(|r| r["message"].as_str().unwrap()).collect();
    assert_eq!(lines, ["moved 0, renamed -14"]);
    finish(target)
}
