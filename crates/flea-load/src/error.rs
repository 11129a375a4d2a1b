//! Why a shared object cannot be loaded, and what its author can do about it.

use flea_symbols::addr::{RemoteAddr, Svma};

/// A file that cannot be loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// The magic bytes are missing.
    #[error("not an ELF file; build it with `gcc -shared -fPIC -g`")]
    NotElf,
    /// ELF, but of another kind or for another machine.
    #[error("{found}, not a shared object for x86-64; build it with `gcc -shared -fPIC -g`")]
    NotSharedObject {
        /// What it is.
        found: &'static str,
    },
    /// A table reaches past the end of the file or contradicts itself.
    #[error("truncated or damaged ELF file: {what}")]
    Damaged {
        /// What the reader ran into.
        what: &'static str,
    },
    /// More memory than a patch should need.
    #[error("it takes {size_bytes} bytes of memory; at most {max} can be loaded")]
    TooLarge {
        /// What it takes.
        size_bytes: u64,
        /// The bound.
        max: u64,
    },
    /// W^X.
    #[error(
        "its segment at {at} is writable and executable; link it without `-z rwx`, `-N` or \
         `--omagic`"
    )]
    WritableCode {
        /// The segment.
        at: Svma,
    },
    /// Its code runs on the stack.
    #[error(
        "it wants an executable stack (nested functions whose address is taken, or assembly \
         without a .note.GNU-stack section)"
    )]
    ExecutableStack,
    /// Two segments on one page could not be protected apart.
    #[error("two segments share the page at {at} and want different protection")]
    SharedPage {
        /// The page.
        at: Svma,
    },
    /// Only the page size is kept.
    #[error("a section wants an alignment of {align} bytes; at most 4096 is kept")]
    Alignment {
        /// What it wants.
        align: u64,
    },
    /// Thread-local storage comes from the system's loader.
    #[error(
        "{} thread-local: only the system's loader gives threads such storage; use an ordinary \
         variable, or a function of the target that returns its address",
        match .symbol { Some(name) => format!("`{name}` is"), None => "it has variables that are".to_owned() }
    )]
    ThreadLocal {
        /// The variable, where it has a name.
        symbol: Option<String>,
    },
    /// Something would have to run before the first call.
    #[error(
        "it has code that runs when it is loaded or unloaded ({}), and loading runs none; remove \
         constructors and destructors (also C++ objects with static storage duration), and do \
         not strip it",
        match .symbol { Some(name) => format!("`{name}`"), None => format!("at {at}") }
    )]
    StartCode {
        /// Where the code is.
        at: Svma,
        /// Its name.
        symbol: Option<String>,
    },
    /// An address that a function of the object would have to compute.
    #[error(
        "it selects a function at load time (ifunc, `{symbol}`), which would run code of it; \
         define one version"
    )]
    IndirectFunction {
        /// The symbol.
        symbol: String,
    },
    /// A relocation that shared objects do not have, or that is unknown.
    #[error(
        "its relocation at {at} is of type {kind}, which is not supported; build it with \
         `gcc -shared -fPIC`"
    )]
    Relocation {
        /// The place.
        at: Svma,
        /// `r_type`.
        kind: u32,
    },
    /// Landing pads need unwind rows, and no unwinder of the target knows of the object.
    #[error(
        "it catches or cleans up behind C++ exceptions or Rust panics, and no unwinder of the \
         target knows its frames; write it in C, or build it with -fno-exceptions"
    )]
    Exceptions,
}

/// A place in memory where the object cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// A 32-bit field.
    #[error("`{symbol}` cannot be reached from {at}: more than 2 GiB; build the object with -fPIC")]
    OutOfReach {
        /// What is too far away.
        symbol: String,
        /// The field.
        at: RemoteAddr,
    },
}
