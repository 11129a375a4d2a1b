//! What a person is told: faults, and registers and stack as Linux's verifier log writes them.

use std::fmt::Write as _;

use flea_object::spec::MapSpec;
use flea_object::types::Types;

use crate::number::scalar::Scalar;
use crate::op::Reg;
use crate::stack::{Byte, Half, Slot};
use crate::state::State;
use crate::typed;
use crate::value::{Id, Pointer, PointerKind, Value};

/// What has a name in the log.
#[derive(Clone, Copy)]
pub(crate) struct Named<'a> {
    pub(crate) maps: &'a [MapSpec],
    /// What typed pointers lead to, where there are any.
    pub(crate) types: Option<&'a Types>,
}

/// One thing that is wrong with an instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// Linux's words.
    pub(crate) message: String,
    /// What to change.
    pub(crate) hint: Option<String>,
}

impl Fault {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None }
    }

    pub(crate) fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// One more hint.
    pub(crate) fn and_hint(self, more: &str) -> Self {
        let hint = self.hint.map_or_else(|| more.to_owned(), |hint| format!("{hint}; {more}"));
        Self { hint: Some(hint), ..self }
    }

    /// A read of a register that nothing was written to.
    pub(crate) fn not_readable(reg: Reg) -> Self {
        Self::new(format!("R{} !read_ok", reg.index()))
            .hint("set this register on every path; calls leave r1 to r5 unset")
    }
}

/// `R1=ctx() R2=5 fp-8=scalar()`: the given registers, and the stack of the current function.
pub(crate) fn registers(state: &State, regs: &[Reg], known: Named<'_>) -> String {
    let mut out = String::new();
    for reg in regs {
        let value = state.reg(*reg);
        if *value != Value::NotInit {
            let _ = write!(out, " R{}={}", reg.index(), show_value(value, known));
        }
    }
    out
}

/// The whole state of the current function.
pub(crate) fn whole_state(state: &State, known: Named<'_>) -> String {
    let all: Vec<Reg> = Reg::all().collect();
    let mut out = match state.depth() {
        0 => String::new(),
        depth => format!(" frame{depth}:"),
    };
    out += &registers(state, &all, known);
    let stack = &state.frame().stack;
    for slot in 0..stack.n_slots() {
        if let Some(text) = show_slot(stack.slot(slot), known) {
            let _ = write!(out, " fp-{}={text}", 8 * (slot + 1));
        }
    }
    for reference in state.references() {
        let _ = write!(out, " refs={}", reference.id);
    }
    if let Some(lock) = state.lock() {
        let name = known.maps.get(lock.map.0 as usize).map_or("?", |m| m.name.as_str());
        let element = lock.element.map_or(0, Id::get);
        let _ = write!(out, " lock={name}:{element}");
    }
    out
}

/// Eight bytes of stack: a register that was spilled there, or a letter per byte from the
/// highest address down (`m` for anything, `?` for not written); or a number in each half.
fn show_slot(slot: &Slot, known: Named<'_>) -> Option<String> {
    let text = match slot {
        Slot::Spill(Value::NotInit) => return None,
        Slot::Spill(value) => return Some(show_value(value, known)),
        Slot::Bytes(bytes) => bytes_text(bytes),
        Slot::Halves(halves) => {
            let half = |half: &Half| match half {
                Half::Number(value) => show_value(value, known),
                Half::Bytes(bytes) => bytes_text(bytes),
            };
            format!("{}:{}", half(&halves[1]), half(&halves[0]))
        }
    };
    text.contains(|c| c != '?').then_some(text)
}

fn bytes_text(bytes: &[Byte]) -> String {
    let letter = |byte: &Byte| match byte {
        Byte::Unwritten => '?',
        Byte::Zero => '0',
        Byte::Anything => 'm',
    };
    bytes.iter().rev().map(letter).collect()
}

/// A register's content.
pub(crate) fn show_value(value: &Value, known: Named<'_>) -> String {
    match value {
        Value::NotInit => "?".into(),
        Value::Scalar(n) => match (n.set.as_const(), n.id) {
            (Some(c), _) => format!("{}", c.cast_signed()),
            (None, id) => {
                let shown = |id| match n.delta.cast_signed() {
                    0 => format!("id={id}"),
                    delta => format!("id={id}{delta:+}"),
                };
                let mut parts: Vec<String> = id.map(shown).into_iter().collect();
                parts.extend(bounds(&n.set));
                format!("scalar({})", parts.join(","))
            }
        },
        Value::Pointer(p) => show_pointer(p, known),
    }
}

fn show_pointer(p: &Pointer, known: Named<'_>) -> String {
    let map_facts = |i: u32| {
        known.maps.get(i as usize).map_or_else(Vec::new, |m| {
            vec![
                format!("map={}", m.name),
                format!("ks={}", m.key_size_bytes),
                format!("vs={}", m.value_size_bytes),
            ]
        })
    };
    let mut parts: Vec<String> = p.or_null.map(|id| format!("id={id}")).into_iter().collect();
    match p.kind {
        PointerKind::Stack { frame } => {
            let name = format!("fp[{frame}]");
            return match p.off.as_const() {
                Some(off) => format!("fp{}", off.cast_signed()),
                None => format!("{name}({})", bounds(&p.off).join(",")),
            };
        }
        PointerKind::LockValue { map, element } => {
            parts.extend(element.filter(|e| Some(*e) != p.or_null).map(|e| format!("id={e}")));
            parts.extend(map_facts(map.0));
        }
        PointerKind::Map(map) | PointerKind::MapValue(map) | PointerKind::MapKey(map) => {
            parts.extend(map_facts(map.0));
        }
        PointerKind::Function(function) => parts.push(format!("subprog={function}")),
        PointerKind::Record { size_bytes, reference } => {
            parts.push(format!("ref_obj_id={reference}"));
            parts.push(format!("sz={size_bytes}"));
        }
        PointerKind::Memory { size_bytes } | PointerKind::Argument { size_bytes, .. } => {
            parts.push(format!("sz={size_bytes}"))
        }
        PointerKind::Cookie => parts.push("sz=8".into()),
        PointerKind::Ctx | PointerKind::Target { .. } => {}
    }
    match p.off.as_const() {
        Some(0) => {}
        Some(off) => parts.push(format!("off={}", off.cast_signed())),
        None => parts.extend(bounds(&p.off)),
    }
    let name = match (p.kind, known.types) {
        (PointerKind::Target { ty }, Some(types)) => {
            format!("{}{}", p.type_name(), typed::name(types, ty))
        }
        _ => p.type_name(),
    };
    format!("{name}({})", parts.join(","))
}

/// The bounds that say something, equal ones together: `smin=umin=1,smax=umax=8`.
fn bounds(s: &Scalar) -> Vec<String> {
    let (w, l) = (&s.wide, &s.low);
    let (any, any_low) = (Scalar::UNKNOWN.wide, Scalar::UNKNOWN.low);
    let (signed, unsigned) = (i128::from, i128::from);
    let all: [(&str, i128, i128); 8] = [
        ("smin", signed(w.smin), signed(any.smin)),
        ("smax", signed(w.smax), signed(any.smax)),
        ("umin", unsigned(w.umin), unsigned(any.umin)),
        ("umax", unsigned(w.umax), unsigned(any.umax)),
        ("smin32", signed(l.smin), signed(any_low.smin)),
        ("smax32", signed(l.smax), signed(any_low.smax)),
        ("umin32", unsigned(l.umin), unsigned(any_low.umin)),
        ("umax32", unsigned(l.umax), unsigned(any_low.umax)),
    ];
    let said: Vec<(&str, i128)> = all
        .into_iter()
        .filter(|(_, value, unknown)| value != unknown)
        .map(|(name, value, _)| (name, value))
        .collect();
    let mut out: Vec<String> = Vec::new();
    for (i, (_, value)) in said.iter().enumerate() {
        if said[..i].iter().any(|(_, earlier)| earlier == value) {
            continue;
        }
        let names = said[i..].iter().filter(|(_, other)| other == value);
        let names: String = names.map(|(name, _)| format!("{name}=")).collect();
        out.push(names + &decimal_or_hex(*value));
    }
    if w.bits != any.bits {
        out.push(format!("var_off=({:#x}; {:#x})", w.bits.value, w.bits.mask));
    }
    out
}

/// Numbers past 16 bits are hexadecimal, as in Linux.
fn decimal_or_hex(value: i128) -> String {
    if (i128::from(i16::MIN)..=i128::from(u16::MAX)).contains(&value) {
        return value.to_string();
    }
    let bits =
        i64::try_from(value).map_or(value.cast_unsigned(), |v| u128::from(v.cast_unsigned()));
    format!("{bits:#x}")
}
