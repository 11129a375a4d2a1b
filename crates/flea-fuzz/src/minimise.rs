//! A program made smaller, as long as it fails.

use std::collections::BTreeMap;

use flea_object::insn::{Insn, PSEUDO_CALL, PSEUDO_FUNC};
use flea_object::opcode as op;

use crate::text::{starts, target};

/// Instructions of a program in pieces that are kept or deleted whole, and where jumps lead.
struct Parts {
    /// One or two instructions (a `lddw`).
    insns: Vec<Vec<Insn>>,
    /// The part that a jump or call leads to.
    targets: Vec<Option<usize>>,
}

impl Parts {
    /// `None` where a jump leads into the middle of something.
    fn of(insns: &[Insn]) -> Option<Self> {
        let places: Vec<usize> = starts(insns).collect();
        let number: BTreeMap<usize, usize> =
            places.iter().enumerate().map(|(n, at)| (*at, n)).collect();
        let mut parts = Self { insns: Vec::new(), targets: Vec::new() };
        for &at in &places {
            let n = if insns[at].is_lddw() { 2 } else { 1 };
            parts.insns.push(insns.get(at..at + n)?.to_vec());
            let is_jump = insns[at].jump_offset().is_some() || is_call(insns[at]);
            parts.targets.push(match is_jump {
                true => Some(*number.get(&target(insns, at)?)?),
                false => None,
            });
        }
        Some(parts)
    }

    fn len(&self) -> usize {
        self.insns.len()
    }

    /// The program without the parts for which `keep` is false; jumps to them lead to the next
    /// one that is there.
    fn linked(&self, keep: &[bool]) -> Option<Vec<Insn>> {
        let mut at = Vec::with_capacity(self.len() + 1);
        let mut n = 0;
        for (part, kept) in self.insns.iter().zip(keep) {
            at.push(n);
            n += if *kept { part.len() } else { 0 };
        }
        at.push(n);
        let mut out: Vec<Insn> = Vec::with_capacity(n);
        for (i, part) in self.insns.iter().enumerate().filter(|(i, _)| keep[*i]) {
            out.extend(part);
            let Some(to) = self.targets[i] else { continue };
            let distance = i64::try_from(at[to]).ok()? - i64::try_from(at[i]).ok()? - 1;
            let insn = out.last_mut()?;
            if insn.opcode == op::GOTOL_OP || is_call(*insn) {
                insn.imm = i32::try_from(distance).ok()?;
            } else {
                insn.off = i16::try_from(distance).ok()?;
            }
        }
        Some(out)
    }
}

fn is_call(insn: Insn) -> bool {
    insn.opcode == op::CALL_OP && insn.src == PSEUDO_CALL
}

/// The smallest program found for which `fails` still holds: instructions are deleted, in runs
/// and one by one, until none can be spared.
pub fn minimise(insns: &[Insn], mut fails: impl FnMut(&[Insn]) -> bool) -> Vec<Insn> {
    let Some(parts) = Parts::of(insns) else { return insns.to_vec() };
    let mut keep = vec![true; parts.len()];
    let mut run = parts.len().div_ceil(2);
    loop {
        let mut spared = false;
        let mut from = 0;
        while from < parts.len() {
            let to = (from + run).min(parts.len());
            if keep[from..to].contains(&true) {
                let mut fewer = keep.clone();
                fewer[from..to].fill(false);
                if parts.linked(&fewer).is_some_and(|p| !p.is_empty() && fails(&p)) {
                    keep = fewer;
                    spared = true;
                }
            }
            from = to;
        }
        match (run, spared) {
            (1, false) => break,
            (1, true) => {}
            _ => run = run.div_ceil(2),
        }
    }
    parts.linked(&keep).unwrap_or_else(|| insns.to_vec())
}

/// The same program with more instructions behind some of them; jumps lead where they led. `None`
/// where that cannot be written.
pub fn with_behind(insns: &[Insn], behind: impl Fn(&Insn) -> Vec<Insn>) -> Option<Vec<Insn>> {
    // A callback's distance is in its `lddw`, which is linked by nobody.
    if insns.iter().any(|insn| insn.is_lddw() && insn.src == PSEUDO_FUNC) {
        return None;
    }
    let mut parts = Parts::of(insns)?;
    for (part, target) in parts.insns.iter_mut().zip(&parts.targets) {
        // What is behind a jump or call of a function would be linked in its place.
        if let ([insn], None) = (part.as_slice(), target) {
            let more = behind(insn);
            part.extend(more);
        }
    }
    parts.linked(&vec![true; parts.len()])
}

#[cfg(test)]
mod tests {
    use flea_object::asm::{AluOp, Asm, JmpOp, Reg::*};
    use flea_object::interp::{Interpreter, Memory, NoHost};

    use super::*;

    fn result(insns: &[Insn]) -> Option<u64> {
        let interpreter = Interpreter::new(insns).ok()?;
        interpreter.run([0; 5], &mut Memory::new(), &mut NoHost).ok()
    }

    #[test]
    fn only_what_matters_is_left() {
        let mut asm = Asm::new();
        let (over, function) = (asm.new_label(), asm.new_label());
        asm.mov64_imm(R0, 1).lddw(R1, 77).mov64_imm(R2, 3).call_local(function);
        asm.jump_if(JmpOp::Eq, R0, 0, over);
        for _ in 0..20 {
            asm.alu64(AluOp::Add, R0, 1);
        }
        asm.mov64_imm(R0, 42).bind(over).mov64_imm(R3, 9).exit();
        asm.bind(function).mov64_imm(R0, 1).exit();
        let insns = asm.finish().expect("a program");
        assert_eq!(result(&insns), Some(42));
        let mut asm = Asm::new();
        asm.mov64_imm(R0, 42).exit();
        let expected = asm.finish().expect("a program");
        assert_eq!(minimise(&insns, |p| result(p) == Some(42)), expected);
    }

    #[test]
    fn jumps_lead_where_they_led() {
        let mut asm = Asm::new();
        let (top, out) = (asm.new_label(), asm.new_label());
        asm.mov64_imm(R0, 0).mov64_imm(R1, 0).bind(top).lddw(R5, 5).mov64_imm(R4, 1);
        asm.alu64(AluOp::Add, R0, 2).jump_if(JmpOp::Lt, R0, 10, top).jump(out);
        asm.mov64_imm(R0, 3).bind(out).exit();
        let insns = asm.finish().expect("a program");
        let small = minimise(&insns, |p| result(p) == Some(10));
        assert_eq!(result(&small), Some(10));
        // Registers start out as 0 in the interpreter.
        assert_eq!(small.len(), 3, "{small:?}");
    }

    #[test]
    fn what_is_put_behind_moves_the_rest() {
        let mut asm = Asm::new();
        let (top, out, function) = (asm.new_label(), asm.new_label(), asm.new_label());
        asm.mov64_imm(R0, 0).lddw(R2, 3).bind(top).alu64(AluOp::Add, R0, 1);
        asm.jump_if(JmpOp::Lt, R0, 10, top).call_local(function).jump(out);
        asm.mov64_imm(R0, 3).bind(out).exit();
        asm.bind(function).alu64(AluOp::Add, R0, 1).exit();
        let insns = asm.finish().expect("a program");
        assert_eq!(result(&insns), Some(11));
        let is_sum = |insn: &Insn| insn.class() == op::ALU64 && insn.code() == op::ADD;
        let twice = with_behind(&insns, |insn| vec![*insn; usize::from(is_sum(insn))]);
        let twice = twice.expect("a program");
        assert_eq!(twice.len(), insns.len() + 2);
        assert_eq!(result(&twice), Some(12));
        assert_eq!(with_behind(&insns, |_| Vec::new()), Some(insns));
    }
}
