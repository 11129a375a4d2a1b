//! A function's signature (Linux: function model): which words it takes, and where its ABI
//! puts them. Knows nothing of images or programs.

use std::hash::{Hash, Hasher};

use flea_object::BtfError;

/// How a function is called on x86-64 System V, one entry per `ctx` slot.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Signature {
    /// Parameters in source order.
    pub params: Vec<Param>,
    /// What it returns.
    pub ret: Return,
    /// `...` at the end of the parameter list.
    pub variadic: bool,
    /// How many 8-byte words of arguments the caller has put on the stack.
    pub stack_words: StackWords,
    /// What the first of them is aligned to at the call: 16, or 32 or 64 where an over-aligned
    /// argument is among them. A copy of the words has to be aligned as well.
    pub stack_align_bytes: u32,
    /// Where all this was learnt.
    pub source: SignatureSource,
    /// Why it is guessed; `None` where it is not.
    pub doubt: Option<Doubt>,
}

/// Where a signature was learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SignatureSource {
    /// The module's DWARF.
    Dwarf,
    /// The module's BTF, which names functions and has no addresses.
    Btf,
    /// No debug information: six integer arguments and an integer result are assumed.
    Guessed,
}

/// How many words of stack arguments a call carries. An exit program's image calls the
/// original from a frame of its own and must pass these on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StackWords {
    /// Exactly this many, from the debug information.
    Known(u32),
    /// The function's code was read and reaches at most this many.
    Proved(u32),
    /// Nobody can say: exit programs are refused.
    Unknown,
}

/// One parameter.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Param {
    /// Its name in the source, if it has one.
    pub name: Option<String>,
    /// Its type.
    pub ty: Type,
    /// Where each of its words is at entry; empty for a type of size zero, and where it is
    /// `absent`.
    pub words: Vec<ArgWord>,
    /// Why its words are not known. The other parameters' are, wherever they are stated.
    pub absent: Option<Absent>,
}

/// Why a parameter, or a result, of a known type has no words.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Absent {
    /// The compiler changed the function's parameters, and this one is in no place at entry.
    #[error("optimized out")]
    OptimizedOut,
    /// A result that the compiler may have dropped, because no caller uses it: what is in the
    /// result's register is then something else.
    #[error("the compiler may have dropped it")]
    MayBeDropped,
    /// A result in memory, of a function that LLVM gave a convention of its own: its address is
    /// nowhere.
    #[error("in memory, and its address is not returned")]
    AddressNotReturned,
    /// The ABI's rules do not give it a place.
    #[error("{0}")]
    Unclassified(Unclassified),
    /// It comes behind one whose place is not known, so its own is not known either.
    #[error("it comes behind `{0}`, whose place is not known")]
    Behind(String),
    /// It was compiled in one of several ways, which put it into different places, and nothing
    /// says in which.
    #[error("{0}")]
    Ambiguous(Choice),
}

/// Why the ABI's rules do not say where a value of a type is passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Unclassified {
    /// gcc counts bit-fields without a name, clang does not, and neither describes them. What
    /// looks the same without DWARF 5 is a member with an alignment of its own.
    #[error("it has bytes that no member accounts for")]
    UnexplainedBytes,
    /// No two compilers pass it alike.
    #[error("compilers disagree on vectors of one float")]
    LoneFloatVector,
    /// A struct of a `__float128`, by a clang between two that pass it differently.
    #[error("this clang's convention for a `__float128` in a struct is not known")]
    Float128,
    /// A caller would have to align its stack to this.
    #[error("it is aligned to {0} bytes, more than stack arguments are here")]
    Overaligned(u64),
    /// Too large to be a parameter, or to be returned in the registers that are read.
    #[error("it is too large")]
    TooLarge,
    /// An incomplete type, a kind of type that is not known here, or one in a missing file.
    #[error("its type is not described")]
    NotDescribed,
    /// rustc's own ABI, where Flea does not know what this version makes of the type.
    #[error("this rustc's convention for the type is not known")]
    RustAbi,
}

/// What decides where a value is passed, and is not recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Choice {
    /// A vector of 32 or 64 bytes is in one register with AVX or AVX-512, else in memory.
    #[error("nothing tells whether it was compiled with AVX")]
    Avx,
    /// A class is passed by address if the source wrote its copy constructor or destructor.
    #[error("nothing tells whether its class has constructors of its own")]
    Copies,
    /// `extern "C"` functions and others of Rust pass it differently.
    #[error("nothing tells Rust's ABI from `extern \"C\"` or `repr(C)`")]
    RustOrC,
    /// A vector that is described as an array, an alignment that the source states, or what
    /// one of the module's compilers does otherwise.
    #[error("BTF leaves out what decides its place: a vector, an alignment, the compiler")]
    Btf,
}

/// Why debug information does not say how a function is called.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Doubt {
    /// None describes the function.
    #[error("no debug information")]
    NoDebugInfo,
    /// Line tables: every function looks as if it had no parameters.
    #[error("its debug information has no parameters")]
    NoParameters,
    /// A language whose functions are not called as in C, C++ or Rust.
    #[error("its language's calling convention is not known")]
    Language,
    /// DW_AT_calling_convention names an ABI of another kind.
    #[error("it has the calling convention {0:#x}")]
    Convention(u64),
    /// A constructor or destructor with hidden parameters, or a list that is not the source's.
    #[error("its code has other parameters than its source")]
    Parameters,
    /// The result's type does not say whether there is a hidden parameter.
    #[error("nothing tells how its result `{ty}` is returned: {reason}")]
    Result {
        /// As the source spells it.
        ty: String,
        /// Why.
        reason: Absent,
    },
    /// What DWARF or the code itself says contradicts every known convention.
    #[error("its code does not take its parameters where any known convention puts them")]
    Contradicted,
    /// The code reads more stack words than the parameters have.
    #[error("its code reads {read} stack words and its parameters have {stated}")]
    StackWords {
        /// By the debug information.
        stated: u32,
        /// By the code.
        read: u32,
    },
    /// The module has damaged BTF, or one of a newer version.
    #[error("its BTF cannot be read: {0}")]
    UnreadableBtf(BtfError),
    /// BTF goes by names, and several functions have this one.
    #[error("other functions have its name, and BTF does not tell which it describes")]
    SharedName,
    /// Several sources declare the name, each another function.
    #[error("BTF has prototypes of its name that differ")]
    Prototypes,
    /// LLVM leaves out parameters of such functions, and BTF does not say it.
    #[error("only its module calls it, so LLVM may have changed its parameters unknown to BTF")]
    Private,
    /// Classes with constructors are passed by address.
    #[error("it passes a struct, and in a module with C++ or Rust BTF does not tell how")]
    MixedLanguages,
}

/// The place of one argument word at the function's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ArgWord {
    /// Integer argument register 0..6: rdi, rsi, rdx, rcx, r8, r9.
    Gpr(u8),
    /// Floating-point argument register 0..8: the low 64 bits of xmm0..xmm7.
    Xmm(u8),
    /// A further word of a vector register: bits `64 * word` and up of xmm, ymm or zmm `reg`.
    XmmWord {
        /// 0..8
        reg: u8,
        /// 1 in xmm, up to 3 in ymm, up to 7 in zmm.
        word: u8,
    },
    /// The n-th 8-byte word above the return address.
    Stack(u32),
}

/// What a function leaves for its caller.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Return {
    /// The type.
    pub ty: Type,
    /// Where it is after the call, first word first; empty for `void`. A struct returned in
    /// memory is `[RetWord::Rax]` (its address), and its first argument word is the hidden
    /// pointer in `Gpr(0)`, which is *not* among `params`.
    pub words: Vec<RetWord>,
    /// Why its words are not known; `words` is empty then.
    pub absent: Option<Absent>,
}

/// The place of one word of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RetWord {
    /// rax
    Rax,
    /// rdx
    Rdx,
    /// Low 64 bits of xmm0.
    Xmm0,
    /// Low 64 bits of xmm1.
    Xmm1,
    /// A further word of xmm0 or xmm1, as [`ArgWord::XmmWord`].
    XmmWord {
        /// 0 or 1
        reg: u8,
        /// 1 in xmm, up to 3 in ymm, up to 7 in zmm.
        word: u8,
    },
    /// Half of an 80-bit x87 register: word 0 is the mantissa, word 1 sign and exponent (its
    /// upper 48 bits are 0), as `long double` is in memory.
    X87 {
        /// 0 for st0, 1 for st1.
        reg: u8,
        /// 0 or 1.
        word: u8,
    },
}

/// A C type, as far as programs and printing need it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Type {
    /// `void`, or a type of size zero.
    Void,
    /// An integer, character, bool or enumeration.
    Int {
        /// As the source spells it.
        name: String,
        /// 1, 2, 4, 8 or 16.
        size_bytes: u32,
        /// Two's complement.
        signed: bool,
    },
    /// `float`, `double`, `long double`.
    Float {
        /// As the source spells it.
        name: String,
        /// 4, 8 or 16.
        size_bytes: u32,
    },
    /// A pointer or reference; `name` is the whole spelling (`const char *`).
    Pointer {
        /// The whole spelling.
        name: String,
        /// Points at plain `char`: printed as a string.
        to_char: bool,
    },
    /// A struct, union, array or anything else passed by value.
    Aggregate {
        /// As the source spells it.
        name: String,
        /// Its size.
        size_bytes: u32,
    },
    /// Taken for an integer because nothing is known.
    Unknown,
}

impl Signature {
    /// The signature assumed where there is no debug information: six integer words, an
    /// integer result.
    #[must_use]
    pub fn guessed(stack_words: StackWords) -> Self {
        Self::guessed_because(Doubt::NoDebugInfo, stack_words)
    }

    /// As [`Signature::guessed`], for another reason than that there is no debug information.
    #[must_use]
    pub fn guessed_because(doubt: Doubt, stack_words: StackWords) -> Self {
        let param =
            |i| Param { name: None, ty: Type::Unknown, words: vec![ArgWord::Gpr(i)], absent: None };
        Self {
            params: (0..6).map(param).collect(),
            ret: Return { ty: Type::Unknown, words: vec![RetWord::Rax], absent: None },
            variadic: false,
            stack_words,
            stack_align_bytes: 16,
            source: SignatureSource::Guessed,
            doubt: Some(doubt),
        }
    }

    /// Whether it was read from debug information.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.source != SignatureSource::Guessed
    }

    /// The same without what only people look at: names, and where it was learnt.
    #[must_use]
    pub fn without_names(&self) -> Self {
        let param = |param: &Param| Param { name: None, ty: param.ty.unnamed(), ..param.clone() };
        Self {
            params: self.params.iter().map(param).collect(),
            ret: Return { ty: self.ret.ty.unnamed(), ..self.ret.clone() },
            source: SignatureSource::Guessed,
            doubt: None,
            ..*self
        }
    }

    /// The `ctx` slots in order: every word of every parameter.
    pub fn arg_words(&self) -> impl Iterator<Item = ArgWord> + '_ {
        self.params.iter().flat_map(|p| p.words.iter().copied())
    }
}

/// A signature that is compared without what [`Signature::without_names`] leaves out: equal where
/// functions are called alike.
#[derive(Clone, Copy, Debug)]
pub struct Unnamed<'a>(pub &'a Signature);

impl Unnamed<'_> {
    /// What is compared of the signature itself, and of its result.
    fn whole(&self) -> impl Hash + PartialEq + '_ {
        let Signature {
            params,
            ret,
            variadic,
            stack_words,
            stack_align_bytes,
            source: _,
            doubt: _,
        } = self.0;
        let Return { ty, words, absent } = ret;
        (params.len(), ty.shape(), words, absent, variadic, stack_words, stack_align_bytes)
    }

    /// What is compared of each parameter.
    fn params(&self) -> impl Iterator<Item = impl Hash + PartialEq + '_> + '_ {
        self.0.params.iter().map(|Param { name: _, ty, words, absent }| (ty.shape(), words, absent))
    }
}

impl PartialEq for Unnamed<'_> {
    fn eq(&self, other: &Self) -> bool {
        let (one, two) = (Unnamed(self.0), Unnamed(other.0));
        one.whole() == two.whole() && one.params().eq(two.params())
    }
}

impl Eq for Unnamed<'_> {}

impl Hash for Unnamed<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.whole().hash(state);
        self.params().for_each(|param| param.hash(state));
    }
}

impl Type {
    /// Which it is, its size and its flag: all but the name.
    fn shape(&self) -> (u8, u32, bool) {
        match *self {
            Self::Void => (0, 0, false),
            Self::Int { size_bytes, signed, .. } => (1, size_bytes, signed),
            Self::Float { size_bytes, .. } => (2, size_bytes, false),
            Self::Pointer { to_char, .. } => (3, 0, to_char),
            Self::Aggregate { size_bytes, .. } => (4, size_bytes, false),
            Self::Unknown => (5, 0, false),
        }
    }

    fn unnamed(&self) -> Self {
        let name = String::new();
        match *self {
            Self::Void => Self::Void,
            Self::Unknown => Self::Unknown,
            Self::Int { size_bytes, signed, .. } => Self::Int { name, size_bytes, signed },
            Self::Float { size_bytes, .. } => Self::Float { name, size_bytes },
            Self::Pointer { to_char, .. } => Self::Pointer { name, to_char },
            Self::Aggregate { size_bytes, .. } => Self::Aggregate { name, size_bytes },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn int(name: &str, size_bytes: u32) -> Type {
        Type::Int { name: name.to_owned(), size_bytes, signed: true }
    }

    fn hash(signature: &Signature) -> u64 {
        let mut hasher = std::hash::DefaultHasher::new();
        Unnamed(signature).hash(&mut hasher);
        hasher.finish()
    }

    #[test]
    fn names_alone_make_no_difference() {
        let plain = Signature::guessed(StackWords::Known(0));
        let like = |change: fn(&mut Signature)| {
            let mut other = plain.clone();
            change(&mut other);
            let is_like = Unnamed(&plain) == Unnamed(&other);
            assert_eq!(is_like, plain.without_names() == other.without_names());
            assert!(!is_like || hash(&plain) == hash(&other));
            is_like
        };
        assert!(like(|s| s.params[0].name = Some("x".into())));
        assert!(like(|s| (s.source, s.doubt) = (SignatureSource::Dwarf, None)));
        assert!(!like(|s| s.params[0].ty = int("int", 4)));
        assert!(!like(|s| s.params[1].words = vec![ArgWord::Stack(0)]));
        assert!(!like(|s| s.params[1].absent = Some(Absent::OptimizedOut)));
        assert!(!like(|s| s.params.truncate(5)));
        assert!(!like(|s| s.ret.words.clear()));
        assert!(!like(|s| s.ret.ty = Type::Void));
        assert!(!like(|s| s.ret.absent = Some(Absent::MayBeDropped)));
        assert!(!like(|s| s.variadic = true));
        assert!(!like(|s| s.stack_words = StackWords::Proved(0)));
        assert!(!like(|s| s.stack_align_bytes = 32));
        let (mut int4, mut other) = (plain.clone(), plain.clone());
        (int4.ret.ty, other.ret.ty) = (int("int", 4), int("pid_t", 4));
        assert!(Unnamed(&int4) == Unnamed(&other));
        other.ret.ty = int("long", 8);
        assert!(Unnamed(&int4) != Unnamed(&other));
    }
}
