//! Talks to `bench_loop.c`: one process whose functions are timed on command.

use std::process::Command;

use anyhow::{Context, Result, bail};
use flea_fixtures::{Fixture, Running, try_build};

use super::site::{RemoteAddr, Site};
use super::steps;

/// Time that one round should take: long against the clock's grain, short against the
/// machine's moods.
const ROUND_NS: f64 = 2_000_000.0;

/// The running harness.
pub struct Harness {
    running: Running,
}

impl Harness {
    /// Builds and starts it.
    pub fn start() -> Result<Self> {
        let program = try_build(Fixture::BenchLoop)?.context("no C compiler for the harness")?;
        let mut running = Running::start(&mut Command::new(program))?;
        running.expect_line("ready")?;
        Ok(Self { running })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// Sends a command, returns the words of its answer after `head`.
    fn ask(&mut self, command: &str, head: &str) -> Result<String> {
        self.running.send(command)?;
        let line = self.running.line()?;
        match line.strip_prefix(head) {
            Some(rest) => Ok(rest.trim().to_owned()),
            None => bail!("{command}: {line}"),
        }
    }

    /// Nanoseconds per call over `n` calls of `function`.
    pub fn round(&mut self, function: &str, n: u64) -> Result<f64> {
        let answer = self.ask(&format!("round {function} {n}"), &format!("round {function}"))?;
        answer.parse().with_context(|| format!("a time, not {answer:?}"))
    }

    /// Calls `function` `n` times in each of eight threads at once.
    pub fn in_threads(&mut self, function: &str, n: u64) -> Result<()> {
        let head = format!("threads {function} {n}");
        self.ask(&head, &head).map(drop)
    }

    /// How many calls of `function` make a round of the right length.
    pub fn calibrate(&mut self, function: &str) -> Result<u64> {
        self.round(function, 200)?; // warm: caches, first-use paths of a tracer
        let ns = self.round(function, 2000)?.max(0.1);
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "clamped to a small positive range"
        )]
        let n = (ROUND_NS / ns).clamp(500.0, 2_000_000.0) as u64;
        Ok(n)
    }

    /// Puts a kernel probe (`uprobe` or `uretprobe`) on `function`.
    pub fn kernel_probe(&mut self, kind: &str, function: &str) -> Result<()> {
        self.ask(&format!("{kind} {function}"), "ok").map(drop)
    }

    /// A counter of the harness about `function`: `hits` (the kernel's) or `total` (its own).
    pub fn number(&mut self, what: &str, function: &str) -> Result<u64> {
        let answer = self.ask(&format!("{what} {function}"), &format!("{what} {function}"))?;
        answer.parse().with_context(|| format!("a number, not {answer:?}"))
    }

    /// The site of `function`.
    pub fn site(&mut self, function: &str) -> Result<Site> {
        let head = format!("address {function}");
        let answer = self.ask(&head, &head)?;
        let address = u64::from_str_radix(&answer, 16).context("an address in hex")?;
        Ok(Site::new(self.pid(), RemoteAddr(address)))
    }

    /// Instructions that one call of `function` executes in user space, itself included.
    pub fn instructions(&mut self, function: &str) -> Result<u32> {
        let entry = self.site(function)?.address();
        let n_insns =
            steps::count(self.pid(), entry, || self.running.send(&format!("once {function}")))?;
        self.running.expect_line("once")?;
        Ok(n_insns)
    }
}
