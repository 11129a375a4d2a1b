//! Where DWARF says that a parameter is at the function's first instruction. Start at
//! [`Reader::place_of`]. Knows nothing of types and conventions.

use gimli::{AttributeValue, Expression, Operation, constants as dw};

use super::Slice;
use super::dies::{Die, Dies};
use crate::addr::Svma;
use crate::signature::ArgWord;

/// A location has no more operations than this, or it is not one that is understood.
const MAX_OPERATIONS: usize = 64;
/// A parameter has no more pieces of eight bytes than this.
const MAX_WORDS: u64 = 64;
/// DWARF's numbers of rdi, rsi, rdx, rcx, r8, r9 (psABI, "DWARF Register Number Mapping").
const GPR_NUMBERS: [u16; 6] = [5, 4, 1, 2, 8, 9];
const RBP: u16 = 6;
const RSP: u16 = 7;
const XMM0: u16 = 17;
/// From the CFA down to an rbp that was pushed first and then set.
const RBP_BELOW_CFA: i64 = 16;

/// Where a parameter is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Nowhere at all, or not yet, or it is a constant.
    Nowhere,
    /// In argument registers, one piece after the other.
    Pieces(Vec<Piece>),
    /// In memory that this integer argument points to.
    Behind(u8),
    /// In memory, so many bytes above the CFA: from 0 on in the caller's stack arguments,
    /// below that in the function's own frame.
    Frame(i64),
    /// Somewhere that says nothing of where it came from.
    Unclear,
}

/// A part of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// `None`: optimized out.
    pub(crate) word: Option<ArgWord>,
    /// `None`: all of the parameter.
    pub(crate) size_bytes: Option<u64>,
}

/// What counts as the frame's base in a function's locations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    Cfa,
    Rbp,
    Rsp,
    Unknown,
}

/// Reads the places of one function's parameters.
pub(crate) struct Reader<'d, 'a> {
    dies: &'d Dies<'a>,
    entry: Svma,
    base: Base,
    /// Distance from rsp up to the CFA where LLVM's locations apply: behind the prologue.
    rsp_below_cfa: Option<i64>,
}

impl<'d, 'a> Reader<'d, 'a> {
    /// Of the function `die`, which starts at `entry` and has rsp `rsp_below_cfa` bytes below
    /// the CFA behind its prologue.
    pub(crate) fn new(
        dies: &'d Dies<'a>,
        die: &Die<'a>,
        entry: Svma,
        rsp_below_cfa: Option<i64>,
    ) -> Self {
        let mut reader = Self { dies, entry, base: Base::Unknown, rsp_below_cfa };
        reader.base = match reader.operations(die, dw::DW_AT_frame_base).as_deref() {
            Some([Operation::CallFrameCFA]) => Base::Cfa,
            Some([Operation::Register { register }]) if register.0 == RBP => Base::Rbp,
            Some([Operation::Register { register }]) if register.0 == RSP => Base::Rsp,
            _ => Base::Unknown,
        };
        reader
    }

    /// Where the parameter `die` is when the function is entered.
    pub(crate) fn place_of(&self, die: &Die<'a>) -> Place {
        let Some(operations) = self.operations(die, dw::DW_AT_location) else {
            return Place::Nowhere;
        };
        match operations.as_slice() {
            [] => Place::Nowhere,
            [Operation::FrameOffset { offset }] => self.in_frame(self.base, *offset),
            [Operation::CallFrameCFA] => Place::Frame(0),
            [Operation::CallFrameCFA, Operation::PlusConstant { value }] => {
                Place::Frame(value.cast_signed())
            }
            [Operation::RegisterOffset { register, offset, .. }] => {
                match (register.0, argument(register.0)) {
                    // Where the frame's base is another, rsp and rbp may have been aligned:
                    // they say nothing of the caller's.
                    (RSP, _) if self.base == Base::Rsp => self.in_frame(Base::Rsp, *offset),
                    (RBP, _) if self.base == Base::Rbp => self.in_frame(Base::Rbp, *offset),
                    (RSP | RBP, _) => Place::Unclear,
                    (_, Some(ArgWord::Gpr(n))) if *offset == 0 => Place::Behind(n),
                    _ => Place::Unclear,
                }
            }
            [Operation::Register { register }] => match argument(register.0) {
                Some(word) => Place::Pieces(vec![Piece { word: Some(word), size_bytes: None }]),
                None => Place::Unclear,
            },
            // The value of the register, as it is.
            [Operation::RegisterOffset { register, offset: 0, .. }, Operation::StackValue] => {
                match argument(register.0) {
                    Some(word) => Place::Pieces(vec![Piece { word: Some(word), size_bytes: None }]),
                    None => Place::Unclear,
                }
            }
            [Operation::ParameterRef { .. } | Operation::ImplicitPointer { .. }, ..]
            | [Operation::ImplicitValue { .. }] => Place::Nowhere,
            [
                Operation::UnsignedConstant { .. }
                | Operation::SignedConstant { .. }
                | Operation::Address { .. },
                Operation::StackValue,
            ] => Place::Nowhere,
            pieces => pieces_of(pieces).map_or(Place::Unclear, Place::Pieces),
        }
    }

    fn in_frame(&self, base: Base, offset: i64) -> Place {
        let below_cfa = match base {
            Base::Cfa => Some(0),
            Base::Rbp => Some(RBP_BELOW_CFA),
            Base::Rsp => self.rsp_below_cfa,
            Base::Unknown => None,
        };
        let at = below_cfa.and_then(|below| offset.checked_sub(below));
        at.map_or(Place::Unclear, Place::Frame)
    }

    /// The location's operations at the entry; `None` where there is no location then.
    fn operations(&self, die: &Die<'a>, name: gimli::DwAt) -> Option<Vec<Operation<Slice<'a>>>> {
        let expression: Expression<Slice<'a>> = match die.entry.attr_value(name)? {
            AttributeValue::Exprloc(expression) => expression,
            value => {
                let dwarf = self.dies.dwarf_of(die.file)?;
                let mut list = dwarf.attr_locations(&die.unit, value).ok()??;
                loop {
                    let entry = list.next().ok()??;
                    if (entry.range.begin..entry.range.end).contains(&self.entry.0) {
                        break entry.data;
                    }
                }
            }
        };
        let mut found = Vec::new();
        let mut operations = expression.operations(die.unit.encoding());
        while found.len() < MAX_OPERATIONS {
            match operations.next() {
                Ok(Some(operation)) => found.push(operation),
                Ok(None) => break,
                Err(_) => {
                    // Not understood, which is not the same as nowhere.
                    found.push(Operation::Nop);
                    break;
                }
            }
        }
        Some(found)
    }
}

impl Place {
    /// The words of a parameter of `size` bytes that is here, as far as they are arguments;
    /// `None` for one that is in parts, or nowhere.
    pub(crate) fn words(&self, size: u64) -> Option<Vec<ArgWord>> {
        match self {
            Self::Nowhere | Self::Unclear => None,
            Self::Behind(n) => (size > 0).then(|| vec![ArgWord::Gpr(*n)]),
            Self::Frame(at) => {
                let first = u32::try_from(*at).ok().filter(|at| at % 8 == 0)? / 8;
                let n = size.div_ceil(8).min(MAX_WORDS);
                (first..).map(ArgWord::Stack).zip(0..n).map(|(word, _)| Some(word)).collect()
            }
            Self::Pieces(pieces) => {
                let mut words = Vec::new();
                let mut left = size;
                for piece in pieces {
                    let bytes = piece.size_bytes.unwrap_or(left);
                    words.extend(piece_words(piece.word?, bytes)?);
                    left = left.checked_sub(bytes)?;
                }
                (left == 0).then_some(words)
            }
        }
    }
}

/// The words of a piece that begins with `first`.
fn piece_words(first: ArgWord, size: u64) -> Option<Vec<ArgWord>> {
    let n = u8::try_from(size.div_ceil(8)).ok().filter(|n| (1..=8).contains(n))?;
    match first {
        ArgWord::Xmm(reg) => {
            let upper = (1..n).map(|word| ArgWord::XmmWord { reg, word });
            Some(std::iter::once(first).chain(upper).collect())
        }
        _ => (n == 1).then(|| vec![first]),
    }
}

/// `register, piece, register, piece, ...`; a piece without a register is optimized out.
fn pieces_of(operations: &[Operation<Slice<'_>>]) -> Option<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut before = None;
    for operation in operations {
        match operation {
            Operation::Piece { size_in_bits, bit_offset: None } => {
                let size_bytes = Some(size_in_bits / 8).filter(|_| size_in_bits % 8 == 0)?;
                pieces.push(Piece { word: before.take(), size_bytes: Some(size_bytes) });
            }
            Operation::Register { register } if before.is_none() => {
                before = Some(argument(register.0)?);
            }
            Operation::UnsignedConstant { .. } | Operation::StackValue if before.is_none() => {}
            _ => return None,
        }
    }
    (before.is_none() && !pieces.is_empty()).then_some(pieces)
}

/// The argument that comes in a register.
fn argument(register: u16) -> Option<ArgWord> {
    if let Some(n) = GPR_NUMBERS.iter().position(|number| *number == register) {
        return u8::try_from(n).ok().map(ArgWord::Gpr);
    }
    let n = register.checked_sub(XMM0).filter(|n| *n < 8)?;
    u8::try_from(n).ok().map(ArgWord::Xmm)
}
