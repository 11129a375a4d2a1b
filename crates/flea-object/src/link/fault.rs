//! Why a program cannot be linked, in the words that a person reads.

use crate::core_relo::CoreError;
use crate::section::SectionFault;

/// A program that cannot be had, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("program '{program}': {fault}")]
pub struct ProgramError {
    /// Its name, or the function's where no program is known yet.
    pub program: String,
    /// Why.
    pub fault: ProgramFault,
}

/// What can be wrong with a program.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProgramFault {
    /// Its section's name.
    #[error(transparent)]
    Section(#[from] SectionFault),
    /// A `static` function in a program section.
    #[error("is static in section '{section}'; programs are global functions")]
    Static {
        /// The section.
        section: String,
    },
    /// Its symbol covers no whole instructions of its section.
    #[error(
        "its symbol says {size_bytes} bytes at {offset:#x} of section '{section}', which is no function there"
    )]
    BadSymbol {
        /// The section.
        section: String,
        /// Start.
        offset: u64,
        /// Length.
        size_bytes: u64,
    },
    /// Two functions share instructions.
    #[error("overlaps function '{other}'")]
    Overlap {
        /// The other one.
        other: String,
    },
    /// A variable or function that the object does not define.
    #[error(
        "refers to '{symbol}', which the object does not define; of kernel functions only bpf_session_is_return, bpf_session_cookie and bpf_rdonly_cast can be had"
    )]
    Extern {
        /// Its name.
        symbol: String,
    },
    /// A session's kernel function in another kind of program.
    #[error("calls '{symbol}', which only SEC(\"fsession/...\") programs can")]
    NotASession {
        /// The kernel function.
        symbol: String,
    },
    /// A reference into a section that is neither code, maps nor global data.
    #[error(
        "function '{function}' refers to section '{section}', which is neither code, .maps nor global data"
    )]
    BadReference {
        /// The function that refers.
        function: String,
        /// The section referred to.
        section: String,
    },
    /// A reference to a place in `.maps` where no map begins.
    #[error("function '{function}' refers to offset {offset} of .maps, where no map begins")]
    NoSuchMap {
        /// The function that refers.
        function: String,
        /// Into `.maps`.
        offset: i64,
    },
    /// An address outside global data.
    #[error(
        "function '{function}' refers to offset {offset} of '{section}', which has {size_bytes} bytes"
    )]
    OutsideData {
        /// The function that refers.
        function: String,
        /// The section.
        section: String,
        /// Into the section.
        offset: i64,
        /// The section's size.
        size_bytes: u64,
    },
    /// A call, or function reference, that leads to no function's start.
    #[error(
        "function '{function}' calls instruction {target} of section '{section}', where no function begins"
    )]
    NoSuchFunction {
        /// The function that calls.
        function: String,
        /// The section.
        section: String,
        /// Index of an instruction there.
        target: i64,
    },
    /// A relocation, or the lack of one, that no compiler makes.
    #[error("function '{function}', instruction {insn_idx}: {what}")]
    BadRelocation {
        /// The function.
        function: String,
        /// Index in the function.
        insn_idx: usize,
        /// What is odd about it.
        what: &'static str,
    },
    /// A CO-RE relocation that no compiler makes, or of a newer one.
    #[error("function '{function}', instruction {insn_idx}: its CO-RE relocation {what}")]
    BadCoreRelocation {
        /// The function.
        function: String,
        /// Index in the function.
        insn_idx: usize,
        /// What is odd about it.
        what: String,
    },
    /// A CO-RE relocation of what the object's own types do not have.
    #[error("CO-RE relocation: {0}")]
    Core(CoreError),
    /// More instructions than fit.
    #[error("has {n_insns} instructions with the functions it calls; at most {max} are allowed")]
    TooLong {
        /// How many so far.
        n_insns: usize,
        /// For one program, or what is left of the object's allowance.
        max: usize,
    },
}

impl ProgramFault {
    pub(crate) fn of(self, program: &str) -> ProgramError {
        ProgramError { program: program.to_owned(), fault: self }
    }
}
