//! SIGTRAP's disposition, and SIGTRAPs of the target's own, while our breakpoints are there.
//!
//! # What must not happen
//!
//! The kernel resets the disposition to SIG_DFL when a thread runs into `int3` that blocks or
//! ignores SIGTRAP (see `traps`), and the default kills the process. So, from the first
//! breakpoint until the disposition is back for good, *no thread may be about to act on a
//! SIGTRAP of its own*. A thread acts on it not when we ask for it but when it next gets a
//! CPU, on a busy machine many milliseconds later, and what counts is the disposition then.
//!
//! 1. *Ignored*: such a SIGTRAP is dropped by us, never passed on to be dropped by the kernel.
//!    That also holds before a window, since one may open before the thread has its turn.
//! 2. *With a handler*: the thread is held at its stop until the window has closed. One that
//!    was passed on before the window, by us or by another tracer, is waited for when it opens.
//! 3. *SIG_DFL to begin with*: it kills, as it does without us.
//!
//! # Putting it back
//!
//! A handler is put back by the trapped thread itself, before it goes on. SIG_IGN is not:
//! setting it discards every pending SIGTRAP of the process (POSIX), among them perhaps traps
//! on their way to us, whose threads would go on behind the breakpoint. So it is put back when
//! `drain` has shown that there are none, and until then SIG_DFL can be seen by whoever asks.
//! Children born meanwhile would keep it, across exec as well: theirs is put back at birth.

use flea_symbols::addr::RemoteAddr;

use crate::proc::{self, Pid, Status, Tid, Whereabouts};
use crate::ptrace;
use crate::remote::RemoteError;
use crate::tracer::{TraceError, Tracer};
use crate::window::Parked;
use crate::x86_64::Registers;

/// Bytes of the kernel's signal set.
const SIGSET_BYTES: u64 = 8;

/// SIGTRAP's disposition where it is not the default one, kept in a page of the target so that
/// a trapped thread can put it back by itself.
#[derive(Debug, Default)]
pub(crate) struct SigtrapAction {
    /// The page; its first bytes are the `struct sigaction`.
    saved_at: Option<RemoteAddr>,
    /// It is SIG_IGN.
    is_ignored: bool,
}

impl Tracer {
    /// Notes the disposition before the first breakpoint.
    pub(crate) fn keep_sigtrap_action(&mut self) -> Result<(), TraceError> {
        if self.sigtrap.saved_at.is_some() {
            // The last window could not put it back: what is there now is not the target's.
            return Ok(());
        }
        let Some(status) = self.own_status() else {
            return self.check_alive();
        };
        self.sigtrap.is_ignored = status.ignored.contains(libc::SIGTRAP);
        if has_default(&status) {
            return Ok(());
        }
        let kept = self.with_own_thread(|thread| {
            let page = thread.map_anonymous(4096)?;
            let signal = libc::SIGTRAP.cast_unsigned().into();
            let args = [signal, 0, page.0, SIGSET_BYTES, 0, 0];
            thread.syscall(libc::SYS_rt_sigaction, args)?;
            Ok(page)
        });
        match kept {
            Ok(page) => self.sigtrap.saved_at = Some(page),
            Err(RemoteError::Trace(error)) => return Err(error),
            Err(RemoteError::NoThread { pid }) => return Err(TraceError::NoThread { pid }),
            // Nothing can be run in it (seccomp). Threads that block SIGTRAP and run into a
            // breakpoint will leave the disposition at its default.
            Err(_) => {}
        }
        Ok(())
    }

    /// Waits until each thread that was let go with a SIGTRAP has acted on it: one that is
    /// interrupted does so first. A thread that sleeps has; it wakes to act on a signal.
    pub(crate) fn finish_sigtraps(&mut self) -> Result<(), TraceError> {
        if self.sigtrap.saved_at.is_none() {
            return Ok(());
        }
        for tid in self.threads() {
            if self.tasks.get(&tid).is_some_and(|task| task.given_sigtrap)
                && self.whereabouts(tid) == Whereabouts::Running
                && let Some(stop) = self.halt_unless_asleep(tid)?
            {
                self.unhalt(tid, stop)?;
            }
            if let Some(task) = self.tasks.get_mut(&tid) {
                task.given_sigtrap = false;
            }
        }
        Ok(())
    }

    /// Whether a SIGTRAP of the target's own has no effect.
    pub(crate) fn sigtrap_is_ignored(&self) -> bool {
        self.sigtrap.is_ignored
    }

    /// Holds a thread at its stop for a SIGTRAP of its own until the window closes, if there is
    /// one and the signal has a handler. Whether it is held.
    pub(crate) fn hold_sigtrap(&mut self, tid: Tid) -> bool {
        if self.traps.is_empty() || self.sigtrap.saved_at.is_none() {
            return false;
        }
        let Some(task) = self.tasks.get_mut(&tid).filter(|task| !task.foreign) else {
            return false;
        };
        task.parked = Some(Parked { requeue: true, has_own: true, ..Parked::now() });
        true
    }

    /// Puts the handler back if the kernel has reset it, by a system call in the stopped
    /// thread, which is left with `regs` and its mask. Whether it has made one.
    pub(crate) fn restore_sigtrap(
        &mut self,
        tid: Tid,
        regs: &Registers,
    ) -> Result<bool, TraceError> {
        // A vfork child has a disposition of its own, which its exec resets.
        let foreign = self.tasks.get(&tid).is_some_and(|task| task.foreign);
        let Some(page) = self.sigtrap.saved_at.filter(|_| !foreign) else {
            return Ok(false);
        };
        if self.sigtrap.is_ignored || !self.own_status().is_some_and(|now| has_default(&now)) {
            return Ok(false);
        }
        self.counts.dispositions_restored += 1;
        self.syscall_in_stopped(tid, regs, libc::SYS_rt_sigaction, set_sigtrap_args(page))?;
        Ok(true)
    }

    /// A child that was forked while the disposition was reset, stopped before its first
    /// instruction, gets the one that its parent had. No trap of its own can be on its way.
    pub(crate) fn restore_sigtrap_at_birth(&mut self, child: Pid) -> Result<(), TraceError> {
        let Some(page) = self.sigtrap.saved_at else {
            return Ok(());
        };
        if !proc::status(child).is_ok_and(|now| has_default(&now))
            || self.find_syscall_insn().is_err()
        {
            return Ok(());
        }
        let regs = ptrace::registers(child);
        let Some(regs) = self.still_there(child, "reading registers", regs)? else {
            return Ok(());
        };
        self.counts.dispositions_restored += 1;
        let args = set_sigtrap_args(page);
        self.syscall_in_stopped(child, &regs, libc::SYS_rt_sigaction, args).map(drop)
    }

    /// Puts SIG_IGN back. To be called when no trap can be on its way, and before the window is
    /// forgotten: children born before it are put right by what is kept.
    pub(crate) fn put_back_ignored(&mut self) -> Result<(), TraceError> {
        let reset = self.sigtrap.is_ignored && self.own_status().is_some_and(|s| has_default(&s));
        let Some(page) = self.sigtrap.saved_at.filter(|_| reset) else {
            return Ok(());
        };
        let args = set_sigtrap_args(page);
        match self.with_own_thread(|thread| thread.syscall(libc::SYS_rt_sigaction, args)) {
            Ok(_) => self.counts.dispositions_restored += 1,
            Err(RemoteError::Trace(error)) => return Err(error),
            // Tried again when the next window closes, and when we leave.
            Err(_) => {}
        }
        // A fork under way has copied the disposition perhaps before it was put back: each is
        // waited for, so that its child is put right while we still know how.
        self.drain()
    }

    /// Forgets what was kept, unless it is still needed.
    pub(crate) fn drop_sigtrap_action(&mut self) -> Result<(), TraceError> {
        let Some(page) = self.sigtrap.saved_at else {
            self.sigtrap = SigtrapAction::default();
            return Ok(());
        };
        if self.sigtrap.is_ignored && self.own_status().is_some_and(|now| has_default(&now)) {
            return Ok(());
        }
        self.sigtrap = SigtrapAction::default();
        match self.remote_syscall(libc::SYS_munmap, [page.0, 4096, 0, 0, 0, 0]) {
            Err(RemoteError::Trace(error)) => Err(error),
            // A page that cannot be given back is a page lost, no more.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// The status of some thread of the process itself.
    fn own_status(&self) -> Option<Status> {
        let own = self.tasks.iter().filter(|(_, task)| !task.foreign);
        own.map(|(&tid, _)| tid).find_map(|tid| proc::thread_status(self.pid, tid).ok())
    }
}

fn has_default(status: &Status) -> bool {
    !status.caught.contains(libc::SIGTRAP) && !status.ignored.contains(libc::SIGTRAP)
}

/// Arguments of rt_sigaction that set SIGTRAP's disposition from the page.
fn set_sigtrap_args(page: RemoteAddr) -> [u64; 6] {
    [libc::SIGTRAP.cast_unsigned().into(), page.0, 0, SIGSET_BYTES, 0, 0]
}
