//! What a target of a torture run is.

use anyhow::Result;
use flea::Pid;
use nix::sys::signal::Signal;

use super::bout::Bout;
use super::calls::Calls;

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
    fn patterns(&self) -> &'static [&'static str];

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

    /// Ends it, and checks that it ends as it must.
    fn end(&mut self, bout: &Bout<'_>) -> Result<()>;
}
