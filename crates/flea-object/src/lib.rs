//! eBPF objects: ELF, maps, programs, instructions.
#![forbid(unsafe_code)]

pub mod asm;
pub mod disasm;
pub mod helper;
pub mod insn;
pub mod interp;
pub mod opcode;
pub mod spec;
pub mod validate;
