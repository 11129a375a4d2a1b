//! Moves instructions: those that a site's jump replaces, and whole bodies put inline.

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, OpKind};

use super::assemble::{Assembly, Place};

/// Why instructions cannot be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RelocateError {
    /// Not an instruction.
    #[error("no instruction at byte {offset:#x}")]
    Invalid {
        /// Where.
        offset: usize,
    },
    /// A jump goes between two of the moved instructions.
    #[error("the instruction at byte {offset:#x} jumps into the middle of another")]
    IntoMiddle {
        /// Where.
        offset: usize,
    },
    /// A body may return and jump inside itself, and call by register; this is something else.
    #[error("a body holds an instruction that cannot be put inline, at byte {offset:#x}")]
    NotInline {
        /// Where.
        offset: usize,
    },
}

/// Decodes all of `bytes`, which are at `ip`.
pub(crate) fn decode(bytes: &[u8], ip: u64) -> Result<Vec<Instruction>, RelocateError> {
    let mut insns = Vec::new();
    let mut decoder = Decoder::with_ip(64, bytes, ip, DecoderOptions::NONE);
    while decoder.can_decode() {
        let offset = decoder.position();
        let insn = decoder.decode();
        if insn.is_invalid() {
            return Err(RelocateError::Invalid { offset });
        }
        insns.push(insn);
    }
    Ok(insns)
}

/// Appends copies of the instructions in `bytes`, which are at `ip`; jumps among them go to the
/// copies. Returns each one's old address and its copy's place.
pub(crate) fn copy(
    out: &mut Assembly,
    bytes: &[u8],
    ip: u64,
) -> Result<Vec<(u64, Place)>, RelocateError> {
    let insns = decode(bytes, ip)?;
    let places: Vec<(u64, Place)> =
        insns.iter().enumerate().map(|(i, insn)| (insn.ip(), out.after(i))).collect();
    for mut insn in insns {
        if let Some(target) = branch_target(&insn)
            && (ip..ip + bytes.len() as u64).contains(&target)
        {
            let offset = offset_of(&insn, ip);
            let place = places.iter().find(|(old, _)| *old == target);
            let (_, place) = place.ok_or(RelocateError::IntoMiddle { offset })?;
            retarget(&mut insn, place.address());
        }
        out.push(insn);
    }
    Ok(places)
}

/// Appends a body's instructions with each `ret` turned into a jump behind the last one.
pub(crate) fn inline_body(out: &mut Assembly, bytes: &[u8]) -> Result<(), RelocateError> {
    // Any address will do: a body has no reference to its own position.
    let ip = 0x1000;
    let mut insns = decode(bytes, ip)?;
    // A final return needs no jump: what follows the body follows.
    let ends_in_ret = insns.last().is_some_and(is_ret);
    let n_kept = insns.len() - usize::from(ends_in_ret);
    let end = out.after(n_kept);
    let places: Vec<(u64, Place)> =
        insns.iter().enumerate().map(|(i, insn)| (insn.ip(), out.after(i.min(n_kept)))).collect();
    insns.truncate(n_kept);
    for mut insn in insns {
        let not_inline = RelocateError::NotInline { offset: offset_of(&insn, ip) };
        match insn.flow_control() {
            FlowControl::Next if !insn.is_ip_rel_memory_operand() => {}
            FlowControl::IndirectCall if insn.op0_kind() == OpKind::Register => {}
            FlowControl::Return if is_ret(&insn) => {
                insn = Instruction::with_branch(Code::Jmp_rel32_64, end.address())
                    .map_err(|_| not_inline)?;
            }
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch => {
                let target = branch_target(&insn).ok_or(not_inline)?;
                let place = places.iter().find(|(old, _)| *old == target);
                retarget(&mut insn, place.ok_or(not_inline)?.1.address());
            }
            // `ud2` behind a division by a constant zero and the like.
            FlowControl::Exception => {}
            _ => return Err(not_inline),
        }
        out.push(insn);
    }
    Ok(())
}

fn is_ret(insn: &Instruction) -> bool {
    insn.code() == Code::Retnq
}

fn branch_target(insn: &Instruction) -> Option<u64> {
    match insn.op0_kind() {
        OpKind::NearBranch64 => Some(insn.near_branch64()),
        _ => None,
    }
}

fn retarget(insn: &mut Instruction, target: u64) {
    insn.set_near_branch64(target);
}

fn offset_of(insn: &Instruction, ip: u64) -> usize {
    usize::try_from(insn.ip().wrapping_sub(ip)).unwrap_or(usize::MAX)
}
