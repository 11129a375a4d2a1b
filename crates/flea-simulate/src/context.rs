//! What one thread is in the middle of: registers, a stack, the calls on it. Coroutines have one
//! each as well, and no thread while they are switched away.

use std::ops::Range;

use flea_process::SIGNAL_FRAME_SEGMENTS;

/// Where the code is that calls functions: it is not part of the model.
pub const OUTSIDE: u64 = 0x10_0000;
/// Where handlers of signals are.
pub const HANDLER: u64 = 0x11_0000;
/// The first stack, and how far apart they are.
pub const STACKS: u64 = 0x7f00_0000_0000;
/// Bytes of one stack and what is between two.
pub const STACK_STRIDE: u64 = 0x2000;
/// Bytes of one stack.
pub const STACK_BYTES: u64 = 0x1000;

/// The stack pointer's number among the registers.
pub const RSP: usize = 4;
/// The frame pointer's.
pub const RBP: usize = 5;
/// One that callees keep.
pub const RBX: usize = 3;

/// Words below the stack pointer that a function may use.
const RED_ZONE_BYTES: u64 = 128;
/// As far as they matter here: rsp, rip, flags, segments, and others around them.
const SIGNAL_FRAME_BYTES: u64 = 64;
const SIGNAL_FRAME_RSP: u64 = 16;

/// What it does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// Executes what stands at `rip`.
    Runs,
    /// Sleeps in a system call, for so many looks.
    Sleeps(u64),
    /// Has run into a breakpoint, and waits for the tracer.
    Trapped,
}

/// A call that has not returned.
#[derive(Clone, Debug)]
pub struct Call {
    /// Which function.
    pub function: usize,
    /// When it was called.
    pub started: u64,
    /// Registers that have to be as before when it returns: rsp, rbp, rbx.
    pub kept: [u64; 3],
    /// Bodies that have run for it: number, and whether at exit.
    pub hits: Vec<(u32, bool)>,
}

/// A signal's handler that has not returned.
#[derive(Clone, Debug)]
pub struct Handler {
    /// What it interrupted.
    pub rip: u64,
    regs: [u64; 16],
    /// What it has left to do.
    pub left: u64,
    /// Where the interrupted instruction pointer is on the stack.
    pub frame: u64,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Context {
    /// The instruction pointer.
    pub rip: u64,
    /// In the order of their encoding.
    pub regs: [u64; 16],
    /// What it does next.
    pub doing: Doing,
    /// Innermost last.
    pub calls: Vec<Call>,
    /// Innermost last.
    pub handlers: Vec<Handler>,
    /// Return addresses that will be used: where they are, and what they are.
    pub returns: Vec<(u64, u64)>,
    base: u64,
    stack: Vec<u64>,
}

impl Context {
    /// Number `index`: it has called nothing yet.
    pub fn new(index: usize) -> Self {
        let base = STACKS + STACK_STRIDE * index as u64;
        let mut regs = [0; 16];
        regs[RSP] = base + STACK_BYTES - 64;
        (regs[RBP], regs[RBX]) = (0x5bb5, 0x5bb3);
        let stack = vec![0; usize::try_from(STACK_BYTES / 8).expect("a stack is small")];
        let (calls, handlers, returns) = (Vec::new(), Vec::new(), Vec::new());
        Self { rip: OUTSIDE, regs, doing: Doing::Runs, calls, handlers, returns, base, stack }
    }

    /// Its stack.
    pub fn stack(&self) -> Range<u64> {
        self.base..self.base + STACK_BYTES
    }

    /// The words of its stack, from the lowest.
    pub fn words(&self) -> &[u64] {
        &self.stack
    }

    fn index(&self, at: u64) -> Option<usize> {
        let into = at.checked_sub(self.base)?;
        let index = usize::try_from(into / 8).ok()?;
        (into.is_multiple_of(8) && index < self.stack.len()).then_some(index)
    }

    /// The word at `at`; none where that is not on its stack.
    pub fn load(&self, at: u64) -> Option<u64> {
        self.index(at).map(|index| self.stack[index])
    }

    /// Writes a word; whether it is on the stack.
    #[must_use]
    pub fn save(&mut self, at: u64, word: u64) -> bool {
        let index = self.index(at);
        index.map(|index| self.stack[index] = word).is_some()
    }

    /// Pushes a word; whether there was room.
    #[must_use]
    pub fn push(&mut self, word: u64) -> bool {
        self.regs[RSP] -= 8;
        self.save(self.regs[RSP], word)
    }

    /// Pops a word, if there is one.
    pub fn pop(&mut self) -> Option<u64> {
        let word = self.load(self.regs[RSP])?;
        self.regs[RSP] += 8;
        Some(word)
    }

    /// Calls `to`, coming back to `back`; whether there was room.
    #[must_use]
    pub fn call(&mut self, to: u64, back: u64) -> bool {
        let pushed = self.push(back);
        self.returns.push((self.regs[RSP], back));
        self.rip = to;
        pushed
    }

    /// A signal arrives.
    pub fn interrupt(&mut self, left: u64) {
        let before = (self.rip, self.regs);
        let rsp = self.regs[RSP];
        let frame = (rsp - RED_ZONE_BYTES - SIGNAL_FRAME_BYTES) & !15;
        for (i, word) in (0..).zip([rsp, self.rip, 0x202, SIGNAL_FRAME_SEGMENTS]) {
            let fits = self.save(frame + SIGNAL_FRAME_RSP + 8 * i, word);
            assert!(fits, "a stack has room for the few handlers that there are");
        }
        self.regs[RSP] = frame - 64;
        self.rip = HANDLER;
        self.doing = Doing::Runs;
        let frame = frame + SIGNAL_FRAME_RSP + 8;
        self.handlers.push(Handler { rip: before.0, regs: before.1, left, frame });
    }

    /// The innermost handler returns.
    pub fn return_from_handler(&mut self) {
        let handler = self.handlers.pop().expect("who is in a handler was interrupted");
        (self.rip, self.regs) = (handler.rip, handler.regs);
    }

    /// Whether it executes something in `range`, or will when it returns from somewhere.
    pub fn leads_into(&self, range: &Range<u64>) -> bool {
        range.contains(&self.rip)
            || self.handlers.iter().any(|handler| range.contains(&handler.rip))
            || self.returns.iter().any(|(_, back)| range.contains(back))
    }

    /// Overwrites what is left of calls that are over, as later calls would.
    pub fn scrub(&mut self) {
        let dead = self.regs[RSP].saturating_sub(self.base) / 8;
        let dead = usize::try_from(dead).unwrap_or(0).min(self.stack.len());
        self.stack[..dead].fill(0);
    }
}
