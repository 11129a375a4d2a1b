//! A running program of the matrix, and what it wrote about one round of calls.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use flea_fixtures::Running;

use crate::builds::Built;
use crate::emit::Offset;

/// Bytes of an XSAVE area.
const X_BYTES: usize = 4096;
/// `struct record` of the harness.
const RECORD_BYTES: usize = 34 * 8 + 2 * X_BYTES;

/// The processor's state around one call.
pub struct State {
    pub before: [u64; 16],
    pub after: [u64; 16],
    pub flags: u64,
    pub x_before: Vec<u8>,
    pub x_after: Vec<u8>,
}

/// One round.
pub struct Round {
    /// By function; `None` where no thunk is between.
    pub states: Vec<Option<State>>,
    log: Vec<u8>,
}

impl Round {
    /// `n` bytes of the log.
    pub fn log(&self, at: Offset, n: usize) -> &[u8] {
        &self.log[at..at + n]
    }

    /// A word of the log.
    pub fn word(&self, at: Offset) -> u64 {
        word(&self.log, at)
    }
}

/// The little-endian word at byte `at`.
pub fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The program, waiting for what to do. Dropping it ends it.
pub struct Target<'a> {
    running: Running,
    built: &'a Built,
}

impl<'a> Target<'a> {
    /// Starts it. `None`, said on stderr, on a processor without XSAVE.
    pub fn start(built: &'a Built) -> Result<Option<Self>> {
        let mut running = Running::start(&mut Command::new(&built.program))?;
        let line = running.line()?;
        if line == "no xsave" {
            eprintln!("skipped: the processor cannot save its state with xsave");
            return Ok(None);
        }
        ensure!(line == "ready", "{line}");
        Ok(Some(Self { running, built }))
    }

    pub fn pid(&self) -> flea::Pid {
        self.running.pid().cast_signed()
    }

    /// One round with these inputs, over a stack that is full of `residue`.
    pub fn run(&mut self, residue: u8, inputs: &[u8], n_functions: usize) -> Result<Round> {
        let (input, output) = (self.built.dir.join("in.bin"), self.built.dir.join("out.bin"));
        fs::write(&input, inputs)?;
        self.running.send(&format!("run {residue} {} {}", input.display(), output.display()))?;
        self.running.expect_line("done").context("a round of calls")?;
        let bytes = fs::read(&output)?;
        let (records, log) = bytes.split_at(n_functions * RECORD_BYTES);
        let states = records.chunks_exact(RECORD_BYTES).map(state).collect();
        Ok(Round { states, log: log.to_vec() })
    }

    /// Lets it end, and checks that it ends as it must.
    pub fn finish(mut self) -> Result<()> {
        self.running.close_stdin();
        let status = self.running.wait()?;
        ensure!(status.code() == Some(7), "ended with {status}, not with its code 7");
        Ok(())
    }
}

fn state(record: &[u8]) -> Option<State> {
    let (words, extended) = record.split_at(34 * 8);
    let gprs = |first: usize| std::array::from_fn(|i| word(words, 8 * (first + i)));
    let (x_before, x_after) = extended.split_at(X_BYTES);
    (word(words, 33 * 8) == 1).then(|| State {
        before: gprs(0),
        after: gprs(16),
        flags: word(words, 32 * 8),
        x_before: x_before.to_vec(),
        x_after: x_after.to_vec(),
    })
}
