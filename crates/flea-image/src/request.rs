//! What goes into a compilation and what comes out. Plain data.

use flea_layout::plan::ArenaPlan;
use flea_object::helper::Helper;
use flea_object::spec::{MapIdx, MapSpec, ProgramKind};
use flea_symbols::addr::RemoteAddr;
use flea_symbols::signature::{ArgWord, RetWord, Signature};
use flea_verifier::Verified;

use crate::changes::Changes;
use crate::code::Code;
use crate::skip::NoSkip;
use crate::x86_64::check::CheckError;

/// Distance below the skeleton's rbp of the first word that belongs to bodies: what the first
/// body of a skeleton gets as [`BodyRequest::frame_offset`]. The next body gets this plus
/// eight times the first one's [`Body::frame_words`], and so on.
pub const BODY_FRAMES_OFFSET: u32 = 152;

/// The bodies of one controller for one function.
#[derive(Clone, Copy, Debug)]
pub struct BodyRequest<'a> {
    /// How the function is called.
    pub signature: &'a Signature,
    /// What runs, newest first.
    pub programs: &'a [ProgramUse<'a>],
    /// The maps that the programs name by index.
    pub maps: &'a [MapSpec],
    /// Where those maps are in the arena.
    pub plan: &'a ArenaPlan,
    /// `bpf_get_func_ip`'s answer and `ctx[-2]`.
    pub function_address: RemoteAddr,
    /// Word `k` of this body is at `skeleton_rbp - frame_offset - 8 * k`; see
    /// [`BODY_FRAMES_OFFSET`].
    pub frame_offset: u32,
    /// The ring buffer that `bpf_trace_printk` writes to; without one it returns `-EINVAL`.
    pub printk_map: Option<MapIdx>,
    /// What the machine can do that runs the code.
    pub cpu: Cpu,
}

/// Instructions beyond x86-64's baseline that make a difference here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Cpu {
    /// `lzcnt`. Without it, to number the highest set bit takes five instructions, each
    /// waiting for the one before.
    pub lzcnt: bool,
}

/// One program on the function.
#[derive(Clone, Copy, Debug)]
pub struct ProgramUse<'a> {
    /// The program and what was proved of it.
    pub verified: &'a Verified,
    /// When it runs.
    pub kind: ProgramKind,
    /// `bpf_get_attach_cookie`'s answer.
    pub cookie: u64,
    /// Index of its `ProgramState` in every slot.
    pub state_index: u32,
}

/// What [`crate::compile_body`] makes. A body that would hold no program is `None`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Body {
    /// Before the original, no frame of ours.
    pub entry: Option<Code>,
    /// Before the original, in the skeleton's frame.
    pub session: Option<Code>,
    /// Behind the session bodies: it leaves 0 in the word of the result rax, or the value with
    /// which the original is skipped.
    pub modify: Option<Code>,
    /// After the original, in the skeleton's frame.
    pub exit: Option<Code>,
    /// Words this body keeps in the skeleton's frame.
    pub frame_words: u32,
    /// What the exit body reads from the skeleton's frame: the skeleton saves that and no more.
    pub reads: Reads,
    /// What else the skeleton stores into those words.
    pub saves: Vec<Save>,
    /// What the session body changes of the arguments, and the exit body of the result.
    pub changes: Changes,
    /// Some code here calls the runtime.
    pub calls_runtime: bool,
}

/// Registers that must have been saved in the skeleton's frame; sorted, each once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Reads {
    /// Register arguments, [`ArgWord::Gpr`] and [`ArgWord::Xmm`] alone: stack words stay in the
    /// caller's frame, and for all else there is [`Body::saves`].
    pub args: Vec<ArgWord>,
    /// Results of general registers and of the low halves of vector registers.
    pub results: Vec<RetWord>,
}

/// Machine state that the skeleton stores into a body's own frame words, for what neither the
/// body's parameters nor [`Reads`] can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Save {
    /// When.
    pub when: When,
    /// What.
    pub what: Saved,
    /// The body's frame word with the highest index of those it takes, which is the lowest in
    /// memory: word 0 of what is saved is at `skeleton_rbp - frame_offset - 8 * word`, word 1 is
    /// 8 bytes above.
    pub word: u32,
}

/// When the skeleton stores a [`Save`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum When {
    /// As the caller left it: before session bodies.
    Entry,
    /// As the original left it: before exit bodies.
    Exit,
}

/// What a [`Save`] stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Saved {
    /// A general register by its hardware number (rax 0, rcx 1, rdx 2, rbx 3, rsi 6, rdi 7, r8
    /// to r15); rsp and rbp are known from the frame. One word.
    Gpr(u8),
    /// The low `n_words` (2, 4 or 8) of vector register `reg`.
    Vector {
        /// 0..8
        reg: u8,
        /// Words.
        n_words: u8,
    },
    /// x87 register st0 or st1, 10 bytes in two words; the register stack stays as it is.
    X87 {
        /// 0 or 1.
        reg: u8,
    },
}

impl Saved {
    /// Frame words that it takes; 0 for what no register is.
    #[must_use]
    pub const fn n_words(self) -> u32 {
        match self {
            // rsp and rbp are 4 and 5.
            Self::Gpr(0..=3 | 6..=15) => 1,
            Self::Vector { reg: 0..=7, n_words: n_words @ (2 | 4 | 8) } => n_words as u32,
            Self::X87 { reg: 0 | 1 } => 2,
            Self::Gpr(_) | Self::Vector { .. } | Self::X87 { .. } => 0,
        }
    }
}

impl Save {
    /// Whether it names a register, and words of a body that has `frame_words` of them.
    #[must_use]
    pub const fn fits(self, frame_words: u32) -> bool {
        let n_words = self.what.n_words();
        n_words > 0 && self.word < frame_words && n_words <= self.word + 1
    }
}

impl Reads {
    pub(crate) fn add_arg(&mut self, word: ArgWord) {
        if matches!(word, ArgWord::Gpr(_) | ArgWord::Xmm(_)) && !self.args.contains(&word) {
            self.args.push(word);
            self.args.sort_by_key(|w| match *w {
                ArgWord::Gpr(i) => (0, u32::from(i)),
                ArgWord::Xmm(i) => (1, u32::from(i)),
                ArgWord::XmmWord { .. } | ArgWord::Stack(_) => (2, 0),
            });
        }
    }

    pub(crate) fn add_result(&mut self, word: RetWord) {
        let in_frame = matches!(word, RetWord::Rax | RetWord::Rdx | RetWord::Xmm0 | RetWord::Xmm1);
        if in_frame && !self.results.contains(&word) {
            self.results.push(word);
            self.results.sort_unstable();
        }
    }
}

/// Why nothing was compiled. Nothing has been changed anywhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// An instruction that this build does not translate.
    #[error("instruction {insn_idx}: opcode {opcode:#04x} is not supported")]
    Unsupported {
        /// Its index.
        insn_idx: u32,
        /// Its first byte.
        opcode: u8,
    },
    /// A helper that has no meaning where the program runs.
    #[error("instruction {insn_idx}: {} cannot be called here", .helper.name())]
    HelperNotHere {
        /// Its index.
        insn_idx: u32,
        /// Which.
        helper: Helper,
    },
    /// The facts do not fit the instructions: a fault in the verifier, not in the program.
    #[error("instruction {insn_idx}: the verifier's facts do not fit: {what}")]
    BadFacts {
        /// Its index.
        insn_idx: u32,
        /// What is wrong.
        what: &'static str,
    },
    /// A map index outside the plan.
    #[error("map {} is not among the {n_maps} placed maps", .map.0)]
    NoSuchMap {
        /// The index.
        map: MapIdx,
        /// How many there are.
        n_maps: usize,
    },
    /// A program state outside the plan's slots.
    #[error("program state {state_index} is outside the {n_programs} planned")]
    NoSuchState {
        /// The index.
        state_index: u32,
        /// How many there are.
        n_programs: u32,
    },
    /// A program that may skip a function whose result it cannot make up.
    #[error("an fmod_ret program may return something other than 0, but {reason}")]
    Result {
        /// Why there is no result.
        reason: NoSkip,
    },
    /// More code than a body may hold.
    #[error("the programs come to more than {max} instructions with their calls inlined")]
    TooLarge {
        /// The bound.
        max: u32,
    },
    /// Local calls nest too deep (or recurse).
    #[error("instruction {insn_idx}: calls nest deeper than {max}")]
    TooDeep {
        /// The call.
        insn_idx: u32,
        /// The bound.
        max: u32,
    },
    /// A program would have to be put into itself for ever.
    #[error(
        "instruction {insn_idx}: a tail call in a function that is called leads back to the \
         program that calls it, which Flea cannot compile; make the tail call in the main function"
    )]
    TailRecursion {
        /// The tail call.
        insn_idx: u32,
    },
    /// The code generator refused: a fault in Flea.
    #[error("code generator: {0}")]
    CodeGenerator(String),
    /// What the code generator made does not keep its promises: a fault in Flea.
    #[error("the compiled code breaks a rule of bodies: {0}")]
    Check(#[from] CheckError),
}
