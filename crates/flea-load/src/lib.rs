//! A shared object as the bytes that it is in memory: what a dynamic loader does, computed.
//! The caller maps and writes; nothing here opens a file or knows of processes, and no code of
//! the object is run, or of anybody else.
//!
//! - [`SharedObject::parse`]: start here. Segments, relocations and imports of an ELF file, or
//!   the [`ParseError`] that says why it cannot be loaded in this way.
//! - [`SharedObject::imports`]: what has to be found elsewhere.
//! - [`SharedObject::link`]: the bytes for one place in memory, and how to protect them.
//!
//! **Invariant:** what is accepted works without the system's loader: no thread-local storage,
//! no code that has to run first, no page that is writable and executable.
#![forbid(unsafe_code)]

mod error;
mod file;
mod link;
mod parse;
mod relocations;
mod start_code;
mod symbols;

pub use error::{LinkError, ParseError};
pub use link::{Linked, Region};
pub use parse::{Import, Protection, SharedObject};
