//! Functions, sites and signatures of an ELF module: bytes in, values out.
//!
//! The caller reads the files and hands in their bytes; nothing here opens a file or knows
//! of processes.
//!
//! - [`Module::parse`]: start here. Segments, build id, [`Function`]s by name and address.
//! - [`Module::site`]: where a function can be patched, or the [`Refusal`] that says why not.
//! - [`Module::signature`]: what it is called with, from DWARF or BTF, else what can be proved.
//! - [`Module::types`]: the types of its functions' parameters, or types by name.
//!
//! **Invariant:** a [`Site`] is proved, never guessed: no branch, table, symbol or landing
//! pad of the module leads between its first and its last byte.
#![forbid(unsafe_code)]

pub mod addr;
mod btf;
mod definitions;
mod demangle;
mod dwarf;
mod function;
mod module;
mod pattern;
mod replacement;
pub mod signature;
mod signature_text;
mod site;
mod type_graph;
mod unwind;
mod unwinder;
pub mod x86_64;

pub use definitions::{Definition, DefinitionKind, Slot, SlotOf};
pub use function::{Function, FunctionKind};
pub use module::{Files, Module, ModuleError, Segment};
pub use pattern::{Pattern, PatternError};
pub use replacement::Mismatch;
pub use site::{ReferenceKind, Refusal, Site, SiteKind};
pub use type_graph::{TypeGraph, TypeNames};
pub use unwinder::Unwinder;
