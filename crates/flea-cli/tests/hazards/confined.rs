//! The program `confined`, and a `flea` that counts its calls or refuses to.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use flea_fixtures::{Fixture, Running, build};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support;

const PATIENCE: Duration = Duration::from_secs(120);

/// A running `confined`.
pub struct Confined {
    pub running: Running,
    /// Its number, which is another one than that of what was started to start it.
    pub pid: u32,
    n_calls: u64,
}

/// Where the program is. `None` where there is no compiler, which was printed.
pub fn program() -> Option<PathBuf> {
    build(Fixture::Confined)
}

/// Whether we are root; says that the test is skipped where not.
pub fn is_root() -> bool {
    let is_root = nix::unistd::geteuid().is_root();
    if !is_root {
        eprintln!("skipped: this takes root");
    }
    is_root
}

impl Confined {
    /// Starts it under these restrictions.
    pub fn start(restrictions: &[&str]) -> Result<Option<Self>> {
        let Some(program) = program() else { return Ok(None) };
        Self::start_as(Command::new(program).args(restrictions)).map(Some)
    }

    /// Starts it by a command that executes it.
    pub fn start_as(command: &mut Command) -> Result<Self> {
        let mut running = Running::start_group(command)?;
        running.expect_line("ready")?;
        let pid = running.pid();
        Ok(Self { running, pid, n_calls: 0 })
    }

    /// The same, where the command is not what executes it but its parent.
    pub fn start_below(command: &mut Command) -> Result<Self> {
        let mut confined = Self::start_as(command)?;
        let parent = confined.pid;
        let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))?;
        confined.pid = children.trim().parse().with_context(|| format!("children {children:?}"))?;
        Ok(confined)
    }

    /// It runs on as it should: `n` calls are made, and all their results are right.
    pub fn go(&mut self, n: u64) -> Result<()> {
        self.n_calls += n;
        self.running.send(&format!("go {n}"))?;
        self.running.expect_line(&format!("{} 0", self.n_calls))
    }

    /// The thread by which it can be looked at: another one where its first has ended.
    fn stand_in(&self) -> Result<u32> {
        for entry in fs::read_dir(format!("/proc/{}/task", self.pid))? {
            let tid: u32 = entry?.file_name().to_string_lossy().parse()?;
            if fs::read_link(format!("/proc/{tid}/exe")).is_ok() {
                return Ok(tid);
            }
        }
        bail!("no thread of it is alive");
    }

    /// Nothing of Flea is in it.
    pub fn assert_left_alone(&self) -> Result<()> {
        let tid = self.stand_in()?;
        let maps = fs::read_to_string(format!("/proc/{tid}/maps"))?;
        ensure!(!maps.contains("memfd:flea"), "left behind: {maps}");
        let status = fs::read_to_string(format!("/proc/{tid}/status"))?;
        ensure!(status.contains("TracerPid:\t0\n"), "{status}");
        let exe = fs::read_link(format!("/proc/{tid}/exe"))?;
        let exe = exe.to_string_lossy();
        let root = fs::read_link(format!("/proc/{tid}/root"))?;
        if exe.ends_with(" (deleted)") || root != Path::new("/") {
            // The paths of its mappings lead to no file to compare with.
            return Ok(());
        }
        support::assert_original_code(tid, "")
    }

    /// `flea count` counts its calls, and leaves nothing behind.
    pub fn counts(&mut self) -> Result<()> {
        self.counts_by(support::flea())
    }

    /// The same by a `flea` that is given.
    pub fn counts_by(&mut self, command: Command) -> Result<()> {
        let tracing = self.attach_by(command, "count", "confined_step")?;
        self.go(10)?;
        let records = tracing.stop()?;
        let count = records.iter().find(|r| r["type"] == "count").context("no count")?;
        ensure!(count["count"] == 10, "{records:?}");
        self.go(5)?;
        self.assert_left_alone()
    }

    /// Attaches a `flea VERB FUNCTION`.
    pub fn attach(&self, verb: &str, function: &str) -> Result<Attached> {
        self.attach_by(support::flea(), verb, function)
    }

    fn attach_by(&self, mut command: Command, verb: &str, function: &str) -> Result<Attached> {
        command.args([verb, function, "--json", "-p"]).arg(self.pid.to_string());
        let mut running = Running::start(&mut command)?;
        let mut said = Vec::new();
        loop {
            let line = running
                .stderr_line_within(PATIENCE)
                .with_context(|| format!("not attached; it said {said:?}"))?;
            if line.starts_with("flea: attached to ") {
                return Ok(Attached(running));
            }
            said.push(line);
        }
    }

    /// `flea count` is refused, says all of `parts`, and has changed nothing.
    pub fn refuses(&mut self, parts: &[&str]) -> Result<()> {
        self.refuses_by(support::flea(), "count", parts)
    }

    /// The same by a `flea` that is given, and with another verb.
    pub fn refuses_by(&mut self, mut command: Command, verb: &str, parts: &[&str]) -> Result<()> {
        command.args([verb, "confined_step", "-p"]).arg(self.pid.to_string());
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1), "{output:?}");
        ensure!(output.stdout.is_empty() && !said.contains("panicked"), "{output:?}");
        for part in parts {
            ensure!(said.contains(part), "{said:?} does not say {part:?}");
        }
        self.go(5)?;
        self.assert_left_alone()
    }

    /// It ends as it does by itself.
    pub fn end(mut self) -> Result<()> {
        self.running.send("end")?;
        let status = self.running.wait()?;
        ensure!(status.code() == Some(7), "{status}");
        Ok(())
    }
}

/// A `flea` at work.
pub struct Attached(Running);

impl Attached {
    /// Ctrl-C: its records.
    pub fn stop(mut self) -> Result<Vec<Value>> {
        self.0.signal(Signal::SIGINT)?;
        let lines = self.0.rest()?;
        let status = self.0.wait_within(PATIENCE)?;
        ensure!(status.success(), "{status}: {:?}", self.0.rest_of_stderr());
        lines.iter().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }
}
