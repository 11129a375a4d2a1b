//! The half of an fsession program that runs on one side. The program asks
//! `bpf_session_is_return` and goes one way at entry, the other at exit; the answer is a constant
//! of each body. What only the other half does costs nothing: no slot is looked up and no guard
//! set for it, no argument saved.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use flea_object::helper::Helper;
use flea_verifier::Verified;
use flea_verifier::facts::Fact;
use flea_verifier::targets::Targets;

use crate::translate::{Side, op};

/// `verified`, with what its tail calls lead to, where it runs as an fsession program on `side`.
pub(crate) fn half(verified: &Verified, side: Side) -> Verified {
    let Targets { programs, slots } = verified.targets();
    let programs = programs.iter().map(|program| Arc::new(half_of_one(program, side))).collect();
    half_of_one(verified, side).with_targets(Targets { programs, slots: slots.clone() })
}

fn half_of_one(verified: &Verified, side: Side) -> Verified {
    let reached = reached(verified, side);
    verified.narrowed(|idx| reached.contains(&idx))
}

fn reached(verified: &Verified, side: Side) -> HashSet<u32> {
    let insns = verified.insns();
    let entered = entered(verified);
    let mut reached = HashSet::new();
    let mut work = vec![0];
    while let Some(idx) = work.pop() {
        let Some(&insn) = insns.get(idx as usize) else { continue };
        if !reached.insert(idx) {
            continue;
        }
        let called = verified.called_at(idx);
        let called = called.filter_map(|function| verified.functions().get(function as usize));
        work.extend(called.map(|f| f.start_insn_idx));
        let [next, to] = op::successors(insn, idx);
        match answer(verified, &entered, idx, side) {
            Some(true) => work.extend(to),
            Some(false) => work.extend(next),
            None => work.extend(next.into_iter().chain(to)),
        }
    }
    reached
}

/// Where execution may come from elsewhere than the instruction before.
fn entered(verified: &Verified) -> BTreeSet<u32> {
    let insns = (0u32..).zip(verified.insns());
    let targets = insns.filter_map(|(idx, insn)| op::jump_target(*insn, idx));
    targets.chain(verified.functions().iter().map(|f| f.start_insn_idx)).collect()
}

/// Whether the jump at `idx` is taken on `side`, where it is `if r0 == 0` or `if r0 != 0` right
/// behind the question.
fn answer(verified: &Verified, entered: &BTreeSet<u32>, idx: u32, side: Side) -> Option<bool> {
    let insn = *verified.insns().get(idx as usize)?;
    let asked = *verified.facts().get(idx.checked_sub(1)? as usize)?;
    let is_question = matches!(asked, Fact::Call { helper: Helper::SessionIsReturn, .. });
    let tests_r0 = insn.dst == 0 && insn.imm == 0 && insn.opcode & op::X == 0;
    let is_jump = matches!(op::class(insn.opcode), op::JMP | op::JMP32);
    if !is_question || !tests_r0 || !is_jump || entered.contains(&idx) {
        return None;
    }
    let is_return = side == Side::Exit;
    match insn.opcode & 0xf0 {
        0x10 => Some(!is_return),
        0x50 => Some(is_return),
        _ => None,
    }
}
