//! What `flea` says agrees to the last call with what the program itself counted, and the
//! program computes and prints what it does without Flea.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use flea_fixtures::{CBuild, Fixture, Report, Running, RustBuild, Tally, build, spawn_waiting};
use serde_json::Value;
use support::{Records, TempFile, Tracing, ask, assert_clean, assert_original_code, flea, number};

/// Functions whose first argument is a pointer: their sums differ from run to run.
const BY_ADDRESS: &[&str] = &[
    "str",
    "counts::text_len",
    "Account::deposit(long)",
    "Square::sides(int) const",
    "Triangle::sides(int) const",
    "text(std::__cxx11::basic_string<char, std::char_traits<char>, std::allocator<char> > const&)",
];

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

/// Functions that exceptions and panics pass through.
const PASSED_BY_EXCEPTIONS: &[&str] =
    &["may_throw(int)", "passes(int)", "counts::panics", "counts::passes"];

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

/// Calls that end by a `throw` or a panic are counted, and not timed.
#[test]
fn calls_that_are_left_by_exceptions() -> Result<()> {
    let fixtures = [
        Fixture::CountsCpp(CBuild::O0),
        // `passes` begins with the call that an exception leaves.
        Fixture::CountsCpp(CBuild::O2),
        Fixture::CountsRust(RustBuild::Debug),
        Fixture::CountsRust(RustBuild::Release),
    ];
    for fixture in fixtures {
        let Some(names) = names(fixture)? else { continue };
        let Some(mut target) = spawn_waiting(fixture, 4, 90)? else { continue };
        let passed = |name: &&String| PASSED_BY_EXCEPTIONS.contains(&name.as_str());
        let passed: Vec<String> = names.iter().filter(passed).cloned().collect();
        assert_eq!(passed.len(), 2);
        let count = Tracing::attach(&words("count", &passed), target.pid())?;
        let latency = Tracing::attach(&words("latency", &passed), target.pid())?;
        let report = target.run_counts()?;
        check_counts(&count.stop()?, &report, &passed)?;
        check_latencies(&latency.stop()?, &report, &passed)?;
        // The return address of a call that an exception has left may lie on the stack of an
        // ended thread, and some of Flea with it, until the next `flea` looks again.
        assert_original_code(target.pid(), &fixture_path(fixture)?)?;
        assert_eq!(report.errors, 0, "{fixture:?}");
        target.finish_counts()?;
    }
    Ok(())
}

fn fixture_path(fixture: Fixture) -> Result<String> {
    let program = build(fixture).context("it was built")?;
    Ok(program.to_str().context("a path")?.to_owned())
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
        // Without alignment, the next function begins within five bytes. (`str` and `tail` begin
        // with a call.)
        let refused: &[&str] = match variant {
            CBuild::O1 => &["add", "leaf", "tail_end"],
            _ => &[],
        };
        let untimed: &[&str] = match variant {
            // No debug information: a tail call to strlen, and a variadic function.
            CBuild::OnlyDynsym => &["str", "sum_all"],
            _ => &[],
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
        // Where the optimiser is on, `catches` and `passes` begin with a call.
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

/// Runs `flea WORDS -- PROGRAM THREADS CALLS wait`: the program's own lines are the only ones
/// on stdout, its exit code is the command's.
fn run_started(words: &[&str], fixture: Fixture, size: (u32, u64)) -> Result<Option<Started>> {
    let Some(program) = build(fixture) else { return Ok(None) };
    let output = TempFile::new("records");
    let mut command = flea();
    command.args(words).arg("--json").arg("--output").arg(&output.0).arg("--").arg(&program);
    let (lines, code) = run_counting(&mut command, size)?;
    assert_eq!((lines.len(), lines[0].as_str(), lines[2].as_str()), (3, "ready", "done"));
    assert_eq!(code, Some(7), "{fixture:?}");
    let report: Report = serde_json::from_str(&lines[1])?;
    assert_eq!(report.errors, 0, "{fixture:?}");
    let (alone, _) = run_counting(&mut Command::new(&program), size)?;
    let alone: Report = serde_json::from_str(&alone[1])?;
    assert_eq!(without_addresses(&report), without_addresses(&alone), "{fixture:?}");
    Ok(Some(Started { report, records: Records(output.records()?) }))
}

struct Started {
    report: Report,
    records: Records,
}

/// The lines and the exit code of a counting program that is told to go and to end.
fn run_counting(command: &mut Command, size: (u32, u64)) -> Result<(Vec<String>, Option<i32>)> {
    command.args([size.0.to_string(), size.1.to_string(), "wait".to_owned()]);
    let mut running = Running::start_group(command)?;
    running.send("go")?;
    running.send("end")?;
    let lines = running.rest()?;
    Ok((lines, running.wait()?.code()))
}

/// What is the same in every run: sums of addresses are not.
fn without_addresses(report: &Report) -> Report {
    let mut report = report.clone();
    for name in BY_ADDRESS {
        report.functions.entry((*name).to_owned()).and_modify(|tally| tally.arg0_sum = 0);
    }
    report
}

#[test]
fn programs_started_by_flea() -> Result<()> {
    let c = [
        CBuild::O0,
        CBuild::O3,
        CBuild::NoPie,
        CBuild::Static,
        CBuild::StaticPie,
        CBuild::Musl,
        CBuild::MuslStatic,
        CBuild::OnlyDynsym,
        CBuild::NopMcount,
        CBuild::CfProtectionPatchable5,
    ];
    let fixtures = c
        .into_iter()
        .map(Fixture::CountsC)
        .chain([Fixture::CountsCpp(CBuild::O0), Fixture::CountsRust(RustBuild::Debug)]);
    for (fixture, threads) in fixtures.zip((1..=8).cycle()) {
        let Some(names) = names(fixture)? else { continue };
        let Some(run) = run_started(&words("count", &names), fixture, (threads, 200))? else {
            continue;
        };
        assert_eq!(run.records.summary("attached")?, names.len() as u64, "{fixture:?}");
        check_counts(&run.records, &run.report, &names).with_context(|| format!("{fixture:?}"))?;
    }
    Ok(())
}

#[test]
fn durations_in_programs_started_by_flea() -> Result<()> {
    for variant in [CBuild::O2, CBuild::Static, CBuild::NopMcount] {
        let fixture = Fixture::CountsC(variant);
        let timed = ["add", "big", "leaf", "half", "down"].map(str::to_owned);
        let Some(run) = run_started(&words("latency", &timed), fixture, (8, 300))? else {
            continue;
        };
        check_latencies(&run.records, &run.report, &timed)?;
    }
    Ok(())
}

/// Of which value a histogram is taken, and what it must say.
struct Expected {
    function: &'static str,
    expr: &'static str,
    sum: i128,
    min: i128,
    max: i128,
}

const HIST_THREADS: u32 = 4;
const HIST_CALLS: u64 = 504;

/// What `counts.c` does with its values, for [`HIST_THREADS`] and [`HIST_CALLS`].
fn expected_values(report: &Report) -> Vec<Expected> {
    let (threads, calls) = (i128::from(HIST_THREADS), i128::from(HIST_CALLS));
    let of = |name: &str| report.functions[name];
    let arg0 = |name: &str| i128::from(of(name).arg0_sum);
    let retval = |name: &str| i128::from(of(name).retval_sum);
    let sum_of_threads = calls * (threads * (threads - 1) / 2);
    let last = calls - 1;
    let value = |function, expr, sum, min, max| Expected { function, expr, sum, min, max };
    vec![
        value("add", "a", arg0("add"), 0, last),
        // choose(2) calls add(1, 1), once in eight rounds.
        value("add", "arg1", sum_of_threads + threads * calls / 8, 0, threads - 1),
        value("add", "retval", retval("add"), 0, last + threads - 1),
        value("by_pointer", "retval", retval("by_pointer"), -calls, -1),
        value("narrow", "arg0", arg0("narrow"), -127, 0),
        // On the stack.
        value("big", "h", -8 * calls * threads, -8, -8),
        value("big", "retval", retval("big"), 71, 71 + last + 2 * (threads - 1)),
        value("down", "n", arg0("down"), 0, 5),
        value("choose", "retval", retval("choose"), -1, 31),
        // The third integer, behind two doubles.
        value("mixed", "e", sum_of_threads, 0, threads - 1),
        value("hidden", "retval", retval("hidden"), 0, 3 * last + threads - 1),
        value("str", "retval", retval("str"), 0, 25),
    ]
}

/// Twelve processes, some of them on the same function.
#[test]
fn values_by_name_number_and_result() -> Result<()> {
    for variant in [CBuild::O2, CBuild::O0, CBuild::Patchable5] {
        let fixture = Fixture::CountsC(variant);
        let Some(mut target) = spawn_waiting(fixture, HIST_THREADS, HIST_CALLS)? else {
            return Ok(());
        };
        let Some(names) = names(fixture)? else { return Ok(()) };
        let empty = Report {
            threads: 0,
            calls: 0,
            errors: 0,
            functions: names.into_iter().map(|name| (name, NO_CALLS)).collect(),
        };
        let mut tracings = Vec::new();
        for Expected { function, expr, .. } in expected_values(&empty) {
            tracings.push(Tracing::start(&["hist", function, expr], target.pid())?);
        }
        for tracing in &mut tracings {
            tracing.wait_attached()?;
        }
        let report = target.run_counts()?;
        for (expected, tracing) in expected_values(&report).into_iter().zip(tracings) {
            check_values(&expected, &report, &tracing.stop()?)
                .with_context(|| format!("{variant:?} {} {}", expected.function, expected.expr))?;
        }
        assert_clean(target.pid())?;
        target.finish_counts()?;
        assert_eq!(report.errors, 0);
    }
    Ok(())
}

const NO_CALLS: Tally = Tally { count: 0, arg0_sum: 0, retval_sum: 0 };

fn check_values(expected: &Expected, report: &Report, records: &Records) -> Result<()> {
    let record = records.one("histogram", expected.function)?;
    let int = |field: &str| record[field].as_i64().map(i128::from).context("an integer");
    assert_eq!(record["value"], expected.expr);
    let found = (number(&record["count"])?, int("sum")?, int("min")?, int("max")?);
    let count = report.functions[expected.function].count;
    assert_eq!(found, (count, expected.sum, expected.min, expected.max), "{record}");
    check_buckets(record)?;
    records.assert_complete()
}

/// A call in `flea trace`, as the arguments and the result of its function say.
#[test]
fn every_call_with_its_arguments_and_result() -> Result<()> {
    let functions = ["add", "big", "by_pointer", "sum_double", "str", "narrow", "swap_pair"];
    let names = functions.map(str::to_owned);
    for variant in [CBuild::O2, CBuild::NopMcount, CBuild::Clang] {
        let fixture = Fixture::CountsC(variant);
        let Some(mut target) = spawn_waiting(fixture, 4, 100)? else { return Ok(()) };
        let tracing = Tracing::attach(&words("trace", &names), target.pid())?;
        let report = target.run_counts()?;
        let records = tracing.stop()?;
        assert_clean(target.pid())?;
        let pid = target.pid();
        target.finish_counts()?;
        records.assert_complete()?;
        for function in functions {
            let mut sums = NO_CALLS;
            for call in records.of("call").filter(|r| r["function"] == function) {
                assert_eq!(call["pid"], pid);
                check_call(function, call).with_context(|| call.to_string())?;
                sums.count += 1;
                sums.arg0_sum += call["args"]["a"].as_i64().unwrap_or(0);
                sums.retval_sum += call["retval"].as_i64().unwrap_or(0);
            }
            let tally = report.functions[function];
            assert_eq!(sums.count, tally.count, "{variant:?} {function}");
            if ["add", "big", "by_pointer", "narrow"].contains(&function) {
                assert_eq!(sums, tally, "{variant:?} {function}");
            }
        }
    }
    Ok(())
}

/// The bits of an `int`; the rest of its word is padding.
const INT: u64 = 0xffff_ffff;

fn check_call(function: &str, call: &Value) -> Result<()> {
    let args = &call["args"];
    let int = |name: &str| args[name].as_i64().with_context(|| format!("argument {name}"));
    let retval = &call["retval"];
    match function {
        "add" => assert_eq!(*retval, int("a")? + int("b")?),
        "big" => {
            let mut sum = 0;
            for (factor, name) in (1..).zip(["a", "b", "c", "d", "e", "f", "g", "h"]) {
                sum += factor * int(name)?;
            }
            assert_eq!(*retval, sum);
        }
        "by_pointer" => assert_eq!(*retval, !int("a")?),
        "sum_double" => {
            let float = |name: &str| args[name].as_f64().context("a double");
            assert_eq!(retval.as_f64(), Some(float("a")? + float("b")?));
        }
        "str" => {
            let text = args["s"].as_str().context("a string")?;
            assert!(["", "a", "four", "a longer string than that"].contains(&text));
            assert_eq!(*retval, text.len());
        }
        "narrow" => assert_eq!(*retval, (int("a")? + int("b")? + int("c")?) & 0xff),
        "swap_pair" => {
            let word = |text: &Value| {
                let digits = text.as_str().and_then(|text| text.strip_prefix("0x"));
                u64::from_str_radix(digits.unwrap_or_default(), 16).context("a word")
            };
            let (x, y) = (word(&args["p"][0])? & INT, word(&args["p"][1])?);
            assert_eq!(word(&retval[0])? & INT, y & INT);
            assert!(y >= x * 2, "y is twice x and the thread's number");
        }
        other => anyhow::bail!("{other} was not asked for"),
    }
    assert!(call["duration_ns"].is_u64() && call["time_ns"].is_u64());
    Ok(())
}

#[test]
fn what_cannot_be_attached_says_why() -> Result<()> {
    let Some(mut target) = spawn_waiting(Fixture::CountsC(CBuild::O1), 1, 10)? else {
        return Ok(());
    };
    let output = flea().args(["count", "leaf", "-p", &target.pid().to_string()]).output()?;
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr)?;
    assert!(said.contains("leaf: only 1 bytes before"), "{said}");
    assert!(said.contains("nothing was changed"), "{said}");
    assert_clean(target.pid())?;
    assert_eq!(target.run_counts()?.errors, 0);
    target.finish_counts()
}
