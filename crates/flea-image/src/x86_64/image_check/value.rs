//! What a register or a word of memory holds, as far as it matters to anyone.

use std::fmt;

/// The names of the general registers by hardware number.
const GPR_NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// One word of machine state that code can be given or can give.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// A general register by hardware number: rax 0, rcx 1, rdx 2, rbx 3, rsp 4, rbp 5, rsi 6,
    /// rdi 7, r8 to r15.
    Gpr(u8),
    /// 8 bytes of a vector register, the lowest is word 0.
    Vector {
        /// 0..16
        reg: u8,
        /// 0..8
        word: u8,
    },
    /// 8 bytes of an x87 register; word 1 is 2 bytes and zeros.
    X87 {
        /// Counted from the top of the register stack.
        reg: u8,
        /// 0 or 1.
        word: u8,
    },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Gpr(i) => f.write_str(GPR_NAMES.get(usize::from(i)).unwrap_or(&"no register")),
            Self::Vector { reg, word } => write!(f, "xmm{reg} word {word}"),
            Self::X87 { reg, word } => write!(f, "st{reg} word {word}"),
        }
    }
}

/// A 64-bit value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// Anything.
    Unknown,
    /// This number.
    Number(u64),
    /// A trusted number with something added, a result of the runtime, or what was read from
    /// either: may be written through.
    Shared,
    /// What the caller left there.
    Caller(Source),
    /// What the original left there.
    Left(Source),
    /// What a modify body left, with which the original is skipped.
    Decision,
    /// What the frame's word of this argument or result holds since a program has changed it.
    Changed(Source),
    /// What the original left there; where that is what it was given, what the caller left.
    GivenBack(Source),
    /// The word at the entry's `rsp + 8 + 8 * this`.
    CallerWord(u32),
    /// The entry's `rsp` plus this.
    Stack(i64),
    /// The entry's `rsp` plus this plus an index that the verifier proved to be in range.
    Near(i64),
}

impl Value {
    /// What is known where two ways meet. `is_trusted` says which numbers are addresses.
    pub fn join(self, other: Self, is_trusted: impl Fn(u64) -> bool) -> Self {
        match (self, other) {
            (a, b) if a == b => a,
            // A null pointer, as a failed lookup gives it.
            (Self::Shared, Self::Number(0)) | (Self::Number(0), Self::Shared) => Self::Shared,
            (Self::Shared, Self::Number(n)) | (Self::Number(n), Self::Shared) if is_trusted(n) => {
                Self::Shared
            }
            (Self::Number(a), Self::Number(b))
                if [a, b].iter().all(|n| *n == 0 || is_trusted(*n)) =>
            {
                Self::Shared
            }
            (Self::Stack(a) | Self::Near(a), Self::Stack(b) | Self::Near(b)) => {
                Self::Near(a.min(b))
            }
            _ => Self::Unknown,
        }
    }

    /// `self + other`.
    pub fn plus(self, other: Self, is_trusted: impl Fn(u64) -> bool) -> Self {
        match (self, other) {
            (Self::Number(a), Self::Number(b)) if !is_trusted(a) && !is_trusted(b) => {
                Self::Number(a.wrapping_add(b))
            }
            (Self::Stack(at), Self::Number(n)) | (Self::Number(n), Self::Stack(at)) => {
                Self::Stack(at.wrapping_add(n.cast_signed()))
            }
            (Self::Near(at), Self::Number(n)) | (Self::Number(n), Self::Near(at)) => {
                Self::Near(at.wrapping_add(n.cast_signed()))
            }
            (Self::Stack(_) | Self::Near(_), Self::Stack(_) | Self::Near(_)) => Self::Unknown,
            (Self::Stack(at) | Self::Near(at), _) | (_, Self::Stack(at) | Self::Near(at)) => {
                Self::Near(at)
            }
            (Self::Shared, _) | (_, Self::Shared) => Self::Shared,
            (Self::Number(n), _) | (_, Self::Number(n)) if is_trusted(n) => Self::Shared,
            _ => Self::Unknown,
        }
    }
}
