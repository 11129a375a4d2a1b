//! Where a program's context comes from. The context pointer itself has no run-time value:
//! each slot is an SSA value, made where it is read.
//!
//! ```text
//!   side      register arguments            caller's stack words      results
//!   entry     parameters of the body        [body_rbp + 24 + 8*i]     -
//!   session   parameters of the body        [rbp + 16 + 8*i]          0
//!   modify    parameters of the body        [rbp + 16 + 8*i]          0, for else it is skipped
//!   exit      [rbp - 40 - 8*i] (integer)    [rbp + 16 + 8*i]          [rbp - 8 ...]
//!             [rbp - 88 - 8*i] (xmm)
//! ```
//! where `rbp`, the skeleton's, is `[body_rbp + 0]`.

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{InstBuilder, MemFlagsData, Value, types};
use cranelift_frontend::FunctionBuilder;
use flea_symbols::signature::{ArgWord, Param, RetWord, Signature, Type};

use super::{Translator, proved};
use crate::clif::select;

/// Where the first non-zero result of an fmod_ret program goes, from the skeleton's rbp: the
/// word of the result rax, which is not there yet.
const SKIP_VALUE_OFFSET: i32 = -8;

/// Which of the four bodies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// fentry.
    Entry,
    /// fsession, at entry.
    Session,
    /// fmod_ret.
    Modify,
    /// fexit, and fsession at exit.
    Exit,
    /// No trampoline at all: plain memory in, r0 out.
    Plain,
}

/// One `ctx` slot's source.
#[derive(Clone, Copy, Debug)]
struct Slot {
    word: ArgWord,
    /// Bytes of the word that mean something, where it is on the stack.
    n_bytes: u32,
}

/// The arguments as the current body finds them.
pub(crate) struct Arguments {
    pub side: Side,
    slots: Vec<Slot>,
    results: Vec<RetWord>,
    /// Body parameters by register number.
    gpr: Vec<Value>,
    xmm: Vec<Value>,
    /// The body's rbp, and the skeleton's where there is one.
    body_rbp: Option<Value>,
    rbp: Option<Value>,
    /// A plain function's context, where it has one: an array of words in memory.
    array: Option<Value>,
}

impl Arguments {
    /// For a function without a trampoline, whose context is `n_words` words at `array`.
    pub fn plain(array: Option<Value>, n_words: u32) -> Self {
        let slots = (0..n_words).map(|i| Slot { word: ArgWord::Stack(i), n_bytes: 8 });
        Self {
            side: Side::Plain,
            slots: slots.collect(),
            results: vec![],
            gpr: vec![],
            xmm: vec![],
            body_rbp: None,
            rbp: None,
            array,
        }
    }

    /// How many integer and vector register parameters the body declares on `side`.
    pub fn n_registers(side: Side, signature: &Signature) -> (usize, usize) {
        let count = |wanted: fn(ArgWord) -> Option<u8>| {
            signature.arg_words().filter_map(wanted).map(|i| usize::from(i) + 1).max().unwrap_or(0)
        };
        match side {
            Side::Entry | Side::Session | Side::Modify => (
                count(|w| if let ArgWord::Gpr(i) = w { Some(i) } else { None }),
                count(|w| if let ArgWord::Xmm(i) = w { Some(i) } else { None }),
            ),
            Side::Exit | Side::Plain => (0, 0),
        }
    }

    /// Emits what every slot needs, in the body's first block. `params` are the integer
    /// registers, then the vector registers.
    pub fn new(
        b: &mut FunctionBuilder<'_>,
        side: Side,
        signature: &Signature,
        params: &[Value],
    ) -> Self {
        let n_gpr = Self::n_registers(side, signature).0;
        let body_rbp = b.ins().get_frame_pointer(types::I64);
        let rbp = match side {
            Side::Session | Side::Modify | Side::Exit => {
                Some(b.ins().load(types::I64, fixed(), body_rbp, 0))
            }
            Side::Entry | Side::Plain => None,
        };
        Self {
            side,
            slots: signature.params.iter().flat_map(slots_of).collect(),
            results: signature.ret.words.clone(),
            gpr: params[..n_gpr].to_vec(),
            xmm: params[n_gpr..].to_vec(),
            body_rbp: Some(body_rbp),
            rbp,
            array: None,
        }
    }

    /// The skeleton's rbp, in bodies that run in its frame.
    pub fn skeleton_rbp(&self) -> Option<Value> {
        self.rbp
    }

    /// `ctx` slots before the result.
    pub fn n_args(&self) -> usize {
        self.slots.len()
    }

    /// The result's words.
    pub fn results(&self) -> &[RetWord] {
        &self.results
    }
}

/// Memory of the skeleton's frame or the caller's that nobody writes while a body runs: a load
/// that nobody uses goes away, as all its parts may move.
fn fixed() -> MemFlagsData {
    MemFlagsData::new().with_notrap().with_readonly().with_can_move()
}

fn slots_of(param: &Param) -> impl Iterator<Item = Slot> + '_ {
    let size_bytes = match param.ty {
        Type::Int { size_bytes, .. }
        | Type::Float { size_bytes, .. }
        | Type::Aggregate { size_bytes, .. } => size_bytes,
        Type::Void | Type::Pointer { .. } | Type::Unknown => u32::MAX,
    };
    (0u32..)
        .zip(&param.words)
        .map(move |(i, &word)| Slot { word, n_bytes: size_bytes.saturating_sub(8 * i).min(8) })
}

impl Translator<'_, '_> {
    /// The value of argument slot `n`. `None` if there is no such slot.
    pub(super) fn argument(&mut self, n: usize) -> Option<Value> {
        let args = &self.env.args;
        let slot = *args.slots.get(n)?;
        let exit = args.side == Side::Exit;
        if exit {
            self.out.reads.add_arg(slot.word);
        }
        Some(match slot.word {
            ArgWord::Gpr(i) if exit => self.frame_word(-40 - 8 * i32::from(i))?,
            ArgWord::Xmm(i) if exit => self.frame_word(-88 - 8 * i32::from(i))?,
            ArgWord::Gpr(i) => *args.gpr.get(usize::from(i))?,
            ArgWord::Xmm(i) => {
                let value = *args.xmm.get(usize::from(i))?;
                self.b.ins().bitcast(types::I64, MemFlagsData::new(), value)
            }
            ArgWord::XmmWord { .. } => return None,
            ArgWord::Stack(i) => {
                let i = i32::try_from(i).ok()?.checked_mul(8)?;
                let value = match args.rbp {
                    _ if let Some(array) = args.array => {
                        self.b.ins().load(types::I64, fixed(), array, i)
                    }
                    Some(_) => self.frame_word(i.checked_add(16)?)?,
                    None => {
                        let at = i.checked_add(24)?;
                        self.b.ins().load(types::I64, fixed(), args.body_rbp?, at)
                    }
                };
                // As Linux: the caller leaves the upper bytes of a small word undefined.
                let unused_bits = 64 - 8 * i64::from(slot.n_bytes);
                match unused_bits {
                    0 | 64 => value,
                    bits => self.b.ins().band_imm_u(value, (u64::MAX >> bits).cast_signed()),
                }
            }
        })
    }

    /// The first word of the result; 0 where there is none to see.
    pub(super) fn result(&mut self, n: usize) -> Value {
        let args = &self.env.args;
        let word = match args.side {
            Side::Exit => args.results.get(n).copied(),
            Side::Entry | Side::Session | Side::Modify | Side::Plain => None,
        };
        let offset = match word {
            Some(RetWord::Rax) => -8,
            Some(RetWord::Rdx) => -16,
            Some(RetWord::Xmm0) => -24,
            Some(RetWord::Xmm1) => -32,
            Some(RetWord::XmmWord { .. } | RetWord::X87 { .. }) | None => return self.iconst(0),
        };
        if let Some(word) = word {
            self.out.reads.add_result(word);
        }
        match self.frame_word(offset) {
            Some(value) => value,
            None => self.iconst(0),
        }
    }

    /// The context's 8 bytes at `slot` (-1 and -2 as in Linux). `None` if out of bounds.
    pub(super) fn context_slot(&mut self, slot: i32) -> Option<Value> {
        let n_args = self.env.args.n_args();
        match slot {
            -2 => Some(self.iconst(self.env.function_address.cast_signed())),
            -1 => {
                let is_return = u64::from(self.env.args.side == Side::Exit) << 63;
                let n_args = u64::try_from(n_args).unwrap_or(u64::MAX) & 0xff;
                Some(self.iconst((is_return | n_args).cast_signed()))
            }
            _ => {
                let slot = usize::try_from(slot).ok()?;
                let n_results = self.env.args.results().len().max(1);
                if slot < n_args {
                    self.argument(slot)
                } else if slot < n_args + n_results {
                    Some(self.result(slot - n_args))
                } else {
                    None
                }
            }
        }
    }

    /// `bpf_get_func_arg`'s value for a number known only at run time, and whether it is one.
    pub(super) fn argument_by_value(&mut self, n: Value) -> (Value, Value) {
        let n_args = self.env.args.n_args();
        let mut value = self.iconst(0);
        for i in 0..n_args {
            let Some(argument) = self.argument(i) else { continue };
            let this = i64::try_from(i).unwrap_or(i64::MAX);
            let this = self.b.ins().icmp_imm_s(IntCC::Equal, n, this);
            value = select(self.b, this, argument, value);
        }
        let bound = i64::try_from(n_args).unwrap_or(i64::MAX);
        let valid = self.b.ins().icmp_imm_u(IntCC::UnsignedLessThan, n, bound);
        (value, valid)
    }

    /// The address of this program's session cookie.
    pub(super) fn cookie_address(&mut self) -> Option<Value> {
        let rbp = self.env.args.skeleton_rbp()?;
        let offset = cookie_offset(self.env.frame_offset, self.used.cookie_word);
        Some(self.b.ins().iadd_imm_s(rbp, offset))
    }

    fn frame_word(&mut self, offset: i32) -> Option<Value> {
        let rbp = self.env.args.rbp?;
        Some(self.b.ins().load(types::I64, fixed(), rbp, offset))
    }
}

/// Where word `k` of a body's frame is, from the skeleton's rbp.
pub(crate) fn cookie_offset(frame_offset: u32, word: u32) -> i64 {
    -i64::from(frame_offset) - 8 * i64::from(word)
}

/// Makes `value` the result of the function, which is skipped.
pub(crate) fn store_skip_value(b: &mut FunctionBuilder<'_>, args: &Arguments, value: Value) {
    if let Some(rbp) = args.skeleton_rbp() {
        b.ins().store(proved(), value, rbp, SKIP_VALUE_OFFSET);
    }
}

/// Zeroes the session cookie in `word`.
pub(crate) fn zero_cookie(
    b: &mut FunctionBuilder<'_>,
    args: &Arguments,
    frame_offset: u32,
    word: u32,
) {
    if let Some(rbp) = args.skeleton_rbp() {
        let at = b.ins().iadd_imm_s(rbp, cookie_offset(frame_offset, word));
        let zero = b.ins().iconst(types::I64, 0);
        b.ins().store(proved(), zero, at, 0);
    }
}
