//! The verifier against running programs: a program that it accepts runs in a checking
//! interpreter. No access may leave its object, and before every instruction at least one of
//! the states that the verifier had there must describe the machine: every register, every
//! spilled register, every byte known to be zero, and the link of numbers with one id; but of
//! numbers, only those that something afterwards needed ([`crate::precision`]). What the program
//! returns is in the range that was said.
//!
//! For the tests of this crate and, with the feature `beliefs`, for the fuzzers.

#![allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]

mod interpret;
pub(crate) mod meaning;
#[cfg(test)]
mod tests;

use flea_object::spec::{MapSpec, Program};

use crate::cfg::Cfg;
use crate::explore::{Explorer, Patience};
use crate::liveness::{Liveness, ProgramResult};
use crate::machine::Machine;
use crate::op::{Op, decode};
use crate::precision::Needs;
use crate::state::State;
use crate::{Context, Rejection, Verified};
use interpret::Interpreter;

/// Where contents and results of helpers come from.
pub type Numbers<'a> = &'a mut dyn FnMut() -> u64;

/// An accepted program, and every state that the verifier had at every instruction.
pub struct Beliefs<'a> {
    verified: Verified,
    maps: &'a [MapSpec],
    context: Context,
    ops: Vec<Op>,
    states: Vec<Vec<(State, Needs)>>,
}

/// Why there is nothing to compare with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoBeliefs {
    /// The program is not accepted.
    #[error("{0}")]
    Refused(Rejection),
    /// Too many states to keep.
    #[error("too many states to keep")]
    TooMany,
    /// Two walks over one program ended differently: a fault of the verifier.
    #[error("two verdicts")]
    TwoVerdicts,
}

impl<'a> Beliefs<'a> {
    /// Verifies the program and keeps every state.
    ///
    /// # Errors
    /// [`NoBeliefs`]
    pub fn of(program: &Program, maps: &'a [MapSpec], context: Context) -> Result<Self, NoBeliefs> {
        let verified = crate::verify(program, maps, context).map_err(NoBeliefs::Refused)?;
        let ops = decode(&program.insns).map_err(|_| NoBeliefs::TwoVerdicts)?;
        let states = states(program, maps, context, &ops)?;
        Ok(Self { verified, maps, context, ops, states })
    }

    /// What the compiler is told.
    #[must_use]
    pub fn verified(&self) -> &Verified {
        &self.verified
    }

    /// Runs the program once on a machine full of `numbers`.
    ///
    /// # Errors
    /// Where the machine did what the verifier had excluded.
    pub fn run(&self, numbers: Numbers<'_>) -> Result<u64, String> {
        let mut interpreter = Interpreter::new(&self.ops, self.maps, self.context, numbers);
        let r0 = interpreter.run(&self.states, &self.verified)?;
        let range = self.verified.return_range();
        let inside = range.contains(&r0.cast_signed());
        inside.then_some(r0).ok_or_else(|| format!("returns {r0:#x}, not in {range:?}"))
    }
}

fn states(
    program: &Program,
    maps: &[MapSpec],
    context: Context,
    ops: &[Op],
) -> Result<Vec<Vec<(State, Needs)>>, NoBeliefs> {
    let cfg = Cfg::new(ops).map_err(|_| NoBeliefs::TwoVerdicts)?;
    let live = Liveness::new(ops, &cfg, ProgramResult::of(program.kind));
    for patience in [Patience::Short, Patience::Endless] {
        let machine = Machine::new(maps, context, ops, &cfg);
        let mut explorer = Explorer::new(machine, program, &cfg, &live, patience).remembering();
        if explorer.run().is_ok() {
            return explorer.into_beliefs().ok_or(NoBeliefs::TooMany);
        }
    }
    Err(NoBeliefs::TwoVerdicts)
}
