//! eBPF objects: ELF, maps, programs, instructions. Bytes in, plain data out; knows nothing
//! of processes or machine code, and proves nothing about what a program does.
//!
//! - [`parse`]: an object file made by clang becomes an [`spec::Object`].
//! - [`asm`]: programs made in code. [`disasm`]: programs as text.
//! - [`validate`]: is it well-formed eBPF? What the verifier asks first.
//! - [`interp`]: what a program means, for tests.
//! - [`insn`], [`opcode`], [`helper`], [`spec`]: the types that everyone shares.
//! - [`types`]: the target's types. [`core_relo`]: instructions that depend on them.
//! - [`header`]: the target's types as C.
#![forbid(unsafe_code)]

pub mod asm;
pub mod btf;
mod btf_ext;
pub mod core_relo;
pub mod disasm;
mod elf;
pub mod error;
pub mod header;
pub mod helper;
pub mod insn;
pub mod interp;
mod link;
mod maps;
pub mod opcode;
mod parse;
mod prog_array;
mod section;
pub mod spec;
pub mod types;
pub mod validate;

pub use btf::BtfError;
pub use elf::ElfError;
pub use error::ObjectError;
pub use link::{ProgramError, ProgramFault};
pub use maps::{LOCK_BYTES, MapError, MapFault};
pub use parse::parse;
pub use section::SectionFault;
