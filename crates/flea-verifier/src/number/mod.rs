//! Sets of numbers that a register may hold: the arithmetic of the verifier.
//!
//! Start at [`scalar::Scalar`], which is what a register holds; it is a [`range::Range`] of
//! its 64 bits and one of its lower 32. Knows nothing of registers, programs or memory.
//!
//! **Invariant**: for every operation, a concrete result of concrete members is a member of
//! the abstract result. `tests.rs` checks it exhaustively at 4 bits and at random at 64.

pub(crate) mod arith;
pub(crate) mod compare;
pub(crate) mod range;
pub(crate) mod scalar;
pub(crate) mod tnum;

#[cfg(test)]
pub(crate) mod tests;
