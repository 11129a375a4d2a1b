//! What to change: a fault's hint with the numbers, the names and the lines of this program.
//!
//! Serves messages alone; where nothing better is known, the fault's own hint stays.

use flea_object::helper::Helper;
use flea_object::spec::MapSpec;

use crate::access::{MAX_OFFSET, object_bytes};
use crate::number::scalar::AluOp;
use crate::op::{Op, Operand, Place as Address, Reg};
use crate::proto::{Arg, proto};
use crate::rejection::{Event, Known, Place, What};
use crate::report::Fault;
use crate::stack::Span;
use crate::state::State;
use crate::story::{Path, at_fault};
use crate::value::{Pointer, PointerKind, Value};

/// The hint for `fault` at the end of `path`.
pub(crate) fn advice(path: Path<'_>, fault: &Fault, story: &[Event]) -> Option<String> {
    let concrete = path.visits.last().and_then(|last| {
        let state = &last.state;
        match *path.ops.get(last.idx)? {
            Op::Load { place, .. } | Op::Store { place, .. } | Op::Atomic { place, .. } => {
                access(path, state, place, story)
            }
            Op::CallHelper { id } => argument(path, fault, state, Helper::from_id(id)?, story),
            Op::Alu { dst, src: Operand::Reg(src), .. } => {
                movement(path, state.reg(dst), state.reg(src), story)
            }
            Op::Exit => held(path, state),
            _ => None,
        }
    });
    let general = fault.hint.clone();
    match (concrete, unhelpful_test(story)) {
        (Some(concrete), Some(test)) => Some(format!("{concrete}; {test}")),
        (concrete, _) => concrete.or(general),
    }
}

/// A load, store or atomic.
fn access(path: Path<'_>, state: &State, place: Address, story: &[Event]) -> Option<String> {
    let size = place.size.bytes();
    let p = match state.reg(place.base) {
        Value::Pointer(p) => p,
        Value::Scalar(_) => {
            let r = place.base.index();
            return Some(format!(
                "R{r} is a number, no pointer of the program's: memory of the target is read with \
                 `bpf_probe_read_user(&x, {size}, pointer)`"
            ));
        }
        Value::NotInit => return given_back(place.base, story),
    };
    if p.or_null.is_some() {
        return Some(null_check(story));
    }
    if let PointerKind::Stack { frame } = p.kind {
        return unwritten(state, p, frame, place);
    }
    let writes = !matches!(path.ops.get(path.visits.last()?.idx), Some(Op::Load { .. }));
    // A map whose values have locks is never read-only.
    if let (PointerKind::MapValue(map), true) = (p.kind, writes)
        && let Some(map) = path.maps.get(map.0 as usize).filter(|map| map.read_only)
    {
        let name = &map.name;
        return Some(format!("{name} cannot be written: variables that change are not `const`"));
    }
    let limit = object_bytes(p, path.maps)?;
    let room = i64::from(limit) - i64::from(size) - i64::from(place.off);
    if p.off.as_const().is_some() {
        let first = p.off.wide.smin + i64::from(place.off);
        let inside = first >= 0 && first + i64::from(size) <= i64::from(limit);
        let last = first + i64::from(size) - 1;
        return (!inside).then(|| {
            format!("there are {limit} bytes, and this would be bytes {first} to {last} of them")
        });
    }
    bound(path, p, room, story)
}

/// A register that a release has taken away.
fn given_back(reg: Reg, story: &[Event]) -> Option<String> {
    let Event { what: What::Clobbered { by }, place, .. } = story.last()? else { return None };
    let kept = (6..=9).contains(&reg.index());
    let after = show(place);
    Some(match kept {
        true => format!("{by} at {after} has given it back: use it before that call"),
        false => format!("calls leave R1 to R5 unset, this one at {after}: keep it in R6 to R9"),
    })
}

/// What an index needs so that its offset lies in `0..=room`.
fn bound(path: Path<'_>, p: &Pointer, room: i64, story: &[Event]) -> Option<String> {
    let (min, max) = (p.off.wide.smin, p.off.wide.smax);
    if min < 0 {
        return Some(format!(
            "the offset may be {min}: make the index unsigned, or add `if (index < 0) return 0;` \
             before it is used"
        ));
    }
    if max <= room {
        return None;
    }
    if room < 0 {
        return Some("what is accessed is larger than what there is".into());
    }
    let wanted = wanted_bound(path, room, story);
    Some(format!("the offset may be {min} to {max} and fits up to {room}: {wanted}"))
}

/// The bound that keeps an offset within `0..=room`.
fn wanted_bound(path: Path<'_>, room: i64, story: &[Event]) -> String {
    let (stride, at) = stride(path, story).unwrap_or((1, None));
    let n = room / stride + 1;
    let at = at.map_or_else(String::new, |place| format!(" before {}", show(place)));
    let names = if stride == 1 { "the offset" } else { "the index" };
    format!(
        "{names} must be known to be below {n}{at}, e.g. `if (i >= {n}) return 0;` with an \
         unsigned `i`"
    )
}

/// By what the index was multiplied on the way, and where.
fn stride<'e>(path: Path<'_>, story: &'e [Event]) -> Option<(i64, Option<&'e Place>)> {
    story.iter().rev().find_map(|event| {
        let by = match *path.ops.get(event.place.insn_idx as usize)? {
            Op::Alu { op: AluOp::Lsh, src: Operand::Imm(n @ 1..=30), .. } => 1 << n,
            Op::Alu { op: AluOp::Mul, src: Operand::Imm(n @ 2..), .. } => i64::from(n),
            _ => return None,
        };
        Some((by, Some(&event.place)))
    })
}

/// A comparison on the way that does not help, and why.
fn unhelpful_test(story: &[Event]) -> Option<String> {
    story.iter().rev().find_map(|event| {
        let What::Compared { with_reg: Some(reg), with, .. } = &event.what else { return None };
        let Known::Number { umin: 0, umax: u64::MAX, .. } = with else { return None };
        let at = show(&event.place);
        Some(format!("the comparison at {at} does not bound it: R{reg} may be any number itself"))
    })
}

fn null_check(story: &[Event]) -> String {
    let origin = story.iter().rev().find_map(|event| match &event.what {
        What::Returned { by } => Some((by, &event.place)),
        _ => None,
    });
    match origin {
        Some((by, place)) => format!(
            "{by} at {} may have returned NULL: add `if (!pointer) return 0;` between there and \
             here",
            show(place)
        ),
        None => "compare the pointer with NULL first: `if (!pointer) return 0;`".into(),
    }
}

/// Which bytes of the stack nobody has written.
fn unwritten(state: &State, p: &Pointer, frame: usize, place: Address) -> Option<String> {
    let at = p.off.as_const()?.cast_signed() + i64::from(place.off);
    missing(state, frame, at, place.size.bytes())
}

fn missing(state: &State, frame: usize, at: i64, size_bytes: u32) -> Option<String> {
    let stack = &state.frame_at(frame).stack;
    let is_missing =
        |i: i64| Span::new(at + i, 1).is_some_and(|byte| stack.check_written(byte).is_err());
    let bytes: Vec<i64> = (0..i64::from(size_bytes)).filter(|i| is_missing(*i)).collect();
    let (first, last) = (bytes.first()?, bytes.last()?);
    let all = bytes.len() == size_bytes as usize;
    let which = match all {
        true => format!("none of the {size_bytes} bytes at r10{at} was written"),
        false if first == last => {
            format!("byte {first} of the {size_bytes} at r10{at} was not written")
        }
        false => format!("bytes {first} to {last} of the {size_bytes} at r10{at} were not written"),
    };
    Some(format!(
        "{which} on this path: initialise the variable where it is declared (padding between \
         members counts: `__builtin_memset(&x, 0, sizeof(x))`)"
    ))
}

/// A helper's argument.
fn argument(
    path: Path<'_>,
    fault: &Fault,
    state: &State,
    helper: Helper,
    story: &[Event],
) -> Option<String> {
    if fault.message.starts_with("cannot pass map_type") {
        let (name, map) = (helper.name(), map_argument(state, path.maps)?);
        return Some(format!("{} is a {:?}, for which there is no {name}", map.name, map.kind));
    }
    let reg = at_fault(path, &fault.message)?;
    let n = (0..5).find(|n| Reg::arg(*n) == reg)?;
    let name = helper.name();
    let arg = *proto(helper).args.get(n)?;
    let value = state.reg(reg);
    let nth = n + 1;
    if *value == Value::NotInit {
        return Some(format!("{name} takes {nth} arguments or more: set R{nth} before the call"));
    }
    if matches!(value, Value::Pointer(Pointer { or_null: Some(_), .. })) {
        return Some(null_check(story));
    }
    if matches!(arg, Arg::Size(_)) && value.as_scalar().is_some() {
        return size(path.maps, state, n, name);
    }
    let sized = matches!(proto(helper).args.get(n + 1), Some(Arg::Size(_)));
    if sized && is_too_small(&fault.message) {
        return size(path.maps, state, n + 1, name);
    }
    let map = map_argument(state, path.maps);
    let wanted = match (arg, map) {
        (Arg::Key, Some(map)) => {
            format!("the address of a key of {} bytes", map.key_size_bytes)
        }
        (Arg::MapValue, Some(map)) => {
            format!("the address of a value of {} bytes", map.value_size_bytes)
        }
        (Arg::Ctx, _) => "the context that the program was given".into(),
        (Arg::Record, _) => "what bpf_ringbuf_reserve returned".into(),
        _ if arg.expected() == "map_ptr" => "a map: `&name_of_the_map`".into(),
        _ => return stack_argument(state, value, fault, path.maps, arg),
    };
    if let Some(missing) = stack_argument(state, value, fault, path.maps, arg) {
        return Some(missing);
    }
    Some(format!("argument {nth} of {name} is {wanted}"))
}

/// Whether Linux's words say that memory ends before what is done to it.
fn is_too_small(message: &str) -> bool {
    ["invalid write to stack", "invalid access to"].iter().any(|m| message.starts_with(m))
        || message.contains("outside of the allowed memory range")
}

/// Stack bytes that a helper would read and that are not written.
fn stack_argument(
    state: &State,
    value: &Value,
    fault: &Fault,
    maps: &[MapSpec],
    arg: Arg,
) -> Option<String> {
    if !fault.message.starts_with("invalid read from stack") {
        return None;
    }
    let Value::Pointer(Pointer { kind: PointerKind::Stack { frame }, off, .. }) = value else {
        return None;
    };
    let map = map_argument(state, maps);
    let size_bytes = match (arg, map) {
        (Arg::Key, Some(map)) => map.key_size_bytes,
        (Arg::MapValue, Some(map)) => map.value_size_bytes,
        _ => u32::try_from(off.as_const()?.cast_signed().unsigned_abs()).ok()?,
    };
    missing(state, *frame, off.as_const()?.cast_signed(), size_bytes)
}

fn map_argument<'m>(state: &State, maps: &'m [MapSpec]) -> Option<&'m MapSpec> {
    match state.reg(Reg::arg(0)) {
        Value::Pointer(Pointer { kind: PointerKind::Map(map), .. }) => maps.get(map.0 as usize),
        _ => None,
    }
}

/// A size argument, by the room behind the pointer before it.
fn size(maps: &[MapSpec], state: &State, n: usize, name: &str) -> Option<String> {
    let memory = Reg::arg(n.checked_sub(1)?);
    let Value::Pointer(p) = state.reg(memory) else { return None };
    let room = match p.kind {
        PointerKind::Stack { .. } => -p.off.as_const()?.cast_signed(),
        _ => i64::from(object_bytes(p, maps)?) - p.off.wide.smax,
    };
    let r = memory.index();
    Some(format!(
        "there are {room} bytes behind R{r}: the size given to {name} must be known to be at most \
         that, e.g. `if (size > {room}) return 0;` with an unsigned `size`"
    ))
}

/// A number that moves a pointer too far.
fn movement(path: Path<'_>, dst: &Value, src: &Value, story: &[Event]) -> Option<String> {
    let (p, by) = match (dst, src) {
        (Value::Pointer(p), Value::Scalar(n)) | (Value::Scalar(n), Value::Pointer(p)) => {
            (p, n.set.wide)
        }
        _ => return None,
    };
    if p.or_null.is_some() {
        return Some(null_check(story));
    }
    let limit = object_bytes(p, path.maps)?;
    let bounds = match (by.smin < 0, by.smax < MAX_OFFSET) {
        (true, true) => format!("the number is at most {} and may be negative", by.smax),
        (true, false) => "the number may be any, negative ones too".into(),
        (false, _) => format!("the number may be up to {}", by.umax),
    };
    let wanted = wanted_bound(path, i64::from(limit).saturating_sub(1), story);
    Some(format!("{bounds}, and there are {limit} bytes: {wanted}"))
}

/// What this path has not given back.
fn held(path: Path<'_>, state: &State) -> Option<String> {
    let reference = state.references().first()?;
    let place = Place::of(reference.insn_idx, path.program)?;
    Some(format!(
        "what was acquired at {} is still held here: give it back on this path too, as \
         bpf_ringbuf_submit() or bpf_ringbuf_discard() do with a record",
        show(&place)
    ))
}

/// `insn 12 (prog.c:33)`
fn show(place: &Place) -> String {
    match &place.line {
        Some(line) => format!("insn {} ({}:{})", place.insn_idx, line.file, line.number),
        None => format!("insn {}", place.insn_idx),
    }
}
