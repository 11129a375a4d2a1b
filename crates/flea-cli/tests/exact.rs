//! What `flea` says agrees to the last call with what the program itself counted, and the
//! program computes and prints what it does without Flea.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use flea_fixtures::{CBuild, Fixture, Report, RustBuild, Tally, build, spawn_waiting};
use serde_json::Value;
use support::{Records, TempFile, Tracing, ask, assert_clean, flea, number};

/// Functions whose first argument is a pointer: their sums differ from run to run.
const BY_ADDRESS: &[&str] = &["str", "counts::text_len"];

/// The names of a fixture's functions, from a run of one call.
fn names(fixture: Fixture) -> Result<Option<Vec<String>>> {
    let Some(program) = build(fixture) else { return Ok(None) };
    let output = Command::new(program).args(["1", "1"]).output()?;
    let report: Report = serde_json::from_slice(&output.stdout)?;
    let has_name = |name: &String| {
        // A local function has no name once .symtab is gone.
        !(fixture == Fixture::CountsC(CBuild::OnlyDynsym) && name == "hidden")
    };
    Ok(Some(report.functions.into_keys().filter(has_name).collect()))
}

fn words<'a>(command: &'a str, names: &'a [String]) -> Vec<&'a str> {
    std::iter::once(command).chain(names.iter().map(String::as_str)).collect()
}

/// Functions that exceptions and panics pass through. They are counted here; that they can be
/// left through a frame of Flea's is the business of the unwinding tests.
const PASSED_BY_EXCEPTIONS: &[&str] =
    &["may_throw(int)", "passes(int)", "counts::panics", "counts::passes"];

fn check_counts(records: &Records, report: &Report, names: &[String]) -> Result<()> {
    for name in names {
        let counted = number(&records.one("count", name)?["count"])?;
        assert_eq!(counted, report.functions[name].count, "{name}");
    }
    records.assert_complete()
}

/// Every histogram has as many durations as calls returned, and adds up in itself.
fn check_latencies(records: &Records, report: &Report, names: &[String]) -> Result<()> {
    for name in names {
        let record = records.one("histogram", name)?;
        let tally = report.functions[name];
        assert_eq!(record["value"], "duration_ns");
        assert_eq!(number(&record["count"])?, tally.count, "{name}");
        check_buckets(record)?;
    }
    records.assert_complete()
}

/// Buckets add up to the count, and minimum and maximum are in the outermost ones.
fn check_buckets(record: &Value) -> Result<()> {
    let buckets = record["buckets"].as_array().context("buckets")?;
    let int = |v: &Value| v.as_i64().map(i128::from).or(v.as_u64().map(i128::from)).context("int");
    let mut total = 0;
    for bucket in buckets {
        total += number(&bucket["count"])?;
    }
    assert_eq!(total, number(&record["count"])?, "{record}");
    let (Some(first), Some(last)) = (buckets.first(), buckets.last()) else { return Ok(()) };
    let (min, max) = (int(&record["min"])?, int(&record["max"])?);
    assert!((int(&first["min"])?..=int(&first["max"])?).contains(&min), "{record}");
    assert!((int(&last["min"])?..=int(&last["max"])?).contains(&max), "{record}");
    Ok(())
}

/// The names that `flea list` says can be attached to, all of them with this kind of site.
/// Each name is listed once, and what is refused has a reason.
fn list(pid: u32, names: &[String], expected_site: &str) -> Result<Vec<String>> {
    let pid = pid.to_string();
    let mut command = words("list", names);
    command.extend(["-p", &pid]);
    let records = ask(&command)?;
    let mut attachable = Vec::new();
    for name in names {
        let record = records.one("function", name)?;
        if record["site"] == "refused" {
            ensure!(record["reason"].as_str().is_some_and(|r| !r.is_empty()), "{record}");
        } else {
            ensure!(record["reason"].is_null() && record["site"] == expected_site, "{record}");
            attachable.push(name.clone());
        }
    }
    Ok(attachable)
}

/// Why `flea latency` may refuse a function that `flea count` takes.
const MAY_HAVE_STACK_ARGUMENTS: &str = "needs to know how many stack arguments";

/// Counts and times all functions of a waiting program at the same time, from two processes.
/// `refused` are those that cannot be attached to, `untimed` those that can only be counted.
fn check_attached(
    fixture: Fixture,
    (threads, calls): (u32, u64),
    refused: &[&str],
    untimed: &[&str],
) -> Result<()> {
    let Some(names) = names(fixture)? else { return Ok(()) };
    let Some(mut target) = spawn_waiting(fixture, threads, calls)? else { return Ok(()) };
    let pid = target.pid();
    let site = if NOP_SITES.contains(&fixture) { "nop5" } else { "relocated" };
    let attachable = list(pid, &names, site)?;
    let but = |names: &[String], out: &[&str]| -> Vec<String> {
        names.iter().filter(|name| !out.contains(&name.as_str())).cloned().collect()
    };
    assert_eq!(attachable, but(&names, refused), "{fixture:?}");

    let timed = but(&names, PASSED_BY_EXCEPTIONS);
    let mut count = Tracing::start(&words("count", &names), pid)?;
    let mut latency = Tracing::start(&words("latency", &timed), pid)?;
    count.wait_attached()?;
    latency.wait_attached()?;
    for name in untimed {
        let said = |line: &String| line.contains(name) && line.contains(MAY_HAVE_STACK_ARGUMENTS);
        assert!(latency.said.iter().any(said), "{fixture:?} {name}: {:?}", latency.said);
    }
    let report = target.run_counts()?;
    let (count, latency) = (count.stop()?, latency.stop()?);
    assert_clean(pid)?;
    target.finish_counts()?;

    assert_eq!(report.errors, 0, "{fixture:?}");
    assert_eq!(count.functions("count"), attachable, "{fixture:?}");
    check_counts(&count, &report, &attachable).with_context(|| format!("{fixture:?}"))?;
    let timed = but(&but(&timed, refused), untimed);
    assert_eq!(latency.functions("histogram"), timed, "{fixture:?}");
    check_latencies(&latency, &report, &timed).with_context(|| format!("{fixture:?}"))
}

const NOP_SITES: &[Fixture] = &[
    Fixture::CountsC(CBuild::NopMcount),
    Fixture::CountsC(CBuild::Patchable5),
    Fixture::CountsC(CBuild::Patchable16Before5),
    Fixture::CountsC(CBuild::ClangPatchable5),
    Fixture::CountsC(CBuild::CfProtectionPatchable5),
    Fixture::CountsCpp(CBuild::NopMcount),
];

#[test]
fn c_programs_that_run_already() -> Result<()> {
    for (i, &variant) in CBuild::ALL.iter().enumerate() {
        let threads = 1 + u32::try_from(i)? % 8;
        // Without alignment, the next function begins within five bytes; `str` is mostly a
        // call of strlen, `tail` one of tail_end.
        let refused: &[&str] = match variant {
            CBuild::O1 => &["add", "leaf", "str", "tail", "tail_end"],
            _ => &[],
        };
        let untimed: &[&str] = match variant {
            // No debug information, and a tail call to strlen.
            CBuild::OnlyDynsym => &["str", "sum_all"],
            _ => &["sum_all"],
        };
        check_attached(Fixture::CountsC(variant), (threads, 400), refused, untimed)?;
    }
    Ok(())
}

#[test]
fn cpp_programs_that_run_already() -> Result<()> {
    let variants = [
        CBuild::O0,
        CBuild::O2,
        CBuild::Static,
        CBuild::OnlyDynsym,
        CBuild::NopMcount,
        CBuild::Clang,
    ];
    for (threads, variant) in [1, 8, 2, 3, 4, 5].into_iter().zip(variants) {
        check_attached(Fixture::CountsCpp(variant), (threads, 90), &[], &[])?;
    }
    Ok(())
}

#[test]
fn rust_programs_that_run_already() -> Result<()> {
    for (threads, variant) in [8, 3].into_iter().zip(RustBuild::ALL) {
        check_attached(Fixture::CountsRust(*variant), (threads, 64), &[], &[])?;
    }
    Ok(())
}
