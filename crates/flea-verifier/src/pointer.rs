//! Arithmetic and comparisons with pointers.
//!
//! **Invariant**: a pointer's offset stays within [`MAX_OFFSET`] of its object, and the
//! context's offset stays one number. The context has no run-time address in compiled code
//! (its words are in registers), so nothing here lets its address become a number.

use crate::access::MAX_OFFSET;
use crate::number::compare::Cond;
use crate::number::scalar::{AluOp, Scalar, Width};
use crate::op::Reg;
use crate::report::Fault;
use crate::stack::STACK_BYTES;
use crate::value::{Pointer, PointerKind, Value};

/// `dst op= src`, where at least one of them is a pointer.
pub(crate) fn arithmetic(
    op: AluOp,
    width: Width,
    (dst, a): (Reg, &Value),
    b: &Value,
) -> Result<Value, Fault> {
    let d = dst.index();
    if width == Width::W32 {
        return Err(Fault::new(format!("R{d} 32-bit pointer arithmetic prohibited")));
    }
    let text = match op {
        AluOp::Add | AluOp::Sub => None,
        AluOp::And | AluOp::Or | AluOp::Xor => {
            Some(format!("R{d} bitwise operator {} on pointer prohibited", symbol(op)))
        }
        _ => Some(format!("R{d} pointer arithmetic with {} operator prohibited", symbol(op))),
    };
    if let Some(text) = text {
        return Err(Fault::new(text));
    }
    match (a, b) {
        (Value::Pointer(p), Value::Scalar(n)) => moved(dst, p, op, &n.set),
        (Value::Scalar(n), Value::Pointer(p)) if op == AluOp::Add => moved(dst, p, op, &n.set),
        (Value::Scalar(_), Value::Pointer(_)) => {
            Err(Fault::new(format!("R{d} tried to subtract pointer from scalar")))
        }
        // The distance of two pointers is just a number.
        (Value::Pointer(p), Value::Pointer(q))
            if op == AluOp::Sub && !p.kind.is_abstract() && !q.kind.is_abstract() =>
        {
            Ok(Value::UNKNOWN)
        }
        _ => Err(Fault::new(format!("R{d} pointer {} pointer prohibited", symbol(op)))),
    }
}

fn moved(dst: Reg, p: &Pointer, op: AluOp, by: &Scalar) -> Result<Value, Fault> {
    let (d, name) = (dst.index(), p.type_name());
    if p.or_null.is_some() {
        return Err(Fault::new(format!(
            "R{d} pointer arithmetic on {name} prohibited, null-check it first"
        )));
    }
    if matches!(p.kind, PointerKind::Map(_) | PointerKind::Function(_)) {
        return Err(Fault::new(format!("R{d} pointer arithmetic on {name} prohibited")));
    }
    let sane = -MAX_OFFSET..=MAX_OFFSET;
    if !sane.contains(&by.wide.smin) || !sane.contains(&by.wide.smax) {
        let text = match by.as_const() {
            Some(c) => {
                format!("math between {name} pointer and {} is not allowed", c.cast_signed())
            }
            None if sane.contains(&by.wide.smin) => {
                format!("R{d} unbounded memory access, make sure to bounds check any such access")
            }
            None => format!(
                "math between {name} pointer and register with unbounded min value is not allowed"
            ),
        };
        return Err(Fault::new(text).hint("compare the number with a constant first"));
    }
    let off = Scalar::alu(op, Width::W64, &p.off, by);
    if !sane.contains(&off.wide.smin) || !sane.contains(&off.wide.smax) {
        let text = format!("value {} makes {name} pointer be out of bounds", off.wide.smin);
        return Err(Fault::new(text));
    }
    if p.kind == PointerKind::Ctx && off.as_const().is_none() {
        let bits = off.wide.bits;
        let text =
            format!("variable ctx access var_off=({:#x}; {:#x}) disallowed", bits.value, bits.mask);
        return Err(Fault::new(text).hint("bpf_get_func_arg takes a variable argument number"));
    }
    Ok(Value::Pointer(Pointer { off, ..*p }))
}

/// What comparing a pointer with something tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Both are possible, and nothing is learnt.
    Unknown,
    /// It certainly holds, or certainly not.
    Known(bool),
    /// It tells whether pointers with this id are null: they are where it comes out as
    /// `null_if`.
    Null { id: crate::value::Id, null_if: bool },
}

/// `a cond b`, where at least one of them is a pointer.
pub(crate) fn compare(
    cond: Cond,
    width: Width,
    (dst, a): (Reg, &Value),
    b: &Value,
) -> Result<Outcome, Fault> {
    if a.is_abstract() || b.is_abstract() {
        let text = format!("R{} pointer comparison prohibited", dst.index());
        let hint = "neither the context nor a function is ever NULL, and they have no address";
        return Err(Fault::new(text).hint(hint));
    }
    let (pointer, number) = match (a, b) {
        (Value::Pointer(p), number) | (number, Value::Pointer(p)) => (p, number),
        _ => return Ok(Outcome::Unknown),
    };
    let null_if = match cond {
        Cond::Eq => true,
        Cond::Ne => false,
        _ => return Ok(Outcome::Unknown),
    };
    if width == Width::W32 || number.as_const() != Some(0) {
        return Ok(Outcome::Unknown);
    }
    Ok(match pointer.or_null {
        Some(id) => Outcome::Null { id, null_if },
        None if cannot_be_null(pointer) => Outcome::Known(!null_if),
        None => Outcome::Unknown,
    })
}

/// A pointer at or above its object's start; further down, it might come out at address 0.
/// A map itself need not have an address at all in compiled code.
fn cannot_be_null(p: &Pointer) -> bool {
    match p.kind {
        PointerKind::Stack { .. } => {
            p.off.wide.smin >= -i64::from(STACK_BYTES) && p.off.wide.smax <= 0
        }
        PointerKind::Map(_) | PointerKind::Target { .. } => false,
        _ => p.off.wide.smin >= 0,
    }
}

/// `+=` and so on.
const fn symbol(op: AluOp) -> &'static str {
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
