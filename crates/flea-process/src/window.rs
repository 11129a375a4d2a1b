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
//! # Parking
//!
//! A hot thread that is resumed from a breakpoint runs into the next one microseconds later.
//! Answering that takes longer than the thread gets on with, and with a few such threads the
//! tracer does nothing else: measured with 8 threads on 2 busy CPUs, 800 traps and 270 ms for a
//! commit. So a thread that has trapped is *parked*: put to where it goes on, but resumed only
//! when [`Tracer::release`] says that no breakpoint is left in the text, or after
//! [`PARKED_AT_MOST`]. Who changes many sites does so in batches that take not much longer than
//! that ([`Tracer::sites_at_once`]): then a thread waits once per batch that it runs into. A parked
//! thread is the first to be borrowed for system calls: it is stopped already. At a *gate*
//! ([`Trap::is_gate`]) a thread is not to pass while the breakpoint is there: it stays parked until
//! `open_gate`, for as long as that takes.
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

use crate::hub::How;
use crate::memory::Memory;
use crate::proc::{self, Pid, Tid, Whereabouts};
use crate::ptrace::{self, Stop, Whose};
use crate::tracer::{Task, TraceError, Tracer};
use crate::traps::{Trap, was_blocked};
use crate::x86_64::{Registers, is_fork, never_falls_behind_itself};

/// `si_code` of a signal that the kernel itself raised.
const SI_KERNEL: i32 = 0x80;
/// Threads on a CPU stop within microseconds; this is for a machine that is overloaded.
const HALT_PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait before looking whether the thread has fallen asleep.
const HALT_ROUND: Duration = Duration::from_millis(50);
/// Longest pause of a thread at a breakpoint (as far as the machine is not busy otherwise).
pub(crate) const PARKED_AT_MOST: Duration = Duration::from_micros(300);
/// A thread that waits for the window to close.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parked {
    pub(crate) since: Instant,
    /// A SIGTRAP of its own, which it stopped for, is still to be delivered: one that it blocks
    /// and that was swallowed by ours, or one that is held (`has_own`).
    pub(crate) requeue: bool,
    /// It has made a system call for us: it is not at its signal's stop any more.
    pub(crate) has_left_its_stop: bool,
    /// Held for a SIGTRAP of its own, until the window has closed: see `sigtrap`.
    pub(crate) has_own: bool,
    /// Kept where it stands until it is let go of, whatever becomes of windows: see `follow`.
    pub(crate) is_kept: bool,
    /// It stands at a gate: see [`Trap::is_gate`].
    pub(crate) at_gate: bool,
}

impl Parked {
    /// From now on, for no reason in particular.
    pub(crate) fn now() -> Self {
        Self {
            since: Instant::now(),
            requeue: false,
            has_left_its_stop: false,
            has_own: false,
            is_kept: false,
            at_gate: false,
        }
    }
}

impl Tracer {
    /// Opens the window, or widens it: from now on a thread that runs into `int3` at one of
    /// these sites goes on at its `goes_to`. To be called before the first one is written.
    pub fn arm(&mut self, traps: &[Trap]) -> Result<(), TraceError> {
        self.pump()?;
        self.batch.begin(traps.len());
        let opens = self.traps.is_empty() && !traps.is_empty();
        if opens {
            self.prepare_sync()?;
            self.note_masks();
            self.keep_sigtrap_action()?;
            self.urgency.press();
        }
        // From here on SIGTRAPs are held, so that those let go before are the last ones.
        self.traps.add(traps);
        self.is_gate_shut |= traps.iter().any(Trap::is_gate);
        self.tasks.values_mut().for_each(|task| task.seen_outside = false);
        if let Err(error) = self.finish_sigtraps() {
            if opens {
                self.disarm()?;
            }
            return Err(error);
        }
        Ok(())
    }

    /// Lets threads go on that wait at a gate, or because of one. To be called when its breakpoint
    /// has been overwritten and synced.
    pub fn open_gate(&mut self) -> Result<(), TraceError> {
        self.is_gate_shut = false;
        self.release()
    }

    /// Whether a thread of the target waits at a gate. It does so until [`Tracer::open_gate`].
    #[must_use]
    pub fn is_gate_taken(&self) -> bool {
        let at_gate = |task: &Task| !task.foreign && task.parked.is_some_and(|p| p.at_gate);
        self.tasks.values().any(at_gate)
    }

    /// How many sites to change next, so that threads wait no longer than they must.
    #[must_use]
    pub fn sites_at_once(&self) -> usize {
        self.batch.size()
    }

    /// Lets threads go on that wait, though the window stays open. To be called when all
    /// breakpoints but a gate's have been overwritten and synced, before others are written.
    pub fn release(&mut self) -> Result<(), TraceError> {
        self.batch.end();
        self.pump()?;
        if self.is_gate_shut {
            // Whoever runs into the gate resets the disposition.
            return self.unpark_where(|parked| !parked.has_own && !parked.at_gate);
        }
        self.unpark_all()?;
        let holds_own = |task: &Task| task.parked.is_some_and(|parked| parked.has_own);
        if !self.tasks.values().any(holds_own) {
            return Ok(());
        }
        // They may act on their SIGTRAPs as soon as no trap of ours resets the disposition, and
        // have to have done so before there can be another.
        self.finish_traps()?;
        self.unpark_where(|_| true)?;
        self.finish_sigtraps()
    }

    /// Closes the window. To be called after [`Tracer::drain`].
    pub fn disarm(&mut self) -> Result<(), TraceError> {
        self.is_gate_shut = false;
        self.unpark_all()?;
        self.put_back_ignored()?;
        if !self.traps.is_empty() {
            self.urgency.ease();
        }
        self.traps.clear();
        self.release_held()?;
        self.text_log.clear();
        self.drop_sigtrap_action()?;
        // With the disposition back for good, those that were held as well.
        self.unpark_all()
    }

    /// Writes to the target's text, and answers stops now and then: a batch of sites must not
    /// keep the threads waiting that run into the first of them.
    pub fn write_text(&mut self, at: RemoteAddr, bytes: &[u8]) -> Result<(), TraceError> {
        self.check_alive()?;
        let began = Instant::now();
        self.text_log.note(&self.memory, at, bytes.len())?;
        self.memory.write(at, bytes)?;
        self.batch.note_writing(began.elapsed());
        self.pump_when_due()
    }

    /// Waits until no thread can still be on its way into one of our breakpoints, which must
    /// all have been overwritten and synced; then lets go of children forked meanwhile. The
    /// reasoning is at the top of this file.
    pub fn drain(&mut self) -> Result<(), TraceError> {
        self.finish_traps()?;
        self.pump()?;
        self.unpark_all()?;
        let until = Instant::now() + HALT_PATIENCE;
        let mut pace = self.pace();
        while !self.expected.is_empty() && Instant::now() < until {
            pace.rest();
            self.pump()?;
            self.reap_ended();
        }
        self.release_held()
    }

    fn finish_traps(&mut self) -> Result<(), TraceError> {
        self.pump()?;
        self.unpark_all()?;
        self.threads().into_iter().try_for_each(|tid| self.drain_thread(tid))
    }

    fn drain_thread(&mut self, tid: Tid) -> Result<(), TraceError> {
        let must_stop = match self.whereabouts(tid) {
            Whereabouts::Running => true,
            // In vfork it waits for a child that exists, and so is known or announced.
            Whereabouts::Syscall { number, first_arg, .. } => {
                is_fork(number) && !self.is_vfork(number, first_arg)
            }
            Whereabouts::Elsewhere { pc, .. } => self.traps.target_behind(pc).is_some(),
            Whereabouts::Gone => false,
        };
        match if must_stop { self.halt_unless_asleep(tid)? } else { None } {
            Some(stop) => self.unhalt(tid, stop),
            None => Ok(()),
        }
    }

    fn is_vfork(&self, number: u64, first_arg: u64) -> bool {
        let flags = match i64::try_from(number) {
            Ok(libc::SYS_vfork) => return true,
            Ok(libc::SYS_clone) => first_arg,
            Ok(libc::SYS_clone3) => self.memory.read_u64(RemoteAddr(first_arg)).unwrap_or(0),
            _ => 0,
        };
        flags & u64::from(libc::CLONE_VFORK.cast_unsigned()) != 0
    }

    /// Stops a thread, as [`Tracer::halt_past_trap`]. `None` where it has ended, or is asleep
    /// where it cannot be interrupted; then the interrupt waits for it. A thread that is
    /// *running* and just not given a CPU is waited for, on a busy machine for long.
    pub(crate) fn halt_unless_asleep(&mut self, tid: Tid) -> Result<Option<Stop>, TraceError> {
        let since = Instant::now();
        loop {
            let error = match self.halt_past_trap(tid, HALT_ROUND) {
                Err(error @ TraceError::Stuck { .. }) => error,
                other => return other,
            };
            let may_stop = match self.whereabouts(tid) {
                Whereabouts::Running => true,
                Whereabouts::Syscall { number, first_arg, .. } => {
                    is_fork(number) && !self.is_vfork(number, first_arg)
                }
                Whereabouts::Elsewhere { .. } | Whereabouts::Gone => false,
            };
            if !may_stop {
                return Ok(None);
            }
            if since.elapsed() > HALT_PATIENCE {
                return Err(error);
            }
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
            let Some(stop) = self.halt(tid, wait)? else {
                return Ok(None);
            };
            let Some(regs) = self.still_there(tid, "reading registers", ptrace::registers(tid))?
            else {
                return Ok(None);
            };
            self.note_outside(tid, &regs);
            if stop == Stop::Parked {
                // What is pending for it is its own.
                return Ok(Some(stop));
            }
            let pending = self.traps.target_behind(regs.pc()).is_some()
                && proc::thread_status(self.process_of(tid), tid)
                    .is_ok_and(|status| status.deliverable().contains(libc::SIGTRAP));
            if !pending {
                return Ok(Some(stop));
            }
            self.unhalt(tid, stop)?;
            self.wait_for_stop_of(tid, wait)?;
        }
        Err(TraceError::Stuck { tid, waited_ms: 0 })
    }

    /// Waits for a stop that is sure to come, and answers it. An interrupt that came before it
    /// would be answered first, again and again.
    fn wait_for_stop_of(&mut self, tid: Tid, wait: Duration) -> Result<(), TraceError> {
        let until = Instant::now() + wait;
        let mut pace = self.pace();
        while Instant::now() < until && self.tasks.contains_key(&tid) {
            match self.poll(Whose::Any)? {
                Some((who, stop)) => {
                    self.answer(who, stop)?;
                    if who == tid {
                        break;
                    }
                }
                None => {
                    if pace.is_slow() {
                        self.reap_ended();
                    }
                    self.unpark_overdue()?;
                    pace.rest();
                }
            }
        }
        Ok(())
    }

    pub(crate) fn whereabouts(&self, tid: Tid) -> Whereabouts {
        let foreign = self.tasks.get(&tid).is_some_and(|task| task.foreign);
        proc::whereabouts(if foreign { tid } else { self.pid }, tid)
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

    /// Answers a SIGTRAP stop, if it is for one of our breakpoints and for nothing else.
    pub(crate) fn answer_trap(&mut self, tid: Tid) -> Result<bool, TraceError> {
        let Some(regs) = self.still_there(tid, "reading registers", ptrace::registers(tid))? else {
            return Ok(true);
        };
        let Some(goes_to) = self.traps.target_behind(regs.pc()) else {
            // Somebody's own SIGTRAP. A trap of ours in another thread may just have reset
            // its handler: put it back first.
            return self.restore_sigtrap(tid, &regs).map(|_| false);
        };
        let code = self.still_there(tid, "reading a signal", ptrace::signal_code(tid))?;
        let now = self.still_there(tid, "reading the mask", ptrace::signal_mask(tid))?;
        let (Some(code), Some(now)) = (code, now) else {
            return Ok(true);
        };
        let noted = self.tasks.get(&tid).map_or(now, |task| task.mask);
        let blocked = was_blocked(noted, now);
        let swallowed_another = code != SI_KERNEL;
        if swallowed_another && !blocked {
            if self.has_certainly_trapped(tid, regs.pc()) {
                self.counts.traps += 1;
                let set = ptrace::set_registers(tid, &regs.with_pc(goes_to));
                self.still_there(tid, "setting registers", set)?;
            }
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
        let has_left_its_stop = self.restore_sigtrap(tid, &onward)?;
        if blocked {
            self.still_there(tid, "setting the mask", ptrace::set_signal_mask(tid, mask))?;
        }
        let at_gate = goes_to == regs.pc().offset(-1);
        let requeue = swallowed_another;
        let parked = Parked { requeue, has_left_its_stop, at_gate, ..Parked::now() };
        if let Some(task) = self.tasks.get_mut(&tid) {
            task.parked = Some(parked);
        }
        Ok(true)
    }

    /// Whether a thread right behind a breakpoint has run into it, and cannot have come there
    /// otherwise: by what stands at the site now or by what stood there before.
    fn has_certainly_trapped(&self, tid: Tid, pc: RemoteAddr) -> bool {
        let seen_outside = self.tasks.get(&tid).is_some_and(|task| task.seen_outside);
        let mut at_site = [0];
        if self.traps.is_certain_gate_behind(pc) {
            return true;
        }
        (seen_outside || self.traps.leads_behind(pc))
            && self.memory.read(pc.offset(-1), &mut at_site).is_ok()
            && never_falls_behind_itself(at_site[0])
    }

    /// To be called with the registers of each stopped thread, before it goes on.
    pub(crate) fn note_outside(&mut self, tid: Tid, regs: &Registers) {
        if self.traps.is_outside(regs.pc())
            && let Some(task) = self.tasks.get_mut(&tid)
        {
            task.seen_outside = true;
        }
    }

    /// Resumes a parked thread.
    fn unpark(&mut self, tid: Tid) -> Result<(), TraceError> {
        let parked = self.tasks.get_mut(&tid).and_then(|task| task.parked.take());
        let Some(parked) = parked else { return Ok(()) };
        // Blocked again by now, a swallowed signal goes back to the queue: by ptrace_signal(),
        // with all its data, or, where the thread has left that stop, sent anew.
        if parked.requeue && parked.has_left_its_stop {
            self.postponed.push((tid, libc::SIGTRAP));
            self.send_postponed();
        }
        let requeue = parked.requeue && !parked.has_left_its_stop;
        self.resume(tid, if requeue { libc::SIGTRAP } else { 0 })
    }

    fn unpark_all(&mut self) -> Result<(), TraceError> {
        let closed = self.traps.is_empty();
        let due = |parked: Parked| closed || !parked.has_own;
        self.unpark_where(due)
    }

    pub(crate) fn unpark_overdue(&mut self) -> Result<(), TraceError> {
        if self.traps.is_empty() {
            return Ok(());
        }
        let may_go_on = |parked: Parked| !parked.has_own && !parked.at_gate;
        self.unpark_where(|parked| may_go_on(parked) && parked.since.elapsed() > PARKED_AT_MOST)
    }

    fn unpark_where(&mut self, due: impl Fn(Parked) -> bool) -> Result<(), TraceError> {
        let due = |parked: Parked| !parked.is_kept && due(parked);
        let parked = self.tasks.iter().filter(|(_, task)| task.parked.is_some_and(due));
        // One that is in a system call for us is stopped for that as well.
        let due = parked.map(|(&tid, _)| tid).filter(|tid| !self.lent.contains(tid));
        let due: Vec<Tid> = due.collect();
        due.into_iter().try_for_each(|tid| self.unpark(tid))
    }

    /// Gives a forked child the text that its parent has now.
    pub(crate) fn mirror_text(&self, child: Pid) {
        if let Ok(copy) = Memory::open(child) {
            self.text_log.mirror(&self.memory, &copy);
        }
    }

    pub(crate) fn release_held(&mut self) -> Result<(), TraceError> {
        let mut all_gone = Ok(());
        for child in std::mem::take(&mut self.held) {
            self.mirror_text(child);
            all_gone = all_gone.and(self.part_with(child, How::Forked));
        }
        all_gone
    }
}
