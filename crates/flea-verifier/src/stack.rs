//! One function's 512 bytes of stack: 64 slots of 8 bytes.
//!
//! A slot written by one aligned 8-byte store keeps the whole register; otherwise each byte
//! is known to be unwritten, zero or anything.

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// A register, spilled whole.
    Spill(Value),
    /// Lowest address first.
    Bytes([Byte; 8]),
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

    /// The slot, if this is one whole slot.
    fn whole_slot(self) -> Option<usize> {
        (self.size_bytes == 8 && self.off % 8 == 0).then(|| slot_of(self.off))
    }

    /// Slot and byte in it of each byte.
    fn bytes(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.size_bytes.cast_signed()).map(move |i| position(self.off + i))
    }

    /// Every slot that has a byte in it, with the number of bytes.
    fn slots(self) -> impl Iterator<Item = (usize, usize)> {
        let mut it = self.bytes().map(|(slot, _)| slot).peekable();
        std::iter::from_fn(move || {
            let slot = it.next()?;
            let mut n = 1;
            while it.next_if_eq(&slot).is_some() {
                n += 1;
            }
            Some((slot, n))
        })
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
        }
    }

    /// The whole slot as a register would be filled from it; `None` where bytes are unwritten.
    pub(crate) fn as_value(&self) -> Option<Value> {
        match self {
            Self::Spill(v) => Some(*v),
            Self::Bytes(b) if b.contains(&Byte::Unwritten) => None,
            Self::Bytes(b) if b.iter().all(|b| *b == Byte::Zero) => {
                Some(Value::scalar(Scalar::constant(0)))
            }
            Self::Bytes(_) => Some(Value::UNKNOWN),
        }
    }
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
        self.slots.iter_mut().filter_map(|s| match s {
            Slot::Spill(v) => Some(v),
            Slot::Bytes(_) => None,
        })
    }

    /// All registers spilled here.
    pub(crate) fn spills(&self) -> impl Iterator<Item = &Value> {
        self.slots.iter().filter_map(|s| match s {
            Slot::Spill(v) => Some(v),
            Slot::Bytes(_) => None,
        })
    }

    /// Forgets slots that nobody reads any more, and numbers that nobody's safety hangs on.
    pub(crate) fn forget(&mut self, live: u64, exact: u64) {
        for (i, slot) in self.slots.iter_mut().enumerate() {
            if live >> i & 1 == 0 {
                *slot = UNWRITTEN;
            } else if exact >> i & 1 == 0 {
                match slot {
                    Slot::Spill(v @ Value::Scalar(_)) => *v = Value::UNKNOWN,
                    Slot::Spill(_) => {}
                    Slot::Bytes(bytes) => {
                        for b in bytes.iter_mut().filter(|b| **b == Byte::Zero) {
                            *b = Byte::Anything;
                        }
                    }
                }
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
                (Slot::Spill(now @ Value::Scalar(_)), Slot::Bytes(_)) => *now = Value::UNKNOWN,
                (Slot::Bytes(now), then) => {
                    for (now, then) in now.iter_mut().zip(then.bytes()) {
                        if *now == Byte::Zero && then != Byte::Zero {
                            *now = Byte::Anything;
                        }
                    }
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
        let byte = if value.as_const() == Some(0) { Byte::Zero } else { Byte::Anything };
        self.fill(span, byte)
    }

    /// Bytes written by someone else, a helper.
    pub(crate) fn store_anything(&mut self, span: Span) -> Result<(), Fault> {
        self.fill(span, Byte::Anything)
    }

    fn fill(&mut self, span: Span, byte: Byte) -> Result<(), Fault> {
        for (slot, n) in span.slots() {
            if n < 8 && self.slot(slot).must_stay_whole() {
                return Err(Fault::new("attempt to corrupt spilled pointer on stack"));
            }
        }
        for (slot, i) in span.bytes() {
            let slot = self.slot_mut(slot);
            let mut bytes = slot.bytes();
            bytes[i] = byte;
            *slot = Slot::Bytes(bytes);
        }
        Ok(())
    }

    /// A load of `span`, zero-extended.
    pub(crate) fn load(&self, span: Span) -> Result<Value, Fault> {
        if let Some(slot) = span.whole_slot()
            && let Slot::Spill(value) = self.slot(slot)
            && *value != Value::NotInit
        {
            return Ok(*value);
        }
        self.check_written(span)?;
        if span.slots().any(|(s, _)| self.slot(s).must_stay_whole()) {
            return Err(Fault::new("invalid size of register fill")
                .hint("a spilled pointer can be read back only whole"));
        }
        let bits = 8 * span.size_bytes;
        let (slot, first) = position(span.off);
        // All of an access lies in one slot: stack accesses are aligned.
        if let Slot::Spill(Value::Scalar(Number { set, .. })) = self.slot(slot) {
            let down = Scalar::constant(8 * u64::try_from(first).unwrap_or(0));
            let moved = Scalar::alu(AluOp::Rsh, Width::W64, set, &down);
            return Ok(Value::scalar(moved.zero_extend(bits)));
        }
        let zero = span.bytes().all(|(s, i)| self.slot(s).bytes()[i] == Byte::Zero);
        let set = if zero { Scalar::constant(0) } else { Scalar::UNKNOWN.zero_extend(bits) };
        Ok(Value::scalar(set))
    }

    /// All bytes of `span` were written, for a load or a helper that reads them.
    pub(crate) fn check_written(&self, span: Span) -> Result<(), Fault> {
        for ((slot, byte), i) in span.bytes().zip(0..) {
            if self.slot(slot).bytes()[byte] == Byte::Unwritten {
                let (off, size) = (span.off, span.size_bytes);
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
