//! Why an object could not be read. Each operation has its own small enum; this is their
//! sum, and what [`crate::parse`] returns.

use crate::btf::BtfError;
use crate::elf::ElfError;
use crate::link::ProgramError;
use crate::maps::MapError;

/// Why [`crate::parse`] failed. Its text says what to change; nothing was loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    /// The file is no eBPF object, or is damaged.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// `.BTF` or `.BTF.ext` is damaged.
    #[error(transparent)]
    Btf(#[from] BtfError),
    /// A map that Flea does not have.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A program that Flea cannot run, or whose code cannot be linked.
    #[error(transparent)]
    Program(#[from] ProgramError),
}
