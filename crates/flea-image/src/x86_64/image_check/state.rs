//! All that is known in front of one instruction, and the rules of reading and writing memory.

use std::collections::{BTreeMap, HashSet};

use iced_x86::{Instruction, Register};

use super::value::{Source, Value};
use super::{Holds, ImageUnderCheck, Rule, Trusted};

pub(super) const RAX: usize = 0;
pub(super) const RCX: usize = 1;
pub(super) const RDX: usize = 2;
pub(super) const RDI: usize = 7;
pub(super) const RSP: usize = 4;
pub(super) const RBP: usize = 5;
pub(super) const RSI: u8 = 6;

/// rbx, rbp, r12 to r15.
pub(super) const CALLEE_SAVED: [u8; 6] = [3, 5, 12, 13, 14, 15];
/// How far below `rsp` a write is known not to fault: the ABI's red zone.
const RED_ZONE_BYTES: i64 = 128;
/// The skeleton's `rbp`, from the entry's `rsp`.
pub(super) const FRAME: i64 = -8;
/// The word of the result rax, which is a modify body's before there is a result.
pub(super) const DECISION: i64 = FRAME - 8;

/// The lowest word of the frame that an argument of a general register is in, below `rbp`.
const LAST_HOME: u32 = 80;

/// What does not change while an image is explored.
pub(super) struct Surroundings<'a> {
    pub image: &'a ImageUnderCheck<'a>,
    /// The image's 64-bit immediates.
    pub immediates: HashSet<u64>,
    /// The instruction that is followed.
    pub ip: u64,
    /// What stands in front of the moved instructions is explored, not the image's entry.
    pub in_front: bool,
}

impl Surroundings<'_> {
    pub fn is_memory(&self, address: u64) -> bool {
        self.is_trusted(&self.image.memory, address)
    }

    pub fn is_runtime(&self, address: u64) -> bool {
        self.is_trusted(&self.image.runtime, address)
    }

    /// What the frame's word at `at` is for, if that is an argument or result of a general
    /// register.
    fn home(&self, at: i64) -> Option<(u32, Holds)> {
        let below_rbp = u32::try_from(FRAME - at).ok().filter(|below| *below <= LAST_HOME)?;
        let word = self.image.frame.iter().find(|word| word.below_rbp == below_rbp)?;
        let (Holds::Argument(source) | Holds::Result(source)) = word.holds;
        matches!(source, Source::Gpr(_)).then_some((below_rbp, word.holds))
    }

    /// Whether `address` is the frame's word of the argument `source`.
    pub fn is_home(&self, address: Address, source: Source) -> bool {
        let Address::Stack(at) = address else { return false };
        self.home(at).is_some_and(|(_, holds)| holds == Holds::Argument(source))
    }

    /// Whether the instruction that is followed may change the frame's word `below_rbp`.
    fn may_change(&self, below_rbp: u32) -> bool {
        let mut changers = self.image.changers.iter();
        changers.any(|c| c.code.contains(&self.ip) && c.words.contains(&below_rbp))
    }

    fn is_trusted(&self, trusted: &Trusted<'_>, address: u64) -> bool {
        match trusted {
            Trusted::Ranges(ranges) => ranges.iter().any(|r| r.contains(&address)),
            Trusted::Immediates => self.immediates.contains(&address),
        }
    }
}

/// Where a memory operand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Address {
    /// The entry's `rsp` plus this.
    Stack(i64),
    /// That plus a computed index.
    Near(i64),
    /// In memory that may be written.
    Shared,
    /// What the caller passed in a register, plus this.
    Passed(Source, i64),
    /// Anywhere.
    Unknown,
}

/// The x87 register stack against what it was at the entry or behind the original.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct X87 {
    /// Registers popped off it.
    pub n_popped: u8,
    /// Registers pushed after that.
    pub pushed: Vec<Value>,
}

/// Registers and stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub gpr: [Value; 16],
    /// The low two words; nothing that changes higher ones is let through.
    pub vector: [[Value; 2]; 16],
    pub x87: X87,
    /// Words below the entry's `rsp`, by their distance to it; absent ones were not written.
    stack: BTreeMap<i64, Value>,
    /// The original was called.
    pub called: bool,
    /// How many of the image's known calls were made; they come in order.
    pub n_calls: usize,
    /// A branch was taken that is written into the image later: bodies may be left out.
    pub switched: bool,
    /// Where the original's return address still is.
    pub used_return: Option<i64>,
    /// The flags say whether a modify body has left 0 in [`DECISION`].
    pub tests_decision: bool,
    /// It was not 0: the original is skipped.
    pub skips: bool,
    /// What [`DECISION`] holds or, once the frame is gone, held.
    pub result: Value,
    /// The flags say whether this argument register is as the original was given it.
    pub tests_argument: Option<u8>,
    /// Where the first part of the caller's stack words was copied to.
    pub half_copied: Option<i64>,
}

impl State {
    /// As the caller made it.
    pub fn at_entry() -> Self {
        let mut gpr = std::array::from_fn(|i| Value::Caller(Source::Gpr(small(i))));
        gpr[RSP] = Value::Stack(0);
        let word = |reg, word| Value::Caller(Source::Vector { reg: small(reg), word });
        Self {
            gpr,
            vector: std::array::from_fn(|reg| [word(reg, 0), word(reg, 1)]),
            x87: X87::default(),
            stack: BTreeMap::new(),
            called: false,
            n_calls: 0,
            switched: false,
            used_return: None,
            tests_decision: false,
            skips: false,
            result: Value::Unknown,
            tests_argument: None,
            half_copied: None,
        }
    }

    pub fn rsp(&self) -> Result<i64, Rule> {
        match self.gpr[RSP] {
            Value::Stack(at) => Ok(at),
            _ => Err(Rule::LostStack),
        }
    }

    /// Moves `rsp`; what is below it then is nobody's.
    pub fn set_rsp(&mut self, value: Value) -> Result<(), Rule> {
        let Value::Stack(at) = value else { return Err(Rule::LostStack) };
        self.gpr[RSP] = value;
        self.stack = self.stack.split_off(&at);
        Ok(())
    }

    /// What a register or word holds that nobody has touched since the entry or the original,
    /// which keeps some of them.
    pub fn left(&self, source: Source) -> Value {
        let is_kept = matches!(source, Source::Gpr(i) if CALLEE_SAVED.contains(&i));
        if self.called && !is_kept { Value::Left(source) } else { Value::Caller(source) }
    }

    /// The address of `base + index * scale + displacement`.
    pub fn address(&self, operand: &Operand, about: &Surroundings<'_>) -> Address {
        let displacement = operand.displacement.cast_signed();
        let base = operand.base.map_or(Value::Number(0), |r| self.gpr[r]);
        let index = operand.index.map(|(r, _)| self.gpr[r]);
        let is_memory = |n| about.is_memory(n);
        let sum = match index {
            None => base,
            Some(index) => {
                let scaled = match operand.index {
                    Some((_, 1)) => index,
                    _ => Value::Unknown,
                };
                base.plus(scaled, is_memory)
            }
        };
        match sum {
            Value::Stack(at) => Address::Stack(at.wrapping_add(displacement)),
            Value::Near(at) => Address::Near(at.wrapping_add(displacement)),
            Value::Shared => Address::Shared,
            Value::Caller(source) => Address::Passed(source, displacement),
            Value::Number(n)
                if is_memory(n.wrapping_add(operand.displacement))
                    || (is_memory(n) && matches!(about.image.memory, Trusted::Immediates)) =>
            {
                Address::Shared
            }
            _ => Address::Unknown,
        }
    }

    /// The value of `n_bytes` at `address`.
    pub fn read(
        &self,
        address: Address,
        n_bytes: usize,
        about: &Surroundings<'_>,
    ) -> Result<Value, Rule> {
        match address {
            Address::Stack(at) => self.read_stack(at, n_bytes, about),
            Address::Shared if n_bytes == 8 => Ok(Value::Shared),
            Address::Near(_) | Address::Shared | Address::Passed(..) | Address::Unknown => {
                Ok(Value::Unknown)
            }
        }
    }

    fn read_stack(&self, at: i64, n_bytes: usize, about: &Surroundings<'_>) -> Result<Value, Rule> {
        let end = at.saturating_add(signed(n_bytes));
        if at < self.rsp()? {
            return Err(Rule::ReadsDead);
        }
        // A uretprobe's program finds itself there; half of it is a mistake in an offset.
        let is_return_address = at == 0 && n_bytes == 8;
        if at < 8 && end > 0 && !is_return_address {
            return Err(Rule::ReadsReturnAddress);
        }
        for word in words_of(at, n_bytes) {
            self.check_frame_word(word, about)?;
        }
        let whole = n_bytes == 8 && at % 8 == 0;
        Ok(if whole { self.word(at) } else { Value::Unknown })
    }

    /// The word at `at`, without a judgement on who may read it.
    pub fn word(&self, at: i64) -> Value {
        match u32::try_from((at - 8) / 8) {
            Ok(i) if at >= 8 => Value::CallerWord(i),
            _ => self.stack.get(&at).copied().unwrap_or(Value::Unknown),
        }
    }

    /// If the word at `at` is one of the skeleton's frame: does it hold what it should?
    pub fn check_frame_word(&self, at: i64, about: &Surroundings<'_>) -> Result<(), Rule> {
        let Ok(below_rbp) = u32::try_from(FRAME - at) else { return Ok(()) };
        let in_frame = (8..=about.image.frame_bytes).contains(&below_rbp);
        if !in_frame || !self.has_frame() {
            return Ok(());
        }
        let found = self.stack.get(&at).copied();
        let mut words = about.image.frame.iter().filter(|w| w.below_rbp == below_rbp);
        let good = match words.next().map(|w| w.holds) {
            Some(Holds::Argument(source) | Holds::Result(source))
                if found == Some(Value::Changed(source)) =>
            {
                true
            }
            Some(Holds::Argument(source)) => found == Some(Value::Caller(source)),
            Some(Holds::Result(source)) if self.called => found == Some(self.left(source)),
            Some(Holds::Result(_)) => found.is_some(),
            // A called body may have written its own words.
            None => found.is_some() || self.n_calls > 0,
        };
        if good { Ok(()) } else { Err(Rule::FrameWord(below_rbp)) }
    }

    /// The word under the return address is the caller's `rbp`: the skeleton's frame is there.
    fn has_frame(&self) -> bool {
        self.stack.get(&FRAME) == Some(&Value::Caller(Source::Gpr(small(RBP))))
    }

    /// Writes `n_bytes` of `value`.
    pub fn write(
        &mut self,
        address: Address,
        n_bytes: usize,
        value: Value,
        about: &Surroundings<'_>,
    ) -> Result<(), Rule> {
        match address {
            Address::Stack(at) => self.write_stack(at, n_bytes, value, about),
            // The index was proved to stay in the body's own stack; its base is checked.
            Address::Near(at) if (self.rsp()?..0).contains(&at) => Ok(()),
            Address::Near(_) => Err(Rule::WritesCaller),
            Address::Shared => Ok(()),
            Address::Passed(Source::Gpr(RSI), at) if about.in_front && n_bytes == 8 => {
                let answer = 0..about.image.answer_bytes.unwrap_or(0);
                if answer.contains(&at) { Ok(()) } else { Err(Rule::WritesAnywhere) }
            }
            Address::Passed(..) | Address::Unknown => Err(Rule::WritesAnywhere),
        }
    }

    fn write_stack(
        &mut self,
        at: i64,
        n_bytes: usize,
        value: Value,
        about: &Surroundings<'_>,
    ) -> Result<(), Rule> {
        let end = at.saturating_add(signed(n_bytes));
        if end > 0 {
            return Err(Rule::WritesCaller);
        }
        let rsp = self.rsp()?;
        if at < rsp - RED_ZONE_BYTES {
            return Err(Rule::WritesFarBelow);
        }
        if self.used_return.is_some_and(|used| at <= used && used + 8 <= end) {
            self.used_return = None;
        }
        for word in words_of(at, n_bytes).filter(|word| *word >= rsp) {
            let whole = n_bytes == 8 && at == word;
            let value = if whole { value } else { Value::Unknown };
            match about.home(word).filter(|_| self.has_frame()) {
                Some((below_rbp, _)) if about.may_change(below_rbp) => {
                    self.change(below_rbp, about)?;
                }
                Some((below_rbp, holds)) if !self.may_save(holds, value) => {
                    return Err(Rule::ChangesWord(below_rbp));
                }
                _ => self.insert(word, value),
            }
        }
        Ok(())
    }

    fn insert(&mut self, word: i64, value: Value) {
        if word == DECISION {
            self.result = value;
        }
        self.stack.insert(word, value);
    }

    /// Whether `value` is what belongs into such a word without anybody's leave. Before there is a
    /// result, its word is a modify body's.
    fn may_save(&self, holds: Holds, value: Value) -> bool {
        match holds {
            Holds::Argument(source) => value == Value::Caller(source),
            Holds::Result(source) => !self.called || value == self.left(source),
        }
    }

    /// A program stores something into the frame's word `below_rbp`: whatever was known to be what
    /// that holds is so no longer.
    pub fn change(&mut self, below_rbp: u32, about: &Surroundings<'_>) -> Result<(), Rule> {
        let at = FRAME - i64::from(below_rbp);
        let Some((_, Holds::Argument(source) | Holds::Result(source))) = about.home(at) else {
            return Err(Rule::ChangesWord(below_rbp));
        };
        // What nobody has saved has no value on the ways where nobody changes it.
        if !self.stack.contains_key(&at) {
            return Err(Rule::FrameWord(below_rbp));
        }
        let old = |value: &&mut Value| **value == Value::Changed(source);
        let values = self.gpr.iter_mut().chain(self.vector.iter_mut().flatten());
        values.chain(self.stack.values_mut()).filter(old).for_each(|v| *v = Value::Unknown);
        self.insert(at, Value::Changed(source));
        Ok(())
    }

    /// What an argument register has to hold in front of the original: what programs have made of
    /// it, or what the caller left.
    pub fn given(&self, source: Source, about: &Surroundings<'_>) -> Value {
        let mut homes = about.image.frame.iter().filter(|word| word.below_rbp <= LAST_HOME);
        let home = homes.find(|word| word.holds == Holds::Argument(source));
        let held = home.and_then(|word| self.stack.get(&(FRAME - i64::from(word.below_rbp))));
        let changed = held.filter(|value| **value == Value::Changed(source));
        changed.copied().unwrap_or(Value::Caller(source))
    }

    /// Whether `value`, known on this way, is what the word at `home` holds.
    fn is_in(&self, home: i64, value: Value) -> bool {
        if home == DECISION { self.result == value } else { self.stack.get(&home) == Some(&value) }
    }

    /// What is known where `a`, on this way, meets `b`, on `other`: on both it may be what the same
    /// word of the frame holds, which a program has changed on one of them.
    fn join_changed(
        &self,
        a: Value,
        other: &Self,
        b: Value,
        about: &Surroundings<'_>,
    ) -> Option<Value> {
        let (Value::Changed(source), unchanged) =
            (if let Value::Changed(_) = a { (a, b) } else { (b, a) })
        else {
            return None;
        };
        let mut homes = about.image.frame.iter().filter(|word| word.below_rbp <= LAST_HOME);
        let word = homes.find(|word| match word.holds {
            Holds::Argument(of) => of == source && unchanged == Value::Caller(source),
            Holds::Result(of) => of == source && unchanged != Value::Caller(source),
        })?;
        let home = FRAME - i64::from(word.below_rbp);
        let both = self.is_in(home, a) && other.is_in(home, b);
        both.then_some(Value::Changed(source))
    }

    /// `rep movsb` of the caller's stack words, or as many of them as are known to be mapped, to
    /// the bottom of the frame.
    pub fn copy_bytes(&mut self, about: &Surroundings<'_>) -> Result<(), Rule> {
        let rsp = self.rsp()?;
        let n_words = about.image.stack_words;
        let room = FRAME - i64::from(about.image.frame_bytes) - rsp;
        let fits = room >= 8 * i64::from(n_words);
        if self.gpr[usize::from(RSI)] != Value::Stack(8)
            || self.gpr[RDI] != Value::Stack(rsp)
            || !fits
        {
            return Err(Rule::Forbidden("copies something else than the caller's stack words"));
        }
        self.forget(rsp, n_words);
        self.half_copied = Some(rsp);
        self.gpr[usize::from(RSI)] = Value::Near(8);
        self.gpr[RDI] = Value::Near(rsp);
        self.gpr[RCX] = Value::Number(0);
        Ok(())
    }

    /// What is known where a modify body's decision is, and where it is not, 0.
    pub fn decided(self) -> (Self, Self) {
        let mut skips = Self { skips: true, ..self.clone() };
        skips.insert(DECISION, Value::Decision);
        let mut calls = self;
        calls.insert(DECISION, Value::Number(0));
        (calls, skips)
    }

    /// Forgets the words from `from` on, `n_words` of them.
    pub fn forget(&mut self, from: i64, n_words: u32) {
        for i in 0..i64::from(n_words) {
            self.stack.insert(from + 8 * i, Value::Unknown);
        }
    }

    /// What is known where this way and `other` meet.
    pub fn join(&self, other: &Self, about: &Surroundings<'_>) -> Result<Self, Rule> {
        if self.gpr[RSP] != other.gpr[RSP] || self.x87 != other.x87 {
            return Err(Rule::Uneven);
        }
        let join = |a: Value, b: Value| {
            let changed = if a == b { None } else { self.join_changed(a, other, b, about) };
            changed.unwrap_or_else(|| a.join(b, |n| about.is_memory(n)))
        };
        let both = self.stack.iter().filter_map(|(at, value)| {
            other.stack.get(at).map(|theirs| (*at, join(*value, *theirs)))
        });
        Ok(Self {
            gpr: std::array::from_fn(|i| join(self.gpr[i], other.gpr[i])),
            vector: std::array::from_fn(|i| {
                std::array::from_fn(|word| join(self.vector[i][word], other.vector[i][word]))
            }),
            x87: self.x87.clone(),
            stack: both.collect(),
            called: self.called,
            n_calls: self.n_calls.min(other.n_calls),
            switched: self.switched,
            used_return: self.used_return.or(other.used_return),
            tests_decision: self.tests_decision && other.tests_decision,
            skips: self.skips && other.skips,
            result: join(self.result, other.result),
            tests_argument: self
                .tests_argument
                .filter(|_| self.tests_argument == other.tests_argument),
            half_copied: self.half_copied.filter(|at| other.half_copied == Some(*at)),
        })
    }
}

/// A memory operand taken apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operand {
    base: Option<usize>,
    index: Option<(usize, u32)>,
    displacement: u64,
}

impl Operand {
    /// The explicit memory operand of `insn`.
    pub fn of(insn: &Instruction) -> Result<Self, Rule> {
        Self::new(
            insn.memory_base(),
            insn.memory_index(),
            insn.memory_index_scale(),
            insn.memory_displacement64(),
        )
    }

    /// From the parts as iced-x86 gives them.
    pub fn new(
        base: Register,
        index: Register,
        scale: u32,
        displacement: u64,
    ) -> Result<Self, Rule> {
        let base = match base {
            // The displacement is the address itself then.
            Register::None | Register::RIP => None,
            base => Some(gpr_index(base).ok_or(Rule::Forbidden("addresses by half a register"))?),
        };
        let index = match index {
            Register::None => None,
            index => {
                let i = gpr_index(index).ok_or(Rule::Forbidden("addresses by half a register"))?;
                Some((i, scale))
            }
        };
        Ok(Self { base, index, displacement })
    }
}

/// The number of a 64-bit general register.
pub(super) fn gpr_index(register: Register) -> Option<usize> {
    register.is_gpr64().then(|| register.number())
}

/// The aligned words that `n_bytes` at `at` touch.
fn words_of(at: i64, n_bytes: usize) -> impl Iterator<Item = i64> {
    let first = at.div_euclid(8) * 8;
    (first..at.saturating_add(signed(n_bytes))).step_by(8)
}

fn signed(n_bytes: usize) -> i64 {
    i64::try_from(n_bytes).unwrap_or(i64::MAX)
}

pub(super) fn small(i: usize) -> u8 {
    u8::try_from(i).expect("there are 16 registers")
}
