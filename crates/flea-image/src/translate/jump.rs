//! Jumps.

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{Block, InstBuilder, types};
use flea_object::insn::Insn;
use flea_verifier::facts::{Branch, Fact};

use super::{Scope, Translator, op};
use crate::request::CompileError;

impl Translator<'_, '_> {
    pub(super) fn jump(
        &mut self,
        scope: &mut Scope,
        idx: u32,
        insn: Insn,
    ) -> Result<(), CompileError> {
        let to = op::jump_target(insn, idx)
            .ok_or(CompileError::BadFacts { insn_idx: idx, what: "jump out of the program" })?;
        if matches!(insn.opcode, op::JA | op::JA32) {
            let block = self.block(scope, to);
            self.b.ins().jump(block, &[]);
            return Ok(());
        }
        let then = self.block(scope, to);
        let otherwise = self.block(scope, idx + 1);
        if let Some(taken) = self.decided(scope, idx, insn) {
            self.b.ins().jump(if taken { then } else { otherwise }, &[]);
            return Ok(());
        }
        let ty = if op::class(insn.opcode) == op::JMP { types::I64 } else { types::I32 };
        let a = self.reg(scope, insn.dst);
        let a = self.narrow(a, ty);
        let b = if insn.opcode & op::X != 0 {
            let reg = self.reg(scope, insn.src);
            self.narrow(reg, ty)
        } else {
            self.imm(insn.imm, ty)
        };
        let cc = match insn.opcode & 0xf0 {
            0x10 => IntCC::Equal,
            0x20 => IntCC::UnsignedGreaterThan,
            0x30 => IntCC::UnsignedGreaterThanOrEqual,
            0x40 => {
                let common = self.b.ins().band(a, b);
                self.b.ins().brif(common, then, &[], otherwise, &[]);
                return Ok(());
            }
            0x50 => IntCC::NotEqual,
            0x60 => IntCC::SignedGreaterThan,
            0x70 => IntCC::SignedGreaterThanOrEqual,
            0xa0 => IntCC::UnsignedLessThan,
            0xb0 => IntCC::UnsignedLessThanOrEqual,
            0xc0 => IntCC::SignedLessThan,
            0xd0 => IntCC::SignedLessThanOrEqual,
            _ => return Err(CompileError::Unsupported { insn_idx: idx, opcode: insn.opcode }),
        };
        let condition = self.b.ins().icmp(cc, a, b);
        self.b.ins().brif(condition, then, &[], otherwise, &[]);
        Ok(())
    }

    /// A jump that every path takes, or none; the null check of an address that cannot be null.
    fn decided(&mut self, scope: &Scope, idx: u32, insn: Insn) -> Option<bool> {
        if let Some(branch) = self.used.verified.operands(idx).branch {
            return Some(branch == Branch::Jumps);
        }
        let value = self.reg(scope, insn.dst);
        let against_zero = op::class(insn.opcode) == op::JMP
            && insn.opcode & op::X == 0
            && insn.imm == 0
            && self.nonnull.contains(&value);
        match insn.opcode & 0xf0 {
            0x10 if against_zero => Some(false),
            0x50 if against_zero => Some(true),
            _ => None,
        }
    }

    /// The block that begins at `idx`; the function's end where no path leads there.
    fn block(&mut self, scope: &mut Scope, idx: u32) -> Block {
        let facts = self.used.verified.facts();
        let reached = facts.get(idx as usize).is_some_and(|f| *f != Fact::Unreachable);
        if !reached || !scope.range.contains(&idx) {
            return scope.end;
        }
        *scope.blocks.entry(idx).or_insert_with(|| self.b.create_block())
    }
}
