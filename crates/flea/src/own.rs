//! Working on this very process: no process can trace itself, so a forked child does it while
//! the calling thread waits for its answer.
//!
//! The child lives for some milliseconds and has what the work needs in its copy of our
//! memory. It forks from a process with other threads, of which only ours exists in the copy:
//! what it may use is what glibc keeps usable after a fork (its allocator, threads), and none
//! of the program's own locks.
//!
//! It must not die half way, with a breakpoint of ours left behind that nobody answers: it is
//! born with every signal blocked, so that a Ctrl-C at the terminal ends the program alone.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::fd::OwnedFd,
    panic::{AssertUnwindSafe, catch_unwind},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::{
        signal::{SigSet, SigmaskHow, pthread_sigmask},
        wait::waitpid,
    },
    unistd::{ForkResult, Pid, fork, pipe2},
};
use serde::{Serialize, de::DeserializeOwned};

/// Why the child could not do it. The process is as it was, unless the child says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// It could not be started.
    #[error("starting the helper process that works on this one: {0}")]
    Start(#[source] Errno),
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
    // Closed in whatever the program's other threads execute meanwhile.
    let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(HelperError::Start);
    let (from_child, to_parent) = pipe()?;
    let (go_ahead, from_parent) = pipe()?;
    let mut mask = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut mask))
        .map_err(HelperError::Start)?;
    // SAFETY: the child runs `work` and ends by `_exit`: no destructor or exit handler of the
    // parent's runs twice. That it may allocate and start threads is glibc's guarantee, see
    // the module's description.
    let forked = unsafe { fork() };
    if let Ok(ForkResult::Child) = forked {
        drop((from_child, from_parent));
        child(work, go_ahead, to_parent)
    }
    let restored = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&mask), None);
    debug_assert!(restored.is_ok(), "the arguments are valid");
    let Ok(ForkResult::Parent { child }) = forked else {
        return Err(HelperError::Start(forked.err().unwrap_or(Errno::EAGAIN)));
    };
    drop(to_parent);
    allow_tracing_by(child);
    // We are a reader of it ourselves until then: no SIGPIPE, should the child be gone.
    let told = File::from(from_parent).write_all(&[1]);
    drop(go_ahead);
    let answer = told.and_then(|()| read_answer(&mut File::from(from_child)));
    // It has ended, or is about to. A program that reaps all children itself may have been
    // faster: that is no error.
    while waitpid(child, None) == Err(Errno::EINTR) {}
    let answer = answer.map_err(|_| HelperError::Silent)?;
    let answer: Result<R, String> =
        serde_json::from_slice(&answer).map_err(|_| HelperError::Silent)?;
    answer.map_err(HelperError::Failed)
}

/// Length and text. The end of the pipe would be no mark: a child that the program forked
/// meanwhile holds it open for as long as it lives.
fn read_answer(from_child: &mut File) -> std::io::Result<Vec<u8>> {
    let mut n_bytes = [0; 8];
    from_child.read_exact(&mut n_bytes)?;
    let mut text = Vec::new();
    from_child.take(u64::from_le_bytes(n_bytes)).read_to_end(&mut text)?;
    Ok(text)
}

fn child<R: Serialize, E: std::fmt::Display>(
    work: impl FnOnce() -> Result<R, E>,
    go_ahead: OwnedFd,
    to_parent: OwnedFd,
) -> ! {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        // Nothing comes where the parent is gone; then neither is there anything to do.
        if File::from(go_ahead).read_exact(&mut [0]).is_err() {
            return;
        }
        let answer: Result<R, String> = work().map_err(|error| error.to_string());
        let text = serde_json::to_vec(&answer).unwrap_or_default();
        let mut message = (text.len() as u64).to_le_bytes().to_vec();
        message.extend_from_slice(&text);
        // Where the parent is gone nobody wants the answer.
        let _ = File::from(to_parent).write_all(&message);
    }));
    // SAFETY: ends this process at once; nothing of it is needed any more.
    unsafe { libc::_exit(i32::from(outcome.is_err())) }
}

/// Where Yama lets only parents trace their children, the child needs our word for it. Fails
/// where there is no Yama, and then is not needed.
fn allow_tracing_by(pid: Pid) {
    let pid = libc::c_ulong::try_from(pid.as_raw()).unwrap_or(0);
    // SAFETY: PR_SET_PTRACER takes a number and touches no memory.
    let _ = unsafe { libc::prctl(libc::PR_SET_PTRACER, pid, 0, 0, 0) };
}
