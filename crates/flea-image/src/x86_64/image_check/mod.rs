//! Proves of a whole linked image what the original and its caller rely on: the oracle of the
//! tests, and run over every skeleton that a debug build links.
//!
//! It decodes and nothing else; it shares no code with what emits images (`skeleton`,
//! `relocate`, `slim`, `body`). From the entry on, every path is followed with a symbolic value
//! in every register and stack word (`value`): "what the caller left in rdi", "the caller's
//! stack word 3", "what the original left in rax", `rsp` always as the entry's plus a constant.
//! Where paths meet, values that differ are unknown from there on, so loops end.
//!
//! What it proves ([`Rule`] has the list):
//!
//! - where the original begins, by a jump or by a call: all registers are the caller's, vector
//!   and x87 registers whole; `rsp` is the entry's, or, in a call, aligned as at the entry, with
//!   the caller's stack words copied, `rbp` the frame pointer that [`crate::unwind`]'s row says,
//!   and the marker in front of the original that [`super::find_fde`] asks for;
//! - at `ret`: `rsp` is the entry's; callee-saved registers are the caller's, and *all* others are
//!   as the original left them (a caller compiled with `-fipa-ra` relies on more than results);
//!   the used return address is overwritten;
//! - nothing is written at or above the return address, nor through a pointer that is neither a
//!   stack address nor comes from a constant that the image was given; nothing below `rsp` is
//!   read; no MXCSR, direction flag, segment, upper half of a vector register changes;
//! - what programs were allowed to change, and nothing else of it: each store to an argument's or
//!   the result's word of the frame is by code that may, and behind it the register has that word's
//!   value, at the original or at `ret`; argument registers have what the caller had there at
//!   `ret`, unless the original has changed them;
//! - what is read from the skeleton's frame is what the picture in ARCHITECTURE.md says;
//! - the moved instructions are the original's, one by one.
//!
//! What it takes on trust: called bodies and the runtime keep all registers (but rax, the
//! runtime's result) and the stack; a computed index into a body's own stack stays in it, as the
//! verifier proved; what is read from shared memory may be a pointer to shared memory; where the
//! stack words are copied in two parts, that the parts' lengths add up. What a program computes
//! is not its subject, nor what an unwinder is answered: the tests that execute are.

mod linked;
mod moved;
mod state;
mod step;
mod value;
mod vector;
mod walk;
mod ways;

use std::ops::Range;

use flea_symbols::addr::RemoteAddr;

pub use value::Source;

/// An image, and what is around it.
#[derive(Clone, Debug)]
pub struct ImageUnderCheck<'a> {
    /// Its machine code, resolved.
    pub bytes: &'a [u8],
    /// Where it is placed: its entry.
    pub address: RemoteAddr,
    /// Where the original begins: in the image, or outside it (a replacement).
    pub original: RemoteAddr,
    /// The original's instructions in the image.
    pub moved: Moved<'a>,
    /// Words of stack arguments that a called original is to find.
    pub stack_words: u32,
    /// What the address of the first of them is a multiple of.
    pub stack_align_bytes: u32,
    /// The runtime's function that copies those of them that are not known to be mapped.
    pub probe_read_user: Option<RemoteAddr>,
    /// Bodies that are called, in this order.
    pub calls: Vec<KnownCall>,
    /// What the words of the skeleton's frame hold.
    pub frame: Vec<FrameWord>,
    /// Bytes below the skeleton's `rbp` that are its frame and its bodies' words.
    pub frame_bytes: u32,
    /// Code in the image that may change words of the frame.
    pub changers: Vec<InlineChanges>,
    /// Argument registers that are changed, and that the caller gets back.
    pub given_back: Vec<Source>,
    /// What may be written besides the stack.
    pub memory: Trusted<'a>,
    /// What may be called by register: the runtime.
    pub runtime: Trusted<'a>,
    /// Branches that are written into the image later: from, to.
    pub switches: Vec<(RemoteAddr, RemoteAddr)>,
    /// The image may return without having called the original, if a modify body has left
    /// something else than 0 in the word of the result rax: that is in these registers then.
    pub skip: Option<Vec<Source>>,
    /// The image answers for the original (`_Unwind_Find_FDE`): at [`Self::original`] stand
    /// questions, which may change `rax` and `r11`, return, and write so many bytes from `rsi` on.
    pub answer_bytes: Option<i64>,
    /// What runs instead of the moved instructions: at [`Self::original`], or behind the
    /// questions, stands a jump to it, which may change `r11`.
    pub replacement: Option<RemoteAddr>,
}

/// The instructions that the site gave up, and their copies.
#[derive(Clone, Copy, Debug)]
pub struct Moved<'a> {
    /// Where the copies are in the image.
    pub at: RemoteAddr,
    /// Where they came from.
    pub site: RemoteAddr,
    /// What stood there; no-operations need no copies.
    pub replaced: &'a [u8],
    /// Where the jump behind the copies leads.
    pub goes_on: RemoteAddr,
}

/// A body that the image calls.
#[derive(Clone, Debug)]
pub struct KnownCall {
    /// Its address.
    pub address: RemoteAddr,
    /// When it may be called.
    pub runs: Runs,
    /// Offsets below `rbp` of the frame words that it reads.
    pub reads: Vec<u32>,
    /// And of those that it changes.
    pub changes: Vec<u32>,
}

/// A body that is part of the image, and changes words of the frame.
#[derive(Clone, Debug)]
pub struct InlineChanges {
    /// Its code.
    pub code: Range<u64>,
    /// Offsets of those words below `rbp`.
    pub words: Vec<u32>,
}

/// When a body runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runs {
    /// Before the original, without a frame: it finds the caller's stack words by its own `rsp`.
    AtEntry,
    /// Before the original, in the frame.
    InFrame,
    /// The same, and it may decide that the original and the rest of these are not called.
    Modifies,
    /// After the original, in the frame.
    AtExit,
}

/// A word of the skeleton's frame, at `[rbp - below_rbp]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameWord {
    /// Its place.
    pub below_rbp: u32,
    /// What whoever reads it finds.
    pub holds: Holds,
}

/// What a frame word holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// What the caller left there.
    Argument(Source),
    /// What the original left there; before it was called, whatever a program decided.
    Result(Source),
}

/// Which numbers are addresses that an image may use.
#[derive(Clone, Copy, Debug)]
pub enum Trusted<'a> {
    /// Those in the ranges.
    Ranges(&'a [Range<u64>]),
    /// All 64-bit immediates of the image: what relocations put in.
    Immediates,
}

/// What is wrong with an image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// A rule is broken.
    #[error("the image at +{offset:#x}: {rule}: {insn}")]
    Broken {
        /// The instruction's offset.
        offset: u64,
        /// Which rule.
        rule: Rule,
        /// The instruction.
        insn: String,
    },
    /// Not all bytes are instructions.
    #[error("the image's bytes at +{offset:#x} are no instruction")]
    NotAnInstruction {
        /// Where.
        offset: u64,
    },
    /// Bounded work was not enough: nothing is proved.
    #[error("the image is not explored after {steps} steps")]
    TooComplex {
        /// The bound.
        steps: u32,
    },
}

/// A rule of images, worded as the breach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rule {
    /// At the original or at `ret`.
    #[error("{0} is not what it has to be")]
    NotKept(Source),
    /// At the original, at an entry body or at `ret`.
    #[error("rsp is {0} bytes off the entry's")]
    StackNotLevel(i64),
    /// At a call inside the frame.
    #[error("rsp is no multiple of 16")]
    Misaligned,
    /// At a call inside the frame.
    #[error("rbp is not the frame pointer, or the caller's rbp is not where it points")]
    NoFrame,
    /// At the call of the original.
    #[error("the caller's stack word {0} is not passed on")]
    StackWord(u32),
    /// At the call of the original.
    #[error("there is no marker in front of the original")]
    NoMarker,
    /// Whoever frees images looks for it.
    #[error("the used return address is left on the stack")]
    UsedReturn,
    /// At the original, or at a modify body.
    #[error("nobody has looked whether a modify body skips the original")]
    Undecided,
    /// At `ret`.
    #[error("returns without having called the original")]
    Skips,
    /// At the original.
    #[error("calls the original twice")]
    CallsTwice,
    /// At a call of a body.
    #[error("calls the body at the wrong time")]
    WrongTime,
    /// At a call of a body.
    #[error("calls a body again, or out of order")]
    WrongOrder,
    /// At a later body, the original or `ret`.
    #[error("a body before this was not called")]
    LeavesOut,
    /// At a call inside the frame.
    #[error("the frame is too small for what it holds")]
    SmallFrame,
    /// By anyone who reads the frame.
    #[error("the frame word at rbp - {0} does not hold what is read there")]
    FrameWord(u32),
    /// Arguments and the result are changed by programs that may do so, and saved by the skeleton.
    #[error("changes the argument or result at rbp - {0}")]
    ChangesWord(u32),
    /// The return address and everything above is the caller's.
    #[error("writes into the caller's frame")]
    WritesCaller,
    /// Below `rsp`, further than anything is known to be mapped.
    #[error("writes far below rsp")]
    WritesFarBelow,
    /// Neither a stack address nor derived from a trusted constant.
    #[error("writes through a pointer that nobody vouches for")]
    WritesAnywhere,
    /// A signal handler may have overwritten it.
    #[error("reads below rsp")]
    ReadsDead,
    /// Whole it may be read.
    #[error("reads a part of the return address")]
    ReadsReturnAddress,
    /// 16-byte operands of an instruction that faults where the address is not aligned.
    #[error("might need an aligned address")]
    NeedsAlignment,
    /// `rsp` has to be the entry's plus a constant.
    #[error("rsp is no longer known")]
    LostStack,
    /// Two ways to one place with different `rsp` or x87 stack.
    #[error("the stack differs between the ways to here")]
    Uneven,
    /// `fld` and `fstp` have to match.
    #[error("the x87 stack is not what it has to be")]
    X87,
    /// A jump or call to somewhere that nobody mentioned, or by a register.
    #[error("leaves the image for an unknown place")]
    UnknownTarget,
    /// Not an instruction's beginning, or inside the moved instructions.
    #[error("goes where nothing may begin")]
    BadTarget,
    /// The last instruction, or a jump into the marker.
    #[error("runs off the end of the code")]
    RunsOff,
    /// Whatever could change state that is not followed here.
    #[error("{0}")]
    Forbidden(&'static str),
    /// The copies of the site's instructions.
    #[error("is not the instruction that was moved")]
    Moved,
}

/// Proves `image` right.
///
/// # Errors
/// The first breach found, or [`ImageError::TooComplex`].
pub fn check_image(image: &ImageUnderCheck<'_>) -> Result<(), ImageError> {
    let code = walk::Decoded::of(image)?;
    moved::check(image, &code)?;
    walk::explore(image, &code)
}
