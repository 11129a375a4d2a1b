//! One function's 512 bytes of stack: 64 slots of 8 bytes.
//!
//! A slot written by one aligned 8-byte store keeps the whole register, a half of one by an aligned
//! 4-byte store keeps the number; otherwise each byte is known to be unwritten, zero or anything.

use crate::number::scalar::{AluOp, Scalar, Width};
use crate::report::Fault;
use crate::value::{Number, Value};

/// Bytes of one function's stack.
pub(crate) const STACK_BYTES: i32 = 512;
/// Slots of 8 bytes.
pub(crate) const STACK_SLOTS: usize = 64;

/// A byte of a slot that holds no whole register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Byte {
    Unwritten,
    Zero,
    Anything,
}

/// Eight bytes of stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// A register, spilled whole.
    Spill(Value),
    /// At least one number of 4 bytes.
    Halves(Box<[Half; 2]>),
    /// Lowest address first.
    Bytes([Byte; 8]),
}

/// Four bytes of a slot: where clang spills an `int`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    /// A number that 4 bytes hold, zero-extended.
    Number(Value),
    Bytes([Byte; 4]),
}

/// A frame's slots; slot 0 is at -8, slot 63 at -512. Slots past the end are unwritten.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stack {
    slots: Vec<Slot>,
}

/// Which bytes of the stack an access covers; checked to lie inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// From the frame's top, -512..0.
    off: i32,
    size_bytes: u32,
}

impl Span {
    /// `None` where the bytes are not all inside the stack.
    pub(crate) fn new(off: i64, size_bytes: u32) -> Option<Self> {
        let inside = off >= -i64::from(STACK_BYTES) && off + i64::from(size_bytes) <= 0;
        let off = i32::try_from(off).ok()?;
        inside.then_some(Self { off, size_bytes })
    }

    /// Bytes from the frame's top down to its lowest byte, rounded up to slots.
    pub(crate) fn depth_bytes(self) -> u32 {
        self.off.unsigned_abs().next_multiple_of(8)
    }

    /// The slots of its highest and its lowest byte.
    pub(crate) fn first_and_last_slot(self) -> (usize, usize) {
        let size = self.size_bytes.max(1).cast_signed();
        (slot_of(self.off + size - 1), slot_of(self.off))
    }

    /// It is one whole slot.
    pub(crate) fn is_whole_slot(self) -> bool {
        self.whole_slot().is_some()
    }

    /// The slot, if this is one whole slot.
    fn whole_slot(self) -> Option<usize> {
        (self.size_bytes == 8 && self.off % 8 == 0).then(|| slot_of(self.off))
    }

    /// Slot and byte in it of each byte.
    fn bytes(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.size_bytes.cast_signed()).map(move |i| position(self.off + i))
    }

    /// Every slot that has a byte in it, lowest address first, with the bytes' numbers there.
    pub(crate) fn ranges(self) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
        let end = self.off + self.size_bytes.cast_signed();
        let mut at = self.off;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let (slot, first) = position(at);
            let last = position((end - 1).min(at + 7 - i32::try_from(first).unwrap_or(0))).1;
            at += i32::try_from(last + 1 - first).unwrap_or(8);
            Some((slot, first..last + 1))
        })
    }

    /// Every slot that has a byte in it, with the number of bytes.
    fn slots(self) -> impl Iterator<Item = (usize, usize)> {
        self.ranges().map(|(slot, range)| (slot, range.len()))
    }
}

fn slot_of(off: i32) -> usize {
    position(off).0
}

/// Slot, and byte in the slot counted from its lowest address.
fn position(off: i32) -> (usize, usize) {
    let from_top = usize::try_from(-1 - off).unwrap_or(0);
    (from_top / 8, 7 - from_top % 8)
}

const UNWRITTEN: Slot = Slot::Bytes([Byte::Unwritten; 8]);

impl Half {
    /// `number`, stored with 4 bytes: the same number where it fits into them.
    fn of(number: &Number) -> Self {
        let fits = number.set.is_within(0, i64::from(u32::MAX));
        let kept = if fits { *number } else { Number::unlinked(number.set.zero_extend(32)) };
        Self::Number(Value::Scalar(kept))
    }

    /// The register, if it is one.
    fn value(&self) -> Option<&Value> {
        match self {
            Self::Number(v) => Some(v),
            Self::Bytes(_) => None,
        }
    }

    fn value_mut(&mut self) -> Option<&mut Value> {
        match self {
            Self::Number(v) => Some(v),
            Self::Bytes(_) => None,
        }
    }

    /// Its bytes, a spilled number taken apart.
    pub(crate) fn bytes(&self) -> [Byte; 4] {
        match self {
            Self::Number(v) if v.as_const() == Some(0) => [Byte::Zero; 4],
            Self::Number(_) => [Byte::Anything; 4],
            Self::Bytes(b) => *b,
        }
    }

    /// All four bytes as a register would be filled from them, whether they are written or not.
    pub(crate) fn filled(&self) -> Value {
        match self {
            Self::Number(v) => *v,
            Self::Bytes(b) if b.iter().all(|b| *b == Byte::Zero) => {
                Value::scalar(Scalar::constant(0))
            }
            Self::Bytes(_) => Value::scalar(Scalar::UNKNOWN.zero_extend(32)),
        }
    }

    /// `size_bytes` (1 or 2) of its bytes from byte `first` on.
    fn part(&self, first: usize, size_bytes: u32) -> Scalar {
        let bits = 8 * size_bytes;
        match self {
            Self::Number(Value::Scalar(n)) => {
                let down = Scalar::constant(8 * u64::try_from(first).unwrap_or(0));
                Scalar::alu(AluOp::Rsh, Width::W64, &n.set, &down).zero_extend(bits)
            }
            Self::Bytes(b)
                if b.iter().skip(first).take(size_bytes as usize).all(|b| *b == Byte::Zero) =>
            {
                Scalar::constant(0)
            }
            _ => Scalar::UNKNOWN.zero_extend(bits),
        }
    }
}

impl Slot {
    /// A pointer of ours, of which nobody may have or change a part.
    fn must_stay_whole(&self) -> bool {
        matches!(self, Self::Spill(v @ Value::Pointer(_)) if !v.is_target())
    }

    /// The bytes of a slot, a spilled register taken apart.
    pub(crate) fn bytes(&self) -> [Byte; 8] {
        match self {
            Self::Bytes(b) => *b,
            Self::Spill(Value::NotInit) => [Byte::Unwritten; 8],
            Self::Spill(v) if v.as_const() == Some(0) => [Byte::Zero; 8],
            Self::Spill(_) => [Byte::Anything; 8],
            Self::Halves(halves) => joined(halves.each_ref().map(Half::bytes)),
        }
    }

    /// Both halves, the one at the lower address first. Of a pointer, no number is known.
    pub(crate) fn halves(&self) -> [Half; 2] {
        match self {
            Self::Halves(halves) => **halves,
            Self::Spill(Value::Scalar(n)) => {
                let up = Scalar::constant(32);
                let upper = Scalar::alu(AluOp::Rsh, Width::W64, &n.set, &up);
                [Half::of(n), Half::of(&Number::unlinked(upper))]
            }
            other => {
                let [a, b, c, d, e, f, g, h] = other.bytes();
                [Half::Bytes([a, b, c, d]), Half::Bytes([e, f, g, h])]
            }
        }
    }

    fn from_halves(halves: [Half; 2]) -> Self {
        match halves {
            [Half::Bytes(low), Half::Bytes(high)] => Self::Bytes(joined([low, high])),
            _ => Self::Halves(Box::new(halves)),
        }
    }

    /// The whole slot as a register would be filled from it; `None` where bytes are unwritten.
    pub(crate) fn as_value(&self) -> Option<Value> {
        match self {
            Self::Spill(v) => Some(*v),
            _ if self.bytes().contains(&Byte::Unwritten) => None,
            _ => {
                let [low, high] = self.halves().map(|h| h.filled());
                let (low, high) = (low.as_scalar()?, high.as_scalar()?);
                let high = Scalar::alu(AluOp::Lsh, Width::W64, high, &Scalar::constant(32));
                Some(Value::scalar(Scalar::alu(AluOp::Or, Width::W64, &high, low)))
            }
        }
    }

    /// The registers spilled here.
    fn values(&self) -> impl Iterator<Item = &Value> {
        let found = match self {
            Self::Spill(v) => [Some(v), None],
            Self::Halves(halves) => halves.each_ref().map(Half::value),
            Self::Bytes(_) => [None, None],
        };
        found.into_iter().flatten()
    }

    fn values_mut(&mut self) -> impl Iterator<Item = &mut Value> {
        let found = match self {
            Self::Spill(v) => [Some(v), None],
            Self::Halves(halves) => halves.each_mut().map(Half::value_mut),
            Self::Bytes(_) => [None, None],
        };
        found.into_iter().flatten()
    }

    pub(crate) const fn is_pointer(&self) -> bool {
        matches!(self, Self::Spill(Value::Pointer(_)))
    }

    /// Forgets the number, but not that something was written.
    fn forget_number(&mut self) {
        match self {
            Self::Spill(v @ Value::Scalar(_)) => *v = Value::UNKNOWN,
            Self::Spill(_) => {}
            Self::Bytes(_) | Self::Halves(_) => {
                *self = Self::Bytes(self.bytes().map(|b| match b {
                    Byte::Unwritten => Byte::Unwritten,
                    Byte::Zero | Byte::Anything => Byte::Anything,
                }));
            }
        }
    }

    /// Bytes `range` become `byte`.
    fn fill(&mut self, range: std::ops::Range<usize>, byte: Byte) {
        let mut halves = self.halves();
        for (half, first) in halves.iter_mut().zip([0, 4]) {
            if range.start < first + 4 && first < range.end {
                let mut bytes = half.bytes();
                for (b, i) in bytes.iter_mut().zip(first..) {
                    if range.contains(&i) {
                        *b = byte;
                    }
                }
                *half = Half::Bytes(bytes);
            }
        }
        *self = Self::from_halves(halves);
    }
}

fn joined([low, high]: [[Byte; 4]; 2]) -> [Byte; 8] {
    std::array::from_fn(|i| if i < 4 { low[i] } else { high[i - 4] })
}

impl Stack {
    /// A slot's content.
    pub(crate) fn slot(&self, idx: usize) -> &Slot {
        self.slots.get(idx).unwrap_or(&UNWRITTEN)
    }

    /// How many slots were ever written; those after them never were.
    pub(crate) fn n_slots(&self) -> usize {
        self.slots.len()
    }

    /// All registers spilled here.
    pub(crate) fn spills_mut(&mut self) -> impl Iterator<Item = &mut Value> {
        self.slots.iter_mut().flat_map(Slot::values_mut)
    }

    /// All registers spilled here.
    pub(crate) fn spills(&self) -> impl Iterator<Item = &Value> {
        self.slots.iter().flat_map(Slot::values)
    }

    /// The slots, a bit each, in which a register is spilled that `wanted` picks.
    pub(crate) fn slots_with(&self, wanted: impl Fn(&Value) -> bool) -> u64 {
        let slots = self.slots.iter().zip(0u32..);
        slots.filter(|(slot, _)| slot.values().any(&wanted)).fold(0, |all, (_, i)| all | 1 << i)
    }

    /// Forgets slots that nobody reads any more, and numbers that nobody's safety hangs on.
    pub(crate) fn forget(&mut self, live: u64, exact: u64) {
        for (i, slot) in self.slots.iter_mut().enumerate() {
            if live >> i & 1 == 0 {
                *slot = UNWRITTEN;
            } else if exact >> i & 1 == 0 {
                slot.forget_number();
            }
        }
        while self.slots.last() == Some(&UNWRITTEN) {
            self.slots.pop();
        }
    }

    /// Widens every number that differs from what was there `before`; see
    /// [`crate::state::State::widen`].
    pub(crate) fn widen(&mut self, before: &Self, widen: impl Fn(&mut Value, &Value)) {
        for (i, slot) in self.slots.iter_mut().enumerate() {
            match (&mut *slot, before.slot(i)) {
                (Slot::Spill(now @ Value::Scalar(_)), Slot::Spill(then)) => widen(now, then),
                (Slot::Spill(now @ Value::Scalar(_)), _) => *now = Value::UNKNOWN,
                (Slot::Bytes(now), then) => {
                    for (now, then) in now.iter_mut().zip(then.bytes()) {
                        if *now == Byte::Zero && then != Byte::Zero {
                            *now = Byte::Anything;
                        }
                    }
                }
                (Slot::Halves(now), Slot::Halves(then)) if now == then => {}
                (Slot::Halves(_), _) => {
                    let forget = |b| if b == Byte::Unwritten { b } else { Byte::Anything };
                    *slot = Slot::Bytes(slot.bytes().map(forget));
                }
                _ => {}
            }
        }
    }

    /// A store of `value`.
    pub(crate) fn store(&mut self, span: Span, value: Value) -> Result<(), Fault> {
        if let Some(slot) = span.whole_slot() {
            *self.slot_mut(slot) = Slot::Spill(value);
            return Ok(());
        }
        if matches!(value, Value::Pointer(_)) && !value.is_target() {
            return Err(Fault::new("invalid size of register spill")
                .hint("a pointer can be stored only whole: 8 bytes at a multiple of 8"));
        }
        self.check_pointers_kept(span)?;
        let (slot, first) = position(span.off);
        if let (Value::Scalar(number), 4) = (&value, span.size_bytes) {
            let slot = self.slot_mut(slot);
            let mut halves = slot.halves();
            halves[first / 4] = Half::of(number);
            *slot = Slot::from_halves(halves);
            return Ok(());
        }
        self.fill(span, if value.as_const() == Some(0) { Byte::Zero } else { Byte::Anything });
        Ok(())
    }

    /// Bytes written by someone else, a helper.
    pub(crate) fn store_anything(&mut self, span: Span) -> Result<(), Fault> {
        self.check_pointers_kept(span)?;
        self.fill(span, Byte::Anything);
        Ok(())
    }

    /// A store of `value`, or of a helper's bytes where there is none, to some bytes of `window`.
    /// What was unwritten may still be: that is what it is said to be.
    pub(crate) fn store_somewhere(
        &mut self,
        window: Span,
        value: Option<&Value>,
    ) -> Result<(), Fault> {
        if value.is_some_and(|v| matches!(v, Value::Pointer(_)) && !v.is_target()) {
            return Err(Fault::new("invalid size of register spill")
                .hint("a pointer can be stored only at a known place of the stack"));
        }
        if window.slots().any(|(slot, _)| self.slot(slot).must_stay_whole()) {
            return Err(Fault::new("attempt to corrupt spilled pointer on stack"));
        }
        let zero = value.and_then(Value::as_const) == Some(0);
        for (slot, range) in window.ranges() {
            let slot = self.slot_mut(slot);
            let before = slot.bytes();
            for (i, byte) in before.iter().enumerate().filter(|(i, _)| range.contains(i)) {
                match byte {
                    Byte::Unwritten => {}
                    Byte::Zero if zero => {}
                    Byte::Zero | Byte::Anything => slot.fill(i..i + 1, Byte::Anything),
                }
            }
        }
        Ok(())
    }

    fn check_pointers_kept(&self, span: Span) -> Result<(), Fault> {
        if span.slots().any(|(slot, n)| n < 8 && self.slot(slot).must_stay_whole()) {
            return Err(Fault::new("attempt to corrupt spilled pointer on stack"));
        }
        Ok(())
    }

    fn fill(&mut self, span: Span, byte: Byte) {
        for (slot, range) in span.ranges() {
            let slot = self.slot_mut(slot);
            if range == (0..8) {
                *slot = Slot::Bytes([byte; 8]);
            } else {
                slot.fill(range, byte);
            }
        }
    }

    /// A load of `span`, zero-extended.
    pub(crate) fn load(&self, span: Span) -> Result<Value, Fault> {
        let (slot, first) = position(span.off);
        let slot = self.slot(slot);
        if span.whole_slot().is_some()
            && let Slot::Spill(value) = slot
            && *value != Value::NotInit
        {
            return Ok(*value);
        }
        self.check_written(span)?;
        if span.slots().any(|(s, _)| self.slot(s).must_stay_whole()) {
            return Err(Fault::new("invalid size of register fill")
                .hint("a spilled pointer can be read back only whole"));
        }
        // All of an access lies in one slot: stack accesses are aligned.
        let half = slot.halves()[first / 4];
        Ok(match span.size_bytes {
            8 => slot.as_value().unwrap_or(Value::UNKNOWN),
            4 => half.filled(),
            n => Value::scalar(half.part(first % 4, n)),
        })
    }

    /// A load of `size_bytes` bytes somewhere in `window`, zero-extended.
    pub(crate) fn load_somewhere(&self, window: Span, size_bytes: u32) -> Result<Value, Fault> {
        self.check_written(window)?;
        if self.abstract_pointer(window).is_some() {
            return Err(Fault::new("invalid size of register fill").hint(
                "the context or a function was spilled among these bytes, and has no address",
            ));
        }
        let zero = window.bytes().all(|(s, i)| self.slot(s).bytes()[i] == Byte::Zero);
        let unknown = Scalar::UNKNOWN.zero_extend(8 * size_bytes);
        Ok(Value::scalar(if zero { Scalar::constant(0) } else { unknown }))
    }

    /// All bytes of `span` were written, for a load or a helper that reads them.
    pub(crate) fn check_written(&self, span: Span) -> Result<(), Fault> {
        for (slot, range) in span.ranges() {
            let bytes = self.slot(slot).bytes();
            if let Some(byte) = range.clone().find(|i| bytes[*i] == Byte::Unwritten) {
                let (off, size) = (span.off, span.size_bytes);
                let at =
                    -8 * i32::try_from(slot + 1).unwrap_or(0) + i32::try_from(byte).unwrap_or(0);
                let i = at - off;
                return Err(Fault::new(format!(
                    "invalid read from stack off {off}+{i} size {size}"
                ))
                .hint("write these bytes of the stack on every path first"));
            }
        }
        Ok(())
    }

    /// What is spilled in `span` and must not become a number.
    pub(crate) fn abstract_pointer(&self, span: Span) -> Option<Value> {
        span.slots().find_map(|(s, _)| match self.slot(s) {
            Slot::Spill(v) if v.is_abstract() => Some(*v),
            _ => None,
        })
    }

    fn slot_mut(&mut self, idx: usize) -> &mut Slot {
        if self.slots.len() <= idx {
            self.slots.resize(idx + 1, UNWRITTEN);
        }
        &mut self.slots[idx]
    }
}
