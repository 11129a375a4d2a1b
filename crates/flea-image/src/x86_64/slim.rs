//! Takes out of a compiled body what its hot path does not need: Cranelift saves every register
//! that is written anywhere, in cold blocks too, and always sets up a frame pointer.
//!
//! ```text
//!   before                                  after
//!     push rbp; mov rbp, rsp                  (nothing reads rbp but for the skeleton's)
//!     sub rsp, N                              sub rsp, N
//!     mov [rsp], rax                          mov [rsp], rax
//!     mov [rsp+8], rdi                        (only the cold call's argument is in rdi)
//!     ...                                     ...
//!     mov rax, [rsp]; mov rdi, [rsp+8]        mov rax, [rsp]
//!     add rsp, N                              add rsp, N
//!     mov rsp, rbp; pop rbp; ret              ret
//!   cold:                                   cold:
//!     mov rdi, ARENA                          push rdi
//!     mov rax, FUNCTION                       mov rdi, ARENA
//!     call rax                                mov rax, FUNCTION
//!     jmp ...                                 call rax
//!                                             pop rdi
//!                                             jmp ...
//! ```
//! An argument that waits for its way through memory and back delays all that the traced
//! function does with it, and each pair of store and load is 1 % to 2 % of a hit.
//!
//! Nothing here is trusted: `check` proves the outcome, and code that is not of the expected
//! shape stays as it is.

use std::ops::RangeInclusive;

use flea_symbols::addr::RemoteAddr;
use iced_x86::{
    Code as Opcode, FlowControl, Instruction, InstructionInfoFactory, OpKind, Register,
};

use super::assemble::Assembly;
use super::{check, relocate};
use crate::code::{Code, Reloc, RelocKind, is_movabs_at};

/// `code` without what it does not need, or as it was.
pub(crate) fn slim(code: Code) -> Code {
    match slimmer(&code) {
        Some(slimmer) if check::check_body(&slimmer.bytes).is_ok() => slimmer,
        _ => code,
    }
}

fn slimmer(code: &Code) -> Option<Code> {
    let insns = relocate::decode(&code.bytes, 0).ok()?;
    let layout = check::layout(&insns).ok()?;
    let mut relocs = code.relocs.clone();
    let mut insns = insns;
    let mut dropped = vec![false; insns.len()];
    if layout.has_frame_pointer && !uses_frame_pointer(&insns, &layout.epilogues) {
        dropped[..2].fill(true);
        for epilogue in &layout.epilogues {
            // mov rsp, rbp; pop rbp; ret
            dropped[epilogue.end() - 2..*epilogue.end()].fill(true);
        }
        // What rbp would have been loaded from is in rbp.
        let frames = code.relocs.iter().filter(|r| r.kind == RelocKind::SkeletonFrame);
        for at in frames.map(|r| u64::from(r.offset)) {
            let insn = insns.iter_mut().find(|insn| insn.ip() <= at && at < insn.next_ip())?;
            let register = insn.op0_register();
            let mut copy =
                Instruction::with2(Opcode::Mov_r64_rm64, register, Register::RBP).ok()?;
            // It keeps the place of the old one, by which jumps find their way.
            copy.set_len(insn.len());
            copy.set_ip(insn.ip());
            *insn = copy;
        }
        relocs.retain(|r| r.kind != RelocKind::SkeletonFrame);
    }
    let mut wrapped = Vec::new();
    for (&save, &register) in layout.saves.iter().zip(&layout.saved) {
        let Some(unit) = only_use(&insns, register, save, &layout.epilogues) else { continue };
        dropped[save] = true;
        for i in layout.epilogues.iter().cloned().flatten() {
            dropped[i] |= insns[i].op0_register() == register;
        }
        wrapped.push((register, unit));
        // One argument is all that the cold calls have; a second would be inside the first.
        break;
    }
    if !dropped.contains(&true) {
        return None;
    }
    rebuild(&relocs, &insns, &dropped, &wrapped)
}

fn uses_frame_pointer(insns: &[Instruction], epilogues: &[RangeInclusive<usize>]) -> bool {
    let mut info = InstructionInfoFactory::new();
    (2..insns.len())
        .filter(|i| !epilogues.iter().any(|e| e.contains(i)))
        .any(|i| touches(&mut info, &insns[i], Register::RBP))
}

fn touches(info: &mut InstructionInfoFactory, insn: &Instruction, register: Register) -> bool {
    let info = info.info(insn);
    let full = |r: Register| r.full_register() == register;
    info.used_registers().iter().any(|used| full(used.register()))
        || info.used_memory().iter().any(|used| full(used.base()) || full(used.index()))
}

/// The only instructions that have to do with `register` besides its save and restores: a
/// straight line in a block that is jumped to, from `mov register, constant` to a call behind
/// which the register is not looked at.
fn only_use(
    insns: &[Instruction],
    register: Register,
    save: usize,
    epilogues: &[RangeInclusive<usize>],
) -> Option<RangeInclusive<usize>> {
    let mut info = InstructionInfoFactory::new();
    let uses: Vec<usize> = (0..insns.len())
        .filter(|&i| i != save && !epilogues.iter().any(|e| e.contains(&i)))
        .filter(|&i| touches(&mut info, &insns[i], register))
        .collect();
    let (&first, &last) = (uses.first()?, uses.last()?);
    let call = last + insns[last..].iter().position(is_call)?;
    let line = &insns[first..=call];
    let constant = insns[first].op0_register().full_register() == register
        && insns[first].op_count() == 2
        && matches!(insns[first].op1_kind(), OpKind::Immediate64 | OpKind::Immediate32)
        && matches!(insns[first].code(), Opcode::Mov_r64_imm64 | Opcode::Mov_r32_imm32);
    let straight = line[..line.len() - 1].iter().all(|insn| {
        insn.flow_control() == FlowControl::Next && !touches(&mut info, insn, Register::RSP)
    });
    let entered = |insn: &Instruction| {
        let target = insn.near_branch_target();
        is_jump(insn) && line[1..].iter().any(|inside| inside.ip() == target)
    };
    // The block begins behind a jump or return: it is not on the way of every hit.
    let begins = insns[..first].iter().rposition(|insn| {
        insn.flow_control() != FlowControl::Next || insn.near_branch_target() != 0
    });
    let cold = begins.is_some_and(|i| {
        matches!(insns[i].flow_control(), FlowControl::Return | FlowControl::UnconditionalBranch)
    });
    let fits = constant && straight && cold && !insns.iter().any(entered);
    fits.then_some(first..=call)
}

fn is_call(insn: &Instruction) -> bool {
    insn.flow_control() == FlowControl::IndirectCall
}

fn is_jump(insn: &Instruction) -> bool {
    matches!(insn.flow_control(), FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch)
}

/// The instructions that stay, with `push` and `pop` around the `wrapped` lines.
fn rebuild(
    old_relocs: &[Reloc],
    insns: &[Instruction],
    dropped: &[bool],
    wrapped: &[(Register, RangeInclusive<usize>)],
) -> Option<Code> {
    // What comes out, and for each old instruction the index of what stands for it.
    let mut out: Vec<(Instruction, Option<usize>)> = Vec::with_capacity(insns.len());
    let mut places = Vec::with_capacity(insns.len());
    for (i, insn) in insns.iter().enumerate() {
        places.push(out.len());
        for (register, _) in wrapped.iter().filter(|(_, line)| *line.start() == i) {
            out.push((Instruction::with1(Opcode::Push_r64, *register).ok()?, None));
        }
        if !dropped[i] {
            out.push((*insn, Some(i)));
        }
        for (register, _) in wrapped.iter().filter(|(_, line)| *line.end() == i) {
            out.push((Instruction::with1(Opcode::Pop_r64, *register).ok()?, None));
        }
    }
    let mut asm = Assembly::default();
    let start = asm.here();
    for (insn, _) in &out {
        let mut insn = *insn;
        if is_jump(&insn) {
            let target = insn.near_branch_target();
            let old = insns.binary_search_by_key(&target, Instruction::ip).ok()?;
            insn.set_near_branch64(start.later(places[old]).address());
        }
        asm.push(insn);
    }
    let encoded = asm.encode(RemoteAddr(0)).ok()?;
    let mut relocs = Vec::with_capacity(old_relocs.len());
    for reloc in old_relocs {
        let at = u64::from(reloc.offset);
        let old = insns.iter().position(|insn| insn.ip() <= at && at < insn.next_ip())?;
        let new = out.iter().position(|(_, from)| *from == Some(old))?;
        let into = u32::try_from(at - insns[old].ip()).ok()?;
        let offset = encoded.offset(start.later(new))?.checked_add(into)?;
        if !is_movabs_at(&encoded.bytes, offset as usize) {
            return None;
        }
        relocs.push(Reloc { offset, ..*reloc });
    }
    Some(Code { bytes: encoded.bytes, relocs })
}
