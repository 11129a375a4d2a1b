//! Children by fork, vfork and posix_spawn, and programs that are executed, without `--follow`.

use anyhow::{Result, ensure};
use flea::builtin::Histograms;
use flea_fixtures::Running;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{PATIENCE, Tracing, ask, assert_clean, flea, number};
use crate::{Dir, Family, counted};

pub fn n_attached(pid: u32) -> Result<usize> {
    Ok(ask(&["ps", "-p", &pid.to_string()])?.of("attached").count())
}

/// What has been started by the target, ended whatever happens.
pub struct Orphan(pub u32);

impl Orphan {
    pub fn of(family: &mut Family) -> Result<Self> {
        Ok(Self(u32::try_from(family.number("stay")?)?))
    }
}

impl Drop for Orphan {
    fn drop(&mut self) {
        // Mostly it has ended, and its number is still its own: its parent waits for it last.
        let _ = kill(Pid::from_raw(self.0.cast_signed()), Signal::SIGKILL);
    }
}

#[test]
fn children_count_into_the_same_maps() -> Result<()> {
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let mut family = dir.start()?;
    let tracing = Tracing::attach(&["count", "work"], family.pid())?;
    for command in ["work 10", "fork 6 20", "vfork 5 30", "spawn 3 1000", "vexec 3 1000"] {
        family.act(command)?;
    }
    let total = family.number("total")?;
    assert_eq!(total, 10 + 6 * 20 + 5 * 30, "executed programs have totals of their own");
    assert_eq!(counted(&tracing.stop()?, "work")?, total);
    assert_clean(family.pid())?;
    family.finish()
}

/// The child has its copy of the code, of the registry, and shares the maps: it runs on, and
/// `flea` finds what is attached to it.
#[test]
fn a_child_that_outlives_the_tracing() -> Result<()> {
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let mut family = dir.start()?;
    let tracing = Tracing::attach(&["latency", "work"], family.pid())?;
    let child = Orphan::of(&mut family)?;
    family.act("work 10")?;
    tracing.stop()?;
    assert_clean(family.pid())?;

    let before = family.number("total")?;
    while family.number("total")? < before + 100 {}
    assert_eq!(n_attached(child.0)?, 1);
    let output = flea().args(["detach", &child.0.to_string()]).output()?;
    ensure!(output.status.success(), "{output:?}");
    assert_clean(child.0)?;
    let before = family.number("total")?;
    while family.number("total")? < before + 100 {}
    assert_eq!(family.number("part")?, 0, "the child's end");
    family.finish()
}

#[test]
fn a_process_that_becomes_another_program() -> Result<()> {
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let family = dir.start()?;
    let pid = family.pid();
    let mut flea = Running::start(flea().args(["count", "work", "-p", &pid.to_string()]))?;
    let attached = flea.stderr_line_within(PATIENCE)?;
    ensure!(attached == "flea: attached to 1 function", "{attached}");
    let mut family = family;
    family.act("work 25")?;
    family.0.send("exec 40")?;
    let status = flea.wait()?;
    let said = flea.rest_of_stderr();
    ensure!(status.code() == Some(0), "{status}: {said:?}");
    let expected = format!("flea: process {pid} has executed another program");
    ensure!(said.len() == 1 && said[0].starts_with(&expected), "{said:?}");
    ensure!(said[0].ends_with("the results are up to then"), "{said:?}");
    let rows = flea.rest()?;
    ensure!(rows.len() == 1 && rows[0].trim_start().starts_with("25 "), "{rows:?}");
    family.0.close_stdin();
    ensure!(family.0.wait()?.code() == Some(0), "the other program ends as if nobody had looked");
    Ok(())
}

/// A started command keeps its exit code; what it becomes is not traced, and that is said.
#[test]
fn a_command_that_becomes_another_program() -> Result<()> {
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let script = format!("exec {} linger 40", dir.path("target"));
    let mut command = flea();
    command.args(["count", "libc.so.6:write", "--json", "--", "sh", "-c"]).arg(script);
    let mut flea = Running::start(&mut command)?;
    let said = [flea.stderr_line_within(PATIENCE)?, flea.stderr_line_within(PATIENCE)?];
    ensure!(said[0].starts_with("flea: attached to "), "{said:?}");
    ensure!(said[1].contains("has executed another program"), "{said:?}");
    flea.send("go on")?;
    let status = flea.wait()?;
    ensure!(status.code() == Some(3), "{status}");
    ensure!(flea.rest_of_stderr().is_empty(), "it was said already");
    Ok(())
}

/// One `flea` counts all the while; others come and go on the same and on another function.
#[test]
fn threads_and_processes_by_the_hundred() -> Result<()> {
    const STORMS: u64 = 5;
    const CYCLES: usize = 12;
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let mut family = dir.start()?;
    let pid = family.pid();
    let tracing = Tracing::attach(&["count", "work"], pid)?;
    let session = flea::Session::attach(pid.cast_signed())?;
    let functions = [session.find("work")?, session.find("other")?].concat();
    for _ in 0..STORMS {
        family.0.send("storm 40 50")?;
        for _ in 0..CYCLES {
            let mut latency = Histograms::of_duration(&session, &functions)?;
            latency.detach()?;
            assert_eq!(latency.missed(), 0);
        }
        family.0.expect_line("done")?;
    }
    let total = family.number("total")?;
    assert_eq!(total, STORMS * 40 * 50 * (8 + 1 + 1));
    let records = tracing.stop()?;
    assert_eq!(number(&records.one("count", "work")?["count"])?, total);
    records.assert_complete()?;
    assert_clean(pid)?;
    family.finish()
}
