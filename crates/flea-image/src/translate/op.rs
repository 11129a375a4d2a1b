//! Opcode fields of RFC 9669, and which instructions may come next.

use flea_object::insn::Insn;

pub(crate) const LD: u8 = 0;
pub(crate) const LDX: u8 = 1;
pub(crate) const ST: u8 = 2;
pub(crate) const STX: u8 = 3;
pub(crate) const ALU: u8 = 4;
pub(crate) const JMP: u8 = 5;
pub(crate) const JMP32: u8 = 6;
pub(crate) const ALU64: u8 = 7;

/// Source bit: register.
pub(crate) const X: u8 = 0x08;

pub(crate) const ADD: u8 = 0x00;
pub(crate) const SUB: u8 = 0x10;
pub(crate) const MUL: u8 = 0x20;
pub(crate) const DIV: u8 = 0x30;
pub(crate) const OR: u8 = 0x40;
pub(crate) const AND: u8 = 0x50;
pub(crate) const LSH: u8 = 0x60;
pub(crate) const RSH: u8 = 0x70;
pub(crate) const NEG: u8 = 0x80;
pub(crate) const MOD: u8 = 0x90;
pub(crate) const XOR: u8 = 0xa0;
pub(crate) const MOV: u8 = 0xb0;
pub(crate) const ARSH: u8 = 0xc0;
pub(crate) const END: u8 = 0xd0;

/// Modes of loads and stores.
pub(crate) const MEM: u8 = 0x60;
pub(crate) const MEMSX: u8 = 0x80;
pub(crate) const ATOMIC: u8 = 0xc0;

/// Whole opcodes.
pub(crate) const LDDW: u8 = 0x18;
pub(crate) const JA: u8 = 0x05;
pub(crate) const JA32: u8 = 0x06;
pub(crate) const CALL: u8 = 0x85;
pub(crate) const CALLX: u8 = 0x8d;
pub(crate) const EXIT: u8 = 0x95;

/// `imm` of atomics.
pub(crate) const FETCH: i32 = 0x01;
pub(crate) const XCHG: i32 = 0xe1;
pub(crate) const CMPXCHG: i32 = 0xf1;
pub(crate) const LOAD_ACQUIRE: i32 = 0x100;
pub(crate) const STORE_RELEASE: i32 = 0x110;

pub(crate) const fn class(opcode: u8) -> u8 {
    opcode & 7
}

pub(crate) const fn mode(opcode: u8) -> u8 {
    opcode & 0xe0
}

/// The size field of a load or store.
pub(crate) const fn size(opcode: u8) -> u8 {
    opcode & 0x18
}

/// Bytes that a load or store moves.
pub(crate) const fn size_bytes(opcode: u8) -> u8 {
    match size(opcode) {
        0x00 => 4,
        0x08 => 2,
        0x10 => 1,
        _ => 8,
    }
}

/// Does the instruction jump somewhere, and where to?
pub(crate) fn jump_target(insn: Insn, insn_idx: u32) -> Option<u32> {
    let delta = match (class(insn.opcode), insn.opcode) {
        (_, JA32) => i64::from(insn.imm),
        (_, CALL | CALLX | EXIT) => return None,
        (JMP | JMP32, _) => i64::from(insn.off),
        _ => return None,
    };
    u32::try_from(i64::from(insn_idx) + 1 + delta).ok()
}

/// The instructions that may run after `insn`.
pub(crate) fn successors(insn: Insn, insn_idx: u32) -> [Option<u32>; 2] {
    let next = Some(insn_idx + if insn.opcode == LDDW { 2 } else { 1 });
    match insn.opcode {
        EXIT => [None, None],
        JA | JA32 => [jump_target(insn, insn_idx), None],
        _ => [next, jump_target(insn, insn_idx)],
    }
}
