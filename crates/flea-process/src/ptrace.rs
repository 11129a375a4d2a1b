//! ptrace(2) and waitid(2) as safe functions of plain data, and nothing more. Whoever calls
//! them must be the tracer *thread*: the kernel answers any other with ESRCH.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr;
use std::time::Duration;

use nix::errno::Errno;

use crate::proc::{SignalSet, Tid};
use crate::seccomp::FilterInsn;
use crate::x86_64::Registers;

const EVENT_STOP: i32 = 128;
const SECCOMP_GET_FILTER: u32 = 0x420c;
const GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;
/// `NT_X86_XSTATE` (<elf.h>).
const NT_X86_XSTATE: usize = 0x202;
/// More than any processor's: AMX tiles make it 11 KiB.
const XSTATE_WORDS: usize = 4096;
const SIGSET_BYTES: usize = 8;

/// Why a traced thread stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// A signal is about to be delivered.
    Signal(i32),
    /// Entry or exit of a system call, asked for by `resume_to_syscall`.
    Syscall,
    /// PTRACE_INTERRUPT, the start of a new thread, or the end of a group stop.
    Interrupted,
    /// The whole process is stopped by this signal.
    Group(i32),
    /// A PTRACE_EVENT_* other than the stop.
    Event(i32),
    /// At a breakpoint of ours; answered, but not resumed yet. See `window`.
    Parked,
}

/// Whose stops to ask for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Whose {
    /// Any traced thread's.
    Any,
    /// This thread's.
    Thread(Tid),
}

fn request(op: u32, tid: Tid, addr: usize, data: *mut c_void) -> Result<i64, Errno> {
    // SAFETY: every caller in this file passes as `data` either a plain number or a pointer
    // to a live local of the size that `op` is documented to access; `addr` is never a
    // pointer of ours.
    let result = unsafe { libc::ptrace(op, tid, addr as *mut c_void, data) };
    if result == -1 { Err(Errno::last()) } else { Ok(result) }
}

fn number(data: usize) -> *mut c_void {
    ptr::without_provenance_mut(data)
}

/// Becomes the tracer of `tid` without stopping it.
pub(crate) fn seize(tid: Tid, options: i32) -> Result<(), Errno> {
    let options = usize::try_from(options).map_err(|_| Errno::EINVAL)?;
    request(libc::PTRACE_SEIZE, tid, 0, number(options)).map(drop)
}

/// Changes the options of a stopped thread.
pub(crate) fn set_options(tid: Tid, options: i32) -> Result<(), Errno> {
    let options = usize::try_from(options).map_err(|_| Errno::EINVAL)?;
    request(libc::PTRACE_SETOPTIONS, tid, 0, number(options)).map(drop)
}

/// Asks a thread to stop. Any other stop that comes first consumes the request.
pub(crate) fn interrupt(tid: Tid) -> Result<(), Errno> {
    request(libc::PTRACE_INTERRUPT, tid, 0, number(0)).map(drop)
}

/// Lets a stopped thread go on, with `signal` delivered (0: none).
pub(crate) fn resume(tid: Tid, signal: i32) -> Result<(), Errno> {
    request(libc::PTRACE_CONT, tid, 0, number(signal_number(signal)?)).map(drop)
}

/// Lets a stopped thread go on to the next entry or exit of a system call.
pub(crate) fn resume_to_syscall(tid: Tid) -> Result<(), Errno> {
    request(libc::PTRACE_SYSCALL, tid, 0, number(0)).map(drop)
}

/// Lets a thread run one instruction.
pub(crate) fn single_step(tid: Tid) -> Result<(), Errno> {
    request(libc::PTRACE_SINGLESTEP, tid, 0, number(0)).map(drop)
}

/// Leaves a thread in its group stop, but hears of its end.
pub(crate) fn listen(tid: Tid) -> Result<(), Errno> {
    request(libc::PTRACE_LISTEN, tid, 0, number(0)).map(drop)
}

/// Lets go of a stopped thread, with `signal` delivered (0: none).
pub(crate) fn detach(tid: Tid, signal: i32) -> Result<(), Errno> {
    request(libc::PTRACE_DETACH, tid, 0, number(signal_number(signal)?)).map(drop)
}

/// The parameter of the present event: the new thread's number.
pub(crate) fn event_message(tid: Tid) -> Result<u64, Errno> {
    let mut message: u64 = 0;
    request(libc::PTRACE_GETEVENTMSG, tid, 0, (&raw mut message).cast())?;
    Ok(message)
}

/// The registers of a stopped thread.
pub(crate) fn registers(tid: Tid) -> Result<Registers, Errno> {
    let mut raw = MaybeUninit::<libc::user_regs_struct>::zeroed();
    request(libc::PTRACE_GETREGS, tid, 0, raw.as_mut_ptr().cast())?;
    // SAFETY: all integers, zeroed above and filled by the kernel.
    Ok(Registers::from_raw(unsafe { raw.assume_init() }))
}

/// The words of a stopped thread's vector and x87 registers, and whatever else XSAVE keeps.
pub(crate) fn extended_state(tid: Tid) -> Result<Vec<u64>, Errno> {
    let mut words = vec![0u64; XSTATE_WORDS];
    let mut area =
        libc::iovec { iov_base: words.as_mut_ptr().cast(), iov_len: size_of_val(&words[..]) };
    // The kernel writes `iov_len` bytes at most, and how many into it.
    request(libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, (&raw mut area).cast())?;
    words.truncate(area.iov_len / size_of::<u64>());
    Ok(words)
}

/// Sets the registers of a stopped thread.
pub(crate) fn set_registers(tid: Tid, registers: &Registers) -> Result<(), Errno> {
    let mut raw = *registers.raw();
    request(libc::PTRACE_SETREGS, tid, 0, (&raw mut raw).cast()).map(drop)
}

/// The signals that a stopped thread blocks. Where a system call has replaced the mask for
/// its duration (ppoll, sigsuspend), the one it will go back to.
pub(crate) fn signal_mask(tid: Tid) -> Result<SignalSet, Errno> {
    let mut mask: u64 = 0;
    request(libc::PTRACE_GETSIGMASK, tid, SIGSET_BYTES, (&raw mut mask).cast())?;
    Ok(SignalSet(mask))
}

/// Sets the signals that a stopped thread blocks.
pub(crate) fn set_signal_mask(tid: Tid, mask: SignalSet) -> Result<(), Errno> {
    let mut mask = mask.0;
    request(libc::PTRACE_SETSIGMASK, tid, SIGSET_BYTES, (&raw mut mask).cast()).map(drop)
}

/// `si_code` of the signal that a thread is stopped for.
pub(crate) fn signal_code(tid: Tid) -> Result<i32, Errno> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    request(libc::PTRACE_GETSIGINFO, tid, 0, info.as_mut_ptr().cast())?;
    // SAFETY: plain data, zeroed above and filled by the kernel.
    Ok(unsafe { info.assume_init() }.si_code)
}

/// Address of the thread's rseq area; none where it has not registered one, or where the
/// kernel (before 5.13) does not say.
pub(crate) fn rseq_area(tid: Tid) -> Option<u64> {
    let mut config = MaybeUninit::<libc::ptrace_rseq_configuration>::zeroed();
    let size = size_of::<libc::ptrace_rseq_configuration>();
    request(GET_RSEQ_CONFIGURATION, tid, size, config.as_mut_ptr().cast()).ok()?;
    // SAFETY: all integers, zeroed above and filled by the kernel.
    let area = unsafe { config.assume_init() }.rseq_abi_pointer;
    (area != 0).then_some(area)
}

/// The seccomp filter with this number of a stopped thread, the newest first; ENOENT behind the
/// last one.
pub(crate) fn seccomp_filter(tid: Tid, index: usize) -> Result<Vec<FilterInsn>, Errno> {
    let len = request(SECCOMP_GET_FILTER, tid, index, ptr::null_mut())?;
    let len = usize::try_from(len).map_err(|_| Errno::EINVAL)?;
    let mut raw = vec![libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 }; len];
    // The kernel writes the filter, which never changes: `len` instructions.
    request(SECCOMP_GET_FILTER, tid, index, raw.as_mut_ptr().cast())?;
    let insn = |raw: libc::sock_filter| FilterInsn {
        code: raw.code,
        if_true: raw.jt,
        if_false: raw.jf,
        k: raw.k,
    };
    Ok(raw.into_iter().map(insn).collect())
}

/// Whether system calls of a stopped thread may be sent to it as SIGSYS, by where they are made
/// (PR_SET_SYSCALL_USER_DISPATCH). Kernels before 6.4 do not say.
pub(crate) fn dispatches_syscalls(tid: Tid) -> bool {
    // struct ptrace_sud_config: mode, selector, offset, len.
    let mut config = [0u64; 4];
    let data = config.as_mut_ptr().cast();
    let asked = request(GET_SYSCALL_USER_DISPATCH_CONFIG, tid, size_of_val(&config), data);
    asked.is_ok() && config[0] != 0
}

/// The next stop that nobody has asked about yet; `None` where there is none at the moment.
pub(crate) fn poll_stop(whose: Whose) -> Result<Option<(Tid, Stop)>, Errno> {
    let Some(info) = wait(whose, libc::WSTOPPED)? else {
        return Ok(None);
    };
    // SAFETY: waitid has filled the child fields: it returned a child.
    let tid = unsafe { info.si_pid() };
    // SAFETY: as above.
    let status = unsafe { info.si_status() };
    Ok(Some((tid, decode(status))))
}

/// What has become of a traced thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// It stands still.
    Stop(Tid, Stop),
    /// It has ended, and was collected: its parent, if that is another process, is told by the
    /// kernel now.
    End(Tid),
}

/// The next stop or end that nobody has asked about yet. Not for a tracer in the process of the
/// tracees' parent: that would lose their exit status.
pub(crate) fn poll_news() -> Result<Option<News>, Errno> {
    let Some(info) = wait(Whose::Any, libc::WSTOPPED | libc::WEXITED)? else {
        return Ok(None);
    };
    // SAFETY: waitid has filled the child fields: it returned a child.
    let tid = unsafe { info.si_pid() };
    // SAFETY: as above.
    let status = unsafe { info.si_status() };
    Ok(Some(match info.si_code {
        libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED => News::End(tid),
        _ => News::Stop(tid, decode(status)),
    }))
}

/// Whether thread `tid` has ended. The exit status is left for the parent to collect.
///
/// The kernel reports a tracee's *stops* to its tracer whatever the options say ("we see
/// ptrace'd stopped tasks regardless of options", wait_task_stopped), so the code decides.
pub(crate) fn has_ended(tid: Tid) -> bool {
    match wait(Whose::Thread(tid), libc::WEXITED | libc::WNOWAIT) {
        Ok(Some(info)) => {
            matches!(info.si_code, libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED)
        }
        Ok(None) => false,
        Err(errno) => errno == Errno::ECHILD,
    }
}

/// Collects a thread that has ended, as `has_ended` says, so that an exec of the process need
/// not wait for us. Never call it for a process's first thread: its status belongs to the
/// parent.
pub(crate) fn reap(tid: Tid) {
    // Nothing to collect: the kernel has done so.
    let _collected = wait(Whose::Thread(tid), libc::WEXITED);
}

/// Waits until a stop of a tracee has been told of by SIGCHLD, which must be blocked and not
/// ignored, or for `most`. Whether there was one is not said.
pub(crate) fn wait_for_any_stop(most: Duration) {
    let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: a live local, which sigemptyset fills.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: as above; the signal's number is valid.
    unsafe { libc::sigaddset(set.as_mut_ptr(), libc::SIGCHLD) };
    let timeout = libc::timespec {
        tv_sec: most.as_secs().cast_signed(),
        tv_nsec: most.subsec_nanos().into(),
    };
    // SAFETY: both are live locals, and no information about the signal is asked for. It fails
    // when the time is over, which is as good.
    let _told = unsafe { libc::sigtimedwait(set.as_ptr(), ptr::null_mut(), &raw const timeout) };
}

fn wait(whose: Whose, what: i32) -> Result<Option<libc::siginfo_t>, Errno> {
    let (kind, id) = match whose {
        Whose::Any => (libc::P_ALL, 0),
        Whose::Thread(tid) => (libc::P_PID, tid.cast_unsigned()),
    };
    let options = what | libc::WNOHANG | libc::__WALL | libc::__WNOTHREAD;
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    loop {
        // SAFETY: `info` is a live local of the type asked for.
        let result = unsafe { libc::waitid(kind, id, info.as_mut_ptr(), options) };
        match Errno::result(result) {
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            // No tracee is left at all: nothing has stopped.
            Err(Errno::ECHILD) if matches!(whose, Whose::Any) => return Ok(None),
            Err(errno) => return Err(errno),
        }
    }
    // SAFETY: plain data, zeroed above; waitid leaves it so where nothing was found.
    let info = unsafe { info.assume_init() };
    // SAFETY: zeroed or filled with a child's fields; reading a pid is right for both.
    Ok((unsafe { info.si_pid() } != 0).then_some(info))
}

fn decode(status: i32) -> Stop {
    let signal = status & 0xff;
    match status >> 8 {
        0 if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
        0 => Stop::Signal(signal),
        EVENT_STOP if signal == libc::SIGTRAP => Stop::Interrupted,
        EVENT_STOP => Stop::Group(signal),
        event => Stop::Event(event),
    }
}

fn signal_number(signal: i32) -> Result<usize, Errno> {
    usize::try_from(signal).map_err(|_| Errno::EINVAL)
}
