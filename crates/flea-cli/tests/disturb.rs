//! The target notices nothing: no EINTR, no signal, no changed mask or handler, no thread.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::process::Command;

use anyhow::Result;
use flea_fixtures::{Fixture, Running, build};
use support::{Tracing, assert_clean, number};

/// On its own hot functions, on the C library's that its threads are blocked in or run
/// through, and on both.
const ROUNDS: &[&[&str]] = &[
    &["count", "busy_step", "woken", "blocked_step"],
    &["latency", "busy_step", "blocked_step"],
    &["count", "libc.so.6:epoll_wait", "libc.so.6:poll", "libc.so.6:read", "libc.so.6:accept"],
    &["count", "libc.so.6:*sigtimedwait*", "libc.so.6:clock_gettime", "libc.so.6:nanosleep"],
    &["latency", "libc.so.6:clock_nanosleep", "libc.so.6:select", "woken"],
    &["hist", "busy_step", "i"],
    &["trace", "woken"],
];

fn start() -> Result<Option<Running>> {
    let Some(program) = build(Fixture::Disturb) else { return Ok(None) };
    let mut running = Running::start(&mut Command::new(program))?;
    running.expect_line("ready")?;
    Ok(Some(running))
}

/// It checks itself, and prints what it found.
fn check(mut target: Running) -> Result<()> {
    target.send("check")?;
    let lines = target.rest()?;
    assert_eq!(lines.last().map(String::as_str), Some("undisturbed"), "{lines:?}");
    assert!(target.wait()?.success());
    Ok(())
}

#[test]
fn nothing_is_noticed() -> Result<()> {
    let Some(target) = start()? else { return Ok(()) };
    for _ in 0..3 {
        for words in ROUNDS {
            let tracing = Tracing::attach(words, target.pid())?;
            let records = tracing.stop()?;
            assert!(records.summary("attached")? > 0, "{words:?}");
            assert_eq!(records.summary("missed")?, 0, "{words:?}");
        }
    }
    assert_clean(target.pid())?;
    check(target)
}

/// The busy thread's function is called all the time, so it is counted in every round.
#[test]
fn hot_functions_are_seen_in_every_round() -> Result<()> {
    let Some(target) = start()? else { return Ok(()) };
    for round in 0..15 {
        let other = Tracing::attach(&["latency", "busy_step"], target.pid())?;
        let tracing = Tracing::attach(&["count", "busy_step"], target.pid())?;
        // Long enough for the busy thread to get a CPU, not only for the commands.
        std::thread::sleep(std::time::Duration::from_millis(100));
        let (first, second) = if round % 2 == 0 { (tracing, other) } else { (other, tracing) };
        let (first, second) = (first.stop()?, second.stop()?);
        for record in first.0.iter().chain(&second.0).filter(|r| r["function"] == "busy_step") {
            assert!(number(&record["count"])? > 0, "round {round}: {record}");
        }
    }
    assert_clean(target.pid())?;
    check(target)
}
