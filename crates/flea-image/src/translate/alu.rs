//! Arithmetic. 32-bit operations compute in `i32` and zero-extend; division never traps:
//! `x / 0 = 0`, `x % 0 = x`, and the most negative number over -1 is itself.

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{InstBuilder, Type, Value, types};
use flea_object::insn::Insn;
use flea_verifier::facts::Operands;

use super::{Scope, Translator, op};
use crate::clif::select;
use crate::request::CompileError;

/// Which divisors would trap, as far as it is not known that they do not come up.
#[derive(Clone, Copy)]
struct Traps {
    zero: bool,
    minus_one: bool,
}

impl Traps {
    fn of(divisor: Operands, ty: Type, insn: Insn) -> Self {
        let all_ones = u64::MAX >> (64 - ty.bits());
        // An immediate is seen by Cranelift itself.
        let known = insn.opcode & op::X != 0;
        Self { zero: !known || divisor.min == 0, minus_one: !known || divisor.max >= all_ones }
    }
}

impl Translator<'_, '_> {
    pub(super) fn alu(&mut self, scope: &Scope, idx: u32, insn: Insn) -> Result<(), CompileError> {
        let unsupported = CompileError::Unsupported { insn_idx: idx, opcode: insn.opcode };
        let wide = op::class(insn.opcode) == op::ALU64;
        let ty = if wide { types::I64 } else { types::I32 };
        if insn.opcode & 0xf0 == op::END {
            let value = self.end(scope, insn, wide).ok_or(unsupported)?;
            self.set(scope, insn.dst, value);
            return Ok(());
        }
        if insn.opcode == (op::ALU | op::X | op::MOV)
            && insn.off == 0
            && self.used.verified.operands(idx).max <= u64::from(u32::MAX)
        {
            // Its upper half is 0 already.
            let value = self.reg(scope, insn.src);
            self.set(scope, insn.dst, value);
            return Ok(());
        }
        let b = if insn.opcode & op::X != 0 {
            let reg = self.reg(scope, insn.src);
            self.narrow(reg, ty)
        } else {
            self.imm(insn.imm, ty)
        };
        let a = self.reg(scope, insn.dst);
        let a = self.narrow(a, ty);
        let value = match insn.opcode & 0xf0 {
            op::ADD => self.b.ins().iadd(a, b),
            op::SUB => self.b.ins().isub(a, b),
            op::MUL => self.b.ins().imul(a, b),
            op::OR => self.b.ins().bor(a, b),
            op::AND => self.b.ins().band(a, b),
            op::XOR => self.b.ins().bxor(a, b),
            // CLIF masks shift amounts as BPF does.
            op::LSH => self.b.ins().ishl(a, b),
            op::RSH => self.b.ins().ushr(a, b),
            op::ARSH => self.b.ins().sshr(a, b),
            op::NEG => self.b.ins().ineg(a),
            op::DIV | op::MOD => {
                let remainder = insn.opcode & 0xf0 == op::MOD;
                let traps = Traps::of(self.used.verified.operands(idx), ty, insn);
                match (insn.off, remainder) {
                    (0, false) => self.udiv(a, b, traps),
                    (0, true) => self.urem(a, b, traps),
                    (1, false) => self.sdiv(a, b, traps),
                    (1, true) => self.srem(a, b, traps),
                    _ => return Err(unsupported),
                }
            }
            op::MOV => match (insn.off, wide) {
                (0, _) => b,
                (8, _) => self.sign_extend(b, types::I8, ty),
                (16, _) => self.sign_extend(b, types::I16, ty),
                (32, true) => self.sign_extend(b, types::I32, ty),
                _ => return Err(unsupported),
            },
            _ => return Err(unsupported),
        };
        let value = self.widen(value);
        self.set(scope, insn.dst, value);
        Ok(())
    }

    /// Byte swaps and truncations. `None` for an undefined width.
    fn end(&mut self, scope: &Scope, insn: Insn, wide: bool) -> Option<Value> {
        // The 64-bit class swaps always; the 32-bit class swaps to big endian and merely
        // truncates to little endian.
        let swap = wide || insn.opcode & op::X != 0;
        let ty = match insn.imm {
            16 => types::I16,
            32 => types::I32,
            64 => types::I64,
            _ => return None,
        };
        let value = self.reg(scope, insn.dst);
        let value = self.narrow(value, ty);
        let value = if swap { self.b.ins().bswap(value) } else { value };
        Some(self.widen(value))
    }

    /// The low bits of a 64-bit value.
    pub(super) fn narrow(&mut self, value: Value, ty: Type) -> Value {
        if ty == types::I64 { value } else { self.b.ins().ireduce(ty, value) }
    }

    /// An immediate operand: sign-extended to 64 bits.
    pub(super) fn imm(&mut self, imm: i32, ty: Type) -> Value {
        let value = if ty == types::I64 { i64::from(imm) } else { i64::from(imm.cast_unsigned()) };
        self.b.ins().iconst(ty, value)
    }

    fn sign_extend(&mut self, value: Value, from: Type, to: Type) -> Value {
        let low = self.b.ins().ireduce(from, value);
        self.b.ins().sextend(to, low)
    }

    fn is(&mut self, value: Value, constant: i64) -> Value {
        self.b.ins().icmp_imm_s(IntCC::Equal, value, constant)
    }

    /// `divisor`, with 1 in place of the values in `instead` that would trap.
    fn safe_divisor(&mut self, divisor: Value, traps: Value) -> Value {
        let ty = self.type_of(divisor);
        let one = self.b.ins().iconst(ty, 1);
        select(self.b, traps, one, divisor)
    }

    fn udiv(&mut self, a: Value, d: Value, traps: Traps) -> Value {
        if !traps.zero {
            return self.b.ins().udiv(a, d);
        }
        let by_zero = self.is(d, 0);
        let safe = self.safe_divisor(d, by_zero);
        let quotient = self.b.ins().udiv(a, safe);
        let ty = self.type_of(a);
        let zero = self.b.ins().iconst(ty, 0);
        select(self.b, by_zero, zero, quotient)
    }

    fn urem(&mut self, a: Value, d: Value, traps: Traps) -> Value {
        if !traps.zero {
            return self.b.ins().urem(a, d);
        }
        let by_zero = self.is(d, 0);
        let safe = self.safe_divisor(d, by_zero);
        let rest = self.b.ins().urem(a, safe);
        select(self.b, by_zero, a, rest)
    }

    fn sdiv(&mut self, a: Value, d: Value, traps: Traps) -> Value {
        let by_zero = traps.zero.then(|| self.is(d, 0));
        let by_minus_one = traps.minus_one.then(|| self.is(d, -1));
        let safe = self.safe_signed_divisor(d, by_zero, by_minus_one);
        let mut quotient = self.b.ins().sdiv(a, safe);
        if let Some(by_zero) = by_zero {
            let ty = self.type_of(a);
            let zero = self.b.ins().iconst(ty, 0);
            quotient = select(self.b, by_zero, zero, quotient);
        }
        let Some(by_minus_one) = by_minus_one else { return quotient };
        let negated = self.b.ins().ineg(a);
        select(self.b, by_minus_one, negated, quotient)
    }

    fn srem(&mut self, a: Value, d: Value, traps: Traps) -> Value {
        let by_zero = traps.zero.then(|| self.is(d, 0));
        let by_minus_one = traps.minus_one.then(|| self.is(d, -1));
        // With 1 for -1 the rest is 0, as it should be.
        let safe = self.safe_signed_divisor(d, by_zero, by_minus_one);
        let rest = self.b.ins().srem(a, safe);
        by_zero.map_or(rest, |by_zero| select(self.b, by_zero, a, rest))
    }

    /// `divisor`, with 1 in place of what these tests have found, those that were made.
    fn safe_signed_divisor(
        &mut self,
        divisor: Value,
        by_zero: Option<Value>,
        by_minus_one: Option<Value>,
    ) -> Value {
        let traps = match (by_zero, by_minus_one) {
            (None, None) => return divisor,
            (Some(one), None) | (None, Some(one)) => one,
            (Some(zero), Some(minus_one)) => self.b.ins().bor(zero, minus_one),
        };
        self.safe_divisor(divisor, traps)
    }
}
