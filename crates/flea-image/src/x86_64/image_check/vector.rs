//! Vector and x87 instructions: a short list of what is let through, all else is refused.
//!
//! Not on the list is whatever may change MXCSR (arithmetic and conversions set its sticky
//! bits), whatever writes a register by VEX or EVEX (that zeroes the upper part, which no save of
//! 16 bytes brings back), and x87 but for moves of whole registers.

use iced_x86::{Code, CpuidFeature, Instruction, Mnemonic, OpKind, Register};

use super::Rule;
use super::state::{Address, Operand, State, Surroundings, small};
use super::step::fixed;
use super::value::{Source, Value};

/// Vector registers that every processor has.
const N_VECTORS: usize = 16;
/// x87 registers that a result can be in.
const N_X87_RESULTS: u8 = 2;

/// Applies `insn`, which is none of the general registers' alone.
pub(super) fn step(
    state: &mut State,
    insn: &Instruction,
    about: &Surroundings<'_>,
) -> Result<(), Rule> {
    fixed(insn)?;
    let features = insn.cpuid_features();
    if features.iter().all(|f| matches!(f, CpuidFeature::SSE | CpuidFeature::SSE2)) {
        return legacy(state, insn, about);
    }
    match insn.mnemonic() {
        Mnemonic::Vmovups | Mnemonic::Vmovupd | Mnemonic::Vmovdqu
            if insn.op0_kind() == OpKind::Memory && insn.op_mask() == Register::None =>
        {
            let source = insn.op1_register();
            let n_words = source.size() / 8;
            store(state, insn, source.number(), n_words, about)
        }
        Mnemonic::Fld | Mnemonic::Fstp => x87(state, insn, about),
        _ => Err(Rule::Forbidden("is not of the baseline instruction set")),
    }
}

fn legacy(state: &mut State, insn: &Instruction, about: &Surroundings<'_>) -> Result<(), Rule> {
    match insn.mnemonic() {
        Mnemonic::Movups | Mnemonic::Movupd | Mnemonic::Movdqu => whole(state, insn, about),
        Mnemonic::Movaps | Mnemonic::Movapd | Mnemonic::Movdqa
            if insn.op0_kind() == insn.op1_kind() =>
        {
            whole(state, insn, about)
        }
        Mnemonic::Movq | Mnemonic::Movd => low(state, insn, about),
        Mnemonic::Pxor
        | Mnemonic::Xorps
        | Mnemonic::Xorpd
        | Mnemonic::Punpcklqdq
        | Mnemonic::Movhlps
        | Mnemonic::Movlhps
        | Mnemonic::Pshufd
        | Mnemonic::Psrldq => {
            if (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory) {
                return Err(Rule::NeedsAlignment);
            }
            set(state, insn.op0_register(), [Value::Unknown; 2])
        }
        _ => Err(Rule::Forbidden("may change MXCSR, or is not followed")),
    }
}

/// A move of all 16 bytes.
fn whole(state: &mut State, insn: &Instruction, about: &Surroundings<'_>) -> Result<(), Rule> {
    match (insn.op0_kind(), insn.op1_kind()) {
        (OpKind::Memory, _) => store(state, insn, insn.op1_register().number(), 2, about),
        (_, OpKind::Memory) => {
            let address = state.address(&Operand::of(insn)?, about);
            let words =
                [state.read(address, 8, about)?, state.read(word_at(address, 1), 8, about)?];
            set(state, insn.op0_register(), words)
        }
        _ => set(state, insn.op0_register(), get(state, insn.op1_register())?),
    }
}

/// `movq` and `movd`: the low word, and zero above it.
fn low(state: &mut State, insn: &Instruction, about: &Surroundings<'_>) -> Result<(), Rule> {
    let n_bytes = if insn.mnemonic() == Mnemonic::Movq { 8 } else { 4 };
    let narrow = |value| if n_bytes == 8 { value } else { Value::Unknown };
    let value = match insn.op1_kind() {
        OpKind::Memory => state.read(state.address(&Operand::of(insn)?, about), n_bytes, about)?,
        _ if insn.op1_register().is_xmm() => narrow(get(state, insn.op1_register())?[0]),
        _ if insn.op1_register().is_gpr() => narrow(state.gpr[insn.op1_register().number()]),
        _ => return Err(Rule::Forbidden("changes an MMX register")),
    };
    match insn.op0_kind() {
        OpKind::Memory => {
            let address = state.address(&Operand::of(insn)?, about);
            state.write(address, n_bytes, value, about)
        }
        _ if insn.op0_register().is_xmm() => {
            set(state, insn.op0_register(), [value, Value::Number(0)])
        }
        _ if insn.op0_register().is_gpr() => {
            let register = insn.op0_register().number();
            if register == super::state::RSP {
                return Err(Rule::LostStack);
            }
            state.gpr[register] = value;
            Ok(())
        }
        _ => Err(Rule::Forbidden("changes an MMX register")),
    }
}

/// Stores the low `n_words` of a vector register.
fn store(
    state: &mut State,
    insn: &Instruction,
    register: usize,
    n_words: usize,
    about: &Surroundings<'_>,
) -> Result<(), Rule> {
    let address = state.address(&Operand::of(insn)?, about);
    for word in 0..n_words {
        let value = match state.vector.get(register) {
            Some(words) if word < 2 => words[word],
            _ => state.left(Source::Vector { reg: small(register), word: small(word) }),
        };
        state.write(word_at(address, word), 8, value, about)?;
    }
    Ok(())
}

fn word_at(address: Address, word: usize) -> Address {
    let add = i64::try_from(8 * word).expect("at most 64 bytes");
    match address {
        Address::Stack(at) => Address::Stack(at.wrapping_add(add)),
        Address::Near(at) => Address::Near(at.wrapping_add(add)),
        Address::Passed(source, at) => Address::Passed(source, at.wrapping_add(add)),
        Address::Shared | Address::Unknown => address,
    }
}

fn get(state: &State, register: Register) -> Result<[Value; 2], Rule> {
    let known = state.vector.get(register.number()).filter(|_| register.is_xmm());
    known.copied().ok_or(Rule::Forbidden("reads a register that is not followed"))
}

fn set(state: &mut State, register: Register, words: [Value; 2]) -> Result<(), Rule> {
    let i = register.number();
    if !register.is_xmm() || i >= N_VECTORS {
        return Err(Rule::Forbidden("changes a register that is not followed"));
    }
    state.vector[i] = words;
    Ok(())
}

/// `fld st(i)`, `fld tbyte`, `fstp tbyte`: exact copies, which set no exception.
fn x87(state: &mut State, insn: &Instruction, about: &Surroundings<'_>) -> Result<(), Rule> {
    match insn.code() {
        Code::Fld_sti => {
            let value = peek(state, small(insn.op0_register().number()))?;
            load(state, value);
        }
        Code::Fld_m80fp => {
            let address = state.address(&Operand::of(insn)?, about);
            let value = state.read(address, 8, about)?;
            state.read(word_at(address, 1), 2, about)?;
            load(state, value);
        }
        Code::Fstp_m80fp => {
            let value = peek(state, 0)?;
            let address = state.address(&Operand::of(insn)?, about);
            let above = upper(state, address, value);
            state.write(address, 8, value, about)?;
            state.write(word_at(address, 1), 2, Value::Unknown, about)?;
            if let (Address::Stack(at), Some(above)) = (word_at(address, 1), above) {
                state.write(Address::Stack(at), 8, above, about)?;
            }
            if state.x87.pushed.pop().is_none() {
                state.x87.n_popped += 1;
            }
        }
        _ => return Err(Rule::Forbidden("is not an x87 move of a whole register")),
    }
    Ok(())
}

/// Word 1 of what is stored, where 6 zero bytes stand behind its 2.
fn upper(state: &State, address: Address, value: Value) -> Option<Value> {
    let Address::Stack(at) = word_at(address, 1) else { return None };
    match value {
        Value::Left(Source::X87 { reg, .. }) if state.word(at) == Value::Number(0) => {
            Some(Value::Left(Source::X87 { reg, word: 1 }))
        }
        _ => None,
    }
}

/// What is in `st(i)`. Before the original was called it may be empty.
fn peek(state: &State, i: u8) -> Result<Value, Rule> {
    let n_pushed = state.x87.pushed.len();
    if let Some(at) = n_pushed.checked_sub(1 + usize::from(i)) {
        return Ok(state.x87.pushed[at]);
    }
    let reg = state.x87.n_popped + i - small(n_pushed);
    if !state.called || reg >= N_X87_RESULTS {
        return Err(Rule::X87);
    }
    Ok(Value::Left(Source::X87 { reg, word: 0 }))
}

fn load(state: &mut State, value: Value) {
    let back = state.x87.n_popped.checked_sub(1);
    let own = back.map(|reg| Value::Left(Source::X87 { reg, word: 0 }));
    if state.x87.pushed.is_empty() && own == Some(value) {
        state.x87.n_popped -= 1;
    } else {
        state.x87.pushed.push(value);
    }
}
