//! What programs change that somebody has allowed to: arguments in general registers that the
//! function is called with, and its result in rax.
//!
//! ```text
//!   what         where programs store it      who makes it true
//!   argument i   [rbp - 40 - 8*i]             the skeleton, behind each session body that may
//!   result rax   [rbp - 8]                    the skeleton, behind each exit body that may
//! ```
//! (`x86_64/skeleton/changes.rs`.) So programs behind, exit programs that look at arguments, and
//! the function find the new value. Whoever changes an argument runs in the skeleton's frame, and
//! with it all entry programs that were attached in one go: they keep their order.
//!
//! Words on the stack are the caller's own memory, and a vector register's upper half is not in
//! the frame: neither can be changed.

use flea_object::spec::ProgramKind;
use flea_symbols::signature::{ArgWord, RetWord, Signature};
use flea_verifier::{Changeable, Verified};

use crate::skip::may_be_in_memory;
use crate::translate::probed;

/// Words of a context that are looked at: what [`Changeable`] has room for.
const MAX_WORDS: i32 = 128;

/// What the programs of a body change, or could.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Changes {
    /// Bit i: integer argument register i, of rdi, rsi, rdx, rcx, r8, r9.
    pub args: u8,
    /// The result rax.
    pub result: bool,
}

/// One thing that can be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Changed {
    /// Integer argument register i.
    Argument(u8),
    /// rax
    Result,
}

impl Changes {
    /// Nothing.
    pub const NONE: Self = Self { args: 0, result: false };

    /// The argument registers, by their number among arguments.
    pub fn arguments(self) -> impl Iterator<Item = u8> {
        (0..6).filter(move |i| self.args >> i & 1 != 0)
    }

    /// The names of all registers that are changed.
    #[must_use]
    pub fn registers(self) -> Vec<&'static str> {
        const ARGUMENTS: [&str; 6] = ["rdi", "rsi", "rdx", "rcx", "r8", "r9"];
        let arguments = self.arguments().map(|i| ARGUMENTS[usize::from(i)]);
        arguments.chain(self.result.then_some("rax")).collect()
    }

    /// Both.
    #[must_use]
    pub const fn join(self, other: Self) -> Self {
        Self { args: self.args | other.args, result: self.result || other.result }
    }

    pub(crate) fn has(self, what: Changed) -> bool {
        match what {
            Changed::Argument(i) => self.args >> i & 1 != 0,
            Changed::Result => self.result,
        }
    }

    fn of(what: Changed) -> Self {
        match what {
            Changed::Argument(i) => Self { args: 1 << i, result: false },
            Changed::Result => Self { args: 0, result: true },
        }
    }
}

/// The words of its context that a program of this kind can change on a function with this
/// signature, for [`flea_verifier::Verifier::changeable`].
///
/// Not what a caller that was compiled with the function (gcc's -fipa-ra) may count on to stay:
/// rax behind a function that returns nothing. Argument registers are given back.
#[must_use]
pub fn changeable(kind: ProgramKind, signature: &Signature) -> Changeable {
    let can = |what| {
        matches!(
            (kind, what),
            (ProgramKind::Fentry | ProgramKind::Uprobe, Changed::Argument(_))
                | (ProgramKind::Fexit | ProgramKind::Uretprobe, Changed::Result)
                | (ProgramKind::Fsession, _)
        )
    };
    let is_changeable = |word: &i32| match changed_word(kind, signature, *word) {
        Some(Changed::Result) if !has_result(signature) => false,
        what => what.is_some_and(can),
    };
    let words = (0..MAX_WORDS).filter(is_changeable);
    Changeable::of(words.filter_map(|word| usize::try_from(word).ok()))
}

/// Whether rax is a value that can be replaced: neither nothing nor the address of the result.
fn has_result(signature: &Signature) -> bool {
    match signature.ret.words[..] {
        [] => signature.ret.absent.is_some(),
        [RetWord::Rax] => !may_be_in_memory(signature),
        _ => signature.ret.words.contains(&RetWord::Rax),
    }
}

/// What `verified`, attached as `kind`, changes, with what its tail calls lead to.
pub(crate) fn changes(verified: &Verified, kind: ProgramKind, signature: &Signature) -> Changes {
    let stores = verified.members().flat_map(Verified::context_stores);
    let changed = stores.filter_map(|at| changed_word(kind, signature, at.div_euclid(8)));
    changed.fold(Changes::NONE, |all, what| all.join(Changes::of(what)))
}

/// What a word of the context is, if it is one that some kind of program can change.
pub(crate) fn changed_word(kind: ProgramKind, signature: &Signature, word: i32) -> Option<Changed> {
    if matches!(kind, ProgramKind::Uprobe | ProgramKind::Uretprobe) {
        return probed(word);
    }
    let slot = usize::try_from(word).ok()?;
    let n_args = signature.arg_words().count();
    if slot < n_args {
        return argument(signature.arg_words().nth(slot)?);
    }
    (signature.ret.words.get(slot - n_args) == Some(&RetWord::Rax)).then_some(Changed::Result)
}

fn argument(word: ArgWord) -> Option<Changed> {
    match word {
        ArgWord::Gpr(i @ 0..6) => Some(Changed::Argument(i)),
        _ => None,
    }
}

/// Whether the caller may count on what is in argument register `i` to be there still behind the
/// call, where the function leaves it alone. A result that is there is the function's.
pub(crate) fn is_given_back(i: u8, signature: &Signature) -> bool {
    const RDX_ARGUMENT: u8 = 2;
    i != RDX_ARGUMENT || !signature.ret.words.contains(&RetWord::Rdx)
}

#[cfg(test)]
mod tests {
    use flea_symbols::signature::{Param, StackWords, Type};

    use super::*;

    fn signature(args: &[ArgWord], ty: Type, results: &[RetWord]) -> Signature {
        let mut signature = Signature::guessed(StackWords::Known(0));
        let param = |word: &ArgWord| Param {
            name: None,
            ty: Type::Unknown,
            words: vec![*word],
            absent: None,
        };
        signature.params = args.iter().map(param).collect();
        signature.ret.ty = ty;
        signature.ret.words = results.to_vec();
        signature
    }

    fn words(kind: ProgramKind, signature: &Signature) -> Vec<usize> {
        changeable(kind, signature).words().collect()
    }

    #[test]
    fn what_each_kind_can_change() {
        let args = [ArgWord::Gpr(0), ArgWord::Xmm(0), ArgWord::Stack(0), ArgWord::Gpr(5)];
        let two_words = Type::Aggregate { name: "struct s".into(), size_bytes: 16 };
        let s = signature(&args, two_words, &[RetWord::Rax, RetWord::Rdx]);
        assert_eq!(words(ProgramKind::Fentry, &s), [0, 3]);
        assert_eq!(words(ProgramKind::Fexit, &s), [4]);
        assert_eq!(words(ProgramKind::Fsession, &s), [0, 3, 4]);
        assert_eq!(words(ProgramKind::FmodRet, &s), [0; 0]);
        // r9 r8 cx dx si di; ax
        assert_eq!(words(ProgramKind::Uprobe, &s), [8, 9, 11, 12, 13, 14]);
        assert_eq!(words(ProgramKind::Uretprobe, &s), [10]);
    }

    #[test]
    fn a_result_that_is_none() {
        let aggregate = Type::Aggregate { name: "struct s".into(), size_bytes: 24 };
        let in_memory = signature(&[ArgWord::Gpr(1)], aggregate, &[RetWord::Rax]);
        let nothing = signature(&[ArgWord::Gpr(0)], Type::Void, &[]);
        let double = Type::Float { name: "double".into(), size_bytes: 8 };
        let float = signature(&[ArgWord::Gpr(0)], double, &[RetWord::Xmm0]);
        for s in [in_memory, nothing, float] {
            for kind in [ProgramKind::Fexit, ProgramKind::Uretprobe] {
                assert_eq!(words(kind, &s), [0; 0], "{kind:?} {:?}", s.ret);
            }
        }
    }

    #[test]
    fn rdx_is_not_given_back_where_it_is_a_result() {
        let s = signature(&[], Type::Unknown, &[RetWord::Rax, RetWord::Rdx]);
        let given_back: Vec<u8> = (0..6).filter(|i| is_given_back(*i, &s)).collect();
        assert_eq!(given_back, [0, 1, 3, 4, 5]);
        let s = signature(&[], Type::Unknown, &[RetWord::Rax]);
        assert!((0..6).all(|i| is_given_back(i, &s)));
    }
}
