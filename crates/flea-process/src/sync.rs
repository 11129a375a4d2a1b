//! Making every CPU that runs the target refetch its instructions.
//!
//! By membarrier(2), which a thread of the target calls for us, or by interrupting every thread that
//! runs: one that sleeps passes a serialising instruction before it executes anything.

use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::time::Instant;

use crate::proc::{Tid, Whereabouts};
use crate::remote::{Lender, RemoteError};
use crate::tracer::{TraceError, Tracer};
use crate::window::PARKED_AT_MOST;

const MEMBARRIER_SYNC_CORE: u64 = 32;
const MEMBARRIER_REGISTER_SYNC_CORE: u64 = 64;
/// Which registrations there are (since Linux 6.3).
const MEMBARRIER_GET_REGISTRATIONS: u64 = 512;
/// The process that was registered last. No more than a guess, for another one may have that number
/// by now, or it another program: then the kernel refuses to synchronise it.
static REGISTERED: AtomicI32 = AtomicI32::new(0);
/// Threads that are interrupted one by one in a moment.
const FEW_THREADS: usize = 4;
/// Threads of which it is quickly said who runs.
const SEEN_AT_A_GLANCE: usize = 16;
/// Interrupting as many, one stop each, takes less than borrowing one for a system call, which
/// has four.
const FEW_RUNNING: usize = 2;

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
    /// Returns once every CPU that runs the target has refetched its instructions.
    pub fn sync_core(&mut self) -> Result<(), TraceError> {
        self.refetch()?;
        self.traps.note_synced();
        self.pump()
    }

    fn refetch(&mut self) -> Result<(), TraceError> {
        self.pump()?;
        self.prepare_sync()?;
        if self.sync == SyncMethod::Interrupts {
            return self.sync_by_interrupts();
        }
        if !self.has_slow_stops && self.do_few_run() {
            let began = Instant::now();
            self.sync_by_interrupts()?;
            // They wait for a CPU, perhaps behind others: a thread that sleeps is served first.
            self.has_slow_stops = began.elapsed() > PARKED_AT_MOST;
            return Ok(());
        }
        let Err(error) = self.membarrier(Lender::Any, MEMBARRIER_SYNC_CORE) else {
            return Ok(());
        };
        match unless_over(error)? {
            RemoteError::NoThread { .. } => self.sync_by_interrupts(),
            _ => {
                // It has executed another program since, perhaps. Registering that one has to
                // wait until no breakpoint is in its text.
                let _other = REGISTERED.compare_exchange(self.pid, 0, Relaxed, Relaxed);
                self.sync = SyncMethod::Interrupts;
                self.sync_by_interrupts()
            }
        }
    }

    /// Registers the target for membarrier(2), once in its life. That takes as long as the
    /// kernel's RCU needs for a grace period, milliseconds, if it has several threads: so it is
    /// done before the first breakpoint, in a thread that sleeps anyway. Where none does and
    /// interrupting all of them is as quick, that will do this time.
    ///
    /// Nor is one asked twice in a row: borrowing a thread for it is a fifth of what a small change
    /// takes.
    pub(crate) fn prepare_sync(&mut self) -> Result<(), TraceError> {
        if self.sync != SyncMethod::Unknown {
            return Ok(());
        }
        if REGISTERED.load(Relaxed) == self.pid {
            self.sync = SyncMethod::Membarrier;
            return Ok(());
        }
        let register = MEMBARRIER_REGISTER_SYNC_CORE;
        let done = if self.tasks.len() == 1 {
            self.membarrier(Lender::Any, register).map(|_| true)
        } else {
            match self.membarrier(Lender::Sleeper, register) {
                Err(RemoteError::NoThread { .. }) if self.tasks.len() <= FEW_THREADS => self
                    .membarrier(Lender::Any, MEMBARRIER_GET_REGISTRATIONS)
                    .map(|registered| registered & register != 0),
                Err(RemoteError::NoThread { .. }) => {
                    self.membarrier(Lender::Any, register).map(|_| true)
                }
                outcome => outcome.map(|_| true),
            }
        };
        self.sync = match done {
            Ok(true) => {
                REGISTERED.store(self.pid, Relaxed);
                SyncMethod::Membarrier
            }
            Ok(false) => SyncMethod::Interrupts,
            Err(error) => {
                unless_over(error)?;
                SyncMethod::Interrupts
            }
        };
        Ok(())
    }

    fn membarrier(&mut self, lender: Lender, command: u64) -> Result<u64, RemoteError> {
        self.with_lender(lender, |thread| {
            thread.syscall(libc::SYS_membarrier, [command, 0, 0, 0, 0, 0])
        })
    }

    /// Whether no more threads run than are interrupted in less time than one is borrowed. In an
    /// idle process that is nobody, and nothing has to be stopped at all.
    fn do_few_run(&self) -> bool {
        let runs = |tid: &&Tid| self.whereabouts(**tid) == Whereabouts::Running;
        self.tasks.len() <= SEEN_AT_A_GLANCE
            && self.tasks.keys().filter(runs).nth(FEW_RUNNING).is_none()
    }

    fn sync_by_interrupts(&mut self) -> Result<(), TraceError> {
        for tid in self.threads() {
            if self.whereabouts(tid) != Whereabouts::Running {
                continue;
            }
            if let Some(stop) = self.halt_unless_asleep(tid)? {
                self.unhalt(tid, stop)?;
            }
        }
        Ok(())
    }
}

/// What a remote call failed for, unless the program is no more, which ends everything.
fn unless_over(error: RemoteError) -> Result<RemoteError, TraceError> {
    match error {
        RemoteError::Trace(error @ (TraceError::Gone { .. } | TraceError::Execed { .. })) => {
            Err(error)
        }
        other => Ok(other),
    }
}
