//! Where the value at fault came from: the refused path, walked backwards.
//!
//! Serves messages alone: a mistake here tells a wrong story and accepts nothing.

use flea_object::helper::Helper;
use flea_object::spec::{MapSpec, Program};

use crate::number::scalar::Width;
use crate::op::{Atomic, Op, Operand, Place as Address, Reg};
use crate::rejection::{Event, Known, Place, What};
use crate::state::State;
use crate::trace::MAX_STEPS;
use crate::value::{Number, Pointer, PointerKind, Value};

/// Events that a story has at most: its beginning, and the last ones.
const MAX_EVENTS: usize = 8;

/// One instruction of the refused path, with the state before it.
#[derive(Debug)]
pub(crate) struct Visit {
    pub(crate) idx: usize,
    pub(crate) state: State,
}

/// A refused path: the last visit is the one at fault.
#[derive(Clone, Copy)]
pub(crate) struct Path<'a> {
    pub(crate) visits: &'a [Visit],
    pub(crate) ops: &'a [Op],
    pub(crate) program: &'a Program,
    pub(crate) maps: &'a [MapSpec],
}

/// What is being followed.
#[derive(Clone, Copy, Debug)]
enum Subject {
    /// A register of this frame.
    Reg { reg: Reg, frame: usize },
    /// The eight bytes of stack with this number.
    Slot { slot: usize, frame: usize },
}

/// What one visit means for the subject.
enum Found {
    /// Nothing.
    Nothing,
    /// It was looked at, not changed.
    Seen(Event),
    /// It came from this instruction, and from another value before.
    From(Event, Subject),
    /// It began here.
    Began(Event),
}

/// The story of what is wrong, by `message`, at the end of `path`.
pub(crate) fn story(path: Path<'_>, message: &str) -> Vec<Event> {
    let Some(last) = path.visits.last() else { return Vec::new() };
    let frame = last.state.depth();
    // What ate the budget is no single value.
    if message.starts_with("BPF program is too large") || message.starts_with("The sequence of") {
        return Vec::new();
    }
    let mut events = match at_fault(path, message) {
        Some(reg) => path.follow(Subject::Reg { reg, frame }),
        None if message.starts_with("invalid read from stack off") => path.unwritten(),
        None if message.starts_with("infinite loop") => path.loop_tests(),
        None => path.acquisitions(),
    };
    if events.len() > MAX_EVENTS {
        events.drain(1..=events.len() - MAX_EVENTS);
    }
    events
}

/// The register that Linux's words name first; where they name none, the one that the
/// instruction follows or computes with.
pub(crate) fn at_fault(path: Path<'_>, message: &str) -> Option<Reg> {
    let named = message.split(|c: char| !c.is_ascii_alphanumeric()).find_map(|word| {
        let n: usize = word.strip_prefix('R')?.parse().ok()?;
        Reg::all().find(|reg| reg.index() == n)
    });
    let last = path.visits.last()?;
    let op = path.ops.get(last.idx)?;
    match *op {
        // A pointer is at fault for the number that moves it too far.
        Op::Alu { dst, src: Operand::Reg(src), .. } if is_pointer(last.state.reg(dst)) => {
            Some(if is_pointer(last.state.reg(src)) { dst } else { src })
        }
        _ if named.is_some() => named,
        Op::Load { place, .. } | Op::Store { place, .. } | Op::Atomic { place, .. }
            if !message.starts_with("invalid read from stack off") =>
        {
            Some(place.base)
        }
        Op::Alu { dst, .. } => Some(dst),
        _ => None,
    }
}

fn is_pointer(value: &Value) -> bool {
    matches!(value, Value::Pointer(_))
}

impl Path<'_> {
    fn op(&self, at: usize) -> Option<&Op> {
        self.ops.get(self.visits.get(at)?.idx)
    }

    /// From the end backwards to where `subject` began; oldest first.
    fn follow(self, mut subject: Subject) -> Vec<Event> {
        let mut events = Vec::new();
        let mut began = false;
        for at in (0..self.visits.len().saturating_sub(1)).rev() {
            match self.found(at, subject) {
                Found::Nothing => {}
                Found::Seen(event) => events.push(event),
                Found::From(event, before) => {
                    events.push(event);
                    subject = before;
                }
                Found::Began(event) => {
                    events.push(event);
                    began = true;
                    break;
                }
            }
        }
        if !began {
            events.extend(self.origin(subject));
        }
        events.reverse();
        events
    }

    /// What the subject was where the path as it was kept begins.
    fn origin(&self, subject: Subject) -> Option<Event> {
        let Subject::Reg { reg, frame } = subject else { return None };
        // Where the path was not kept from its beginning, that is not known.
        if reg == Reg::R10 || self.visits.len() >= MAX_STEPS {
            return None;
        }
        let first = self.visits.first()?;
        let known = self.known(&first.state, reg, frame);
        let what = if known == Known::Unset { What::NeverWritten } else { What::Given };
        let place = Place::of(first.idx, self.program)?;
        Some(Event { place, what, reg: u8::try_from(reg.index()).ok(), known })
    }

    fn found(&self, at: usize, subject: Subject) -> Found {
        match subject {
            Subject::Reg { reg, frame } => self.found_reg(at, reg, frame),
            Subject::Slot { slot, frame } => self.found_slot(at, slot, frame),
        }
    }

    fn found_reg(&self, at: usize, reg: Reg, frame: usize) -> Found {
        let (Some(visit), Some(op)) = (self.visits.get(at), self.op(at)) else {
            return Found::Nothing;
        };
        let depth = visit.state.depth();
        let argument = (1..=5).contains(&reg.index());
        match *op {
            Op::Exit if depth == frame + 1 && reg == Reg::R0 => {
                let from = Subject::Reg { reg, frame: depth };
                self.from(at, What::Returned { by: self.function_of(at) }, reg, frame, from)
            }
            Op::CallLocal { .. } if depth + 1 == frame => {
                if argument {
                    let from = Subject::Reg { reg, frame: depth };
                    self.from(at, What::Passed, reg, frame, from)
                } else {
                    self.began(at, What::NeverWritten, reg, frame)
                }
            }
            _ if depth != frame => Found::Nothing,
            Op::CallLocal { target } if reg == Reg::R0 => {
                self.began(at, What::Returned { by: self.name_at(target) }, reg, frame)
            }
            Op::CallLocal { target } if argument => {
                self.began(at, What::Clobbered { by: self.name_at(target) }, reg, frame)
            }
            Op::If { dst, src, .. } => self.compared(at, (dst, src), reg, frame),
            _ => self.written(at, op, reg, frame),
        }
    }

    /// `op`, of the subject's own function, may write `reg`.
    fn written(&self, at: usize, op: &Op, reg: Reg, frame: usize) -> Found {
        let same = |other: Reg| Subject::Reg { reg: other, frame };
        match *op {
            Op::Alu { dst, src, .. } if dst == reg => {
                let before = self.visits.get(at).map(|v| &v.state);
                let from = before.map_or(dst, |state| leading(state, dst, src));
                self.from(at, What::Computed, reg, frame, same(from))
            }
            Op::Neg { dst, .. } | Op::Swap { dst, .. } | Op::Trunc { dst, .. } if dst == reg => {
                self.from(at, What::Computed, reg, frame, same(dst))
            }
            Op::MovSx { dst, src, .. } if dst == reg => {
                self.from(at, What::Computed, reg, frame, same(src))
            }
            Op::Mov { dst, src: Operand::Reg(src), width } if dst == reg => {
                let what = if width == Width::W64 { What::Copied } else { What::Computed };
                self.from(at, what, reg, frame, same(src))
            }
            Op::Mov { dst, .. }
            | Op::Const { dst, .. }
            | Op::MapAddress { dst, .. }
            | Op::MapValueAddress { dst, .. }
                if dst == reg =>
            {
                self.began(at, What::Set, reg, frame)
            }
            Op::Load { dst, place, .. } if dst == reg => match self.slot_of(at, place) {
                Some(slot) => self.from(at, What::Loaded, reg, frame, slot),
                None => self.began(at, What::Loaded, reg, frame),
            },
            Op::Atomic { op, fetch: true, src, .. }
                if reg == if op == Atomic::Cmpxchg { Reg::R0 } else { src } =>
            {
                self.began(at, What::Loaded, reg, frame)
            }
            Op::CallHelper { id } if reg.index() <= 5 => {
                let by = helper_name(id);
                let result = reg == Reg::R0;
                let what = if result { What::Returned { by } } else { What::Clobbered { by } };
                self.began(at, what, reg, frame)
            }
            // What the helper has released is no pointer any more.
            Op::CallHelper { id } if self.loses(at, reg, frame) => {
                self.began(at, What::Clobbered { by: helper_name(id) }, reg, frame)
            }
            _ => Found::Nothing,
        }
    }

    /// A conditional jump that looks at `reg`, or at another register with the same number.
    fn compared(&self, at: usize, (dst, src): (Reg, Operand), reg: Reg, frame: usize) -> Found {
        let Some(visit) = self.visits.get(at) else { return Found::Nothing };
        let state = &visit.state;
        let is_it = |other: Reg| other == reg || same_number(state.reg(other), state.reg(reg));
        let other = match src {
            _ if is_it(dst) => src,
            Operand::Reg(src) if is_it(src) => Operand::Reg(dst),
            _ => return Found::Nothing,
        };
        let (with_reg, with) = match other {
            Operand::Reg(r) => (u8::try_from(r.index()).ok(), Known::of(state.reg(r), self.maps)),
            Operand::Imm(imm) => {
                let value = i64::from(imm);
                let bits = value.cast_unsigned();
                (None, Known::Number { smin: value, smax: value, umin: bits, umax: bits })
            }
        };
        let jumps = self.visits.get(at + 1).is_none_or(|next| next.idx != visit.idx + 1);
        let what = What::Compared { with_reg, with, jumps };
        self.event(at, what, Some((reg, frame))).map_or(Found::Nothing, Found::Seen)
    }

    fn loses(&self, at: usize, reg: Reg, frame: usize) -> bool {
        let (Some(before), Some(after)) = (self.visits.get(at), self.visits.get(at + 1)) else {
            return false;
        };
        self.known(&before.state, reg, frame) != Known::Unset
            && self.known(&after.state, reg, frame) == Known::Unset
    }

    fn found_slot(&self, at: usize, slot: usize, frame: usize) -> Found {
        let (Some(visit), Some(op), Some(next)) =
            (self.visits.get(at), self.op(at), self.visits.get(at + 1))
        else {
            return Found::Nothing;
        };
        if visit.state.depth() < frame || next.state.depth() < frame {
            return Found::Nothing;
        }
        let content = |state: &State| state.frame_at(frame).stack.slot(slot).clone();
        let stored_there = match *op {
            Op::Store { place, .. } | Op::Atomic { place, .. } => {
                let there = self.slot_of(at, place);
                matches!(there, Some(Subject::Slot { slot: s, frame: f }) if (s, f) == (slot, frame))
            }
            // Known by what has become of the bytes.
            Op::CallHelper { .. } | Op::CallLocal { .. } => {
                content(&visit.state) != content(&next.state)
            }
            _ => false,
        };
        if !stored_there {
            return Found::Nothing;
        }
        let value = content(&next.state).as_value().unwrap_or(Value::NotInit);
        let what = match *op {
            Op::CallHelper { id } => What::Filled { by: helper_name(id) },
            Op::CallLocal { target } => What::Filled { by: self.name_at(target) },
            _ => What::Spilled,
        };
        let Some(place) = Place::of(visit.idx, self.program) else { return Found::Nothing };
        let event = Event { place, what, reg: None, known: Known::of(&value, self.maps) };
        match *op {
            Op::Store { src: Operand::Reg(reg), .. } => {
                Found::From(event, Subject::Reg { reg, frame: visit.state.depth() })
            }
            _ => Found::Began(event),
        }
    }

    /// The bytes of stack that `place` names at visit `at`, where they are known.
    fn slot_of(&self, at: usize, place: Address) -> Option<Subject> {
        let state = &self.visits.get(at)?.state;
        let Value::Pointer(Pointer { kind: PointerKind::Stack { frame }, off, .. }) =
            state.reg(place.base)
        else {
            return None;
        };
        let off = off.as_const()?.cast_signed() + i64::from(place.off);
        let from_top = usize::try_from(-1 - off).ok()?;
        Some(Subject::Slot { slot: from_top / 8, frame: *frame })
    }

    /// The stores to the bytes that the last visit reads and that are not all written.
    fn unwritten(self) -> Vec<Event> {
        let last = self.visits.len().saturating_sub(1);
        let subject = match self.op(last) {
            Some(Op::Load { place, .. }) => self.slot_of(last, *place),
            _ => None,
        };
        let Some(Subject::Slot { slot, frame }) = subject else { return Vec::new() };
        let events = (0..last).filter_map(|at| match self.found_slot(at, slot, frame) {
            Found::From(event, _) | Found::Began(event) => Some(event),
            Found::Nothing | Found::Seen(_) => None,
        });
        events.collect()
    }

    /// The conditional jumps of the last round of a loop without end.
    fn loop_tests(self) -> Vec<Event> {
        let n = self.visits.len();
        // The path stands before the instruction that it has seen before.
        let Some(last) = self.visits.last() else { return Vec::new() };
        let round = (0..n.saturating_sub(1)).rev().find(|&at| self.visits[at].idx == last.idx);
        let tests = (round.unwrap_or(0)..n).filter_map(|at| match *self.op(at)? {
            Op::If { dst, src, .. } => {
                let frame = self.visits[at].state.depth();
                match self.compared(at, (dst, src), dst, frame) {
                    Found::Seen(event) => Some(event),
                    _ => None,
                }
            }
            _ => None,
        });
        tests.collect()
    }

    /// Where what has to be given back came from.
    fn acquisitions(self) -> Vec<Event> {
        let Some(last) = self.visits.last() else { return Vec::new() };
        if !matches!(self.op(self.visits.len() - 1), Some(Op::Exit)) {
            return Vec::new();
        }
        let held = last.state.references().iter().filter_map(|reference| {
            let at = self.visits.iter().rposition(|v| v.idx == reference.insn_idx)?;
            self.event(at, What::Acquired, Some((Reg::R0, self.visits[at].state.depth())))
        });
        held.collect()
    }

    fn from(&self, at: usize, what: What, reg: Reg, frame: usize, before: Subject) -> Found {
        self.event(at, what, Some((reg, frame)))
            .map_or(Found::Nothing, |event| Found::From(event, before))
    }

    fn began(&self, at: usize, what: What, reg: Reg, frame: usize) -> Found {
        self.event(at, what, Some((reg, frame))).map_or(Found::Nothing, Found::Began)
    }

    /// The event at visit `at`, with what is known of the register behind it.
    fn event(&self, at: usize, what: What, of: Option<(Reg, usize)>) -> Option<Event> {
        let visit = self.visits.get(at)?;
        let after = self.visits.get(at + 1).map_or(&visit.state, |next| &next.state);
        let known = of.map_or(Known::Unset, |(reg, frame)| self.known(after, reg, frame));
        let place = Place::of(visit.idx, self.program)?;
        Some(Event { place, what, reg: of.and_then(|(r, _)| u8::try_from(r.index()).ok()), known })
    }

    fn known(&self, state: &State, reg: Reg, frame: usize) -> Known {
        if frame > state.depth() {
            return Known::Unset;
        }
        Known::of(state.frame_at(frame).reg(reg), self.maps)
    }

    /// The name of the function that visit `at` is in.
    fn function_of(&self, at: usize) -> String {
        self.visits.get(at).map_or_else(String::new, |v| self.name_at(v.idx))
    }

    fn name_at(&self, idx: usize) -> String {
        let function = Place::of(idx, self.program).and_then(|place| place.function);
        function.unwrap_or_else(|| format!("the function of insn {idx}"))
    }
}

/// Which operand of `dst op= src` the result's story goes on with: the number that moves a
/// pointer, and of two numbers the one that is not known.
fn leading(state: &State, dst: Reg, src: Operand) -> Reg {
    let Operand::Reg(src) = src else { return dst };
    let (a, b) = (state.reg(dst), state.reg(src));
    let width = |v: &Value| v.as_scalar().map(|s| s.wide.umax - s.wide.umin);
    match (width(a), width(b)) {
        (None, Some(of_src)) if of_src > 0 => src,
        (Some(0), None) => src,
        (Some(of_dst), Some(of_src)) if of_src > of_dst => src,
        _ => dst,
    }
}

fn same_number(a: &Value, b: &Value) -> bool {
    matches!(
        (a, b),
        (Value::Scalar(Number { id: Some(a), .. }), Value::Scalar(Number { id: Some(b), .. }))
            if a == b
    )
}

fn helper_name(id: i32) -> String {
    Helper::from_id(id).map_or_else(|| format!("helper {id}"), |h| h.name().to_owned())
}
