//! With `--follow`: children and executed programs are counted, nobody notices, and nothing is
//! left behind.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use flea_fixtures::Running;
use nix::sys::signal::Signal;

use crate::families::{Orphan, n_attached};
use crate::support::{PATIENCE, TempFile, Tracing, assert_clean, compile_bpf, flea, number};
use crate::{Dir, counted};

/// Everything that makes processes: calls of the program and its children, and of those that are
/// executed.
const FAMILY: [&str; 6] =
    ["work 7", "fork 5 10", "vfork 4 20", "spawn 3 30", "vexec 2 40", "fork 2 50"];
const OWN: u64 = 7 + 5 * 10 + 4 * 20 + 2 * 50;
const EXECUTED: u64 = 3 * 30 + 2 * 40;

/// Who traces it; 0 is nobody.
fn tracer(pid: u32) -> Result<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
    Ok(tracer.context("a tracer")?.trim().parse()?)
}

#[test]
fn a_running_process_and_its_children() -> Result<()> {
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let mut family = dir.start()?;
    let tracing = Tracing::attach(&["count", "work", "--follow"], family.pid())?;
    for command in FAMILY {
        family.act(command)?;
    }
    assert_eq!(family.number("total")?, OWN);
    assert_eq!(counted(&tracing.stop()?, "work")?, OWN + EXECUTED);
    assert_clean(family.pid())?;
    assert_eq!(tracer(family.pid())?, 0);
    family.finish()
}

/// A started command: its exit code is kept, and whom it leaves behind is waited for.
#[test]
fn a_command_and_whom_it_leaves_behind() -> Result<()> {
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let target = dir.path("target");
    let output = TempFile::new("records");
    // The last one goes on when the shell has ended.
    let script = format!("{target} calls 11; {target} calls 22 & exec {target} linger 33");
    let mut command = flea();
    command.args(["count", "main", "--follow", "--json", "--output"]).arg(&output.0);
    let mut flea = Running::start(command.args(["--", &target, "calls", "44"]))?;
    ensure!(flea.wait()?.code() == Some(0), "{:?}", flea.rest_of_stderr());

    let mut command = crate::support::flea();
    command.args(["count", "libc.so.6:_Exit", "--follow", "--json", "--output"]).arg(&output.0);
    let mut flea = Running::start(command.args(["--", "sh", "-c", &script]))?;
    flea.send("go on")?;
    let status = flea.wait_within(PATIENCE)?;
    let said = flea.rest_of_stderr();
    ensure!(status.code() == Some(3), "{status}: {said:?}");
    let n_executed = said.iter().filter(|line| line.contains("has executed")).count();
    assert_eq!(n_executed, 3, "{said:?}");
    let records = crate::support::Records(output.records()?);
    // It goes by both names.
    assert_eq!(counted(&records, "_Exit")?, 3, "{said:?}");
    Ok(())
}

#[test]
fn programs_without_the_function() -> Result<()> {
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let target = dir.path("target");
    let script = "/bin/true; exec /bin/sh -c 'exit 5'";
    let mut command = flea();
    command.args(["count", "libc.so.6:fork", "target:work", "-f", "--", "sh", "-c", script]);
    // The shell is none of the program either: a pattern that nothing matches is an error there.
    let output = command.output()?;
    ensure!(output.status.code() == Some(1), "{output:?}");

    let mut family = dir.start()?;
    let tracing = Tracing::attach(&["count", "target:work", "-f"], family.pid())?;
    family.0.send(&format!("run /bin/true {target}"))?;
    family.0.expect_line("done")?;
    family.act("work 9")?;
    assert_eq!(counted(&tracing.stop()?, "work")?, 9);
    family.finish()
}

/// Histograms are added up, calls bear the process they were made in.
#[test]
fn latency_and_trace() -> Result<()> {
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let mut family = dir.start()?;
    let latency = Tracing::attach(&["latency", "work", "-f"], family.pid())?;
    for command in FAMILY {
        family.act(command)?;
    }
    let records = latency.stop()?;
    records.assert_complete()?;
    assert_eq!(number(&records.one("histogram", "work")?["count"])?, OWN + EXECUTED);

    let trace = Tracing::attach(&["trace", "work", "-f"], family.pid())?;
    for command in FAMILY {
        family.act(command)?;
    }
    let records = trace.stop()?;
    records.assert_complete()?;
    assert_eq!(u64::try_from(records.of("call").count())?, OWN + EXECUTED);
    let pids: BTreeSet<_> = records.of("call").map(|call| call["pid"].as_u64()).collect();
    assert_eq!(pids.len(), 1 + 5 + 4 + 3 + 2 + 2);
    assert_clean(family.pid())?;
    family.finish()
}

/// A child that lives on is as clean as its parent afterwards, and others can come.
#[test]
fn nothing_is_left_in_children() -> Result<()> {
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let mut family = dir.start()?;
    let tracing = Tracing::attach(&["latency", "work", "-f"], family.pid())?;
    let child = Orphan::of(&mut family)?;
    assert_eq!(n_attached(child.0)?, 1);
    for pid in [family.pid(), child.0] {
        let follower = tracer(pid)?;
        let comm = fs::read_to_string(format!("/proc/{follower}/comm"))?;
        assert_eq!(comm.trim_end(), "flea-follower");
        // Another one is told who is there.
        let output = flea().args(["count", "work", "-p", &pid.to_string()]).output()?;
        let said = String::from_utf8(output.stderr)?;
        let expected = format!("process {pid} is followed by flea (process {},", tracing.pid());
        ensure!(output.status.code() == Some(1) && said.contains(&expected), "{said}");
    }
    tracing.stop()?;
    for pid in [family.pid(), child.0] {
        assert_eq!(tracer(pid)?, 0);
        assert_clean(pid)?;
    }
    let before = family.number("total")?;
    let second = Tracing::attach(&["count", "work"], child.0)?;
    while family.number("total")? < before + 50 {}
    assert!(counted(&second.stop()?, "work")? > 0);
    assert_eq!(family.number("part")?, 0);
    family.finish()
}

/// A controller that is killed leaves everybody running, and traced by nobody.
#[test]
fn a_killed_follower() -> Result<()> {
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let mut family = dir.start()?;
    let pid = family.pid();
    for command in ["storm 8 5", "spawn 20 5"] {
        let tracing = Tracing::attach(&["count", "work", "-f"], pid)?;
        family.0.send(command)?;
        tracing.kill()?;
        family.0.expect_line("done")?;
        let since = std::time::Instant::now();
        while tracer(pid)? != 0 {
            ensure!(since.elapsed() < PATIENCE, "it is still traced");
            std::thread::yield_now();
        }
    }
    let output = flea().args(["detach", &pid.to_string()]).output()?;
    ensure!(output.status.success(), "{output:?}");
    assert_clean(pid)?;
    family.finish()
}

/// Signals of every kind reach those that are followed: a shell with jobs, stopped and continued.
#[test]
fn signals_and_stops() -> Result<()> {
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let mut family = dir.start()?;
    let tracing = Tracing::attach(&["count", "work", "-f"], family.pid())?;
    let child = Orphan::of(&mut family)?;
    let child_pid = nix::unistd::Pid::from_raw(child.0.cast_signed());
    for _ in 0..5 {
        nix::sys::signal::kill(child_pid, Signal::SIGSTOP)?;
        while !fs::read_to_string(format!("/proc/{child_pid}/stat"))?.contains(") T ")
            && !fs::read_to_string(format!("/proc/{child_pid}/stat"))?.contains(") t ")
        {
            std::thread::yield_now();
        }
        nix::sys::signal::kill(child_pid, Signal::SIGCONT)?;
        let before = family.number("total")?;
        while family.number("total")? < before + 3 {}
    }
    assert_eq!(family.number("part")?, 0);
    let total = family.number("total")?;
    assert_eq!(counted(&tracing.stop()?, "work")?, total);
    family.finish()
}

#[test]
fn a_storm_is_counted_exactly() -> Result<()> {
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let mut family = dir.start()?;
    let tracing = Tracing::attach(&["count", "work", "--follow"], family.pid())?;
    family.act("storm 40 25")?;
    let total = family.number("total")?;
    assert_eq!(total, 40 * 25 * (8 + 1 + 1));
    assert_eq!(counted(&tracing.stop()?, "work")?, total + 40 * 25);
    assert_clean(family.pid())?;
    family.finish()
}

/// An object's maps are the same in all processes, whatever they execute.
#[test]
fn an_object_in_the_whole_family() -> Result<()> {
    let Some(object) = compile_bpf("family.bpf.c", "v3")? else { return Ok(()) };
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let mut family = dir.start()?;
    let path = object.0.to_string_lossy();
    let tracing = Tracing::attach(&["run", &path, "--follow"], family.pid())?;
    for command in FAMILY {
        family.act(command)?;
    }
    let child = Orphan::of(&mut family)?;
    assert_eq!(family.number("part")?, 0);
    let records = tracing.stop()?;
    records.assert_complete()?;
    let in_map = |map: &str| -> Vec<(u64, u64)> {
        let of_map = records.of("map").filter(|r| r["map"] == map);
        of_map.filter_map(|r| Some((r["key"].as_u64()?, r["value"].as_u64()?))).collect()
    };
    let by_process = in_map("by_process");
    let of_child: u64 =
        by_process.iter().filter(|(p, _)| *p == u64::from(child.0)).map(|p| p.1).sum();
    let sums = in_map("sums");
    assert_eq!(sums[0], (0, OWN + EXECUTED + of_child));
    assert_eq!(by_process.iter().map(|(_, n)| n).sum::<u64>(), sums[0].1);
    // Each calls work(0), work(1), and so on, and it returns one more; the child work(0) alone.
    let sum = |k: u64, n: u64| k * n * (n + 1) / 2;
    let own = sum(1, 7) + sum(5, 10) + sum(4, 20) + sum(2, 50);
    assert_eq!(sums[1], (1, own + sum(3, 30) + sum(2, 40) + of_child));
    let n_processes = 1 + 5 + 4 + 3 + 2 + 2 + usize::from(of_child > 0);
    assert_eq!(by_process.len(), n_processes);
    assert_eq!(records.of("printk").count(), n_processes);
    assert_clean(family.pid())?;
    family.finish()
}
