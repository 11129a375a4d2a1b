//! What a function that an fmod_ret program skips leaves for its caller: which register the one
//! word goes to that a program can return.
//!
//! No other register may change. A caller that was compiled with the function (gcc's -fipa-ra)
//! keeps values in registers that the function is known to leave alone; those of its result it
//! cannot expect to keep.

use flea_symbols::signature::{ArgWord, RetWord, Signature, Type};

/// Where a skipped function's result goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SkipResult {
    /// The function returns nothing.
    Nowhere,
    /// rax
    Rax,
    /// The low 64 bits of xmm0. The upper ones become 0: the ABI says nothing of them.
    Xmm0,
}

/// Why no program can make up a function's result. Programs that always return 0 can be
/// attached all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoSkip {
    /// Two registers, or one with more than 8 bytes of it.
    #[error("the function's result is more than the one word that a program can return")]
    TooWide,
    /// st0
    #[error("the function's result is in an x87 register, which no program can set")]
    X87,
    /// The debug information leaves open where it is, or whether there is one.
    #[error("where the function's result is, is not known")]
    Unknown,
    /// A struct in memory that the caller provides, which would stay as it was.
    #[error("the function's result is a struct in memory, which no program can fill")]
    Memory,
}

/// Where the value of a program that skips a function of this `signature` goes.
///
/// # Errors
/// The value cannot be the function's result.
pub fn skip_result(signature: &Signature) -> Result<SkipResult, NoSkip> {
    if signature.ret.absent.is_some() {
        return Err(NoSkip::Unknown);
    }
    match signature.ret.words[..] {
        [] => Ok(SkipResult::Nowhere),
        [RetWord::Rax] if may_be_in_memory(signature) => Err(NoSkip::Memory),
        [RetWord::Rax] => Ok(SkipResult::Rax),
        [RetWord::Xmm0] => Ok(SkipResult::Xmm0),
        [RetWord::X87 { .. }, ..] => Err(NoSkip::X87),
        _ => Err(NoSkip::TooWide),
    }
}

/// Whether rax may be the address of a struct that the caller has room for. That address is the
/// first integer argument then, hidden, and no parameter is in its register.
pub(crate) fn may_be_in_memory(signature: &Signature) -> bool {
    let Type::Aggregate { size_bytes, .. } = signature.ret.ty else { return false };
    size_bytes > 8 || !signature.arg_words().any(|word| word == ArgWord::Gpr(0))
}

#[cfg(test)]
mod tests {
    use flea_symbols::signature::{Absent, Param, StackWords};

    use super::*;

    fn check(ty: Type, words: &[RetWord], args: &[ArgWord], expect: Result<SkipResult, NoSkip>) {
        let mut signature = Signature::guessed(StackWords::Known(0));
        let param = |word: &ArgWord| Param {
            name: None,
            ty: Type::Unknown,
            words: vec![*word],
            absent: None,
        };
        signature.params = args.iter().map(param).collect();
        signature.ret.ty = ty;
        signature.ret.words = words.to_vec();
        assert_eq!(skip_result(&signature), expect, "{words:?} {args:?}");
    }

    #[test]
    fn an_unknown_result_cannot_be_made_up() {
        let mut signature = Signature::guessed(StackWords::Known(0));
        signature.ret.words.clear();
        signature.ret.absent = Some(Absent::MayBeDropped);
        assert_eq!(skip_result(&signature), Err(NoSkip::Unknown));
    }

    #[test]
    fn one_word_can_be_made_up() {
        let aggregate = |size_bytes| Type::Aggregate { name: "struct s".into(), size_bytes };
        let double = || Type::Float { name: "double".into(), size_bytes: 8 };
        let (rax, xmm0) = (RetWord::Rax, RetWord::Xmm0);
        let x87 = RetWord::X87 { reg: 0, word: 0 };
        let (first, second) = (ArgWord::Gpr(0), ArgWord::Gpr(1));
        check(Type::Void, &[], &[first], Ok(SkipResult::Nowhere));
        check(Type::Unknown, &[rax], &[], Ok(SkipResult::Rax));
        check(double(), &[xmm0], &[], Ok(SkipResult::Xmm0));
        check(aggregate(8), &[rax], &[first], Ok(SkipResult::Rax));
        check(aggregate(8), &[xmm0], &[], Ok(SkipResult::Xmm0));
        // A C++ class of 8 bytes with a destructor is in memory.
        check(aggregate(8), &[rax], &[second], Err(NoSkip::Memory));
        check(aggregate(8), &[rax], &[], Err(NoSkip::Memory));
        check(aggregate(24), &[rax], &[second], Err(NoSkip::Memory));
        check(aggregate(16), &[rax, RetWord::Rdx], &[first], Err(NoSkip::TooWide));
        check(aggregate(16), &[rax, xmm0], &[first], Err(NoSkip::TooWide));
        let wide = RetWord::XmmWord { reg: 0, word: 1 };
        check(aggregate(16), &[xmm0, wide], &[first], Err(NoSkip::TooWide));
        check(double(), &[x87, RetWord::X87 { reg: 0, word: 1 }], &[], Err(NoSkip::X87));
    }
}
