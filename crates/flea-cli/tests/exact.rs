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

/// Calls that were left by an exception or a panic: an exit program does not see them.
fn n_thrown(name: &str, report: &Report) -> u64 {
    let every = match name {
        "may_throw(int)" | "passes(int)" => 3,
        "counts::panics" | "counts::passes" => 8,
        _ => return 0,
    };
    (0..report.calls).filter(|i| (i & 1023) % every == 0).count() as u64 * report.threads
}

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
        assert_eq!(number(&record["count"])?, tally.count - n_thrown(name, report), "{name}");
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

/// What `flea list` says about the functions.
struct Listed {
    attachable: Vec<String>,
    sites: Vec<String>,
}

/// Each name is listed once, and what is refused has a reason.
fn list(pid: u32, names: &[String]) -> Result<Listed> {
    let pid = pid.to_string();
    let mut command = words("list", names);
    command.extend(["-p", &pid]);
    let records = ask(&command)?;
    let mut listed = Listed { attachable: Vec::new(), sites: Vec::new() };
    for name in names {
        let record = records.one("function", name)?;
        let site = record["site"].as_str().context("a site")?.to_owned();
        if site == "refused" {
            ensure!(record["reason"].as_str().is_some_and(|r| !r.is_empty()), "{record}");
        } else {
            ensure!(record["reason"].is_null(), "{record}");
            listed.attachable.push(name.clone());
        }
        listed.sites.push(site);
    }
    Ok(listed)
}

/// Counts and times all functions of a waiting program at the same time, from two processes.
fn check_attached(fixture: Fixture, threads: u32, calls: u64) -> Result<()> {
    let Some(names) = names(fixture)? else { return Ok(()) };
    let Some(mut target) = spawn_waiting(fixture, threads, calls)? else { return Ok(()) };
    let start = std::time::Instant::now();
    let pid = target.pid();
    let listed = list(pid, &names)?;
    let mut count = Tracing::start(&words("count", &names), pid)?;
    let mut latency = Tracing::start(&words("latency", &names), pid)?;
    count.wait_attached()?;
    latency.wait_attached()?;
    let said = latency.said.clone();
    let report = target.run_counts()?;
    let (count, latency) = (count.stop()?, latency.stop()?);
    assert_clean(pid)?;
    target.finish_counts()?;

    assert_eq!(report.errors, 0, "{fixture:?}");
    eprintln!(
        "{fixture:?}: {:?} {:?} {:?} {:?}",
        start.elapsed(),
        listed.sites,
        names.iter().filter(|n| !listed.attachable.contains(n)).collect::<Vec<_>>(),
        said
    );
    assert_eq!(count.functions("count"), listed.attachable, "{fixture:?}");
    check_counts(&count, &report, &listed.attachable)?;
    let timed = latency.functions("histogram");
    check_latencies(&latency, &report, &timed).with_context(|| format!("{fixture:?}"))?;
    Ok(())
}

#[test]
fn c_programs_that_run_already() -> Result<()> {
    for (i, variant) in CBuild::ALL.iter().enumerate() {
        let threads = 1 + u32::try_from(i)? % 8;
        check_attached(Fixture::CountsC(*variant), threads, 400)?;
    }
    Ok(())
}
