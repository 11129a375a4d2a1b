//! What controllers may be refused for in a torture run, and how often they were.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use flea::Pid;

/// Parts of messages that are no failure, and why.
const KNOWN: &[(&str, &str)] = &[
    ("nothing like that is attached", "another took it off before"),
    ("nothing was changed", "no function of the pattern can be attached to"),
    ("`libtorture_plugin.so:", "it is not loaded at the moment"),
    ("the process has closed it since", "a library that was just being closed"),
    ("whose library may just have been closed", "the same, a moment later"),
    ("its library was just closed", "the same, and something else is there now"),
    ("another flea (thread", "it waited ten seconds for its turn, on a busy machine"),
    ("no thread of process", "all of them were stopped or had signals at that moment"),
    ("not attached:", "some functions cannot be attached to"),
    ("program runs were skipped", "a signal handler ran inside a program"),
    ("calls were entered and have not returned", "exceptions, and calls that go on"),
    ("attached to", "it was attached"),
];

/// Parts of messages that are a failure, whatever else the line says.
const NEVER: &[&str] = &["may have changed it", "restart the process", "panicked", "damaged"];

/// Counts them.
#[derive(Default)]
pub struct Refusals(Mutex<BTreeMap<&'static str, u64>>);

impl Refusals {
    fn note(&self, said: &[String]) {
        for line in said {
            if let Some((part, _)) = KNOWN.iter().find(|(part, _)| line.contains(part)) {
                let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                *counts.entry(part).or_default() += 1;
            }
        }
    }

    /// Whether all lines are known refusals; counts them.
    pub fn all_known(&self, said: &[String]) -> bool {
        self.note(said);
        said.iter().all(|line| {
            let is_in = |part: &&str| line.contains(part);
            KNOWN.iter().any(|(part, _)| is_in(part)) && !NEVER.iter().any(is_in)
        })
    }
}

impl std::fmt::Display for Refusals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (part, n) in counts.iter() {
            let why = KNOWN.iter().find(|(known, _)| known == part).map_or("", |(_, why)| why);
            writeln!(f, "  {n:>7}  \"{part}\": {why}")?;
        }
        Ok(())
    }
}

/// Whether the process has not ended: one that is ending has given its memory back already.
pub fn is_alive(pid: Pid) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("VmSize:"))
}
