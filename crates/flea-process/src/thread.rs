//! A thread for one piece of work, by glibc alone.
//!
//! A new thread of `std::thread` takes a lock of the standard library's. The work may be done
//! in a forked copy of a process (`flea`, of this very process), and what locks other threads
//! held at that moment is held in the copy for ever. Of its own locks glibc takes care at a
//! fork, so a thread that it starts is safe there.

use std::ffi::{c_int, c_void};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;

/// What whoever does the work finds and leaves.
pub(crate) struct Job<F, R> {
    work: Option<F>,
    outcome: Option<std::thread::Result<R>>,
}

impl<F: FnOnce() -> R, R> Job<F, R> {
    pub(crate) fn new(work: F) -> Self {
        Self { work: Some(work), outcome: None }
    }

    /// Does the work, once.
    pub(crate) fn run(&mut self) {
        self.outcome = self.work.take().map(|work| catch_unwind(AssertUnwindSafe(work)));
    }

    /// What came of it; `None` where it was not run to its end.
    ///
    /// # Panics
    /// Where the work did.
    pub(crate) fn into_result(self) -> Option<R> {
        self.outcome.map(|outcome| outcome.unwrap_or_else(|panic| resume_unwind(panic)))
    }
}

/// Runs `work` on a thread of its own and waits for it.
///
/// # Panics
/// Where `work` does.
pub(crate) fn on_own_thread<R: Send>(work: impl FnOnce() -> R + Send) -> io::Result<R> {
    let mut job = Job::new(work);
    let start = entry_of(&job);
    let mut thread = 0;
    // SAFETY: `start` is for a job of this very type, which lives until the thread has been
    // joined below and is not touched here before; the closure and its result may be sent.
    let error =
        unsafe { libc::pthread_create(&raw mut thread, ptr::null(), start, (&raw mut job).cast()) };
    check(error)?;
    // SAFETY: the thread was started above, is not detached, and nobody else joins it.
    let error = unsafe { libc::pthread_join(thread, ptr::null_mut()) };
    assert_eq!(error, 0, "a thread of ours can be joined once");
    Ok(job.into_result().expect("the thread has run to its end"))
}

fn check(error: c_int) -> io::Result<()> {
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

/// The function that runs a job of this type.
fn entry_of<F: FnOnce() -> R, R>(_: &Job<F, R>) -> extern "C" fn(*mut c_void) -> *mut c_void {
    run::<F, R>
}

extern "C" fn run<F: FnOnce() -> R, R>(job: *mut c_void) -> *mut c_void {
    // SAFETY: it is the job that `on_own_thread` lends to this thread alone.
    let job = unsafe { &mut *job.cast::<Job<F, R>>() };
    job.run();
    ptr::null_mut()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_and_panics_come_back() {
        let here = nix::unistd::gettid();
        let text = String::from("borrowed");
        let (there, length) = on_own_thread(|| (nix::unistd::gettid(), text.len())).unwrap();
        assert_ne!(here, there);
        assert_eq!(length, 8);
        let panic = catch_unwind(|| on_own_thread(|| panic!("on purpose")).unwrap_or(()));
        assert_eq!(panic.unwrap_err().downcast_ref(), Some(&"on purpose"));
    }
}
