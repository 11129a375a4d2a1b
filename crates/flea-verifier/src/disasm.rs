//! Instructions as Linux's verifier log writes them.

use flea_object::helper::Helper;

use crate::number::compare::Cond;
use crate::number::scalar::{AluOp, Width};
use crate::op::{Atomic, Op, Operand, Place, Reg, Size};

/// `r1 = *(u64 *)(r10 -8)` and the like.
pub(crate) fn text(op: &Op) -> String {
    match *op {
        Op::Alu { op, width, dst, src } => {
            format!("{} {} {}", reg(width, dst), alu_symbol(op), operand(width, src))
        }
        Op::Neg { width, dst } => format!("{0} = -{0}", reg(width, dst)),
        Op::Mov { width, dst, src } => format!("{} = {}", reg(width, dst), operand(width, src)),
        Op::MovSx { width, bits, dst, src } => {
            format!("{} = (s{bits}){}", reg(width, dst), reg(width, src))
        }
        Op::Swap { bits, dst } => format!("r{0} = bswap{bits} r{0}", dst.index()),
        Op::Trunc { bits, dst } => format!("r{0} = le{bits} r{0}", dst.index()),
        Op::Const { dst, value } => format!("r{} = {value:#x}", dst.index()),
        Op::MapAddress { dst, map } => format!("r{} = map[{map}]", dst.index()),
        Op::MapValueAddress { dst, map, off } => {
            format!("r{} = map_value[{map}]+{off}", dst.index())
        }
        Op::SecondHalf => String::new(),
        Op::Load { dst, place, sign_extend } => {
            let sign = if sign_extend { 's' } else { 'u' };
            format!("r{} = *({sign}{})", dst.index(), address(place))
        }
        Op::Store { place, src } => {
            format!("*(u{}) = {}", address(place), operand(Width::W64, src))
        }
        Op::Atomic { op, fetch, place, src } => atomic(op, fetch, place, src),
        Op::Goto { target } => format!("goto {target}"),
        Op::If { cond, width, dst, src, target } => format!(
            "if {} {} {} goto {target}",
            reg(width, dst),
            cond_symbol(cond),
            operand(width, src)
        ),
        Op::CallHelper { id } => {
            let name = Helper::from_id(id).map_or("unknown", Helper::name);
            format!("call {name}#{id}")
        }
        Op::CallLocal { target } => format!("call {target}"),
        Op::Exit => "exit".into(),
    }
}

/// The registers that an instruction reads or writes, for the log.
pub(crate) fn registers(op: &Op) -> Vec<Reg> {
    let with = |a: Reg, b: Operand| match b {
        Operand::Reg(b) if a != b => vec![a, b],
        _ => vec![a],
    };
    match *op {
        Op::Alu { dst, src, .. } | Op::Mov { dst, src, .. } | Op::If { dst, src, .. } => {
            with(dst, src)
        }
        Op::MovSx { dst, src, .. } => with(dst, Operand::Reg(src)),
        Op::Neg { dst, .. }
        | Op::Swap { dst, .. }
        | Op::Trunc { dst, .. }
        | Op::Const { dst, .. }
        | Op::MapAddress { dst, .. }
        | Op::MapValueAddress { dst, .. } => vec![dst],
        Op::Load { dst, place, .. } => with(dst, Operand::Reg(place.base)),
        Op::Store { place, src } => with(place.base, src),
        Op::Atomic { place, src, .. } => with(place.base, Operand::Reg(src)),
        Op::CallHelper { .. } | Op::Exit => vec![Reg::R0],
        Op::CallLocal { .. } => (0..5).map(Reg::arg).collect(),
        Op::SecondHalf | Op::Goto { .. } => vec![],
    }
}

/// `+=` and so on.
pub(crate) const fn alu_symbol(op: AluOp) -> &'static str {
    match op {
        AluOp::Add => "+=",
        AluOp::Sub => "-=",
        AluOp::Mul => "*=",
        AluOp::Div => "/=",
        AluOp::Sdiv => "s/=",
        AluOp::Mod => "%=",
        AluOp::Smod => "s%=",
        AluOp::Or => "|=",
        AluOp::And => "&=",
        AluOp::Xor => "^=",
        AluOp::Lsh => "<<=",
        AluOp::Rsh => ">>=",
        AluOp::Arsh => "s>>=",
    }
}

const fn cond_symbol(cond: Cond) -> &'static str {
    match cond {
        Cond::Eq => "==",
        Cond::Ne => "!=",
        Cond::Gt => ">",
        Cond::Ge => ">=",
        Cond::Lt => "<",
        Cond::Le => "<=",
        Cond::Sgt => "s>",
        Cond::Sge => "s>=",
        Cond::Slt => "s<",
        Cond::Sle => "s<=",
        Cond::Set => "&",
        Cond::Unset => "!&",
    }
}

fn atomic(op: Atomic, fetch: bool, place: Place, src: Reg) -> String {
    let (at, s) = (address(place), src.index());
    match op {
        Atomic::Xchg => format!("r{s} = atomic_xchg((u{at}), r{s})"),
        Atomic::Cmpxchg => format!("r0 = atomic_cmpxchg((u{at}), r0, r{s})"),
        _ => {
            let (name, symbol) = match op {
                Atomic::Or => ("or", "|="),
                Atomic::And => ("and", "&="),
                Atomic::Xor => ("xor", "^="),
                _ => ("add", "+="),
            };
            if fetch {
                format!("r{s} = atomic_fetch_{name}((u{at}), r{s})")
            } else {
                format!("lock *(u{at}) {symbol} r{s}")
            }
        }
    }
}

/// `64 *)(r10 -8`, to be put between parentheses.
fn address(place: Place) -> String {
    let bits = match place.size {
        Size::B1 => 8,
        Size::B2 => 16,
        Size::B4 => 32,
        Size::B8 => 64,
    };
    format!("{bits} *)(r{} {:+}", place.base.index(), place.off)
}

fn reg(width: Width, reg: Reg) -> String {
    format!("{}{}", if width == Width::W64 { 'r' } else { 'w' }, reg.index())
}

fn operand(width: Width, operand: Operand) -> String {
    match operand {
        Operand::Reg(r) => reg(width, r),
        Operand::Imm(imm) => imm.to_string(),
    }
}
