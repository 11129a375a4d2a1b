//! Several `flea` at the same time on the same function: each is exact for its time, any of
//! them may go first, and what a dead one leaves behind is found and taken off.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use flea_fixtures::{CBuild, Fixture, Report, Running, build, spawn_waiting};
use serde_json::Value;
use support::{Records, TempFile, Tracing, ask, assert_clean, flea, number};

/// The program has some seconds of work; a busy machine takes longer.
const END_OF_LOAD: Duration = Duration::from_secs(300);

/// A program that calls one function for as long as it is wanted.
struct Spinning(Running);

impl Spinning {
    fn start(mode: &[&str]) -> Result<Option<Self>> {
        let Some(program) = build(Fixture::Spin) else { return Ok(None) };
        let mut running = Running::start(std::process::Command::new(program).args(mode))?;
        running.expect_line("ready")?;
        Ok(Some(Self(running)))
    }

    fn pid(&self) -> u32 {
        self.0.pid()
    }

    /// Calls so far, rounded down to a batch of each thread.
    fn n_calls(&mut self) -> Result<u64> {
        self.0.send("now")?;
        let report: Report = serde_json::from_str(&self.0.line()?)?;
        Ok(report.functions["spin_step"].count)
    }

    /// Waits until it has called on.
    fn go_on(&mut self) -> Result<()> {
        let before = self.n_calls()?;
        // Each answer takes some time; a machine on which this does not end is stopped.
        for _ in 0..1_000_000 {
            if self.n_calls()? > before + 1000 {
                return Ok(());
            }
            std::thread::yield_now();
        }
        anyhow::bail!("it makes no more calls")
    }

    fn stop(mut self) -> Result<()> {
        self.0.send("stop")?;
        let status = self.0.wait()?;
        ensure!(status.success(), "{status}");
        Ok(())
    }
}

fn counted(records: &Records, function: &str) -> Result<u64> {
    records.assert_complete()?;
    number(&records.one("count", function)?["count"])
}

/// `flea ps` about one process: (id, controller, whether it is alive), by id.
fn ps(pid: u32) -> Result<Vec<(String, u64, bool)>> {
    let records = ask(&["ps", "-p", &pid.to_string()])?;
    let row = |r: &Value| {
        let id = r["id"].as_str().context("an id")?.to_owned();
        let alive = r["controller_alive"].as_bool().context("alive")?;
        Ok((id, number(&r["controller"])?, alive))
    };
    records.of("attached").map(row).collect()
}

fn detach(what: &[&str]) -> Result<String> {
    let output = flea().arg("detach").args(what).output()?;
    ensure!(output.status.code() == Some(0), "{output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// All see the same calls, whichever kind of program they attach, and go in any order.
#[test]
fn two_three_and_six_at_once() -> Result<()> {
    let kinds: &[&[&str]] = &[
        &["count", "down"],
        &["hist", "down", "n"],
        &["latency", "down"],
        &["count", "down"],
        &["hist", "down", "retval"],
        &["latency", "down"],
    ];
    // Which of those that are left goes next.
    let orders: &[&[usize]] = &[&[0, 0], &[1, 0, 0], &[3, 0, 2, 2, 0, 0]];
    for variant in [CBuild::O2, CBuild::NopMcount] {
        for order in orders {
            let fixture = Fixture::CountsC(variant);
            let Some(mut target) = spawn_waiting(fixture, 4, 500)? else { return Ok(()) };
            let pid = target.pid();
            let mut tracings = Vec::new();
            for words in &kinds[..order.len()] {
                tracings.push((words, Tracing::start(words, pid)?));
            }
            for (_, tracing) in &mut tracings {
                tracing.wait_attached()?;
            }
            let controllers: Vec<u64> = ps(pid)?.into_iter().map(|(_, by, _)| by).collect();
            let mut expected: Vec<u64> = tracings.iter().map(|(_, t)| t.pid().into()).collect();
            let mut found = controllers.clone();
            found.sort_unstable();
            expected.sort_unstable();
            assert_eq!(found, expected);

            let report = target.run_counts()?;
            for &next in *order {
                let (words, tracing) = tracings.remove(next);
                let records = tracing.stop()?;
                let kind = if words[0] == "count" { "count" } else { "histogram" };
                let n = number(&records.one(kind, "down")?["count"])?;
                assert_eq!(n, report.functions["down"].count, "{variant:?} {order:?} {words:?}");
                records.assert_complete()?;
                assert_eq!(ps(pid)?.len(), tracings.len());
            }
            assert_clean(pid)?;
            assert_eq!(report.errors, 0);
            target.finish_counts()?;
        }
    }
    Ok(())
}

/// One that comes later counts from then on, and one that goes earlier up to then: seen from
/// inside the others' time.
#[test]
fn coming_and_going_while_it_runs() -> Result<()> {
    let Some(mut target) = Spinning::start(&["2"])? else { return Ok(()) };
    let first = Tracing::attach(&["count", "spin_step"], target.pid())?;
    target.go_on()?;
    let from = target.n_calls()?;
    let second = Tracing::attach(&["latency", "spin_step"], target.pid())?;
    let since = target.n_calls()?;
    target.go_on()?;
    let third = Tracing::attach(&["hist", "spin_step", "retval"], target.pid())?;
    target.go_on()?;
    let until = target.n_calls()?;
    let second = second.stop()?;
    let to = target.n_calls()?;
    let third = third.stop()?;
    let first = first.stop()?;
    let n = |records: &Records| number(&records.one("histogram", "spin_step")?["count"]);
    let (all, second_n, third_n) = (counted(&first, "spin_step")?, n(&second)?, n(&third)?);
    // The program's number is up to a batch of 64 per thread behind.
    let slack = 2 * 64;
    assert!(second_n + slack >= until - since, "{second_n} in {since}..{until}");
    assert!(second_n <= to - from + slack, "{second_n} in {from}..{to}");
    assert!(all > second_n && all > third_n && third_n > 0);
    assert_clean(target.pid())?;
    target.stop()
}

#[test]
fn a_killed_controller_leaves_a_running_target() -> Result<()> {
    let Some(mut target) = Spinning::start(&["3"])? else { return Ok(()) };
    let pid = target.pid();
    let doomed = Tracing::attach(&["latency", "spin_step"], pid)?;
    let other = Tracing::attach(&["count", "spin_step"], pid)?;
    doomed.kill()?;
    target.go_on()?;
    let rows = ps(pid)?;
    assert_eq!(rows.iter().map(|row| row.2).collect::<Vec<_>>(), [false, true]);
    let output = flea().args(["ps", "-p", &pid.to_string()]).output()?;
    let text = String::from_utf8(output.stdout)?;
    let gone: Vec<_> = text.lines().filter(|line| line.ends_with(" (gone)")).collect();
    assert_eq!(gone.len(), 1, "{text}");
    assert!(gone[0].starts_with(&rows[0].0), "{text}");

    assert_eq!(detach(&[&rows[0].0])?, "detached 1\n");
    assert_eq!(ps(pid)?, rows[1..]);
    target.go_on()?;
    assert!(counted(&other.stop()?, "spin_step")? > 0);
    assert_clean(pid)?;
    target.stop()
}

/// `kill -9`, of the whole process group, at instants all over a controller's life: as it reads
/// symbols, compiles, seizes, patches, counts, and takes its programs off again. What was begun is
/// finished by the process that does the patching; the target never meets a breakpoint that
/// nobody answers, and the next controller finds all that is there.
#[test]
fn killed_at_any_instant() -> Result<()> {
    const KILLS: u64 = 60;
    let Some(mut target) = Spinning::start(&["3"])? else { return Ok(()) };
    let pid = target.pid().to_string();
    let whole = lifetime(&pid)?;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut below = |bound: Duration| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        bound.mul_f64((random >> 40) as f64 / (1u64 << 24) as f64)
    };
    for round in 0..KILLS {
        let kind = ["count", "latency"][usize::try_from(round % 2)?];
        let mut doomed = controller(&[kind, "spin_step", "-p", &pid])?;
        if round % 3 == 0 {
            // In the middle of taking off.
            std::thread::sleep(whole);
            signal(&doomed, nix::sys::signal::Signal::SIGINT)?;
            std::thread::sleep(below(whole / 2));
        } else {
            std::thread::sleep(below(whole));
        }
        signal(&doomed, nix::sys::signal::Signal::SIGKILL)?;
        doomed.wait()?;
        if round % 10 == 0 {
            target.go_on().with_context(|| format!("after {} kills", round + 1))?;
        }
    }
    let alive = ps(target.pid())?.iter().filter(|row| row.2).count();
    assert_eq!(alive, 0);
    let counting = Tracing::attach(&["count", "spin_step"], target.pid())?;
    target.go_on()?;
    assert!(counted(&counting.stop()?, "spin_step")? > 0);
    if !ps(target.pid())?.is_empty() {
        detach(&[&pid])?;
    }
    target.go_on()?;
    assert_clean(target.pid())?;
    target.stop()
}

/// `flea` in a process group of its own.
fn controller(args: &[&str]) -> Result<std::process::Child> {
    use std::os::unix::process::CommandExt as _;
    use std::process::Stdio;
    let mut command = flea();
    command.args(args).process_group(0).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(command.spawn()?)
}

/// To all processes of its group.
fn signal(child: &std::process::Child, signal: nix::sys::signal::Signal) -> Result<()> {
    let group = nix::unistd::Pid::from_raw(child.id().cast_signed());
    Ok(nix::sys::signal::killpg(group, signal)?)
}

/// How long a controller takes from its start until it counts.
fn lifetime(pid: &str) -> Result<Duration> {
    let started = std::time::Instant::now();
    Tracing::attach(&["latency", "spin_step"], pid.parse()?)?.stop()?;
    Ok(started.elapsed())
}

/// Taken off under a living controller: it ends as usual, with what it saw until then.
#[test]
fn detach_takes_others_off() -> Result<()> {
    let Some(mut target) = spawn_waiting(Fixture::CountsC(CBuild::O2), 2, 100)? else {
        return Ok(());
    };
    let pid = target.pid();
    let taken_off = Tracing::attach(&["count", "add", "big"], pid)?;
    let stays = Tracing::attach(&["count", "add"], pid)?;
    let rows = ps(pid)?;
    assert_eq!(rows.len(), 3);
    let add: Vec<&str> = rows
        .iter()
        .filter(|row| row.1 == u64::from(taken_off.pid()))
        .map(|row| row.0.as_str())
        .collect();
    assert_eq!(detach(&add)?, "detached 2\n");
    let report = target.run_counts()?;
    let records = taken_off.stop()?;
    assert_eq!(counted(&records, "add")?, 0);
    assert_eq!(counted(&records, "big")?, 0);
    assert_eq!(counted(&stays.stop()?, "add")?, report.functions["add"].count);
    assert_clean(pid)?;
    assert_eq!(report.errors, 0);
    target.finish_counts()
}

#[test]
fn detach_a_whole_process() -> Result<()> {
    let Some(mut target) = Spinning::start(&["2"])? else { return Ok(()) };
    let pid = target.pid();
    let mut tracings = Vec::new();
    for words in [["count", "spin_step"], ["latency", "spin_step"], ["count", "main"]] {
        tracings.push(Tracing::attach(&words, pid)?);
    }
    tracings.pop().context("three")?.kill()?;
    assert_eq!(detach(&[&pid.to_string()])?, "detached 3\n");
    assert_eq!(ps(pid)?, []);
    target.go_on()?;
    for tracing in tracings {
        tracing.stop()?;
    }
    let again = flea().args(["detach", &pid.to_string()]).output()?;
    assert_eq!(again.status.code(), Some(1));
    // The dead one's memory goes with the last controller that looks.
    assert_clean(pid)?;
    target.stop()
}

/// Threads that come and go all the time are all counted.
#[test]
fn threads_that_are_born_meanwhile() -> Result<()> {
    let Some(mut target) = Spinning::start(&["4", "churn"])? else { return Ok(()) };
    for _ in 0..5 {
        let tracing = Tracing::attach(&["count", "spin_step"], target.pid())?;
        let since = target.n_calls()?;
        target.go_on()?;
        let until = target.n_calls()?;
        let n = counted(&tracing.stop()?, "spin_step")?;
        assert!(n + 4 * 64 >= until - since, "{n} in {since}..{until}");
    }
    assert_clean(target.pid())?;
    target.stop()
}

/// Eight busy threads, fifty times on and off: the program's results stay right.
#[test]
fn fifty_rounds_under_load() -> Result<()> {
    let Some(mut target) = spawn_waiting(Fixture::CountsC(CBuild::O2), 8, 40_000_000)? else {
        return Ok(());
    };
    let pid = target.pid();
    target.send("go")?;
    let kinds: [&[&str]; 4] = [
        &["count", "add", "big", "str", "half"],
        &["latency", "big", "rotate_huge", "half"],
        &["count", "down", "choose", "leaf"],
        &["latency", "add", "swap_pair", "sum_double"],
    ];
    let mut n_busy = 0;
    for (round, words) in (0..50).zip(kinds.into_iter().cycle()) {
        let tracing = Tracing::attach(words, pid)?;
        let records = tracing.stop().with_context(|| format!("round {round}"))?;
        assert_eq!(records.summary("attached")?, words.len() as u64 - 1);
        records.assert_complete()?;
        n_busy += u32::from(records.0.iter().any(|r| r["count"].as_u64() > Some(0)));
    }
    // On a busy machine most of the rounds come after the last call.
    assert!(n_busy >= 3, "only {n_busy} rounds saw calls");
    // A wrong result would have been counted by the caller.
    let report: Report = serde_json::from_str(&target.line_within(END_OF_LOAD)?)?;
    assert_eq!((report.errors, report.functions["big"].count), (0, 8 * 40_000_000));
    target.expect_line("done")?;
    assert_clean(pid)?;
    target.finish_counts()
}

/// A thread is inside a traced function while six controllers go, and others come and put
/// their code where there is room: it still finds its way back.
#[test]
fn a_call_that_outlasts_its_controllers() -> Result<()> {
    let Some(mut target) = spawn_waiting(Fixture::CountsC(CBuild::O2), 1, 8)? else {
        return Ok(());
    };
    let pid = target.pid();
    let mut tracings = Vec::new();
    for _ in 0..6 {
        tracings.push(Tracing::attach(&["latency", "libc.so.6:fgets"], pid)?);
    }
    // It is in fgets already, from before; the next call is entered through all six.
    let report = target.run_counts()?;
    assert_eq!(report.errors, 0);
    for tracing in tracings {
        tracing.stop()?.assert_complete()?;
    }
    assert_eq!(ps(pid)?, []);
    for words in [["latency", "add", "big", "down"], ["count", "leaf", "half", "mixed"]] {
        let first = Tracing::attach(&words, pid)?;
        let second = Tracing::attach(&words, pid)?;
        first.stop()?;
        second.stop()?;
    }
    target.finish_counts()
}

/// `--all` means every process that can be reached. In a pid namespace of its own that is
/// what this test started, and nobody else's.
#[test]
fn detach_everything_everywhere() -> Result<()> {
    const SCRIPT: &str = r#"
        set -e
        targets=
        for i in 1 2; do
            sleep 1000 | "$SPIN" 1 > /dev/null &
            targets="$targets $!"
        done
        for pid in $targets; do
            "$FLEA" count spin_step -p $pid 2> "$SAID.$pid" > /dev/null &
            until grep -q 'attached to 1 function' "$SAID.$pid"; do sleep 0.01; done
            kill -9 $!
            wait $! || true
            rm "$SAID.$pid"
        done
        "$FLEA" ps | grep -c '(gone)$'
        "$FLEA" detach --all
        "$FLEA" ps | wc -l
        for pid in $targets; do
            grep -c memfd:flea /proc/$pid/maps || true
        done
    "#;
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("skipped: a pid namespace takes root");
        return Ok(());
    }
    let Some(spin) = build(Fixture::Spin) else { return Ok(()) };
    let said = TempFile::new("said");
    let mut command = std::process::Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", SCRIPT]);
    command.env("SPIN", spin).env("FLEA", env!("CARGO_BIN_EXE_flea")).env("SAID", &said.0);
    let mut running = Running::start_group(&mut command)?;
    let lines = running.rest()?;
    let errors = running.rest_of_stderr();
    assert_eq!(lines, ["2", "detached 2", "0", "0", "0"], "{errors:?}");
    ensure!(running.wait()?.success(), "{errors:?}");
    Ok(())
}
