//! The library that all functions are in, as far as its loader may take one of them away and bring
//! it back: with the file's bytes, at the same address, while nobody is in it and nobody calls it.
//!
//! What is simulated is the order that glibc keeps: it says what it is about to do, calls a function
//! for debuggers (the gate), does it, says that it has, and calls that function again.

use crate::functions::{STRIDE, TEXT};
use crate::machine::Machine;
use crate::text::INT3;

/// Where its `struct r_debug` is.
pub const R_DEBUG: u64 = 0x7100_0000;
/// Bytes of it.
pub const R_DEBUG_BYTES: u64 = 40;
const R_STATE_OFFSET: usize = 24;
const CONSISTENT: u32 = 0;
const DELETE: u32 = 2;
/// The CPU that its thread is on.
const CPU: usize = 0;

/// What it is in the middle of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Idle,
    /// On its way through the gate.
    Calls,
    /// At the gate's breakpoint.
    Waits,
    /// On the other side.
    Works,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Loader {
    /// Where the gate is.
    pub gate: u64,
    stage: Stage,
    state: u32,
    /// The function that is taken away and brought back: not called meanwhile.
    function: Option<usize>,
    /// When each function was brought back last.
    brought_back: Vec<Option<u64>>,
}

impl Loader {
    /// Of so many functions.
    pub fn new(n_functions: usize) -> Self {
        let gate = TEXT + STRIDE * n_functions as u64;
        let brought_back = vec![None; n_functions];
        Self { gate, stage: Stage::Idle, state: CONSISTENT, function: None, brought_back }
    }

    /// Whether the function is not there for who would call it.
    pub fn is_closed(&self, function: usize) -> bool {
        self.function == Some(function)
    }

    /// Whether it has been brought back since.
    pub fn has_reopened(&self, function: usize, since: u64) -> bool {
        self.brought_back[function].is_some_and(|at| at >= since)
    }

    /// Whether any has.
    pub fn has_reopened_any(&self, since: u64) -> bool {
        (0..self.brought_back.len()).any(|function| self.has_reopened(function, since))
    }

    /// Whether its thread stands at the gate's breakpoint.
    pub fn is_waiting(&self) -> bool {
        self.stage == Stage::Waits
    }

    /// Its thread executes the gate's instruction again.
    pub fn let_go(&mut self) {
        if self.is_waiting() {
            self.stage = Stage::Calls;
        }
    }

    /// Its `struct r_debug`.
    pub fn r_debug(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(R_DEBUG_BYTES).expect("a few")];
        bytes[0] = 1;
        bytes[R_STATE_OFFSET..][..4].copy_from_slice(&self.state.to_le_bytes());
        bytes
    }
}

impl Machine {
    /// The loader's thread does something, or not.
    pub fn step_loader(&mut self) {
        match self.loader.stage {
            Stage::Idle if self.is_quiet || !self.dice.one_in(60) => {}
            Stage::Idle => self.close_one(),
            Stage::Calls => self.pass_gate(),
            Stage::Waits => {}
            Stage::Works => self.bring_back(),
        }
    }

    fn close_one(&mut self) {
        let function = self.dice.index(self.functions.len());
        let is_called = |context: &crate::context::Context| {
            context.calls.iter().any(|call| call.function == function)
        };
        if self.contexts().any(is_called) || self.is_foreign(function) {
            return;
        }
        self.loader.function = Some(function);
        self.loader.state = DELETE;
        self.loader.stage = Stage::Calls;
        self.note(|| format!("loader: function {function} is to go"));
    }

    /// Whether another tool has changed the function.
    fn is_foreign(&self, function: usize) -> bool {
        let site = self.functions[function].site;
        self.text.from(site).is_some_and(|now| now.starts_with(&crate::case::FOREIGN))
    }

    fn pass_gate(&mut self) {
        let seen = self.text.fetch(CPU, self.loader.gate).map(|(seen, _)| seen[0]);
        if seen == Some(INT3) {
            if !self.traps.iter().any(|trap| trap.site.0 == self.loader.gate) {
                return self.violate("the loader dies of the gate's breakpoint".to_owned());
            }
            self.loader.stage = Stage::Waits;
            self.note(|| "loader: waits at the gate".to_owned());
            return;
        }
        self.loader.stage = match self.loader.state {
            CONSISTENT => Stage::Idle,
            _ => Stage::Works,
        };
        if self.loader.stage == Stage::Idle {
            self.loader.function = None;
        }
    }

    fn bring_back(&mut self) {
        let Some(function) = self.loader.function else { return };
        let (site, original) = (self.functions[function].site, self.functions[function].original());
        for (at, &byte) in (site..).zip(original) {
            let written = self.text.write(at, byte);
            assert!(written, "a function is there as long as the process");
        }
        // Other pages: no CPU has fetched from them.
        (0..self.text.n_cpus()).for_each(|cpu| self.text.forget_stale(cpu, site, original.len()));
        self.loader.brought_back[function] = Some(self.now);
        for body in self.bodies.iter_mut().filter(|body| body.function == function) {
            body.firm_since = None;
        }
        self.loader.state = CONSISTENT;
        self.loader.stage = Stage::Calls;
        self.note(|| format!("loader: function {function} is back"));
    }
}
