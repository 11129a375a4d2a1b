//! What seccomp would do to the target for code of ours.
//!
//! # What is protected, and by what
//!
//! Protected: a target that is killed for a system call which it would never have made. Calls that
//! *we* make in a borrowed thread are not judged: PTRACE_O_SUSPEND_SECCOMP (`remote`). But code
//! that stays in the target makes calls long after we have gone, so those are asked for before
//! any of it is put there:
//! 1. A thread in strict mode may make none of them.
//! 2. A thread with filters: they are read (PTRACE_SECCOMP_GET_FILTER) and judged by
//!    [`filter::judge`]. Reading takes what suspending takes: CAP_SYS_ADMIN, and no filter on
//!    ourselves. Where they cannot be read, nothing may be put there.
//!
//! Not protected: filters that the target installs later.

mod filter;

pub(crate) use filter::Insn as FilterInsn;
pub use filter::{SystemCall, Verdict};

use nix::errno::Errno;

use crate::proc::{self, Tid};
use crate::ptrace;
use crate::remote::RemoteError;
use crate::tracer::{TraceError, Tracer};

/// The kernel allows 32768 instructions in all filters of a thread together.
const MOST_FILTERS: usize = 1 << 15;

/// What seccomp does with a thread's system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum SeccompMode {
    /// Nothing.
    #[default]
    Off,
    /// Only read, write, exit and sigreturn are left.
    Strict,
    /// Filters judge them.
    Filter,
}

impl Tracer {
    /// Fails unless every thread may make all of `calls`.
    pub fn check_system_calls(&mut self, calls: &[SystemCall]) -> Result<(), RemoteError> {
        self.pump()?;
        for tid in self.threads() {
            let Ok(status) = proc::thread_status(self.process_of(tid), tid) else { continue };
            let worst = match status.seccomp {
                SeccompMode::Off => continue,
                SeccompMode::Strict => calls.iter().map(|_| Verdict::Kills).collect(),
                SeccompMode::Filter => self.judge(tid, calls)?,
            };
            let verdicts = worst.iter().zip(calls).filter(|(v, _)| **v != Verdict::Allowed);
            let (verdicts, names): (Vec<Verdict>, Vec<_>) =
                verdicts.map(|(verdict, call)| (*verdict, call.name)).unzip();
            if let Some(&verdict) = verdicts.iter().min() {
                return Err(RemoteError::Forbidden { pid: self.pid, tid, names, verdict });
            }
        }
        Ok(())
    }

    /// The worst that any filter of the thread does to each of the calls.
    fn judge(&mut self, tid: Tid, calls: &[SystemCall]) -> Result<Vec<Verdict>, RemoteError> {
        let Some(stop) = self.halt_unless_asleep(tid)? else {
            if self.tasks.contains_key(&tid) {
                // Asleep where it cannot be asked: what its filters do is not known.
                return Err(RemoteError::NoThread { pid: self.pid });
            }
            return Ok(Vec::new());
        };
        let filters = self.filters(tid);
        self.unhalt(tid, stop)?;
        let filters = filters?;
        let worst = |call| {
            let verdicts = filters.iter().map(|filter| filter::judge(filter, call));
            verdicts.min().unwrap_or(Verdict::Allowed)
        };
        Ok(calls.iter().map(worst).collect())
    }

    /// The filters of a stopped thread.
    fn filters(&mut self, tid: Tid) -> Result<Vec<Vec<FilterInsn>>, RemoteError> {
        let mut filters = Vec::new();
        for index in 0..MOST_FILTERS {
            match ptrace::seccomp_filter(tid, index) {
                Ok(filter) => filters.push(filter),
                // There is none with that number; or the thread has ended.
                Err(Errno::ENOENT | Errno::ESRCH) => break,
                Err(Errno::EACCES | Errno::EPERM | Errno::EIO | Errno::EINVAL) => {
                    return Err(RemoteError::Seccomp { pid: self.pid });
                }
                Err(errno) => {
                    let request = "reading the seccomp filters";
                    return Err(TraceError::Ptrace { request, tid, errno }.into());
                }
            }
        }
        Ok(filters)
    }
}
