//! Calls of helpers: each argument against the prototype, then what the call leaves behind.

use std::ops::RangeInclusive;

use flea_object::helper::Helper;
use flea_object::spec::{MapIdx, MapSpec};
use flea_object::types::{Type, TypeId};

use crate::Context;
use crate::access::{self, Access, Given, Request, followable, stack_window};
use crate::callback::{self, Round};
use crate::lock::{self, Lock};
use crate::machine::{Flow, Machine};
use crate::number::scalar::Scalar;
use crate::op::Reg;
use crate::proto::{Arg, Ret, ZeroSize, proto};
use crate::report::Fault;
use crate::stack::Span;
use crate::state::{Reference, State};
use crate::value::{Pointer, PointerKind, Value};

/// Largest number of bytes that a helper may be asked to read or write.
const MAX_SIZE: u64 = access::MAX_OFFSET.unsigned_abs();

/// References that are held at once, at most. The registers and stack words of all functions hold
/// fewer pointers (8 times 75), so one that nothing leads to is among more: no path gives it back.
/// Without a limit, a loop that takes one each round fills memory with lists of them.
const MAX_REFERENCES: usize = 1024;

/// What the arguments have shown so far.
#[derive(Default)]
struct Seen {
    map: Option<MapIdx>,
    /// Bytes of the last size argument, at most.
    max_size: u64,
    /// Stack bytes that the helper fills.
    fills: Vec<(usize, Span)>,
    /// Stack bytes of which the helper fills some.
    fills_somewhere: Vec<(usize, Span)>,
    release: Option<Pointer>,
    /// The function that the helper calls.
    callback: Option<usize>,
    lock: Option<Lock>,
    /// The largest key of a lookup in an array, where it is known.
    key_max: Option<u64>,
    cast_to: Option<TypeId>,
}

impl Machine<'_> {
    /// A call of helper number `id` at `idx`.
    pub(crate) fn call_helper(
        &mut self,
        idx: usize,
        id: i32,
        state: &mut State,
    ) -> Result<Flow, Fault> {
        let known = Helper::from_id(id);
        lock::check_call(state, known)?;
        let helper = known.ok_or_else(|| {
            Fault::new(format!("invalid func unknown#{id}"))
                .hint("this helper of Linux does not exist here")
        })?;
        self.check_allowed(helper)?;
        let proto = proto(helper);
        let constants = self.known_args(state, proto.args);
        let key = self.lookup_key(helper, state);
        self.facts.number(idx, key);
        let mut seen = Seen { key_max: key.map(|(_, max)| max), ..Seen::default() };
        for (n, arg) in proto.args.iter().enumerate() {
            self.check_arg(state, helper, n, *arg, proto.args, &mut seen)?;
        }
        self.facts.call(idx, helper, seen.map, constants)?;
        let round = match seen.callback {
            Some(function) => self.round(idx, helper, function, seen.map, state)?,
            None => None,
        };
        for (frame, span) in &seen.fills {
            state.frame_at_mut(*frame).stack.store_anything(*span)?;
        }
        for (frame, window) in &seen.fills_somewhere {
            state.frame_at_mut(*frame).stack.store_somewhere(*window, None)?;
        }
        if let Some(record) = seen.release {
            release(state, record)?;
        }
        if let Some(lock) = seen.lock {
            lock::apply(helper, lock, state)?;
        }
        state.set_reg(Reg::R0, Value::NotInit);
        for reg in (0..5).map(Reg::arg) {
            state.set_reg(reg, Value::NotInit);
        }
        let result = self.result(idx, proto.ret, &seen, constants, state)?;
        state.set_reg(Reg::R0, result);
        let next = idx + 1;
        Ok(match round {
            Some(Round { start, state: inside }) => {
                let behind = std::mem::replace(state, *inside);
                Flow::Both { next: start, jump: next, jump_state: Box::new(behind) }
            }
            None => Flow::To(next),
        })
    }

    /// The numbers among the arguments that are known, for the compiler. They and the numbers that
    /// the call is checked with are what a decision is made by.
    fn known_args(&mut self, state: &State, args: &[Arg]) -> [Option<u64>; 5] {
        std::array::from_fn(|n| {
            let (arg, reg) = (args.get(n)?, Reg::arg(n));
            let known = state.reg(reg).as_const();
            if known.is_some() || !matches!(arg, Arg::Anything | Arg::Optional) {
                self.trail.need(reg);
            }
            known
        })
    }

    fn check_allowed(&self, helper: Helper) -> Result<(), Fault> {
        let session = matches!(self.context, Context::Tracing { session: true, .. });
        if matches!(helper, Helper::SessionCookie | Helper::SessionIsReturn) && !session {
            let name = helper.name();
            return Err(Fault::new(format!("program of this type cannot use helper {name}"))
                .hint("only programs in SEC(\"fsession/...\") run at both ends of a call"));
        }
        if helper == Helper::ProbeWriteUser && !self.permissions.write_target {
            let name = helper.name();
            return Err(Fault::new(format!("program of this type cannot use helper {name}"))
                .hint("it can crash the target: allow it with `flea run --allow-write`"));
        }
        let words =
            matches!(helper, Helper::GetFuncArg | Helper::GetFuncRet | Helper::GetFuncArgCnt);
        if words && self.context == Context::PtRegs {
            let name = helper.name();
            return Err(Fault::new(format!("program of this type cannot use helper {name}"))
                .hint("probes have registers: PT_REGS_PARM1(ctx), PT_REGS_RC(ctx); or use SEC(\"fentry/...\")"));
        }
        Ok(())
    }

    fn check_arg(
        &mut self,
        state: &State,
        helper: Helper,
        n: usize,
        arg: Arg,
        args: &[Arg],
        seen: &mut Seen,
    ) -> Result<(), Fault> {
        let reg = Reg::arg(n);
        let value = *state.reg(reg);
        if value == Value::NotInit {
            return if arg == Arg::Optional { Ok(()) } else { Err(Fault::not_readable(reg)) };
        }
        match arg {
            Arg::Anything | Arg::Optional if value.is_abstract() => {
                let name = value.type_name();
                let hint = format!("a pointer of type {name} has no address to pass on");
                Err(mismatch(reg, &value, arg).hint(hint))
            }
            Arg::Anything | Arg::Optional => Ok(()),
            Arg::Rounds if value.as_scalar().is_none() => Err(mismatch(reg, &value, arg)),
            Arg::Rounds => Ok(()),
            Arg::Callback => {
                seen.callback = Some(callback::function(reg, &value)?);
                Ok(())
            }
            Arg::CallbackCtx => callback::context(reg, &value),
            Arg::Index => match value.as_scalar() {
                Some(_) => Ok(()),
                None => {
                    let r = reg.index();
                    Err(Fault::new(format!("R{r} leaks addr into helper function")))
                }
            },
            Arg::LookupMap | Arg::WrittenMap | Arg::RingBuf | Arg::ProgArray | Arg::IteratedMap => {
                seen.map = Some(self.map_arg(reg, &value, arg, helper)?);
                Ok(())
            }
            Arg::Key => {
                let size = self.seen_map(seen)?.key_size_bytes;
                self.memory(state, reg, arg, size..=size, seen)
            }
            Arg::MapValue => {
                let size = self.seen_map(seen)?.value_size_bytes;
                self.memory(state, reg, arg, size..=size, seen)
            }
            Arg::FillU64 => self.memory(state, reg, arg, 8..=8, seen),
            // Checked with the size that follows.
            Arg::Read | Arg::Fill => Ok(()),
            Arg::Size(zero) => {
                let memory = n.checked_sub(1).and_then(|n| args.get(n).map(|a| (Reg::arg(n), *a)));
                let (memory, memory_arg) = memory.ok_or_else(|| mismatch(reg, &value, arg))?;
                self.sized_memory(state, reg, zero, memory, memory_arg, seen)
            }
            Arg::KnownSize => {
                let known = value.as_const().filter(|size| *size <= MAX_SIZE);
                if known.is_none() {
                    let text = format!("R{} is not a known constant", reg.index());
                    return Err(Fault::new(text)
                        .hint("a record's size must be one number; bpf_ringbuf_output takes any"));
                }
                Ok(())
            }
            Arg::Record => {
                seen.release = Some(record_arg(reg, &value)?);
                Ok(())
            }
            Arg::Lock => {
                seen.lock = Some(self.lock_arg(reg, &value)?);
                Ok(())
            }
            Arg::Ctx => ctx_arg(reg, &value),
            Arg::Castable if value.as_scalar().is_some() || value.is_target() => Ok(()),
            Arg::Castable => Err(mismatch(reg, &value, arg)),
            Arg::TypeId => {
                seen.cast_to = Some(self.cast_to(reg, &value)?);
                Ok(())
            }
        }
    }

    /// The structure whose number is in `reg`.
    fn cast_to(&self, reg: Reg, value: &Value) -> Result<TypeId, Fault> {
        let Some(number) = value.as_const() else {
            let text = format!("R{} must be a known constant", reg.index());
            return Err(Fault::new(text).hint("write bpf_core_cast(pointer, struct name)"));
        };
        let known = self.types().and_then(|types| Some((types, types.id(number)?)));
        match known {
            Some((types, id)) if matches!(types.get(id), Type::Struct { .. }) => Ok(id),
            Some((_, id)) if id != TypeId::VOID => Err(Fault::new(
                "kfunc bpf_rdonly_cast type ID argument must be of a struct or void",
            )),
            _ => {
                Err(Fault::new(format!("Unknown type ID {number} passed to kfunc bpf_rdonly_cast"))
                    .hint("the target's debug information has no such type"))
            }
        }
    }

    fn map_arg(&self, reg: Reg, value: &Value, arg: Arg, helper: Helper) -> Result<MapIdx, Fault> {
        let Value::Pointer(Pointer { kind: PointerKind::Map(map), or_null: None, .. }) = *value
        else {
            return Err(mismatch(reg, value, arg));
        };
        let spec = self.map(map)?;
        if arg == Arg::IteratedMap && (!arg.takes_map(spec.kind) || spec.template) {
            return Err(Fault::new("callback function not allowed for map")
                .hint("neither a map of maps nor the maps in it can be walked over"));
        }
        if !arg.takes_map(spec.kind) {
            return Err(Fault::new(format!(
                "cannot pass map_type {} into func {}",
                spec.kind as u32,
                helper.name()
            )));
        }
        if arg == Arg::WrittenMap && spec.read_only {
            return Err(Fault::new("write into map forbidden"));
        }
        Ok(map)
    }

    fn seen_map(&self, seen: &Seen) -> Result<&MapSpec, Fault> {
        self.map(seen.map.ok_or_else(|| Fault::new("invalid map_ptr to access map->key"))?)
    }

    /// A memory argument and the size argument after it.
    fn sized_memory(
        &mut self,
        state: &State,
        reg: Reg,
        zero: ZeroSize,
        memory: Reg,
        memory_arg: Arg,
        seen: &mut Seen,
    ) -> Result<(), Fault> {
        let r = reg.index();
        let value = state.reg(reg);
        let Some(size) = value.as_scalar() else {
            return Err(mismatch(reg, value, Arg::Size(zero)));
        };
        if size.wide.smin < 0 {
            let text = format!("R{r} min value is negative, either use unsigned or 'var &= const'");
            return Err(Fault::new(text));
        }
        if size.wide.umin == 0 && zero == ZeroSize::Refused {
            let text = format!("R{r} invalid zero-sized read: u64=[0,{}]", size.wide.umax);
            return Err(Fault::new(text).hint("make sure that the size is at least 1"));
        }
        let Some(max) = u32::try_from(size.wide.umax).ok().filter(|m| u64::from(*m) < MAX_SIZE)
        else {
            let text =
                format!("R{r} unbounded memory access, use 'var &= const' or 'if (var < const)'");
            return Err(Fault::new(text));
        };
        seen.max_size = u64::from(max);
        // No memory is needed for no bytes.
        if max == 0 && state.reg(memory).as_const() == Some(0) {
            return Ok(());
        }
        let min = u32::try_from(size.wide.umin).unwrap_or(max);
        self.memory(state, memory, memory_arg, min..=max, seen)
    }

    /// So many bytes at `reg` that the helper reads or fills.
    fn memory(
        &mut self,
        state: &State,
        reg: Reg,
        arg: Arg,
        sizes_bytes: RangeInclusive<u32>,
        seen: &mut Seen,
    ) -> Result<(), Fault> {
        let value = state.reg(reg);
        let fits = matches!(
            value,
            Value::Pointer(Pointer { kind, or_null: None, .. })
                if !matches!(
                    kind,
                    PointerKind::Ctx | PointerKind::Map(_) | PointerKind::Target { .. }
                )
        );
        if !fits {
            let e = mismatch(reg, value, arg);
            let null = matches!(value, Value::Pointer(Pointer { or_null: Some(_), .. }));
            return Err(match value {
                _ if null => e.hint("compare the pointer with NULL first"),
                _ if value.is_target() => {
                    e.hint("copy the target's memory with bpf_probe_read_user first")
                }
                _ => e,
            });
        }
        let fills = matches!(arg, Arg::Fill | Arg::FillU64);
        let access = if fills { Access::Write } else { Access::Read };
        let (min, max) = sizes_bytes.into_inner();
        let request = Request { reg, off: 0, size_bytes: max, access };
        let p = followable(reg, value)?;
        if let PointerKind::Stack { frame } = p.kind {
            let span = stack_window(request, p)?;
            self.touch(state, frame, span);
            if fills {
                // Bytes that are filled for any address and any size were written from here on;
                // the others may not have been.
                let from = p.off.wide.smax;
                let end = p.off.wide.smin + i64::from(min);
                let sure = u32::try_from(end - from).ok().and_then(|n| Span::new(from, n));
                if sure != Some(span) {
                    seen.fills_somewhere.push((frame, span));
                }
                seen.fills.extend(sure.map(|sure| (frame, sure)));
                return Ok(());
            }
            let stack = &state.frame_at(frame).stack;
            if let Some(spilled) = stack.abstract_pointer(span) {
                let name = spilled.type_name();
                return Err(Fault::new(format!("R{} leaks addr of {name}", reg.index())));
            }
            return stack
                .check_written(span)
                .map_err(|e| Fault { message: indirect(&e.message, reg), ..e });
        }
        access::check(request, p, self.maps, Given::read_only(self.context), self.types())
            .map(|_| ())
    }

    fn result(
        &mut self,
        idx: usize,
        ret: Ret,
        seen: &Seen,
        constants: [Option<u64>; 5],
        state: &mut State,
    ) -> Result<Value, Fault> {
        let or_null = |id, kind| {
            Value::Pointer(Pointer { kind, off: Scalar::constant(0), or_null: Some(id) })
        };
        Ok(match (ret, seen.map) {
            (Ret::Void, _) => Value::NotInit,
            (Ret::LengthOrError, _) => {
                // Linux: errors are -1 to -4095.
                let longest = i64::try_from(seen.max_size).unwrap_or(i64::MAX);
                Value::scalar(Scalar::signed(-4095, longest))
            }
            // Every element of an array is there.
            (Ret::ValueOrNull, Some(map)) if self.has_element(map, seen.key_max) => {
                let element = self.fresh_id();
                Value::pointer(self.value_of(map, Some(element))?)
            }
            (Ret::ValueOrNull, Some(map)) => {
                let id = self.fresh_id();
                let kind = match &self.map(map)?.inner {
                    Some(inner) => PointerKind::Map(inner.template),
                    None => self.value_of(map, Some(id))?,
                };
                or_null(id, kind)
            }
            (Ret::RecordOrNull, _) => {
                check_room(state)?;
                let size_bytes = constants[1].and_then(|s| u32::try_from(s).ok()).unwrap_or(0);
                let reference = self.fresh_id();
                let callback = state.innermost_callback();
                state.acquire(Reference { id: reference, insn_idx: idx, callback });
                or_null(self.fresh_id(), PointerKind::Record { size_bytes, reference })
            }
            (Ret::BitNumber, _) => Value::scalar(Scalar::signed(0, 64)),
            (Ret::Cast, _) => match seen.cast_to {
                Some(ty) => Value::pointer(PointerKind::Target { ty }),
                None => Value::UNKNOWN,
            },
            (Ret::Cookie, _) => Value::pointer(PointerKind::Cookie),
            (Ret::Number | Ret::ValueOrNull, _) => Value::UNKNOWN,
        })
    }
}

/// Refuses what [`MAX_REFERENCES`] shows to leak.
fn check_room(state: &State) -> Result<(), Fault> {
    match state.references() {
        [held, ..] if state.references().len() >= MAX_REFERENCES => {
            Err(Fault::new(held.unreleased()).hint("submit or discard each record in its round"))
        }
        _ => Ok(()),
    }
}

fn ctx_arg(reg: Reg, value: &Value) -> Result<(), Fault> {
    match value {
        Value::Pointer(p) if p.kind == PointerKind::Ctx => match p.off.as_const() {
            Some(0) => Ok(()),
            _ => {
                let off = p.off.wide.smin;
                let r = reg.index();
                Err(Fault::new(format!(
                    "dereference of modified ctx ptr R{r} off={off} disallowed"
                ))
                .hint("pass the context as the program was given it"))
            }
        },
        _ => Err(mismatch(reg, value, Arg::Ctx)),
    }
}

fn record_arg(reg: Reg, value: &Value) -> Result<Pointer, Fault> {
    match value {
        Value::Pointer(p @ Pointer { kind: PointerKind::Record { .. }, or_null: None, .. }) => {
            if p.off.as_const() == Some(0) {
                return Ok(*p);
            }
            let r = reg.index();
            let text = format!(
                "R{r} must have zero offset when passed to release func or trusted arg to kfunc"
            );
            Err(Fault::new(text).hint("pass the pointer that bpf_ringbuf_reserve returned"))
        }
        _ => Err(mismatch(reg, value, Arg::Record)),
    }
}

/// Gives a record back: nobody may touch it from here on.
fn release(state: &mut State, record: Pointer) -> Result<(), Fault> {
    let PointerKind::Record { reference, .. } = record.kind else { return Ok(()) };
    if !state.drop_reference(reference) {
        return Err(Fault::new(format!("reference {reference} has not been acquired before")));
    }
    let same = |v: &Value| {
        matches!(v, Value::Pointer(Pointer { kind: PointerKind::Record { reference: r, .. }, .. })
            if *r == reference)
    };
    state.update(same, |_| Value::NotInit);
    Ok(())
}

pub(crate) fn mismatch(reg: Reg, value: &Value, arg: Arg) -> Fault {
    let (r, found, expected) = (reg.index(), value.type_name(), arg.expected());
    Fault::new(format!("R{r} type={found} expected={expected}"))
}

/// Linux's words where it is a helper that would read.
fn indirect(message: &str, reg: Reg) -> String {
    message.replacen(
        "invalid read from stack off",
        &format!("invalid read from stack R{} off", reg.index()),
        1,
    )
}
