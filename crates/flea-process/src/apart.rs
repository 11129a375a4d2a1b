//! Work that outlives its process.
//!
//! # What is protected, and by what
//!
//! Protected: a target in the middle of a patch. Its tracer answers for the breakpoints that are
//! in its text and for a thread that executes a system call for us; where the tracer dies, the
//! kernel lets go of all threads as they are, and the target crashes. By: a tracer that does not
//! die with the controller, whatever is done to that, `kill -9` at any instant included. What was
//! begun is finished, and later controllers find it in the registry.
//!
//! 1. A thread of ours blocks all signals and makes a child by `clone`, which shares our memory and
//!    files (`CLONE_VM`, `CLONE_FILES`), so nothing is copied and `work` may be any closure; it is a
//!    process of its own, in a session of its own: no signal to us, to our process group or from
//!    our terminal reaches it.
//! 2. That thread is suspended until the child ends (`CLONE_VFORK`): its thread-local storage, which
//!    the C library's allocator has things in, is the child's alone.
//! 3. Where the controller is killed, the memory stays as long as the child needs it.
//!
//! Not protected: a child that is killed itself, by its number, with its whole control group, or by
//! the kernel's out-of-memory killer, which kills all that share a memory; and a child that waits
//! for a lock of the allocator that another thread of the controller was holding as it was killed.

use std::ffi::{c_int, c_void};
use std::io;
use std::ptr;

use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, pthread_sigmask, signal};

use crate::thread::{Job, on_own_thread};

/// As a thread of the main program has; only what is touched becomes memory.
const STACK_BYTES: usize = 8 << 20;
const GUARD_BYTES: usize = 64 << 10;

/// Runs `work` in a process of its own, which shares our memory, and waits for it.
///
/// What asks for the process's number in there gets another one than here.
///
/// # Errors
/// Where the system has no room for a thread, a process or a stack.
///
/// # Panics
/// Where `work` does.
pub(crate) fn in_own_process<R: Send>(work: impl FnOnce() -> R + Send) -> io::Result<R> {
    on_own_thread(|| {
        // The child inherits this. The thread ends behind it, so nothing has to be put back.
        pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
        suspended(work)
    })?
}

fn suspended<R>(work: impl FnOnce() -> R) -> io::Result<R> {
    let stack = Stack::new()?;
    let mut job = Job::new(work);
    let start = entry_of(&job);
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES | libc::CLONE_FS;
    // SAFETY: the stack is this child's alone and is unmapped when it has ended; `start` is for a
    // job of this very type, which nobody touches until then, because this thread, whose borrow
    // and whose thread-local storage the child uses, is suspended: CLONE_VFORK.
    let child = unsafe { libc::clone(start, stack.top(), flags, (&raw mut job).cast()) };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    reap(child);
    let killed = || io::Error::other("the process that does the work was killed");
    job.into_result().ok_or_else(killed)
}

/// Collects the child, which has ended: no signal says so, and only who asks for children of its
/// kind sees it.
fn reap(child: c_int) {
    loop {
        // SAFETY: no status is asked for, so nothing is written.
        let reaped = unsafe { libc::waitpid(child, ptr::null_mut(), libc::__WALL) };
        if reaped >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return;
        }
    }
}

/// The function that runs a job of this type.
fn entry_of<F: FnOnce() -> R, R>(_: &Job<F, R>) -> extern "C" fn(*mut c_void) -> c_int {
    run::<F, R>
}

extern "C" fn run<F: FnOnce() -> R, R>(job: *mut c_void) -> c_int {
    // SAFETY: it is the job that `suspended` lends to this process alone.
    let job = unsafe { &mut *job.cast::<Job<F, R>>() };
    // A session of its own has no terminal, and its process group is not the controller's. A new
    // process leads no group, so this does not fail.
    let apart = nix::unistd::setsid();
    debug_assert!(apart.is_ok(), "a new process leads no group");
    // Handlers are not shared with the controller, which may ignore the signal.
    // SAFETY: the default action runs no code of ours.
    let default = unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) };
    debug_assert!(default.is_ok(), "it is a signal that may be set");
    job.run();
    0
}

/// A stack, and below it a page range that nobody can touch.
struct Stack {
    base: *mut c_void,
}

impl Stack {
    fn new() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_STACK;
        let (len, prot) = (GUARD_BYTES + STACK_BYTES, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a new mapping, wherever there is room, touches no memory that exists.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let stack = Self { base };
        // SAFETY: these bytes are the mapping's own first ones, and nothing is there yet.
        if unsafe { libc::mprotect(base, GUARD_BYTES, libc::PROT_NONE) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(stack)
    }

    /// One past the end: stacks grow down. A multiple of 16, as `clone` wants it.
    fn top(&self) -> *mut c_void {
        self.base.wrapping_byte_add(GUARD_BYTES + STACK_BYTES)
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and the only process that ran on it has ended.
        let unmapped = unsafe { libc::munmap(self.base, GUARD_BYTES + STACK_BYTES) };
        debug_assert_eq!(unmapped, 0, "it was mapped so");
    }
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    #[test]
    fn results_and_panics_come_back() {
        let here = std::process::id();
        let text = String::from("borrowed");
        let (there, written) =
            in_own_process(|| (std::process::id(), text.clone() + " and written")).unwrap();
        assert_ne!(here, there);
        assert_eq!(written, "borrowed and written");
        let panic = catch_unwind(|| in_own_process(|| panic!("on purpose")).unwrap_or(()));
        assert_eq!(panic.unwrap_err().downcast_ref(), Some(&"on purpose"));
    }

    #[test]
    fn files_and_errors_are_shared() {
        let file = in_own_process(|| std::fs::File::open("/proc/self/stat")).unwrap().unwrap();
        assert!(file.metadata().unwrap().is_file());
        let missing = in_own_process(|| std::fs::File::open("/nowhere").map(drop)).unwrap();
        assert_eq!(missing.unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_child_that_is_killed_is_an_error() {
        use nix::sys::signal::kill;
        let killed = in_own_process(|| kill(nix::unistd::getpid(), Signal::SIGKILL));
        assert!(killed.unwrap_err().to_string().contains("was killed"));
    }
}
