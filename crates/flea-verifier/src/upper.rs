//! Which registers have an upper half of zeros whatever the numbers are, by how they were made:
//! 32-bit operations, narrow loads.
//!
//! A static analysis, forwards over each function. What the compiler wants to know of a 32-bit
//! move could be read off the number's range too, but then paths that differ in that number alone
//! would have to be told apart ([`crate::precision`]).

use crate::cfg::{Cfg, Span, Successors};
use crate::number::scalar::{AluOp, Width};
use crate::op::{Atomic, Op, Operand, Reg, Size};

/// For each instruction, the registers (a bit each) that are so before it.
#[derive(Debug)]
pub(crate) struct UpperHalves {
    before: Vec<u16>,
}

impl UpperHalves {
    pub(crate) fn new(ops: &[Op], cfg: &Cfg) -> Self {
        let mut this = Self { before: vec![u16::MAX; ops.len()] };
        for span in &cfg.functions {
            this.analyse(ops, *span);
        }
        this
    }

    /// The upper half of `reg` is 0 before instruction `idx`, if it holds a number.
    pub(crate) fn is_zero(&self, idx: usize, reg: Reg) -> bool {
        self.before.get(idx).is_some_and(|regs| has(*regs, reg))
    }

    fn analyse(&mut self, ops: &[Op], span: Span) {
        self.before[span.start] = 0;
        let mut todo = vec![span.start];
        // Bits are only ever taken away, so this ends; what no path reaches keeps all of them.
        let mut seen = vec![false; span.end - span.start];
        while let Some(idx) = todo.pop() {
            seen[idx - span.start] = true;
            let after = step(&ops[idx], self.before[idx]);
            for to in Successors::of(idx, &ops[idx]).iter() {
                let joined = self.before[to] & after;
                if joined != self.before[to] || !seen[to - span.start] {
                    self.before[to] = joined;
                    todo.push(to);
                }
            }
        }
    }
}

const fn has(regs: u16, reg: Reg) -> bool {
    regs >> reg.index() & 1 != 0
}

/// The registers after `op`, given those before it.
fn step(op: &Op, regs: u16) -> u16 {
    let set = |reg: Reg, zero: bool| {
        let bit = 1 << reg.index();
        if zero { regs | bit } else { regs & !bit }
    };
    let is_zero = |operand: Operand| match operand {
        Operand::Reg(reg) => has(regs, reg),
        Operand::Imm(imm) => imm >= 0,
    };
    match *op {
        Op::Alu { width: Width::W32, dst, .. }
        | Op::Neg { width: Width::W32, dst }
        | Op::Mov { width: Width::W32, dst, .. }
        | Op::MovSx { width: Width::W32, dst, .. } => set(dst, true),
        Op::Alu { op, dst, src, .. } => {
            let (a, b) = (has(regs, dst), is_zero(src));
            set(
                dst,
                match op {
                    AluOp::And => a || b,
                    AluOp::Or | AluOp::Xor => a && b,
                    AluOp::Rsh => a || matches!(src, Operand::Imm(32..)),
                    AluOp::Div | AluOp::Mod => a,
                    _ => false,
                },
            )
        }
        Op::Mov { dst, src, .. } => set(dst, is_zero(src)),
        Op::Const { dst, value } => set(dst, value <= u64::from(u32::MAX)),
        Op::Swap { bits, dst } | Op::Trunc { bits, dst } => {
            set(dst, bits <= 32 || (bits == 64 && matches!(op, Op::Trunc { .. }) && has(regs, dst)))
        }
        Op::Load { dst, place, sign_extend } => set(dst, place.size != Size::B8 && !sign_extend),
        Op::Neg { dst, .. }
        | Op::MovSx { dst, .. }
        | Op::MapAddress { dst, .. }
        | Op::MapValueAddress { dst, .. }
        | Op::FunctionAddress { dst, .. } => set(dst, false),
        Op::Atomic { op: Atomic::Cmpxchg, place, .. } => set(Reg::R0, place.size != Size::B8),
        Op::Atomic { fetch: true, place, src, .. } => set(src, place.size != Size::B8),
        Op::CallHelper { .. } | Op::CallLocal { .. } | Op::CallPointer { .. } => regs & !0x3f,
        Op::SecondHalf
        | Op::Store { .. }
        | Op::Atomic { .. }
        | Op::Goto { .. }
        | Op::If { .. }
        | Op::Exit => regs,
    }
}
