//! Every entry that compilers leave for tracers: counts are exact, and the text is put back.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::process::Command;

use anyhow::{Result, ensure};
use flea_fixtures::{CBuild, Fixture, Report, Running, Tool, build, require};
use support::{TempFile, Tracing, ask, assert_clean, flea, number};

/// 17 numbers of nops behind the entry, 17 before it.
const N_FUNCTIONS: usize = 17 * 17;
/// Those that have room before the entry only.
const HARD: [&str; 6] =
    ["hard_ret", "hard_next", "hard_endbr", "hard_wide", "hard_loop", "hard_call"];
const N_CALLS: u64 = 50;

/// Counts and times all functions of a fixture that waits.
fn check(fixture: Fixture) -> Result<()> {
    let Some(program) = build(fixture) else { return Ok(()) };
    let mut target = Running::start(Command::new(program).args([&N_CALLS.to_string(), "wait"]))?;
    target.expect_line("ready")?;
    let pid = target.pid();
    let listed = ask(&["list", "nops_*", "-p", &pid.to_string()])?;
    for record in listed.of("function") {
        let name = record["function"].as_str().unwrap_or_default();
        let n_nops: usize = name.split('_').nth(1).unwrap_or_default().parse()?;
        let is_nops = matches!(fixture, Fixture::Sleds) || n_nops >= 5;
        assert_eq!(record["site"], if is_nops { "nop5" } else { "relocated" }, "{record}");
    }
    let hard = ask(&[&["list", "-p", &pid.to_string()], &HARD[..]].concat())?;
    for name in HARD {
        assert_eq!(hard.one("function", name)?["site"], "nop5", "{name}");
    }
    let count = Tracing::attach(&[&["count", "nops_*"], &HARD[..]].concat(), pid)?;
    let latency = Tracing::attach(&[&["latency", "nops_*"], &HARD[..]].concat(), pid)?;
    target.send("go")?;
    let report: Report = serde_json::from_str(&target.line()?)?;
    target.expect_line("done")?;
    let (count, latency) = (count.stop()?, latency.stop()?);
    assert_clean(pid)?;
    target.send("end")?;
    assert_eq!(target.wait()?.code(), Some(7));
    assert_eq!(report.errors, 0, "{fixture:?}");
    for (records, kind) in [(count, "count"), (latency, "histogram")] {
        assert_eq!(records.of(kind).count(), N_FUNCTIONS + HARD.len(), "{fixture:?} {kind}");
        for record in records.of(kind) {
            assert_eq!(number(&record["count"])?, N_CALLS, "{fixture:?} {record}");
        }
        records.assert_complete()?;
    }
    Ok(())
}

#[test]
fn nops_before_and_behind_the_entry() -> Result<()> {
    for build in [CBuild::O1, CBuild::O2, CBuild::CfProtection, CBuild::Clang] {
        check(Fixture::Entries(build))?;
    }
    Ok(())
}

/// Attached and taken off again and again while the functions are called all the time.
#[test]
fn entries_that_change_while_they_are_called() -> Result<()> {
    let Some(program) = build(Fixture::Entries(CBuild::O2)) else { return Ok(()) };
    let mut target = Running::start(Command::new(program).args(["4000000", "wait"]))?;
    target.expect_line("ready")?;
    let pid = target.pid();
    target.send("go")?;
    for round in 0..3 {
        let command = if round % 2 == 0 { "count" } else { "latency" };
        let words = [&[command, "nops_0_*"], &HARD[..]].concat();
        let first = Tracing::attach(&words, pid)?;
        let second = Tracing::attach(&words, pid)?;
        first.stop()?.assert_complete()?;
        second.stop()?.assert_complete()?;
        assert_clean(pid)?;
    }
    let report: Report = serde_json::from_str(&target.line()?)?;
    target.expect_line("done")?;
    target.send("end")?;
    assert_eq!((target.wait()?.code(), report.errors), (Some(7), 0));
    Ok(())
}

#[test]
fn sleds_of_xray() -> Result<()> {
    check(Fixture::Sleds)
}

/// A sled that XRay's own runtime has patched is not ours to change.
#[test]
fn sleds_that_xray_uses() -> Result<()> {
    let Some(clang) = require(Tool::Clang) else { return Ok(()) };
    let (source, program) = (TempFile::new("xray.c"), TempFile::new("xray"));
    std::fs::write(
        &source.0,
        "#include <stdio.h>\n\
         __attribute__((xray_always_instrument, noinline)) int seen(int x) { return x * 3; }\n\
         int main(int n, char **v) { char l[9]; (void)v; puts(\"ready\"); fflush(stdout);\n\
         while (fgets(l, sizeof l, stdin)) n += seen(n); return n == 0; }\n",
    )?;
    let mut command = Command::new(clang);
    command.args(["-O2", "-g", "-fxray-instrument"]).arg(&source.0).arg("-o").arg(&program.0);
    let built = command.output()?;
    if !built.status.success() {
        eprintln!("skipped: XRay's runtime is not installed");
        return Ok(());
    }
    for (options, is_patched) in [("patch_premain=false", false), ("patch_premain=true", true)] {
        let mut command = Command::new(&program.0);
        let mut target = Running::start(command.env("XRAY_OPTIONS", options))?;
        target.expect_line("ready")?;
        let pid = target.pid().to_string();
        if is_patched {
            let output = flea().args(["count", "seen", "-p", &pid]).output()?;
            let said = String::from_utf8(output.stderr)?;
            assert_eq!(output.status.code(), Some(1), "{said}");
            ensure!(
                said.contains("another tool") && said.contains("nothing was changed"),
                "{said}"
            );
        } else {
            let count = Tracing::attach(&["count", "seen"], target.pid())?;
            (0..3).try_for_each(|_| target.send("x"))?;
            target.close_stdin();
            let (_, records) = count.wait()?;
            assert_eq!(number(&records.one("count", "seen")?["count"])?, 3);
        }
        target.close_stdin();
        target.wait()?;
    }
    Ok(())
}

/// A function that begins with a call is taken off while a thread is in the callee: nothing of
/// Flea is on its stack, so all of it is gone at once, and the thread returns to the function.
#[test]
fn a_thread_may_wait_in_the_call_at_the_entry() -> Result<()> {
    let Some(gcc) = require(Tool::Gcc) else { return Ok(()) };
    let (source, program) = (TempFile::new("waits.c"), TempFile::new("waits"));
    std::fs::write(
        &source.0,
        "#include <stdio.h>\n\
         __attribute__((noinline, noipa)) int inner(int x) { char l[9]; printf(\"in %d\\n\", x);\n\
         fflush(stdout); return fgets(l, sizeof l, stdin) ? 2 * x : -1; }\n\
         __attribute__((noinline, noipa)) int outer(int x) { return inner(x) + 1; }\n\
         int main(void) { int y, x = 0; while ((y = outer(x++)) > 0) printf(\"%d\\n\", y); }\n",
    )?;
    let mut command = Command::new(gcc);
    command.args(["-O2", "-g"]).arg(&source.0).arg("-o").arg(&program.0);
    let built = command.output()?;
    ensure!(built.status.success(), "{built:?}");
    let mut target = Running::start(&mut Command::new(&program.0))?;
    let pid = target.pid();
    let mut n_calls = 0;
    target.expect_line("in 0")?;
    for n_traced in 1..=4 {
        // It is inside already when the site is patched, and inside when that is put back.
        let count = Tracing::attach(&["count", "outer"], pid)?;
        for _ in 0..n_traced {
            target.send("x")?;
            target.expect_line(&(2 * n_calls + 1).to_string())?;
            n_calls += 1;
            target.expect_line(&format!("in {n_calls}"))?;
        }
        let records = count.stop()?;
        assert_clean(pid)?;
        assert_eq!(number(&records.one("count", "outer")?["count"])?, n_traced);
    }
    target.send("x")?;
    target.expect_line(&(2 * n_calls + 1).to_string())?;
    target.close_stdin();
    ensure!(target.wait()?.success());
    Ok(())
}
