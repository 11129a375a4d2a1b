//! How an instruction takes the number that a relocation gives. Start at [`apply`].

use super::CoreFault;
use super::value::Outcome;
use crate::insn::Insn;
use crate::opcode as op;

/// The helper that a poisoned instruction calls: it does not exist. (Linux's number: 195896080,
/// "0xbad2310", which reads "bad relo".)
pub const POISON: i32 = 0x0bad_2310;

/// Puts the target's answer into the instruction at `insn_idx`. `Some` reason: there is none,
/// or it cannot be used, and the instruction is poisoned.
pub(super) fn apply(
    insns: &mut [Insn],
    insn_idx: u32,
    outcome: &Outcome,
) -> Result<Option<String>, CoreFault> {
    let damaged = CoreFault::Damaged("it is behind the program's end");
    let at = insn_idx as usize;
    let Some(&insn) = insns.get(at) else { return Err(damaged) };
    let Some(value) = outcome.answer.value else {
        poison(insns, at);
        return Ok(Some(outcome.reason.clone()));
    };
    match insn.class() {
        op::ALU | op::ALU64 if !insn.is_source_register() => {
            check(outcome, insn.imm.into(), |stated| immediate(insn, stated) == Some(insn.imm))?;
            insns[at].imm = immediate(insn, value).ok_or(CoreFault::TooLarge { value })?;
        }
        op::LDX | op::ST | op::STX => {
            let off = i64::from(insn.off);
            check(outcome, off, |stated| i64::try_from(stated) == Ok(off))?;
            let off = i16::try_from(value).map_err(|_| CoreFault::TooLarge { value })?;
            if let Some(reason) = resize(&mut insns[at], outcome) {
                poison(insns, at);
                return Ok(Some(reason));
            }
            insns[at].off = off;
        }
        op::LD if insn.is_lddw() => {
            let Some(&second) = insns.get(at + 1) else { return Err(damaged) };
            let found = halves(insn, second);
            check(outcome, found.cast_signed(), |stated| stated == found)?;
            let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
            insns[at].imm = i32::from_le_bytes([a, b, c, d]);
            insns[at + 1].imm = i32::from_le_bytes([e, f, g, h]);
        }
        _ => return Err(CoreFault::BadInstruction { opcode: insn.opcode }),
    }
    Ok(None)
}

/// That the instruction holds what the object's types say: else it is not the compiler's.
fn check(outcome: &Outcome, found: i64, is_it: impl Fn(u64) -> bool) -> Result<(), CoreFault> {
    match outcome.original.value {
        Some(stated) if outcome.original.is_certain && !is_it(stated) => {
            Err(CoreFault::Unexpected { found, stated })
        }
        _ => Ok(()),
    }
}

/// The immediate by which an arithmetic instruction computes with `value`: 64-bit ones extend
/// it by its sign.
fn immediate(insn: Insn, value: u64) -> Option<i32> {
    let signed = i32::try_from(value.cast_signed()).ok();
    let is_narrow = insn.class() == op::ALU;
    let unsigned = || u32::try_from(value).ok().map(u32::cast_signed).filter(|_| is_narrow);
    signed.or_else(unsigned)
}

fn halves(first: Insn, second: Insn) -> u64 {
    u64::from(second.imm.cast_unsigned()) << 32 | u64::from(first.imm.cast_unsigned())
}

/// Gives a load or store the size of the target's field. `Some` reason: it has no such size.
fn resize(insn: &mut Insn, outcome: &Outcome) -> Option<String> {
    let (Some((_, original)), Some((_, new))) = (outcome.original.field, outcome.answer.field)
    else {
        return None;
    };
    if !outcome.is_offset || original == new {
        return None;
    }
    let size = match new {
        1 => op::B,
        2 => op::H,
        4 => op::W,
        8 => op::DW,
        _ => return Some(format!("the target's field has {new} bytes, which no load reads")),
    };
    if !outcome.is_adjustable || u64::from(insn.access_bytes()) != original {
        return Some(format!(
            "the target's field has {new} bytes and the program's {original}; only pointers and \
             unsigned integers may differ (BPF_CORE_READ_BITFIELD reads any integer)"
        ));
    }
    insn.opcode = insn.opcode & !op::SIZE_MASK | size;
    None
}

fn poison(insns: &mut [Insn], at: usize) {
    let n = if insns[at].is_lddw() { 2 } else { 1 };
    for insn in insns.iter_mut().skip(at).take(n) {
        *insn = Insn { opcode: op::CALL_OP, dst: 0, src: 0, off: 0, imm: POISON };
    }
}
