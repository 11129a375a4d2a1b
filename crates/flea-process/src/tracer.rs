//! The tracer: every thread of one process, seized, and the pump that answers their stops.
//!
//! Seized threads run on as if nobody watched. Some things still stop them for the tracer
//! (a signal to be delivered, the birth of a thread, one of our breakpoints) and each of those
//! is answered here at once, so that the target sees what it would have seen without us.
//! Nothing in this file decides *when* to stop a thread: see `remote`, `survey`, `window`.
//!
//! # What a traced thread would notice, and how it does not
//!
//! 1. *Ignored signals.* For an untraced process they are dropped when sent. For a traced one
//!    they wake the thread and stop it; a system call that answers signals with `EINTR` itself
//!    (epoll_wait, semop, sigtimedwait) has given up by then. It is rewound.
//! 2. *PTRACE_INTERRUPT* wakes a sleeping thread in the same way; the same is done. Not where
//!    a signal is pending as well: then `EINTR` is the truth.
//! 3. A signal with a handler that arrives after a rewinding and before the system call has
//!    begun again: the rewinding is undone, for a program may rely on the `EINTR`.
//! 4. Each stop is followed by exactly what the kernel would have done: the same signal, the
//!    group stop kept up by PTRACE_LISTEN.

use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use flea_symbols::addr::RemoteAddr;
use nix::errno::Errno;

use crate::batch::Batch;
use crate::hub::{How, Hub};
use crate::hurry::Urgency;
use crate::memory::{Memory, MemoryError};
use crate::proc::{self, Pid, ProcError, SignalSet, Tid};
use crate::ptrace::{self, Stop, Whose};
use crate::sigtrap::SigtrapAction;
use crate::sleep::{Asleep, CpuClocks};
use crate::sync::SyncMethod;
use crate::text_log::TextLog;
use crate::traps::TrapTable;
use crate::window::Parked;
use crate::x86_64::Registers;

/// What every thread is seized with. No PTRACE_O_EXITKILL: if we die, the target lives.
pub(crate) const OPTIONS: i32 = libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEEXEC
    | libc::PTRACE_O_TRACESYSGOOD;

/// How long a stop may go unanswered while we are at work.
const PUMP_EVERY: Duration = Duration::from_micros(PUMP_EVERY_MICROS);
const PUMP_EVERY_MICROS: u64 = 100;

/// Why an operation on the seized process failed.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// It has ended.
    #[error("process {pid} has ended")]
    Gone {
        /// Its number.
        pid: Pid,
    },
    /// It runs another program now; nothing that was known of it holds any more.
    #[error("process {pid} has replaced its program by exec")]
    Execed {
        /// Its number.
        pid: Pid,
    },
    /// The kernel refused.
    #[error("{request} of thread {tid} failed: {errno}")]
    Ptrace {
        /// What was asked.
        request: &'static str,
        /// Of which thread.
        tid: Tid,
        /// The kernel's word for it.
        errno: Errno,
    },
    /// A thread did not come to a stop.
    #[error("thread {tid} did not stop within {waited_ms} ms (it sleeps uninterruptibly)")]
    Stuck {
        /// The thread.
        tid: Tid,
        /// How long we waited.
        waited_ms: u64,
    },
    /// No thread could be had for a system call without which nothing may be changed.
    #[error(
        "no thread of process {pid} can run a system call now, which keeps what it does on \
         SIGTRAP; try again"
    )]
    NoThread {
        /// Its number.
        pid: Pid,
    },
    /// Its memory could not be read or written.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// /proc could not be read.
    #[error(transparent)]
    Proc(#[from] ProcError),
}

/// What has happened since the process was seized. For reports and tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TracerCounts {
    /// Threads that ran into one of our breakpoints.
    pub traps: u64,
    /// Of those, threads that had SIGTRAP blocked.
    pub traps_blocked: u64,
    /// Times that SIGTRAP's disposition was put back.
    pub dispositions_restored: u64,
    /// Signals handed on.
    pub signals: u64,
    /// System calls that we made in the target.
    pub remote_syscalls: u64,
    /// System calls of the target that would have shown `EINTR`.
    pub rewound: u64,
    /// Of those, calls that were begun again with a shorter timeout.
    pub shortened: u64,
    /// Threads born.
    pub births: u64,
    /// Threads interrupted.
    pub interrupts: u64,
}

/// A system call that was begun again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rewound {
    /// As it would have shown `EINTR`.
    pub(crate) before: Registers,
    /// Before its instruction.
    pub(crate) after: Registers,
}

/// One seized thread.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Task {
    /// A PTRACE_INTERRUPT has been sent and no stop seen since.
    pub(crate) interrupted: bool,
    /// Its signal mask when we last knew it.
    pub(crate) mask: SignalSet,
    /// It was rewound, and has not been seen elsewhere since.
    pub(crate) rewound: Option<Rewound>,
    /// What it had done before it was interrupted in a system call with a timeout.
    pub(crate) asleep: Option<Asleep>,
    /// Since when it had been asleep when it was interrupted there, if that is known.
    pub(crate) asleep_since: Option<Instant>,
    /// It waits at one of our breakpoints for the window to close, or for its patience to end.
    pub(crate) parked: Option<Parked>,
    /// Runs in the target's memory but is a process of its own (a vfork child).
    pub(crate) foreign: bool,
    /// It was let go with a SIGTRAP to act on, and has not been seen to stop since.
    pub(crate) given_sigtrap: bool,
    /// It slept, with none of the places looked for last on its stack, when it had been given a
    /// CPU this often: see `survey`.
    pub(crate) clean_at: Option<u64>,
    /// It has been seen at no breakpoint since all of them were: see `TrapTable::is_outside`.
    pub(crate) seen_outside: bool,
}

impl Task {
    /// One that lived before we came. Who traced it before us may have let it go with a signal
    /// a moment ago.
    pub(crate) fn found() -> Self {
        Self { given_sigtrap: true, ..Self::default() }
    }
}

/// A process whose every thread is seized by the present thread. Obtained from
/// [`crate::seize`] only.
#[derive(Debug)]
pub struct Tracer {
    pub(crate) pid: Pid,
    pub(crate) memory: Memory,
    pub(crate) tasks: BTreeMap<Tid, Task>,
    /// Children announced by their parent that have not shown up yet.
    pub(crate) expected: BTreeSet<Tid>,
    /// Forked children with memory of their own, stopped before their first instruction.
    pub(crate) held: BTreeSet<Pid>,
    pub(crate) traps: TrapTable,
    /// There may be a gate among them that threads are not to pass.
    pub(crate) is_gate_shut: bool,
    pub(crate) text_log: TextLog,
    /// What [`Tracer::look`] has looked for last, ascending.
    pub(crate) looked_for: Vec<RemoteAddr>,
    pub(crate) sigtrap: SigtrapAction,
    pub(crate) sync: SyncMethod,
    /// Threads that run do not stop at once, for there are more of them than CPUs.
    pub(crate) has_slow_stops: bool,
    pub(crate) syscall_insn: Option<RemoteAddr>,
    pub(crate) execed: bool,
    /// Signals that came for a borrowed thread and could not be blocked.
    pub(crate) postponed: Vec<(Tid, i32)>,
    /// Threads on loan whose next stop somebody waits for.
    pub(crate) lent: BTreeSet<Tid>,
    /// When stops were last answered.
    pub(crate) last_pump: Instant,
    pub(crate) urgency: Urgency,
    /// SIGCHLD is blocked, is not ignored, and is nobody else's: each stop shows in it.
    pub(crate) hears_stops: bool,
    pub(crate) batch: Batch,
    pub(crate) clocks: CpuClocks,
    pub(crate) counts: TracerCounts,
    /// Shared with the tracers of other processes, where one thread follows several.
    pub(crate) hub: Option<Hub>,
    /// ptrace belongs to a thread: a tracer must not move to another.
    _not_send: PhantomData<*const ()>,
}

impl Tracer {
    pub(crate) fn new(pid: Pid, memory: Memory) -> Self {
        Self {
            pid,
            memory,
            tasks: BTreeMap::new(),
            expected: BTreeSet::new(),
            held: BTreeSet::new(),
            traps: TrapTable::default(),
            is_gate_shut: false,
            text_log: TextLog::default(),
            looked_for: Vec::new(),
            sigtrap: SigtrapAction::default(),
            sync: SyncMethod::default(),
            has_slow_stops: false,
            syscall_insn: None,
            execed: false,
            postponed: Vec::new(),
            lent: BTreeSet::new(),
            last_pump: Instant::now(),
            urgency: Urgency::default(),
            hears_stops: false,
            batch: Batch::default(),
            clocks: CpuClocks::default(),
            counts: TracerCounts::default(),
            hub: None,
            _not_send: PhantomData,
        }
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Its threads, as far as known.
    #[must_use]
    pub fn threads(&self) -> Vec<Tid> {
        self.tasks.keys().copied().collect()
    }

    /// What has happened so far.
    #[must_use]
    pub fn counts(&self) -> TracerCounts {
        self.counts
    }

    /// Answers every stop that has happened. Whoever keeps a process seized for longer than a
    /// millisecond calls this in between; [`Tracer::wait_a_moment`] does.
    pub fn pump(&mut self) -> Result<(), TraceError> {
        // One stop of each thread at most. Hot threads run from one breakpoint into the next
        // as fast as they are answered, and what ends that is the caller's next step.
        for _ in 0..self.tasks.len() + 4 {
            let Some((tid, stop)) = self.poll(Whose::Any)? else {
                break;
            };
            self.answer(tid, stop)?;
        }
        self.unpark_overdue()?;
        self.urgency.relax();
        self.last_pump = Instant::now();
        self.check_alive()
    }

    /// As [`Tracer::pump`], unless that was done a moment ago: for whoever is at work on
    /// something that takes long.
    pub fn pump_when_due(&mut self) -> Result<(), TraceError> {
        if self.is_pump_due() { self.pump() } else { Ok(()) }
    }

    pub(crate) fn is_pump_due(&self) -> bool {
        self.last_pump.elapsed() >= PUMP_EVERY
    }

    pub(crate) fn pace(&self) -> Pace {
        let is_open = !self.traps.is_empty();
        Pace { rests: 0, hears_stops: self.hears_stops, is_open }
    }

    /// Does what threads of the target have to wait for.
    pub(crate) fn urgently<R>(&mut self, work: impl FnOnce(&mut Self) -> R) -> R {
        self.urgency.press();
        let result = work(self);
        self.urgency.ease();
        result
    }

    /// Lets the target run for `duration` while its stops are answered.
    pub fn wait_a_moment(&mut self, duration: Duration) -> Result<(), TraceError> {
        let until = Instant::now() + duration;
        let mut pace = self.pace();
        while Instant::now() < until {
            self.pump()?;
            self.reap_ended();
            pace.rest();
        }
        Ok(())
    }

    /// Fails where the program that was seized is no more.
    pub(crate) fn check_alive(&self) -> Result<(), TraceError> {
        if self.execed {
            Err(TraceError::Execed { pid: self.pid })
        } else if self.tasks.is_empty() {
            Err(TraceError::Gone { pid: self.pid })
        } else {
            Ok(())
        }
    }

    pub(crate) fn poll(&self, whose: Whose) -> Result<Option<(Tid, Stop)>, TraceError> {
        let polled = match (&self.hub, whose) {
            (Some(hub), Whose::Any) => hub.next_for(self),
            _ => ptrace::poll_stop(whose),
        };
        match polled {
            Ok(stop) => Ok(stop),
            Err(Errno::ECHILD) => Ok(None),
            Err(errno) => {
                Err(TraceError::Ptrace { request: "waiting for a stop", tid: self.pid, errno })
            }
        }
    }

    /// Sorts out the result of a request: a thread may be killed at any instant, stopped or
    /// not, and then answers ESRCH. That is no error; there is just nothing left to do for it.
    pub(crate) fn still_there<T>(
        &mut self,
        tid: Tid,
        request: &'static str,
        result: Result<T, Errno>,
    ) -> Result<Option<T>, TraceError> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(Errno::ESRCH) => {
                if ptrace::has_ended(tid) {
                    self.forget(tid);
                }
                Ok(None)
            }
            Err(errno) => Err(TraceError::Ptrace { request, tid, errno }),
        }
    }

    fn forget(&mut self, tid: Tid) {
        let foreign = self.tasks.remove(&tid).is_some_and(|task| task.foreign);
        self.expected.remove(&tid);
        if !self.held.remove(&tid) && tid != self.pid && !foreign {
            ptrace::reap(tid);
        }
    }

    /// Collects threads that have ended.
    pub(crate) fn reap_ended(&mut self) {
        let all: Vec<Tid> =
            self.tasks.keys().chain(&self.held).chain(&self.expected).copied().collect();
        for tid in all {
            if ptrace::has_ended(tid) {
                self.forget(tid);
            }
        }
    }

    /// The answer to a stop that nobody waits for in particular.
    pub(crate) fn answer(&mut self, tid: Tid, stop: Stop) -> Result<(), TraceError> {
        if let Some(task) = self.tasks.get_mut(&tid) {
            // "Any trap clears pending STOP trap" (ptrace_stop): also one of another kind.
            task.interrupted = false;
            task.given_sigtrap = false;
        } else if !self.held.contains(&tid) && !self.welcome(tid)? {
            return Ok(());
        }
        match stop {
            Stop::Signal(signal) => self.answer_signal(tid, signal),
            Stop::Group(_) => {
                let listened = ptrace::listen(tid);
                self.still_there(tid, "keeping up the stop", listened).map(drop)
            }
            Stop::Interrupted => {
                self.hide_eintr(tid)?;
                self.resume(tid, 0)
            }
            Stop::Syscall => self.resume(tid, 0),
            Stop::Parked => Ok(()),
            Stop::Event(event) => self.answer_event(tid, event),
        }
    }

    /// A thread or process that we have not known: it stands before its first instruction.
    /// Whether it is to be resumed as one of ours.
    fn welcome(&mut self, tid: Tid) -> Result<bool, TraceError> {
        self.expected.remove(&tid);
        let sibling = std::fs::exists(format!("/proc/{}/task/{tid}", self.pid)).unwrap_or(false);
        if !sibling {
            self.restore_sigtrap_at_birth(tid)?;
        }
        if sibling || shares_memory(self.pid, tid) {
            let mask = self.still_there(tid, "reading the mask", ptrace::signal_mask(tid))?;
            let mask = mask.unwrap_or_default();
            self.tasks.insert(tid, Task { mask, foreign: !sibling, ..Task::default() });
            self.counts.births += 1;
            return Ok(true);
        }
        // Memory of its own, copied at an instant we do not know: see `window`.
        if self.traps.is_empty() {
            self.mirror_text(tid);
            self.part_with(tid, How::Forked)?;
        } else {
            self.held.insert(tid);
        }
        Ok(false)
    }

    fn answer_event(&mut self, tid: Tid, event: i32) -> Result<(), TraceError> {
        match event {
            libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK => {
                let message = ptrace::event_message(tid);
                if let Some(child) = self.still_there(tid, "reading a birth", message)?
                    && let Ok(child) = Tid::try_from(child)
                    && !self.tasks.contains_key(&child)
                    && !self.held.contains(&child)
                    && !self.hub.as_ref().is_some_and(|hub| hub.knows(child))
                    && !ptrace::has_ended(child)
                {
                    self.expected.insert(child);
                }
            }
            libc::PTRACE_EVENT_EXEC if self.tasks.get(&tid).is_some_and(|task| task.foreign) => {
                self.tasks.remove(&tid);
                return self.part_with(tid, How::Executed);
            }
            libc::PTRACE_EVENT_EXEC => {
                // All other threads are gone, and this one bears the process's number.
                self.execed = true;
                self.tasks.retain(|&other, task| other == tid || task.foreign);
                if let Some(hub) = &self.hub {
                    hub.announce(self.pid, self.pid, How::Executed, &self.expected);
                    return Ok(());
                }
            }
            _ => {}
        }
        self.resume(tid, 0)
    }

    fn answer_signal(&mut self, tid: Tid, signal: i32) -> Result<(), TraceError> {
        if signal == libc::SIGTRAP && self.answer_trap(tid)? {
            return Ok(());
        }
        self.counts.signals += 1;
        let Some(regs) = self.still_there(tid, "reading registers", ptrace::registers(tid))? else {
            return Ok(());
        };
        self.note_outside(tid, &regs);
        let is_trap = signal == libc::SIGTRAP;
        let ignored = is_trap && self.sigtrap_is_ignored() || self.is_ignored(signal)?;
        let rewound = self.tasks.get(&tid).and_then(|task| task.rewound);
        if ignored && regs.would_show_eintr() {
            self.rewind(tid, &regs)?;
        } else if !ignored
            && let Some(Rewound { before, after }) = rewound
            && after == regs
        {
            // It has not begun again: back to `EINTR`, which this signal is a reason for.
            self.still_there(tid, "setting registers", ptrace::set_registers(tid, &before))?;
            self.note_rewound(tid, None);
        }
        if is_trap && ignored {
            return self.resume(tid, 0);
        }
        if is_trap && self.hold_sigtrap(tid) {
            return Ok(());
        }
        self.resume(tid, signal)
    }

    /// Rewinds a thread that has just been interrupted by us out of a system call, if it would
    /// show.
    pub(crate) fn hide_eintr(&mut self, tid: Tid) -> Result<(), TraceError> {
        let Some(regs) = self.still_there(tid, "reading registers", ptrace::registers(tid))? else {
            return Ok(());
        };
        self.measure_sleep(tid);
        if regs.would_show_eintr() && !self.has_deliverable(tid)? {
            self.rewind(tid, &regs)?;
        }
        Ok(())
    }

    pub(crate) fn rewind(&mut self, tid: Tid, regs: &Registers) -> Result<(), TraceError> {
        self.counts.rewound += 1;
        let after = self.begun_again(tid, regs);
        self.note_rewound(tid, Some(Rewound { before: *regs, after }));
        let set = ptrace::set_registers(tid, &after);
        self.still_there(tid, "setting registers", set).map(drop)
    }

    pub(crate) fn note_rewound(&mut self, tid: Tid, rewound: Option<Rewound>) {
        if let Some(task) = self.tasks.get_mut(&tid) {
            task.rewound = rewound;
        }
    }

    /// Whether a signal is about to be delivered to the thread that will have an effect.
    pub(crate) fn has_deliverable(&self, tid: Tid) -> Result<bool, TraceError> {
        let Ok(status) = proc::thread_status(self.process_of(tid), tid) else {
            return Ok(false);
        };
        let set = status.deliverable();
        Ok((1..=64).any(|signal| set.contains(signal) && !status_ignores(&status, signal)))
    }

    pub(crate) fn process_of(&self, tid: Tid) -> Pid {
        if self.tasks.get(&tid).is_some_and(|task| task.foreign) { tid } else { self.pid }
    }

    fn is_ignored(&self, signal: i32) -> Result<bool, TraceError> {
        let Some(&tid) = self.tasks.keys().next() else {
            return Ok(false);
        };
        Ok(proc::thread_status(self.process_of(tid), tid)
            .is_ok_and(|status| status_ignores(&status, signal)))
    }

    pub(crate) fn resume(&mut self, tid: Tid, signal: i32) -> Result<(), TraceError> {
        if signal == libc::SIGTRAP
            && let Some(task) = self.tasks.get_mut(&tid)
        {
            task.given_sigtrap = true;
        }
        let resumed = ptrace::resume(tid, signal);
        self.still_there(tid, "resuming", resumed).map(drop)
    }

    /// Stops one thread with PTRACE_INTERRUPT and returns at its stop; other threads' stops
    /// are answered meanwhile. `None` where it has ended.
    pub(crate) fn halt(&mut self, tid: Tid, wait: Duration) -> Result<Option<Stop>, TraceError> {
        let until = Instant::now() + wait;
        let mut pace = self.pace();
        loop {
            if self.tasks.get(&tid).is_some_and(|task| task.parked.is_some()) {
                return Ok(Some(Stop::Parked));
            }
            let outstanding = self.tasks.get(&tid).is_some_and(|task| task.interrupted);
            if !outstanding {
                self.note_sleep(tid);
                let asked = ptrace::interrupt(tid);
                if self.still_there(tid, "interrupting", asked)?.is_none() {
                    return Ok(None);
                }
                self.counts.interrupts += 1;
            }
            let Some(task) = self.tasks.get_mut(&tid) else {
                return Ok(None);
            };
            task.interrupted = true;
            match self.poll(Whose::Any)? {
                Some((who, stop @ (Stop::Interrupted | Stop::Group(_)))) if who == tid => {
                    if let Some(task) = self.tasks.get_mut(&tid) {
                        task.interrupted = false;
                        task.given_sigtrap = false;
                    }
                    return Ok(Some(stop));
                }
                Some((who, stop)) => self.answer(who, stop)?,
                None if pace.is_slow() && ptrace::has_ended(tid) => {
                    self.forget(tid);
                    return Ok(None);
                }
                None if Instant::now() > until => {
                    let waited_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
                    return Err(TraceError::Stuck { tid, waited_ms });
                }
                None => {
                    self.unpark_overdue()?;
                    pace.rest();
                }
            }
        }
    }

    /// Resumes a thread from `halt` as if it had not been stopped.
    pub(crate) fn unhalt(&mut self, tid: Tid, stop: Stop) -> Result<(), TraceError> {
        self.answer(tid, stop)
    }
}

/// Whether delivering `signal` changes nothing: ignored, or without a handler and of a kind
/// that is ignored by default.
fn status_ignores(status: &proc::Status, signal: i32) -> bool {
    let by_default =
        matches!(signal, libc::SIGCHLD | libc::SIGURG | libc::SIGWINCH | libc::SIGCONT);
    status.ignored.contains(signal) || (by_default && !status.caught.contains(signal))
}

pub(crate) fn shares_memory(a: Pid, b: Pid) -> bool {
    const KCMP_VM: libc::c_int = 1;
    // SAFETY: kcmp takes numbers only and changes nothing.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) };
    order == 0
}

/// How long to wait between two looks: first hardly at all, for a thread on a CPU stops within
/// microseconds; then until a signal tells of a stop, or, where none does, in growing sleeps.
/// Never by sched_yield: where the target's threads keep every CPU busy that gives all of them a
/// turn first, and a thread that waits at a breakpoint waits for milliseconds. A sleeper that
/// wakes up is served before them.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    rests: u32,
    hears_stops: bool,
    /// Threads may wait at breakpoints, and must not for longer than they said: that is told by no
    /// signal.
    is_open: bool,
}

impl Pace {
    const IMMEDIATE: u32 = 4;
    const SHORT: u32 = 60;
    /// The longest wait for a signal, which is for what no signal tells: that time is up, or a
    /// thread has fallen asleep.
    const SELDOM_MICROS: u64 = 1000;

    pub(crate) fn rest(&mut self) {
        self.rests += 1;
        let behind = |bound: u32| u64::from(self.rests.saturating_sub(bound));
        let micros = if self.hears_stops {
            let most = if self.is_open { PUMP_EVERY_MICROS } else { Self::SELDOM_MICROS };
            (behind(Self::IMMEDIATE) * 50).min(most)
        } else if self.rests > Self::SHORT {
            behind(Self::SHORT).min(20) * 25
        } else {
            behind(Self::IMMEDIATE).min(1) * 5
        };
        match Duration::from_micros(micros) {
            Duration::ZERO => {}
            most if self.hears_stops => ptrace::wait_for_any_stop(most),
            long => std::thread::sleep(long),
        }
    }

    pub(crate) fn is_slow(&self) -> bool {
        self.rests > if self.hears_stops { 2 * Self::IMMEDIATE } else { Self::SHORT }
    }
}
