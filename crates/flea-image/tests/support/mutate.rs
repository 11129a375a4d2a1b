//! Changes linked images instruction by instruction, to see whether a checker notices.

use flea_image::{Changer, Skeleton};
use flea_symbols::addr::RemoteAddr;
use iced_x86::{
    BlockEncoder, BlockEncoderOptions, Code, Decoder, DecoderOptions, Instruction,
    InstructionBlock, OpKind, Register,
};

/// The instructions of `skeleton`, with the addresses they have in it.
pub fn decode(skeleton: &Skeleton) -> Vec<Instruction> {
    let options = DecoderOptions::NONE;
    Decoder::with_ip(64, &skeleton.bytes, skeleton.address.0, options).iter().collect()
}

/// `skeleton` made of `insns`, most of which are its own; its places move along. Instructions
/// that were not in it have address 0. `None` if a place is lost or an instruction cannot be.
pub fn rebuild(skeleton: &Skeleton, insns: &[Instruction]) -> Option<Skeleton> {
    let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let block = InstructionBlock::new(insns, skeleton.address.0);
    let encoded = BlockEncoder::encode(64, block, options).ok()?;
    let place = |old: RemoteAddr| {
        let index = insns.iter().position(|insn| insn.ip() == old.0)?;
        let offset = encoded.new_instruction_offsets[index];
        (offset != u32::MAX).then(|| skeleton.address.offset(i64::from(offset)))
    };
    let moves = skeleton.moves.iter().map(|(old, new)| Some((*old, place(*new)?)));
    let changers = skeleton.changers.iter().map(|changer| {
        Some(Changer { from: place(changer.from)?, to: place(changer.to)?, ..*changer })
    });
    Some(Skeleton {
        changers: changers.collect::<Option<_>>()?,
        original_entry: place(skeleton.original_entry)?,
        moves: moves.collect::<Option<_>>()?,
        bytes: encoded.code_buffer.clone(),
        ..skeleton.clone()
    })
}

/// A change of one instruction.
#[derive(Clone, Debug)]
pub struct Mutation {
    pub what: &'static str,
    /// Of the instruction in [`decode`]'s list.
    pub index: usize,
    /// What stands there instead.
    pub insn: Instruction,
}

/// All simple changes of all instructions but those behind `end`.
pub fn mutations(insns: &[Instruction], end: u64) -> Vec<Mutation> {
    let mut all = Vec::new();
    for (index, insn) in insns.iter().enumerate().filter(|(_, insn)| insn.ip() < end) {
        if insn.mnemonic() == iced_x86::Mnemonic::Nop {
            continue;
        }
        let mut add = |what, mut changed: Instruction| {
            changed.set_ip(insn.ip());
            all.push(Mutation { what, index, insn: changed });
        };
        add("dropped", Instruction::with(Code::Nopd));
        if insn.memory_base() != Register::None && insn.op_kinds().any(|k| k == OpKind::Memory) {
            for by in [8u64, 8u64.wrapping_neg()] {
                let mut changed = *insn;
                let displacement = insn.memory_displacement64().wrapping_add(by);
                changed.set_memory_displacement64(displacement);
                changed.set_memory_displ_size(8);
                add("displacement", changed);
            }
            let mut changed = *insn;
            changed.set_memory_base(other(insn.memory_base()));
            add("base", changed);
        }
        for operand in 0..insn.op_count() {
            let register = insn.op_register(operand);
            if insn.op_kind(operand) == OpKind::Register && other(register) != register {
                let mut changed = *insn;
                changed.set_op_register(operand, other(register));
                add("register", changed);
            }
        }
        if let Ok(immediate) = insn.try_immediate(insn.op_count().saturating_sub(1)) {
            let mut changed = *insn;
            changed.set_immediate_u64(insn.op_count() - 1, immediate.wrapping_add(8));
            add("immediate", changed);
        }
    }
    all
}

/// The next register of its class.
fn other(register: Register) -> Register {
    let of_class = |first: Register, n: usize| first + ((register.number() + 1) % n) as u32;
    if register.is_gpr64() {
        of_class(Register::RAX, 16)
    } else if register.is_gpr32() {
        of_class(Register::EAX, 16)
    } else if register.is_xmm() {
        of_class(Register::XMM0, 16)
    } else {
        register
    }
}
