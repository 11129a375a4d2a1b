//! Exceptions, panics and backtraces pass through functions that exit programs are attached
//! to, and the program does what it does without Flea.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use flea_fixtures::{CBuild, Fixture, Running, RustBuild, build};
use support::{Records, TempFile, Tracing, ask, assert_clean, flea, number};

const ROUNDS: u64 = 300;
const CPP: &[&str] = &[
    "thrower",
    "middle",
    "rethrower",
    "catches_some",
    "catcher",
    "many",
    "start",
    "bottom",
    "walker",
    "top",
];
const RUST: &[&str] =
    &["panics::panics", "panics::middle", "panics::again", "panics::catches", "panics::start"];

/// What the program prints when nobody traces it.
fn untraced(program: &std::path::Path, rounds: u64) -> Result<String> {
    let output = Command::new(program).arg(rounds.to_string()).output()?;
    ensure!(output.status.code() == Some(7), "{output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// `flea COMMAND FUNCTIONS -- PROGRAM`: same output, same exit code.
fn check_started(fixture: Fixture, functions: &[&str]) -> Result<()> {
    let Some(program) = build(fixture) else { return Ok(()) };
    let expected = untraced(&program, ROUNDS)?;
    for command in ["latency", "trace"] {
        let output = TempFile::new("records");
        let traced = flea()
            .arg(command)
            .args(functions)
            .args(["--json", "--output"])
            .arg(&output.0)
            .arg("--")
            .arg(&program)
            .arg(ROUNDS.to_string())
            .output()?;
        assert_eq!(traced.status.code(), Some(7), "{fixture:?} {command}: {traced:?}");
        assert_eq!(String::from_utf8(traced.stdout)?, expected, "{fixture:?} {command}");
        let records = Records(output.records()?);
        // It was traced: the outermost functions always return.
        let kind = if command == "trace" { "call" } else { "histogram" };
        assert!(records.of(kind).next().is_some(), "{fixture:?} {command}");
    }
    Ok(())
}

/// The same for a process that runs already, with two controllers; twice, because the second
/// round meets what the first one left.
fn check_running(fixture: Fixture, functions: &[&str]) -> Result<()> {
    let Some(program) = build(fixture) else { return Ok(()) };
    let expected = untraced(&program, ROUNDS)?;
    let mut command = Command::new(program);
    let mut target = Running::start(command.arg(ROUNDS.to_string()).arg("wait"))?;
    target.expect_line("ready")?;
    let pid = target.pid();
    let words = |command| std::iter::once(command).chain(functions.iter().copied());
    let first: Vec<&str> = words("latency").collect();
    Tracing::attach(&first, pid)?.stop()?;
    assert_clean(pid)?;
    let latency = Tracing::attach(&first, pid)?;
    let count = Tracing::attach(&words("count").collect::<Vec<_>>(), pid)?;
    let trace = Tracing::attach(&words("trace").collect::<Vec<_>>(), pid)?;
    target.send("go")?;
    target.expect_line(expected.trim_end())?;
    target.expect_line("done")?;
    trace.stop()?;
    let (latency, count) = (latency.stop()?, count.stop()?);
    // Some begin with a call, and are refused.
    let timed = latency.functions("histogram");
    ensure!(timed.len() > functions.len() / 2, "{timed:?}");
    for function in timed {
        let counted = number(&count.one("count", &function)?["count"])?;
        let timed = number(&latency.one("histogram", &function)?["count"])?;
        ensure!(counted > 0 && timed <= counted, "{function}: {counted} {timed}");
    }
    assert_clean(pid)?;
    target.send("end")?;
    assert_eq!(target.wait()?.code(), Some(7), "{fixture:?}");
    Ok(())
}

#[test]
fn exceptions_in_started_programs() -> Result<()> {
    for variant in [CBuild::O0, CBuild::O2, CBuild::Static, CBuild::NoPie, CBuild::ClangPatchable5]
    {
        check_started(Fixture::Throws(variant), CPP)?;
    }
    Ok(())
}

#[test]
fn exceptions_in_running_programs() -> Result<()> {
    for variant in [CBuild::O2, CBuild::Static, CBuild::CfProtectionPatchable5] {
        check_running(Fixture::Throws(variant), CPP)?;
    }
    Ok(())
}

#[test]
fn panics_pass() -> Result<()> {
    for variant in RustBuild::ALL {
        check_started(Fixture::Panics(*variant), RUST)?;
        check_running(Fixture::Panics(*variant), RUST)?;
    }
    Ok(())
}

/// Threads throw all the time while programs come and go.
#[test]
fn attached_and_detached_while_it_throws() -> Result<()> {
    let rounds = 400_000;
    let Some(program) = build(Fixture::Throws(CBuild::O0)) else { return Ok(()) };
    let expected = untraced(&program, rounds)?;
    let mut command = Command::new(program);
    let mut target = Running::start(command.arg(rounds.to_string()).arg("wait"))?;
    target.expect_line("ready")?;
    let pid = target.pid();
    target.send("go")?;
    for functions in [&CPP[..7], &CPP[..2], &CPP[1..6], &CPP[..1], &CPP[2..7], &CPP[..7]] {
        let words: Vec<&str> =
            std::iter::once("latency").chain(functions.iter().copied()).collect();
        Tracing::attach(&words, pid)?.stop()?;
    }
    target.expect_line(expected.trim_end())?;
    target.expect_line("done")?;
    // What was still on a stack when the last one went away goes with the next.
    Tracing::attach(&["count", "top"], pid)?.stop()?;
    assert_clean(pid)?;
    target.send("end")?;
    assert_eq!(target.wait()?.code(), Some(7));
    Ok(())
}

/// The unwinder itself may be traced.
#[test]
fn the_unwinder_is_traced_too() -> Result<()> {
    let unwinder = ["thrower", "middle", "libgcc_s.so.1:_Unwind_Find_FDE"];
    check_started(Fixture::Throws(CBuild::O2), &unwinder)?;
    let Some(program) = build(Fixture::Throws(CBuild::O2)) else { return Ok(()) };
    let expected = untraced(&program, ROUNDS)?;
    let mut command = Command::new(program);
    let mut target = Running::start(command.arg(ROUNDS.to_string()).arg("wait"))?;
    target.expect_line("ready")?;
    let pid = target.pid();
    // Before and after it was patched for the sake of others, in the order that leaves it to
    // the programs last.
    let count = Tracing::attach(&["count", unwinder[2]], pid)?;
    let latency = Tracing::attach(&["latency", "thrower", "middle"], pid)?;
    let own = Tracing::attach(&["latency", unwinder[2]], pid)?;
    target.send("go")?;
    target.expect_line(expected.trim_end())?;
    target.expect_line("done")?;
    latency.stop()?;
    let own = number(&own.stop()?.one("histogram", "_Unwind_Find_FDE")?["count"])?;
    let counted = number(&count.stop()?.one("count", "_Unwind_Find_FDE")?["count"])?;
    ensure!(own == counted && own > ROUNDS, "{own} {counted}");
    assert_clean(pid)?;
    target.send("end")?;
    assert_eq!(target.wait()?.code(), Some(7));
    Ok(())
}

/// A call that was inside the function when Flea went away still has our frame, and throws
/// through it.
#[test]
fn a_frame_that_was_left_behind() -> Result<()> {
    for variant in [CBuild::O2, CBuild::Static] {
        let Some(program) = build(Fixture::Throws(variant)) else { return Ok(()) };
        let mut command = Command::new(program);
        let mut target = Running::start(command.arg("inside"))?;
        target.expect_line("ready")?;
        let pid = target.pid();
        let latency = Tracing::attach(&["latency", "waits", "around"], pid)?;
        target.send("go")?;
        target.expect_line("inside")?;
        latency.stop()?;
        ensure!(assert_clean(pid).is_err(), "the frames are still there");
        target.send("throw")?;
        target.expect_line("77 1")?;
        target.expect_line("done")?;
        // Whoever comes next takes it all away.
        Tracing::attach(&["count", "top"], pid)?.stop()?;
        assert_clean(pid)?;
        target.send("end")?;
        assert_eq!(target.wait()?.code(), Some(7));
    }
    Ok(())
}

/// Where an unwinder cannot be told, exit programs are refused and nothing is changed.
#[test]
fn an_unwinder_that_cannot_be_told() -> Result<()> {
    let Some(program) = build(Fixture::ThrowsHidden) else { return Ok(()) };
    let expected = untraced(&program, ROUNDS)?;
    let mut command = Command::new(&program);
    let mut target = Running::start(command.arg(ROUNDS.to_string()).arg("wait"))?;
    target.expect_line("ready")?;
    let pid = target.pid();
    let refused = flea().args(["latency", "thrower", "-p", &pid.to_string()]).output()?;
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stderr)?;
    ensure!(said.contains("throws-hidden has an exception unwinder"), "{said}");
    assert_clean(pid)?;
    let count = Tracing::attach(&["count", "thrower"], pid)?;
    target.send("go")?;
    target.expect_line(expected.trim_end())?;
    target.expect_line("done")?;
    let counted = number(&count.stop()?.one("count", "thrower")?["count"])?;
    assert!(counted >= 2 * ROUNDS);
    assert_clean(pid)?;
    let pid = pid.to_string();
    let listed = ask(&["list", "thrower", "-p", &pid])?;
    listed.one("function", "thrower").context("it is listed all the same")?;
    target.send("end")?;
    assert_eq!(target.wait()?.code(), Some(7));
    Ok(())
}
