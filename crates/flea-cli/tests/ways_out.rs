//! Every way out of a function that there is in C, C++ and Rust: with programs attached at
//! entry and at exit, a program prints what it prints without, and every call is counted.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use flea_fixtures::{CBuild, Fixture, Running, RustBuild, build};
use support::{Records, TempFile, Tracing, assert_clean, assert_original_code, flea, number};

/// All functions that are meant to be traced, in every fixture of this kind.
const PATTERN: &str = "w_*";

/// How often a function was entered, and how often it was left by returning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tally {
    entered: u64,
    returned: u64,
}

type Tallies = BTreeMap<String, Tally>;

/// What a program says on standard error about its own calls.
fn tallies<'a>(lines: impl Iterator<Item = &'a str>) -> Result<Tallies> {
    let mut tallies = Tallies::new();
    for line in lines {
        let words: Vec<&str> = line.split(' ').collect();
        if let ["tally", name, entered, returned] = words[..] {
            let tally = Tally { entered: entered.parse()?, returned: returned.parse()? };
            tallies.insert(name.to_owned(), tally);
        }
    }
    ensure!(!tallies.is_empty(), "the program did not say how often it called what");
    Ok(tallies)
}

/// What a scenario prints when nobody traces it.
fn untraced(fixture: Fixture, scenario: &str, code: i32) -> Result<Option<String>> {
    let Some(program) = build(fixture) else { return Ok(None) };
    let output = Command::new(program).arg(scenario).output()?;
    ensure!(output.status.code() == Some(code), "{fixture:?} {scenario}: {output:?}");
    let text = String::from_utf8(output.stdout)?;
    ensure!(!text.contains("wrong:"), "{fixture:?} {scenario}: {text}");
    Ok(Some(text))
}

/// Calls are counted as they are made.
fn check_count(records: &Records, tallies: &Tallies) -> Result<()> {
    let mut n_called = 0;
    for name in records.functions("count") {
        let tally = tallies.get(&name).with_context(|| name.clone())?;
        let counted = number(&records.one("count", &name)?["count"])?;
        ensure!(counted == tally.entered, "{name}: {counted} counted, {tally:?}");
        n_called += u64::from(counted > 0);
    }
    ensure!(n_called > 0, "nothing was traced");
    records.assert_complete()
}

/// Calls are timed that return, but for those in which a program was not run because it ran
/// already: a signal had interrupted it.
fn check_latency(records: &Records, tallies: &Tallies) -> Result<()> {
    let missed = records.summary("missed")?;
    let (mut n_timed, mut n_returned) = (0, 0);
    for name in records.functions("histogram") {
        let tally = tallies.get(&name).with_context(|| name.clone())?;
        let timed = number(&records.one("histogram", &name)?["count"])?;
        ensure!(timed <= tally.returned, "{name}: {timed} timed, {tally:?}");
        ensure!(timed + missed >= tally.returned, "{name}: {timed}, {missed} missed, {tally:?}");
        n_timed += timed;
        n_returned += tally.returned;
    }
    ensure!(n_timed + missed >= n_returned, "{n_timed} timed, {missed} missed, {n_returned}");
    ensure!(n_returned > 0 || missed == 0, "{missed}");
    Ok(())
}

/// `flea COMMAND 'w_*' -- PROGRAM SCENARIO`: same output, same exit code.
fn check_started(fixture: Fixture, command: &str, scenario: &str, code: i32) -> Result<()> {
    let Some(expected) = untraced(fixture, scenario, code)? else { return Ok(()) };
    let Some(program) = build(fixture) else { return Ok(()) };
    let output = TempFile::new("records");
    let traced = flea()
        .args([command, PATTERN, "--json", "--output"])
        .arg(&output.0)
        .arg("--")
        .arg(&program)
        .arg(scenario)
        .output()?;
    let errors = String::from_utf8(traced.stderr)?;
    let whence = || format!("{fixture:?} {command} {scenario}: {} {errors}", traced.status);
    assert_eq!(String::from_utf8(traced.stdout)?, expected, "{}", whence());
    assert_eq!(traced.status.code(), Some(code), "{}", whence());
    let records = Records(output.records()?);
    let tallies = tallies(errors.lines()).with_context(whence)?;
    match command {
        "count" => check_count(&records, &tallies).with_context(whence),
        "latency" => check_latency(&records, &tallies).with_context(whence),
        _ => {
            ensure!(records.of("call").next().is_some(), "{}", whence());
            Ok(())
        }
    }
}

/// A fixture that waits to be traced before it runs a scenario.
fn start(fixture: Fixture, scenario: &str) -> Result<Option<Running>> {
    let Some(program) = build(fixture) else { return Ok(None) };
    let mut target = Running::start(Command::new(program).args([scenario, "wait"]))?;
    target.expect_line("ready")?;
    Ok(Some(target))
}

/// The same for a process that runs already, with a controller for each kind of program.
fn check_running(fixture: Fixture, scenario: &str) -> Result<()> {
    let Some(expected) = untraced(fixture, scenario, 7)? else { return Ok(()) };
    let Some(mut target) = start(fixture, scenario)? else { return Ok(()) };
    let whence = || format!("{fixture:?} {scenario}");
    let pid = target.pid();
    let latency = Tracing::attach(&["latency", PATTERN], pid)?;
    let count = Tracing::attach(&["count", PATTERN], pid)?;
    target.send("go")?;
    for line in expected.lines() {
        target.expect_line(line).with_context(whence)?;
    }
    target.expect_line("done").with_context(whence)?;
    let (latency, count) = (latency.stop()?, count.stop()?);
    assert_clean(pid).with_context(whence)?;
    target.send("end")?;
    assert_eq!(target.wait()?.code(), Some(7), "{fixture:?} {scenario}");
    let errors = target.rest_of_stderr();
    let tallies = tallies(errors.iter().map(String::as_str))?;
    check_count(&count, &tallies).with_context(whence)?;
    check_latency(&latency, &tallies).with_context(whence)
}

/// All of it, for each scenario.
fn check(fixture: Fixture, scenarios: &[&str]) -> Result<()> {
    for scenario in scenarios {
        check_started(fixture, "latency", scenario, 7)?;
        check_running(fixture, scenario)?;
    }
    Ok(())
}

#[test]
fn exceptions() -> Result<()> {
    for variant in [CBuild::O2, CBuild::Static] {
        check(Fixture::WaysCpp(variant), &["throw", "exception-ptr", "terminate"])?;
    }
    for variant in [CBuild::O0, CBuild::ClangPatchable5] {
        check(Fixture::WaysCpp(variant), &["throw"])?;
    }
    check_started(Fixture::WaysCpp(CBuild::O2), "trace", "throw", 7)
}

#[test]
fn panics_and_foreign_exceptions() -> Result<()> {
    for variant in RustBuild::ALL {
        check(Fixture::WaysRust(*variant), &["panics", "foreign"])?;
    }
    check_started(Fixture::WaysRust(RustBuild::Debug), "trace", "foreign", 7)
}

#[test]
fn jumps() -> Result<()> {
    for variant in [CBuild::O2, CBuild::Musl] {
        check(Fixture::WaysC(variant), &["longjmp", "siglongjmp"])?;
    }
    Ok(())
}

#[test]
fn ends_of_threads() -> Result<()> {
    for variant in [CBuild::O2, CBuild::Static] {
        check(Fixture::WaysC(variant), &["threads"])?;
        check(Fixture::WaysCpp(variant), &["threads"])?;
    }
    Ok(())
}

#[test]
fn coroutines() -> Result<()> {
    for variant in [CBuild::O2, CBuild::Clang] {
        check(Fixture::StacksC(variant), &["coroutines"])?;
        check(Fixture::WaysCpp(variant), &["coroutines"])?;
    }
    Ok(())
}

#[test]
fn tail_calls_and_recursion() -> Result<()> {
    for variant in [CBuild::O2, CBuild::ClangPatchable5] {
        check(Fixture::WaysC(variant), &["tail-calls", "recursion"])?;
    }
    check(Fixture::WaysC(CBuild::O0), &["recursion"])
}

#[test]
fn functions_that_do_not_return() -> Result<()> {
    for variant in [CBuild::O2, CBuild::MuslStatic] {
        for command in ["count", "latency", "trace"] {
            check_started(Fixture::WaysC(variant), command, "no-return", 21)?;
        }
    }
    Ok(())
}

#[test]
fn signals_at_any_instruction() -> Result<()> {
    for variant in [CBuild::O2, CBuild::Patchable5, CBuild::Musl] {
        check_started(Fixture::WaysC(variant), "count", "steps", 7)?;
        check(Fixture::WaysC(variant), &["storm", "steps"])?;
    }
    Ok(())
}

#[test]
fn backtraces_from_inside() -> Result<()> {
    for variant in [CBuild::O0, CBuild::O2, CBuild::Static, CBuild::Clang] {
        check(Fixture::StacksC(variant), &["walks"])?;
    }
    Ok(())
}

/// A coroutine is inside traced functions when Flea goes away, and no thread's stack shows it.
#[test]
fn detached_while_a_coroutine_is_away() -> Result<()> {
    for variant in [CBuild::O0, CBuild::O2] {
        let Some(mut target) = start(Fixture::StacksC(variant), "away")? else { return Ok(()) };
        let pid = target.pid();
        let latency = Tracing::attach(&["latency", PATTERN], pid)?;
        target.send("go")?;
        target.expect_line("away")?;
        latency.stop()?;
        ensure!(assert_clean(pid).is_err(), "{variant:?}: its frames are still there");
        let program = build(Fixture::StacksC(variant)).context("it was built")?;
        assert_original_code(pid, program.to_str().context("a path")?)?;
        // Also after somebody else has looked for what can be freed.
        Tracing::attach(&["count", "w_walks"], pid)?.stop()?;
        ensure!(assert_clean(pid).is_err(), "{variant:?}: its frames are still there");
        target.send("come back")?;
        target.expect_line("back 9")?;
        target.expect_line("done")?;
        Tracing::attach(&["count", "w_walks"], pid)?.stop()?;
        assert_clean(pid)?;
        target.send("end")?;
        assert_eq!(target.wait()?.code(), Some(7));
    }
    Ok(())
}

/// Signal handlers that jump away from any instruction leave Flea's code, and some of its runs
/// half done, for ever. What runs later on that thread is traced all the same.
#[test]
fn jumps_away_from_any_instruction() -> Result<()> {
    for variant in [CBuild::O2, CBuild::CfProtectionPatchable5] {
        let fixture = Fixture::WaysC(variant);
        let Some(expected) = untraced(fixture, "jumping-storm", 7)? else { return Ok(()) };
        let Some(mut target) = start(fixture, "jumping-storm")? else { return Ok(()) };
        let pid = target.pid();
        let latency = Tracing::attach(&["latency", PATTERN], pid)?;
        let trace = Tracing::attach(&["trace", "w_after", "w_inner_works"], pid)?;
        let count = Tracing::attach(&["count", PATTERN], pid)?;
        target.send("go")?;
        target.expect_line(expected.trim_end())?;
        target.expect_line("done")?;
        let (trace, count, latency) = (trace.stop()?, count.stop()?, latency.stop()?);
        assert_clean(pid)?;
        target.send("end")?;
        assert_eq!(target.wait()?.code(), Some(7), "{variant:?}");
        let errors = target.rest_of_stderr();
        let tallies = tallies(errors.iter().map(String::as_str))?;
        let n_jumps = tallies["w_handler_jumps"].entered;
        ensure!(n_jumps > 0, "no signal came");
        for name in ["w_after", "w_works", "w_inner_works"] {
            let counted = number(&count.one("count", name)?["count"])?;
            let entered = tallies[name].entered;
            // A jump may come between its count and ours.
            ensure!(counted >= entered && counted <= entered + n_jumps, "{name}: {counted}");
        }
        let timed = number(&latency.one("histogram", "w_after")?["count"])?;
        ensure!(timed == 1000, "{variant:?}: {timed} timed of 1000, after {n_jumps} jumps");
        let traced = trace.of("call").filter(|call| call["function"] == "w_after").count() as u64;
        ensure!(traced == 1000, "{variant:?}: {traced} traced of 1000, after {n_jumps} jumps");
    }
    Ok(())
}
