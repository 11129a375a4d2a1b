//! Arithmetic and conditions as pure functions of two operands, RFC 9669 sections 4.1 to
//! 4.3. Takes instructions that [`crate::validate`] has passed.
//!
//! The corner cases: x / 0 = 0, x % 0 = x, MIN s/ -1 = MIN, MIN s% -1 = 0, shift counts are
//! masked, 32-bit results are zero-extended.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "truncating and reinterpreting is what these instructions are defined to do"
)]

use crate::insn::Insn;
use crate::opcode as op;

/// The new `dst` of a 64-bit operation on `dst` and the second operand.
pub(super) fn alu64(insn: Insn, dst: u64, operand: u64) -> u64 {
    let shift = operand as u32;
    match insn.code() {
        op::ADD => dst.wrapping_add(operand),
        op::SUB => dst.wrapping_sub(operand),
        op::MUL => dst.wrapping_mul(operand),
        op::DIV if operand == 0 => 0,
        op::DIV if insn.off == 1 => (dst as i64).wrapping_div(operand as i64) as u64,
        op::DIV => dst / operand,
        op::OR => dst | operand,
        op::AND => dst & operand,
        op::LSH => dst.wrapping_shl(shift),
        op::RSH => dst.wrapping_shr(shift),
        op::NEG => dst.wrapping_neg(),
        op::MOD if operand == 0 => dst,
        op::MOD if insn.off == 1 => (dst as i64).wrapping_rem(operand as i64) as u64,
        op::MOD => dst % operand,
        op::XOR => dst ^ operand,
        op::MOV => mov(insn, operand),
        op::ARSH => (dst as i64).wrapping_shr(shift) as u64,
        _ => swap_bytes(dst, insn.imm),
    }
}

/// The new `dst` of a 32-bit operation.
pub(super) fn alu32(insn: Insn, dst: u64, operand: u64) -> u64 {
    let (a, b) = (dst as u32, operand as u32);
    let result = match insn.code() {
        op::ADD => a.wrapping_add(b),
        op::SUB => a.wrapping_sub(b),
        op::MUL => a.wrapping_mul(b),
        op::DIV if b == 0 => 0,
        op::DIV if insn.off == 1 => (a as i32).wrapping_div(b as i32) as u32,
        op::DIV => a / b,
        op::OR => a | b,
        op::AND => a & b,
        op::LSH => a.wrapping_shl(b),
        op::RSH => a.wrapping_shr(b),
        op::NEG => a.wrapping_neg(),
        op::MOD if b == 0 => a,
        op::MOD if insn.off == 1 => (a as i32).wrapping_rem(b as i32) as u32,
        op::MOD => a % b,
        op::XOR => a ^ b,
        op::MOV => mov(insn, operand) as u32,
        op::ARSH => (a as i32).wrapping_shr(b) as u32,
        _ if insn.is_source_register() => return swap_bytes(dst, insn.imm),
        // To little endian, which memory is: only the width counts.
        _ => return truncate(dst, insn.imm),
    };
    u64::from(result)
}

/// Whether a jump goes to its target.
pub(super) fn is_taken(insn: Insn, dst: u64, operand: u64) -> bool {
    let (a, b) = match insn.class() {
        op::JMP32 => (u64::from(dst as u32), u64::from(operand as u32)),
        _ => (dst, operand),
    };
    let (signed_a, signed_b) = match insn.class() {
        op::JMP32 => (i64::from(a as i32), i64::from(b as i32)),
        _ => (a as i64, b as i64),
    };
    match insn.code() {
        op::JEQ => a == b,
        op::JGT => a > b,
        op::JGE => a >= b,
        op::JSET => a & b != 0,
        op::JNE => a != b,
        op::JSGT => signed_a > signed_b,
        op::JSGE => signed_a >= signed_b,
        op::JLT => a < b,
        op::JLE => a <= b,
        op::JSLT => signed_a < signed_b,
        op::JSLE => signed_a <= signed_b,
        _ => true,
    }
}

/// The low `bits` (8, 16, 32 or 64) of `value`, sign-extended.
pub(super) fn sign_extend(value: u64, bits: u32) -> u64 {
    let unused = 64 - bits;
    ((value << unused) as i64 >> unused) as u64
}

fn mov(insn: Insn, operand: u64) -> u64 {
    match insn.off {
        8 => sign_extend(operand, 8),
        16 => sign_extend(operand, 16),
        32 => sign_extend(operand, 32),
        _ => operand,
    }
}

fn swap_bytes(value: u64, bits: i32) -> u64 {
    match bits {
        16 => u64::from((value as u16).swap_bytes()),
        32 => u64::from((value as u32).swap_bytes()),
        _ => value.swap_bytes(),
    }
}

fn truncate(value: u64, bits: i32) -> u64 {
    match bits {
        16 => u64::from(value as u16),
        32 => u64::from(value as u32),
        _ => value,
    }
}
