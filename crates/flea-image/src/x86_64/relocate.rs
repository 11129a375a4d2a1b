//! Moves instructions: those that a site's jump replaces, and whole bodies put inline.
//!
//! A call among the moved instructions becomes a push of the address that the *original* call
//! returns to, and a jump:
//!
//! ```text
//!   push imm32                 the low half, sign-extended
//!   mov  dword [rsp+4], imm32  the high half
//!   jmp  callee
//! ```
//!
//! So the callee returns to the function's own code, unwinders and whoever looks at the stack
//! find nothing new there, and the copy may go while threads are in the callee. It changes no
//! register and no flag. The price is a mispredicted return, and that it is not for threads
//! with a shadow stack, which would end at it: who asks for such a copy has made sure.

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, IcedError, Instruction, MemoryOperand, OpKind,
    Register,
};

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
    /// A call that returns to another of the moved instructions, or in a form that is no jump's.
    #[error("the call at byte {offset:#x} cannot be made of a push and a jump")]
    Call {
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

/// Instructions that a moved call becomes.
const N_CALL_INSNS: usize = 3;

/// Appends copies of the instructions in `bytes`, which are at `ip`; jumps among them go to the
/// copies. Returns each one's old address and its copy's place.
pub(crate) fn copy(
    out: &mut Assembly,
    bytes: &[u8],
    ip: u64,
) -> Result<Vec<(u64, Place)>, RelocateError> {
    let insns = decode(bytes, ip)?;
    let mut n_before = 0;
    let mut places = Vec::with_capacity(insns.len());
    for insn in &insns {
        places.push((insn.ip(), out.after(n_before)));
        n_before += if is_call(insn) { N_CALL_INSNS } else { 1 };
    }
    let behind = ip + bytes.len() as u64;
    for mut insn in insns {
        let offset = offset_of(&insn, ip);
        if is_call(&insn) {
            pushed_call(out, &insn, ip..behind)?;
            continue;
        }
        if let Some(target) = branch_target(&insn)
            && (ip..behind).contains(&target)
        {
            let place = places.iter().find(|(old, _)| *old == target);
            let (_, place) = place.ok_or(RelocateError::IntoMiddle { offset })?;
            retarget(&mut insn, place.address());
        }
        out.push(insn);
    }
    Ok(places)
}

fn is_call(insn: &Instruction) -> bool {
    matches!(insn.flow_control(), FlowControl::Call | FlowControl::IndirectCall)
}

/// Appends `call`, one of the instructions in `moved`, as a push and a jump.
fn pushed_call(
    out: &mut Assembly,
    call: &Instruction,
    moved: std::ops::Range<u64>,
) -> Result<(), RelocateError> {
    let offset = offset_of(call, moved.start);
    let returns_to = call.next_ip();
    let unfit = RelocateError::Call { offset };
    if returns_to != moved.end {
        return Err(unfit);
    }
    let jump = match branch_target(call) {
        // To the first byte: a call of the function by itself, which programs are to see.
        Some(target) if target != moved.start && moved.contains(&target) => {
            return Err(RelocateError::IntoMiddle { offset });
        }
        Some(target) => Instruction::with_branch(Code::Jmp_rel32_64, target).map_err(|_| unfit)?,
        None => indirect_jump(call).ok_or(unfit)?,
    };
    let push = push_address(returns_to).map_err(|_| unfit)?;
    push.into_iter().chain([jump]).for_each(|insn| out.push(insn));
    Ok(())
}

/// `push address`, without a register.
fn push_address(address: u64) -> Result<[Instruction; 2], IcedError> {
    let [a, b, c, d, high @ ..] = address.to_le_bytes();
    let low = i32::from_le_bytes([a, b, c, d]);
    let upper_half = MemoryOperand::with_base_displ(Register::RSP, 4);
    Ok([
        Instruction::with1(Code::Pushq_imm32, low)?,
        Instruction::with2(Code::Mov_rm32_imm32, upper_half, i32::from_le_bytes(high))?,
    ])
}

/// The jump to where `call` goes, behind the push of the return address; `None` for forms that
/// compilers do not emit.
fn indirect_jump(call: &Instruction) -> Option<Instruction> {
    let by_rsp = call.op0_kind() == OpKind::Register && call.op0_register() == Register::RSP;
    if call.code() != Code::Call_rm64 || by_rsp {
        return None;
    }
    let mut jump = *call;
    jump.set_code(Code::Jmp_rm64);
    if call.op0_kind() == OpKind::Memory && call.memory_base() == Register::RSP {
        let displacement = call.memory_displacement64().cast_signed().checked_add(8)?;
        i32::try_from(displacement).ok()?;
        jump.set_memory_displacement64(displacement.cast_unsigned());
        jump.set_memory_displ_size(8);
    }
    Some(jump)
}

/// Appends a body's instructions with each `ret` turned into a jump behind the last one. Returns
/// the places of those that load a 64-bit number ([`numbers`]).
pub(crate) fn inline_body(out: &mut Assembly, bytes: &[u8]) -> Result<Vec<Place>, RelocateError> {
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
    let mut numbers = Vec::new();
    for mut insn in insns {
        if insn.code() == Code::Mov_r64_imm64 {
            numbers.push(out.here());
        }
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
    Ok(numbers)
}

/// Bytes of `movabs reg, imm64` before the number.
pub(super) const NUMBER_OFFSET: u32 = 2;

/// Offsets of the 64-bit numbers in the instructions `bytes`: whatever they are, the instructions
/// are as long and do the same with them.
pub(super) fn numbers(bytes: &[u8]) -> impl Iterator<Item = usize> + '_ {
    let insns = Decoder::new(64, bytes, DecoderOptions::NONE).into_iter();
    let loads = insns.filter(|insn| insn.code() == Code::Mov_r64_imm64);
    loads.filter_map(|insn| usize::try_from(insn.ip() + u64::from(NUMBER_OFFSET)).ok())
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
