//! What the compiler is told of a program that no verifier saw: every access goes to plain
//! memory, every call is what it says. Only for code that runs in a process of its own.

use std::collections::BTreeSet;

use flea_object::helper::Helper;
use flea_object::insn::{Insn, PSEUDO_CALL, PSEUDO_FUNC, PSEUDO_MAP};
use flea_object::opcode as op;
use flea_object::spec::MapIdx;
use flea_object::validate::{function_starts, validate};
use flea_verifier::Verified;
use flea_verifier::facts::{Fact, Function, Region};

/// The program with the weakest facts.
///
/// # Errors
/// What is no instruction, and calls of helpers that are not there.
pub(crate) fn unverified(insns: &[Insn]) -> Result<Verified, String> {
    validate(insns).map_err(|e| e.to_string())?;
    let starts = function_starts(insns);
    let mut facts = Vec::with_capacity(insns.len());
    // Helpers take their map in r1, a tail call in r2.
    let mut maps = [None; 2];
    for (i, insn) in insns.iter().enumerate() {
        let second_half = i > 0 && insns[i - 1].is_lddw();
        facts.push(match insn.class() {
            _ if second_half => Fact::Unreachable,
            op::LDX | op::ST | op::STX => Fact::Access(Region::Memory),
            op::JMP if insn.opcode == op::CALL_OP => call(insns, i, &starts, maps)?,
            op::JMP if insn.opcode == op::CALLX_OP => Fact::CallPointer,
            _ => Fact::Plain,
        });
        match insn.class() {
            op::LD if insn.is_lddw() && insn.src == PSEUDO_MAP && matches!(insn.dst, 1 | 2) => {
                maps[usize::from(insn.dst) - 1] = Some(MapIdx(insn.imm.cast_unsigned()));
            }
            op::JMP if matches!(insn.opcode, op::CALL_OP | op::CALLX_OP) => maps = [None; 2],
            _ => {}
        }
    }
    let ends = starts.iter().skip(1).copied().chain([index(insns.len())]);
    let functions = starts
        .iter()
        .zip(ends)
        .map(|(&start_insn_idx, end_insn_idx)| Function {
            start_insn_idx,
            end_insn_idx,
            stack_bytes: op::STACK_BYTES,
        })
        .collect();
    let callees = callees(insns, &facts, &starts);
    let program = Verified::from_parts_unverified(insns.to_vec(), facts, functions);
    Ok(callees
        .into_iter()
        .fold(program, |program, (call, function)| program.with_callee_unverified(call, function)))
}

/// Every call through a register may lead to every function whose address is taken.
fn callees(insns: &[Insn], facts: &[Fact], starts: &[u32]) -> Vec<(u32, u32)> {
    let taken = insns.iter().enumerate().filter(|(i, insn)| {
        insn.is_lddw() && insn.src == PSEUDO_FUNC && facts[*i] != Fact::Unreachable
    });
    let taken: BTreeSet<u32> = taken.map(|(i, insn)| callee(i, *insn)).collect();
    let functions = (0u32..).zip(starts).filter(|(_, start)| taken.contains(start));
    let functions: Vec<u32> = functions.map(|(function, _)| function).collect();
    let calls = facts.iter().enumerate().filter(|(_, fact)| match fact {
        Fact::CallPointer => true,
        Fact::Call { helper, .. } => helper.takes_callback(),
        _ => false,
    });
    calls.flat_map(|(i, _)| functions.iter().map(move |f| (index(i), *f))).collect()
}

/// A program longer than this was refused by `validate`.
fn index(i: usize) -> u32 {
    u32::try_from(i).unwrap_or(u32::MAX)
}

fn callee(i: usize, insn: Insn) -> u32 {
    (index(i) + 1).wrapping_add_signed(insn.imm)
}

fn call(
    insns: &[Insn],
    i: usize,
    starts: &[u32],
    [map_in_r1, map_in_r2]: [Option<MapIdx>; 2],
) -> Result<Fact, String> {
    let insn = insns[i];
    if insn.src == PSEUDO_CALL {
        let to = callee(i, insn);
        let function = starts.iter().position(|start| *start == to).map(index);
        let function = function.ok_or_else(|| format!("insn {i}: call of no function"))?;
        return Ok(Fact::CallLocal { function });
    }
    let helper = Helper::from_id(insn.imm)
        .ok_or_else(|| format!("insn {i}: helper {} is not there", insn.imm))?;
    let map = if helper == Helper::TailCall { map_in_r2 } else { map_in_r1 };
    Ok(Fact::Call { helper, map, constants: [None; 5] })
}
