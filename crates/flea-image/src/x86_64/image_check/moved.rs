//! Compares the copies of the site's instructions with what stood there.

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register,
};

use super::walk::Decoded;
use super::{ImageError, ImageUnderCheck, Rule};

/// Proves that the copies do what the originals did, and go on where they went on.
pub(super) fn check(image: &ImageUnderCheck<'_>, code: &Decoded) -> Result<(), ImageError> {
    let moved = &image.moved;
    let old = decode(moved.replaced, moved.site.0);
    let only_nops = old.iter().all(|insn| is_nop(insn) || is_jump_to(insn, moved.goes_on.0));
    let mut at = code.index_of(moved.at.0).ok_or_else(|| breach(image, moved.at.0, None))?;
    while only_nops && code.insn(at).is_some_and(is_nop) {
        at += 1;
    }
    let old = if only_nops { Vec::new() } else { old };
    let copies = places(&old, at);
    for (insn, copy_at) in old.iter().zip(&copies) {
        let copy = code.insn(*copy_at);
        let same = copy.is_some_and(|copy| {
            if is_call(insn) {
                same_call(insn, [*copy_at, copy_at + 1, copy_at + 2].map(|i| code.insn(i)))
            } else if is_branch(insn) {
                let among = old.iter().position(|i| i.ip() == insn.near_branch_target());
                let target = match among {
                    Some(i) => code.insn(copies[i]).map(Instruction::ip),
                    None => Some(insn.near_branch_target()),
                };
                same_branch(insn, copy, target)
            } else {
                same_operation(*insn, *copy)
            }
        });
        if !same {
            return Err(breach(image, moved.at.0, copy));
        }
        at = copy_at + n_copies(insn);
    }
    let back = code.insn(at);
    let goes_on = back.is_some_and(|jump| {
        jump.is_jmp_short_or_near() && jump.near_branch_target() == moved.goes_on.0
    });
    if goes_on { Ok(()) } else { Err(breach(image, moved.at.0, back)) }
}

fn breach(image: &ImageUnderCheck<'_>, at: u64, insn: Option<&Instruction>) -> ImageError {
    let at = insn.map_or(at, Instruction::ip);
    ImageError::Broken {
        offset: at.wrapping_sub(image.address.0),
        rule: Rule::Moved,
        insn: insn.map(ToString::to_string).unwrap_or_default(),
    }
}

fn decode(bytes: &[u8], ip: u64) -> Vec<Instruction> {
    Decoder::with_ip(64, bytes, ip, DecoderOptions::NONE).iter().collect()
}

/// A landing pad among nops is one: its place at the function's entry stays what it was.
fn is_nop(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Nop | Mnemonic::Endbr64)
}

fn is_jump_to(insn: &Instruction, target: u64) -> bool {
    insn.is_jmp_short() && insn.near_branch_target() == target
}

fn is_branch(insn: &Instruction) -> bool {
    insn.op0_kind() == OpKind::NearBranch64
}

/// The same operands; iced-x86 compares what they refer to, not where the instruction is.
fn same_operation(mut old: Instruction, mut copy: Instruction) -> bool {
    for insn in [&mut old, &mut copy] {
        // An encoder may write a displacement shorter than the compiler did.
        if insn.memory_displ_size() != 0 && !insn.is_ip_rel_memory_operand() {
            insn.set_memory_displ_size(8);
        }
    }
    old == copy
}

/// The same condition, and this target.
fn same_branch(old: &Instruction, copy: &Instruction, target: Option<u64>) -> bool {
    is_branch(copy)
        && old.mnemonic() == copy.mnemonic()
        && Some(copy.near_branch_target()) == target
}

fn is_call(insn: &Instruction) -> bool {
    matches!(insn.flow_control(), FlowControl::Call | FlowControl::IndirectCall)
}

/// A call returns to the function's own code, so it is a push, a store and a jump.
fn n_copies(insn: &Instruction) -> usize {
    if is_call(insn) { 3 } else { 1 }
}

/// Where each instruction's copy begins.
fn places(old: &[Instruction], first: usize) -> Vec<usize> {
    let mut at = first;
    let mut place = |insn| {
        let here = at;
        at += n_copies(insn);
        here
    };
    old.iter().map(&mut place).collect()
}

/// `push low; mov [rsp+4], high; jmp callee`
fn same_call(old: &Instruction, copy: [Option<&Instruction>; 3]) -> bool {
    let [Some(push), Some(store), Some(jump)] = copy else { return false };
    let [a, b, c, d, high @ ..] = old.next_ip().to_le_bytes();
    let low = i64::from(i32::from_le_bytes([a, b, c, d]));
    matches!(push.code(), Code::Pushq_imm32 | Code::Pushq_imm8)
        && push.immediate(0) == low.cast_unsigned()
        && store.code() == Code::Mov_rm32_imm32
        && store.memory_base() == Register::RSP
        && store.memory_index() == Register::None
        && store.memory_displacement64() == 4
        && store.immediate32() == u32::from_le_bytes(high)
        && same_target(old, jump)
}

fn same_target(call: &Instruction, jump: &Instruction) -> bool {
    if is_branch(call) {
        return jump.is_jmp_short_or_near()
            && jump.near_branch_target() == call.near_branch_target();
    }
    let mut expected = *call;
    expected.set_code(Code::Jmp_rm64);
    if call.memory_base() == Register::RSP {
        let moved = call.memory_displacement64().wrapping_add(8);
        expected.set_memory_displacement64(moved);
        expected.set_memory_displ_size(8);
    }
    call.code() == Code::Call_rm64 && same_operation(expected, *jump)
}
