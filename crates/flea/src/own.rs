//! Working on this very process: no process can trace itself, so a forked child does it while
//! the calling thread waits for its answer.
//!
//! The child lives for some milliseconds and has what the work needs in its copy of our
//! memory. It forks from a process with other threads, of which only ours exists in the copy:
//! what it may use is what glibc keeps usable after a fork (its allocator, threads), and none
//! of the program's own locks.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::fd::OwnedFd,
    panic::{AssertUnwindSafe, catch_unwind},
};

use nix::{
    sys::wait::waitpid,
    unistd::{ForkResult, fork, pipe},
};
use serde::{Serialize, de::DeserializeOwned};

/// Why the child could not do it. The process is as it was, unless the child says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// It could not be started.
    #[error("starting the helper process that works on this one: {0}")]
    Start(#[source] nix::errno::Errno),
    /// It ended without an answer.
    #[error("the helper process that works on this one ended without an answer")]
    Silent,
    /// It failed.
    #[error("{0}")]
    Failed(String),
}

/// Runs `work` in a forked child and hands its result over.
pub(crate) fn in_child<R, E>(work: impl FnOnce() -> Result<R, E>) -> Result<R, HelperError>
where
    R: Serialize + DeserializeOwned,
    E: std::fmt::Display,
{
    let (from_child, to_parent) = pipe().map_err(HelperError::Start)?;
    // SAFETY: the child runs `work` and ends by `_exit`: no destructor or exit handler of the
    // parent's runs twice. That it may allocate and start threads is glibc's guarantee, see
    // the module's description.
    match unsafe { fork() }.map_err(HelperError::Start)? {
        ForkResult::Child => {
            drop(from_child);
            child(work, to_parent)
        }
        ForkResult::Parent { child } => {
            drop(to_parent);
            allow_tracing_by(child.as_raw());
            let mut answer = Vec::new();
            let read = File::from(from_child).read_to_end(&mut answer);
            // It has ended, or is about to; a program that reaps all children itself may have
            // been faster.
            let _ = waitpid(child, None);
            read.map_err(|_| HelperError::Silent)?;
            let answer: Result<R, String> =
                serde_json::from_slice(&answer).map_err(|_| HelperError::Silent)?;
            answer.map_err(HelperError::Failed)
        }
    }
}

fn child<R: Serialize, E: std::fmt::Display>(
    work: impl FnOnce() -> Result<R, E>,
    to_parent: OwnedFd,
) -> ! {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let answer: Result<R, String> = work().map_err(|error| error.to_string());
        let text = serde_json::to_vec(&answer).unwrap_or_default();
        // Where the parent is gone nobody wants the answer.
        let _ = File::from(to_parent).write_all(&text);
    }));
    // SAFETY: ends this process at once; nothing of it is needed any more.
    unsafe { libc::_exit(i32::from(outcome.is_err())) }
}

/// Where Yama lets only parents trace their children, the child needs our word for it. Fails
/// where there is no Yama, and then is not needed.
fn allow_tracing_by(pid: i32) {
    let pid = libc::c_ulong::try_from(pid).unwrap_or(0);
    // SAFETY: PR_SET_PTRACER takes a number and touches no memory.
    let _ = unsafe { libc::prctl(libc::PR_SET_PTRACER, pid, 0, 0, 0) };
}
