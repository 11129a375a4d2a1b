//! What goes wrong for one controller: an operation fails, or all from there on, or all of one
//! kind; it is killed; the process ends under its hands.

use std::io::ErrorKind;

use flea_process::{Errno, MemoryError, TraceError};
use flea_symbols::addr::RemoteAddr;

use crate::dice::Dice;

/// What is asked of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Reading its memory.
    Read,
    /// Writing memory that nobody executes.
    Write,
    /// Writing text.
    WriteText,
    /// Making CPUs refetch.
    Sync,
    /// Answering breakpoints from now on.
    Arm,
    /// No more.
    Disarm,
    /// Looking where threads are.
    Look,
    /// Moving threads.
    Evacuate,
    /// Letting those go on that were kept waiting.
    Release,
    /// Waiting for the last traps.
    Drain,
    /// Letting it run.
    Wait,
    /// Reading stacks.
    Stacks,
    /// Reading the memory map.
    Maps,
    /// Mapping memory.
    Map,
    /// Unmapping it.
    Unmap,
}

const KINDS: [Op; 15] = [
    Op::Read,
    Op::Write,
    Op::WriteText,
    Op::Sync,
    Op::Arm,
    Op::Disarm,
    Op::Look,
    Op::Evacuate,
    Op::Release,
    Op::Drain,
    Op::Wait,
    Op::Stacks,
    Op::Maps,
    Op::Map,
    Op::Unmap,
];

/// What comes of an operation that is not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Denied {
    /// Because the process has ended, or nobody is there to ask.
    pub gone: bool,
}

/// What goes wrong, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Nothing.
    Nothing,
    /// An operation, or one of that kind, fails.
    Fails {
        /// Which; any where it is not said.
        only: Option<Op>,
        /// And all of them from then on.
        for_ever: bool,
    },
    /// The controller is killed. What is being committed is finished: the tracer is a process of
    /// its own.
    Killed,
    /// The process ends.
    Vanishes,
}

/// What goes wrong for one controller, as it comes about.
#[derive(Clone, Debug)]
pub struct Trouble {
    /// What.
    pub what: What,
    /// Operations that it may make until then.
    left: u64,
    /// It has come about.
    pub has_struck: bool,
    /// A commit is under way.
    pub in_commit: bool,
}

impl Trouble {
    /// None at all.
    #[must_use]
    pub fn none() -> Self {
        Self { what: What::Nothing, left: 0, has_struck: false, in_commit: false }
    }

    /// Some, or none.
    pub fn roll(dice: &mut Dice) -> Self {
        let only = (!dice.one_in(3)).then(|| KINDS[dice.index(KINDS.len())]);
        let what = match dice.below(8) {
            0 | 1 => What::Fails { only, for_ever: false },
            2 => What::Fails { only, for_ever: true },
            3 | 4 => What::Killed,
            5 if dice.one_in(6) => What::Vanishes,
            _ => What::Nothing,
        };
        let most = match what {
            What::Fails { only: Some(_), .. } => 6,
            _ => 90,
        };
        Self { what, left: dice.below(most), has_struck: false, in_commit: false }
    }

    /// A commit begins, unless nobody is left to make one.
    pub fn begin_commit(&mut self) {
        self.in_commit = !self.has_struck;
    }

    /// Whether operation `op` is made.
    pub fn meets(&mut self, op: Op) -> Result<(), Denied> {
        let concerns = match self.what {
            What::Nothing => return Ok(()),
            What::Fails { only, .. } => only.is_none_or(|only| only == op),
            What::Killed | What::Vanishes => true,
        };
        if self.has_struck {
            return match self.what {
                What::Fails { for_ever: true, .. } if concerns => Err(Denied { gone: false }),
                What::Killed if self.in_commit => Ok(()),
                What::Killed | What::Vanishes => Err(Denied { gone: true }),
                _ => Ok(()),
            };
        }
        if !concerns {
            return Ok(());
        }
        match self.left.checked_sub(1) {
            Some(left) => self.left = left,
            None => {
                self.has_struck = true;
                return match self.what {
                    What::Killed if self.in_commit => Ok(()),
                    What::Killed | What::Vanishes => Err(Denied { gone: true }),
                    _ => Err(Denied { gone: false }),
                };
            }
        }
        Ok(())
    }
}

/// As flea-process says it.
pub fn memory_error(denied: Denied, doing: &'static str, at: RemoteAddr, n: usize) -> MemoryError {
    let (size_bytes, stopped_at) = (n, at);
    match denied.gone {
        true => MemoryError::Gone { doing, at, size_bytes },
        false => {
            let reason = ErrorKind::OutOfMemory.into();
            MemoryError::Unmapped { doing, at, size_bytes, stopped_at, reason }
        }
    }
}

/// As flea-process says it.
pub fn trace_error(denied: Denied) -> TraceError {
    match denied.gone {
        true => TraceError::Gone { pid: 1 },
        false => TraceError::Ptrace { request: "what was to fail", tid: 1, errno: Errno::EIO },
    }
}
