//! A function's signature (Linux: function model): which words it takes, and where its ABI
//! puts them. Knows nothing of images or programs.

/// How a function is called on x86-64 System V, one entry per `ctx` slot.
#[derive(Clone, Debug, PartialEq, Eq)]
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
}

/// Where a signature was learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignatureSource {
    /// The module's DWARF.
    Dwarf,
    /// No debug information: six integer arguments and an integer result are assumed.
    Guessed,
}

/// How many words of stack arguments a call carries. An exit program's image calls the
/// original from a frame of its own and must pass these on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StackWords {
    /// Exactly this many, from the debug information.
    Known(u32),
    /// The function's code was read and reaches at most this many.
    Proved(u32),
    /// Nobody can say: exit programs are refused.
    Unknown,
}

/// One parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Its name in the source, if it has one.
    pub name: Option<String>,
    /// Its type.
    pub ty: Type,
    /// Where each of its words is at entry; empty for a type of size zero.
    pub words: Vec<ArgWord>,
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Return {
    /// The type.
    pub ty: Type,
    /// Where it is after the call, first word first; empty for `void`. A struct returned in
    /// memory is `[RetWord::Rax]` (its address), and its first argument word is the hidden
    /// pointer in `Gpr(0)`, which is *not* among `params`.
    pub words: Vec<RetWord>,
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
#[derive(Clone, Debug, PartialEq, Eq)]
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
        Self {
            params: (0..6)
                .map(|i| Param { name: None, ty: Type::Unknown, words: vec![ArgWord::Gpr(i)] })
                .collect(),
            ret: Return { ty: Type::Unknown, words: vec![RetWord::Rax] },
            variadic: false,
            stack_words,
            stack_align_bytes: 16,
            source: SignatureSource::Guessed,
        }
    }

    /// The `ctx` slots in order: every word of every parameter.
    pub fn arg_words(&self) -> impl Iterator<Item = ArgWord> + '_ {
        self.params.iter().flat_map(|p| p.words.iter().copied())
    }
}
