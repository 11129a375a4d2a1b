//! Arithmetic of all kinds.

use flea_object::opcode as op;

use crate::CONTEXT_WORDS;
use crate::builder::{Builder, CONTEXT, DATA, DATA_BYTES, DW};

/// What the `word`-th word of the context is in the runs that are compared.
const fn context_word(word: u64) -> u64 {
    (word + 1) << 36 | (word + 1)
}

impl Builder<'_> {
    /// Some number in `reg`.
    pub(crate) fn fresh(&mut self, reg: u8) {
        match self.random.below(5) {
            0 => {
                let imm = self.random.imm();
                self.mov_imm(reg, imm);
            }
            1 => {
                let n = self.random.number();
                self.constant(reg, n);
            }
            2 => {
                let word = self.random.below(CONTEXT_WORDS);
                self.load(DW, reg, CONTEXT, 8 * word as i16);
            }
            3 => self.unknown_edge(reg),
            _ => self.load_from(reg, DATA, DATA_BYTES),
        }
    }

    /// A number near an edge that only the running program knows: context words are what
    /// [`context_word`] says in the runs that are compared, and DATA starts out as zeroes.
    fn unknown_edge(&mut self, reg: u8) {
        let mut imm = self.random.imm();
        if self.random.chance(50) {
            let word = self.random.below(CONTEXT_WORDS);
            imm ^= context_word(word) as i32;
            self.load(DW, reg, CONTEXT, 8 * word as i16);
        } else {
            let off = 8 * self.random.below(DATA_BYTES / 8) as i16;
            self.load(DW, reg, DATA, off);
        }
        self.alu_imm(op::XOR, reg, imm);
        if self.random.chance(30) {
            self.emit(op::ALU64 | op::END, reg, 0, 0, 64);
        }
    }

    pub(crate) fn arithmetic(&mut self) {
        let wide = self.random.chance(50);
        let class = if wide { op::ALU64 } else { op::ALU };
        let (dst, src) = (self.target(), self.source());
        match self.random.below(8) {
            0 => self.emit(op::NEG | class, dst, 0, 0, 0),
            1 => self.byte_order(dst),
            2 => {
                let bits = self.random.pick(&[8, 16, if wide { 32 } else { 8 }]);
                self.emit(op::MOV | op::X | class, dst, src, bits, 0);
            }
            _ if self.random.chance(50) => {
                let (code, off) = self.operation();
                self.emit(code | op::X | class, dst, src, off, 0);
            }
            _ => {
                let (code, off) = self.operation();
                let imm = self.operand(code, if wide { 64 } else { 32 });
                self.emit(code | class, dst, 0, off, imm);
            }
        }
    }

    fn byte_order(&mut self, dst: u8) {
        let bits = self.random.pick(&[16, 32, 64]);
        let kinds =
            [op::ALU | op::END | op::TO_LE, op::ALU | op::END | op::TO_BE, op::ALU64 | op::END];
        let opcode = self.random.pick(&kinds);
        self.emit(opcode, dst, 0, 0, bits);
    }

    /// An operation of two operands, and the `off` that makes some of them signed.
    fn operation(&mut self) -> (u8, i16) {
        let codes = [
            op::ADD,
            op::SUB,
            op::MUL,
            op::DIV,
            op::OR,
            op::AND,
            op::LSH,
            op::RSH,
            op::MOD,
            op::XOR,
            op::ARSH,
        ];
        let code = self.random.pick(&codes);
        let signed = matches!(code, op::DIV | op::MOD) && self.random.chance(50);
        (code, i16::from(signed))
    }

    fn operand(&mut self, code: u8, bits: i32) -> i32 {
        let imm = self.random.imm();
        if self.mistake() {
            return imm;
        }
        match code {
            op::LSH | op::RSH | op::ARSH => imm & (bits - 1),
            op::DIV | op::MOD if imm == 0 => 1,
            _ => imm,
        }
    }

    pub(crate) fn copy(&mut self) {
        let (dst, src) = (self.target(), self.source());
        let class = self.random.pick(&[op::ALU64, op::ALU64, op::ALU]);
        self.emit(class | op::MOV | op::X, dst, src, 0, 0);
    }
}
