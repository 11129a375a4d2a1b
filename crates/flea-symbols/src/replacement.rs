//! Whether one function can stand in for another: called with the same words in the same
//! places, by the same types as far as an ABI can tell them apart.

use crate::signature::{Signature, Type};

/// Why one function cannot stand in for another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// One of the two has no debug information, or not enough.
    Unknown,
    /// They are called in different ways.
    Different,
}

impl Signature {
    /// Whether callers of a function with this signature can call one with `other` instead.
    /// Pointers are alike whatever they point at, as are aggregates of one size that travel in
    /// the same places.
    ///
    /// # Errors
    /// [`Mismatch`]
    pub fn check_replacement(&self, other: &Self) -> Result<(), Mismatch> {
        if !self.is_wholly_known() || !other.is_wholly_known() {
            return Err(Mismatch::Unknown);
        }
        let params = self.params.len() == other.params.len()
            && self
                .params
                .iter()
                .zip(&other.params)
                .all(|(a, b)| a.words == b.words && is_alike(&a.ty, &b.ty));
        let returns = self.ret.words == other.ret.words && is_alike(&self.ret.ty, &other.ret.ty);
        if params && returns && self.variadic == other.variadic {
            Ok(())
        } else {
            Err(Mismatch::Different)
        }
    }
}

impl Signature {
    /// Whether the place of every word is known, and none was optimized away.
    #[must_use]
    pub fn is_wholly_known(&self) -> bool {
        self.is_known()
            && self.ret.absent.is_none()
            && self.params.iter().all(|param| param.absent.is_none())
    }
}

fn is_alike(a: &Type, b: &Type) -> bool {
    match (a, b) {
        (Type::Void, Type::Void) | (Type::Pointer { .. }, Type::Pointer { .. }) => true,
        (
            Type::Int { size_bytes: a, signed: a_signed, .. },
            Type::Int { size_bytes: b, signed: b_signed, .. },
        ) => a == b && a_signed == b_signed,
        (Type::Float { size_bytes: a, .. }, Type::Float { size_bytes: b, .. })
        | (Type::Aggregate { size_bytes: a, .. }, Type::Aggregate { size_bytes: b, .. }) => a == b,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signature::{Absent, ArgWord, Param, RetWord, Return, SignatureSource, StackWords};

    fn int(size_bytes: u32, signed: bool) -> Type {
        Type::Int { name: "int".into(), size_bytes, signed }
    }

    fn signature(params: &[Type], ret: Type) -> Signature {
        let words = if ret == Type::Void { vec![] } else { vec![RetWord::Rax] };
        let param = |(i, ty): (u8, &Type)| Param {
            name: None,
            ty: ty.clone(),
            words: vec![ArgWord::Gpr(i)],
            absent: None,
        };
        Signature {
            params: (0..).zip(params).map(param).collect(),
            ret: Return { ty: ret, words, absent: None },
            variadic: false,
            stack_words: StackWords::Known(0),
            stack_align_bytes: 16,
            source: SignatureSource::Dwarf,
            doubt: None,
        }
    }

    #[test]
    fn what_the_abi_can_tell_apart() {
        let pointer = |name: &str| Type::Pointer { name: name.into(), to_char: false };
        let original = signature(&[int(4, true), pointer("char *")], int(4, true));
        let check = |other: &Signature| original.check_replacement(other);
        assert_eq!(check(&original), Ok(()));
        assert_eq!(check(&signature(&[int(4, true), pointer("void *")], int(4, true))), Ok(()));
        for other in [
            signature(&[int(4, true)], int(4, true)),
            signature(&[int(8, true), pointer("char *")], int(4, true)),
            signature(&[int(4, false), pointer("char *")], int(4, true)),
            signature(&[pointer("char *"), int(4, true)], int(4, true)),
            signature(&[int(4, true), pointer("char *")], Type::Void),
            Signature { variadic: true, ..original.clone() },
        ] {
            assert_eq!(check(&other), Err(Mismatch::Different), "{}", other.declaration("f"));
        }
        let mut partly = original.clone();
        partly.params[1] = Param { absent: Some(Absent::OptimizedOut), ..partly.params[1].clone() };
        assert_eq!(partly.check_replacement(&original), Err(Mismatch::Unknown));
        let guessed = Signature::guessed(StackWords::Unknown);
        assert_eq!(check(&guessed), Err(Mismatch::Unknown));
        assert_eq!(guessed.check_replacement(&original), Err(Mismatch::Unknown));
    }
}
