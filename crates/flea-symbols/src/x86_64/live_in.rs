//! Which argument registers a function's code reads before it writes them: what it is called
//! with, whatever its debug information says. Start at [`read`].
//!
//! Only the straight line from the entry to the first branch is read, so what is found is
//! certain, and what is not found says nothing.

use iced_x86::{
    Decoder, DecoderOptions, EncodingKind, FlowControl, Instruction, InstructionInfoFactory,
    Mnemonic, OpAccess, OpKind, Register,
};

use crate::function::Function;
use crate::module::Module;
use crate::unwind::{CfaRegister, cfa_rows};

/// No more instructions than this are looked at.
const MAX_INSTRUCTIONS: usize = 4096;
const GPRS: [Register; 6] =
    [Register::RDI, Register::RSI, Register::RDX, Register::RCX, Register::R8, Register::R9];

/// What the code of a function tells of how it is called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LiveIn {
    /// Bit i: the i-th integer argument register is read.
    pub(crate) gprs: u8,
    /// Bit i: xmm i is read.
    pub(crate) xmms: u8,
    /// How many bytes are read of each of these otherwise than to move them to another: gcc's
    /// unoptimized code also moves what it never uses.
    pub(crate) xmm_bytes: [u8; 8],
    /// Vector instructions of the old encoding: compilers do not emit them with AVX.
    pub(crate) has_legacy_sse: bool,
    /// The widest register that an AVX instruction uses; 0 without one.
    pub(crate) avx_bytes: u8,
    /// How far rsp is below the CFA at its deepest, where all rows say it.
    pub(crate) frame_bytes: Option<i64>,
}

/// Reads the code of `function`.
pub(crate) fn read(module: &Module<'_>, function: &Function) -> LiveIn {
    let mut found = LiveIn { frame_bytes: frame_bytes(module, function), ..LiveIn::default() };
    let range = function.address.0..function.end().0;
    let Some(code) = module.bytes_of(range) else { return found };
    let mut written = Written::default();
    let mut info = InstructionInfoFactory::new();
    let decoder = Decoder::with_ip(64, code, function.address.0, DecoderOptions::NONE);
    let mut in_line = true;
    for instruction in decoder.into_iter().take(MAX_INSTRUCTIONS) {
        if instruction.is_invalid() {
            break;
        }
        found.note_encoding(&instruction);
        if in_line {
            found.note_reads(&instruction, &mut info, &mut written);
            in_line = instruction.flow_control() == FlowControl::Next;
        }
    }
    found
}

/// Registers that no longer hold an argument.
#[derive(Default)]
struct Written {
    gprs: u8,
    xmms: u8,
}

impl LiveIn {
    fn note_encoding(&mut self, instruction: &Instruction) {
        let registers = (0..instruction.op_count())
            .filter(|operand| instruction.op_kind(*operand) == OpKind::Register)
            .map(|operand| instruction.op_register(operand))
            .filter(|register| register.is_vector_register());
        let Some(widest) = registers.map(|register| register.size()).max() else { return };
        match instruction.encoding() {
            EncodingKind::Legacy => self.has_legacy_sse = true,
            _ => self.avx_bytes = self.avx_bytes.max(u8::try_from(widest).unwrap_or(0)),
        }
    }

    fn note_reads(
        &mut self,
        instruction: &Instruction,
        info: &mut InstructionInfoFactory,
        written: &mut Written,
    ) {
        let used = info.info(instruction);
        let is_move = instruction.mnemonic() == Mnemonic::Mov || is_vector_move(instruction);
        let only_moved = is_move
            && instruction.op0_kind() == OpKind::Register
            && instruction.op1_kind() == OpKind::Register;
        if !reads_nothing(instruction) {
            for operand in 0..instruction.op_count() {
                let is_read = used.op_access(operand) == OpAccess::Read;
                if is_read && instruction.op_kind(operand) == OpKind::Register {
                    self.note_register(instruction.op_register(operand), written, only_moved);
                }
            }
            for register in [instruction.memory_base(), instruction.memory_index()] {
                self.note_register(register, written, false);
            }
        }
        for register in used.used_registers() {
            let is_written = matches!(
                register.access(),
                OpAccess::Write
                    | OpAccess::ReadWrite
                    | OpAccess::CondWrite
                    | OpAccess::ReadCondWrite
            );
            match argument_index(register.register()) {
                Some((true, i)) if is_written => written.xmms |= 1 << i,
                Some((false, i)) if is_written => written.gprs |= 1 << i,
                _ => {}
            }
        }
    }

    fn note_register(&mut self, register: Register, written: &Written, only_moved: bool) {
        match argument_index(register) {
            Some((true, i)) if written.xmms >> i & 1 == 0 => {
                self.xmms |= 1 << i;
                if only_moved {
                    return;
                }
                let bytes = u8::try_from(register.size()).unwrap_or(u8::MAX);
                self.xmm_bytes[i] = self.xmm_bytes[i].max(bytes);
            }
            Some((false, i)) if written.gprs >> i & 1 == 0 => {
                self.gprs |= 1 << i;
            }
            _ => {}
        }
    }
}

/// Whether it is a vector register, and which argument it is.
fn argument_index(register: Register) -> Option<(bool, usize)> {
    if register.is_vector_register() {
        return Some(register.number()).filter(|n| *n < 8).map(|n| (true, n));
    }
    GPRS.iter().position(|gpr| *gpr == register.full_register()).map(|n| (false, n))
}

fn is_vector_move(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Movaps
            | Mnemonic::Movapd
            | Mnemonic::Movdqa
            | Mnemonic::Movq
            | Mnemonic::Vmovaps
            | Mnemonic::Vmovapd
            | Mnemonic::Vmovdqa
            | Mnemonic::Vmovdqa64
            | Mnemonic::Vmovq
    )
}

/// Instructions whose operands are no use of a value: paddings, a push that makes room, a
/// register that is cleared by itself, and conversions, which pass the upper part of any
/// register on.
fn reads_nothing(instruction: &Instruction) -> bool {
    let same = instruction.op_count() >= 2
        && instruction.op0_kind() == OpKind::Register
        && (1..instruction.op_count()).all(|operand| {
            instruction.op_kind(operand) == OpKind::Register
                && instruction.op_register(operand)
                    == instruction.op_register(instruction.op_count() - 1)
        });
    let is_test = matches!(instruction.mnemonic(), Mnemonic::Test | Mnemonic::Mov);
    let is_vex_with_three =
        instruction.encoding() != EncodingKind::Legacy && instruction.op_count() >= 3;
    let is_padding = instruction.mnemonic() == Mnemonic::Lea
        && instruction.op0_register() == instruction.memory_base();
    matches!(instruction.mnemonic(), Mnemonic::Nop | Mnemonic::Push)
        || is_padding
        || (same && !is_test && instruction.op0_register() == instruction.op1_register())
        || is_vex_with_three
}

/// How far the prologue moves rsp.
fn frame_bytes(module: &Module<'_>, function: &Function) -> Option<i64> {
    let rows = cfa_rows(module, function.address.0)?;
    let offsets = rows.iter().map(|row| match row.cfa {
        Some((CfaRegister::Rsp, offset)) => Some(offset),
        _ => None,
    });
    offsets.collect::<Option<Vec<i64>>>()?.into_iter().max()
}
