//! Following a process into its children and into the programs they execute.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use flea_process::{Follower, Pid};

pub use flea_process::Followed;

use crate::{
    error::{AttachError, SessionError},
    modules::Module,
    session::{Session, Start, lock},
    transaction,
};

/// A process that is followed, with all processes that come of it. They are traced (ptrace) for as
/// long as this exists: no debugger can join them. Dropping it lets go of them; what is attached
/// stays.
///
/// - A forked child has what is attached to its parent, and the same maps: nothing is to be done
///   for it, but [`Following::leave`] in the end.
/// - A process that executes a program loses all that; it waits until it is released, so that the
///   new program can be attached to before it runs.
///
/// ```
/// use flea::{Followed, Session, builtin::Count};
/// use std::{process::Command, time::Duration};
///
/// let mut command = Command::new("sh");
/// let session = Session::spawn({ command.args(["-c", "exec true"]); command })?;
/// let following = session.follow()?;
/// session.resume()?;
/// let Some(Followed::Executed { pid, .. }) = following.next_within(Duration::from_secs(60)) else {
///     panic!("it executes `true`")
/// };
/// let executed = following.session(pid)?;
/// let mut count = Count::start(&executed, &executed.find("libc.so.6:exit")?)?;
/// following.release(pid);
/// session.wait()?;
/// count.detach()?;
/// assert_eq!(count.read(), [1]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Following {
    follower: Follower,
    /// Modules of programs seen: the files are mostly the same.
    known: Mutex<Vec<Arc<Module>>>,
}

/// Files whose symbols are kept for the programs that come.
const MAX_KNOWN: usize = 64;

impl Session {
    /// Begins to follow the process. Children that it has already are not followed.
    ///
    /// # Errors
    /// It is traced by somebody else, or may not be traced.
    pub fn follow(&self) -> Result<Following, SessionError> {
        let follower = Follower::start(self.pid())?;
        Ok(Following { follower, known: Mutex::new(self.modules()) })
    }
}

impl Following {
    /// The next thing that happens, waited for.
    #[must_use]
    pub fn next_within(&self, wait: Duration) -> Option<Followed> {
        self.follower.next_within(wait)
    }

    /// Whether all have ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.follower.is_over()
    }

    /// Those that run.
    #[must_use]
    pub fn processes(&self) -> Vec<Pid> {
        self.follower.held()
    }

    /// A session with a process that has executed a program: it goes on to where its libraries have
    /// been loaded and none of its own code has run, and waits there until it is released.
    ///
    /// # Errors
    /// It has ended, or is one that cannot be traced (a 32-bit program).
    pub fn session(&self, pid: Pid) -> Result<Session, SessionError> {
        flea_process::check_traceable(pid)?;
        let start = Start::of(pid)?;
        self.follower.run_until(pid, start.address(), start.is_ready())?;
        let mut known = lock(&self.known);
        let session = Session::of_executed(pid, &known)?;
        for module in session.modules() {
            if known.len() < MAX_KNOWN && !known.iter().any(|k| k.is_same_file(&module)) {
                known.push(module);
            }
        }
        Ok(session)
    }

    /// Lets a process run that has executed a program.
    pub fn release(&self, pid: Pid) {
        self.follower.release(pid);
    }

    /// Takes off whatever this program has attached in a process, also what a forked one has from
    /// its parent. One that has ended is no error.
    ///
    /// # Errors
    /// A site was changed by another tool.
    pub fn leave(&self, pid: Pid) -> Result<(), AttachError> {
        match transaction::leave(pid) {
            Err(_) if flea_process::check_traceable(pid).is_err() => Ok(()),
            outcome => outcome,
        }
    }
}
