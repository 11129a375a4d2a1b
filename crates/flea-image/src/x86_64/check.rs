//! Walks emitted code again, trusting nothing about the compiler that made it.
//!
//! A body has to keep what its caller can see: this proves, instruction by instruction, that
//!
//! - it is `push rbp; mov rbp, rsp; sub rsp, N; saves; ...; restores; add rsp, N; mov rsp, rbp;
//!   pop rbp; ret` with as many exits as it likes, and jumps only inside itself; the first two
//!   and the two before `ret` may be missing, all of them;
//! - every general or vector register that anything between writes is among the saves, and each
//!   exit restores each save from where it was put; vector registers with all 16 bytes, and no
//!   instruction writes more than those 16;
//! - or it is written in a straight line `push r; ...; call; pop r` without any other use of
//!   the stack, which nobody jumps into;
//! - between, `rsp` and `rbp` are not written, nothing on the stack is written outside the N
//!   bytes or inside the saves;
//! - no access faults on a stack that is not 16-aligned (entry bodies run on one): no 16-byte
//!   vector operand in memory but by the unaligned moves;
//! - no x87 or MMX register, no direction flag, no segment but the thread pointer's load, no
//!   system call or other way out but a call by register.

use std::collections::{BTreeMap, HashSet};
use std::ops::RangeInclusive;

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory,
    MemorySize, Mnemonic, OpAccess, OpKind, Register, RflagsBits, UsedMemory,
};

use super::relocate;
use crate::request::Cpu;

/// The instruction sets that bodies are made of: x86-64's baseline, and what [`check_cpu`] holds
/// against the machine.
const ALLOWED: [CpuidFeature; 10] = [
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CMOV,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::LZCNT,
];

/// What a body does that it must not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("at {offset:#x}: {what}: {insn}")]
pub struct CheckError {
    /// The instruction's position.
    pub offset: u64,
    /// The rule it breaks.
    pub what: &'static str,
    /// The instruction.
    pub insn: String,
}

/// A saved register: where, from rsp, and how many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Save {
    at: u64,
    n_bytes: u64,
}

/// The shape found in the prologue.
struct Shape {
    /// rbp is saved and points to where.
    has_frame_pointer: bool,
    /// Bytes below rbp.
    frame_bytes: u64,
    saves: BTreeMap<Register, Save>,
    /// Index of the first instruction after the saves.
    first: usize,
}

/// Proves that `bytes` hold no instruction that `cpu` does not know. An old one would run `lzcnt`
/// as another instruction, silently.
///
/// # Errors
/// The first such instruction.
pub(crate) fn check_cpu(bytes: &[u8], cpu: Cpu) -> Result<(), CheckError> {
    let is_unknown = |insn: &Instruction| insn.mnemonic() == Mnemonic::Lzcnt && !cpu.lzcnt;
    let mut insns = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).into_iter();
    match insns.find(is_unknown) {
        Some(insn) => Err(fault(&insn, "is not known to this machine")),
        None => Ok(()),
    }
}

/// Proves that `bytes`, one body's code, resolved or not, keeps what its caller can see.
///
/// # Errors
/// The first fault found.
pub fn check_body(bytes: &[u8]) -> Result<(), CheckError> {
    let insns = relocate::decode(bytes, 0).map_err(|_| CheckError {
        offset: 0,
        what: "not all bytes are instructions",
        insn: String::new(),
    })?;
    let shape = prologue(&insns)?;
    let starts = jump_targets(&insns, &shape);
    let saved: HashSet<Register> = shape.saves.keys().copied().collect();
    let mut info = InstructionInfoFactory::new();
    let mut i = shape.first;
    while i < insns.len() {
        // An exit is recognised by its restores; anywhere else they are plain faults.
        if let Some(n) = epilogue(&insns[i..], &shape) {
            i += n;
            continue;
        }
        let insn = &insns[i];
        if let Some((register, n)) = wrapped_call(&insns[i..]) {
            let line = &insns[i + 1..i + n - 1];
            let saves = shape.saves.keys().copied().chain([register]).collect();
            for insn in line {
                control(insn, &starts)?;
                registers(insn, &saves, &mut info)?;
                without_stack(insn, &mut info)?;
            }
            i += n;
            continue;
        }
        control(insn, &starts)?;
        registers(insn, &saved, &mut info)?;
        memory(insn, &shape, &mut info)?;
        i += 1;
    }
    let last = insns.last().expect("a body without instructions has no prologue");
    if !matches!(
        last.flow_control(),
        FlowControl::Return | FlowControl::UnconditionalBranch | FlowControl::Exception
    ) {
        return Err(fault(last, "runs past its end"));
    }
    Ok(())
}

/// Most instructions between the `push` and `pop` around a call.
const MAX_WRAPPED: usize = 12;

/// `push r; ...; call; pop r` at the beginning of `insns`: the register and how many
/// instructions that are.
fn wrapped_call(insns: &[Instruction]) -> Option<(Register, usize)> {
    let first = insns.first().filter(|insn| insn.code() == Code::Push_r64)?;
    let register = first.op0_register();
    let is_call = |insn: &Instruction| insn.flow_control() == FlowControl::IndirectCall;
    let call = insns.iter().take(MAX_WRAPPED).position(is_call)?;
    let pop = insns.get(call + 1).filter(|insn| insn.code() == Code::Pop_r64)?;
    let straight = insns[1..call].iter().all(|insn| insn.flow_control() == FlowControl::Next);
    let fits = straight
        && pop.op0_register() == register
        && !matches!(register, Register::RSP | Register::RBP | Register::RAX);
    fits.then_some((register, call + 2))
}

/// Between a `push` and its `pop`, the stack is the call's alone.
fn without_stack(insn: &Instruction, info: &mut InstructionInfoFactory) -> Result<(), CheckError> {
    let is_call = insn.flow_control() == FlowControl::IndirectCall;
    let info = info.info(insn);
    if !is_call && info.used_memory().iter().any(|m| m.base() == Register::RSP) {
        return Err(fault(insn, "uses the stack behind a push"));
    }
    if !is_call && !info.used_memory().is_empty() {
        return Err(fault(insn, "uses memory behind a push"));
    }
    Ok(())
}

/// What [`super::slim`] needs to know of a body.
pub(super) struct Layout {
    pub has_frame_pointer: bool,
    /// Indices of the saves.
    pub saves: Vec<usize>,
    /// What they save.
    pub saved: Vec<Register>,
    /// Each exit, from its first restore to its `ret`.
    pub epilogues: Vec<RangeInclusive<usize>>,
}

/// The parts of a body.
pub(super) fn layout(insns: &[Instruction]) -> Result<Layout, CheckError> {
    let shape = prologue(insns)?;
    let mut epilogues = Vec::new();
    let mut i = shape.first;
    while i < insns.len() {
        let n = epilogue(&insns[i..], &shape);
        if let Some(n) = n {
            epilogues.push(i..=i + n - 1);
        }
        i += n.unwrap_or(1);
    }
    let saves: Vec<usize> = (shape.first - shape.saves.len()..shape.first).collect();
    let saved = saves.iter().map(|&i| insns[i].op1_register()).collect();
    Ok(Layout { has_frame_pointer: shape.has_frame_pointer, saves, saved, epilogues })
}

/// Where jumps may go: anywhere behind the saves, but not between the parts of an exit.
fn jump_targets(insns: &[Instruction], shape: &Shape) -> HashSet<u64> {
    let mut starts = HashSet::new();
    let mut i = shape.first;
    while i < insns.len() {
        starts.insert(insns[i].ip());
        let whole = epilogue(&insns[i..], shape);
        i += whole.or_else(|| Some(wrapped_call(&insns[i..])?.1)).unwrap_or(1);
    }
    starts
}

fn fault(insn: &Instruction, what: &'static str) -> CheckError {
    CheckError { offset: insn.ip(), what, insn: insn.to_string() }
}

fn prologue(insns: &[Instruction]) -> Result<Shape, CheckError> {
    let no_insn = Instruction::default();
    let at = |i: usize| insns.get(i).unwrap_or(&no_insn);
    if insns.is_empty() {
        return Err(fault(&no_insn, "is empty"));
    }
    let has_frame_pointer = at(0).code() == Code::Push_r64 && at(0).op0_register() == Register::RBP;
    if has_frame_pointer && !is_move(at(1), Register::RBP, Register::RSP) {
        return Err(fault(at(1), "does not set up its frame"));
    }
    let mut first = if has_frame_pointer { 2 } else { 0 };
    let mut frame_bytes = 0;
    if at(first).mnemonic() == Mnemonic::Sub && at(first).op0_register() == Register::RSP {
        frame_bytes = at(first).immediate(1);
        first += 1;
    }
    let mut saves = BTreeMap::new();
    let mut taken_to = 0;
    while let Some((register, save)) = insns.get(first).and_then(as_save) {
        // Saves come in ascending order without overlap; anything else is the body proper.
        let fits = save.at >= taken_to && save.at + save.n_bytes <= frame_bytes;
        if !fits || saves.contains_key(&register) {
            break;
        }
        taken_to = save.at + save.n_bytes;
        saves.insert(register, save);
        first += 1;
    }
    Ok(Shape { has_frame_pointer, frame_bytes, saves, first })
}

fn is_move(insn: &Instruction, to: Register, from: Register) -> bool {
    insn.mnemonic() == Mnemonic::Mov
        && insn.op0_register() == to
        && insn.op1_register() == from
        && insn.op_count() == 2
        && insn.op1_kind() == OpKind::Register
}

/// `[rsp + at]` and nothing else.
fn stack_offset(insn: &Instruction) -> Option<u64> {
    let simple = insn.memory_base() == Register::RSP && insn.memory_index() == Register::None;
    simple.then(|| insn.memory_displacement64())
}

fn as_save(insn: &Instruction) -> Option<(Register, Save)> {
    let at = stack_offset(insn)?;
    if insn.op0_kind() != OpKind::Memory || insn.op1_kind() != OpKind::Register {
        return None;
    }
    Some((insn.op1_register(), Save { at, n_bytes: saved_bytes(insn, insn.op1_register())? }))
}

fn as_restore(insn: &Instruction) -> Option<(Register, Save)> {
    let at = stack_offset(insn)?;
    if insn.op1_kind() != OpKind::Memory || insn.op0_kind() != OpKind::Register {
        return None;
    }
    Some((insn.op0_register(), Save { at, n_bytes: saved_bytes(insn, insn.op0_register())? }))
}

fn saved_bytes(insn: &Instruction, register: Register) -> Option<u64> {
    match insn.mnemonic() {
        Mnemonic::Mov if register.is_gpr64() => Some(8),
        Mnemonic::Movdqu | Mnemonic::Movups | Mnemonic::Movupd if register.is_xmm() => Some(16),
        _ => None,
    }
}

/// The number of instructions of the exit that begins here, if one does.
fn epilogue(insns: &[Instruction], shape: &Shape) -> Option<usize> {
    let mut restored = BTreeMap::new();
    let mut n = 0;
    while let Some((register, save)) = insns.get(n).and_then(as_restore) {
        // Reading a save into its own register is a restore, wherever it stands.
        if shape.saves.get(&register) != Some(&save) {
            return None;
        }
        restored.insert(register, save);
        n += 1;
    }
    if restored != shape.saves {
        return None;
    }
    if shape.frame_bytes > 0 {
        let add = insns.get(n)?;
        let ok = add.mnemonic() == Mnemonic::Add && add.op0_register() == Register::RSP;
        if !ok || add.immediate(1) != shape.frame_bytes {
            return None;
        }
        n += 1;
    }
    if !shape.has_frame_pointer {
        return (insns.get(n)?.code() == Code::Retnq).then_some(n + 1);
    }
    let (mov, pop, ret) = (insns.get(n)?, insns.get(n + 1)?, insns.get(n + 2)?);
    let ok = is_move(mov, Register::RSP, Register::RBP)
        && pop.code() == Code::Pop_r64
        && pop.op0_register() == Register::RBP
        && ret.code() == Code::Retnq;
    ok.then_some(n + 3)
}

fn control(insn: &Instruction, starts: &HashSet<u64>) -> Result<(), CheckError> {
    match insn.flow_control() {
        FlowControl::Next | FlowControl::Exception => Ok(()),
        FlowControl::IndirectCall if insn.op0_kind() == OpKind::Register => Ok(()),
        FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch
            if starts.contains(&insn.near_branch_target()) =>
        {
            Ok(())
        }
        FlowControl::Return => Err(fault(insn, "returns without restoring everything")),
        _ => Err(fault(insn, "leaves the body")),
    }
}

fn registers(
    insn: &Instruction,
    saved: &HashSet<Register>,
    info: &mut InstructionInfoFactory,
) -> Result<(), CheckError> {
    let privileged = insn.is_privileged() || insn.mnemonic() == Mnemonic::Syscall;
    if privileged || insn.is_string_instruction() {
        return Err(fault(insn, "is not an instruction for a body"));
    }
    if insn.rflags_modified() & RflagsBits::DF != 0 {
        return Err(fault(insn, "changes the direction flag"));
    }
    // What is not known to be harmless is refused: x87 and MMX state, AVX with its upper
    // halves of vector registers, whatever comes after.
    // `ud2` is what the compiler leaves behind a division by what it found to be zero, on a way
    // that the division's own test never takes.
    let is_trap = insn.mnemonic() == Mnemonic::Ud2;
    if !is_trap && insn.cpuid_features().iter().any(|f| !ALLOWED.contains(f)) {
        return Err(fault(insn, "is not of the baseline instruction set"));
    }
    let is_call = insn.flow_control() == FlowControl::IndirectCall;
    for used in info.info(insn).used_registers() {
        let writes = !matches!(
            used.access(),
            OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
        );
        if !writes {
            continue;
        }
        let register = used.register();
        if register.is_st() || register.is_mm() {
            return Err(fault(insn, "changes an x87 or MMX register"));
        }
        let full = register.full_register();
        let saved_as = if full.is_vector_register() { register } else { full };
        let kept_by_call = is_call && full == Register::RSP;
        if !kept_by_call && !saved.contains(&saved_as) {
            return Err(fault(insn, "changes a register that is not saved"));
        }
    }
    // The callee keeps everything but rax, which no operand of the call shows.
    if is_call && !saved.contains(&Register::RAX) {
        return Err(fault(insn, "calls without having saved rax"));
    }
    Ok(())
}

fn memory(
    insn: &Instruction,
    shape: &Shape,
    info: &mut InstructionInfoFactory,
) -> Result<(), CheckError> {
    let is_call = insn.flow_control() == FlowControl::IndirectCall;
    for used in info.info(insn).used_memory() {
        let thread_pointer = used.segment() == Register::FS
            && insn.mnemonic() == Mnemonic::Mov
            && used.base() == Register::None
            && used.displacement() == 0
            && used.access() == OpAccess::Read;
        if matches!(used.segment(), Register::FS | Register::GS) && !thread_pointer {
            return Err(fault(insn, "touches thread-local memory"));
        }
        let unaligned =
            matches!(insn.mnemonic(), Mnemonic::Movdqu | Mnemonic::Movups | Mnemonic::Movupd);
        if used.memory_size().size() > 8 && !unaligned {
            return Err(fault(insn, "might need an aligned address"));
        }
        let writes = !matches!(
            used.access(),
            OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
        );
        if writes && !is_call {
            on_stack(insn, used, shape)?;
        }
    }
    Ok(())
}

/// Writes by rsp must be inside the frame and outside the saves; by rbp there are none.
fn on_stack(insn: &Instruction, used: &UsedMemory, shape: &Shape) -> Result<(), CheckError> {
    match used.base() {
        Register::RBP => Err(fault(insn, "writes above its frame")),
        // A computed index was proved in range by the verifier; its base is checked.
        Register::RSP => {
            let at = used.displacement();
            let size = if used.memory_size() == MemorySize::Unknown {
                8
            } else {
                used.memory_size().size() as u64
            };
            let end = at.saturating_add(size);
            if end > shape.frame_bytes {
                return Err(fault(insn, "writes outside its frame"));
            }
            let hits_save = shape.saves.values().any(|s| s.at < end && at < s.at + s.n_bytes);
            if hits_save {
                return Err(fault(insn, "overwrites a saved register"));
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_that_the_machine_does_not_know() {
        // lzcnt rcx, rdi
        let code = [0xf3, 0x48, 0x0f, 0xbd, 0xcf];
        check_cpu(&code, Cpu { lzcnt: true }).unwrap();
        assert_eq!(check_cpu(&code, Cpu::default()).unwrap_err().offset, 0);
    }
}
