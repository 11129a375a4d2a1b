//! Exit programs on variadic functions: the program prints what it prints without Flea.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use flea_fixtures::{CBuild, Fixture, Running, build};
use support::{Tracing, ask, assert_clean, number};

const OWN: [&str; 4] = ["mixed", "longs", "named", "first"];
/// Their stack arguments are aligned to 32 or 64 bytes.
const ALIGNED: [&str; 3] = ["aligned32", "aligned64", "loaded"];
const OF_LIBC: [&str; 4] =
    ["libc.so.6:printf", "libc.so.6:snprintf", "libc.so.6:fprintf", "libc.so.6:execl"];

const BUILDS: [CBuild; 4] = [CBuild::O0, CBuild::O2, CBuild::ClangO0, CBuild::Clang];

/// The lines of a run, up to its last word.
fn run(target: &mut Running) -> Result<Vec<String>> {
    target.send("go")?;
    let mut lines = Vec::new();
    loop {
        let line = target.line()?;
        if line == "done" {
            return Ok(lines);
        }
        lines.push(line);
    }
}

fn start(fixture: Fixture) -> Result<Option<Running>> {
    let Some(program) = build(fixture) else { return Ok(None) };
    let mut running = Running::start(Command::new(program).arg("wait"))?;
    running.expect_line("ready")?;
    Ok(Some(running))
}

fn finish(mut target: Running) -> Result<()> {
    target.send("end")?;
    ensure!(target.wait()?.success());
    Ok(())
}

/// `mixed 12 longs 3 ...`
fn counts(lines: &[String]) -> Result<Vec<(String, u64)>> {
    let last = lines.last().and_then(|line| line.strip_prefix("calls: ")).context("counts")?;
    let words: Vec<&str> = last.split(' ').collect();
    words.chunks(2).map(|pair| Ok((pair[0].to_owned(), pair[1].parse()?))).collect()
}

#[test]
fn every_call_gets_its_arguments() -> Result<()> {
    for variant in BUILDS {
        let fixture = Fixture::Variadic(variant);
        let Some(mut bare) = start(fixture)? else { continue };
        let expected = run(&mut bare)?;
        finish(bare)?;
        ensure!(expected.len() > 140, "{variant:?}: {expected:#?}");

        let Some(mut target) = start(fixture)? else { continue };
        let latency = Tracing::attach(&[&["latency"], &OWN[..]].concat(), target.pid())?;
        let result = Tracing::attach(&["hist", "longs", "retval"], target.pid())?;
        // Where clang's optimiser has split a structure, debug information is not believed.
        let aligned = &ALIGNED[usize::from(variant == CBuild::Clang)..];
        let timed = Tracing::attach(&[&["latency"], aligned].concat(), target.pid())?;
        assert_eq!(run(&mut target)?, expected, "{variant:?}");
        let (latency, result, timed) = (latency.stop()?, result.stop()?, timed.stop()?);
        assert_clean(target.pid())?;
        finish(target)?;
        for (name, count) in counts(&expected)? {
            let record = latency.one("histogram", &name)?;
            assert_eq!(number(&record["count"])?, count, "{variant:?} {name}");
        }
        for name in aligned {
            assert_eq!(number(&timed.one("histogram", name)?["count"])?, 8, "{variant:?} {name}");
        }
        let n_longs = counts(&expected)?.into_iter().find(|(name, _)| name == "longs");
        let counted = number(&result.one("histogram", "longs")?["count"])?;
        assert_eq!(Some(counted), n_longs.map(|(_, n)| n), "{variant:?}");
    }
    Ok(())
}

/// With glibc's debug information installed it says which functions are variadic; else these
/// are refused.
#[test]
fn functions_of_libc() -> Result<()> {
    let fixture = Fixture::Variadic(CBuild::O2);
    let Some(mut bare) = start(fixture)? else { return Ok(()) };
    let expected = run(&mut bare)?;
    finish(bare)?;
    let Some(mut target) = start(fixture)? else { return Ok(()) };
    let pid = target.pid().to_string();
    let listed = ask(&["list", "libc.so.6:printf", "-p", &pid])?;
    let signature = listed.one("function", "printf")?["signature"].as_str().map(str::to_owned);
    if !signature.is_some_and(|s| s.contains("...")) {
        eprintln!("skipped: glibc's debug information is not installed");
        return finish(target);
    }
    let latency = Tracing::attach(&[&["latency"], &OF_LIBC[..]].concat(), target.pid())?;
    assert_eq!(run(&mut target)?, expected);
    let latency = latency.stop()?;
    assert_clean(target.pid())?;
    finish(target)?;
    for (name, at_least) in [("printf", 140), ("snprintf", 1), ("fprintf", 1)] {
        let record = latency.one("histogram", name)?;
        ensure!(number(&record["count"])? >= at_least, "{record}");
    }
    Ok(())
}
