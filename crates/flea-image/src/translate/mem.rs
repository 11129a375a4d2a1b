//! Loads, stores and atomics.

use cranelift_codegen::ir::{AtomicRmwOp, InstBuilder, Type, Value, types};
use flea_object::insn::Insn;
use flea_object::spec::{MapKind, ProgramKind};
use flea_symbols::signature::RetWord;
use flea_verifier::facts::{Fact, Region};

use super::{Scope, Side, Translator, op, probed, proved};
use crate::changes::Changed;
use crate::request::CompileError;

/// An address as base and constant offset, so that both can go into one addressing mode.
#[derive(Clone, Copy)]
struct Place {
    base: Value,
    offset: i32,
}

impl Translator<'_, '_> {
    pub(super) fn load(
        &mut self,
        scope: &mut Scope,
        idx: u32,
        insn: Insn,
        fact: Fact,
    ) -> Result<(), CompileError> {
        let signed = match op::mode(insn.opcode) {
            op::MEM => false,
            op::MEMSX if op::size_bytes(insn.opcode) < 8 => true,
            _ => return Err(CompileError::Unsupported { insn_idx: idx, opcode: insn.opcode }),
        };
        let ty = access_type(insn);
        let value = match fact {
            Fact::Access(Region::Ctx { offset_bytes }) => {
                self.load_context(idx, offset_bytes, ty)?
            }
            Fact::Access(Region::Target) => self.load_target(scope, idx, insn)?,
            Fact::Access(_) => match self.cell(scope, idx, insn.src, i32::from(insn.off), ty) {
                Some(var) => self.b.use_var(var),
                None => {
                    let place = self.place(scope, idx, insn.src, insn.off)?;
                    self.b.ins().load(ty, proved(), place.base, place.offset)
                }
            },
            _ => return Err(CompileError::BadFacts { insn_idx: idx, what: "load of nothing" }),
        };
        let value = match (signed, ty) {
            (_, types::I64) => value,
            (true, _) => self.b.ins().sextend(types::I64, value),
            (false, _) => self.b.ins().uextend(types::I64, value),
        };
        self.set(scope, insn.dst, value);
        Ok(())
    }

    fn load_context(&mut self, idx: u32, offset: i32, ty: Type) -> Result<Value, CompileError> {
        let out = CompileError::BadFacts { insn_idx: idx, what: "context access out of bounds" };
        let byte = offset.rem_euclid(8);
        if byte.cast_unsigned() + ty.bytes() > 8 {
            return Err(out);
        }
        let word = offset.div_euclid(8);
        let word = match self.used.kind {
            Some(ProgramKind::Uprobe | ProgramKind::Uretprobe) => self.register_word(word),
            _ => self.context_slot(word),
        };
        let word = word.ok_or(out)?;
        let word =
            if byte == 0 { word } else { self.b.ins().ushr_imm_s(word, i64::from(8 * byte)) };
        Ok(self.narrow(word, ty))
    }

    pub(super) fn store(
        &mut self,
        scope: &Scope,
        idx: u32,
        insn: Insn,
        fact: Fact,
    ) -> Result<(), CompileError> {
        let region = match fact {
            Fact::Access(Region::Ctx { offset_bytes }) => {
                return self.store_context(scope, idx, insn, offset_bytes);
            }
            Fact::Access(Region::Target) => {
                return Err(CompileError::BadFacts { insn_idx: idx, what: "store to the target" });
            }
            Fact::Access(region) => region,
            _ => return Err(CompileError::BadFacts { insn_idx: idx, what: "store to nothing" }),
        };
        let is_stx = op::class(insn.opcode) == op::STX;
        let ty = access_type(insn);
        match op::mode(insn.opcode) {
            op::MEM => {}
            op::ATOMIC if is_stx => return self.atomic(scope, idx, insn, region, ty),
            _ => return Err(CompileError::Unsupported { insn_idx: idx, opcode: insn.opcode }),
        }
        let value =
            if is_stx { self.reg(scope, insn.src) } else { self.iconst(i64::from(insn.imm)) };
        let value = self.narrow(value, ty);
        if let Some(var) = self.cell(scope, idx, insn.dst, i32::from(insn.off), ty) {
            self.b.def_var(var, value);
            return Ok(());
        }
        let place = self.place(scope, idx, insn.dst, insn.off)?;
        self.b.ins().store(proved(), value, place.base, place.offset);
        Ok(())
    }

    /// A store to a word of the context, which somebody has allowed. An fsession program's stores
    /// to the result at entry, and to arguments at exit, change nothing: there is no result yet,
    /// and the call is over.
    fn store_context(
        &mut self,
        scope: &Scope,
        idx: u32,
        insn: Insn,
        offset: i32,
    ) -> Result<(), CompileError> {
        let out = CompileError::BadFacts { insn_idx: idx, what: "store to the context" };
        let is_stx = op::class(insn.opcode) == op::STX;
        if offset % 8 != 0 || op::mode(insn.opcode) != op::MEM {
            return Err(out);
        }
        let kind = self.used.kind;
        let changed = match kind {
            Some(ProgramKind::Uprobe | ProgramKind::Uretprobe) => probed(offset / 8),
            _ => self.changed_slot(offset / 8),
        };
        let changed = match (self.env.args.side, changed) {
            (Side::Session, Some(what @ Changed::Argument(_)))
            | (Side::Exit, Some(what @ Changed::Result)) => what,
            (Side::Session | Side::Exit, Some(_)) if kind == Some(ProgramKind::Fsession) => {
                return Ok(());
            }
            _ => return Err(out),
        };
        let value =
            if is_stx { self.reg(scope, insn.src) } else { self.iconst(i64::from(insn.imm)) };
        let value = self.narrow(value, access_type(insn));
        let (base, at) = self.place_of(changed).ok_or(out)?;
        if changed == Changed::Result {
            self.out.reads.add_result(RetWord::Rax);
        }
        self.b.ins().store(proved(), value, base, at);
        Ok(())
    }

    fn atomic(
        &mut self,
        scope: &Scope,
        idx: u32,
        insn: Insn,
        region: Region,
        ty: Type,
    ) -> Result<(), CompileError> {
        let unsupported = CompileError::Unsupported { insn_idx: idx, opcode: insn.opcode };
        if insn.imm == op::LOAD_ACQUIRE || insn.imm == op::STORE_RELEASE {
            return self.ordered(scope, idx, insn, ty);
        }
        if !matches!(ty, types::I32 | types::I64) {
            return Err(unsupported);
        }
        let place = self.place(scope, idx, insn.dst, insn.off)?;
        let operand = self.reg(scope, insn.src);
        let operand = self.narrow(operand, ty);
        let address = self.b.ins().iadd_imm_s(place.base, i64::from(place.offset));
        if insn.imm == op::CMPXCHG {
            let expected = self.reg(scope, 0);
            let expected = self.narrow(expected, ty);
            let old = self.b.ins().atomic_cas(proved(), address, expected, operand);
            let old = self.widen(old);
            self.set(scope, 0, old);
            return Ok(());
        }
        let fetch = insn.imm & op::FETCH != 0;
        let rmw = match insn.imm {
            op::XCHG => AtomicRmwOp::Xchg,
            imm => match imm & !op::FETCH {
                0x00 => AtomicRmwOp::Add,
                0x40 => AtomicRmwOp::Or,
                0x50 => AtomicRmwOp::And,
                0xa0 => AtomicRmwOp::Xor,
                _ => return Err(unsupported),
            },
        };
        if !fetch && self.is_own_memory(region) {
            let old = self.b.ins().load(ty, proved(), place.base, place.offset);
            let new = match rmw {
                AtomicRmwOp::Or => self.b.ins().bor(old, operand),
                AtomicRmwOp::And => self.b.ins().band(old, operand),
                AtomicRmwOp::Xor => self.b.ins().bxor(old, operand),
                _ => self.b.ins().iadd(old, operand),
            };
            self.b.ins().store(proved(), new, place.base, place.offset);
            return Ok(());
        }
        let old = self.b.ins().atomic_rmw(ty, proved(), rmw, address, operand);
        if fetch {
            let old = self.widen(old);
            self.set(scope, insn.src, old);
        }
        Ok(())
    }

    fn ordered(
        &mut self,
        scope: &Scope,
        idx: u32,
        insn: Insn,
        ty: Type,
    ) -> Result<(), CompileError> {
        if insn.imm == op::LOAD_ACQUIRE {
            let place = self.place(scope, idx, insn.src, insn.off)?;
            let address = self.b.ins().iadd_imm_s(place.base, i64::from(place.offset));
            let value = self.b.ins().atomic_load(ty, proved(), address);
            let value = self.widen(value);
            self.set(scope, insn.dst, value);
        } else {
            let place = self.place(scope, idx, insn.dst, insn.off)?;
            let address = self.b.ins().iadd_imm_s(place.base, i64::from(place.offset));
            let value = self.reg(scope, insn.src);
            let value = self.narrow(value, ty);
            self.b.ins().atomic_store(proved(), value, address);
        }
        Ok(())
    }

    /// Memory that no other thread touches needs no bus lock: one instruction is atomic enough
    /// towards signal handlers of the same thread.
    fn is_own_memory(&self, region: Region) -> bool {
        match region {
            Region::MapValue { map } => self
                .env
                .plan
                .maps
                .get(map.0 as usize)
                .is_some_and(|m| matches!(m.kind, MapKind::PerCpuArray | MapKind::PerCpuHash)),
            Region::SessionCookie => true,
            Region::Stack
            | Region::Ctx { .. }
            | Region::MapKey
            | Region::RingbufRecord
            | Region::Memory
            | Region::Target => false,
        }
    }

    /// The variable of the promoted stack cell at `reg + off`, if it is one.
    pub(super) fn cell(
        &self,
        scope: &Scope,
        idx: u32,
        reg: u8,
        off: i32,
        ty: Type,
    ) -> Option<cranelift_frontend::Variable> {
        let at = scope.frame.stack_offset(idx, reg)?.checked_add(off)?;
        let size = *scope.frame.cells.get(&at)?;
        if u32::from(size) == ty.bytes() { scope.cells.get(&at).copied() } else { None }
    }

    /// `reg + off` as an address.
    fn place(&mut self, scope: &Scope, idx: u32, reg: u8, off: i16) -> Result<Place, CompileError> {
        self.place_at(scope, idx, reg, i32::from(off))
    }

    fn place_at(
        &mut self,
        scope: &Scope,
        idx: u32,
        reg: u8,
        off: i32,
    ) -> Result<Place, CompileError> {
        let known = scope.frame.stack_offset(idx, reg).and_then(|o| o.checked_add(off));
        let Some(from_top) = known else {
            return Ok(Place { base: self.reg(scope, reg), offset: off });
        };
        let outside = CompileError::BadFacts { insn_idx: idx, what: "access outside the stack" };
        if from_top < -scope.stack_bytes || from_top >= 0 {
            return Err(outside);
        }
        let slot = scope.slot.ok_or(outside)?;
        let base = self.b.ins().stack_addr(types::I64, slot, scope.stack_bytes + from_top);
        Ok(Place { base, offset: 0 })
    }

    /// Reads a value through a pointer in `reg`: a promoted cell or memory.
    pub(super) fn read_through(
        &mut self,
        scope: &Scope,
        idx: u32,
        reg: u8,
        ty: Type,
    ) -> Result<Value, CompileError> {
        if let Some(var) = self.cell(scope, idx, reg, 0, ty) {
            return Ok(self.b.use_var(var));
        }
        let place = self.place_at(scope, idx, reg, 0)?;
        Ok(self.b.ins().load(ty, proved(), place.base, place.offset))
    }

    /// Writes a value through a pointer in `reg`: to a promoted cell or memory.
    pub(super) fn write_through(
        &mut self,
        scope: &Scope,
        idx: u32,
        reg: u8,
        value: Value,
    ) -> Result<(), CompileError> {
        let ty = self.type_of(value);
        if let Some(var) = self.cell(scope, idx, reg, 0, ty) {
            self.b.def_var(var, value);
            return Ok(());
        }
        let place = self.place_at(scope, idx, reg, 0)?;
        self.b.ins().store(proved(), value, place.base, place.offset);
        Ok(())
    }
}

pub(super) fn access_type(insn: Insn) -> Type {
    match op::size_bytes(insn.opcode) {
        1 => types::I8,
        2 => types::I16,
        4 => types::I32,
        _ => types::I64,
    }
}
