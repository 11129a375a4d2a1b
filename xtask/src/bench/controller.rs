//! Runs the command `flea` beside a target, and knows from the target's text when it has
//! attached and when it is gone.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flea_fixtures::Running;
use nix::sys::signal::Signal;

use super::site::{Site, Text, wait_until};

/// How long attaching or detaching may take before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// The command under test.
pub struct Flea {
    path: PathBuf,
}

/// A `flea` that has attached and runs until it is told to finish.
pub struct Attached {
    running: Running,
    /// From the start of the command to the last site being patched.
    pub took: Duration,
}

/// What was left when it finished.
pub struct Finished {
    /// Its standard output.
    pub output: String,
    /// From Ctrl-C to its exit.
    pub took: Duration,
}

impl Flea {
    /// The binary at `path`.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Starts `flea SUBCOMMAND -p PID ARGS...` and waits until all `sites` are patched.
    pub fn attach(&self, words: &[&str], pid: u32, sites: &[Site]) -> Result<Attached> {
        let before: Vec<Text> = sites.iter().map(|site| site.text()).collect::<Result<_>>()?;
        let (subcommand, rest) = words.split_first().context("a subcommand")?;
        let mut command = Command::new(&self.path);
        command.arg(subcommand).arg("-p").arg(pid.to_string()).args(rest);
        let begun = Instant::now();
        let mut running = Running::start(&mut command)?;
        let mut n_patched = 0;
        wait_until(PATIENCE, || {
            // In order, and never again once seen: ten thousand sites cost one read each.
            while n_patched < sites.len() {
                if !sites[n_patched].is_patched_since(&before[n_patched])? {
                    let exited = running.wait_within(Duration::ZERO).ok();
                    if let Some(status) = exited {
                        bail!("{status}: {}", reason(&mut running));
                    }
                    return Ok(false);
                }
                n_patched += 1;
            }
            Ok(true)
        })
        .with_context(|| format!("flea {}", words.join(" ")))?;
        Ok(Attached { running, took: begun.elapsed() })
    }
}

impl Attached {
    /// Asks it to end: it prints its result, detaches, exits with 0. By SIGTERM, as a shell starts
    /// background jobs with SIGINT ignored.
    pub fn finish(mut self) -> Result<Finished> {
        let begun = Instant::now();
        self.running.signal(Signal::SIGTERM)?;
        let status = self.running.wait_within(PATIENCE)?;
        let took = begun.elapsed();
        ensure!(status.success(), "after SIGTERM {status}: {}", reason(&mut self.running));
        Ok(Finished { output: self.running.rest()?.join("\n"), took })
    }
}

/// What a command that failed said, in a line.
fn reason(running: &mut Running) -> String {
    let lines = running.rest_of_stderr();
    if lines.is_empty() { "it said nothing".to_owned() } else { lines.join("; ") }
}

/// Whether `output` holds exactly this number, by itself or with separators of thousands.
pub fn mentions(output: &str, number: u64) -> bool {
    let wanted = number.to_string();
    output
        .split(|c: char| !(c.is_ascii_digit() || matches!(c, ',' | '_' | '\'')))
        .map(|word| word.chars().filter(char::is_ascii_digit).collect::<String>())
        .any(|word| word == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::harness::Harness;
    use crate::bench::site::ensure_restored;

    #[test]
    fn numbers_are_found_whole() {
        for output in ["f3 1234567", "{\"f3\":1234567}", "f3  1,234,567\n", "1_234_567"] {
            assert!(mentions(output, 1_234_567), "{output}");
        }
        for output in ["", "f3 12345678", "1234 567", "11234567"] {
            assert!(!mentions(output, 1_234_567), "{output}");
        }
    }

    fn fake() -> Flea {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/src/bench/testdata/fake-flea.sh");
        Flea::new(dir.into())
    }

    /// Yama lets an ordinary user write into children only, and the fake is a sibling.
    fn may_patch_siblings() -> bool {
        let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
        let open = scope.map_or(true, |scope| scope.trim() == "0");
        let may = open || nix::unistd::Uid::effective().is_root();
        if !may {
            eprintln!("skipped: kernel.yama.ptrace_scope forbids to patch a sibling");
        }
        may
    }

    #[test]
    fn attach_and_finish_follow_the_text() {
        if !may_patch_siblings() {
            return;
        }
        let mut harness = Harness::start().unwrap();
        let site = harness.site("f1").unwrap();
        let original = site.text().unwrap();
        let address = site.address().0.to_string();
        let words = ["count", &address, "f1 4711"];
        let attached = fake().attach(&words, harness.pid(), &[site]).unwrap();
        assert!(ensure_restored(&[site], &[original]).is_err());
        assert!(harness.round("f1", 100).unwrap() > 0.0);
        let finished = attached.finish().unwrap();
        assert!(mentions(&finished.output, 4711), "{}", finished.output);
        ensure_restored(&[site], &[original]).unwrap();
    }

    #[test]
    fn a_command_that_fails_says_why() {
        let mut harness = Harness::start().unwrap();
        let site = harness.site("f1").unwrap();
        let error = fake().attach(&["refuse"], harness.pid(), &[site]).err().unwrap();
        assert!(format!("{error:#}").contains("no reason"), "{error:#}");
    }
}
