//! Seizing every thread of a process, and letting go of all of them.
//!
//! A process of ours, the *tracer*, does it ([`crate::apart`]): ptrace relations belong to threads,
//! and the kernel lets go of everything when the thread ends, whatever happened to it. It is not
//! the controller's own process because that may be killed at any instant. Being the tracer is
//! also the lock between controllers: a process has one tracer at a time, and a dead owner does
//! not keep it.

use std::ffi::CString;
use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};

use crate::apart::in_own_process;
use crate::follow;
use crate::hurry::{Hurried, hurry};
use crate::memory::{Memory, MemoryError};
use crate::proc::{self, Pid, ProcError, Tid};
use crate::ptrace::{self, Whose};
use crate::thread::on_own_thread;
use crate::tracer::{OPTIONS, Pace, Task, TraceError, Tracer};

/// Name of the tracer thread: by it, another flea knows to wait instead of giving up.
pub const TRACER_THREAD_NAME: &str = "flea-tracer";
/// `kernel.yama.ptrace_scope`: a process may trace its descendants.
const YAMA_DESCENDANTS: u32 = 1;
/// How long a refusal must last to be believed.
const REFUSAL_PATIENCE: Duration = Duration::from_millis(20);
/// How long to wait for another flea.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait, on leaving, for threads that we have interrupted.
const LEAVE_PATIENCE: Duration = Duration::from_secs(1);
/// Each round finds the threads born in the last one that were not born of a seized thread: there
/// are fewer of them in each, however many the seized ones make.
const MOST_ROUNDS: u32 = 1000;
/// Rounds that have found nobody unseized, after which there is none whatever the kernel counts.
const QUIET_ROUNDS: u32 = 10;

/// Why a process could not be seized. It has not been changed or stopped.
#[derive(Debug, thiserror::Error)]
pub enum SeizeError {
    /// It is nothing that can be traced.
    #[error(transparent)]
    Process(#[from] ProcError),
    /// It is this process.
    #[error("a process cannot trace itself ({pid}); let another process do it")]
    Itself {
        /// Its number.
        pid: Pid,
    },
    /// Somebody else traces it.
    #[error(
        "process {pid} is traced by {comm} (process or thread {tracer_tid}) already, and a process has one tracer at a time; end that one first"
    )]
    OtherTracer {
        /// The process.
        pid: Pid,
        /// The tracer's thread.
        tracer_tid: Tid,
        /// The tracer's name.
        comm: String,
    },
    /// Another flea follows it.
    #[error(
        "process {pid} is followed by flea (process {controller}, with --follow), which no other tracer can join; end that one first"
    )]
    Followed {
        /// The process.
        pid: Pid,
        /// Who follows it.
        controller: Pid,
    },
    /// Another flea has held it for longer than we wait.
    #[error(
        "another flea (thread {tracer_tid}) has been at work on process {pid} for over {waited_ms} ms; try again"
    )]
    Locked {
        /// The process.
        pid: Pid,
        /// The tracer's thread.
        tracer_tid: Tid,
        /// How long we waited.
        waited_ms: u64,
    },
    /// It belongs to somebody else.
    #[error(
        "process {pid} belongs to user {owner}, and we are user {us}; run as that user or as root"
    )]
    OtherUser {
        /// The process.
        pid: Pid,
        /// Its user.
        owner: u32,
        /// Our user.
        us: u32,
    },
    /// The Yama security module forbids.
    #[error("kernel.yama.ptrace_scope is {scope}: {}", yama_advice(*.scope))]
    Yama {
        /// The process.
        pid: Pid,
        /// The setting.
        scope: u32,
    },
    /// It has changed its user, or forbids dumps.
    #[error(
        "process {pid} has made itself undumpable (it changed its user, has file capabilities, or asked for it by prctl); only root may trace it"
    )]
    NotDumpable {
        /// The process.
        pid: Pid,
    },
    /// Refused, for no reason we could find.
    #[error(
        "the kernel does not let us trace process {pid} ({errno}); in a container, give it the capability SYS_PTRACE, else look at the security module's log"
    )]
    Denied {
        /// The process.
        pid: Pid,
        /// The kernel's word for it.
        errno: Errno,
    },
    /// It has ended meanwhile.
    #[error("process {pid} ended while it was being seized")]
    Gone {
        /// Its number.
        pid: Pid,
    },
    /// It makes threads faster than they can be found. Never seen.
    #[error("process {pid} still had unseized threads after {rounds} rounds")]
    Restless {
        /// Its number.
        pid: Pid,
        /// How often we looked.
        rounds: u32,
    },
    /// Its memory cannot be opened.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// We could not start a thread.
    #[error("starting the tracer: {reason}")]
    Thread {
        /// The system's word for it.
        reason: io::Error,
    },
}

/// Seizes every thread of process `pid`, runs `work`, and lets go of them again. The target
/// is not stopped: not to seize it, and not to let go of it. Where another flea is at work
/// on the same process, waits for it, ten seconds at most.
///
/// # Panics
/// Where `work` does; all threads have been let go of then.
pub fn seize<R: Send>(
    pid: Pid,
    work: impl FnOnce(&mut Tracer) -> R + Send,
) -> Result<R, SeizeError> {
    if i32::try_from(std::process::id()) == Ok(pid) {
        return Err(SeizeError::Itself { pid });
    }
    proc::check_traceable(pid)?;
    let mut work = Some(work);
    if let Some(follower) = follow::port_of(pid) {
        let done = follower.work(pid, |tracer| work.take().map(|work| work(tracer)));
        if let Some(result) = done.flatten() {
            return Ok(result);
        }
        // It is not followed any more.
        if work.is_none() {
            return Err(SeizeError::Gone { pid });
        }
    }
    let outcome = seize_from(Place::Apart, pid, &mut work)?;
    // Nothing has been done yet: a process apart has not started the target, we may have.
    if let (Err(SeizeError::Yama { scope: YAMA_DESCENDANTS, .. }), Some(_)) = (&outcome, &work) {
        return seize_from(Place::Thread, pid, &mut work)?;
    }
    outcome
}

/// Where the tracer is.
#[derive(Clone, Copy)]
enum Place {
    /// In a process of its own, which nothing that kills this one reaches.
    Apart,
    /// In a thread of this process: where Yama lets a process trace its descendants alone.
    Thread,
}

/// One attempt. `work` is taken only where the target was seized.
fn seize_from<R: Send>(
    place: Place,
    pid: Pid,
    work: &mut Option<impl FnOnce(&mut Tracer) -> R + Send>,
) -> Result<Result<R, SeizeError>, SeizeError> {
    let trace = || {
        let name = CString::new(TRACER_THREAD_NAME).expect("it has no NUL");
        let named = nix::sys::prctl::set_name(&name);
        debug_assert!(named.is_ok(), "the name is readable");
        // Ctrl-C and the like are for the other threads: their handlers must not run in the
        // middle of a patch.
        let blocked = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None);
        debug_assert!(blocked.is_ok(), "the arguments are valid");
        hurry();
        let seized = attach(pid).map(|mut tracer| {
            tracer.hears_stops = matches!(place, Place::Apart);
            let work = work.take().expect("a target is seized once");
            let result = work(&mut tracer);
            tracer.leave();
            result
        });
        (nix::unistd::gettid().as_raw(), seized)
    };
    let _hurried = Hurried::begin();
    let traced = match place {
        Place::Apart => in_own_process(trace),
        Place::Thread => on_own_thread(trace),
    };
    let (tracer_tid, outcome) = traced.map_err(|reason| SeizeError::Thread { reason })?;
    wait_until_released(pid, tracer_tid);
    Ok(outcome)
}

/// A thread is joined a moment before the kernel lets go of its tracees.
fn wait_until_released(pid: Pid, tracer_tid: Tid) {
    let until = Instant::now() + LEAVE_PATIENCE;
    let mut pace = Pace::default();
    while Instant::now() < until
        && proc::status(pid).is_ok_and(|status| status.tracer_tid == tracer_tid)
    {
        pace.rest();
    }
}

/// What a thread was found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// Seized now.
    Free,
    /// Ours already: born of one that is.
    Ours,
    /// It has ended, and nobody knows whom the listing has skipped for that.
    Gone,
    /// The first thread, which has ended and stays for as long as the others.
    EndedFirst,
}

/// Seizes thread after thread, the first one first (it is the lock), until there is none left.
pub(crate) fn attach(pid: Pid) -> Result<Tracer, SeizeError> {
    let mut tracer: Option<Tracer> = None;
    // Seized while they end: they have let go of the process's memory already.
    let mut ending: Vec<Tid> = Vec::new();
    let mut n_quiet = 0;
    for _ in 0..MOST_ROUNDS {
        let mut is_quiet = true;
        for tid in proc::threads(pid)? {
            if tracer.as_ref().is_some_and(|t| t.tasks.contains_key(&tid)) {
                continue;
            }
            let found = seize_thread(pid, tid)?;
            is_quiet &= matches!(found, Found::Ours | Found::EndedFirst);
            if matches!(found, Found::Gone | Found::EndedFirst) {
                continue;
            }
            if tracer.is_none() {
                tracer = open_memory(tid)?.map(|memory| Tracer::new(pid, memory));
            }
            match &mut tracer {
                Some(tracer) => {
                    tracer.tasks.entry(tid).or_insert_with(Task::found);
                }
                None => ending.push(tid),
            }
        }
        let Some(tracer_now) = &mut tracer else {
            return Err(SeizeError::Gone { pid });
        };
        for tid in ending.drain(..) {
            tracer_now.tasks.entry(tid).or_insert_with(Task::found);
        }
        if tracer_now.pump().is_err() {
            return Err(SeizeError::Gone { pid });
        }
        n_quiet = if is_quiet { n_quiet + 1 } else { 0 };
        if n_quiet >= QUIET_ROUNDS
            || n_quiet > 0 && knows_all(tracer_now).map_err(|_| SeizeError::Gone { pid })?
        {
            adopt_vfork_children(tracer_now);
            return tracer.ok_or(SeizeError::Gone { pid });
        }
    }
    Err(SeizeError::Restless { pid, rounds: MOST_ROUNDS })
}

/// Whether there is no thread that is not seized.
///
/// One round over `/proc/PID/task` does not say so: where a thread ends while the kernel walks the
/// list, others are skipped. The kernel's own count has every thread that was seized and not waited
/// for, so it is larger by those that were skipped. (Threads born since [`Tracer::pump`] make it
/// larger as well, which costs another round.)
fn knows_all(tracer: &Tracer) -> Result<bool, ProcError> {
    let status = proc::status(tracer.pid)?;
    let seized = tracer.tasks.values().filter(|task| !task.foreign).count();
    // A first thread that has ended stays for as long as the others, and cannot be seized.
    let first_has_ended = !tracer.tasks.contains_key(&tracer.pid) && status.state == 'Z';
    Ok(seized + usize::from(first_has_ended) >= status.n_threads)
}

/// The process's memory, as seen by a thread of it; `None` if that one is ending.
fn open_memory(tid: Tid) -> Result<Option<Memory>, MemoryError> {
    match Memory::open(tid) {
        Ok(memory) => Ok(Some(memory)),
        Err(MemoryError::Open { reason, .. }) if is_no_such_process(&reason) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_no_such_process(reason: &io::Error) -> bool {
    reason.raw_os_error() == Some(libc::ESRCH) || reason.kind() == io::ErrorKind::NotFound
}

fn seize_thread(pid: Pid, tid: Tid) -> Result<Found, SeizeError> {
    let since = Instant::now();
    let mut refused_since = None;
    loop {
        let errno = match ptrace::seize(tid, OPTIONS) {
            Ok(()) => return Ok(Found::Free),
            Err(Errno::ESRCH) => return Ok(Found::Gone),
            Err(errno) => errno,
        };
        let Ok(status) = proc::thread_status(pid, tid) else {
            return Ok(Found::Gone);
        };
        if status.tracer_tid == nix::unistd::gettid().as_raw() {
            return Ok(Found::Ours);
        }
        if matches!(status.state, 'Z' | 'X') {
            return Ok(if tid == pid { Found::EndedFirst } else { Found::Gone });
        }
        let tracer_tid = status.tracer_tid;
        let comm = proc::comm(tracer_tid).unwrap_or_default();
        if comm == follow::FOLLOWER_NAME {
            let controller = proc::parent(tracer_tid).unwrap_or(tracer_tid);
            return Err(SeizeError::Followed { pid, controller });
        }
        let is_flea = comm == TRACER_THREAD_NAME || comm == "flea" || comm.is_empty();
        if tracer_tid == 0 || !is_flea {
            // For an instant, who has just let go shows as nobody, and who has just seized as
            // the process's parent.
            let refused_since = refused_since.get_or_insert_with(Instant::now);
            if refused_since.elapsed() < REFUSAL_PATIENCE {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            return Err(match tracer_tid {
                0 => explain_refusal(pid, &status, errno),
                _ => SeizeError::OtherTracer { pid, tracer_tid, comm },
            });
        }
        refused_since = None;
        if since.elapsed() > LOCK_PATIENCE {
            let waited_ms = u64::try_from(LOCK_PATIENCE.as_millis()).unwrap_or(u64::MAX);
            return Err(SeizeError::Locked { pid, tracer_tid, waited_ms });
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn explain_refusal(pid: Pid, status: &proc::Status, errno: Errno) -> SeizeError {
    let us = nix::unistd::geteuid().as_raw();
    let [real, effective, saved, _] = status.uids;
    if us != 0 && [real, effective, saved] != [us; 3] {
        let owner = if real == us { effective } else { real };
        return SeizeError::OtherUser { pid, owner, us };
    }
    if us != 0 && proc::is_undumpable(pid) {
        return SeizeError::NotDumpable { pid };
    }
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope")
        .ok()
        .and_then(|text| text.trim().parse().ok());
    match scope {
        Some(scope @ 1..) => SeizeError::Yama { pid, scope },
        _ => SeizeError::Denied { pid, errno },
    }
}

fn yama_advice(scope: u32) -> &'static str {
    match scope {
        1 => {
            "only own children may be traced; start the program with `-- COMMAND`, run as \
             root, or set it to 0 (sysctl kernel.yama.ptrace_scope=0)"
        }
        2 => "only root may trace; run as root or set it to 0 or 1",
        _ => "nobody may trace, and that cannot be changed without a reboot",
    }
}

/// A vfork child runs in the target's memory, and would die of a breakpoint that nobody
/// answers. One that was born before we came is found by its parent, which sleeps in vfork.
fn adopt_vfork_children(tracer: &mut Tracer) {
    let pid = tracer.pid;
    for tid in tracer.threads() {
        let proc::Whereabouts::Syscall { number, .. } = proc::whereabouts(pid, tid) else {
            continue;
        };
        if !crate::x86_64::is_fork(number) {
            continue;
        }
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/children"));
        for child in children.unwrap_or_default().split_whitespace() {
            if let Ok(child) = child.parse()
                && crate::tracer::shares_memory(pid, child)
                && ptrace::seize(child, OPTIONS).is_ok()
            {
                tracer.tasks.insert(child, Task { foreign: true, ..Task::default() });
            }
        }
    }
}

impl Tracer {
    /// Before the thread ends and the kernel lets go of everything: no interrupt of ours may
    /// be on its way, for a thread woken by it and not stopped any more would see `EINTR`.
    pub(crate) fn leave(&mut self) {
        // A window is open here only where what was begun has failed, and mostly, then, because the
        // program is no more.
        if !self.traps.is_empty() && self.drain().is_err() {
            self.leave_children();
        }
        if self.disarm().is_err() {
            self.leave_children();
            self.traps.clear();
            self.text_log.clear();
        }
        let until = Instant::now() + LEAVE_PATIENCE;
        let mut pace = self.pace();
        loop {
            let pumped: Result<(), TraceError> = self.pump();
            let outstanding = self.tasks.values().any(|task| task.interrupted);
            if pumped.is_err() || !outstanding || Instant::now() > until {
                break;
            }
            self.reap_ended();
            pace.rest();
        }
    }

    /// The program that was traced is no more. Its children are, which were forked while breakpoints
    /// were there: they have them in their text, and get back what was there before.
    fn leave_children(&mut self) {
        let until = Instant::now() + LEAVE_PATIENCE;
        let mut pace = self.pace();
        while !self.traps.is_empty() && !self.expected.is_empty() && Instant::now() < until {
            match self.poll(Whose::Any) {
                // What cannot be answered has ended.
                Ok(Some((tid, stop))) => drop(self.answer(tid, stop)),
                Ok(None) => {
                    self.reap_ended();
                    pace.rest();
                }
                Err(_) => break,
            }
        }
        // As above.
        drop(self.release_held());
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        self.leave();
    }
}
