//! A record per call: arguments at entry, result and duration at exit.

use std::collections::HashMap;

use flea_symbols::signature::{Param, RetWord, Signature, Type};

use super::{
    Attached, Refused, StartError, command_handle,
    programs::{
        ENTRY_HEADER_BYTES, EXIT_BYTES, MAP_NAME, ResultKind, STRING_BYTES, Shape, TAG_ENTRY,
        TAG_EXIT, trace_object, trace_program,
    },
    reader::Reader,
};
use crate::{AttachError, Function, Program, Session};

/// Calls that were entered and not left yet, at most: a target that never returns from what
/// it calls must not fill the controller's memory. The older half is forgotten then.
const MAX_OPEN_CALLS: usize = 1 << 20;

/// Prints calls as they return.
pub struct Trace {
    attached: Attached,
    ring: Option<Reader>,
    open: HashMap<CallKey, OpenCall>,
}

command_handle!(Trace, lost: |trace: &Trace| {
    trace.attached.object.lost() + trace.ring.as_ref().map_or(0, Reader::n_given_up)
});

/// A call is told from every other by its thread, its function and when it began.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct CallKey {
    pid_tgid: u64,
    function: u32,
    time_ns: u64,
}

struct OpenCall {
    args: Vec<(String, Word)>,
}

/// Whether new records may still begin.
enum When {
    TracingGoesOn,
    TracingIsOver,
}

/// One finished call.
#[derive(Clone, Debug)]
pub struct Call<'a> {
    /// CLOCK_MONOTONIC at entry.
    pub time_ns: u64,
    /// Process.
    pub pid: u32,
    /// Thread.
    pub tid: u32,
    /// The function.
    pub function: &'a Function,
    /// Name or `argN`, and value, in source order.
    pub args: Vec<(String, Word)>,
    /// The result; `None` for `void`.
    pub retval: Option<Word>,
    /// From entry to exit.
    pub duration_ns: u64,
}

/// A value with its type's meaning.
#[derive(Clone, Debug, PartialEq)]
pub enum Word {
    /// A signed integer.
    Signed(i64),
    /// An unsigned integer.
    Unsigned(u64),
    /// A pointer, or something whose type is not known.
    Pointer(u64),
    /// A `float` or `double`.
    Float(f64),
    /// What a `char *` pointed at (at most 63 bytes of it); `None` where it was unreadable.
    Text {
        /// The pointer.
        pointer: u64,
        /// The bytes before the NUL.
        bytes: Vec<u8>,
    },
    /// A struct passed by value: its words.
    Words(Vec<u64>),
}

impl Trace {
    /// Starts tracing `functions`.
    ///
    /// # Errors
    /// [`StartError`]; functions that merely cannot be attached to are in
    /// [`Trace::refused`].
    pub fn start(session: &Session, functions: &[Function]) -> Result<Self, StartError> {
        let mut shapes: Vec<Shape> = Vec::new();
        let shape_of: HashMap<_, usize> = functions
            .iter()
            .map(|function| {
                let shape = shape(function.signature());
                let at = shapes.iter().position(|s| *s == shape).unwrap_or(shapes.len());
                if at == shapes.len() {
                    shapes.push(shape);
                }
                (function.address(), at)
            })
            .collect();
        let programs = shapes.iter().map(trace_program).collect();
        let object = session.load(trace_object(programs))?;
        let programs: Vec<Program> = object.programs().collect();
        let attached = Attached::start(object, functions, |function| {
            programs[shape_of[&function.address()]].clone()
        })?;
        let ring = match attached.object.map(MAP_NAME) {
            Some(flea_maps::Map::RingBuf(ring)) => Some(Reader::new(ring)),
            _ => None,
        };
        Ok(Self { attached, ring, open: HashMap::new() })
    }

    /// Hands every call that has returned since the last time to `each`, in the order of
    /// their returns.
    ///
    /// # Errors
    /// What `each` returned; calls that were read behind that one are gone.
    pub fn poll<E>(&mut self, each: impl FnMut(Call<'_>) -> Result<(), E>) -> Result<(), E> {
        self.read(When::TracingGoesOn, each)
    }

    /// As [`Trace::poll`], for the last time, after [`Trace::detach`]: waits for calls that are
    /// being recorded, a second at most.
    ///
    /// # Errors
    /// As [`Trace::poll`].
    pub fn drain<E>(&mut self, each: impl FnMut(Call<'_>) -> Result<(), E>) -> Result<(), E> {
        self.read(When::TracingIsOver, each)
    }

    fn read<E>(
        &mut self,
        when: When,
        mut each: impl FnMut(Call<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let Self { attached, ring, open } = self;
        let mut outcome = Ok(());
        if let Some(ring) = ring {
            let mut each = |bytes: &[u8]| {
                if outcome.is_ok() {
                    outcome = record(&attached.functions, open, bytes, &mut each);
                }
            };
            match when {
                When::TracingGoesOn => ring.poll(&mut each),
                When::TracingIsOver => ring.drain(&mut each),
            }
        }
        outcome
    }

    /// Calls entered and not left: still inside, left by an exception or a longjmp, or their
    /// exit's record was lost.
    #[must_use]
    pub fn n_open(&self) -> usize {
        self.open.len()
    }
}

fn record<E>(
    functions: &[Function],
    open: &mut HashMap<CallKey, OpenCall>,
    bytes: &[u8],
    each: &mut impl FnMut(Call<'_>) -> Result<(), E>,
) -> Result<(), E> {
    // The bytes come from memory that the target can write: nothing about them is sure.
    let word = |i: usize| {
        let chunk = bytes.get(i * 8..)?.first_chunk()?;
        Some(u64::from_le_bytes(*chunk))
    };
    let (Some(head), Some(time_ns), Some(pid_tgid)) = (word(0), word(1), word(2)) else {
        return Ok(());
    };
    let (tag, index) = (high(head), low(head));
    let Some(function) = functions.get(index as usize) else { return Ok(()) };
    let key = |time_ns| CallKey { pid_tgid, function: index, time_ns };
    match tag {
        TAG_ENTRY => {
            if open.len() >= MAX_OPEN_CALLS {
                forget_older_half(open);
            }
            let args = arguments(function.signature(), &bytes[ENTRY_HEADER_BYTES..]);
            open.insert(key(time_ns), OpenCall { args });
            Ok(())
        }
        TAG_EXIT if bytes.len() >= EXIT_BYTES => {
            let (Some(entered_ns), Some(result)) = (word(3), word(4)) else { return Ok(()) };
            let Some(call) = open.remove(&key(entered_ns)) else {
                return Ok(());
            };
            each(Call {
                time_ns: entered_ns,
                pid: high(pid_tgid),
                tid: low(pid_tgid),
                function,
                args: call.args,
                retval: retval(function.signature(), result, &bytes[EXIT_BYTES..]),
                duration_ns: time_ns.saturating_sub(entered_ns),
            })
        }
        _ => Ok(()),
    }
}

/// Calls that an exception or a longjmp has left never return, and are older than others.
fn forget_older_half(open: &mut HashMap<CallKey, OpenCall>) {
    let mut times: Vec<u64> = open.keys().map(|key| key.time_ns).collect();
    let middle = times.len() / 2;
    let (_, &mut median, _) = times.select_nth_unstable(middle);
    open.retain(|key, _| key.time_ns > median);
}

fn high(word: u64) -> u32 {
    u32::try_from(word >> 32).expect("32 bits are left")
}

fn low(word: u64) -> u32 {
    u32::try_from(word & u64::from(u32::MAX)).expect("32 bits are left")
}

fn shape(signature: &Signature) -> Shape {
    let mut slot = 0usize;
    let mut strings = Vec::new();
    for param in &signature.params {
        if is_string(param) {
            strings.push(u8::try_from(slot).unwrap_or(u8::MAX));
        }
        slot += param.words.len();
    }
    let returns_text = matches!(signature.ret.ty, Type::Pointer { to_char: true, .. });
    Shape {
        n_args: u8::try_from(slot).unwrap_or(u8::MAX),
        strings,
        result: if returns_text { ResultKind::Text } else { ResultKind::Word },
    }
}

fn is_string(param: &Param) -> bool {
    matches!(param.ty, Type::Pointer { to_char: true, .. }) && param.words.len() == 1
}

fn arguments(signature: &Signature, bytes: &[u8]) -> Vec<(String, Word)> {
    let n_slots: usize = signature.params.iter().map(|p| p.words.len()).sum();
    let word = |i: usize| {
        bytes.get(i * 8..).and_then(|rest| rest.first_chunk()).map_or(0, |c| u64::from_le_bytes(*c))
    };
    let mut strings = bytes.get(n_slots * 8..).unwrap_or_default().chunks(STRING_BYTES as usize);
    let mut slot = 0;
    let mut args = Vec::with_capacity(signature.params.len());
    for (i, param) in signature.params.iter().enumerate() {
        if param.absent.is_some() {
            continue; // it has no value that could be shown
        }
        let words: Vec<u64> = (slot..slot + param.words.len()).map(word).collect();
        slot += words.len();
        let value = if is_string(param) {
            text(words[0], strings.next().unwrap_or_default())
        } else {
            typed(&param.ty, &words)
        };
        args.push((param.name.clone().unwrap_or_else(|| format!("arg{i}")), value));
    }
    args
}

fn retval(signature: &Signature, result: u64, behind: &[u8]) -> Option<Word> {
    match signature.ret.words.as_slice() {
        [] | [RetWord::X87 { .. }, ..] => None,
        [_] if behind.len() >= STRING_BYTES as usize => {
            Some(text(result, &behind[..STRING_BYTES as usize]))
        }
        [_] => Some(typed(&signature.ret.ty, &[result])),
        _ => Some(Word::Words(vec![result])),
    }
}

/// Up to the NUL.
fn text(pointer: u64, bytes: &[u8]) -> Word {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    Word::Text { pointer, bytes: bytes[..end].to_vec() }
}

/// Gives words the meaning of their type. Bits above a small type's size are undefined in
/// registers and are cut off.
fn typed(ty: &Type, words: &[u64]) -> Word {
    let [word] = *words else { return Word::Words(words.to_vec()) };
    match ty {
        Type::Int { size_bytes: size @ 1..=8, signed, .. } => {
            let unused = 64 - size * 8;
            if *signed {
                Word::Signed((word << unused).cast_signed() >> unused)
            } else {
                Word::Unsigned((word << unused) >> unused)
            }
        }
        Type::Float { size_bytes: 4, .. } => Word::Float(f32::from_bits(low(word)).into()),
        Type::Float { size_bytes: 8, .. } => Word::Float(f64::from_bits(word)),
        Type::Unknown => Word::Signed(word.cast_signed()),
        _ => Word::Pointer(word),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn int(size_bytes: u32, signed: bool) -> Type {
        Type::Int { name: String::new(), size_bytes, signed }
    }

    #[test]
    fn words_get_their_types_meaning() {
        assert_eq!(typed(&int(4, true), &[0xdead_beef_ffff_fffe]), Word::Signed(-2));
        assert_eq!(typed(&int(4, false), &[0xdead_beef_ffff_fffe]), Word::Unsigned(0xffff_fffe));
        assert_eq!(typed(&int(1, false), &[0x1ff]), Word::Unsigned(255));
        assert_eq!(typed(&int(8, true), &[u64::MAX]), Word::Signed(-1));
        let double = Type::Float { name: String::new(), size_bytes: 8 };
        assert_eq!(typed(&double, &[1.5f64.to_bits()]), Word::Float(1.5));
    }
}
