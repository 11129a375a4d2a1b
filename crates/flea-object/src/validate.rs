//! Is this a sequence of eBPF instructions at all? Known opcodes, registers that exist,
//! reserved fields zero, jumps that land on an instruction of the same function, functions
//! that end. Says nothing about what the program does: that is the verifier's part, which
//! calls [`validate`] first, as do the interpreter and whoever compiles.
//!
//! The words are Linux's (`kernel/bpf/verifier.c`, 6.18: `check_alu_op`, `check_cond_jmp_op`,
//! `check_ld_imm`, `check_subprogs`) where it has some.

use crate::insn::{Insn, PSEUDO_CALL, PSEUDO_FUNC, PSEUDO_MAP, PSEUDO_MAP_VALUE};
use crate::opcode as op;

/// The most instructions a program may have (Linux: `BPF_COMPLEXITY_LIMIT_INSNS`).
pub const MAX_INSNS: usize = 1_000_000;

/// The first instruction that is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("insn {insn_idx}: {what}")]
pub struct EncodingError {
    /// Where.
    pub insn_idx: u32,
    /// What is wrong with it.
    pub what: EncodingFault,
}

/// What can be wrong with an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodingFault {
    /// There is no instruction.
    #[error("the program is empty")]
    Empty,
    /// More than [`MAX_INSNS`].
    #[error("the program has {n_insns} instructions, {MAX_INSNS} are allowed")]
    TooLong {
        /// How many.
        n_insns: usize,
    },
    /// No such opcode.
    #[error("unknown opcode {opcode:02x}")]
    UnknownOpcode {
        /// The opcode byte.
        opcode: u8,
    },
    /// Linux's `LD_ABS` and `LD_IND`, which read a network packet.
    #[error(
        "opcode {opcode:02x} reads a network packet (BPF_LD_ABS or BPF_LD_IND); there is none here"
    )]
    PacketAccess {
        /// The opcode byte.
        opcode: u8,
    },
    /// A field that this instruction does not use is not zero.
    #[error("{instruction} uses reserved fields: {field} must be 0")]
    ReservedField {
        /// Kind of instruction, as Linux calls it.
        instruction: &'static str,
        /// `dst_reg`, `src_reg`, `off` or `imm`.
        field: &'static str,
    },
    /// A register above r10.
    #[error("R{register} is invalid")]
    InvalidRegister {
        /// Its number.
        register: u8,
    },
    /// r10 is written.
    #[error("frame pointer is read only")]
    FramePointerWritten,
    /// A constant shift by as many bits as the register has, or more.
    #[error("invalid shift {shift}")]
    InvalidShift {
        /// By how much.
        shift: i32,
    },
    /// A constant divisor of zero.
    #[error("div by zero")]
    DivisionByZero,
    /// A field has a value that means nothing here.
    #[error("{instruction}: {field} {value} means nothing")]
    InvalidField {
        /// Kind of instruction.
        instruction: &'static str,
        /// Which field.
        field: &'static str,
        /// Its value.
        value: i32,
    },
    /// A `lddw` without its second half.
    #[error("invalid bpf_ld_imm64 insn")]
    IncompleteLddw,
    /// A jump or call leaves the program, or a jump leaves its function.
    #[error("jump out of range from insn {from} to {to}")]
    JumpOutOfRange {
        /// The jump.
        from: u32,
        /// Its target.
        to: i64,
    },
    /// A jump or call into the second half of a `lddw`.
    #[error("jump into the middle of ldimm64 insn {to}")]
    JumpIntoLddw {
        /// The second half.
        to: u32,
    },
    /// A function whose last instruction goes on to the next one.
    #[error("last insn is not an exit or jmp")]
    FallsThrough,
}

/// Checks that `insns` is a well-formed program.
///
/// # Errors
/// The first [`EncodingError`], instructions first, then jumps, then functions' ends.
pub fn validate(insns: &[Insn]) -> Result<(), EncodingError> {
    if insns.is_empty() {
        return Err(EncodingError { insn_idx: 0, what: EncodingFault::Empty });
    }
    if insns.len() > MAX_INSNS {
        let what = EncodingFault::TooLong { n_insns: insns.len() };
        return Err(EncodingError { insn_idx: 0, what });
    }
    let mut second_half = vec![false; insns.len()];
    let mut expect_second_half = false;
    for (i, insn) in insns.iter().enumerate() {
        let at = |what| EncodingError { insn_idx: index_u32(i), what };
        if expect_second_half {
            second_half[i] = true;
            expect_second_half = false;
            continue;
        }
        check_insn(insn).map_err(at)?;
        if insn.is_lddw() {
            check_lddw(insn, insns.get(i + 1)).map_err(at)?;
            expect_second_half = true;
        }
    }
    let functions = functions_of(insns, &second_half)?;
    check_jumps(insns, &second_half, &functions)
}

/// Where the functions of a program begin, sorted: 0, and every target of a local call or
/// function reference. `insns` must have passed [`validate`]; targets outside are left out.
#[must_use]
pub fn function_starts(insns: &[Insn]) -> Vec<u32> {
    let mut starts = vec![0];
    let mut i = 0;
    while i < insns.len() {
        if let Some(to) = function_target(i, insns[i])
            && let Ok(to) = u32::try_from(to)
            && (to as usize) < insns.len()
        {
            starts.push(to);
        }
        i += if insns[i].is_lddw() { 2 } else { 1 };
    }
    starts.sort_unstable();
    starts.dedup();
    starts
}

impl Insn {
    /// How far a jump goes, in instructions after the next one; `None` where this is no
    /// jump. Calls and `exit` are not jumps.
    #[must_use]
    pub const fn jump_offset(self) -> Option<i32> {
        match (self.class(), self.code()) {
            (op::JMP, op::CALL | op::EXIT) => None,
            (op::JMP32, op::JA) => Some(self.imm),
            (op::JMP | op::JMP32, _) => Some(self.off as i32),
            _ => None,
        }
    }
}

fn index_u32(i: usize) -> u32 {
    u32::try_from(i).expect("at most MAX_INSNS instructions, checked first")
}

/// The function that the instruction at `i` calls or takes the address of.
fn function_target(i: usize, insn: Insn) -> Option<i64> {
    let refers = (insn.opcode == op::CALL_OP && insn.src == PSEUDO_CALL)
        || (insn.is_lddw() && insn.src == PSEUDO_FUNC);
    let next = i64::try_from(i).ok()?.checked_add(1)?;
    refers.then(|| next + i64::from(insn.imm))
}

fn check_target(
    from: usize,
    to: i64,
    second_half: &[bool],
    function: &std::ops::Range<usize>,
) -> Result<usize, EncodingError> {
    let insn_idx = index_u32(from);
    let target = usize::try_from(to).ok().filter(|t| function.contains(t)).ok_or({
        EncodingError { insn_idx, what: EncodingFault::JumpOutOfRange { from: insn_idx, to } }
    })?;
    if second_half[target] {
        let what = EncodingFault::JumpIntoLddw { to: index_u32(target) };
        return Err(EncodingError { insn_idx, what });
    }
    Ok(target)
}

fn functions_of(
    insns: &[Insn],
    second_half: &[bool],
) -> Result<Vec<std::ops::Range<usize>>, EncodingError> {
    let whole = 0..insns.len();
    let mut starts = vec![0];
    for (i, insn) in insns.iter().enumerate().filter(|&(i, _)| !second_half[i]) {
        if let Some(to) = function_target(i, *insn) {
            starts.push(check_target(i, to, second_half, &whole)?);
        }
    }
    starts.sort_unstable();
    starts.dedup();
    let ends = starts.iter().skip(1).copied().chain([insns.len()]);
    Ok(starts.iter().copied().zip(ends).map(|(start, end)| start..end).collect())
}

fn check_jumps(
    insns: &[Insn],
    second_half: &[bool],
    functions: &[std::ops::Range<usize>],
) -> Result<(), EncodingError> {
    for function in functions {
        for i in function.clone().filter(|&i| !second_half[i]) {
            if let Some(offset) = insns[i].jump_offset() {
                let next = i64::from(index_u32(i)) + 1;
                check_target(i, next + i64::from(offset), second_half, function)?;
            }
        }
        let last = function.end - 1;
        let ends = matches!(insns[last].opcode, op::EXIT_OP | op::JA_OP | op::GOTOL_OP);
        if second_half[last] || !ends {
            let what = EncodingFault::FallsThrough;
            return Err(EncodingError { insn_idx: index_u32(last), what });
        }
    }
    Ok(())
}

fn check_insn(insn: &Insn) -> Result<(), EncodingFault> {
    match insn.class() {
        op::ALU | op::ALU64 => check_alu(insn),
        op::JMP | op::JMP32 => check_jump(insn),
        op::LDX => check_load(insn),
        op::ST | op::STX => check_store(insn),
        _ if insn.is_lddw() => {
            check_register(insn.dst)?;
            check_written(insn.dst)
        }
        _ if matches!(insn.mode(), op::ABS | op::IND) && insn.access_bytes() < 8 => {
            Err(EncodingFault::PacketAccess { opcode: insn.opcode })
        }
        _ => Err(EncodingFault::UnknownOpcode { opcode: insn.opcode }),
    }
}

fn check_register(register: u8) -> Result<(), EncodingFault> {
    if register >= op::N_REGISTERS {
        return Err(EncodingFault::InvalidRegister { register });
    }
    Ok(())
}

fn check_written(register: u8) -> Result<(), EncodingFault> {
    if register == op::FRAME_POINTER {
        return Err(EncodingFault::FramePointerWritten);
    }
    Ok(())
}

/// Refuses a value other than 0 in a field that `instruction` does not use.
fn reserved(
    instruction: &'static str,
    fields: &[(&'static str, i32)],
) -> Result<(), EncodingFault> {
    match fields.iter().find(|(_, value)| *value != 0) {
        Some(&(field, _)) => Err(EncodingFault::ReservedField { instruction, field }),
        None => Ok(()),
    }
}

fn check_alu(insn: &Insn) -> Result<(), EncodingFault> {
    let (src, off) = (i32::from(insn.src), i32::from(insn.off));
    let wide = insn.class() == op::ALU64;
    let code = insn.code();
    check_register(insn.dst)?;
    match code {
        op::NEG if insn.is_source_register() => {
            return Err(EncodingFault::UnknownOpcode { opcode: insn.opcode });
        }
        op::NEG => reserved("BPF_NEG", &[("src_reg", src), ("off", off), ("imm", insn.imm)])?,
        op::END if wide && insn.is_source_register() => {
            return Err(EncodingFault::UnknownOpcode { opcode: insn.opcode });
        }
        op::END => {
            reserved("BPF_END", &[("src_reg", src), ("off", off)])?;
            if !matches!(insn.imm, 16 | 32 | 64) {
                let (instruction, value) = ("BPF_END", insn.imm);
                return Err(EncodingFault::InvalidField { instruction, field: "imm", value });
            }
        }
        op::ADD..=op::MOD | op::XOR | op::MOV | op::ARSH => check_two_operands(insn)?,
        _ => return Err(EncodingFault::UnknownOpcode { opcode: insn.opcode }),
    }
    check_written(insn.dst)
}

fn check_two_operands(insn: &Insn) -> Result<(), EncodingFault> {
    let wide = insn.class() == op::ALU64;
    let instruction = if insn.code() == op::MOV { "BPF_MOV" } else { "BPF_ALU" };
    if insn.is_source_register() {
        check_register(insn.src)?;
        reserved(instruction, &[("imm", insn.imm)])?;
    } else {
        reserved(instruction, &[("src_reg", i32::from(insn.src))])?;
    }
    let off_means_something = match (insn.code(), insn.off) {
        (_, 0) | (op::DIV | op::MOD, 1) => true,
        (op::MOV, 8 | 16) => insn.is_source_register(),
        (op::MOV, 32) => insn.is_source_register() && wide,
        _ => false,
    };
    if !off_means_something {
        return Err(EncodingFault::ReservedField { instruction, field: "off" });
    }
    if insn.is_source_register() {
        return Ok(());
    }
    let bits = if wide { 64 } else { 32 };
    match insn.code() {
        op::LSH | op::RSH | op::ARSH if !(0..bits).contains(&insn.imm) => {
            Err(EncodingFault::InvalidShift { shift: insn.imm })
        }
        op::DIV | op::MOD if insn.imm == 0 => Err(EncodingFault::DivisionByZero),
        _ => Ok(()),
    }
}

fn check_jump(insn: &Insn) -> Result<(), EncodingFault> {
    let (dst, src) = (i32::from(insn.dst), i32::from(insn.src));
    let off = i32::from(insn.off);
    match insn.opcode {
        op::JA_OP => reserved("BPF_JA", &[("dst_reg", dst), ("src_reg", src), ("imm", insn.imm)]),
        op::GOTOL_OP => reserved("BPF_JA", &[("dst_reg", dst), ("src_reg", src), ("off", off)]),
        op::EXIT_OP => reserved(
            "BPF_EXIT",
            &[("dst_reg", dst), ("src_reg", src), ("off", off), ("imm", insn.imm)],
        ),
        op::CALL_OP => {
            reserved("BPF_CALL", &[("dst_reg", dst), ("off", off)])?;
            if insn.src > PSEUDO_CALL {
                let (instruction, value) = ("BPF_CALL", src);
                return Err(EncodingFault::InvalidField { instruction, field: "src_reg", value });
            }
            Ok(())
        }
        op::CALLX_OP => {
            reserved("BPF_CALL", &[("src_reg", src), ("off", off)])?;
            let register = insn
                .callx()
                .ok_or(EncodingFault::ReservedField { instruction: "BPF_CALL", field: "imm" })?;
            check_register(register)
        }
        _ if !matches!(insn.code(), op::JEQ..=op::JSGE | op::JLT..=op::JSLE) => {
            Err(EncodingFault::UnknownOpcode { opcode: insn.opcode })
        }
        _ => {
            check_register(insn.dst)?;
            if insn.is_source_register() {
                check_register(insn.src)?;
                reserved("BPF_JMP/JMP32", &[("imm", insn.imm)])
            } else {
                reserved("BPF_JMP/JMP32", &[("src_reg", src)])
            }
        }
    }
}

fn check_load(insn: &Insn) -> Result<(), EncodingFault> {
    match insn.mode() {
        op::MEM => {}
        op::MEMSX if insn.access_bytes() < 8 => {}
        _ => return Err(EncodingFault::UnknownOpcode { opcode: insn.opcode }),
    }
    check_register(insn.dst)?;
    check_register(insn.src)?;
    reserved("BPF_LDX", &[("imm", insn.imm)])?;
    check_written(insn.dst)
}

fn check_store(insn: &Insn) -> Result<(), EncodingFault> {
    let is_st = insn.class() == op::ST;
    match insn.mode() {
        op::MEM => {}
        op::ATOMIC if !is_st && insn.access_bytes() >= 4 => {}
        _ => return Err(EncodingFault::UnknownOpcode { opcode: insn.opcode }),
    }
    check_register(insn.dst)?;
    if is_st {
        return reserved("BPF_ST", &[("src_reg", i32::from(insn.src))]);
    }
    check_register(insn.src)?;
    if insn.mode() == op::MEM {
        return reserved("BPF_STX", &[("imm", insn.imm)]);
    }
    match insn.imm & !op::ATOMIC_FETCH {
        op::ATOMIC_ADD | op::ATOMIC_OR | op::ATOMIC_AND | op::ATOMIC_XOR => {}
        _ if matches!(insn.imm, op::ATOMIC_XCHG | op::ATOMIC_CMPXCHG) => {}
        _ => {
            let (instruction, value) = ("BPF_ATOMIC", insn.imm);
            return Err(EncodingFault::InvalidField { instruction, field: "imm", value });
        }
    }
    let fetches_into_src = insn.imm & op::ATOMIC_FETCH != 0 && insn.imm != op::ATOMIC_CMPXCHG;
    if fetches_into_src { check_written(insn.src) } else { Ok(()) }
}

fn check_lddw(first: &Insn, second: Option<&Insn>) -> Result<(), EncodingFault> {
    let second = second.ok_or(EncodingFault::IncompleteLddw)?;
    if (second.opcode, second.dst, second.src, second.off) != (0, 0, 0, 0) {
        return Err(EncodingFault::IncompleteLddw);
    }
    reserved("BPF_LD_IMM64", &[("off", i32::from(first.off))])?;
    match first.src {
        0 | PSEUDO_MAP_VALUE => Ok(()),
        PSEUDO_MAP | PSEUDO_FUNC => reserved("BPF_LD_IMM64", &[("second imm", second.imm)]),
        src => Err(EncodingFault::InvalidField {
            instruction: "BPF_LD_IMM64",
            field: "src_reg",
            value: i32::from(src),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Insn = Insn { opcode: op::EXIT_OP, dst: 0, src: 0, off: 0, imm: 0 };

    fn insn(opcode: u8, dst: u8, src: u8, off: i16, imm: i32) -> Insn {
        Insn { opcode, dst, src, off, imm }
    }

    fn check(insns: &[Insn], expect: &str) {
        let got = validate(insns).map_or_else(|e| e.to_string(), |()| "ok".to_owned());
        assert_eq!(got, expect, "{insns:?}");
    }

    #[test]
    fn whole_programs() {
        check(&[EXIT], "ok");
        check(&[], "insn 0: the program is empty");
        check(&[insn(0xb7, 0, 0, 0, 0)], "insn 0: last insn is not an exit or jmp");
        check(&[insn(op::LDDW, 1, 0, 0, 5)], "insn 0: invalid bpf_ld_imm64 insn");
        check(
            &[insn(op::LDDW, 1, 0, 0, 5), insn(0, 0, 1, 0, 0), EXIT],
            "insn 0: invalid bpf_ld_imm64 insn",
        );
        check(&[insn(op::JA_OP, 0, 0, -1, 0)], "ok");
        check(&[insn(op::JA_OP, 0, 0, 1, 0), EXIT], "insn 0: jump out of range from insn 0 to 2");
        check(
            &[insn(op::JA_OP, 0, 0, 1, 0), insn(op::LDDW, 1, 0, 0, 0), Insn::default(), EXIT],
            "insn 0: jump into the middle of ldimm64 insn 2",
        );
        check(
            &[insn(op::GOTOL_OP, 0, 0, 0, i32::MAX), EXIT],
            "insn 0: jump out of range from insn 0 to 2147483648",
        );
    }

    #[test]
    fn functions_are_separate() {
        let call = insn(op::CALL_OP, 0, PSEUDO_CALL, 0, 1);
        check(&[call, EXIT, EXIT], "ok");
        check(
            &[call, insn(op::JEQ | op::JMP, 0, 0, 0, 0), EXIT],
            "insn 1: jump out of range from insn 1 to 2",
        );
        check(&[call, insn(0xb7, 0, 0, 0, 0), EXIT], "insn 1: last insn is not an exit or jmp");
        assert_eq!(function_starts(&[call, EXIT, EXIT]), [0, 2]);
    }

    #[test]
    fn registers_and_fields() {
        let alone = |i, expect| check(&[i, EXIT], expect);
        alone(insn(0xb7, 11, 0, 0, 0), "insn 0: R11 is invalid");
        alone(insn(0xb7, 10, 0, 0, 0), "insn 0: frame pointer is read only");
        alone(insn(0xbf, 0, 12, 0, 0), "insn 0: R12 is invalid");
        alone(insn(0x8d, 2, 0, 0, 0), "ok");
        alone(insn(0x8d, 0, 0, 0, 2), "ok");
        alone(insn(0x8d, 2, 0, 0, 2), "insn 0: BPF_CALL uses reserved fields: imm must be 0");
        alone(insn(0x8d, 0, 0, 0, 11), "insn 0: BPF_CALL uses reserved fields: imm must be 0");
        alone(insn(0x8d, 11, 0, 0, 0), "insn 0: R11 is invalid");
        alone(insn(0x8d, 2, 1, 0, 0), "insn 0: BPF_CALL uses reserved fields: src_reg must be 0");
        alone(insn(0x67, 0, 0, 0, 64), "insn 0: invalid shift 64");
        alone(insn(0x37, 0, 0, 0, 0), "insn 0: div by zero");
        alone(insn(0xdc, 0, 0, 0, 8), "insn 0: BPF_END: imm 8 means nothing");
        alone(insn(0xbc, 0, 0, 32, 0), "insn 0: BPF_MOV uses reserved fields: off must be 0");
        alone(insn(0xbf, 0, 0, 32, 0), "ok");
        alone(insn(0xdb, 1, 10, 0, op::ATOMIC_XCHG), "insn 0: frame pointer is read only");
        alone(insn(0xdb, 1, 0, 0, 0xe0), "insn 0: BPF_ATOMIC: imm 224 means nothing");
        alone(insn(0xd3, 1, 0, 0, 0), "insn 0: unknown opcode d3");
        alone(
            insn(0x20, 0, 0, 0, 0),
            "insn 0: opcode 20 reads a network packet (BPF_LD_ABS or BPF_LD_IND); there is none here",
        );
        alone(insn(0x85, 0, 2, 0, 0), "insn 0: BPF_CALL: src_reg 2 means nothing");
    }
}
