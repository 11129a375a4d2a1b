//! The verifier's picture of the machine on one path: call frames, and references that are
//! still to be released.
//!
//! **Invariant**: `a.includes(b, needed)` only where every concrete machine that `b` describes is
//! also described by `a`, were the numbers that are not `needed` any numbers in `a`. Pruning rests
//! on it; see [`crate::precision`].

use std::rc::Rc;

use crate::liveness::Liveness;
use crate::lock::Lock;
use crate::number::scalar::Scalar;
use crate::op::Reg;
use crate::precision::{FrameNeeds, Needs};
use crate::stack::{Byte, Half, Slot, Stack};
use crate::value::{Id, Number, Pointer, PointerKind, Value};

/// One path's picture. Frames are shared with other paths until they are written.
#[derive(Clone, Debug)]
pub(crate) struct State {
    frames: Vec<Rc<Frame>>,
    references: Rc<Vec<Reference>>,
    lock: Option<Lock>,
}

/// One call frame.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    regs: [Value; 11],
    pub(crate) stack: Stack,
    /// Which function, by index.
    pub(crate) function: usize,
    /// The call that made this frame; `None` for the main function's.
    pub(crate) call_idx: Option<usize>,
    /// Rounds of the helper that is being called here, where it calls functions of the program.
    pub(crate) rounds: Option<Rounds>,
}

/// How far the call of a helper has come that calls a function in rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rounds {
    /// The remembered state in which the helper was called: says which call this is.
    pub(crate) root: usize,
    /// Rounds so far; 0 always where their number is not counted.
    pub(crate) n_done: u64,
    /// Rounds that were looked at, counted or not.
    pub(crate) n_seen: u32,
}

/// Something acquired that must be released: a ring buffer record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reference {
    pub(crate) id: Id,
    /// The call that acquired it.
    pub(crate) insn_idx: usize,
    /// The innermost callback's frame at that time, 0 where there was none.
    pub(crate) callback: usize,
}

impl Reference {
    /// Linux's words for one that is not given back.
    pub(crate) fn unreleased(&self) -> String {
        format!("Unreleased reference id={} alloc_insn={}", self.id, self.insn_idx)
    }
}

impl Frame {
    fn new(depth: usize, function: usize, call_idx: Option<usize>) -> Self {
        let mut regs = [Value::NotInit; 11];
        regs[Reg::R10.index()] = Value::pointer(PointerKind::Stack { frame: depth });
        Self { regs, stack: Stack::default(), function, call_idx, rounds: None }
    }

    pub(crate) fn reg(&self, reg: Reg) -> &Value {
        &self.regs[reg.index()]
    }

    /// All registers, for the soundness tests.
    #[cfg(any(test, feature = "beliefs"))]
    pub(crate) fn registers(&self) -> &[Value; 11] {
        &self.regs
    }

    /// The reference of the record whose pointer here has the null id `id`.
    pub(crate) fn record_with(&self, id: Id) -> Option<Id> {
        self.values().find_map(|v| match v {
            Value::Pointer(Pointer {
                kind: PointerKind::Record { reference, .. },
                or_null,
                ..
            }) if *or_null == Some(id) => Some(*reference),
            _ => None,
        })
    }

    fn values(&self) -> impl Iterator<Item = &Value> {
        self.regs.iter().chain(self.stack.spills())
    }

    fn values_mut(&mut self) -> impl Iterator<Item = &mut Value> {
        self.regs.iter_mut().chain(self.stack.spills_mut())
    }
}

impl State {
    /// At the main function's entry, with nothing in r1.
    pub(crate) fn new() -> Self {
        Self {
            frames: vec![Rc::new(Frame::new(0, 0, None))],
            references: Rc::default(),
            lock: None,
        }
    }

    /// At the entry of a function that is verified alone.
    pub(crate) fn of_function(function: usize) -> Self {
        Self { frames: vec![Rc::new(Frame::new(0, function, None))], ..Self::new() }
    }

    /// Number of the current frame, 0 for the main function's.
    pub(crate) fn depth(&self) -> usize {
        self.frames.len() - 1
    }

    /// The current frame.
    pub(crate) fn frame(&self) -> &Frame {
        &self.frames[self.frames.len() - 1]
    }

    /// Frame number `depth`, which must exist.
    pub(crate) fn frame_at(&self, depth: usize) -> &Frame {
        &self.frames[depth]
    }

    /// Frame number `depth`, which must exist, to be written.
    pub(crate) fn frame_at_mut(&mut self, depth: usize) -> &mut Frame {
        Rc::make_mut(&mut self.frames[depth])
    }

    pub(crate) fn reg(&self, reg: Reg) -> &Value {
        &self.frame().regs[reg.index()]
    }

    pub(crate) fn set_reg(&mut self, reg: Reg, value: Value) {
        let depth = self.depth();
        self.frame_at_mut(depth).regs[reg.index()] = value;
    }

    pub(crate) fn references(&self) -> &[Reference] {
        &self.references
    }

    pub(crate) fn acquire(&mut self, reference: Reference) {
        Rc::make_mut(&mut self.references).push(reference);
    }

    /// Forgets a reference that never was (its pointer is null) or is no more; `false` where
    /// it was not held.
    pub(crate) fn drop_reference(&mut self, id: Id) -> bool {
        let n = self.references.len();
        Rc::make_mut(&mut self.references).retain(|r| r.id != id);
        self.references.len() < n
    }

    /// The lock that is held.
    pub(crate) fn lock(&self) -> Option<Lock> {
        self.lock
    }

    pub(crate) fn set_lock(&mut self, lock: Option<Lock>) {
        self.lock = lock;
    }

    /// A call: r1 to r5 go along, everything else of the new frame is unset.
    pub(crate) fn enter(&mut self, function: usize, call_idx: usize) {
        let mut frame = Frame::new(self.frames.len(), function, Some(call_idx));
        frame.regs[1..=5].copy_from_slice(&self.frame().regs[1..=5]);
        self.frames.push(Rc::new(frame));
        // The callee's frame holds what it was given; the caller may not rely on r0 to r5.
        let caller = self.frames.len() - 2;
        self.frame_at_mut(caller).regs[0..=5].fill(Value::NotInit);
    }

    /// A helper calls `function` with r1 to r5: the caller goes on with the same registers once
    /// it returns, as the helper does.
    pub(crate) fn enter_callback(&mut self, function: usize, call_idx: usize, args: [Value; 5]) {
        let mut frame = Frame::new(self.frames.len(), function, Some(call_idx));
        frame.regs[1..=5].copy_from_slice(&args);
        self.frames.push(Rc::new(frame));
    }

    /// A return from a called function; the call's index.
    pub(crate) fn leave(&mut self) -> Option<usize> {
        let call_idx = self.frame().call_idx?;
        let r0 = *self.reg(Reg::R0);
        let to_helper = self.is_callback();
        self.frames.pop();
        if !to_helper {
            self.set_reg(Reg::R0, r0);
        }
        Some(call_idx)
    }

    /// The current function was called by a helper.
    pub(crate) fn is_callback(&self) -> bool {
        self.frames.len() >= 2 && self.frames[self.frames.len() - 2].rounds.is_some()
    }

    /// The frame of the innermost function that a helper has called; 0 where there is none.
    pub(crate) fn innermost_callback(&self) -> usize {
        (1..self.frames.len()).rev().find(|d| self.frames[d - 1].rounds.is_some()).unwrap_or(0)
    }

    /// The rounds of every frame, the main function's first.
    pub(crate) fn all_rounds(&self) -> impl Iterator<Item = Option<Rounds>> + '_ {
        self.frames.iter().map(|f| f.rounds)
    }

    /// The rounds of the current frame.
    pub(crate) fn rounds(&self) -> Option<Rounds> {
        self.frame().rounds
    }

    pub(crate) fn set_rounds(&mut self, rounds: Option<Rounds>) {
        let depth = self.depth();
        self.frame_at_mut(depth).rounds = rounds;
    }

    /// Makes this state include `before` as well as itself, if only numbers differ: what was
    /// different is forgotten, bound by bound or as a whole.
    pub(crate) fn widen(&mut self, before: &Self, how: Widening) {
        for (frame, before) in self.frames.iter_mut().zip(&before.frames) {
            if Rc::ptr_eq(frame, before) {
                continue;
            }
            let frame = Rc::make_mut(frame);
            for (value, before) in frame.regs.iter_mut().zip(&before.regs) {
                widen_value(value, before, how);
            }
            frame.stack.widen(&before.stack, |value, before| widen_value(value, before, how));
        }
    }

    /// Changes every register and spilled register of every frame that `wanted` picks.
    pub(crate) fn update(
        &mut self,
        wanted: impl Fn(&Value) -> bool,
        change: impl Fn(&Value) -> Value,
    ) {
        for frame in &mut self.frames {
            // Only frames with something to change stop being shared.
            if frame.values().any(&wanted) {
                for value in Rc::make_mut(frame).values_mut().filter(|v| wanted(v)) {
                    *value = change(value);
                }
            }
        }
    }

    /// Records what was learnt of the number in `reg`, and of all that are linked to it.
    pub(crate) fn learn(&mut self, reg: Reg, set: Scalar) {
        let Value::Scalar(known) = *self.reg(reg) else { return };
        let known = Number { set, ..known };
        self.set_reg(reg, Value::Scalar(known));
        if known.id.is_some() {
            let same = |v: &Value| matches!(v, Value::Scalar(n) if n.id == known.id);
            self.update(same, |v| match v {
                Value::Scalar(n) => Value::Scalar(n.told(&known)),
                other => *other,
            });
        }
    }

    /// Forgets what no instruction from `insn_idx` on reads, and widens numbers on which
    /// neither a branch, nor an address, nor a helper's argument depends. Both only lose
    /// knowledge: were the liveness wrong, a program would be refused, never accepted.
    pub(crate) fn forget_dead(&mut self, insn_idx: usize, live: &Liveness) {
        let mut at = live.before(insn_idx);
        for depth in (0..self.frames.len()).rev() {
            let frame = self.frame_at_mut(depth);
            for (i, value) in frame.regs.iter_mut().enumerate().take(10) {
                if at.regs >> i & 1 == 0 {
                    *value = Value::NotInit;
                } else if at.exact_regs >> i & 1 == 0 && value.as_scalar().is_some() {
                    *value = Value::UNKNOWN;
                }
            }
            frame.stack.forget(at.slots, at.exact_slots);
            if let Some(call_idx) = frame.call_idx {
                at = live.across_call(call_idx);
            }
        }
        self.forget_single_ids();
    }

    /// An id that only one number carries says nothing.
    fn forget_single_ids(&mut self) {
        let mut ids: Vec<Id> = self
            .frames
            .iter()
            .flat_map(|f| f.values())
            .filter_map(|v| if let Value::Scalar(n) = v { n.id } else { None })
            .collect();
        ids.sort_unstable();
        let single: Vec<Id> =
            ids.chunk_by(|a, b| a == b).filter(|c| c.len() == 1).map(|c| c[0]).collect();
        if single.is_empty() {
            return;
        }
        self.update(
            |v| matches!(v, Value::Scalar(Number { id: Some(id), .. }) if single.binary_search(id).is_ok()),
            |v| match v {
                Value::Scalar(n) => Value::Scalar(Number::unlinked(n.set)),
                other => *other,
            },
        );
    }

    /// Where the numbers are that have the id of one of `numbers`.
    pub(crate) fn linked(&self, numbers: [&Number; 2]) -> Needs {
        let ids = numbers.map(|n| n.id);
        let wanted =
            |v: &Value| matches!(v, Value::Scalar(n) if n.id.is_some() && ids.contains(&n.id));
        let mut found = Needs::default();
        for (depth, frame) in self.frames.iter().enumerate() {
            for (reg, _) in frame.regs.iter().enumerate().filter(|(_, v)| wanted(v)) {
                found.add_reg(depth, reg);
            }
            found.add_slots(depth, frame.stack.slots_with(wanted));
        }
        found
    }

    /// A register of the current function with another number in `later`, and both numbers: one
    /// that is needed, if any such differs.
    pub(crate) fn changed_register(
        &self,
        later: &Self,
        needed: &Needs,
    ) -> Option<(Reg, Value, Value)> {
        let needed = needed.frame(self.depth());
        let pairs = Reg::all().map(|reg| (reg, *self.reg(reg), *later.reg(reg)));
        let differs = |(_, a, b): &(Reg, Value, Value)| match (a, b) {
            (Value::Scalar(a), Value::Scalar(b)) => a.set != b.set,
            _ => false,
        };
        let changed: Vec<_> = pairs.filter(differs).collect();
        let first_needed = changed.iter().find(|(reg, _, _)| needed.has_reg(reg.index()));
        first_needed.or(changed.first()).copied()
    }

    /// Every machine that `other` describes is described by `self`, where only the numbers in
    /// `needed` are looked at. While something behind `self` is not explored yet, nobody knows what
    /// that is: then it is [`Needs::ALL`], and `other`'s path needs all of them too.
    pub(crate) fn includes(&self, other: &Self, needed: &Needs) -> bool {
        self.matches(other, Match::Includes, needed)
    }

    /// Both describe the same, up to the names of ids.
    pub(crate) fn equals(&self, other: &Self) -> bool {
        self.matches(other, Match::Equal, &Needs::ALL)
    }

    fn matches(&self, other: &Self, how: Match, needed: &Needs) -> bool {
        if self.frames.len() != other.frames.len()
            || self.references.len() != other.references.len()
        {
            return false;
        }
        let mut ids = IdPairs::default();
        let same_lock = match (self.lock, other.lock) {
            (None, None) => true,
            (Some(a), Some(b)) => a.map == b.map && ids.pair_if_any(a.element, b.element),
            _ => false,
        };
        let references = self.references.iter().zip(other.references.iter());
        same_lock
            && references.clone().all(|(a, b)| {
                a.insn_idx == b.insn_idx && a.callback == b.callback && ids.pair(a.id, b.id)
            })
            && self
                .frames
                .iter()
                .zip(&other.frames)
                .enumerate()
                .all(|(depth, (a, b))| a.matches(b, how, needed.frame(depth), &mut ids))
    }
}

/// How a number that changes from round to round is widened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Widening {
    /// Bounds that moved are given up.
    Bounds,
    /// Everything.
    Whole,
}

/// What two states are compared for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Match {
    Includes,
    Equal,
}

/// Which id of one state is which of the other: one to one.
#[derive(Default)]
struct IdPairs(Vec<IdPair>);

#[derive(Clone, Copy, PartialEq, Eq)]
struct IdPair {
    a: Id,
    /// `None`: a number of the other state that is linked to none.
    b: Option<Id>,
    /// What a number with `b` has on top of its partner's delta.
    shift: u64,
}

impl IdPairs {
    fn pair_if_any(&mut self, a: Option<Id>, b: Option<Id>) -> bool {
        match (a, b) {
            (None, None) => true,
            (Some(a), Some(b)) => self.pair(a, b),
            _ => false,
        }
    }

    fn pair(&mut self, a: Id, b: Id) -> bool {
        self.add(IdPair { a, b: Some(b), shift: 0 })
    }

    /// Two linked numbers of one state are so linked in the other.
    fn pair_numbers(&mut self, a: Id, delta: u64, b: &Number) -> bool {
        self.add(IdPair { a, b: b.id, shift: b.delta.wrapping_sub(delta) })
    }

    fn add(&mut self, pair: IdPair) -> bool {
        let same = |p: &&IdPair| p.a == pair.a || (p.b.is_some() && p.b == pair.b);
        match self.0.iter().find(same) {
            // What is linked to none is no second time the same.
            Some(known) => *known == pair && pair.b.is_some(),
            None => {
                self.0.push(pair);
                true
            }
        }
    }
}

impl Frame {
    fn matches(&self, other: &Self, how: Match, needed: FrameNeeds, ids: &mut IdPairs) -> bool {
        if self.call_idx != other.call_idx || self.function != other.function {
            return false;
        }
        // With fewer rounds behind it, a helper has more of them still to come.
        let done = |frame: &Self| frame.rounds.map_or(0, |r| r.n_done);
        let rounds = match how {
            Match::Includes => done(self) <= done(other),
            Match::Equal => done(self) == done(other),
        };
        if !rounds {
            return false;
        }
        let n_slots = self.stack.n_slots().max(other.stack.n_slots());
        let regs = self.regs.iter().zip(&other.regs).enumerate();
        regs.into_iter().all(|(i, (a, b))| match (a, b) {
            (Value::Scalar(_), Value::Scalar(_)) if !needed.has_reg(i) => true,
            _ => value_matches(a, b, how, ids),
        }) && (0..n_slots).all(|i| {
            let (a, b) = (self.stack.slot(i), other.stack.slot(i));
            if needed.has_slot(i) || a.is_pointer() {
                slot_matches(a, b, how, ids)
            } else {
                written_matches(a, b)
            }
        })
    }
}

fn widen_value(value: &mut Value, before: &Value, how: Widening) {
    let (Value::Scalar(now), Value::Scalar(then)) = (*value, before) else { return };
    if now == *then {
        return;
    }
    *value = match how {
        Widening::Bounds => Value::scalar(then.set.widened(&now.set)),
        Widening::Whole => Value::UNKNOWN,
    };
}

fn value_matches(a: &Value, b: &Value, how: Match, ids: &mut IdPairs) -> bool {
    match (a, b) {
        (Value::NotInit, Value::NotInit) => true,
        (Value::NotInit, _) => how == Match::Includes,
        (Value::Scalar(a), Value::Scalar(b)) => number_matches(a, b, how, ids),
        (Value::Pointer(a), Value::Pointer(b)) => pointer_matches(a, b, how, ids),
        _ => false,
    }
}

fn number_matches(a: &Number, b: &Number, how: Match, ids: &mut IdPairs) -> bool {
    let sets = match how {
        Match::Includes => a.set.includes(&b.set),
        Match::Equal => a.set == b.set,
    };
    // Where `a` counts on two numbers being linked, they must be so in `b`. A link of one
    // number alone says nothing.
    sets && match (a.id, b.id) {
        (None, None) => true,
        (None, Some(_)) => how == Match::Includes,
        (Some(_), None) if how == Match::Equal => false,
        (Some(_), Some(_)) if a.part != b.part => false,
        (Some(id), _) => ids.pair_numbers(id, a.delta, b),
    }
}

fn pointer_matches(a: &Pointer, b: &Pointer, how: Match, ids: &mut IdPairs) -> bool {
    let kinds = match (a.kind, b.kind) {
        (
            PointerKind::Record { size_bytes: size_a, reference: ref_a },
            PointerKind::Record { size_bytes: size_b, reference: ref_b },
        ) => size_a == size_b && ids.pair(ref_a, ref_b),
        (
            PointerKind::LockValue { map: map_a, element: element_a },
            PointerKind::LockValue { map: map_b, element: element_b },
        ) => map_a == map_b && ids.pair_if_any(element_a, element_b),
        (a, b) => a == b,
    };
    let offsets = match how {
        Match::Includes => a.off.includes(&b.off),
        Match::Equal => a.off == b.off,
    };
    kinds && offsets && ids.pair_if_any(a.or_null, b.or_null)
}

/// What is written in `a` is written in `b`, and is no pointer there.
fn written_matches(a: &Slot, b: &Slot) -> bool {
    let a = a.bytes().map(|b| if b == Byte::Unwritten { b } else { Byte::Anything });
    let unwritten = a.iter().all(|b| *b == Byte::Unwritten);
    unwritten || (!b.is_pointer() && bytes_include(&a, &b.bytes()))
}

fn slot_matches(a: &Slot, b: &Slot, how: Match, ids: &mut IdPairs) -> bool {
    if how == Match::Equal {
        return match (a, b) {
            (Slot::Spill(a), Slot::Spill(b)) => value_matches(a, b, how, ids),
            (Slot::Bytes(a), Slot::Bytes(b)) => a == b,
            (Slot::Halves(a), Slot::Halves(b)) => {
                a.iter().zip(b.iter()).all(|(a, b)| half_matches(a, b, how, ids))
            }
            _ => false,
        };
    }
    match a {
        Slot::Spill(a) => match b.as_value() {
            Some(b) => value_matches(a, &b, how, ids),
            None => *a == Value::NotInit,
        },
        Slot::Bytes(bytes) => {
            // Bytes of a pointer are never read as numbers where `a` was explored with
            // numbers: a pointer in `b` would be.
            let unwritten = bytes.iter().all(|b| *b == Byte::Unwritten);
            (unwritten || !b.is_pointer()) && bytes_include(bytes, &b.bytes())
        }
        Slot::Halves(halves) => {
            !b.is_pointer()
                && halves.iter().zip(&b.halves()).all(|(a, b)| half_matches(a, b, how, ids))
        }
    }
}

fn half_matches(a: &Half, b: &Half, how: Match, ids: &mut IdPairs) -> bool {
    match (a, b) {
        (Half::Number(a), Half::Number(b)) => value_matches(a, b, how, ids),
        (Half::Bytes(a), Half::Bytes(b)) if how == Match::Equal => a == b,
        (_, _) if how == Match::Equal => false,
        (Half::Number(_), _) if b.bytes().contains(&Byte::Unwritten) => false,
        (Half::Number(a), _) => value_matches(a, &b.filled(), how, ids),
        (Half::Bytes(a), _) => bytes_include(a, &b.bytes()),
    }
}

fn bytes_include(a: &[Byte], b: &[Byte]) -> bool {
    a.iter().zip(b).all(|(a, b)| match a {
        Byte::Unwritten => true,
        Byte::Anything => *b != Byte::Unwritten,
        Byte::Zero => *b == Byte::Zero,
    })
}
