//! What arithmetic and comparisons mean, from RFC 9669's text on plain integers, apart from the
//! code under test.

use crate::number::compare::Cond;
use crate::number::scalar::AluOp;
use crate::number::tnum::low_bits;

pub(crate) fn sext(x: u64, bits: u32) -> i64 {
    ((x << (64 - bits)) as i64) >> (64 - bits)
}

/// RFC 9669's arithmetic at any width.
pub(crate) fn concrete(op: AluOp, bits: u32, a: u64, b: u64) -> u64 {
    let (a, b) = (a & low_bits(bits), b & low_bits(bits));
    let (sa, sb) = (sext(a, bits), sext(b, bits));
    let k = b & u64::from(bits - 1);
    let r = match op {
        AluOp::Add => a.wrapping_add(b),
        AluOp::Sub => a.wrapping_sub(b),
        AluOp::Mul => a.wrapping_mul(b),
        AluOp::Div => a.checked_div(b).unwrap_or(0),
        AluOp::Mod => a.checked_rem(b).unwrap_or(a),
        AluOp::Sdiv if b == 0 => 0,
        AluOp::Sdiv => sa.wrapping_div(sb) as u64,
        AluOp::Smod if b == 0 => a,
        AluOp::Smod => sa.wrapping_rem(sb) as u64,
        AluOp::Or => a | b,
        AluOp::And => a & b,
        AluOp::Xor => a ^ b,
        AluOp::Lsh => a << k,
        AluOp::Rsh => a >> k,
        AluOp::Arsh => (sa >> k) as u64,
    };
    r & low_bits(bits)
}

pub(crate) fn holds(cond: Cond, bits: u32, a: u64, b: u64) -> bool {
    let (a, b) = (a & low_bits(bits), b & low_bits(bits));
    let (sa, sb) = (sext(a, bits), sext(b, bits));
    match cond {
        Cond::Eq => a == b,
        Cond::Ne => a != b,
        Cond::Gt => a > b,
        Cond::Ge => a >= b,
        Cond::Lt => a < b,
        Cond::Le => a <= b,
        Cond::Sgt => sa > sb,
        Cond::Sge => sa >= sb,
        Cond::Slt => sa < sb,
        Cond::Sle => sa <= sb,
        Cond::Set => a & b != 0,
        Cond::Unset => a & b == 0,
    }
}
