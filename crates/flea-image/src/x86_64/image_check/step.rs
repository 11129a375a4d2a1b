//! What one instruction does to what is known, control flow apart ([`super::walk`]).
//!
//! A few instructions are followed exactly, because skeletons and saves are made of them. All
//! others make what they write unknown, after their memory operands were judged.

use iced_x86::{
    Code, ConditionCode, CpuidFeature, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register, RflagsBits, UsedMemory,
};

use super::Rule;
use super::state::{Address, DECISION, Operand, RBP, RSP, State, Surroundings, gpr_index, small};
use super::value::{Source, Value};
use super::vector;

/// What images may be made of, besides what [`vector`] lets through.
const GENERAL: [CpuidFeature; 8] = [
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CMOV,
    CpuidFeature::MULTIBYTENOP,
    // Whether the machine knows it is for `check_cpu` of the bodies.
    CpuidFeature::LZCNT,
];

/// Applies `insn`, which is no branch.
pub(super) fn step(
    state: &mut State,
    insn: &Instruction,
    info: &mut InstructionInfoFactory,
    about: &Surroundings<'_>,
) -> Result<(), Rule> {
    if insn.code() == Code::Movsb_m8_m8 && insn.has_rep_prefix() && insn.op_count() == 2 {
        return state.copy_bytes(about);
    }
    harmless(insn)?;
    if insn.rflags_modified() != 0 {
        state.tests_decision = false;
        state.tests_argument = None;
    }
    let is_vector = insn.cpuid_features().iter().any(|f| !GENERAL.contains(f));
    if is_vector {
        return vector::step(state, insn, about);
    }
    match insn.mnemonic() {
        Mnemonic::Nop => Ok(()),
        Mnemonic::Push => push(state, insn, about),
        Mnemonic::Pop => pop(state, insn, about),
        Mnemonic::Leave if insn.code() == Code::Leaveq => leave(state, about),
        Mnemonic::Mov => mov(state, insn, info, about),
        Mnemonic::Lea => lea(state, insn, info, about),
        Mnemonic::Add | Mnemonic::Sub => add_or_sub(state, insn, info, about),
        Mnemonic::And if is_gpr64(insn, 0) && insn.op0_register() == Register::RSP => {
            align(state, insn)
        }
        Mnemonic::Cmp if is_test_of_word(insn) => compare_with_zero(state, insn, about),
        Mnemonic::Cmp if is_gpr64(insn, 0) && insn.op1_kind() == OpKind::Memory => {
            compare_with_given(state, insn, about)
        }
        Mnemonic::Xor if is_zeroing(insn) => {
            set(state, insn.op0_register().full_register(), Value::Number(0))
        }
        Mnemonic::Xchg if is_gpr64(insn, 0) && is_gpr64(insn, 1) => exchange(state, insn),
        _ if is_conditional_move(insn) => conditional_move(state, insn, about),
        _ => anything(state, insn, info, about),
    }
}

/// Refuses what changes state that nobody follows.
fn harmless(insn: &Instruction) -> Result<(), Rule> {
    if insn.is_privileged() {
        return Err(Rule::Forbidden("is privileged"));
    }
    if insn.is_string_instruction() {
        return Err(Rule::Forbidden("depends on the direction flag"));
    }
    if insn.rflags_modified() & (RflagsBits::DF | RflagsBits::AC) != 0 {
        return Err(Rule::Forbidden("changes the direction or alignment flag"));
    }
    Ok(())
}

fn push(state: &mut State, insn: &Instruction, about: &Surroundings<'_>) -> Result<(), Rule> {
    let value = match insn.op0_kind() {
        OpKind::Register if is_gpr64(insn, 0) => state.gpr[insn.op0_register().number()],
        OpKind::Memory if insn.memory_size().size() == 8 => {
            let address = state.address(&Operand::of(insn)?, about);
            fixed(insn)?;
            state.read(address, 8, about)?
        }
        OpKind::Immediate8to64 | OpKind::Immediate32to64 => Value::Number(insn.immediate(0)),
        _ => return Err(Rule::Forbidden("pushes something else than a word")),
    };
    push_value(state, value, about)
}

/// `push` of a value.
pub(super) fn push_value(
    state: &mut State,
    value: Value,
    about: &Surroundings<'_>,
) -> Result<(), Rule> {
    let at = state.rsp()? - 8;
    state.set_rsp(Value::Stack(at))?;
    state.write(Address::Stack(at), 8, value, about)
}

fn pop(state: &mut State, insn: &Instruction, about: &Surroundings<'_>) -> Result<(), Rule> {
    if !is_gpr64(insn, 0) {
        return Err(Rule::Forbidden("pops something else than a register"));
    }
    pop_to(state, insn.op0_register().number(), about)
}

fn pop_to(state: &mut State, register: usize, about: &Surroundings<'_>) -> Result<(), Rule> {
    let at = state.rsp()?;
    if register == RSP {
        return Err(Rule::LostStack);
    }
    state.gpr[register] = state.read(Address::Stack(at), 8, about)?;
    state.set_rsp(Value::Stack(at + 8))
}

fn leave(state: &mut State, about: &Surroundings<'_>) -> Result<(), Rule> {
    state.set_rsp(state.gpr[RBP])?;
    pop_to(state, RBP, about)
}

fn mov(
    state: &mut State,
    insn: &Instruction,
    info: &mut InstructionInfoFactory,
    about: &Surroundings<'_>,
) -> Result<(), Rule> {
    let value = match insn.op1_kind() {
        OpKind::Register if is_gpr64(insn, 1) => state.gpr[insn.op1_register().number()],
        OpKind::Register if is_gpr32(insn, 1) => match state.gpr[insn.op1_register().number()] {
            Value::Number(n) => Value::Number(n & 0xffff_ffff),
            _ => Value::Unknown,
        },
        OpKind::Immediate32 | OpKind::Immediate32to64 | OpKind::Immediate64 => {
            Value::Number(insn.immediate(1))
        }
        OpKind::Memory if is_gpr64(insn, 0) => {
            if is_thread_pointer(insn) {
                Value::Unknown
            } else {
                fixed(insn)?;
                state.read(state.address(&Operand::of(insn)?, about), 8, about)?
            }
        }
        _ => return anything(state, insn, info, about),
    };
    match insn.op0_kind() {
        OpKind::Register if is_gpr64(insn, 0) || is_gpr32(insn, 0) => {
            set(state, insn.op0_register().full_register(), value)
        }
        OpKind::Memory => {
            fixed(insn)?;
            let address = state.address(&Operand::of(insn)?, about);
            state.write(address, insn.memory_size().size(), value, about)
        }
        _ => anything(state, insn, info, about),
    }
}

fn lea(
    state: &mut State,
    insn: &Instruction,
    info: &mut InstructionInfoFactory,
    about: &Surroundings<'_>,
) -> Result<(), Rule> {
    if !is_gpr64(insn, 0) {
        return anything(state, insn, info, about);
    }
    let operand = Operand::of(insn)?;
    let value = match state.address(&operand, about) {
        Address::Stack(at) => Value::Stack(at),
        Address::Near(at) => Value::Near(at),
        Address::Shared => Value::Shared,
        Address::Passed(source, 0) => Value::Caller(source),
        Address::Passed(..) | Address::Unknown => Value::Unknown,
    };
    set(state, insn.op0_register(), value)
}

fn add_or_sub(
    state: &mut State,
    insn: &Instruction,
    info: &mut InstructionInfoFactory,
    about: &Surroundings<'_>,
) -> Result<(), Rule> {
    let subtracts = insn.mnemonic() == Mnemonic::Sub;
    if !is_gpr64(insn, 0) {
        return anything(state, insn, info, about);
    }
    let other = match insn.op1_kind() {
        OpKind::Immediate8to64 | OpKind::Immediate32to64 => {
            let n = insn.immediate(1);
            Value::Number(if subtracts { n.wrapping_neg() } else { n })
        }
        OpKind::Register if !subtracts => state.gpr[insn.op1_register().number()],
        _ => return anything(state, insn, info, about),
    };
    let sum = state.gpr[insn.op0_register().number()].plus(other, |n| about.is_memory(n));
    set(state, insn.op0_register(), sum)
}

/// `cmp qword [..], 0`
fn is_test_of_word(insn: &Instruction) -> bool {
    insn.op0_kind() == OpKind::Memory
        && insn.memory_size().size() == 8
        && insn.op1_kind() == OpKind::Immediate8to64
        && insn.immediate(1) == 0
}

fn compare_with_zero(
    state: &mut State,
    insn: &Instruction,
    about: &Surroundings<'_>,
) -> Result<(), Rule> {
    fixed(insn)?;
    let address = state.address(&Operand::of(insn)?, about);
    state.read(address, 8, about)?;
    state.tests_decision = about.image.skip.is_some() && address == Address::Stack(DECISION);
    Ok(())
}

/// `cmp r64, [..]`: is an argument register as the original was given it?
fn compare_with_given(
    state: &mut State,
    insn: &Instruction,
    about: &Surroundings<'_>,
) -> Result<(), Rule> {
    fixed(insn)?;
    let address = state.address(&Operand::of(insn)?, about);
    let given = state.read(address, 8, about)?;
    let register = insn.op0_register().number();
    let source = Source::Gpr(small(register));
    let untouched = [given, state.left(source)].contains(&state.gpr[register]);
    let is_home = given == state.given(source, about) && about.is_home(address, source);
    state.tests_argument = (untouched && is_home).then_some(small(register));
    Ok(())
}

/// `and rsp, -16`: the entry's `rsp` is 8 more than a multiple of 16.
fn align(state: &mut State, insn: &Instruction) -> Result<(), Rule> {
    let by_16 =
        insn.op1_kind() == OpKind::Immediate8to64 && insn.immediate(1) == 0u64.wrapping_sub(16);
    let at = state.rsp()?;
    if !by_16 {
        return Err(Rule::LostStack);
    }
    state.set_rsp(Value::Stack((at + 8).div_euclid(16) * 16 - 8))
}

fn exchange(state: &mut State, insn: &Instruction) -> Result<(), Rule> {
    let (a, b) = (insn.op0_register().number(), insn.op1_register().number());
    if a == RSP || b == RSP {
        return Err(Rule::LostStack);
    }
    state.gpr.swap(a, b);
    Ok(())
}

fn is_conditional_move(insn: &Instruction) -> bool {
    insn.cpuid_features().contains(&CpuidFeature::CMOV) && is_gpr64(insn, 0)
}

fn conditional_move(
    state: &mut State,
    insn: &Instruction,
    about: &Surroundings<'_>,
) -> Result<(), Rule> {
    let other = match insn.op1_kind() {
        OpKind::Register => state.gpr[insn.op1_register().number()],
        _ => {
            fixed(insn)?;
            state.read(state.address(&Operand::of(insn)?, about), 8, about)?
        }
    };
    let register = insn.op0_register().number();
    let source = Source::Gpr(small(register));
    let gives_back = insn.condition_code() == ConditionCode::e
        && state.tests_argument == Some(small(register))
        && other == Value::Caller(source);
    let value = match gives_back {
        true => Value::GivenBack(source),
        false => state.gpr[register].join(other, |n| about.is_memory(n)),
    };
    set(state, insn.op0_register(), value)
}

/// What is written becomes unknown; memory operands are judged.
fn anything(
    state: &mut State,
    insn: &Instruction,
    info: &mut InstructionInfoFactory,
    about: &Surroundings<'_>,
) -> Result<(), Rule> {
    let info = info.info(insn);
    for used in info.used_memory() {
        touch(state, used, about)?;
    }
    for used in info.used_registers() {
        if writes(used.access()) {
            set(state, used.register().full_register(), Value::Unknown)?;
        }
    }
    Ok(())
}

fn touch(state: &mut State, used: &UsedMemory, about: &Surroundings<'_>) -> Result<(), Rule> {
    if used.access() == OpAccess::NoMemAccess {
        return Ok(());
    }
    if matches!(used.segment(), Register::FS | Register::GS) {
        return Err(Rule::Forbidden("touches thread-local memory"));
    }
    let operand = Operand::new(used.base(), used.index(), used.scale(), used.displacement())?;
    let address = state.address(&operand, about);
    let n_bytes = used.memory_size().size().max(1);
    if !matches!(used.access(), OpAccess::Write | OpAccess::CondWrite) {
        state.read(address, n_bytes, about)?;
    }
    if writes(used.access()) {
        state.write(address, n_bytes, Value::Unknown, about)?;
    }
    Ok(())
}

fn writes(access: OpAccess) -> bool {
    !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess)
}

/// Puts `value` into a general register.
fn set(state: &mut State, register: Register, value: Value) -> Result<(), Rule> {
    match gpr_index(register) {
        Some(RSP) => state.set_rsp(value),
        Some(i) => {
            state.gpr[i] = value;
            Ok(())
        }
        None => Err(Rule::Forbidden("changes a register that is not followed")),
    }
}

fn is_gpr64(insn: &Instruction, operand: u32) -> bool {
    insn.op_kind(operand) == OpKind::Register && insn.op_register(operand).is_gpr64()
}

fn is_gpr32(insn: &Instruction, operand: u32) -> bool {
    insn.op_kind(operand) == OpKind::Register && insn.op_register(operand).is_gpr32()
}

fn is_zeroing(insn: &Instruction) -> bool {
    (is_gpr64(insn, 0) || is_gpr32(insn, 0))
        && insn.op1_kind() == OpKind::Register
        && insn.op0_register() == insn.op1_register()
}

/// `mov r64, fs:[0]`
fn is_thread_pointer(insn: &Instruction) -> bool {
    insn.memory_segment() == Register::FS
        && insn.memory_base() == Register::None
        && insn.memory_index() == Register::None
        && insn.memory_displacement64() == 0
}

/// The operand is in no thread-local segment.
pub(super) fn fixed(insn: &Instruction) -> Result<(), Rule> {
    if matches!(insn.memory_segment(), Register::FS | Register::GS) {
        return Err(Rule::Forbidden("touches thread-local memory"));
    }
    Ok(())
}
