//! Targets that stand still, or whose threads are in odd places.

use std::{
    fs,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use flea_fixtures::{Running, Tool, require};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    confined::Confined,
    support::{self, TempFile},
};

/// The states of its threads, one letter each.
fn states(pid: u32) -> Result<Vec<char>> {
    let mut states = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = fs::read_to_string(entry?.path().join("stat"))?;
        let (_, after_name) = stat.rsplit_once(") ").unwrap_or_default();
        states.extend(after_name.chars().next());
    }
    Ok(states)
}

/// Waits until all its threads are stopped.
fn stop(target: &mut Confined, signal: Signal) -> Result<()> {
    target.running.signal(signal)?;
    while states(target.pid)?.iter().any(|state| *state != 'T') {
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Whether all its threads are stopped, or on their way there: whoever has been let go of by a tracer
/// goes from one kind of stop to the other by itself, in the kernel. One that was woken runs on.
fn stays_stopped(target: &Confined) -> Result<bool> {
    let until = Instant::now() + Duration::from_secs(5);
    while states(target.pid)?.iter().any(|state| *state != 'T') {
        if Instant::now() > until {
            return Ok(false);
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(true)
}

/// Attaching and detaching wake nobody, and both are done at once.
#[test]
fn a_stopped_process_stays_stopped() -> Result<()> {
    for signal in [Signal::SIGSTOP, Signal::SIGTSTP] {
        let Some(mut target) = Confined::start(&["hot"])? else { return Ok(()) };
        stop(&mut target, signal)?;
        let tracing = target.attach("count", "confined_step")?;
        assert!(stays_stopped(&target)?, "attaching woke it");
        target.running.signal(Signal::SIGCONT)?;
        target.go(10)?;
        stop(&mut target, signal)?;
        let records = tracing.stop()?;
        assert_eq!(records[0]["count"], 10, "{records:?}");
        assert!(stays_stopped(&target)?, "detaching woke it");
        target.assert_left_alone()?;
        target.running.signal(Signal::SIGCONT)?;
        target.go(10)?;
        target.end()?;
    }
    Ok(())
}

/// It is stopped and woken all the time while it is patched.
#[test]
fn stops_and_their_ends_while_it_is_patched() -> Result<()> {
    let Some(mut target) = Confined::start(&["hot"])? else { return Ok(()) };
    let over = AtomicBool::new(false);
    let pid = Pid::from_raw(target.pid.cast_signed());
    let outcome = thread::scope(|scope| {
        let storm = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                kill(pid, Signal::SIGSTOP)?;
                thread::sleep(Duration::from_millis(1));
                kill(pid, Signal::SIGCONT)?;
                thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        });
        let patched = (0..2).try_for_each(|_| -> Result<()> {
            target.counts()?;
            target.attach("latency", "hot_step")?.stop().map(drop)
        });
        over.store(true, Ordering::Relaxed);
        storm.join().unwrap().and(patched)
    });
    outcome?;
    target.assert_left_alone()?;
    target.go(10)?;
    target.end()
}

/// Its directory in /proc is that of a zombie.
#[test]
fn a_process_whose_first_thread_has_ended() -> Result<()> {
    let Some(mut target) = Confined::start(&["hot", "leaderless"])? else { return Ok(()) };
    while !states(target.pid)?.contains(&'Z') {
        thread::sleep(Duration::from_millis(1));
    }
    target.counts()?;
    target.attach("latency", "hot_step")?.stop()?;
    target.assert_left_alone()?;
    // `flea ps` and `flea detach` find what is there, too.
    let tracing = target.attach("count", "confined_step")?;
    let pid = target.pid.to_string();
    let ps = support::ask(&["ps", "-p", &pid])?;
    assert_eq!(ps.of("attached").count(), 1);
    let detached = support::flea().args(["detach", &pid]).output()?;
    assert!(detached.status.success(), "{detached:?}");
    tracing.stop()?;
    target.go(10)?;
    target.end()
}

/// Asleep in vfork a thread cannot be interrupted, and its child runs in the same memory with
/// files of its own.
#[test]
fn a_thread_in_vfork() -> Result<()> {
    let Some(mut target) = Confined::start(&["vfork", "hot"])? else { return Ok(()) };
    while !states(target.pid)?.contains(&'D') {
        thread::sleep(Duration::from_millis(1));
    }
    let files =
        || -> Result<usize> { Ok(fs::read_dir(format!("/proc/{}/fd", target.pid))?.count()) };
    let n_files = files()?;
    assert!(n_files > 0);
    target.counts()?;
    target.attach("latency", "hot_step")?.stop()?;
    assert_eq!(fs::read_dir(format!("/proc/{}/fd", target.pid))?.count(), n_files);
    target.end()
}

/// A debugger comes while it is traced: what was found out is not lost, and what is left there is
/// taken off when the debugger has gone.
#[test]
fn somebody_else_traces_it_meanwhile() -> Result<()> {
    use nix::{sys::ptrace, sys::wait::waitpid};
    let Some(mut target) = Confined::start(&[])? else { return Ok(()) };
    let id = target.pid.to_string();
    let out = TempFile::new("meanwhile");
    let mut flea = support::flea();
    flea.args(["count", "confined_step", "-p", &id, "--json", "--output"]).arg(&out.0);
    let mut counting = Running::start(&mut flea)?;
    while !counting.stderr_line_within(Duration::from_secs(60))?.contains("attached") {}
    target.go(10)?;
    let pid = Pid::from_raw(target.pid.cast_signed());
    ptrace::seize(pid, ptrace::Options::empty())?;
    counting.signal(Signal::SIGINT)?;
    let status = counting.wait()?;
    let said = counting.rest_of_stderr().join("\n");
    assert_eq!(status.code(), Some(1), "{said}");
    for part in ["still there", "is traced by", "flea detach"] {
        assert!(said.contains(part), "{said}");
    }
    assert_eq!(out.records()?[0]["count"], 10);
    target.go(10)?;
    ptrace::interrupt(pid)?;
    waitpid(pid, None)?;
    ptrace::detach(pid, None)?;
    let detached = support::flea().args(["detach", &id]).output()?;
    assert!(detached.status.success(), "{detached:?}");
    target.go(10)?;
    target.assert_left_alone()?;
    target.end()
}

/// Handlers of its own for the very signals that breakpoints and faults bring.
#[test]
fn handlers_of_its_own() -> Result<()> {
    let Some(mut target) = Confined::start(&["handlers", "hot"])? else { return Ok(()) };
    target.counts()?;
    target.attach("latency", "hot_step")?.stop()?;
    let status = fs::read_to_string(format!("/proc/{}/status", target.pid))?;
    let caught = status.lines().find_map(|l| l.strip_prefix("SigCgt:\t")).unwrap_or_default();
    let caught = u64::from_str_radix(caught, 16)?;
    for signal in [Signal::SIGTRAP, Signal::SIGSEGV] {
        assert!(caught & 1 << (signal as i32 - 1) != 0, "{signal} has lost its handler");
    }
    target.end()
}

/// The same for an interpreter that dumps its stack where one arrives.
#[test]
fn python_with_its_fault_handler() -> Result<()> {
    let Some(python) = require(Tool::Python3) else { return Ok(()) };
    let script = "import hashlib, sys\n\
        h = b''\n\
        for i in range(20000): h = hashlib.sha256(h + bytes([i & 255])).digest()\n\
        print(h.hex()); sys.exit(6)";
    let python = python.to_string_lossy().into_owned();
    let words = [&python, "-X", "faulthandler", "-c", script];
    let alone = Command::new(words[0]).args(&words[1..]).output()?;
    let out = TempFile::new("python");
    let traced = support::flea()
        .args(["latency", "libc.so.6:malloc", "libc.so.6:free", "--json", "--output"])
        .arg(&out.0)
        .arg("--")
        .args(words)
        .output()?;
    assert_eq!((&traced.stdout, traced.status.code()), (&alone.stdout, Some(6)), "{traced:?}");
    let histograms = out.records()?;
    assert!(histograms[0]["count"].as_u64() > Some(50), "{histograms:?}");
    Ok(())
}
