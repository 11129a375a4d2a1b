//! Every opcode constant, with RFC 9669's names. An opcode byte is a class plus either a
//! source and an operation (ALU and jumps) or a size and a mode (loads and stores).
//! Knows nothing of programs. Start with the tables of section 3 to 5 of the RFC.
//!
//! ```text
//!   ALU, ALU64, JMP, JMP32      | code (4 bits) | source (1) | class (3) |
//!   LD, LDX, ST, STX            | mode (3 bits) | size  (2)  | class (3) |
//! ```

use crate::insn::Insn;

/// Bits of the class.
pub const CLASS_MASK: u8 = 0x07;
/// Non-standard loads: `lddw` (and Linux's old packet access).
pub const LD: u8 = 0x00;
/// Loads into a register.
pub const LDX: u8 = 0x01;
/// Stores of an immediate.
pub const ST: u8 = 0x02;
/// Stores of a register, and atomics.
pub const STX: u8 = 0x03;
/// 32-bit arithmetic.
pub const ALU: u8 = 0x04;
/// 64-bit jumps, calls, exit.
pub const JMP: u8 = 0x05;
/// 32-bit jumps, and `gotol`.
pub const JMP32: u8 = 0x06;
/// 64-bit arithmetic.
pub const ALU64: u8 = 0x07;

/// Bit of the source in arithmetic and jumps.
pub const SOURCE_MASK: u8 = 0x08;
/// The second operand is `imm`.
pub const K: u8 = 0x00;
/// The second operand is the register `src`.
pub const X: u8 = 0x08;

/// Bits of the operation in arithmetic and jumps.
pub const CODE_MASK: u8 = 0xf0;
/// `dst += src`
pub const ADD: u8 = 0x00;
/// `dst -= src`
pub const SUB: u8 = 0x10;
/// `dst *= src`
pub const MUL: u8 = 0x20;
/// `dst = src != 0 ? dst / src : 0`; signed with `off` 1.
pub const DIV: u8 = 0x30;
/// `dst |= src`
pub const OR: u8 = 0x40;
/// `dst &= src`
pub const AND: u8 = 0x50;
/// `dst <<= src & mask`
pub const LSH: u8 = 0x60;
/// `dst >>= src & mask`, logical
pub const RSH: u8 = 0x70;
/// `dst = -dst`
pub const NEG: u8 = 0x80;
/// `dst = src != 0 ? dst % src : dst`; signed with `off` 1.
pub const MOD: u8 = 0x90;
/// `dst ^= src`
pub const XOR: u8 = 0xa0;
/// `dst = src`; sign-extended from `off` bits with `off` 8, 16 or 32.
pub const MOV: u8 = 0xb0;
/// `dst >>= src & mask`, arithmetic
pub const ARSH: u8 = 0xc0;
/// Byte order: ALU with [`TO_LE`] or [`TO_BE`], ALU64 swaps always; the width is in `imm`.
pub const END: u8 = 0xd0;

/// Source bit of [`END`]: to little endian.
pub const TO_LE: u8 = 0x00;
/// Source bit of [`END`]: to big endian.
pub const TO_BE: u8 = 0x08;

/// Jump always: by `off` in class JMP, by `imm` in class JMP32 (`gotol`).
pub const JA: u8 = 0x00;
/// `dst == src`
pub const JEQ: u8 = 0x10;
/// `dst > src`, unsigned
pub const JGT: u8 = 0x20;
/// `dst >= src`, unsigned
pub const JGE: u8 = 0x30;
/// `dst & src`
pub const JSET: u8 = 0x40;
/// `dst != src`
pub const JNE: u8 = 0x50;
/// `dst > src`, signed
pub const JSGT: u8 = 0x60;
/// `dst >= src`, signed
pub const JSGE: u8 = 0x70;
/// A call: `src` 0 a helper, 1 ([`crate::insn::PSEUDO_CALL`]) a function of the program.
pub const CALL: u8 = 0x80;
/// Return.
pub const EXIT: u8 = 0x90;
/// `dst < src`, unsigned
pub const JLT: u8 = 0xa0;
/// `dst <= src`, unsigned
pub const JLE: u8 = 0xb0;
/// `dst < src`, signed
pub const JSLT: u8 = 0xc0;
/// `dst <= src`, signed
pub const JSLE: u8 = 0xd0;

/// Bits of the mode in loads and stores.
pub const MODE_MASK: u8 = 0xe0;
/// A 64-bit immediate in two instructions.
pub const IMM: u8 = 0x00;
/// Linux's old packet access: refused everywhere.
pub const ABS: u8 = 0x20;
/// Linux's old packet access: refused everywhere.
pub const IND: u8 = 0x40;
/// Memory at `register + off`.
pub const MEM: u8 = 0x60;
/// Memory at `register + off`, sign-extended on load.
pub const MEMSX: u8 = 0x80;
/// Atomic operation, which one is in `imm`.
pub const ATOMIC: u8 = 0xc0;

/// Bits of the size in loads and stores.
pub const SIZE_MASK: u8 = 0x18;
/// 4 bytes
pub const W: u8 = 0x00;
/// 2 bytes
pub const H: u8 = 0x08;
/// 1 byte
pub const B: u8 = 0x10;
/// 8 bytes
pub const DW: u8 = 0x18;

/// `imm` bit of an atomic: `src` receives the old value.
pub const ATOMIC_FETCH: i32 = 0x01;
/// `imm` of an atomic add.
pub const ATOMIC_ADD: i32 = 0x00;
/// `imm` of an atomic or.
pub const ATOMIC_OR: i32 = 0x40;
/// `imm` of an atomic and.
pub const ATOMIC_AND: i32 = 0x50;
/// `imm` of an atomic exclusive or.
pub const ATOMIC_XOR: i32 = 0xa0;
/// `imm` of an exchange (always fetches).
pub const ATOMIC_XCHG: i32 = 0xe0 | ATOMIC_FETCH;
/// `imm` of a compare with `r0` and exchange (always fetches, into `r0`).
pub const ATOMIC_CMPXCHG: i32 = 0xf0 | ATOMIC_FETCH;

/// The whole opcode of a 64-bit immediate's first half.
pub const LDDW: u8 = LD | IMM | DW;
/// The whole opcode of a call of a helper or of a function.
pub const CALL_OP: u8 = JMP | CALL | K;
/// The whole opcode of a call of the function whose address is in a register: [`Insn::callx`].
pub const CALLX_OP: u8 = JMP | CALL | X;
/// The whole opcode of a return.
pub const EXIT_OP: u8 = JMP | EXIT;
/// The whole opcode of an unconditional jump by `off`.
pub const JA_OP: u8 = JMP | JA;
/// The whole opcode of an unconditional jump by `imm`.
pub const GOTOL_OP: u8 = JMP32 | JA;

/// Registers that exist: `r0` to `r10`.
pub const N_REGISTERS: u8 = 11;
/// The frame pointer, read-only.
pub const FRAME_POINTER: u8 = 10;
/// Bytes of stack below `r10` in each frame.
pub const STACK_BYTES: u32 = 512;

impl Insn {
    /// The class, one of [`LD`] to [`ALU64`].
    #[must_use]
    pub const fn class(self) -> u8 {
        self.opcode & CLASS_MASK
    }

    /// The operation of an arithmetic instruction or jump.
    #[must_use]
    pub const fn code(self) -> u8 {
        self.opcode & CODE_MASK
    }

    /// The mode of a load or store.
    #[must_use]
    pub const fn mode(self) -> u8 {
        self.opcode & MODE_MASK
    }

    /// Whether the second operand of an arithmetic instruction or jump is a register.
    #[must_use]
    pub const fn is_source_register(self) -> bool {
        self.opcode & SOURCE_MASK == X
    }

    /// The register that a `callx` calls through; `None` for anything else. RFC 9669 has it in
    /// `dst`, as clang has from version 19 on; older ones put it into `imm`.
    #[must_use]
    pub const fn callx(self) -> Option<u8> {
        match (self.opcode, self.dst, self.imm) {
            (CALLX_OP, 0, imm @ 0..=10) => Some(imm.to_le_bytes()[0]),
            (CALLX_OP, dst, 0) => Some(dst),
            _ => None,
        }
    }

    /// Bytes that a load or store moves.
    #[must_use]
    pub const fn access_bytes(self) -> u32 {
        match self.opcode & SIZE_MASK {
            W => 4,
            H => 2,
            B => 1,
            _ => 8,
        }
    }

    /// Whether this is the first half of a 64-bit immediate.
    #[must_use]
    pub const fn is_lddw(self) -> bool {
        self.opcode == LDDW
    }
}
