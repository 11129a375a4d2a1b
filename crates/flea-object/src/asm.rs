//! Programs made in code: what Flea's built-in commands run, and what tests are made of.
//! Encodes, resolves labels, and nothing else; [`crate::validate`] and the verifier judge.
//!
//! ```
//! use flea_object::asm::{Asm, JmpOp, Reg::*, Size};
//! use flea_object::{helper::Helper, spec::MapIdx};
//!
//! // Counts calls in element 0 of the first map.
//! let mut asm = Asm::new();
//! let out = asm.new_label();
//! asm.store_imm(Size::W, R10, -4, 0)
//!     .map_ref(R1, MapIdx(0))
//!     .mov64_reg(R2, R10)
//!     .add64_imm(R2, -4)
//!     .call(Helper::MapLookupElem)
//!     .jump_if(JmpOp::Eq, R0, 0, out)
//!     .mov64_imm(R1, 1)
//!     .atomic_add(Size::DW, R0, 0, R1)
//!     .bind(out)
//!     .mov64_imm(R0, 0)
//!     .exit();
//! assert_eq!(asm.finish()?.len(), 11);
//! # Ok::<(), flea_object::asm::AsmError>(())
//! ```

use crate::helper::Helper;
use crate::insn::{Insn, PSEUDO_CALL, PSEUDO_FUNC, PSEUDO_MAP, PSEUDO_MAP_VALUE};
use crate::opcode as op;
use crate::spec::MapIdx;

/// A register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are the registers")]
pub enum Reg {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    R10,
}

/// Bytes of a load or store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Size {
    /// 1
    B = op::B,
    /// 2
    H = op::H,
    /// 4
    W = op::W,
    /// 8
    DW = op::DW,
}

/// An operation with two operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum AluOp {
    /// `+=`
    Add = op::ADD,
    /// `-=`
    Sub = op::SUB,
    /// `*=`
    Mul = op::MUL,
    /// `/=`, unsigned
    Div = op::DIV,
    /// `|=`
    Or = op::OR,
    /// `&=`
    And = op::AND,
    /// `<<=`
    Lsh = op::LSH,
    /// `>>=`, logical
    Rsh = op::RSH,
    /// `%=`, unsigned
    Mod = op::MOD,
    /// `^=`
    Xor = op::XOR,
    /// `=`
    Mov = op::MOV,
    /// `>>=`, arithmetic
    Arsh = op::ARSH,
}

/// A condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum JmpOp {
    /// `==`
    Eq = op::JEQ,
    /// `>`, unsigned
    Gt = op::JGT,
    /// `>=`, unsigned
    Ge = op::JGE,
    /// `&`, not zero
    Set = op::JSET,
    /// `!=`
    Ne = op::JNE,
    /// `>`, signed
    Sgt = op::JSGT,
    /// `>=`, signed
    Sge = op::JSGE,
    /// `<`, unsigned
    Lt = op::JLT,
    /// `<=`, unsigned
    Le = op::JLE,
    /// `<`, signed
    Slt = op::JSLT,
    /// `<=`, signed
    Sle = op::JSLE,
}

/// The second operand: a register or a constant (sign-extended).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operand {
    /// A register.
    Reg(Reg),
    /// A constant.
    Imm(i32),
}

impl From<Reg> for Operand {
    fn from(reg: Reg) -> Self {
        Self::Reg(reg)
    }
}

impl From<i32> for Operand {
    fn from(imm: i32) -> Self {
        Self::Imm(imm)
    }
}

/// A place to jump to, of the [`Asm`] that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Label(usize);

/// Why a program could not be assembled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AsmError {
    /// A label was used but never bound.
    #[error("insn {insn_idx} refers to label {label}, which is bound nowhere")]
    UnboundLabel {
        /// The jump or call.
        insn_idx: usize,
        /// In the order of [`Asm::new_label`].
        label: usize,
    },
    /// A label was bound twice.
    #[error("label {label} is bound at insn {first} and again at insn {second}")]
    BoundTwice {
        /// Which.
        label: usize,
        /// Where it was bound first.
        first: usize,
        /// And then.
        second: usize,
    },
    /// A label of another [`Asm`].
    #[error("insn {insn_idx} refers to label {label} of another program")]
    ForeignLabel {
        /// The jump or call; the next instruction for a binding.
        insn_idx: usize,
        /// Its number there.
        label: usize,
    },
    /// A jump further than its field can say.
    #[error("insn {insn_idx} jumps {distance} instructions, which its offset cannot hold")]
    JumpTooFar {
        /// The jump.
        insn_idx: usize,
        /// From the instruction after it.
        distance: i64,
    },
}

/// A program being written, one method per kind of instruction.
#[derive(Clone, Debug, Default)]
pub struct Asm {
    insns: Vec<Insn>,
    labels: Vec<Option<usize>>,
    uses: Vec<LabelUse>,
    error: Option<AsmError>,
}

#[derive(Clone, Copy, Debug)]
struct LabelUse {
    insn_idx: usize,
    label: Label,
    field: LabelField,
}

/// Where an instruction keeps its distance.
#[derive(Clone, Copy, Debug)]
enum LabelField {
    /// In `off`; there is no longer form.
    Off,
    /// In `off`, or as a `gotol` where that is too short.
    OffOrGotol,
    /// In `imm`.
    Imm,
}

impl Asm {
    /// An empty program.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many instructions there are so far (a `lddw` is two).
    #[must_use]
    pub fn n_insns(&self) -> usize {
        self.insns.len()
    }

    /// A label, not bound yet.
    #[must_use]
    pub fn new_label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Binds `label` to the next instruction.
    pub fn bind(&mut self, label: Label) -> &mut Self {
        let here = self.insns.len();
        match self.labels.get_mut(label.0) {
            None => self.fail(AsmError::ForeignLabel { insn_idx: here, label: label.0 }),
            Some(Some(first)) => {
                let (label, first) = (label.0, *first);
                self.fail(AsmError::BoundTwice { label, first, second: here });
            }
            Some(slot) => *slot = Some(here),
        }
        self
    }

    /// Any instruction, as it is.
    pub fn raw(&mut self, insn: Insn) -> &mut Self {
        self.insns.push(insn);
        self
    }

    /// `dst OP= operand`, 64 bits.
    pub fn alu64(&mut self, alu: AluOp, dst: Reg, operand: impl Into<Operand>) -> &mut Self {
        self.alu(op::ALU64, alu, dst, operand.into(), 0)
    }

    /// `dst OP= operand`, 32 bits, the upper half zeroed.
    pub fn alu32(&mut self, alu: AluOp, dst: Reg, operand: impl Into<Operand>) -> &mut Self {
        self.alu(op::ALU, alu, dst, operand.into(), 0)
    }

    /// `dst = imm`, sign-extended.
    pub fn mov64_imm(&mut self, dst: Reg, imm: i32) -> &mut Self {
        self.alu64(AluOp::Mov, dst, imm)
    }

    /// `dst = src`
    pub fn mov64_reg(&mut self, dst: Reg, src: Reg) -> &mut Self {
        self.alu64(AluOp::Mov, dst, src)
    }

    /// `dst += imm`
    pub fn add64_imm(&mut self, dst: Reg, imm: i32) -> &mut Self {
        self.alu64(AluOp::Add, dst, imm)
    }

    /// `dst += src`
    pub fn add64_reg(&mut self, dst: Reg, src: Reg) -> &mut Self {
        self.alu64(AluOp::Add, dst, src)
    }

    /// `dst = -dst`
    pub fn neg64(&mut self, dst: Reg) -> &mut Self {
        self.insn(op::ALU64 | op::NEG, dst as u8, 0, 0, 0)
    }

    /// `dst s/= operand`, 64 bits, signed (ISA v4).
    pub fn sdiv64(&mut self, dst: Reg, operand: impl Into<Operand>) -> &mut Self {
        self.alu(op::ALU64, AluOp::Div, dst, operand.into(), 1)
    }

    /// `dst s%= operand`, 64 bits, signed (ISA v4).
    pub fn smod64(&mut self, dst: Reg, operand: impl Into<Operand>) -> &mut Self {
        self.alu(op::ALU64, AluOp::Mod, dst, operand.into(), 1)
    }

    /// `dst = *(size *)(base + off)`, zero-extended.
    pub fn load(&mut self, size: Size, dst: Reg, base: Reg, off: i16) -> &mut Self {
        self.insn(op::LDX | op::MEM | size as u8, dst as u8, base as u8, off, 0)
    }

    /// `*(size *)(base + off) = src`
    pub fn store(&mut self, size: Size, base: Reg, off: i16, src: Reg) -> &mut Self {
        self.insn(op::STX | op::MEM | size as u8, base as u8, src as u8, off, 0)
    }

    /// `*(size *)(base + off) = imm`, sign-extended.
    pub fn store_imm(&mut self, size: Size, base: Reg, off: i16, imm: i32) -> &mut Self {
        self.insn(op::ST | op::MEM | size as u8, base as u8, 0, off, imm)
    }

    /// `lock *(size *)(base + off) += src`; `size` is W or DW.
    pub fn atomic_add(&mut self, size: Size, base: Reg, off: i16, src: Reg) -> &mut Self {
        self.atomic(op::ATOMIC_ADD, size, base, off, src)
    }

    /// Any atomic, `imm` one of `opcode::ATOMIC_*`; `size` is W or DW.
    pub fn atomic(&mut self, imm: i32, size: Size, base: Reg, off: i16, src: Reg) -> &mut Self {
        self.insn(op::STX | op::ATOMIC | size as u8, base as u8, src as u8, off, imm)
    }

    /// `dst = value`, all 64 bits of it; two instructions.
    pub fn lddw(&mut self, dst: Reg, value: u64) -> &mut Self {
        let b = value.to_le_bytes();
        let low = i32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        let high = i32::from_le_bytes([b[4], b[5], b[6], b[7]]);
        self.lddw_halves(dst, 0, low, high)
    }

    /// `dst = map`; two instructions.
    pub fn map_ref(&mut self, dst: Reg, map: MapIdx) -> &mut Self {
        self.lddw_halves(dst, PSEUDO_MAP, map.0.cast_signed(), 0)
    }

    /// `dst = &element 0 of map + off_bytes`; two instructions.
    pub fn map_value(&mut self, dst: Reg, map: MapIdx, off_bytes: u32) -> &mut Self {
        self.lddw_halves(dst, PSEUDO_MAP_VALUE, map.0.cast_signed(), off_bytes.cast_signed())
    }

    /// `dst = function at label`; two instructions.
    pub fn function_ref(&mut self, dst: Reg, label: Label) -> &mut Self {
        self.use_label(label, LabelField::Imm);
        self.lddw_halves(dst, PSEUDO_FUNC, 0, 0)
    }

    /// `goto label`
    pub fn jump(&mut self, label: Label) -> &mut Self {
        self.use_label(label, LabelField::OffOrGotol);
        self.insn(op::JA_OP, 0, 0, 0, 0)
    }

    /// `if dst OP operand goto label`, 64 bits.
    pub fn jump_if(
        &mut self,
        jmp: JmpOp,
        dst: Reg,
        operand: impl Into<Operand>,
        label: Label,
    ) -> &mut Self {
        self.branch(op::JMP, jmp, dst, operand.into(), label)
    }

    /// `if (u32)dst OP (u32)operand goto label`.
    pub fn jump32_if(
        &mut self,
        jmp: JmpOp,
        dst: Reg,
        operand: impl Into<Operand>,
        label: Label,
    ) -> &mut Self {
        self.branch(op::JMP32, jmp, dst, operand.into(), label)
    }

    /// `r0 = helper(r1, ..., r5)`
    pub fn call(&mut self, helper: Helper) -> &mut Self {
        self.insn(op::CALL_OP, 0, 0, 0, (helper as u32).cast_signed())
    }

    /// `r0 = function at label(r1, ..., r5)`
    pub fn call_local(&mut self, label: Label) -> &mut Self {
        self.use_label(label, LabelField::Imm);
        self.insn(op::CALL_OP, 0, PSEUDO_CALL, 0, 0)
    }

    /// `r0 = function whose address is in register(r1, ..., r5)`
    pub fn call_register(&mut self, register: Reg) -> &mut Self {
        self.insn(op::CALLX_OP, register as u8, 0, 0, 0)
    }

    /// `return r0`
    pub fn exit(&mut self) -> &mut Self {
        self.insn(op::EXIT_OP, 0, 0, 0, 0)
    }

    /// The program, with every label resolved.
    ///
    /// # Errors
    /// The first [`AsmError`].
    pub fn finish(&self) -> Result<Vec<Insn>, AsmError> {
        if let Some(error) = &self.error {
            return Err(error.clone());
        }
        let mut insns = self.insns.clone();
        for &LabelUse { insn_idx, label, field } in &self.uses {
            let bound = *self
                .labels
                .get(label.0)
                .ok_or(AsmError::ForeignLabel { insn_idx, label: label.0 })?;
            let to = bound.ok_or(AsmError::UnboundLabel { insn_idx, label: label.0 })?;
            let distance = distance_between(insn_idx, to);
            resolve(&mut insns[insn_idx], field, distance)
                .ok_or(AsmError::JumpTooFar { insn_idx, distance })?;
        }
        Ok(insns)
    }

    fn alu(&mut self, class: u8, alu: AluOp, dst: Reg, operand: Operand, off: i16) -> &mut Self {
        let (source, src, imm) = encode_operand(operand);
        self.insn(class | source | alu as u8, dst as u8, src, off, imm)
    }

    fn branch(
        &mut self,
        class: u8,
        jmp: JmpOp,
        dst: Reg,
        operand: Operand,
        label: Label,
    ) -> &mut Self {
        let (source, src, imm) = encode_operand(operand);
        self.use_label(label, LabelField::Off);
        self.insn(class | source | jmp as u8, dst as u8, src, 0, imm)
    }

    fn lddw_halves(&mut self, dst: Reg, src: u8, low: i32, high: i32) -> &mut Self {
        self.insn(op::LDDW, dst as u8, src, 0, low).insn(0, 0, 0, 0, high)
    }

    fn insn(&mut self, opcode: u8, dst: u8, src: u8, off: i16, imm: i32) -> &mut Self {
        self.raw(Insn { opcode, dst, src, off, imm })
    }

    /// Notes that the instruction emitted next refers to `label`.
    fn use_label(&mut self, label: Label, field: LabelField) {
        self.uses.push(LabelUse { insn_idx: self.insns.len(), label, field });
    }

    fn fail(&mut self, error: AsmError) {
        self.error.get_or_insert(error);
    }
}

fn encode_operand(operand: Operand) -> (u8, u8, i32) {
    match operand {
        Operand::Reg(reg) => (op::X, reg as u8, 0),
        Operand::Imm(imm) => (op::K, 0, imm),
    }
}

fn distance_between(insn_idx: usize, to: usize) -> i64 {
    let signed = |i: usize| i64::try_from(i).expect("a vector has fewer than 2^63 elements");
    signed(to) - signed(insn_idx) - 1
}

fn resolve(insn: &mut Insn, field: LabelField, distance: i64) -> Option<()> {
    match (field, i16::try_from(distance)) {
        (LabelField::Off | LabelField::OffOrGotol, Ok(off)) => insn.off = off,
        (LabelField::Off, Err(_)) => return None,
        (LabelField::OffOrGotol, Err(_)) => {
            insn.opcode = op::GOTOL_OP;
            insn.imm = i32::try_from(distance).ok()?;
        }
        (LabelField::Imm, _) => insn.imm = i32::try_from(distance).ok()?,
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::Reg::*;
    use super::*;
    use crate::validate::validate;

    #[test]
    fn every_method_makes_valid_instructions() {
        let mut asm = Asm::new();
        let (back, out, function) = (asm.new_label(), asm.new_label(), asm.new_label());
        asm.mov64_imm(R0, 0).mov64_reg(R6, R1).add64_imm(R6, 8).add64_reg(R6, R0);
        asm.bind(back).neg64(R0).sdiv64(R0, 3).smod64(R0, R6);
        asm.alu64(AluOp::Arsh, R0, 63).alu32(AluOp::Xor, R0, R0);
        for size in [Size::B, Size::H, Size::W, Size::DW] {
            asm.load(size, R2, R1, -8).store(size, R10, -16, R2).store_imm(size, R10, -8, -1);
        }
        asm.atomic_add(Size::W, R10, -8, R0).atomic(op::ATOMIC_CMPXCHG, Size::DW, R10, -8, R0);
        asm.lddw(R1, u64::MAX).map_ref(R1, MapIdx(3)).map_value(R2, MapIdx(1), 40);
        asm.function_ref(R3, function).call_local(function).call(Helper::KtimeGetNs);
        asm.jump_if(JmpOp::Sle, R0, R1, back).jump32_if(JmpOp::Set, R0, 7, out).jump(back);
        asm.bind(out).exit();
        asm.bind(function).exit();
        validate(&asm.finish().unwrap()).unwrap();
    }

    #[test]
    fn labels_that_cannot_be_resolved() {
        let mut asm = Asm::new();
        let label = asm.new_label();
        asm.jump(label).exit();
        assert_eq!(asm.finish(), Err(AsmError::UnboundLabel { insn_idx: 0, label: 0 }));

        let mut asm = Asm::new();
        let label = asm.new_label();
        asm.bind(label).exit().bind(label);
        assert_eq!(asm.finish(), Err(AsmError::BoundTwice { label: 0, first: 0, second: 1 }));

        let mut other = Asm::new();
        other.jump(label).exit();
        assert_eq!(other.finish(), Err(AsmError::ForeignLabel { insn_idx: 0, label: 0 }));
    }

    #[test]
    fn long_jumps() {
        let far = |conditional: bool| {
            let mut asm = Asm::new();
            let out = asm.new_label();
            if conditional {
                asm.jump_if(JmpOp::Eq, R0, 0, out);
            } else {
                asm.jump(out);
            }
            for _ in 0..40_000 {
                asm.mov64_imm(R0, 0);
            }
            asm.bind(out).exit();
            asm.finish()
        };
        assert_eq!(far(true), Err(AsmError::JumpTooFar { insn_idx: 0, distance: 40_000 }));
        let insns = far(false).unwrap();
        assert_eq!((insns[0].opcode, insns[0].imm), (op::GOTOL_OP, 40_000));
        validate(&insns).unwrap();
    }
}
