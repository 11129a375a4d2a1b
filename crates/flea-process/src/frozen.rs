//! The whole process at one instant: every thread stopped at once.
//!
//! For a question that a moving process cannot answer: whether *nobody* holds a certain
//! pointer. A thread moves it from where we have not looked yet to where we have, and so on.
//! Everything else is asked of running processes (`survey`); this is for what is worth a pause
//! of milliseconds, which the caller keeps short.

use std::collections::BTreeSet;
use std::time::Duration;

use flea_symbols::addr::RemoteAddr;

use crate::proc::Tid;
use crate::ptrace::{self, Stop};
use crate::tracer::{TraceError, Tracer};

/// A thread that takes longer to stop sleeps uninterruptibly: then it is no instant of all.
const STOP_PATIENCE: Duration = Duration::from_millis(30);

/// A stopped thread.
#[derive(Clone, Debug)]
pub struct FrozenThread {
    /// Its number.
    pub tid: Tid,
    /// Its instruction pointer.
    pub pc: RemoteAddr,
    /// Its stack pointer.
    pub sp: RemoteAddr,
    /// Every word of every register, vector registers too.
    pub words: Vec<u64>,
}

impl Tracer {
    /// Stops all threads, lets `look` look, and lets them go on. `None` where not all of them
    /// could be stopped: one sleeps uninterruptibly, or one was being born.
    pub fn frozen<R>(
        &mut self,
        look: impl FnOnce(&Self, &[FrozenThread]) -> R,
    ) -> Result<Option<R>, TraceError> {
        self.pump()?;
        let mut halted = Vec::new();
        let threads = self.freeze(&mut halted);
        let seen = match &threads {
            Ok(Some(threads)) => Some(look(self, threads)),
            Ok(None) | Err(_) => None,
        };
        for (tid, stop) in halted {
            self.unhalt(tid, stop)?;
        }
        threads.map(|_| seen)
    }

    fn freeze(
        &mut self,
        halted: &mut Vec<(Tid, Stop)>,
    ) -> Result<Option<Vec<FrozenThread>>, TraceError> {
        let mut threads = Vec::new();
        let mut seen = BTreeSet::new();
        // Those born while we stop the others are stopped as well.
        while let Some(tid) = self.threads().into_iter().find(|&tid| seen.insert(tid)) {
            match self.halt(tid, STOP_PATIENCE) {
                Ok(Some(stop)) => halted.push((tid, stop)),
                Ok(None) if self.tasks.contains_key(&tid) => return Ok(None),
                // It has ended.
                Ok(None) => continue,
                Err(TraceError::Stuck { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
            let registers = ptrace::registers(tid);
            let Some(registers) = self.still_there(tid, "reading registers", registers)? else {
                return Ok(None);
            };
            let mut words = registers.words().to_vec();
            let vectors = ptrace::extended_state(tid);
            words.extend(self.still_there(tid, "reading registers", vectors)?.unwrap_or_default());
            threads.push(FrozenThread { tid, pc: registers.pc(), sp: registers.sp(), words });
        }
        // Somebody announced a thread that has not shown up yet.
        Ok(self.expected.is_empty().then_some(threads))
    }
}
