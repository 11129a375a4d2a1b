//! Numbers of the encoding, as RFC 9669 lays them out. Only [`crate::op`] reads them.

/// Low three bits of an opcode; what is left, 6, is JMP32.
pub(crate) mod class {
    pub(crate) const LD: u8 = 0;
    pub(crate) const LDX: u8 = 1;
    pub(crate) const ST: u8 = 2;
    pub(crate) const STX: u8 = 3;
    pub(crate) const ALU: u8 = 4;
    pub(crate) const JMP: u8 = 5;
    pub(crate) const ALU64: u8 = 7;
}

/// Upper four bits of an arithmetic opcode, moved down.
pub(crate) mod alu {
    pub(crate) const ADD: u8 = 0x0;
    pub(crate) const SUB: u8 = 0x1;
    pub(crate) const MUL: u8 = 0x2;
    pub(crate) const DIV: u8 = 0x3;
    pub(crate) const OR: u8 = 0x4;
    pub(crate) const AND: u8 = 0x5;
    pub(crate) const LSH: u8 = 0x6;
    pub(crate) const RSH: u8 = 0x7;
    pub(crate) const NEG: u8 = 0x8;
    pub(crate) const MOD: u8 = 0x9;
    pub(crate) const XOR: u8 = 0xa;
    pub(crate) const MOV: u8 = 0xb;
    pub(crate) const ARSH: u8 = 0xc;
    pub(crate) const END: u8 = 0xd;
}

/// Upper four bits of a jump opcode, moved down.
pub(crate) mod jump {
    pub(crate) const JA: u8 = 0x0;
    pub(crate) const JEQ: u8 = 0x1;
    pub(crate) const JGT: u8 = 0x2;
    pub(crate) const JGE: u8 = 0x3;
    pub(crate) const JSET: u8 = 0x4;
    pub(crate) const JNE: u8 = 0x5;
    pub(crate) const JSGT: u8 = 0x6;
    pub(crate) const JSGE: u8 = 0x7;
    pub(crate) const CALL: u8 = 0x8;
    pub(crate) const EXIT: u8 = 0x9;
    pub(crate) const JLT: u8 = 0xa;
    pub(crate) const JLE: u8 = 0xb;
    pub(crate) const JSLT: u8 = 0xc;
    pub(crate) const JSLE: u8 = 0xd;
}

/// Upper three bits of a load or store opcode.
pub(crate) mod mode {
    pub(crate) const IMM: u8 = 0x00;
    pub(crate) const ABS: u8 = 0x20;
    pub(crate) const IND: u8 = 0x40;
    pub(crate) const MEM: u8 = 0x60;
    pub(crate) const MEMSX: u8 = 0x80;
    pub(crate) const ATOMIC: u8 = 0xc0;
}

/// `imm` of an atomic instruction; `FETCH` is a flag on the first four.
pub(crate) mod atomic {
    pub(crate) const ADD: i32 = 0x00;
    pub(crate) const OR: i32 = 0x40;
    pub(crate) const AND: i32 = 0x50;
    pub(crate) const XOR: i32 = 0xa0;
    pub(crate) const FETCH: i32 = 0x01;
    pub(crate) const XCHG: i32 = 0xe1;
    pub(crate) const CMPXCHG: i32 = 0xf1;
}

/// Set where the second operand is a register.
pub(crate) const SRC_REG: u8 = 0x08;
