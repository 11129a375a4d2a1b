//! One instruction on one state: refuses it, or says where control goes.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use flea_object::spec::{MapIdx, MapKind, MapSpec};
use flea_object::types::Types;

use crate::access::{self, Access, Given, Request, Target, followable};
use crate::callback;
use crate::cfg::Cfg;
use crate::collect::Collector;
use crate::facts::Region;
use crate::lock;
use crate::number::compare::Cond;
use crate::number::scalar::{Scalar, Width};
use crate::op::{Atomic, Op, Operand, Place, Reg, Size};
use crate::pointer::{self, Outcome};
use crate::precision::{Touched, Trail};
use crate::report::Fault;
use crate::stack::Span;
use crate::state::State;
use crate::tail::TAIL_CALL;
use crate::upper::UpperHalves;
use crate::value::{Id, Pointer, PointerKind, Value};
use crate::{Changeable, Context, Permissions, typed};

/// What all paths share.
pub(crate) struct Machine<'a> {
    pub(crate) maps: &'a [MapSpec],
    pub(crate) context: Context,
    target: Option<crate::Target<'a>>,
    pub(crate) permissions: Permissions,
    changeable: Changeable,
    pub(crate) ops: &'a [Op],
    pub(crate) cfg: &'a Cfg,
    pub(crate) facts: Collector,
    pub(crate) upper: UpperHalves,
    /// Bytes of stack touched, by function.
    pub(crate) stack_bytes: Vec<u32>,
    /// Who calls whom, on the paths seen so far: caller and callee.
    pub(crate) calls: BTreeSet<(usize, usize)>,
    /// Smallest and largest result of the main function, on the paths seen so far.
    returns: Option<(i64, i64)>,
    /// Global functions that some path calls.
    pub(crate) called: BTreeSet<usize>,
    last_id: u32,
    /// What the last step left behind for walks back.
    pub(crate) trail: Trail,
}

/// Where control goes after an instruction.
pub(crate) enum Flow {
    To(usize),
    /// Here, and to another place with another state.
    Both {
        next: usize,
        jump: usize,
        jump_state: Box<State>,
    },
    /// The program ends, or the path turned out impossible.
    End,
}

impl<'a> Machine<'a> {
    pub(crate) fn new(maps: &'a [MapSpec], context: Context, ops: &'a [Op], cfg: &'a Cfg) -> Self {
        Self {
            maps,
            context,
            target: None,
            permissions: Permissions::default(),
            changeable: Changeable::NONE,
            ops,
            cfg,
            facts: Collector::new(ops.len()),
            upper: UpperHalves::new(ops, cfg),
            stack_bytes: vec![0; cfg.functions.len()],
            calls: BTreeSet::new(),
            returns: None,
            called: BTreeSet::new(),
            last_id: 0,
            trail: Trail::default(),
        }
    }

    /// The context's words have the types of `target`.
    pub(crate) fn typed_by(self, target: Option<crate::Target<'a>>) -> Self {
        Self { target, ..self }
    }

    /// The program may do what `permissions` say, to these words of its context.
    pub(crate) fn permit(self, permissions: Permissions, changeable: Changeable) -> Self {
        Self { permissions, changeable, ..self }
    }

    /// The context as plain loads and stores find it.
    fn given(&self) -> Given {
        let Self { context, changeable, .. } = *self;
        Given { context, changeable, permitted: self.permissions.write_target }
    }

    /// The types that typed pointers point to.
    pub(crate) fn types(&self) -> Option<&'a Types> {
        self.target.map(|t| t.types)
    }

    /// What the program starts with.
    pub(crate) fn entry_state(&self) -> State {
        let mut state = State::new();
        match self.context {
            Context::Tracing { .. } | Context::PtRegs => {
                state.set_reg(Reg::arg(0), Value::pointer(PointerKind::Ctx));
            }
            Context::Memory { size_bytes } => {
                state.set_reg(Reg::arg(0), Value::pointer(PointerKind::Memory { size_bytes }));
                let size = Scalar::constant(u64::from(size_bytes));
                state.set_reg(Reg::arg(1), Value::scalar(size));
            }
        }
        state
    }

    pub(crate) fn fresh_id(&mut self) -> Id {
        // Starts at 1, and the budget allows far fewer than 2^32.
        self.last_id = self.last_id.saturating_add(1);
        Id::MIN.saturating_add(self.last_id - 1)
    }

    pub(crate) fn map(&self, map: MapIdx) -> Result<&'a MapSpec, Fault> {
        self.maps
            .get(map.0 as usize)
            .ok_or_else(|| Fault::new(format!("map {} does not exist", map.0)))
    }

    /// Notes that these bytes of a frame are used.
    pub(crate) fn touch(&mut self, state: &State, frame: usize, span: Span) {
        let used = &mut self.stack_bytes[state.frame_at(frame).function];
        *used = (*used).max(span.depth_bytes());
    }

    /// Executes instruction `idx`.
    pub(crate) fn step(&mut self, idx: usize, state: &mut State) -> Result<Flow, Fault> {
        let ops = self.ops;
        self.facts.plain(idx);
        self.trail = Trail::default();
        self.note_operand(idx, state);
        self.loosen(&ops[idx], state);
        match ops[idx] {
            Op::Alu { op, width, dst, src } => self.alu(state, (op, width), dst, src)?,
            Op::Neg { width, dst } => {
                let result = number(state, dst)?.neg(width);
                state.set_reg(dst, Value::scalar(result));
            }
            Op::Swap { bits, dst } => {
                let result = number(state, dst)?.swap_bytes(bits);
                state.set_reg(dst, Value::scalar(result));
            }
            Op::Trunc { bits, dst } => {
                let result = number(state, dst)?.zero_extend(bits);
                state.set_reg(dst, Value::scalar(result));
            }
            Op::Mov { width, dst, src } => self.mov(state, width, dst, src)?,
            Op::MovSx { width, bits, dst, src } => {
                self.mov_extended(state, width, bits, dst, src)?;
            }
            Op::Const { dst, value } => {
                state.set_reg(dst, Value::scalar(Scalar::constant(value)));
                return Ok(Flow::To(idx + 2));
            }
            Op::MapAddress { dst, map } => {
                if self.map(MapIdx(map))?.template {
                    let text = format!("map {map} is a template, which is no map by itself");
                    return Err(Fault::new(text).hint("look a map up in its map of maps"));
                }
                state.set_reg(dst, Value::pointer(PointerKind::Map(MapIdx(map))));
                return Ok(Flow::To(idx + 2));
            }
            Op::MapValueAddress { dst, map, off } => {
                let value = self.map_value_address(MapIdx(map), off)?;
                state.set_reg(dst, value);
                return Ok(Flow::To(idx + 2));
            }
            Op::SecondHalf => return Err(Fault::new("jump into the middle of ldimm64 insn")),
            Op::Load { dst, place, sign_extend } => {
                let loaded = self.load(idx, state, place)?;
                let value = match loaded.as_scalar() {
                    Some(set) if sign_extend => {
                        Value::scalar(set.sign_extend(8 * place.size.bytes(), Width::W64))
                    }
                    _ => loaded,
                };
                state.set_reg(dst, value);
            }
            Op::Store { place, src } => self.store(idx, state, place, src)?,
            Op::Atomic { op, fetch, place, src } => {
                self.atomic(idx, state, op, fetch, place, src)?;
            }
            Op::Goto { target } => return Ok(Flow::To(target)),
            Op::If { cond, width, dst, src, target } => {
                return self.branch(state, Test { cond, width, dst, src }, idx + 1, target);
            }
            Op::FunctionAddress { dst, target } => {
                let function = self.cfg.function_at(target);
                state.set_reg(dst, Value::pointer(PointerKind::Function(function)));
                return Ok(Flow::To(idx + 2));
            }
            Op::CallHelper { id: TAIL_CALL } => return self.tail_call(idx, state),
            Op::CallHelper { id } => return self.call_helper(idx, id, state),
            Op::CallLocal { target } => {
                let function = self.cfg.function_at(target);
                self.facts.call_local(idx, function);
                self.deeper(state, function)?;
                if let Some(prototype) = self.cfg.prototype(function) {
                    self.call_global(function, prototype, state)?;
                    return Ok(Flow::To(idx + 1));
                }
                state.enter(function, idx);
                return Ok(Flow::To(target));
            }
            Op::CallPointer { callee } => return self.call_pointer(idx, callee, state),
            Op::Exit if state.is_callback() => {
                self.trail.need(Reg::R0);
                return callback::exit(state);
            }
            Op::Exit => return self.exit(state),
        }
        Ok(Flow::To(idx + 1))
    }

    /// What the program returns on the paths seen so far; anything where none has ended.
    pub(crate) fn return_range(&self) -> RangeInclusive<i64> {
        self.returns.map_or(i64::MIN..=i64::MAX, |(min, max)| min..=max)
    }

    /// Another program may say what this one returns.
    pub(crate) fn returns_anything(&mut self) {
        self.returns = Some((i64::MIN, i64::MAX));
    }

    fn exit(&mut self, state: &mut State) -> Result<Flow, Fault> {
        if state.depth() == 0 && state.frame().function == 0 {
            self.trail.need(Reg::R0);
            let r0 = any_of(state.reg(Reg::R0));
            let (min, max) = self.returns.unwrap_or((i64::MAX, i64::MIN));
            self.returns = Some((min.min(r0.wide.smin), max.max(r0.wide.smax)));
        }
        exit(state)
    }

    fn map_value_address(&self, map: MapIdx, off: u32) -> Result<Value, Fault> {
        let spec = self.map(map)?;
        let is_single = spec.kind == MapKind::Array && spec.max_entries == 1 && !spec.template;
        if !is_single || off >= spec.value_size_bytes {
            return Err(Fault::new(format!(
                "invalid access to map value pointer, value_size={} off={off}",
                spec.value_size_bytes
            )));
        }
        let base = Value::pointer(self.value_of(map, None)?);
        match base {
            Value::Pointer(p) => {
                let off = Scalar::constant(u64::from(off));
                Ok(Value::Pointer(crate::value::Pointer { off, ..p }))
            }
            other => Ok(other),
        }
    }

    fn target(
        &mut self,
        idx: usize,
        state: &State,
        place: Place,
        access: Access,
    ) -> Result<Target, Fault> {
        let request = Request {
            reg: place.base,
            off: i64::from(place.off),
            size_bytes: place.size.bytes(),
            access,
        };
        let p = followable(place.base, state.reg(place.base))?;
        let target = access::check(request, p, self.maps, self.given(), self.types())?;
        match target {
            Target::Stack { frame, span } | Target::StackWindow { frame, window: span } => {
                self.touch(state, frame, span);
                let certainly = matches!(target, Target::Stack { .. });
                self.trail.touched = Some(Touched::new(frame, span, certainly));
                self.facts.access(idx, Region::Stack)?;
            }
            Target::Other(region) => self.facts.access(idx, region)?,
            Target::Typed(_) => self.facts.access(idx, Region::Target)?,
        }
        Ok(target)
    }

    fn load(&mut self, idx: usize, state: &mut State, place: Place) -> Result<Value, Fault> {
        match self.target(idx, state, place, Access::Read)? {
            Target::Stack { frame, span } => state.frame_at(frame).stack.load(span),
            Target::StackWindow { frame, window } => {
                state.frame_at(frame).stack.load_somewhere(window, place.size.bytes())
            }
            Target::Other(Region::Ctx { offset_bytes }) if place.size == Size::B8 => {
                Ok(self.context_word(offset_bytes).unwrap_or(unknown_of(place.size)))
            }
            Target::Other(_) => Ok(unknown_of(place.size)),
            Target::Typed(value) => Ok(value.unwrap_or(unknown_of(place.size))),
        }
    }

    /// What the context's word at `offset_bytes` is known to be.
    fn context_word(&self, offset_bytes: i32) -> Option<Value> {
        let target = self.target.filter(|_| matches!(self.context, Context::Tracing { .. }))?;
        let slot = usize::try_from(offset_bytes / 8).ok()?;
        typed::value_of(target.types, (*target.slots.get(slot)?)?)
    }

    fn store(
        &mut self,
        idx: usize,
        state: &mut State,
        place: Place,
        src: Operand,
    ) -> Result<(), Fault> {
        let value = operand(state, src)?;
        match self.target(idx, state, place, Access::Write)? {
            Target::Other(_) if value.is_abstract() => {
                let r = if let Operand::Reg(r) = src { r.index() } else { 0 };
                Err(Fault::new(format!("R{r} leaks addr of {} into mem", value.type_name())))
            }
            Target::Other(_) | Target::Typed(_) => Ok(()),
            Target::StackWindow { frame, window } => {
                state.frame_at_mut(frame).stack.store_somewhere(window, Some(&value))
            }
            Target::Stack { frame, span } => {
                let to_own_stack = matches!(
                    value,
                    Value::Pointer(p) if matches!(p.kind, PointerKind::Stack { frame: f } if f > frame)
                );
                if to_own_stack {
                    let text = "cannot spill pointers to stack into stack frame of the caller";
                    return Err(Fault::new(text));
                }
                let value = match src {
                    Operand::Reg(src) if matches!(place.size, Size::B4 | Size::B8) => {
                        self.named(state, src)
                    }
                    _ => value,
                };
                state.frame_at_mut(frame).stack.store(span, value)
            }
        }
    }

    fn atomic(
        &mut self,
        idx: usize,
        state: &mut State,
        op: Atomic,
        fetch: bool,
        place: Place,
        src: Reg,
    ) -> Result<(), Fault> {
        number_or_leak(state, src)?;
        if op == Atomic::Cmpxchg {
            number_or_leak(state, Reg::R0)?;
        }
        let target = self.target(idx, state, place, Access::Atomic)?;
        if let Target::StackWindow { frame, window } = target {
            let stack = &mut state.frame_at_mut(frame).stack;
            stack.load_somewhere(window, place.size.bytes())?;
            stack.store_somewhere(window, None)?;
        }
        // Nobody but the program writes to its stack, so what is fetched is what a load would find.
        let mut old = unknown_of(place.size);
        if let Target::Stack { frame, span } = target {
            let stack = &mut state.frame_at_mut(frame).stack;
            old = stack.load(span)?;
            if matches!(old, Value::Pointer(_)) {
                return Err(Fault::new(format!(
                    "R{} atomic operation on a spilled pointer prohibited",
                    place.base.index()
                )));
            }
            stack.store(span, unknown_of(Size::B8))?;
        }
        if fetch {
            let result = if op == Atomic::Cmpxchg { Reg::R0 } else { src };
            state.set_reg(result, old);
        }
        Ok(())
    }
}

/// Pointers that Linux has as numbers, and how they become such.
impl Machine<'_> {
    /// Numbers, or pointers that may be computed with.
    pub(crate) fn are_numbers(&self, a: &Value, b: &Value) -> bool {
        [a, b].into_iter().all(|v| v.as_scalar().is_some() || self.is_loose(v))
    }

    fn is_loose(&self, value: &Value) -> bool {
        match (value, self.types()) {
            (Value::Pointer(Pointer { kind: PointerKind::Target { ty }, .. }), Some(types)) => {
                typed::is_number_in_linux(types, *ty)
            }
            _ => false,
        }
    }

    /// Before an instruction that makes no sense of a pointer, one that may be computed with is
    /// made the number that it is.
    fn loosen(&self, op: &Op, state: &mut State) {
        let reg = match *op {
            Op::Neg { dst, .. } | Op::Swap { dst, .. } | Op::Trunc { dst, .. } => dst,
            Op::Mov { width: Width::W32, src: Operand::Reg(src), .. }
            | Op::MovSx { src, .. }
            | Op::Atomic { src, .. } => src,
            _ => return,
        };
        if self.is_loose(state.reg(reg)) {
            state.set_reg(reg, Value::UNKNOWN);
        }
    }
}

/// The number in a register: any, where it is a pointer.
pub(crate) fn any_of(value: &Value) -> Scalar {
    value.as_scalar().copied().unwrap_or(Scalar::UNKNOWN)
}

/// A conditional jump.
#[derive(Clone, Copy)]
struct Test {
    cond: Cond,
    width: Width,
    dst: Reg,
    src: Operand,
}

impl Machine<'_> {
    fn branch(
        &mut self,
        state: &mut State,
        test: Test,
        next: usize,
        jump: usize,
    ) -> Result<Flow, Fault> {
        let Test { cond, width, dst, src } = test;
        let (a, b) = (read(state, dst)?, operand(state, src)?);
        if let (Value::Scalar(x), Value::Scalar(y)) = (&a, &b) {
            if x.id.is_some() || y.id.is_some() {
                self.trail.linked = Some(state.linked([x, y]));
            }
            let mut jump_state = state.clone();
            let jumps = assume(&mut jump_state, test, cond);
            let falls = assume(state, test, cond.opposite());
            if falls && jumps {
                return Ok(Flow::Both { next, jump, jump_state: Box::new(jump_state) });
            }
            self.trail.need(dst);
            self.trail.need_operand(src);
            return Ok(match (falls, jumps) {
                (true, _) => Flow::To(next),
                (false, true) => {
                    *state = jump_state;
                    Flow::To(jump)
                }
                // Both sides impossible: the state describes no machine at all.
                (false, false) => Flow::End,
            });
        }
        let outcome = pointer::compare(cond, width, (dst, &a), &b)?;
        if outcome != Outcome::Unknown {
            // One of the two is the number that it was compared with.
            self.trail.need(dst);
            self.trail.need_operand(src);
        }
        match outcome {
            Outcome::Unknown => {
                let jump_state = Box::new(state.clone());
                Ok(Flow::Both { next, jump, jump_state })
            }
            Outcome::Known(true) => Ok(Flow::To(jump)),
            Outcome::Known(false) => Ok(Flow::To(next)),
            Outcome::Null { id, null_if } => {
                let mut jump_state = Box::new(state.clone());
                set_null(&mut jump_state, id, null_if);
                set_null(state, id, !null_if);
                Ok(Flow::Both { next, jump, jump_state })
            }
        }
    }
}

/// Narrows both sides by the test's outcome; `false` where it cannot come out so.
fn assume(state: &mut State, test: Test, cond: Cond) -> bool {
    let (Ok(Value::Scalar(a)), Ok(Value::Scalar(b))) =
        (read(state, test.dst), operand(state, test.src))
    else {
        return true;
    };
    if test.src == Operand::Reg(test.dst) {
        return true;
    }
    let Some((a, b)) = Scalar::refine(cond, test.width, &a.set, &b.set) else { return false };
    state.learn(test.dst, a);
    if let Operand::Reg(src) = test.src {
        state.learn(src, b);
    }
    true
}

/// Which of the two a null check has shown.
fn set_null(state: &mut State, id: Id, null: bool) {
    let same = |v: &Value| matches!(v, Value::Pointer(p) if p.or_null == Some(id));
    if null {
        // A record that is null was never reserved: there is nothing to give back.
        let reference = (0..=state.depth()).find_map(|d| state.frame_at(d).record_with(id));
        if let Some(reference) = reference {
            state.drop_reference(reference);
        }
        state.update(same, |_| Value::scalar(Scalar::constant(0)));
    } else {
        state.update(same, |v| match v {
            Value::Pointer(p) => Value::Pointer(crate::value::Pointer { or_null: None, ..*p }),
            other => *other,
        });
    }
}

fn exit(state: &mut State) -> Result<Flow, Fault> {
    let r0 = *state.reg(Reg::R0);
    if state.depth() > 0 {
        if matches!(r0, Value::Pointer(p) if matches!(p.kind, PointerKind::Stack { .. })) {
            return Err(Fault::new("cannot return stack pointer to the caller"));
        }
        return Ok(state.leave().map_or(Flow::End, |call_idx| Flow::To(call_idx + 1)));
    }
    match r0 {
        Value::NotInit => return Err(Fault::not_readable(Reg::R0)),
        Value::Scalar(_) => {}
        Value::Pointer(_) if r0.is_target() => {}
        Value::Pointer(p) if state.frame().function > 0 => {
            return Err(Fault::new(format!(
                "At subprogram exit the register R0 is not a scalar value ({})",
                p.type_name()
            )));
        }
        Value::Pointer(p) => {
            return Err(Fault::new(format!(
                "At program exit the register R0 is not a known value ({})",
                p.type_name()
            )));
        }
    }
    if let Some(held) = state.references().first() {
        return Err(
            Fault::new(held.unreleased()).hint("submit or discard the record on every path")
        );
    }
    lock::check_exit(state)?;
    Ok(Flow::End)
}

/// Any number of this size, zero-extended.
fn unknown_of(size: Size) -> Value {
    Value::scalar(Scalar::UNKNOWN.zero_extend(8 * size.bytes()))
}

pub(crate) fn read(state: &State, reg: Reg) -> Result<Value, Fault> {
    match state.reg(reg) {
        Value::NotInit => Err(Fault::not_readable(reg)),
        value => Ok(*value),
    }
}

pub(crate) fn operand(state: &State, operand: Operand) -> Result<Value, Fault> {
    match operand {
        Operand::Reg(reg) => read(state, reg),
        Operand::Imm(imm) => Ok(Value::scalar(Scalar::imm(imm))),
    }
}

/// The number in `reg`; pointers are refused.
pub(crate) fn number(state: &State, reg: Reg) -> Result<Scalar, Fault> {
    match read(state, reg)? {
        Value::Scalar(n) => Ok(n.set),
        _ => Err(Fault::new(format!("R{} pointer arithmetic prohibited", reg.index()))),
    }
}

fn number_or_leak(state: &State, reg: Reg) -> Result<(), Fault> {
    match read(state, reg)? {
        Value::Scalar(_) => Ok(()),
        _ => Err(Fault::new(format!("R{} leaks addr into mem", reg.index()))),
    }
}
