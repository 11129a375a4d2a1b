//! Instructions decoded into one type, with everything the encoding forbids refused here:
//! unknown opcodes, reserved fields that are not zero, registers past r10.
//!
//! Knows nothing of control flow or values.

use flea_object::helper::Helper;
use flea_object::insn::{Insn, PSEUDO_CALL, PSEUDO_FUNC, PSEUDO_MAP, PSEUDO_MAP_VALUE};
use flea_object::opcode as code;

use crate::number::compare::Cond;
use crate::number::scalar::{AluOp, Width};
use crate::report::Fault;

/// A register, r0 to r10.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reg(u8);

impl Reg {
    pub(crate) const R0: Self = Self(0);
    pub(crate) const R10: Self = Self(10);

    /// Helper argument `n`, 0 to 4: r1 to r5.
    pub(crate) const fn arg(n: usize) -> Self {
        [Self(1), Self(2), Self(3), Self(4), Self(5)][n]
    }

    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }

    /// All of them, r0 first.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        (0..=10).map(Self)
    }
}

/// A second operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    Reg(Reg),
    Imm(i32),
}

/// Bytes of a load or store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    B1,
    B2,
    B4,
    B8,
}

impl Size {
    pub(crate) const fn bytes(self) -> u32 {
        match self {
            Self::B1 => 1,
            Self::B2 => 2,
            Self::B4 => 4,
            Self::B8 => 8,
        }
    }
}

/// An address in an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) base: Reg,
    pub(crate) off: i16,
    pub(crate) size: Size,
}

/// What an atomic instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Atomic {
    Add,
    Or,
    And,
    Xor,
    Xchg,
    Cmpxchg,
}

/// One instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Alu {
        op: AluOp,
        width: Width,
        dst: Reg,
        src: Operand,
    },
    Neg {
        width: Width,
        dst: Reg,
    },
    Mov {
        width: Width,
        dst: Reg,
        src: Operand,
    },
    /// `dst = (s8)src` and so on.
    MovSx {
        width: Width,
        bits: u32,
        dst: Reg,
        src: Reg,
    },
    /// Bytes reversed: `be16`, `bswap32`...
    Swap {
        bits: u32,
        dst: Reg,
    },
    /// `le16` and so on: the lowest bits, zero-extended.
    Trunc {
        bits: u32,
        dst: Reg,
    },
    Const {
        dst: Reg,
        value: u64,
    },
    MapAddress {
        dst: Reg,
        map: u32,
    },
    MapValueAddress {
        dst: Reg,
        map: u32,
        off: u32,
    },
    /// The address of the function that starts at `target`.
    FunctionAddress {
        dst: Reg,
        target: usize,
    },
    /// A `lddw`'s second half.
    SecondHalf,
    Load {
        dst: Reg,
        place: Place,
        sign_extend: bool,
    },
    Store {
        place: Place,
        src: Operand,
    },
    Atomic {
        op: Atomic,
        fetch: bool,
        place: Place,
        src: Reg,
    },
    Goto {
        target: usize,
    },
    If {
        cond: Cond,
        width: Width,
        dst: Reg,
        src: Operand,
        target: usize,
    },
    CallHelper {
        id: i32,
    },
    CallLocal {
        target: usize,
    },
    /// `callx`: the function whose address is in `callee`.
    CallPointer {
        callee: Reg,
    },
    Exit,
}

impl Op {
    /// The function that is called here, or whose address is taken.
    pub(crate) fn function(&self) -> Option<usize> {
        match self {
            Op::CallLocal { target } | Op::FunctionAddress { target, .. } => Some(*target),
            _ => None,
        }
    }

    /// Whether this calls a helper that calls functions of the program.
    pub(crate) fn takes_callback(&self) -> bool {
        matches!(self, Op::CallHelper { id }
            if Helper::from_id(*id).is_some_and(Helper::takes_callback))
    }

    /// The registers that an instruction reads or writes, for the log.
    pub(crate) fn registers(&self) -> Vec<Reg> {
        let with = |a: Reg, b: Operand| match b {
            Operand::Reg(b) if a != b => vec![a, b],
            _ => vec![a],
        };
        match *self {
            Op::Alu { dst, src, .. } | Op::Mov { dst, src, .. } | Op::If { dst, src, .. } => {
                with(dst, src)
            }
            Op::MovSx { dst, src, .. } => with(dst, Operand::Reg(src)),
            Op::Neg { dst, .. }
            | Op::Swap { dst, .. }
            | Op::Trunc { dst, .. }
            | Op::Const { dst, .. }
            | Op::MapAddress { dst, .. }
            | Op::MapValueAddress { dst, .. }
            | Op::FunctionAddress { dst, .. } => vec![dst],
            Op::Load { dst, place, .. } => with(dst, Operand::Reg(place.base)),
            Op::Store { place, src } => with(place.base, src),
            Op::Atomic { place, src, .. } => with(place.base, Operand::Reg(src)),
            Op::CallHelper { .. } | Op::Exit => vec![Reg::R0],
            Op::CallLocal { .. } | Op::CallPointer { .. } => (0..5).map(Reg::arg).collect(),
            Op::SecondHalf | Op::Goto { .. } => vec![],
        }
    }
}

/// Decodes all instructions.
///
/// # Errors
/// The index of the first bad one, and what is wrong with it.
pub(crate) fn decode(insns: &[Insn]) -> Result<Vec<Op>, (usize, Fault)> {
    let mut ops = Vec::with_capacity(insns.len());
    let mut idx = 0;
    while let Some(insn) = insns.get(idx) {
        let op = decode_one(insns, idx, *insn).map_err(|e| (idx, e))?;
        ops.push(op);
        idx += 1;
        if insn.is_lddw() {
            ops.push(Op::SecondHalf);
            idx += 1;
        }
    }
    Ok(ops)
}

fn decode_one(insns: &[Insn], idx: usize, insn: Insn) -> Result<Op, Fault> {
    for r in [insn.dst, insn.src] {
        if r > 10 {
            return Err(Fault::new(format!("R{r} is invalid")));
        }
    }
    let wide = insn.class() == code::ALU64;
    match insn.class() {
        code::LD => decode_ld(insns, idx, insn),
        code::LDX => decode_ldx(insn),
        code::ST | code::STX => decode_store(insn),
        code::ALU | code::ALU64 => decode_alu(insn, if wide { Width::W64 } else { Width::W32 }),
        _ => decode_jump(insns.len(), idx, insn),
    }
}

fn decode_ld(insns: &[Insn], idx: usize, insn: Insn) -> Result<Op, Fault> {
    if !insn.is_lddw() {
        if matches!(insn.mode(), code::ABS | code::IND) {
            let text = "BPF_LD_[ABS|IND] instructions not allowed for this program type";
            return Err(Fault::new(text));
        }
        return Err(if insn.mode() == code::IMM {
            Fault::new("invalid BPF_LD_IMM insn")
        } else {
            unknown(insn)
        });
    }
    let second = insns.get(idx + 1).copied().unwrap_or(Insn { opcode: 0xff, ..insn });
    if second.opcode != 0 || second.dst != 0 || second.src != 0 || second.off != 0 {
        return Err(Fault::new("invalid bpf_ld_imm64 insn"));
    }
    if insn.off != 0 {
        return Err(reserved("BPF_LD_IMM64"));
    }
    let dst = writable(insn.dst)?;
    let (low, high) = (insn.imm.cast_unsigned(), second.imm.cast_unsigned());
    match insn.src {
        0 => Ok(Op::Const { dst, value: u64::from(high) << 32 | u64::from(low) }),
        PSEUDO_MAP if high == 0 => Ok(Op::MapAddress { dst, map: low }),
        PSEUDO_MAP_VALUE => Ok(Op::MapValueAddress { dst, map: low, off: high }),
        PSEUDO_FUNC if high == 0 => {
            let target = jump_target(insns.len(), idx, i64::from(insn.imm))?;
            Ok(Op::FunctionAddress { dst, target })
        }
        _ => Err(reserved("BPF_LD_IMM64")),
    }
}

fn decode_ldx(insn: Insn) -> Result<Op, Fault> {
    let place = place(insn, insn.src);
    let sign_extend = match insn.mode() {
        code::MEM => false,
        code::MEMSX if place.size != Size::B8 => true,
        _ => return Err(unknown(insn)),
    };
    if insn.imm != 0 {
        return Err(reserved("BPF_LDX"));
    }
    Ok(Op::Load { dst: writable(insn.dst)?, place, sign_extend })
}

fn decode_store(insn: Insn) -> Result<Op, Fault> {
    let from_reg = insn.class() == code::STX;
    let place = place(insn, insn.dst);
    match insn.mode() {
        code::MEM if from_reg => {
            if insn.imm != 0 {
                return Err(reserved("BPF_STX"));
            }
            Ok(Op::Store { place, src: Operand::Reg(Reg(insn.src)) })
        }
        code::MEM => {
            if insn.src != 0 {
                return Err(reserved("BPF_ST"));
            }
            Ok(Op::Store { place, src: Operand::Imm(insn.imm) })
        }
        code::ATOMIC if from_reg => decode_atomic(insn, place),
        _ => Err(unknown(insn)),
    }
}

fn decode_atomic(insn: Insn, place: Place) -> Result<Op, Fault> {
    let (op, fetch) = match insn.imm {
        code::ATOMIC_XCHG => (Atomic::Xchg, true),
        code::ATOMIC_CMPXCHG => (Atomic::Cmpxchg, true),
        other => {
            let op = match other & !code::ATOMIC_FETCH {
                code::ATOMIC_ADD => Atomic::Add,
                code::ATOMIC_OR => Atomic::Or,
                code::ATOMIC_AND => Atomic::And,
                code::ATOMIC_XOR => Atomic::Xor,
                _ => {
                    return Err(Fault::new(format!(
                        "BPF_ATOMIC uses invalid atomic opcode {other:02x}"
                    )));
                }
            };
            (op, other & code::ATOMIC_FETCH != 0)
        }
    };
    if !matches!(place.size, Size::B4 | Size::B8) {
        return Err(Fault::new("invalid atomic operand size"));
    }
    let src = Reg(insn.src);
    if fetch && op != Atomic::Cmpxchg {
        writable(insn.src)?;
    }
    Ok(Op::Atomic { op, fetch, place, src })
}

fn decode_alu(insn: Insn, width: Width) -> Result<Op, Fault> {
    let operation = insn.code();
    if operation == code::NEG {
        if insn.is_source_register() || insn.src != 0 || insn.off != 0 || insn.imm != 0 {
            return Err(reserved("BPF_NEG"));
        }
        return Ok(Op::Neg { width, dst: writable(insn.dst)? });
    }
    if operation == code::END {
        return decode_end(insn, width);
    }
    if operation == code::MOV {
        return decode_mov(insn, width);
    }
    let signed = insn.off == 1 && matches!(operation, code::DIV | code::MOD);
    let op = match (operation, signed) {
        (code::ADD, _) => AluOp::Add,
        (code::SUB, _) => AluOp::Sub,
        (code::MUL, _) => AluOp::Mul,
        (code::DIV, false) => AluOp::Div,
        (code::DIV, true) => AluOp::Sdiv,
        (code::MOD, false) => AluOp::Mod,
        (code::MOD, true) => AluOp::Smod,
        (code::OR, _) => AluOp::Or,
        (code::AND, _) => AluOp::And,
        (code::XOR, _) => AluOp::Xor,
        (code::LSH, _) => AluOp::Lsh,
        (code::RSH, _) => AluOp::Rsh,
        (code::ARSH, _) => AluOp::Arsh,
        _ => return Err(unknown(insn)),
    };
    let src = operand(insn, "BPF_ALU")?;
    if insn.off != 0 && !signed {
        return Err(reserved("BPF_ALU"));
    }
    check_immediate(op, width, src)?;
    Ok(Op::Alu { op, width, dst: writable(insn.dst)?, src })
}

fn check_immediate(op: AluOp, width: Width, src: Operand) -> Result<(), Fault> {
    let Operand::Imm(imm) = src else { return Ok(()) };
    match op {
        AluOp::Div | AluOp::Sdiv | AluOp::Mod | AluOp::Smod if imm == 0 => {
            Err(Fault::new("div by zero"))
        }
        AluOp::Lsh | AluOp::Rsh | AluOp::Arsh => {
            let bits = if width == Width::W64 { 64 } else { 32 };
            if (0..bits).contains(&imm) {
                Ok(())
            } else {
                Err(Fault::new(format!("invalid shift {imm}")))
            }
        }
        _ => Ok(()),
    }
}

fn decode_mov(insn: Insn, width: Width) -> Result<Op, Fault> {
    let dst = writable(insn.dst)?;
    let src = operand(insn, "BPF_MOV")?;
    match (src, insn.off) {
        (_, 0) => Ok(Op::Mov { width, dst, src }),
        (Operand::Reg(src), 8) => Ok(Op::MovSx { width, bits: 8, dst, src }),
        (Operand::Reg(src), 16) => Ok(Op::MovSx { width, bits: 16, dst, src }),
        (Operand::Reg(src), 32) if width == Width::W64 => {
            Ok(Op::MovSx { width, bits: 32, dst, src })
        }
        _ => Err(reserved("BPF_MOV")),
    }
}

fn decode_end(insn: Insn, width: Width) -> Result<Op, Fault> {
    let big = insn.is_source_register();
    let bits = match insn.imm {
        16 => 16,
        32 => 32,
        64 => 64,
        _ => return Err(reserved("BPF_END")),
    };
    if insn.src != 0 || insn.off != 0 || (width == Width::W64 && big) {
        return Err(reserved("BPF_END"));
    }
    let dst = writable(insn.dst)?;
    // The target is little-endian: `le` only truncates.
    let swaps = big || width == Width::W64;
    Ok(if swaps { Op::Swap { bits, dst } } else { Op::Trunc { bits, dst } })
}

fn decode_jump(n_insns: usize, idx: usize, insn: Insn) -> Result<Op, Fault> {
    let operation = insn.code();
    let wide = insn.class() == code::JMP;
    let by_reg = insn.is_source_register();
    let cond = match operation {
        code::JA if !by_reg => return decode_goto(n_insns, idx, insn, wide),
        code::CALL if wide && !by_reg => return decode_call(n_insns, idx, insn),
        code::CALL if wide => return decode_callx(insn),
        code::EXIT if wide && !by_reg => {
            if insn.dst != 0 || insn.src != 0 || insn.off != 0 || insn.imm != 0 {
                return Err(reserved("BPF_EXIT"));
            }
            return Ok(Op::Exit);
        }
        code::JEQ => Cond::Eq,
        code::JNE => Cond::Ne,
        code::JGT => Cond::Gt,
        code::JGE => Cond::Ge,
        code::JLT => Cond::Lt,
        code::JLE => Cond::Le,
        code::JSGT => Cond::Sgt,
        code::JSGE => Cond::Sge,
        code::JSLT => Cond::Slt,
        code::JSLE => Cond::Sle,
        code::JSET => Cond::Set,
        _ => return Err(unknown(insn)),
    };
    let width = if wide { Width::W64 } else { Width::W32 };
    let target = jump_target(n_insns, idx, i64::from(insn.off))?;
    Ok(Op::If { cond, width, dst: Reg(insn.dst), src: operand(insn, "BPF_JMP")?, target })
}

fn decode_goto(n_insns: usize, idx: usize, insn: Insn, short: bool) -> Result<Op, Fault> {
    let unused = if short { insn.imm } else { i32::from(insn.off) };
    if insn.dst != 0 || insn.src != 0 || unused != 0 {
        return Err(reserved("BPF_JA"));
    }
    let off = if short { i64::from(insn.off) } else { i64::from(insn.imm) };
    Ok(Op::Goto { target: jump_target(n_insns, idx, off)? })
}

fn decode_call(n_insns: usize, idx: usize, insn: Insn) -> Result<Op, Fault> {
    if insn.dst != 0 || insn.off != 0 {
        return Err(reserved("BPF_CALL"));
    }
    match insn.src {
        0 => Ok(Op::CallHelper { id: insn.imm }),
        PSEUDO_CALL => {
            let target = jump_target(n_insns, idx, i64::from(insn.imm))?;
            Ok(Op::CallLocal { target })
        }
        _ => Err(reserved("BPF_CALL")),
    }
}

fn decode_callx(insn: Insn) -> Result<Op, Fault> {
    let callee = insn.callx().filter(|r| *r < 10 && insn.src == 0 && insn.off == 0);
    Ok(Op::CallPointer { callee: Reg(callee.ok_or_else(|| unknown(insn))?) })
}

fn jump_target(n_insns: usize, idx: usize, off: i64) -> Result<usize, Fault> {
    i64::try_from(idx)
        .ok()
        .map(|idx| idx + 1 + off)
        .and_then(|target| usize::try_from(target).ok())
        .filter(|target| *target < n_insns)
        .ok_or_else(|| {
            let to = i128::try_from(idx).unwrap_or(0) + 1 + i128::from(off);
            Fault::new(format!("jump out of range from insn {idx} to {to}"))
        })
}

fn operand(insn: Insn, class: &str) -> Result<Operand, Fault> {
    if !insn.is_source_register() {
        if insn.src != 0 {
            return Err(reserved(class));
        }
        return Ok(Operand::Imm(insn.imm));
    }
    if insn.imm != 0 {
        return Err(reserved(class));
    }
    Ok(Operand::Reg(Reg(insn.src)))
}

const fn place(insn: Insn, base: u8) -> Place {
    let size = match insn.opcode & code::SIZE_MASK {
        code::W => Size::B4,
        code::H => Size::B2,
        code::B => Size::B1,
        _ => Size::B8,
    };
    Place { base: Reg(base), off: insn.off, size }
}

fn writable(dst: u8) -> Result<Reg, Fault> {
    if dst == 10 {
        return Err(Fault::new("frame pointer is read only"));
    }
    Ok(Reg(dst))
}

fn reserved(class: &str) -> Fault {
    Fault::new(format!("{class} uses reserved fields"))
}

fn unknown(insn: Insn) -> Fault {
    unknown_opcode(insn.opcode)
}

/// Linux's words for what is no instruction.
pub(crate) fn unknown_opcode(opcode: u8) -> Fault {
    Fault::new(format!("unknown opcode {opcode:02x}"))
}
