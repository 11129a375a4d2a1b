//! The command under test.

use std::{collections::BTreeMap, process::Command, time::Duration};

use flea_fixtures::Running;
use nix::sys::signal::Signal;
use serde_json::Value;

/// Thousands of functions in a debug build on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// `flea` with these arguments.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flea"));
    command.args(args);
    command
}

/// A `flea` that is attached and waits for the end.
pub struct Attached(Running);

impl Attached {
    /// Starts `flea ... --json -p PID` and waits until it says that it is attached.
    pub fn start(args: &[&str], pid: u32) -> Self {
        let mut command = command(args);
        command.args(["--json", "-p", &pid.to_string()]);
        let mut running = Running::start(&mut command).unwrap();
        loop {
            let line = running.stderr_line_within(PATIENCE).unwrap();
            if line.starts_with("flea: attached to") {
                return Self(running);
            }
        }
    }

    /// Ctrl-C: the result.
    pub fn stop(mut self) -> Records {
        self.0.signal(Signal::SIGINT).unwrap();
        let mut lines = Vec::new();
        while let Ok(line) = self.0.line_within(PATIENCE) {
            lines.push(line);
        }
        let status = self.0.wait_within(PATIENCE).unwrap();
        assert!(status.success(), "{status}: {:?}", self.0.rest_of_stderr());
        Records::parse(&lines)
    }
}

/// What `flea` printed as JSON.
pub struct Records(Vec<Value>);

impl Records {
    /// Parses a record per line.
    pub fn parse(lines: &[impl AsRef<str>]) -> Self {
        Self(lines.iter().map(|line| serde_json::from_str(line.as_ref()).unwrap()).collect())
    }

    /// All of one type.
    pub fn of_type<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Value> {
        self.0.iter().filter(move |record| record["type"] == name)
    }

    /// Calls per function, by name; functions of one name are added up.
    pub fn counts(&self) -> BTreeMap<&str, u64> {
        let mut counts = BTreeMap::new();
        for record in self.of_type("count") {
            let name = record["function"].as_str().unwrap();
            *counts.entry(name).or_default() += record["count"].as_u64().unwrap();
        }
        counts
    }

    /// The names of the functions that were attached to, sorted.
    pub fn attached<'a>(&'a self, record: &'a str) -> Vec<&'a str> {
        let mut names: Vec<_> =
            self.of_type(record).map(|r| r["function"].as_str().unwrap()).collect();
        names.sort_unstable();
        names
    }

    /// Names of the functions that `flea list` says can be attached to, sorted.
    pub fn attachable(&self) -> Vec<&str> {
        let mut names: Vec<_> = self
            .of_type("function")
            .filter(|r| r["site"] != "refused")
            .map(|r| r["function"].as_str().unwrap())
            .collect();
        names.sort_unstable();
        names
    }

    /// Checks the summary: these many attached, nothing lost or missed.
    pub fn assert_complete(&self, n_attached: usize) {
        let summary: Vec<_> = self.of_type("summary").collect();
        assert_eq!(summary.len(), 1);
        assert_eq!(summary[0]["attached"], n_attached, "{}", summary[0]);
        assert_eq!(summary[0]["lost"], 0, "{}", summary[0]);
    }
}

/// What `flea list PATTERN TARGET...` says.
pub fn list(pattern: &str, target: &[&str]) -> Records {
    let mut args = vec!["list", pattern, "--json"];
    args.extend(target);
    let output = command(&args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Records::parse(&String::from_utf8(output.stdout).unwrap().lines().collect::<Vec<_>>())
}
