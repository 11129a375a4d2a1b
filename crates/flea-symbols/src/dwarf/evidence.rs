//! Which of several ways to call a function is the one that it was compiled for. Start at
//! [`Evidence::choose`].
//!
//! A type does not always say where a value is passed: it depends on compiler options, or on
//! words of the source that DWARF does not keep. Then there is one [`Candidate`] for each
//! possibility, and what is known of the function itself decides:
//!
//! 1. A candidate is dropped that puts a parameter elsewhere than its DWARF location at the
//!    entry, that leaves out a register which the code reads before writing it, or that has
//!    fewer stack words than the code reads.
//! 2. Unoptimized code stores all its arguments first. If a candidate has exactly the
//!    registers that are read, the others are dropped.
//! 3. The caller may have a presumption.
//! 4. What differs between those that are left is not known, and said to be.

use super::place::Place;
use crate::signature::{Absent, ArgWord, Choice, Param, Return, Signature, StackWords};
use crate::x86_64::classify::Compiler;
use crate::x86_64::live_in::LiveIn;

/// One way to call the function.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    pub(crate) signature: Signature,
    /// Integer registers that hold something else than a parameter: the pointer to a result.
    pub(crate) hidden_gprs: u8,
    /// Integer registers that may hold something that DWARF does not mention.
    pub(crate) spare_gprs: u8,
}

/// What is known of a function besides its types.
pub(crate) struct Evidence<'e> {
    /// Where each parameter is at the entry.
    pub(crate) places: &'e [Place],
    /// What its code reads.
    pub(crate) live: LiveIn,
    /// What its code reads of the stack.
    pub(crate) stack_words: StackWords,
    /// Whose code it is.
    pub(crate) compiler: Compiler,
    /// See [`super::signature::Function::is_private`].
    pub(crate) is_private: bool,
}

impl Evidence<'_> {
    /// The candidate that everything known agrees with. Of several, `presumed` may be one;
    /// else what they disagree about is left out for the reason `choice`. `None` if nothing
    /// agrees.
    pub(crate) fn choose(
        &self,
        candidates: Vec<Candidate>,
        presumed: Option<usize>,
        choice: Choice,
    ) -> Option<Signature> {
        let mut left: Vec<(usize, Candidate)> =
            candidates.into_iter().enumerate().filter(|(_, c)| self.agrees(c)).collect();
        if self.is_unoptimized() && left.iter().any(|(_, c)| self.is_exact(c)) {
            left.retain(|(_, c)| self.is_exact(c));
        }
        let first = left.first()?.1.signature.clone();
        if left.iter().all(|(_, c)| c.signature == first) {
            return Some(first);
        }
        if let Some((_, presumed)) = left.iter().find(|(i, _)| Some(*i) == presumed) {
            return Some(presumed.signature.clone());
        }
        let others: Vec<&Signature> = left.iter().skip(1).map(|(_, c)| &c.signature).collect();
        Some(common(first, &others, choice, self.stack_words))
    }

    fn agrees(&self, candidate: &Candidate) -> bool {
        let signature = &candidate.signature;
        let placed = signature.params.iter().zip(self.places);
        let hidden = if self.is_private { 0 } else { candidate.hidden_gprs };
        if placed.clone().any(|(param, place)| contradicts(place, &param.words, hidden)) {
            return false;
        }
        if signature.variadic || signature.params.iter().any(|param| param.absent.is_some()) {
            return true; // it may read more registers than are listed
        }
        if let (StackWords::Known(stated), StackWords::Proved(read)) =
            (signature.stack_words, self.stack_words)
            && read > stated
        {
            return false;
        }
        let used = Used::by(candidate);
        let allowed = used.gprs | candidate.spare_gprs;
        // A `double` may be stored with the rest of its xmm register, but not of its ymm.
        let covers = |read: u8, passed: u8| read == 0 || (passed > 0 && read <= passed.max(16));
        let mut xmms = self.live.xmm_bytes.iter().zip(&used.xmm_bytes);
        // gcc's unoptimized code also stores registers that pad a struct.
        let gprs = if self.compiler == Compiler::Gcc { 0 } else { self.live.gprs };
        gprs & !allowed == 0 && xmms.all(|(read, passed)| covers(*read, *passed))
    }

    /// The code reads every register argument before anything else.
    fn is_exact(&self, candidate: &Candidate) -> bool {
        let used = Used::by(candidate);
        let passed = (0..8).filter(|i| used.xmm_bytes[*i] > 0).fold(0, |bits, i| bits | 1 << i);
        self.live.gprs == used.gprs && self.live.xmms == passed
    }

    /// Every parameter is in memory: nothing else does that to so many.
    fn is_unoptimized(&self) -> bool {
        let in_memory = |place: &Place| matches!(place, Place::Frame(_) | Place::Unclear);
        !self.places.is_empty() && self.places.iter().all(in_memory)
    }
}

/// Registers that a candidate's callers set.
struct Used {
    gprs: u8,
    xmm_bytes: [u8; 8],
}

impl Used {
    fn by(candidate: &Candidate) -> Self {
        let mut used = Self { gprs: candidate.hidden_gprs, xmm_bytes: [0; 8] };
        for word in candidate.signature.arg_words() {
            let (reg, bytes) = match word {
                ArgWord::Gpr(i) => {
                    used.gprs |= 1 << i;
                    continue;
                }
                ArgWord::Xmm(reg) => (reg, 8),
                ArgWord::XmmWord { reg, word } => (reg, 8 * (word + 1)),
                ArgWord::Stack(_) => continue,
            };
            if let Some(slot) = used.xmm_bytes.get_mut(usize::from(reg)) {
                *slot = (*slot).max(bytes);
            }
        }
        used
    }
}

/// Whether a parameter that is at `place` cannot have come in `words`. In the registers
/// `hidden` is something else at the entry: LLVM states one of these for a stack argument that
/// it loads there, as if it had been there from the start.
fn contradicts(place: &Place, words: &[ArgWord], hidden: u8) -> bool {
    match place {
        Place::Nowhere | Place::Unclear => false,
        Place::Behind(n) => !words.is_empty() && words != [ArgWord::Gpr(*n)],
        // It was put there; from where, is not said.
        Place::Frame(at) if *at < 0 => false,
        Place::Frame(at) => match words.first() {
            Some(ArgWord::Stack(first)) => i64::from(*first) * 8 != *at,
            Some(_) => true,
            None => false,
        },
        Place::Pieces(pieces) => {
            let on_stack = matches!(words.first(), Some(ArgWord::Stack(_)));
            let is_hidden =
                |word| on_stack && matches!(word, ArgWord::Gpr(n) if hidden >> n & 1 == 1);
            let mut stated = pieces.iter().filter_map(|piece| piece.word);
            !words.is_empty() && stated.any(|word| !is_hidden(word) && !words.contains(&word))
        }
    }
}

/// What all agree about.
fn common(
    mut first: Signature,
    others: &[&Signature],
    choice: Choice,
    stack_words: StackWords,
) -> Signature {
    for (i, param) in first.params.iter_mut().enumerate() {
        let same = |other: &&Signature| other.params.get(i).map(|p| &p.words) == Some(&param.words);
        if !others.iter().all(same) {
            *param = Param {
                words: Vec::new(),
                absent: Some(Absent::Ambiguous(choice)),
                ..param.clone()
            };
        }
    }
    if others.iter().any(|other| other.ret.words != first.ret.words) {
        let absent = Some(Absent::Ambiguous(choice));
        first.ret = Return { words: Vec::new(), absent, ..first.ret };
    }
    if others.iter().any(|other| other.stack_words != first.stack_words) {
        first.stack_words = stack_words;
    }
    let aligns = others.iter().map(|other| other.stack_align_bytes);
    first.stack_align_bytes = aligns.fold(first.stack_align_bytes, u32::max);
    first
}
