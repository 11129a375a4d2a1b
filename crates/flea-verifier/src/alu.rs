//! Arithmetic and moves: the new number, and which numbers stay linked.
//!
//! A copy is linked to its original, and so is a copy that a known number is added to or
//! subtracted from: `r2 = r1; r2 += 4; if r2 < 16 ...` says something of `r1`. **Invariant**: two
//! numbers get the same id only where one is the other plus a constant, or the lower half of that,
//! zero-extended, where [`Number::part`] says so. Any other operation breaks the link
//! (CVE-2026-43070).

use crate::machine::{Machine, any_of, number, operand, read};
use crate::number::scalar::{AluOp, Scalar, Width};
use crate::op::{Operand, Reg};
use crate::pointer;
use crate::report::Fault;
use crate::state::State;
use crate::value::{Number, Value};

impl Machine<'_> {
    /// `dst op= src`.
    pub(crate) fn alu(
        &mut self,
        state: &mut State,
        (op, width): (AluOp, Width),
        dst: Reg,
        src: Operand,
    ) -> Result<(), Fault> {
        let (a, b) = (read(state, dst)?, operand(state, src)?);
        let result = match (&a, &b) {
            (Value::Scalar(x), Value::Scalar(y)) => {
                let set = Scalar::alu(op, width, &x.set, &y.set);
                let linked = self.sum(state, (op, width), (dst, x), (src, y));
                Value::Scalar(linked.map_or(Number::unlinked(set), |n| Number { set, ..n }))
            }
            _ => {
                // How far a pointer is moved decides where it may be used.
                self.trail.need(dst);
                self.trail.need_operand(src);
                match pointer::arithmetic(op, width, (dst, &a), &b) {
                    Err(_) if self.are_numbers(&a, &b) => {
                        Value::scalar(Scalar::alu(op, width, &any_of(&a), &any_of(&b)))
                    }
                    result => result?,
                }
            }
        };
        state.set_reg(dst, result);
        Ok(())
    }

    /// `dst = src`.
    pub(crate) fn mov(
        &mut self,
        state: &mut State,
        width: Width,
        dst: Reg,
        src: Operand,
    ) -> Result<(), Fault> {
        let result = match (src, width) {
            (Operand::Imm(_), Width::W64) => operand(state, src)?,
            (Operand::Imm(imm), Width::W32) => {
                Value::scalar(Scalar::constant(u64::from(imm.cast_unsigned())))
            }
            (Operand::Reg(src), Width::W64) => {
                read(state, src)?;
                self.named(state, src)
            }
            (Operand::Reg(src), Width::W32) => {
                if matches!(read(state, src)?, Value::Pointer(_)) {
                    let text = format!("R{} partial copy of pointer", src.index());
                    return Err(Fault::new(text));
                }
                let set = number(state, src)?;
                if set.is_within(0, i64::from(u32::MAX)) {
                    self.named(state, src)
                } else {
                    Value::scalar(set.zero_extend(32))
                }
            }
        };
        state.set_reg(dst, result);
        Ok(())
    }

    /// `dst = (s8)src` and so on.
    pub(crate) fn mov_extended(
        &mut self,
        state: &mut State,
        width: Width,
        bits: u32,
        dst: Reg,
        src: Reg,
    ) -> Result<(), Fault> {
        let set = number(state, src)?;
        let far = i64::MAX >> (64 - bits);
        // What is cut off and put back is the sign alone; 32 bits are zero-extended then.
        let lowest = if width == Width::W64 { -far - 1 } else { 0 };
        let result = if set.is_within(lowest, far) {
            self.named(state, src)
        } else {
            Value::scalar(set.sign_extend(bits, width))
        };
        state.set_reg(dst, result);
        Ok(())
    }

    /// The value of `reg`, about to be copied: a number that is not known gets an id first,
    /// so that what is learnt of the copy holds for it too.
    pub(crate) fn named(&mut self, state: &mut State, reg: Reg) -> Value {
        if let Value::Scalar(Number { set, id: None, .. }) = *state.reg(reg)
            && set.as_const().is_none()
        {
            let id = Some(self.fresh_id());
            state.set_reg(reg, Value::Scalar(Number { id, ..Number::unlinked(set) }));
        }
        *state.reg(reg)
    }

    /// The link of `dst op= src` (its set is for the caller to fill in), if it is a linked number
    /// plus or minus a known one.
    fn sum(
        &mut self,
        state: &mut State,
        (op, width): (AluOp, Width),
        (_, a): (Reg, &Number),
        (src, b): (Operand, &Number),
    ) -> Option<Number> {
        let constant = |n: &Number| {
            let c = n.set.as_const()?;
            Some(if width == Width::W64 { c } else { sign_extended(c) })
        };
        let (linked, by) = match (op, src) {
            (AluOp::Add, _) if b.set.as_const().is_some() => (*a, constant(b)?),
            (AluOp::Sub, _) => (*a, constant(b)?.wrapping_neg()),
            (AluOp::Add, Operand::Reg(src)) => {
                let by = constant(a)?;
                match self.named(state, src) {
                    Value::Scalar(n) => (n, by),
                    _ => return None,
                }
            }
            _ => return None,
        };
        linked.id?;
        let delta = linked.delta.wrapping_add(by);
        let part = match (width, linked.part) {
            // The 64-bit sum would be the same, or is only half known anyway.
            (Width::W32, part) if stays_in_half(&linked.set, by) => part,
            (Width::W32, _) => Width::W32,
            (Width::W64, Width::W64) => Width::W64,
            (Width::W64, Width::W32) if stays_in_half(&linked.set, by) => Width::W32,
            (Width::W64, Width::W32) => return None,
        };
        Some(Number { delta, part, ..linked })
    }
}

/// The lower half of `c`, sign-extended.
fn sign_extended(c: u64) -> u64 {
    Scalar::constant(c).sign_extend(32, Width::W64).as_const().unwrap_or(c)
}

/// All of `set` plus `by`, a signed number, is what 32 bits hold, before and after.
fn stays_in_half(set: &Scalar, by: u64) -> bool {
    let half = 0..=i128::from(u32::MAX);
    let by = i128::from(by.cast_signed());
    let (min, max) = (i128::from(set.wide.umin), i128::from(set.wide.umax));
    half.contains(&max) && half.contains(&(min + by)) && half.contains(&(max + by))
}
