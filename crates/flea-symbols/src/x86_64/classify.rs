//! System V's places for arguments and results (psABI, "Parameter Passing"). Pure: shapes
//! in, words out.
//!
//! What compilers make of the same text differently is in [`Rules`].

use crate::dwarf::types::{Record, RecordKind, Shape};
use crate::signature::{ArgWord, RetWord, Unclassified};

const GPRS: u8 = 6;
const XMMS: u8 = 8;
/// What a caller of gcc's or clang's aligns its argument area to at most.
const MAX_STACK_ALIGN: u64 = 64;
/// As many stack words as any parameter list has; more are a misreading.
const MAX_STACK_WORDS: u32 = 1 << 20;

/// What a function's compiler, and its options, decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rules {
    pub(crate) compiler: Compiler,
    /// The widest vector register in use: 16, 32 with AVX, 64 with AVX-512.
    pub(crate) vector_bytes: u64,
    /// Classes that DWARF does not tell it of are passed by address.
    pub(crate) copies: Copies,
    /// Alignments above eight bytes that only follow from a member's.
    pub(crate) inferred_align: InferredAlign,
}

impl Rules {
    /// What is most likely.
    pub(crate) fn usual(compiler: Compiler) -> Self {
        Self {
            compiler,
            vector_bytes: 16,
            copies: Copies::ByValue,
            inferred_align: InferredAlign::Natural,
        }
    }
}

/// How a class is passed whose constructors may be the compiler's or the source's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copies {
    ByValue,
    ByAddress,
}

/// How a record is aligned that may be packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InferredAlign {
    Natural,
    Packed,
}

/// Whose reading of the psABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compiler {
    Gcc,
    /// LLVM of this major version.
    Llvm(u32),
}

/// The first LLVM that keeps the halves of an `__int128` together.
const LLVM_WITH_WHOLE_INT128: u32 = 18;

/// clang 14 and 16 pass a struct of a `__float128` in memory, 19 in a register.
const LAST_LLVM_WITH_FLOAT128_IN_MEMORY: u32 = 16;
const LLVMS_WITH_FLOAT128_IN_RECORDS: std::ops::RangeFrom<u32> = 19..;

/// The class of one eightbyte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    None,
    Integer,
    Sse,
    SseUp,
    X87,
    Memory,
}

/// Hands out places, parameter by parameter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places {
    rules: Rules,
    gprs: u8,
    xmms: u8,
    stack_words: u32,
    /// The largest alignment among the arguments on the stack.
    stack_align_bytes: u32,
}

impl Places {
    pub(crate) fn new(rules: Rules) -> Self {
        Self { rules, gprs: 0, xmms: 0, stack_words: 0, stack_align_bytes: 16 }
    }

    /// Words of stack arguments so far.
    pub(crate) fn stack_words(&self) -> u32 {
        self.stack_words
    }

    /// What the caller aligns the first stack word to.
    pub(crate) fn stack_align_bytes(&self) -> u32 {
        self.stack_align_bytes
    }

    /// How many integer registers are taken.
    pub(crate) fn gprs(&self) -> u8 {
        self.gprs
    }

    /// The hidden pointer to the result.
    pub(crate) fn skip_gpr(&mut self) {
        self.gprs += 1;
    }

    /// Where the next parameter is.
    pub(crate) fn next(&mut self, shape: &Shape) -> Result<Vec<ArgWord>, Unclassified> {
        if is_by_address(shape, self.rules) {
            return Ok(vec![self.integer()?]);
        }
        if let (Shape::Integer(16), Compiler::Llvm(version)) = (shape, self.rules.compiler) {
            return self.int128_of_llvm(version);
        }
        let classes = classify(shape, self.rules)?;
        if classes.contains(&Class::Memory) || classes.contains(&Class::X87) {
            return self.on_stack(shape);
        }
        let count = |class| classes.iter().filter(|c| **c == class).count();
        let fits = count(Class::Integer) <= usize::from(GPRS - self.gprs)
            && count(Class::Sse) <= usize::from(XMMS - self.xmms);
        if !fits {
            return self.on_stack(shape);
        }
        let mut words = Vec::new();
        for class in classes {
            match class {
                Class::Integer => {
                    words.push(ArgWord::Gpr(self.gprs));
                    self.gprs += 1;
                }
                Class::Sse => {
                    words.push(ArgWord::Xmm(self.xmms));
                    self.xmms += 1;
                }
                Class::SseUp => words.extend(words.last().copied().and_then(next_xmm_word)),
                _ => {}
            }
        }
        Ok(words)
    }

    /// One integer word that may go on the stack on its own (a half of a Rust slice).
    pub(crate) fn integer(&mut self) -> Result<ArgWord, Unclassified> {
        if self.gprs < GPRS {
            self.gprs += 1;
            return Ok(ArgWord::Gpr(self.gprs - 1));
        }
        let words = self.on_stack(&Shape::Integer(8))?;
        words.first().copied().ok_or(Unclassified::TooLarge)
    }

    /// LLVM before 18 passes the two halves as two integers, of which the second may be on the
    /// stack alone. Since then they stay together as the psABI wants it, but an `__int128` on
    /// the stack takes the last integer register with it.
    fn int128_of_llvm(&mut self, version: u32) -> Result<Vec<ArgWord>, Unclassified> {
        if version < LLVM_WITH_WHOLE_INT128 || self.gprs + 2 <= GPRS {
            return Ok(vec![self.integer()?, self.integer()?]);
        }
        self.gprs = GPRS;
        self.on_stack(&Shape::Integer(16))
    }

    fn on_stack(&mut self, shape: &Shape) -> Result<Vec<ArgWord>, Unclassified> {
        let may_be_packed = matches!(shape, Shape::Aggregate(record) if !record.align_is_stated);
        let is_packed = may_be_packed && self.rules.inferred_align == InferredAlign::Packed;
        let align = if is_packed { 8 } else { shape.align().max(8) };
        if align > MAX_STACK_ALIGN || !align.is_power_of_two() {
            return Err(Unclassified::Overaligned(align));
        }
        let align_bytes = u32::try_from(align).map_err(|_| Unclassified::Overaligned(align))?;
        self.stack_align_bytes = self.stack_align_bytes.max(align_bytes);
        let first = self.stack_words.next_multiple_of(align_bytes / 8);
        let end = u32::try_from(shape.size().div_ceil(8)).ok().and_then(|n| first.checked_add(n));
        self.stack_words =
            end.filter(|end| *end <= MAX_STACK_WORDS).ok_or(Unclassified::TooLarge)?;
        Ok((first..self.stack_words).map(ArgWord::Stack).collect())
    }
}

/// The word above `word` in the same vector register.
fn next_xmm_word(word: ArgWord) -> Option<ArgWord> {
    match word {
        ArgWord::Xmm(reg) => Some(ArgWord::XmmWord { reg, word: 1 }),
        ArgWord::XmmWord { reg, word } => Some(ArgWord::XmmWord { reg, word: word + 1 }),
        ArgWord::Gpr(_) | ArgWord::Stack(_) => None,
    }
}

fn is_by_address(shape: &Shape, rules: Rules) -> bool {
    let Shape::Aggregate(record) = shape else { return false };
    record.by_address || (record.may_be_by_address && rules.copies == Copies::ByAddress)
}

/// Where a result is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Returned {
    /// In registers; nowhere for `void`.
    Words(Vec<RetWord>),
    /// In memory that the caller provides: its address comes as a hidden first argument.
    Memory,
}

/// Where a result of this shape is.
pub(crate) fn returned(shape: &Shape, rules: Rules) -> Result<Returned, Unclassified> {
    if is_by_address(shape, rules) {
        return Ok(Returned::Memory);
    }
    if let (Shape::Vector(size), Compiler::Llvm(_)) = (shape, rules.compiler)
        && *size > rules.vector_bytes
    {
        return vector_in_parts(*size, rules.vector_bytes);
    }
    if matches!(shape, Shape::LongDouble | Shape::ComplexLongDouble) {
        let n_registers = if matches!(shape, Shape::LongDouble) { 1 } else { 2 };
        return Ok(Returned::Words(x87(n_registers)));
    }
    let classes = classify(shape, rules)?;
    if classes.contains(&Class::Memory) {
        return Ok(Returned::Memory);
    }
    if classes.contains(&Class::X87) {
        return Ok(Returned::Words(x87(1)));
    }
    let mut gprs = [RetWord::Rax, RetWord::Rdx].into_iter();
    let mut xmms = [RetWord::Xmm0, RetWord::Xmm1].into_iter();
    let mut words: Vec<RetWord> = Vec::new();
    for class in classes {
        words.extend(match class {
            Class::Integer => gprs.next(),
            Class::Sse => xmms.next(),
            Class::SseUp => words.last().copied().and_then(next_result_word),
            _ => None,
        });
    }
    Ok(Returned::Words(words))
}

/// clang returns a vector that is too wide for its registers in several of them, where gcc
/// returns it in memory.
fn vector_in_parts(size: u64, register_bytes: u64) -> Result<Returned, Unclassified> {
    let n_words = u8::try_from(register_bytes / 8).map_err(|_| Unclassified::TooLarge)?;
    let of = |reg: u8, first: RetWord| {
        std::iter::once(first).chain((1..n_words).map(move |word| RetWord::XmmWord { reg, word }))
    };
    if size != 2 * register_bytes {
        return Err(Unclassified::TooLarge); // of 64 bytes in 16-byte registers, xmm2 and xmm3
    }
    Ok(Returned::Words(of(0, RetWord::Xmm0).chain(of(1, RetWord::Xmm1)).collect()))
}

fn next_result_word(word: RetWord) -> Option<RetWord> {
    match word {
        RetWord::Xmm0 => Some(RetWord::XmmWord { reg: 0, word: 1 }),
        RetWord::Xmm1 => Some(RetWord::XmmWord { reg: 1, word: 1 }),
        RetWord::XmmWord { reg, word } => Some(RetWord::XmmWord { reg, word: word + 1 }),
        RetWord::Rax | RetWord::Rdx | RetWord::X87 { .. } => None,
    }
}

/// The words of st0, or of st0 and st1.
fn x87(n_registers: u8) -> Vec<RetWord> {
    (0..n_registers).flat_map(|reg| [0, 1].map(|word| RetWord::X87 { reg, word })).collect()
}

/// The classes of a shape's eightbytes; `[Memory]` for what is never in registers.
fn classify(shape: &Shape, rules: Rules) -> Result<Vec<Class>, Unclassified> {
    let classes = shape_classes(shape, rules.compiler)?;
    let is_wide = shape.size() > 16 && classes.get(1) == Some(&Class::SseUp);
    if is_wide && shape.size() > rules.vector_bytes {
        return Ok(vec![Class::Memory]);
    }
    let Shape::Aggregate(record) = shape else { return Ok(classes) };
    if let Compiler::Llvm(version) = rules.compiler {
        return Ok(if in_memory_for_llvm(record, version)? {
            vec![Class::Memory]
        } else {
            classes
        });
    }
    // gcc takes bit-fields without a name for integers.
    let mut with_gaps = classes.clone();
    for at in &record.unexplained {
        merge(&mut with_gaps, *at, Class::Integer);
    }
    if classes == with_gaps { Ok(classes) } else { Err(Unclassified::UnexplainedBytes) }
}

/// clang's own exceptions: what ends with a flexible array, and, in old versions, what has a
/// `__float128` in it.
fn in_memory_for_llvm(record: &Record, version: u32) -> Result<bool, Unclassified> {
    match version {
        _ if record.flexible => Ok(true),
        _ if !has_float128(record) || LLVMS_WITH_FLOAT128_IN_RECORDS.contains(&version) => {
            Ok(false)
        }
        ..=LAST_LLVM_WITH_FLOAT128_IN_MEMORY => Ok(true),
        _ => Err(Unclassified::Float128),
    }
}

fn has_float128(record: &Record) -> bool {
    record.fields.iter().any(|(_, field)| match field {
        Shape::Float(16) => true,
        Shape::Aggregate(inner) => has_float128(inner),
        _ => false,
    })
}

/// As if every vector register existed.
fn shape_classes(shape: &Shape, compiler: Compiler) -> Result<Vec<Class>, Unclassified> {
    let vector = |size: u64| {
        let n = usize::try_from(size / 8).map_err(|_| Unclassified::TooLarge)?;
        let mut classes = vec![Class::SseUp; n];
        classes[0] = Class::Sse;
        Ok(classes)
    };
    Ok(match shape {
        Shape::Void => vec![],
        Shape::Integer(16) => vec![Class::Integer; 2],
        Shape::Integer(_) => vec![Class::Integer],
        Shape::Float(16) => vec![Class::Sse, Class::SseUp],
        Shape::Float(_) => vec![Class::Sse],
        Shape::LongDouble => vec![Class::X87, Class::X87],
        Shape::Complex(4 | 8) => vec![Class::Sse],
        Shape::Complex(16) => vec![Class::Sse; 2],
        Shape::Complex(_) | Shape::ComplexLongDouble => vec![Class::Memory],
        Shape::Vector(size @ (8 | 16 | 32 | 64)) => vector(*size)?,
        Shape::Vector(1..=7) => vec![Class::Integer],
        Shape::Vector(_) => vec![Class::Memory],
        Shape::LoneFloatVector(_) => return Err(Unclassified::LoneFloatVector),
        Shape::Aggregate(record) => record_classes(record, compiler)?,
        Shape::Unknown { .. } => return Err(Unclassified::NotDescribed),
    })
}

fn record_classes(record: &Record, compiler: Compiler) -> Result<Vec<Class>, Unclassified> {
    if record.size > 64 {
        return Ok(vec![Class::Memory]);
    }
    if record.variants.is_some() {
        return Err(Unclassified::RustAbi); // C has no such type
    }
    let n = usize::try_from(record.size.div_ceil(8)).map_err(|_| Unclassified::TooLarge)?;
    let mut classes = vec![Class::None; n];
    if !merge_record(&mut classes, 0, record, compiler)? || classes.contains(&Class::Memory) {
        return Ok(vec![Class::Memory]);
    }
    // psABI, post-merger clean-up: a large one has to be one vector, X87 is not among others,
    // and SSEUP has SSE or SSEUP before it.
    let is_vector = classes.first() == Some(&Class::Sse)
        && classes.iter().skip(1).all(|class| *class == Class::SseUp);
    if n > 2 && !is_vector {
        return Ok(vec![Class::Memory]);
    }
    if n == 2 && (classes[0] == Class::X87) != (classes[1] == Class::X87) {
        return Ok(vec![Class::Memory]);
    }
    for i in 0..n {
        let before = i.checked_sub(1).map(|before| classes[before]);
        if classes[i] == Class::SseUp && !matches!(before, Some(Class::Sse | Class::SseUp)) {
            classes[i] = Class::Sse;
        }
    }
    Ok(classes)
}

/// Merges all members at `base` into `classes`; `false` for an unaligned one.
fn merge_record(
    classes: &mut [Class],
    base: u64,
    record: &Record,
    compiler: Compiler,
) -> Result<bool, Unclassified> {
    for at in &record.bit_fields {
        merge(classes, base.saturating_add(*at), Class::Integer);
    }
    for (offset, shape) in &record.fields {
        let at = base.saturating_add(*offset);
        if let Shape::Aggregate(inner) = shape {
            // clang leaves an array out that is too large for two registers: a vector beside
            // it in a union decides.
            let is_large_array =
                inner.kind == RecordKind::Array && inner.size > 16 && inner.fields.len() != 1;
            if is_large_array && compiler != Compiler::Gcc {
                continue;
            }
            if !merge_record(classes, at, inner, compiler)? {
                return Ok(false);
            }
            continue;
        }
        if shape.size() > 0 && !at.is_multiple_of(shape.align()) {
            return Ok(false);
        }
        for (class, i) in shape_classes(shape, compiler)?.into_iter().zip(0u64..) {
            merge(classes, at.saturating_add(8 * i), class);
        }
        // A complex float may straddle two eightbytes.
        if *shape == Shape::Complex(8) {
            merge(classes, at.saturating_add(4), Class::Sse);
        }
    }
    Ok(true)
}

fn merge(classes: &mut [Class], at: u64, class: Class) {
    let slot = usize::try_from(at / 8).ok().and_then(|i| classes.get_mut(i));
    let Some(slot) = slot else { return };
    *slot = match (*slot, class) {
        (a, b) if a == b => a,
        (Class::None, other) | (other, Class::None) => other,
        (Class::Memory, _) | (_, Class::Memory) => Class::Memory,
        (Class::Integer, _) | (_, Class::Integer) => Class::Integer,
        (Class::X87, _) | (_, Class::X87) => Class::Memory,
        _ => Class::Sse,
    };
}

/// Whether a value of this shape is in one register or in memory, depending on how wide the
/// registers are.
pub(crate) fn depends_on_avx(shape: &Shape, compiler: Compiler) -> bool {
    shape.size() > 16
        && shape_classes(shape, compiler).is_ok_and(|classes| classes.get(1) == Some(&Class::SseUp))
}
