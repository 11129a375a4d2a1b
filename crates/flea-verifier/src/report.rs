//! What a person is told: faults, and registers and stack as Linux's verifier log writes them.

use std::fmt::Write as _;

use flea_object::spec::MapSpec;

use crate::number::scalar::Scalar;
use crate::op::Reg;
use crate::state::State;
use crate::value::{Pointer, PointerKind, Value};

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

    /// A read of a register that nothing was written to.
    pub(crate) fn not_readable(reg: Reg) -> Self {
        Self::new(format!("R{} !read_ok", reg.index()))
            .hint("set this register on every path; calls leave r1 to r5 unset")
    }
}

/// `R1=ctx() R2=5 fp-8=scalar()`: the given registers, and the stack of the current function.
pub(crate) fn registers(state: &State, regs: &[Reg], maps: &[MapSpec]) -> String {
    let mut out = String::new();
    for reg in regs {
        let value = state.reg(*reg);
        if *value != Value::NotInit {
            let _ = write!(out, " R{}={}", reg.index(), show_value(value, maps));
        }
    }
    out
}

/// The whole state of the current function.
pub(crate) fn whole_state(state: &State, maps: &[MapSpec]) -> String {
    let all: Vec<Reg> = Reg::all().collect();
    let mut out = registers(state, &all, maps);
    let stack = &state.frame().stack;
    for slot in 0..stack.n_slots() {
        if let Some(value) = stack.slot(slot).as_value() {
            let _ = write!(out, " fp-{}={}", 8 * (slot + 1), show_value(&value, maps));
        }
    }
    for reference in state.references() {
        let _ = write!(out, " refs={}", reference.id);
    }
    out
}

/// A register's content.
pub(crate) fn show_value(value: &Value, maps: &[MapSpec]) -> String {
    match value {
        Value::NotInit => "?".into(),
        Value::Scalar(n) => match (n.set.as_const(), n.id) {
            (Some(c), _) => format!("{}", c.cast_signed()),
            (None, id) => {
                let mut parts: Vec<String> = id.map(|id| format!("id={id}")).into_iter().collect();
                parts.extend(bounds(&n.set));
                format!("scalar({})", parts.join(","))
            }
        },
        Value::Pointer(p) => show_pointer(p, maps),
    }
}

fn show_pointer(p: &Pointer, maps: &[MapSpec]) -> String {
    let map_facts = |i: u32| {
        maps.get(i as usize).map_or_else(Vec::new, |m| {
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
        PointerKind::Map(map) | PointerKind::MapValue(map) | PointerKind::MapKey(map) => {
            parts.extend(map_facts(map.0));
        }
        PointerKind::Function(function) => parts.push(format!("subprog={function}")),
        PointerKind::Record { size_bytes, reference } => {
            parts.push(format!("ref_obj_id={reference}"));
            parts.push(format!("sz={size_bytes}"));
        }
        PointerKind::Memory { size_bytes } => parts.push(format!("sz={size_bytes}")),
        PointerKind::Cookie => parts.push("sz=8".into()),
        PointerKind::Ctx => {}
    }
    match p.off.as_const() {
        Some(0) => {}
        Some(off) => parts.push(format!("off={}", off.cast_signed())),
        None => parts.extend(bounds(&p.off)),
    }
    format!("{}({})", p.type_name(), parts.join(","))
}

/// The bounds that say something.
fn bounds(s: &Scalar) -> Vec<String> {
    let (w, l) = (&s.wide, &s.low);
    let any = Scalar::UNKNOWN;
    let mut out = Vec::new();
    let mut say = |told: bool, name: &str, value: String| {
        if told {
            out.push(format!("{name}={value}"));
        }
    };
    say(w.smin != any.wide.smin, "smin", w.smin.to_string());
    say(w.smax != any.wide.smax, "smax", w.smax.to_string());
    say(w.umin != any.wide.umin, "umin", w.umin.to_string());
    say(w.umax != any.wide.umax, "umax", w.umax.to_string());
    say(l.smin != any.low.smin && l.smin != w.smin, "smin32", l.smin.to_string());
    say(l.smax != any.low.smax && l.smax != w.smax, "smax32", l.smax.to_string());
    say(l.umin != any.low.umin && l.umin != w.umin, "umin32", l.umin.to_string());
    say(l.umax != any.low.umax && l.umax != w.umax, "umax32", l.umax.to_string());
    if w.bits != any.wide.bits {
        out.push(format!("var_off=({:#x}; {:#x})", w.bits.value, w.bits.mask));
    }
    out
}
