//! What a target of a torture run is.

use std::time::Duration;

use anyhow::Result;
use flea::Pid;
use flea_fixtures::Running;
use nix::sys::signal::Signal;

use super::bout::Bout;
use super::calls::Calls;

/// How long one that has crashed may need to write that down.
const END_PATIENCE: Duration = Duration::from_secs(2);
/// Lines of its last words.
const MAX_LAST_WORDS: usize = 15;

/// A function whose calls are known from outside.
pub struct Known<'a> {
    /// Its pattern.
    pub function: &'static str,
    /// The process that calls it.
    pub pid: Pid,
    /// Its calls.
    pub calls: &'a Calls,
}

/// A program at work, which checks itself or is checked by clients. Ends with its value.
pub trait Target: Sync {
    /// The processes that may be traced now.
    fn pids(&self) -> Vec<Pid>;

    /// What controllers are asked to trace.
    fn patterns(&self) -> &[&'static str];

    /// Signals that it takes without harm, SIGSTOP and SIGCONT apart.
    fn signals(&self) -> &'static [Signal];

    /// A function whose calls are known.
    fn known(&self) -> Option<Known<'_>>;

    /// A shared object with a function that may be replaced.
    fn patch(&self) -> Option<(String, &'static str)> {
        None
    }

    /// How many clients work on it.
    fn n_clients(&self) -> usize;

    /// Client number `client` works and checks until the bout ends.
    fn work(&self, client: usize, bout: &Bout<'_>) -> Result<()>;

    /// Ends its work, so that no thread stays inside a function that was traced.
    fn quiet(&self, bout: &Bout<'_>) -> Result<()>;

    /// Of a target that has failed: how it ended, if it has, and what it said last.
    fn last_words(&mut self) -> String;

    /// Ends it, and checks that it ends as it must.
    fn end(&mut self, bout: &Bout<'_>) -> Result<()>;
}

/// The last words of a process that has failed.
pub fn last_words_of(running: &mut Running) -> String {
    let status = match running.wait_within(END_PATIENCE) {
        Ok(status) => format!("it ended with {status}"),
        Err(_) => "it still runs".to_owned(),
    };
    let mut said = running.lines_so_far();
    said.extend(running.stderr_so_far());
    let from = said.len().saturating_sub(MAX_LAST_WORDS);
    format!("{status}\n    {}", said[from..].join("\n    "))
}
