//! System calls inside the target, in a thread that is borrowed for some microseconds.
//!
//! # A loan
//!
//! Protected: the thread's registers, mask, interrupted system call and pending signals. By:
//! it is stopped before anything is changed, and all is put back before it runs its own code.
//!
//! 1. The thread is interrupted, or parked already. Not taken: one that was interrupted with a
//!    signal about to be delivered, or is in an rseq critical section (running other code would end
//!    the section without its abort).
//! 2. Registers and mask are kept; every signal is blocked, so that none is delivered on top
//!    of registers that are not the thread's own. Signals go to other threads, or wait.
//! 3. Each call: registers set, the thread run to the entry and to the exit of the call.
//! 4. Mask and registers are put back *while at the exit stop*, with `orig_rax`, by which the
//!    kernel knows of the interrupted system call. But the kernel looks at it only on its way
//!    through get_signal(), which the exit of a system call need not take: so
//! 5. the thread is interrupted once more and goes on from *that* stop: now an ERESTART* (with
//!    the restart block: remaining times survive) is acted on. `EINTR` is rewound by us.
//!
//! If we die between 3 and 4 the thread goes on with our registers: it would return from the
//! system call into the middle of the vdso. That is the one instant of a loan that a death of
//! the tracer does not survive, some ten microseconds per call.

use std::time::{Duration, Instant};

use flea_symbols::addr::RemoteAddr;
use nix::errno::Errno;

use crate::gap::{GapError, find_gap};
use crate::proc::{self, Pid, SignalSet, Tid, Whereabouts};
use crate::ptrace::{self, Stop, Whose};
use crate::seccomp::{SeccompMode, Verdict};
use crate::tracer::{OPTIONS, TraceError, Tracer};
use crate::x86_64::{Registers, SYSCALL, disturbance};

/// A system call of ours that has not ended by then never will.
const CALL_PATIENCE: Duration = Duration::from_secs(10);
/// Threads that do not stop by then sleep uninterruptibly, or get no CPU; another one is tried. The
/// next time each has twice as long: one that stops while another is waited for is let go.
const BORROW_PATIENCE: Duration = Duration::from_millis(30);
/// How long to look for a thread that can be borrowed.
const SEARCH_PATIENCE: Duration = Duration::from_secs(2);
/// No filter judges the calls of a thread that is traced with these.
const WITHOUT_SECCOMP: i32 = OPTIONS | libc::PTRACE_O_SUSPEND_SECCOMP;
/// Offset of `rseq_cs` in `struct rseq`.
const RSEQ_CS_OFFSET: u64 = 8;
/// How often a free range is looked for when others take it first.
const MAP_ATTEMPTS: u32 = 8;

/// Why a system call could not be made in the target.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The call was made and failed.
    #[error("{} in the target failed: {errno}{}", name_of(*.number), advice(*.errno))]
    Refused {
        /// Its number.
        number: i64,
        /// The kernel's answer.
        errno: Errno,
    },
    /// No thread could be borrowed.
    #[error(
        "no thread of process {pid} can run a system call now: each one sleeps uninterruptibly or has a signal pending; try again"
    )]
    NoThread {
        /// The process.
        pid: Pid,
    },
    /// A filter would judge our system calls, and might kill the target for one.
    #[error(
        "process {pid} has a seccomp filter, and only a process with the capability SYS_ADMIN that \
         has no filter itself may read it, or suspend it for our calls; run as root, outside of \
         the container"
    )]
    Seccomp {
        /// The process.
        pid: Pid,
    },
    /// Its own handler is asked about system calls.
    #[error(
        "process {pid} has its system calls sent to itself (PR_SET_SYSCALL_USER_DISPATCH, as Wine \
         does), and would be asked about ours; such programs cannot be traced"
    )]
    Dispatches {
        /// The process.
        pid: Pid,
    },
    /// A filter would judge the system calls of what is to be attached, and not let them pass.
    #[error(
        "seccomp {verdict} system calls that what is to be attached makes: {} (thread {tid} of \
         process {pid}); start the process with a filter that allows them, or attach what does \
         without them",
        .names.join(", ")
    )]
    Forbidden {
        /// The process.
        pid: Pid,
        /// The thread.
        tid: Tid,
        /// The calls.
        names: Vec<&'static str>,
        /// What becomes of the worst of them.
        verdict: Verdict,
    },
    /// The target has no system call instruction that we know of.
    #[error("process {pid} has no system call instruction in its vdso or program")]
    NoInstruction {
        /// The process.
        pid: Pid,
    },
    /// No address for a mapping.
    #[error(transparent)]
    Gap(#[from] GapError),
    /// Tracing failed.
    #[error(transparent)]
    Trace(#[from] TraceError),
}

/// A system call that is made in targets, by its name.
fn name_of(number: i64) -> String {
    match number {
        libc::SYS_mmap => "mmap".to_owned(),
        libc::SYS_munmap => "munmap".to_owned(),
        libc::SYS_munlock => "munlock".to_owned(),
        libc::SYS_mprotect => "mprotect".to_owned(),
        libc::SYS_madvise => "madvise".to_owned(),
        libc::SYS_memfd_create => "memfd_create".to_owned(),
        libc::SYS_membarrier => "membarrier".to_owned(),
        libc::SYS_rt_sigaction => "rt_sigaction".to_owned(),
        libc::SYS_openat => "openat".to_owned(),
        libc::SYS_close => "close".to_owned(),
        _ => format!("system call {number}"),
    }
}

/// What to change where a limit of the target's is in the way.
fn advice(errno: Errno) -> &'static str {
    match errno {
        Errno::ENOMEM => {
            " (it may map no more memory: look at `prlimit --as --data --pid PID`, at the number of \
             its mappings against vm.max_map_count, and at vm.overcommit_memory)"
        }
        Errno::EMFILE => {
            " (it has as many files open as it may: raise `prlimit --nofile --pid PID`, for one \
             descriptor, which is closed again)"
        }
        Errno::EAGAIN => {
            " (it locks all memory that it maps, by mlockall, and may lock no more: raise \
             `prlimit --memlock --pid PID`)"
        }
        Errno::ENFILE => " (the system has as many files open as fs.file-max allows)",
        _ => "",
    }
}

/// What to map in the target.
#[derive(Clone, Copy, Debug)]
pub struct MapRequest {
    /// Within jump distance of the module that has this address; anywhere if none.
    pub near: Option<RemoteAddr>,
    /// How much.
    pub size_bytes: u64,
    /// `PROT_*`
    pub prot: i32,
    /// `MAP_*`, without those of placement.
    pub flags: i32,
    /// A file descriptor *of the target*, or -1.
    pub fd: i32,
    /// Offset in that file.
    pub offset: u64,
}

/// One thread of the target, borrowed for system calls.
#[derive(Debug)]
pub struct Borrowed<'a> {
    tracer: &'a mut Tracer,
    loan: Loan,
}

#[derive(Debug)]
struct Loan {
    tid: Tid,
    /// How it stood when it was taken.
    stop: Stop,
    registers: Registers,
    mask: SignalSet,
    /// It has left that stop.
    used: bool,
    /// It died, or was given back.
    over: bool,
    seccomp_suspended: bool,
}

/// Whom to borrow.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Lender {
    /// Any thread that runs in the target's memory.
    Any,
    /// A thread of the process itself: not a vfork child, which has dispositions of its own.
    OwnThread,
    /// A thread that sleeps in a system call: the call may take some time.
    Sleeper,
    /// This one.
    This(Tid),
}

enum Taken {
    Loan(Box<Loan>),
    Unsuitable,
    Filtered,
    Dispatches,
}

impl Tracer {
    /// Makes one system call in the target. It must not be one that blocks. The result, if it
    /// is not an error, is the return value.
    pub fn remote_syscall(&mut self, number: i64, args: [u64; 6]) -> Result<u64, RemoteError> {
        self.with_thread(|thread| thread.syscall(number, args))
    }

    /// Borrows one thread and makes system calls in it, all in one stop.
    pub fn with_thread<R>(
        &mut self,
        calls: impl FnOnce(&mut Borrowed<'_>) -> Result<R, RemoteError>,
    ) -> Result<R, RemoteError> {
        self.with_lender(Lender::Any, calls)
    }

    /// As [`Tracer::with_thread`], in a thread of the process itself: a vfork child runs in its
    /// memory, but has file descriptors and dispositions of its own.
    pub fn with_own_thread<R>(
        &mut self,
        calls: impl FnOnce(&mut Borrowed<'_>) -> Result<R, RemoteError>,
    ) -> Result<R, RemoteError> {
        self.with_lender(Lender::OwnThread, calls)
    }

    /// As [`Tracer::with_thread`], in one thread of the caller's choice.
    pub fn with_this_thread<R>(
        &mut self,
        tid: Tid,
        calls: impl FnOnce(&mut Borrowed<'_>) -> Result<R, RemoteError>,
    ) -> Result<R, RemoteError> {
        self.with_lender(Lender::This(tid), calls)
    }

    pub(crate) fn with_lender<R>(
        &mut self,
        lender: Lender,
        calls: impl FnOnce(&mut Borrowed<'_>) -> Result<R, RemoteError>,
    ) -> Result<R, RemoteError> {
        self.find_syscall_insn()?;
        self.urgently(|tracer| {
            let loan = tracer.borrow(lender)?;
            tracer.lend(loan, calls)
        })
    }

    fn lend<R>(
        &mut self,
        loan: Loan,
        calls: impl FnOnce(&mut Borrowed<'_>) -> Result<R, RemoteError>,
    ) -> Result<R, RemoteError> {
        let mut borrowed = Borrowed { tracer: self, loan };
        let result = calls(&mut borrowed);
        borrowed.give_back()?;
        result
    }

    /// Maps memory in the target. With `near`, within reach of that address's module.
    pub fn remote_map(&mut self, request: MapRequest) -> Result<RemoteAddr, RemoteError> {
        for attempt in 1.. {
            let (address, placement) = match request.near {
                None => (0, 0),
                Some(near) => {
                    let maps = proc::maps(self.pid).map_err(TraceError::from)?;
                    let at = find_gap(&maps, near, request.size_bytes)?;
                    (at.0, libc::MAP_FIXED_NOREPLACE)
                }
            };
            let args = [
                address,
                request.size_bytes,
                request.prot.cast_unsigned().into(),
                (request.flags | placement).cast_unsigned().into(),
                i64::from(request.fd).cast_unsigned(),
                request.offset,
            ];
            match self.with_thread(|thread| thread.mmap(args)) {
                // Kernels before 4.17 take the address as a hint.
                Ok(at) if address != 0 && at != address => {
                    self.remote_syscall(libc::SYS_munmap, [at, request.size_bytes, 0, 0, 0, 0])?;
                    if attempt >= MAP_ATTEMPTS {
                        let number = libc::SYS_mmap;
                        return Err(RemoteError::Refused { number, errno: Errno::EEXIST });
                    }
                }
                Ok(at) => return Ok(RemoteAddr(at)),
                // Another thread was faster: look again.
                Err(RemoteError::Refused { errno: Errno::EEXIST, .. })
                    if attempt < MAP_ATTEMPTS => {}
                Err(error) => return Err(error),
            }
        }
        unreachable!("the loop ends by returning")
    }

    pub(crate) fn find_syscall_insn(&mut self) -> Result<RemoteAddr, RemoteError> {
        if let Some(found) = self.syscall_insn {
            return Ok(found);
        }
        let mut maps = proc::maps(self.pid).map_err(TraceError::from)?;
        maps.retain(|m| m.perms.execute && m.perms.read && m.path != "[vsyscall]");
        maps.sort_by_key(|m| m.path != "[vdso]");
        for mapping in maps {
            let size_bytes = usize::try_from(mapping.size_bytes().min(4 << 20)).unwrap_or(0);
            let mut text = vec![0; size_bytes];
            let n_read = self.memory.read_prefix(mapping.start, &mut text);
            let at = text[..n_read].windows(SYSCALL.len()).position(|bytes| bytes == SYSCALL);
            if let Some(at) = at {
                let found = RemoteAddr(mapping.start.0 + at as u64);
                self.syscall_insn = Some(found);
                return Ok(found);
            }
        }
        Err(RemoteError::NoInstruction { pid: self.pid })
    }

    /// Takes the thread that is disturbed least, or the one named.
    fn borrow(&mut self, lender: Lender) -> Result<Loan, RemoteError> {
        let until = Instant::now() + SEARCH_PATIENCE;
        let mut pace = self.pace();
        let mut filtered = false;
        let mut patience = BORROW_PATIENCE;
        while Instant::now() < until {
            let begun = Instant::now();
            self.pump()?;
            for tid in self.candidates(lender) {
                match self.take(tid, patience)? {
                    Taken::Loan(loan) => return Ok(*loan),
                    Taken::Unsuitable => {}
                    Taken::Filtered => filtered = true,
                    Taken::Dispatches => return Err(RemoteError::Dispatches { pid: self.pid }),
                }
            }
            if filtered {
                return Err(RemoteError::Seccomp { pid: self.pid });
            }
            if matches!(lender, Lender::Sleeper) {
                break;
            }
            if matches!(lender, Lender::This(tid) if !self.tasks.contains_key(&tid)) {
                // It has ended.
                break;
            }
            pace.rest();
            if begun.elapsed() >= patience {
                patience *= 2;
            }
        }
        Err(RemoteError::NoThread { pid: self.pid })
    }

    /// Threads in the order of preference. The search ends at the first very good one: with
    /// thousands of threads, asking them all takes longer than the call.
    fn candidates(&self, lender: Lender) -> Vec<Tid> {
        if let Lender::This(tid) = lender {
            return vec![tid];
        }
        let mut ranked = Vec::new();
        for tid in self.threads() {
            let task = self.tasks.get(&tid).copied().unwrap_or_default();
            if task.foreign && matches!(lender, Lender::OwnThread) {
                continue;
            }
            let place = self.whereabouts(tid);
            let sleeps = task.parked.is_none() && matches!(place, Whereabouts::Syscall { .. });
            if matches!(lender, Lender::Sleeper) && !sleeps {
                continue;
            }
            let rank = match place {
                // What it opens, its parent does not have.
                _ if task.foreign => 9,
                // Taken last: its signal, sent anew, would lose whom it came from.
                _ if task.parked.is_some_and(|parked| parked.has_own) => 8,
                _ if task.parked.is_some() => 0,
                Whereabouts::Syscall { number, .. } => 2 * disturbance(number),
                Whereabouts::Running => 1,
                Whereabouts::Elsewhere { .. } => 3,
                Whereabouts::Gone => continue,
            };
            ranked.push((rank, tid));
            if rank == 0 {
                break;
            }
        }
        ranked.sort_unstable();
        ranked.into_iter().map(|(_, tid)| tid).collect()
    }

    fn take(&mut self, tid: Tid, patience: Duration) -> Result<Taken, TraceError> {
        let stop = match self.halt_past_trap(tid, patience) {
            Ok(Some(stop)) => stop,
            Ok(None) | Err(TraceError::Stuck { .. }) => return Ok(Taken::Unsuitable),
            Err(error) => return Err(error),
        };
        let registers = self.still_there(tid, "reading registers", ptrace::registers(tid))?;
        let mask = self.still_there(tid, "reading the mask", ptrace::signal_mask(tid))?;
        let (Some(registers), Some(mask)) = (registers, mask) else {
            return Ok(Taken::Unsuitable);
        };
        self.measure_sleep(tid);
        let Ok(status) = proc::thread_status(self.process_of(tid), tid) else {
            self.unhalt(tid, stop)?;
            return Ok(Taken::Unsuitable);
        };
        // What is pending for a parked thread waits until that is let go, with or without a loan.
        let is_signalled = stop != Stop::Parked && status.deliverable() != SignalSet::default();
        if is_signalled || self.in_rseq_section(tid, &registers) {
            self.unhalt(tid, stop)?;
            return Ok(Taken::Unsuitable);
        }
        if ptrace::dispatches_syscalls(tid) {
            self.unhalt(tid, stop)?;
            return Ok(Taken::Dispatches);
        }
        let seccomp_suspended = status.seccomp != SeccompMode::Off;
        if seccomp_suspended && ptrace::set_options(tid, WITHOUT_SECCOMP).is_err() {
            self.unhalt(tid, stop)?;
            return Ok(Taken::Filtered);
        }
        let blocked = ptrace::set_signal_mask(tid, SignalSet::ALL);
        if self.still_there(tid, "setting the mask", blocked)?.is_none() {
            return Ok(Taken::Unsuitable);
        }
        let used = false;
        let over = false;
        let loan = Loan { tid, stop, registers, mask, used, over, seccomp_suspended };
        Ok(Taken::Loan(Box::new(loan)))
    }

    fn in_rseq_section(&self, tid: Tid, registers: &Registers) -> bool {
        let section = |area: u64| -> Option<bool> {
            let descriptor = self.memory.read_u64(RemoteAddr(area + RSEQ_CS_OFFSET)).ok()?;
            if descriptor == 0 {
                return Some(false);
            }
            // struct rseq_cs: version and flags, start, length, abort address.
            let start = self.memory.read_u64(RemoteAddr(descriptor).offset(8)).ok()?;
            let size_bytes = self.memory.read_u64(RemoteAddr(descriptor).offset(16)).ok()?;
            Some(registers.pc().0.wrapping_sub(start) < size_bytes)
        };
        ptrace::rseq_area(tid).and_then(section).unwrap_or(false)
    }

    /// One system call in a thread that is stopped and blocks every signal. Leaves it at the
    /// call's exit with `registers`. `None` where the thread has ended.
    fn call(
        &mut self,
        tid: Tid,
        registers: &Registers,
        number: i64,
        args: [u64; 6],
    ) -> Result<Option<u64>, TraceError> {
        let Some(insn) = self.syscall_insn else {
            return Ok(None);
        };
        let calling = registers.calling(insn, number.cast_unsigned(), args);
        let set = ptrace::set_registers(tid, &calling);
        if self.still_there(tid, "setting registers", set)?.is_none() {
            return Ok(None);
        }
        for _entry_then_exit in 0..2 {
            if !self.run_to_syscall_stop(tid)? {
                return Ok(None);
            }
        }
        let after = self.still_there(tid, "reading registers", ptrace::registers(tid))?;
        let set = ptrace::set_registers(tid, registers);
        self.still_there(tid, "setting registers", set)?;
        self.counts.remote_syscalls += 1;
        Ok(after.map(|regs| regs.result()))
    }

    fn run_to_syscall_stop(&mut self, tid: Tid) -> Result<bool, TraceError> {
        loop {
            let resumed = ptrace::resume_to_syscall(tid);
            if self.still_there(tid, "resuming", resumed)?.is_none() {
                return Ok(false);
            }
            match self.wait_for(tid)? {
                None => return Ok(false),
                Some(Stop::Syscall) => return Ok(true),
                // SIGSTOP cannot be blocked. It is for the whole process: sent once more, it
                // waits until the thread is itself again.
                Some(Stop::Signal(signal)) => self.postponed.push((tid, signal)),
                // A group stop, or its end, seen on the way: go on.
                Some(_) => {}
            }
        }
    }

    /// Waits for one thread; where that takes long, others' stops are answered meanwhile.
    fn wait_for(&mut self, tid: Tid) -> Result<Option<Stop>, TraceError> {
        self.lent.insert(tid);
        let stop = self.wait_for_lent(tid);
        self.lent.remove(&tid);
        stop
    }

    fn wait_for_lent(&mut self, tid: Tid) -> Result<Option<Stop>, TraceError> {
        let until = Instant::now() + CALL_PATIENCE;
        let mut pace = self.pace();
        loop {
            match ptrace::poll_stop(Whose::Thread(tid)) {
                Ok(Some((_, stop))) => return Ok(Some(stop)),
                Err(Errno::ECHILD) => return Ok(None),
                Err(errno) => {
                    return Err(TraceError::Ptrace { request: "waiting for", tid, errno });
                }
                Ok(None) if pace.is_slow() && ptrace::has_ended(tid) => return Ok(None),
                Ok(None) if Instant::now() > until => {
                    let waited_ms = u64::try_from(CALL_PATIENCE.as_millis()).unwrap_or(u64::MAX);
                    return Err(TraceError::Stuck { tid, waited_ms });
                }
                Ok(None) => {
                    self.pump_others()?;
                    pace.rest();
                }
            }
        }
    }

    /// As [`Tracer::pump_when_due`], but leaves threads alone that somebody waits for.
    fn pump_others(&mut self) -> Result<(), TraceError> {
        if !self.is_pump_due() {
            return Ok(());
        }
        let others: Vec<Tid> = self.tasks.keys().chain(&self.expected).copied().collect();
        for tid in others {
            if !self.lent.contains(&tid)
                && let Ok(Some((tid, stop))) = ptrace::poll_stop(Whose::Thread(tid))
            {
                self.answer(tid, stop)?;
            }
        }
        self.last_pump = Instant::now();
        self.unpark_overdue()
    }

    /// One system call in a thread that is stopped *outside* any system call; it is left
    /// stopped, with `registers` and the mask that it had. `None` where the thread has ended, or
    /// a seccomp filter would judge the call.
    pub(crate) fn syscall_in_stopped(
        &mut self,
        tid: Tid,
        registers: &Registers,
        number: i64,
        args: [u64; 6],
    ) -> Result<Option<u64>, TraceError> {
        let mask = self.still_there(tid, "reading the mask", ptrace::signal_mask(tid))?;
        let Some(mask) = mask else { return Ok(None) };
        let seccomp = proc::thread_status(self.process_of(tid), tid).map(|status| status.seccomp);
        let is_judged = seccomp.is_ok_and(|mode| mode != SeccompMode::Off);
        if is_judged && ptrace::set_options(tid, WITHOUT_SECCOMP).is_err() {
            return Ok(None);
        }
        let blocked = ptrace::set_signal_mask(tid, SignalSet::ALL);
        self.still_there(tid, "setting the mask", blocked)?;
        let result = self.call(tid, registers, number, args);
        if is_judged {
            let judged = ptrace::set_options(tid, OPTIONS);
            self.still_there(tid, "setting options", judged)?;
        }
        let unblocked = ptrace::set_signal_mask(tid, mask);
        self.still_there(tid, "setting the mask", unblocked)?;
        self.send_postponed();
        result
    }

    pub(crate) fn send_postponed(&mut self) {
        for (tid, signal) in std::mem::take(&mut self.postponed) {
            // SAFETY: tgkill takes numbers only; the thread is one of the target.
            let sent = unsafe { libc::syscall(libc::SYS_tgkill, self.pid, tid, signal) };
            // The thread may have ended; then the process ends or has other threads.
            let _gone = sent != 0;
        }
    }
}

impl Borrowed<'_> {
    /// The thread.
    #[must_use]
    pub fn tid(&self) -> Tid {
        self.loan.tid
    }

    /// The target's memory.
    #[must_use]
    pub fn memory(&self) -> &crate::Memory {
        self.tracer.memory()
    }

    /// Makes one system call, which must not block.
    pub fn syscall(&mut self, number: i64, args: [u64; 6]) -> Result<u64, RemoteError> {
        let loan = &mut self.loan;
        loan.used = true;
        let result = self.tracer.call(loan.tid, &loan.registers, number, args)?;
        let Some(result) = result else {
            loan.over = true;
            return Err(TraceError::Gone { pid: self.tracer.pid }.into());
        };
        match i32::try_from(-result.cast_signed()) {
            Ok(errno @ 1..4096) => {
                Err(RemoteError::Refused { number, errno: Errno::from_raw(errno) })
            }
            _ => Ok(result),
        }
    }

    /// mmap, without what a target's `mlockall(MCL_FUTURE)` adds to it: memory for every page, at
    /// once. What we map is mostly never touched, and larger than the target's limit for that.
    ///
    /// The kernel fetches no page that may not be accessed: so it is made accessible when it is
    /// not locked any more.
    pub fn mmap(&mut self, args: [u64; 6]) -> Result<u64, RemoteError> {
        let tid = self.loan.tid;
        let status = proc::thread_status(self.tracer.process_of(tid), tid);
        if !status.is_ok_and(|status| status.locks_memory) {
            return self.syscall(libc::SYS_mmap, args);
        }
        let [address, size_bytes, prot, flags, fd, offset] = args;
        let none = u64::from(libc::PROT_NONE.cast_unsigned());
        let at = self.syscall(libc::SYS_mmap, [address, size_bytes, none, flags, fd, offset])?;
        let opened = self
            .syscall(libc::SYS_munlock, [at, size_bytes, 0, 0, 0, 0])
            .and_then(|_| self.syscall(libc::SYS_mprotect, [at, size_bytes, prot, 0, 0, 0]));
        if let Err(error) = opened {
            // What failed first is what is told.
            let _ = self.syscall(libc::SYS_munmap, [at, size_bytes, 0, 0, 0, 0]);
            return Err(error);
        }
        Ok(at)
    }

    /// Maps private anonymous memory for reading and writing.
    pub fn map_anonymous(&mut self, size_bytes: u64) -> Result<RemoteAddr, RemoteError> {
        let prot = (libc::PROT_READ | libc::PROT_WRITE).cast_unsigned().into();
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).cast_unsigned().into();
        let args = [0, size_bytes, prot, flags, u64::MAX, 0];
        self.syscall(libc::SYS_mmap, args).map(RemoteAddr)
    }

    /// Steps 4 and 5 of the loan.
    fn give_back(&mut self) -> Result<(), TraceError> {
        if std::mem::replace(&mut self.loan.over, true) {
            return Ok(());
        }
        let Loan { tid, stop, registers, mask, used, seccomp_suspended, .. } = self.loan;
        let tracer = &mut *self.tracer;
        let set = ptrace::set_registers(tid, &registers);
        tracer.still_there(tid, "setting registers", set)?;
        if seccomp_suspended {
            let set = ptrace::set_options(tid, OPTIONS);
            tracer.still_there(tid, "setting options", set)?;
        }
        let mut stop = stop;
        if used && stop == Stop::Parked {
            // Not in a system call of its own: nothing to restart.
            if let Some(task) = tracer.tasks.get_mut(&tid)
                && let Some(parked) = &mut task.parked
            {
                parked.has_left_its_stop = true;
            }
        } else if used {
            // Signals are still blocked, so that this stop comes before any of theirs.
            let asked = ptrace::interrupt(tid);
            tracer.still_there(tid, "interrupting", asked)?;
            loop {
                tracer.resume(tid, 0)?;
                match tracer.wait_for(tid)? {
                    None => return Ok(()),
                    Some(found @ (Stop::Interrupted | Stop::Group(_))) => {
                        stop = found;
                        break;
                    }
                    Some(Stop::Signal(signal)) => {
                        tracer.postponed.push((tid, signal));
                        let asked = ptrace::interrupt(tid);
                        tracer.still_there(tid, "interrupting", asked)?;
                    }
                    Some(_) => {}
                }
            }
            // A group stop may be left through a restart: the registers are set at the stop
            // which the thread really goes on from.
            let set = ptrace::set_registers(tid, &registers);
            tracer.still_there(tid, "setting registers", set)?;
        }
        let unblocked = ptrace::set_signal_mask(tid, mask);
        tracer.still_there(tid, "setting the mask", unblocked)?;
        tracer.send_postponed();
        // A signal that came during the loan is a reason for `EINTR` only if the thread had
        // not been interrupted by us before it: it had, so the call is rewound; the signal's
        // own stop follows at once and undoes that where it has a handler.
        if registers.would_show_eintr() {
            tracer.rewind(tid, &registers)?;
        }
        tracer.unhalt(tid, stop)
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        // After a panic in the closure. An error here has nowhere to go, and the thread that
        // it is about has most likely ended.
        drop(self.give_back());
    }
}
