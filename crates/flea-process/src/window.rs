//! The time during which breakpoints of ours are in the target's text.
//!
//! # The window
//!
//! Protected: every thread of the target, and every child it forks meanwhile. By: the tracer
//! answers each breakpoint, and nothing is let go of before the last one is gone.
//!
//! 1. [`Tracer::arm`] notes masks and SIGTRAP's disposition, *before* the first `int3` is
//!    written, so that a trap can be undone without a trace (see `traps`).
//! 2. [`Tracer::write_text`] writes; [`Tracer::sync_core`] makes every CPU that runs the
//!    target refetch its instructions before it returns.
//! 3. [`Tracer::drain`], after the last `int3` has been overwritten and synced, waits until no
//!    trap can be on its way to us.
//! 4. [`Tracer::disarm`] forgets the breakpoints.
//!
//! # Why `drain` is enough
//!
//! After the last write and sync no thread can *begin* to execute one of our `int3`s. A thread
//! that executed one before is, from the exception until it stops for us, continuously in the
//! kernel without sleeping (do_int3 -> force_sig -> exit to user -> get_signal -> ptrace_stop);
//! `/proc/.../syscall` says "running" of it, or, under PREEMPT_RT where the signal lock may
//! sleep, gives an instruction pointer right behind the breakpoint. Once it has stopped, the
//! pump finds the stop. So: every thread that is running or stands behind a breakpoint is
//! interrupted once. PTRACE_INTERRUPT is answered by get_signal(), which such a thread has yet
//! to pass; it stops there either for the SIGTRAP, or for the interrupt with the SIGTRAP
//! still pending, which `halt_past_trap` sees in its pending mask and waits for. A thread
//! asleep elsewhere executed its last `int3` before it fell asleep, and that one was answered.
//!
//! # Children forked in the window
//!
//! fork copies the text at an instant we do not see, perhaps with breakpoints, and the copy is
//! private: nothing we write to the parent reaches it. PTRACE_O_TRACEFORK stops the child
//! before its first instruction. It is held until the window closes and then gets the bytes
//! that the parent has. `drain` also interrupts threads that sleep inside fork itself: such a
//! thread stops only when the child exists and is known to us.

use std::time::{Duration, Instant};

use flea_symbols::addr::RemoteAddr;

use crate::memory::Memory;
use crate::proc::{self, Pid, Tid, Whereabouts};
use crate::ptrace::{self, Stop};
use crate::remote::RemoteError;
use crate::tracer::{Pace, TraceError, Tracer};
use crate::traps::{Trap, was_blocked};
use crate::x86_64::is_fork;

/// `si_code` of a signal that the kernel itself raised.
const SI_KERNEL: i32 = 0x80;
/// Threads on a CPU stop within microseconds; this is for a machine that is overloaded.
const HALT_PATIENCE: Duration = Duration::from_secs(5);
/// For a thread in vfork, which does not stop before its child has gone its own way.
const VFORK_PATIENCE: Duration = Duration::from_millis(50);
/// Writes between two looks at stopped threads.
const WRITES_PER_PUMP: usize = 16;
const MEMBARRIER_SYNC_CORE: u64 = 32;
const MEMBARRIER_REGISTER_SYNC_CORE: u64 = 64;
/// Bytes of the kernel's signal set.
const SIGSET_BYTES: u64 = 8;

/// SIGTRAP's disposition where it is not the default one, kept in a page of the target so that
/// a trapped thread can put it back by itself.
#[derive(Debug, Default)]
pub(crate) struct SigtrapAction {
    /// The page; its first bytes are the `struct sigaction`.
    saved_at: Option<RemoteAddr>,
    /// It is a handler, not SIG_IGN.
    is_handler: bool,
}

/// How CPUs are made to refetch instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum SyncMethod {
    /// Not tried yet.
    #[default]
    Unknown,
    /// membarrier(2), run in one thread of the target.
    Membarrier,
    /// Each running thread is interrupted once: its return to user code is an `iret`, which
    /// serialises. For kernels before 4.16 and targets whose seccomp filter forbids.
    Interrupts,
}

impl Tracer {
    /// Opens the window, or widens it: from now on a thread that runs into `int3` at one of
    /// these sites goes on at its `goes_to`. To be called before the first one is written.
    pub fn arm(&mut self, traps: &[Trap]) -> Result<(), TraceError> {
        self.pump()?;
        if self.traps.is_empty() {
            self.note_masks();
            self.keep_sigtrap_action()?;
        }
        self.traps.add(traps);
        Ok(())
    }

    /// Closes the window. To be called after [`Tracer::drain`].
    pub fn disarm(&mut self) -> Result<(), TraceError> {
        self.traps.clear();
        self.release_held()?;
        self.text_log.clear();
        let Some(page) = std::mem::take(&mut self.sigtrap).saved_at else { return Ok(()) };
        match self.remote_syscall(libc::SYS_munmap, [page.0, 4096, 0, 0, 0, 0]) {
            Err(RemoteError::Trace(error)) => Err(error),
            // A page that cannot be given back is a page lost, no more.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Writes to the target's text, and answers stops now and then: a batch of ten thousand
    /// sites must not keep the threads waiting that run into the first of them.
    pub fn write_text(&mut self, at: RemoteAddr, bytes: &[u8]) -> Result<(), TraceError> {
        self.check_alive()?;
        self.memory.write(at, bytes)?;
        let logged = self.text_log.entry(at).or_default();
        *logged = bytes.len().max(*logged);
        self.writes += 1;
        if self.writes.is_multiple_of(WRITES_PER_PUMP) { self.pump() } else { Ok(()) }
    }

    /// Returns once every CPU that runs the target has refetched its instructions.
    pub fn sync_core(&mut self) -> Result<(), TraceError> {
        self.pump()?;
        let done = match self.sync {
            SyncMethod::Unknown => self.with_thread(|thread| {
                let register = MEMBARRIER_REGISTER_SYNC_CORE;
                thread.syscall(libc::SYS_membarrier, [register, 0, 0, 0, 0, 0])?;
                thread.syscall(libc::SYS_membarrier, [MEMBARRIER_SYNC_CORE, 0, 0, 0, 0, 0])
            }),
            SyncMethod::Membarrier => {
                self.remote_syscall(libc::SYS_membarrier, [MEMBARRIER_SYNC_CORE, 0, 0, 0, 0, 0])
            }
            SyncMethod::Interrupts => return self.sync_by_interrupts(),
        };
        match done {
            Ok(_) => self.sync = SyncMethod::Membarrier,
            Err(RemoteError::Trace(
                error @ (TraceError::Gone { .. } | TraceError::Execed { .. }),
            )) => {
                return Err(error);
            }
            Err(RemoteError::NoThread { .. }) => self.sync_by_interrupts()?,
            Err(_) => {
                self.sync = SyncMethod::Interrupts;
                self.sync_by_interrupts()?;
            }
        }
        self.pump()
    }

    /// Waits until no thread can still be on its way into one of our breakpoints, which must
    /// all have been overwritten and synced; then lets go of children forked meanwhile. The
    /// reasoning is at the top of this file.
    pub fn drain(&mut self) -> Result<(), TraceError> {
        self.pump()?;
        for tid in self.threads() {
            self.drain_thread(tid)?;
        }
        self.pump()?;
        let until = Instant::now() + HALT_PATIENCE;
        let mut pace = Pace::default();
        while !self.expected.is_empty() && Instant::now() < until {
            pace.rest();
            self.pump()?;
            self.reap_ended();
        }
        self.release_held()
    }

    fn drain_thread(&mut self, tid: Tid) -> Result<(), TraceError> {
        let patience = match self.whereabouts(tid) {
            Whereabouts::Running => HALT_PATIENCE,
            Whereabouts::Syscall { number, .. } if is_fork(number) => VFORK_PATIENCE,
            Whereabouts::Elsewhere { pc, .. } if self.traps.target_behind(pc).is_some() => {
                HALT_PATIENCE
            }
            _ => return Ok(()),
        };
        match self.halt_past_trap(tid, patience) {
            Ok(Some(stop)) => self.unhalt(tid, stop),
            Ok(None) => Ok(()),
            // Asleep by now, or in vfork: then it is in no exception of ours.
            Err(TraceError::Stuck { .. }) if self.whereabouts(tid) != Whereabouts::Running => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// As [`Tracer::halt`], but never returns with a trap of ours still pending.
    pub(crate) fn halt_past_trap(
        &mut self,
        tid: Tid,
        wait: Duration,
    ) -> Result<Option<Stop>, TraceError> {
        // Each round answers one trap. The bound is for a thread that runs into one site for
        // ever, which only a wrong `goes_to` could make it do.
        for _ in 0..1000 {
            let Some(stop) = self.halt(tid, wait)? else { return Ok(None) };
            let Some(regs) = self.still_there(tid, "reading registers", ptrace::registers(tid))?
            else {
                return Ok(None);
            };
            let pending = self.traps.target_behind(regs.pc()).is_some()
                && proc::thread_status(self.pid, tid)
                    .is_ok_and(|status| status.deliverable().contains(libc::SIGTRAP));
            if !pending {
                return Ok(Some(stop));
            }
            self.unhalt(tid, stop)?;
        }
        Err(TraceError::Stuck { tid, waited_ms: 0 })
    }

    pub(crate) fn whereabouts(&self, tid: Tid) -> Whereabouts {
        let foreign = self.tasks.get(&tid).is_some_and(|task| task.foreign);
        proc::whereabouts(if foreign { tid } else { self.pid }, tid)
    }

    fn sync_by_interrupts(&mut self) -> Result<(), TraceError> {
        for tid in self.threads() {
            if self.whereabouts(tid) != Whereabouts::Running {
                continue;
            }
            match self.halt(tid, HALT_PATIENCE) {
                Ok(Some(stop)) => self.unhalt(tid, stop)?,
                Ok(None) => {}
                // Asleep since: it has been through the scheduler.
                Err(TraceError::Stuck { .. }) if self.whereabouts(tid) != Whereabouts::Running => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn note_masks(&mut self) {
        let pid = self.pid;
        for (&tid, task) in &mut self.tasks {
            let process = if task.foreign { tid } else { pid };
            if let Ok(status) = proc::thread_status(process, tid) {
                task.mask = status.blocked;
            }
        }
    }

    fn keep_sigtrap_action(&mut self) -> Result<(), TraceError> {
        let Some(&any) = self.tasks.keys().next() else { return self.check_alive() };
        let status = proc::thread_status(self.pid, any)?;
        self.sigtrap.is_handler = status.caught.contains(libc::SIGTRAP);
        if !self.sigtrap.is_handler && !status.ignored.contains(libc::SIGTRAP) {
            return Ok(());
        }
        let kept = self.with_thread(|thread| {
            let page = thread.map_anonymous(4096)?;
            let signal = libc::SIGTRAP.cast_unsigned().into();
            let args = [signal, 0, page.0, SIGSET_BYTES, 0, 0];
            thread.syscall(libc::SYS_rt_sigaction, args)?;
            Ok(page)
        });
        match kept {
            Ok(page) => self.sigtrap.saved_at = Some(page),
            Err(RemoteError::Trace(error)) => return Err(error),
            // Nothing can be run in it (seccomp). Threads that block SIGTRAP and run into a
            // breakpoint will leave the disposition at its default.
            Err(_) => {}
        }
        Ok(())
    }

    /// Answers a SIGTRAP stop, if it is for one of our breakpoints.
    pub(crate) fn answer_trap(&mut self, tid: Tid) -> Result<bool, TraceError> {
        let Some(regs) = self.still_there(tid, "reading registers", ptrace::registers(tid))? else {
            return Ok(true);
        };
        let Some(goes_to) = self.traps.target_behind(regs.pc()) else {
            // Somebody's own SIGTRAP. A trap of ours in another thread may just have reset
            // its handler: put it back first.
            return self.restore_sigtrap(tid, &regs).map(|()| false);
        };
        let code = self.still_there(tid, "reading a signal", ptrace::signal_code(tid))?;
        let now = self.still_there(tid, "reading the mask", ptrace::signal_mask(tid))?;
        let (Some(code), Some(now)) = (code, now) else { return Ok(true) };
        let noted = self.tasks.get(&tid).map_or(now, |task| task.mask);
        let blocked = was_blocked(noted, now) && !self.has_kept_its_handler(tid);
        let swallowed_another = code != SI_KERNEL;
        if swallowed_another && !blocked {
            return Ok(false);
        }
        let mask = if blocked { now.with(libc::SIGTRAP) } else { now };
        let onward = regs.with_pc(goes_to);
        self.counts.traps += 1;
        self.counts.traps_blocked += u64::from(blocked);
        if let Some(task) = self.tasks.get_mut(&tid) {
            task.mask = mask;
        }
        self.still_there(tid, "setting registers", ptrace::set_registers(tid, &onward))?;
        self.restore_sigtrap(tid, &onward)?;
        if blocked {
            self.still_there(tid, "setting the mask", ptrace::set_signal_mask(tid, mask))?;
        }
        // Blocked again by now, a swallowed signal goes back to the queue (ptrace_signal).
        self.resume(tid, if swallowed_another { libc::SIGTRAP } else { 0 })?;
        Ok(true)
    }

    /// A handler that is still there proves that SIGTRAP was not blocked.
    fn has_kept_its_handler(&self, tid: Tid) -> bool {
        self.sigtrap.is_handler
            && proc::thread_status(self.pid, tid)
                .is_ok_and(|status| status.caught.contains(libc::SIGTRAP))
    }

    /// Puts SIGTRAP's disposition back if the kernel has reset it, by a system call in the
    /// stopped thread, which is left with `regs` and its mask.
    fn restore_sigtrap(
        &mut self,
        tid: Tid,
        regs: &crate::x86_64::Registers,
    ) -> Result<(), TraceError> {
        let Some(page) = self.sigtrap.saved_at else { return Ok(()) };
        let Ok(status) = proc::thread_status(self.pid, tid) else { return Ok(()) };
        if status.caught.contains(libc::SIGTRAP) || status.ignored.contains(libc::SIGTRAP) {
            return Ok(());
        }
        self.counts.dispositions_restored += 1;
        let signal = libc::SIGTRAP.cast_unsigned().into();
        let args = [signal, page.0, 0, SIGSET_BYTES, 0, 0];
        self.syscall_in_stopped(tid, regs, libc::SYS_rt_sigaction, args).map(drop)
    }

    /// Gives a forked child the text that its parent has now.
    pub(crate) fn mirror_text(&self, child: Pid) {
        let Ok(copy) = Memory::open(child) else { return };
        for (&at, &size_bytes) in &self.text_log {
            // A range that either of them has not mapped (any more) is executed by neither.
            if let Ok(bytes) = self.memory.read_vec(at, size_bytes) {
                drop(copy.write(at, &bytes));
            }
        }
    }

    fn release_held(&mut self) -> Result<(), TraceError> {
        for child in std::mem::take(&mut self.held) {
            self.mirror_text(child);
            let detached = ptrace::detach(child, 0);
            self.still_there(child, "letting go of a child", detached)?;
        }
        Ok(())
    }
}
