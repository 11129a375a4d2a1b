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
//! where `rbp`, the skeleton's, is `[body_rbp + 0]`. Words of a register that has neither a
//! parameter nor a place of its own are saved by the skeleton: [`super::saves`].

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{InstBuilder, MemFlagsData, Type, Value, types};
use cranelift_frontend::FunctionBuilder;
use flea_symbols::signature::{self, ArgWord, Param, RetWord, Signature};

use super::saves::widths;
use super::{Translator, proved};
use crate::changes::{Changed, Changes};
use crate::clif::{select, symbol};
use crate::code::RelocTarget;
use crate::request::{Saved, When};

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
    /// Words of each vector register that the signature speaks of, as argument and as result.
    arg_widths: [u8; 8],
    result_widths: [u8; 8],
    /// The body's rbp, and the skeleton's where there is one.
    body_rbp: Option<Value>,
    rbp: Option<Value>,
    /// A plain function's context, where it has one: an array of words in memory.
    array: Option<Value>,
    /// What some program of the body stores to, so that others have to look there.
    changes: Changes,
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
            arg_widths: [0; 8],
            result_widths: [0; 8],
            body_rbp: None,
            rbp: None,
            array,
            changes: Changes::NONE,
        }
    }

    /// Emits what every slot needs, in the body's first block. `gpr` and `xmm` are the body's
    /// parameters, see [`Parameters`].
    pub fn new(
        b: &mut FunctionBuilder<'_>,
        side: Side,
        signature: &Signature,
        (gpr, xmm): (&[Value], &[Value]),
    ) -> Self {
        let body_rbp = b.ins().get_frame_pointer(types::I64);
        let rbp = match side {
            Side::Session | Side::Modify | Side::Exit => {
                Some(symbol(b, RelocTarget::SkeletonFrame))
            }
            Side::Entry | Side::Plain => None,
        };
        Self {
            side,
            slots: signature.params.iter().flat_map(slots_of).collect(),
            results: signature.ret.words.clone(),
            gpr: gpr.to_vec(),
            xmm: xmm.to_vec(),
            arg_widths: widths(signature.arg_words().filter_map(|word| match word {
                ArgWord::XmmWord { reg, word } => Some((reg, word)),
                _ => None,
            })),
            result_widths: widths(signature.ret.words.iter().filter_map(|word| match *word {
                RetWord::XmmWord { reg, word } => Some((reg, word)),
                _ => None,
            })),
            body_rbp: Some(body_rbp),
            rbp,
            array: None,
            changes: Changes::NONE,
        }
    }

    /// The same in a body whose programs change these.
    pub fn changed_by(self, changes: Changes) -> Self {
        Self { changes, ..self }
    }

    /// The skeleton's rbp, in bodies that run in its frame.
    pub fn skeleton_rbp(&self) -> Option<Value> {
        self.rbp
    }

    /// The body's own.
    pub fn body_rbp(&self) -> Option<Value> {
        self.body_rbp
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

/// The registers that a body has as parameters. What the program does not read costs nothing.
pub(crate) struct Parameters {
    n_gpr: usize,
    xmm: Vec<Type>,
}

/// Whether a body has uprobe programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Probes {
    None,
    Some,
}

impl Parameters {
    /// Those of a body on `side`: up to the last one that is an argument, as parameters are
    /// handed out in order. Probes see all six integer ones whatever the signature says.
    pub fn of(side: Side, signature: &Signature, probes: Probes) -> Self {
        let n_gpr = if probes == Probes::Some { 6 } else { 0 };
        let mut parameters = Self { n_gpr, xmm: vec![] };
        if !matches!(side, Side::Entry | Side::Session | Side::Modify) {
            return Self { n_gpr: 0, ..parameters };
        }
        for word in signature.arg_words() {
            let (reg, ty) = match word {
                ArgWord::Gpr(i) => {
                    parameters.n_gpr = parameters.n_gpr.max(usize::from(i) + 1);
                    continue;
                }
                ArgWord::Xmm(reg) => (reg, types::F64),
                ArgWord::XmmWord { reg, .. } => (reg, types::F64X2),
                ArgWord::Stack(_) => continue,
            };
            let reg = usize::from(reg);
            let n = parameters.xmm.len().max(reg + 1);
            parameters.xmm.resize(n, types::F64);
            if ty == types::F64X2 {
                parameters.xmm[reg] = ty;
            }
        }
        parameters
    }

    /// Their types: integer registers, then vector registers.
    pub fn types(&self) -> impl Iterator<Item = Type> + '_ {
        std::iter::repeat_n(types::I64, self.n_gpr).chain(self.xmm.iter().copied())
    }

    /// `params`, which have [`Self::types`], by kind.
    pub fn split<'a>(&self, params: &'a [Value]) -> (&'a [Value], &'a [Value]) {
        params.split_at(self.n_gpr)
    }
}

/// Memory of the skeleton's frame or the caller's that nobody writes while a body runs: a load
/// that nobody uses goes away, as all its parts may move.
fn fixed() -> MemFlagsData {
    MemFlagsData::new().with_notrap().with_readonly().with_can_move()
}

fn slots_of(param: &Param) -> impl Iterator<Item = Slot> + '_ {
    let size_bytes = match param.ty {
        signature::Type::Int { size_bytes, .. } | signature::Type::Float { size_bytes, .. } => {
            size_bytes
        }
        // The word may be the address of one: a class with a destructor is passed so.
        signature::Type::Aggregate { .. }
        | signature::Type::Void
        | signature::Type::Pointer { .. }
        | signature::Type::Unknown => u32::MAX,
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
            ArgWord::Gpr(i) => self.integer_argument(usize::from(i))?,
            ArgWord::Xmm(i) => self.lane(i, 0)?,
            ArgWord::XmmWord { reg, word: 1 } if !exit => self.lane(reg, 1)?,
            ArgWord::XmmWord { reg, word } => {
                let n_words = *args.arg_widths.get(usize::from(reg))?;
                self.saved(When::Entry, Saved::Vector { reg, n_words }, word)?
            }
            ArgWord::Stack(i) => {
                let i = i32::try_from(i).ok()?.checked_mul(8)?;
                let value = match args.rbp {
                    _ if let Some(array) = args.array => {
                        self.b.ins().load(types::I64, fixed(), array, i)
                    }
                    Some(_) => self.frame_word(i.checked_add(16)?)?,
                    None => {
                        let at = i.checked_add(24)?;
                        self.fixed_word(args.body_rbp?, at)
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

    /// Integer argument register `i`, in front of the original: a parameter of the body, unless
    /// programs of the body change it.
    pub(super) fn integer_argument(&mut self, i: usize) -> Option<Value> {
        let args = &self.env.args;
        let parameter = args.gpr.get(i).copied();
        let changed = Changed::Argument(u8::try_from(i).ok()?);
        if args.side != Side::Session || !args.changes.has(changed) {
            return parameter;
        }
        let (base, at) = self.place_of(changed)?;
        Some(self.b.ins().load(types::I64, proved(), base, at))
    }

    /// Where in the skeleton's frame something is kept that can be changed.
    pub(super) fn place_of(&self, what: Changed) -> Option<(Value, i32)> {
        let offset = match what {
            Changed::Argument(i) => -40 - 8 * i32::from(i),
            Changed::Result => -8,
        };
        Some((self.env.args.rbp?, offset))
    }

    /// What word `word` of the context is, where programs can change it.
    pub(super) fn changed_slot(&self, word: i32) -> Option<Changed> {
        let args = &self.env.args;
        let slot = usize::try_from(word).ok()?;
        match args.slots.get(slot).map(|slot| slot.word) {
            Some(ArgWord::Gpr(i)) => Some(Changed::Argument(i)),
            Some(_) => None,
            None if args.results.get(slot - args.n_args()) == Some(&RetWord::Rax) => {
                Some(Changed::Result)
            }
            None => None,
        }
    }

    /// Word `n` of the result; 0 where there is none to see.
    pub(super) fn result(&mut self, n: usize) -> Value {
        let args = &self.env.args;
        let word = match args.side {
            Side::Exit => args.results.get(n).copied(),
            Side::Entry | Side::Session | Side::Modify | Side::Plain => None,
        };
        let value = word.and_then(|word| self.result_word(word));
        value.unwrap_or_else(|| self.iconst(0))
    }

    pub(super) fn result_word(&mut self, word: RetWord) -> Option<Value> {
        self.out.reads.add_result(word);
        match word {
            RetWord::Rax if self.env.args.changes.result => {
                let (base, at) = self.place_of(Changed::Result)?;
                Some(self.b.ins().load(types::I64, proved(), base, at))
            }
            RetWord::Rax => self.frame_word(-8),
            RetWord::Rdx => self.frame_word(-16),
            RetWord::Xmm0 => self.frame_word(-24),
            RetWord::Xmm1 => self.frame_word(-32),
            RetWord::XmmWord { reg, word } => {
                let n_words = *self.env.args.result_widths.get(usize::from(reg))?;
                self.saved(When::Exit, Saved::Vector { reg, n_words }, word)
            }
            RetWord::X87 { reg, word } => self.saved(When::Exit, Saved::X87 { reg }, word),
        }
    }

    /// Half of a vector register that is a parameter of the body.
    fn lane(&mut self, reg: u8, lane: u8) -> Option<Value> {
        let whole = *self.env.args.xmm.get(usize::from(reg))?;
        let half = match self.type_of(whole) {
            types::F64X2 => self.b.ins().extractlane(whole, lane),
            _ if lane == 0 => whole,
            _ => return None,
        };
        Some(self.b.ins().bitcast(types::I64, MemFlagsData::new(), half))
    }

    /// The context's 8 bytes at `slot` (-1 and -2 as in Linux). `None` if out of bounds.
    pub(super) fn context_slot(&mut self, slot: i32) -> Option<Value> {
        let n_args = self.env.args.n_args();
        match slot {
            -2 => Some(self.number(self.env.function_address)),
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

    pub(super) fn frame_word(&mut self, offset: i32) -> Option<Value> {
        let rbp = self.env.args.rbp?;
        Some(self.fixed_word(rbp, offset))
    }

    pub(super) fn fixed_word(&mut self, base: Value, offset: i32) -> Value {
        self.b.ins().load(types::I64, fixed(), base, offset)
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
