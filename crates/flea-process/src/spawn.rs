//! Starting a program that waits before its first instruction, so that it can be traced from
//! the very beginning.
//!
//! The new process stops itself (SIGSTOP) after the exec, before the dynamic loader has run.
//! In that state it is nobody's tracee, and [`crate::seize`] works on it as on any process.

use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use flea_symbols::addr::RemoteAddr;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid as NixPid;

use crate::memory::Memory;
use crate::proc::{self, Pid, Tid};
use crate::ptrace::{self, Stop, Whose};
use crate::seize::{SeizeError, seize};
use crate::tracer::{Pace, TraceError, Tracer};
use crate::x86_64::INT3;

/// How long the loader of a new program may take.
const RUN_PATIENCE: Duration = Duration::from_secs(60);
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// Why a program could not be started, or not be brought to where it should wait.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// There is no such program.
    #[error("there is no program {program:?} in PATH or at that place")]
    NotFound {
        /// As given.
        program: String,
    },
    /// It cannot be executed.
    #[error(
        "{program:?} cannot be executed: permission denied (is it a program, and may this user run it?)"
    )]
    NotExecutable {
        /// As given.
        program: String,
    },
    /// Another reason.
    #[error("starting {program:?}: {reason}")]
    Exec {
        /// As given.
        program: String,
        /// The system's word for it.
        reason: io::Error,
    },
    /// It ended before it got there.
    #[error("process {pid} ended before it reached {wanted}")]
    Ended {
        /// The process.
        pid: Pid,
        /// Where it was to wait.
        wanted: String,
    },
    /// It has not got there.
    #[error("process {pid} has not reached {wanted} within {waited_ms} ms")]
    Late {
        /// The process.
        pid: Pid,
        /// Where it was to wait.
        wanted: String,
        /// How long we waited.
        waited_ms: u64,
    },
    /// It could not be seized.
    #[error(transparent)]
    Seize(#[from] SeizeError),
    /// Tracing failed.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// A request to the kernel failed.
    #[error("{request} of process {pid}: {errno}")]
    Kernel {
        /// What was asked.
        request: &'static str,
        /// The process.
        pid: Pid,
        /// The kernel's word for it.
        errno: Errno,
    },
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// Killed by this signal.
    Signal(i32),
}

/// A started program. Dropping it leaves the process as it is: stopped, if not released.
#[derive(Debug)]
pub struct Spawned {
    child: Child,
    pid: Pid,
    released: bool,
}

/// Starts `command` and returns when it stands before its first instruction, stopped. It stays
/// in our process group: a terminal's Ctrl-C reaches both, and the caller decides what that
/// means for itself.
pub fn spawn(mut command: Command) -> Result<Spawned, SpawnError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let trace_me = || {
        // SAFETY: PTRACE_TRACEME reads none of the other arguments.
        let done = unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
        if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: between fork and exec the closure makes one system call and touches errno,
    // nothing else: no lock, no allocation.
    let command = unsafe { command.pre_exec(trace_me) };
    let child = command.spawn().map_err(|reason| match reason.kind() {
        io::ErrorKind::NotFound => SpawnError::NotFound { program },
        io::ErrorKind::PermissionDenied => SpawnError::NotExecutable { program },
        _ => SpawnError::Exec { program, reason },
    })?;
    let pid = Pid::try_from(child.id()).unwrap_or(-1);
    let spawned = Spawned { child, pid, released: false };
    // The exec of a traced process ends with a SIGTRAP. It is turned into the SIGSTOP.
    spawned.wait_for_stop("the exec")?;
    let kernel = |request| move |errno| SpawnError::Kernel { request, pid, errno };
    ptrace::detach(pid, libc::SIGSTOP).map_err(kernel("letting go"))?;
    spawned.wait_for_stop("its first instruction")?;
    Ok(spawned)
}

impl Spawned {
    /// The process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Its pipes, where the command asked for some.
    pub fn child_mut(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Lets the process run until it is about to execute the instruction at `addr` and
    /// `is_it` says yes (it is asked on each arrival), and stops it there again. For programs
    /// that have no second thread yet: the loader's `_dl_debug_state`, or the entry point.
    pub fn run_until(
        &mut self,
        addr: RemoteAddr,
        is_it: impl FnMut(&Memory) -> bool + Send,
    ) -> Result<(), SpawnError> {
        let pid = self.pid;
        seize(pid, move |tracer| run_to(tracer, addr, is_it, Standing::GroupStop))??;
        self.released = false;
        debug_assert_eq!(self.pid, pid);
        Ok(())
    }

    /// Lets the process run.
    pub fn release(&mut self) -> Result<(), SpawnError> {
        self.released = true;
        send(self.pid, Signal::SIGCONT)
    }

    /// Waits for its end; releases it first.
    pub fn wait(&mut self) -> Result<Exit, SpawnError> {
        if !self.released {
            self.release()?;
        }
        let program = String::new();
        let status = self.child.wait().map_err(|reason| SpawnError::Exec { program, reason })?;
        Ok(exit_of(status))
    }

    /// Its end, if it has come.
    pub fn try_wait(&mut self) -> Result<Option<Exit>, SpawnError> {
        let program = String::new();
        let status = self.child.try_wait();
        let status = status.map_err(|reason| SpawnError::Exec { program, reason })?;
        Ok(status.map(exit_of))
    }

    fn wait_for_stop(&self, wanted: &str) -> Result<(), SpawnError> {
        let pid = self.pid;
        let until = Instant::now() + STOP_PATIENCE;
        let mut pace = Pace::default();
        while Instant::now() < until {
            match ptrace::poll_stop(Whose::Thread(pid)) {
                Ok(Some(_)) => return Ok(()),
                Ok(None) if pace.is_slow() && ptrace::has_ended(pid) => {
                    return Err(SpawnError::Ended { pid, wanted: wanted.to_owned() });
                }
                Ok(None) => pace.rest(),
                Err(errno) => {
                    return Err(SpawnError::Kernel { request: "waiting for the stop", pid, errno });
                }
            }
        }
        let waited_ms = u64::try_from(STOP_PATIENCE.as_millis()).unwrap_or(u64::MAX);
        Err(SpawnError::Late { pid, wanted: wanted.to_owned(), waited_ms })
    }
}

fn exit_of(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, signal) => Exit::Signal(signal.unwrap_or(0)),
    }
}

fn send(pid: Pid, signal: Signal) -> Result<(), SpawnError> {
    kill(NixPid::from_raw(pid), signal).map_err(|errno| SpawnError::Kernel {
        request: "signalling",
        pid,
        errno,
    })
}

/// How a process with one thread stands still before and after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Stopped by a signal, which its parent hears of.
    GroupStop,
    /// Kept by the tracer, which nobody sees.
    Kept,
}

/// From one place where the process stands still to the next, with a breakpoint in between. What
/// stops it is pending before the thread is resumed from the breakpoint, so that it executes
/// nothing more.
pub(crate) fn run_to(
    tracer: &mut Tracer,
    addr: RemoteAddr,
    mut is_it: impl FnMut(&Memory) -> bool,
    standing: Standing,
) -> Result<(), SpawnError> {
    let pid = tracer.pid();
    let mut original = [0];
    tracer.memory().read(addr, &mut original).map_err(TraceError::from)?;
    tracer.memory().write(addr, &[INT3]).map_err(TraceError::from)?;
    match standing {
        Standing::GroupStop => send(pid, Signal::SIGCONT)?,
        Standing::Kept => tracer.let_kept_go()?,
    }
    let until = Instant::now() + RUN_PATIENCE;
    loop {
        let tid = wait_for_arrival(tracer, addr, until)?;
        tracer.memory().write(addr, &original).map_err(TraceError::from)?;
        let kernel = |request| move |errno| SpawnError::Kernel { request, pid, errno };
        let registers = ptrace::registers(tid).map_err(kernel("reading registers"))?;
        ptrace::set_registers(tid, &registers.with_pc(addr))
            .map_err(kernel("setting registers"))?;
        if is_it(tracer.memory()) {
            if standing == Standing::Kept {
                return Ok(tracer.keep(tid, until)?);
            }
            send(pid, Signal::SIGSTOP)?;
            tracer.resume(tid, 0)?;
            return wait_for_group_stop(tracer, until);
        }
        ptrace::single_step(tid).map_err(kernel("stepping"))?;
        wait_for_signal(tracer, until, addr)?;
        tracer.memory().write(addr, &[INT3]).map_err(TraceError::from)?;
        tracer.resume(tid, 0)?;
    }
}

fn wait_for_arrival(
    tracer: &mut Tracer,
    addr: RemoteAddr,
    until: Instant,
) -> Result<Tid, SpawnError> {
    loop {
        let tid = wait_for_signal(tracer, until, addr)?;
        if ptrace::registers(tid).is_ok_and(|regs| regs.pc() == addr.offset(1)) {
            return Ok(tid);
        }
        // A SIGTRAP of its own.
        tracer.resume(tid, libc::SIGTRAP)?;
    }
}

/// The next SIGTRAP stop; everything else is answered.
fn wait_for_signal(
    tracer: &mut Tracer,
    until: Instant,
    addr: RemoteAddr,
) -> Result<Tid, SpawnError> {
    let pid = tracer.pid();
    let mut pace = Pace::default();
    while Instant::now() < until {
        match tracer.poll(Whose::Any)? {
            Some((tid, Stop::Signal(libc::SIGTRAP))) => return Ok(tid),
            Some((tid, stop)) => tracer.answer(tid, stop)?,
            None => {
                tracer.check_alive()?;
                if pace.is_slow() && ptrace::has_ended(pid) {
                    return Err(SpawnError::Ended { pid, wanted: addr.to_string() });
                }
                pace.rest();
            }
        }
    }
    let waited_ms = u64::try_from(RUN_PATIENCE.as_millis()).unwrap_or(u64::MAX);
    Err(SpawnError::Late { pid, wanted: addr.to_string(), waited_ms })
}

fn wait_for_group_stop(tracer: &mut Tracer, until: Instant) -> Result<(), SpawnError> {
    let pid = tracer.pid();
    let mut pace = Pace::default();
    while Instant::now() < until {
        match tracer.poll(Whose::Any)? {
            Some((tid, stop)) => {
                tracer.answer(tid, stop)?;
                if matches!(stop, Stop::Group(_)) {
                    return Ok(());
                }
            }
            None => pace.rest(),
        }
    }
    let waited_ms = u64::try_from(RUN_PATIENCE.as_millis()).unwrap_or(u64::MAX);
    drop(proc::status(pid));
    Err(SpawnError::Late { pid, wanted: "its stop".to_owned(), waited_ms })
}
