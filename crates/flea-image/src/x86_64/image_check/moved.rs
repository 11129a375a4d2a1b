//! Compares the copies of the site's instructions with what stood there.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind};

use super::walk::Decoded;
use super::{ImageError, ImageUnderCheck, Rule};

/// Proves that the copies do what the originals did, and go on where they went on.
pub(super) fn check(image: &ImageUnderCheck<'_>, code: &Decoded) -> Result<(), ImageError> {
    let moved = &image.moved;
    let old = decode(moved.replaced, moved.site.0);
    let only_nops = old.iter().all(is_nop);
    let mut at = code.index_of(moved.at.0).ok_or_else(|| breach(image, moved.at.0, None))?;
    let first = at;
    while only_nops && code.insn(at).is_some_and(is_nop) {
        at += 1;
    }
    let old = if only_nops { Vec::new() } else { old };
    for insn in &old {
        let copy = code.insn(at);
        let same = copy.is_some_and(|copy| {
            if is_branch(insn) {
                same_branch(insn, copy, &old, code, first)
            } else {
                same_operation(*insn, *copy)
            }
        });
        if !same {
            return Err(breach(image, moved.at.0, copy));
        }
        at += 1;
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

fn is_nop(insn: &Instruction) -> bool {
    insn.mnemonic() == Mnemonic::Nop
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

/// The same condition, and the same target or its copy.
fn same_branch(
    old: &Instruction,
    copy: &Instruction,
    all_old: &[Instruction],
    code: &Decoded,
    first_copy: usize,
) -> bool {
    let among = all_old.iter().position(|i| i.ip() == old.near_branch_target());
    let target = match among {
        Some(i) => code.insn(first_copy + i).map(Instruction::ip),
        None => Some(old.near_branch_target()),
    };
    is_branch(copy)
        && old.mnemonic() == copy.mnemonic()
        && Some(copy.near_branch_target()) == target
        && copy.flow_control() != FlowControl::Call
}
