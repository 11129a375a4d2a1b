//! Branches, loops, and ways out of a function.

use flea_object::opcode as op;

use crate::builder::{Builder, NUMBERS};

const CONDITIONS: [u8; 11] = [
    op::JEQ,
    op::JGT,
    op::JGE,
    op::JSET,
    op::JNE,
    op::JSGT,
    op::JSGE,
    op::JLT,
    op::JLE,
    op::JSLT,
    op::JSLE,
];

impl Builder<'_> {
    /// A loop whose counter nothing in it changes, nearly always.
    pub(crate) fn repeat(&mut self, depth: u32) {
        let free = |reg: &u8| !self.counters.contains(reg);
        let Some(counter) = [9, 8].into_iter().find(free) else { return };
        self.mov_imm(counter, 0);
        let start = self.out.len();
        self.counters.push(counter);
        for _ in 0..self.random.below(4) {
            self.piece(depth - 1);
        }
        self.counters.pop();
        let bound = 1 + self.random.below(5) as i32;
        if self.random.chance(50) {
            self.alu_imm(op::AND, counter, 7);
        }
        self.alu_imm(op::ADD, counter, 1);
        let (code, class) = self.random.pick(&[
            (op::JLT, op::JMP),
            (op::JLT, op::JMP32),
            (op::JSLT, op::JMP),
            (op::JNE, op::JMP),
        ]);
        let back = start as i64 - self.out.len() as i64 - 1;
        self.emit(class | code, counter, 0, back as i16, bound);
    }

    fn condition(&mut self) -> usize {
        let code = self.random.pick(&CONDITIONS);
        let class = self.random.pick(&[op::JMP, op::JMP32]);
        let (dst, src, imm) = (self.source(), self.source(), self.random.imm());
        if self.random.chance(50) {
            self.emit(code | class, dst, 0, 0, imm);
        } else {
            self.emit(code | op::X | class, dst, src, 0, 0);
        }
        self.out.len() - 1
    }

    pub(crate) fn branch(&mut self, depth: u32) {
        let at = self.condition();
        for _ in 0..1 + self.random.below(3) {
            self.piece(depth - 1);
        }
        if self.random.chance(40) {
            let over = self.jump();
            self.land(at);
            self.piece(depth - 1);
            self.land(over);
        } else {
            self.land(at);
        }
    }

    /// A function's result, before its end.
    pub(crate) fn early_exit(&mut self) {
        let over = self.condition();
        let reg = self.random.pick(&NUMBERS);
        self.mov(0, reg);
        self.exit();
        self.land(over);
    }
}
