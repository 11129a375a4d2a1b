//! System V's places for arguments and results (psABI, "Parameter Passing"). Pure: shapes
//! in, words out.

use crate::dwarf::types::{Record, Shape};
use crate::signature::{ArgWord, RetWord};

const GPRS: u8 = 6;
const XMMS: u8 = 8;

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
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Places {
    gprs: u8,
    xmms: u8,
    stack_words: u32,
    /// The largest alignment among the arguments on the stack.
    stack_align_bytes: u32,
}

/// A type whose place depends on how the program was compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unclassified;

impl Places {
    /// Words of stack arguments so far.
    pub(crate) fn stack_words(&self) -> u32 {
        self.stack_words
    }

    /// What the caller aligns the first stack word to.
    pub(crate) fn stack_align_bytes(&self) -> u32 {
        self.stack_align_bytes.max(16)
    }

    /// The hidden pointer to the result.
    pub(crate) fn skip_gpr(&mut self) {
        self.gprs += 1;
    }

    /// Where the next parameter is.
    pub(crate) fn next(&mut self, shape: &Shape) -> Result<Vec<ArgWord>, Unclassified> {
        if matches!(shape, Shape::Aggregate(record) if record.by_address) {
            return Ok(vec![self.integer()?]);
        }
        let classes = classify(shape)?;
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
        self.on_stack(&Shape::Integer(8))?.first().copied().ok_or(Unclassified)
    }

    fn on_stack(&mut self, shape: &Shape) -> Result<Vec<ArgWord>, Unclassified> {
        let align_bytes = match shape.align() {
            0..=8 => 8,
            align @ (16 | 32 | 64) => u32::try_from(align).map_err(|_| Unclassified)?,
            _ => return Err(Unclassified),
        };
        self.stack_align_bytes = self.stack_align_bytes.max(align_bytes);
        self.stack_words = self.stack_words.next_multiple_of(align_bytes / 8);
        let n = u32::try_from(shape.size().div_ceil(8)).map_err(|_| Unclassified)?;
        let first = self.stack_words;
        self.stack_words = first.checked_add(n).filter(|n| *n <= 1 << 20).ok_or(Unclassified)?;
        Ok((first..self.stack_words).map(ArgWord::Stack).collect())
    }
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
pub(crate) fn returned(shape: &Shape) -> Result<Returned, Unclassified> {
    if matches!(shape, Shape::Aggregate(record) if record.by_address) {
        return Ok(Returned::Memory);
    }
    if matches!(shape, Shape::LongDouble | Shape::Complex(32)) {
        let n_registers = if matches!(shape, Shape::LongDouble) { 1 } else { 2 };
        return Ok(Returned::Words(x87(n_registers)));
    }
    let classes = classify(shape)?;
    if classes.contains(&Class::Memory) {
        return Ok(Returned::Memory);
    }
    if classes.contains(&Class::X87) {
        return Ok(Returned::Words(x87(1)));
    }
    let mut gprs = [RetWord::Rax, RetWord::Rdx].into_iter();
    let mut xmms = [RetWord::Xmm0, RetWord::Xmm1].into_iter();
    let words = classes.into_iter().filter_map(|class| match class {
        Class::Integer => gprs.next(),
        Class::Sse => xmms.next(),
        _ => None,
    });
    Ok(Returned::Words(words.collect()))
}

/// The words of st0, or of st0 and st1.
fn x87(n_registers: u8) -> Vec<RetWord> {
    (0..n_registers).flat_map(|reg| [0, 1].map(|word| RetWord::X87 { reg, word })).collect()
}

/// The classes of a shape's eightbytes; `[Memory]` for what is never in registers.
fn classify(shape: &Shape) -> Result<Vec<Class>, Unclassified> {
    Ok(match shape {
        Shape::Void => vec![],
        Shape::Integer(16) => vec![Class::Integer; 2],
        Shape::Integer(_) => vec![Class::Integer],
        Shape::Float(16) => vec![Class::Sse, Class::SseUp],
        Shape::Float(_) => vec![Class::Sse],
        Shape::LongDouble => vec![Class::X87, Class::X87],
        Shape::Complex(8) => vec![Class::Sse],
        Shape::Complex(16) => vec![Class::Sse; 2],
        Shape::Complex(_) => vec![Class::Memory],
        Shape::Vector(8) => vec![Class::Sse],
        Shape::Vector(16) => vec![Class::Sse, Class::SseUp],
        // One register with AVX, memory without.
        Shape::Vector(_) => return Err(Unclassified),
        Shape::Aggregate(record) => classify_record(record)?,
    })
}

fn classify_record(record: &Record) -> Result<Vec<Class>, Unclassified> {
    if record.size > 16 {
        // Up to 64 bytes of one vector may be in a register; whether, depends on AVX.
        let is_vector = record.size <= 64 && has_vector(record);
        return if is_vector { Err(Unclassified) } else { Ok(vec![Class::Memory]) };
    }
    let n = usize::try_from(record.size.div_ceil(8)).map_err(|_| Unclassified)?;
    let mut classes = vec![Class::None; n];
    if !merge_record(&mut classes, 0, record)? {
        return Ok(vec![Class::Memory]);
    }
    // psABI, post-merger clean-up: X87 among others, or SSEUP without SSE before it.
    if classes.contains(&Class::Memory) {
        return Ok(vec![Class::Memory]);
    }
    if n == 2 && classes[1] == Class::SseUp && classes[0] != Class::Sse {
        classes[1] = Class::Sse;
    }
    if n == 2 && (classes[0] == Class::X87) != (classes[1] == Class::X87) {
        return Ok(vec![Class::Memory]);
    }
    Ok(classes)
}

/// Merges all members at `base` into `classes`; `false` for an unaligned one.
fn merge_record(classes: &mut [Class], base: u64, record: &Record) -> Result<bool, Unclassified> {
    for at in &record.bit_fields {
        merge(classes, base + at, Class::Integer);
    }
    for (offset, shape) in &record.fields {
        let at = base + offset;
        if let Shape::Aggregate(inner) = shape {
            if !merge_record(classes, at, inner)? {
                return Ok(false);
            }
            continue;
        }
        if shape.size() > 0 && !at.is_multiple_of(shape.align()) {
            return Ok(false);
        }
        if matches!(shape, Shape::Vector(32 | 64)) {
            return Err(Unclassified);
        }
        for (class, i) in classify(shape)?.into_iter().zip(0u64..) {
            merge(classes, at + 8 * i, class);
        }
        // A complex float may straddle two eightbytes.
        if *shape == Shape::Complex(8) {
            merge(classes, at + 4, Class::Sse);
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

fn has_vector(record: &Record) -> bool {
    record.fields.iter().any(|(_, shape)| match shape {
        Shape::Vector(size) => *size > 16,
        Shape::Aggregate(inner) => has_vector(inner),
        _ => false,
    })
}
