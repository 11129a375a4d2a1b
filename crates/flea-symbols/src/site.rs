//! Where a function can be patched, and the reasons why not. The proof itself is per
//! architecture ([`crate::x86_64`]). Knows nothing of processes.

use std::fmt;

use crate::addr::Svma;
use crate::function::Function;
use crate::module::Module;
use crate::x86_64;

/// A proved place for a patch: nothing in the module leads between its first and its last
/// byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// How it is patched.
    pub kind: SiteKind,
    /// The function's own address (the `endbr64`, if there is one).
    pub function: Svma,
    /// The first byte to be replaced: the function's address, behind `endbr64`; before it where
    /// there is a `door`.
    pub address: Svma,
    /// Where two bytes of nops at the entry, behind `endbr64`, are replaced as well, by a short
    /// jump back to `address`: the five bytes there are nops before the entry that nobody
    /// executes (`-fpatchable-function-entry=N,M`). That is for functions which have no room,
    /// and is opened last and closed first.
    pub door: Option<Svma>,
    /// What the file has there: all bytes that the patch replaces, at least 5. A patch puts
    /// its 5-byte jump or call first and fills the rest with one-byte nops, so that a return
    /// to `address + 5` runs on.
    pub original: Vec<u8>,
    /// Where instructions start within `original`, 0 first. A thread can stand at each of
    /// them, so each but 0 must be emptied before the tail is written. Padding behind the
    /// function's end is not in it: no thread is ever there.
    pub boundaries: Vec<u8>,
}

/// How a site is patched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SiteKind {
    /// Nops that may be dropped. With more than one of them (see [`Site::boundaries`]) a
    /// thread may stand between.
    Nop5,
    /// Instructions that must be run elsewhere first. They may be RIP-relative or branches:
    /// they are to be re-encoded, not copied.
    Relocated,
}

impl Site {
    /// Bytes that the patch replaces.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.original.len()
    }

    /// Where the function goes on behind the replaced bytes.
    #[must_use]
    pub fn resume(&self) -> Svma {
        Svma(self.address.0 + self.original.len() as u64)
    }
}

/// Why a function has no site.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// STT_GNU_IFUNC.
    #[error(
        "{address} is the resolver that picks an implementation (ifunc), not the function: attach to the implementation"
    )]
    Ifunc {
        /// The resolver.
        address: Svma,
    },
    /// `foo.cold`.
    #[error("a cold part of another function: it is jumped to in the middle of a call")]
    ColdPart,
    /// Its bytes are not in the file.
    #[error("the file has no code at {address}")]
    NotInFile {
        /// The function.
        address: Svma,
    },
    /// Without sections neither relocations nor unwind entries are found.
    #[error("the file has no section headers, so what jumps into the function cannot be told")]
    NoSectionHeaders,
    /// No five bytes.
    #[error("only {len_bytes} bytes before {next}: a jump takes 5")]
    TooShort {
        /// What there is.
        len_bytes: usize,
        /// What follows.
        next: Svma,
    },
    /// Something leads into the bytes that would be replaced.
    #[error("{kind} at {from} leads to {target}, into the bytes to be replaced")]
    EnteredInside {
        /// Where it leads.
        target: Svma,
        /// Where it is.
        from: Svma,
        /// What it is.
        kind: ReferenceKind,
    },
    /// The function jumps back to its first instruction.
    #[error(
        "a loop jumps from {from} back to the first instruction: every round would be taken for a call"
    )]
    LoopsToEntry {
        /// The branch.
        from: Svma,
    },
    /// A call among the first instructions.
    #[error("a call at {at}, among the bytes to be replaced: {}", why_no_call(if_pushed.is_some()))]
    CallInPrologue {
        /// The call.
        at: Svma,
        /// The site that does for an image which pushes [`Site::resume`] as the return
        /// address and *jumps* to the callee: unwinders then see nothing new. It is no site
        /// for a process with a shadow stack, and costs a return misprediction. All else
        /// about it is proved. `None` where the call is not the last instruction replaced.
        if_pushed: Option<Box<Site>>,
    },
    /// A system call among the first instructions.
    #[error(
        "a system call at {at}, among the bytes to be replaced: the kernel may resume a thread there"
    )]
    SystemCall {
        /// The instruction.
        at: Svma,
    },
    /// int3, ud2, hlt.
    #[error("{instruction} at {at}, among the bytes to be replaced")]
    Trap {
        /// The instruction.
        at: Svma,
        /// Its name.
        instruction: String,
    },
    /// An instruction that means something else in another place.
    #[error("{instruction} at {at} cannot be run elsewhere")]
    NotRelocatable {
        /// The instruction.
        at: Svma,
        /// Its name.
        instruction: String,
    },
    /// The target of a computed jump is not known.
    #[error("a computed jump at {at} could lead anywhere in the function")]
    UnprovenJump {
        /// The jump.
        at: Svma,
    },
    /// Bytes that are no instruction.
    #[error("bytes at {at} are not an instruction, so the function's jumps cannot be told")]
    Undecodable {
        /// The first of them.
        at: Svma,
    },
}

impl Refusal {
    /// A short word for the kind of refusal, for counts.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Ifunc { .. } => "ifunc resolver",
            Self::ColdPart => "cold part",
            Self::NotInFile { .. } => "not in the file",
            Self::NoSectionHeaders => "no section headers",
            Self::TooShort { .. } => "too short",
            Self::EnteredInside { .. } => "entered inside the replaced bytes",
            Self::LoopsToEntry { .. } => "loops to its entry",
            Self::CallInPrologue { .. } => "call in the replaced bytes",
            Self::SystemCall { .. } => "system call in the replaced bytes",
            Self::Trap { .. } => "trap in the replaced bytes",
            Self::NotRelocatable { .. } => "not relocatable",
            Self::UnprovenJump { .. } => "computed jump not proved",
            Self::Undecodable { .. } => "not decodable",
        }
    }
}

fn why_no_call(is_last: bool) -> &'static str {
    if is_last {
        "a copy has to push its return address, which a process with a shadow stack forbids"
    } else {
        "it returns to one of them"
    }
}

/// What can lead to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ReferenceKind {
    /// A direct jump.
    Branch,
    /// A direct call.
    Call,
    /// An instruction that takes the address.
    CodeAddress,
    /// A word of data, or a relocation.
    Pointer,
    /// An entry of a jump table.
    JumpTable,
    /// A symbol, or the start of an unwind entry.
    Symbol,
    /// An exception handler.
    LandingPad,
}

impl fmt::Display for ReferenceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Branch => "a jump",
            Self::Call => "a call",
            Self::CodeAddress => "an instruction that takes an address",
            Self::Pointer => "a pointer",
            Self::JumpTable => "a jump table",
            Self::Symbol => "a symbol",
            Self::LandingPad => "an exception handler",
        })
    }
}

impl Module<'_> {
    /// Where `function` can be patched. The first call for a module reads all of its code.
    ///
    /// # Errors
    /// [`Refusal`]: the reason why it cannot be.
    pub fn site(&self, function: &Function) -> Result<Site, Refusal> {
        x86_64::site::find(self, function)
    }
}
