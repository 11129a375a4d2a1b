//! Why a program was refused, as facts: what a face renders for people or as JSON. Plain data;
//! made by [`crate::story`] and [`crate::advice`].

use flea_object::disasm::Disasm;
use flea_object::spec::{MapSpec, Program};
use serde::Serialize;

use crate::access;
use crate::value::{Pointer, PointerKind, Value};

/// Why a program was refused: the report that a person reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{message}")]
pub struct Rejection {
    /// The instruction at fault.
    pub insn_idx: u32,
    /// Linux's words for it (`R1 invalid mem access 'scalar'`).
    pub message: String,
    /// That instruction, and the line of the source that it came from; `None` where the program
    /// has no such instruction.
    pub place: Option<Place>,
    /// Where the value at fault came from on this path, oldest first.
    pub story: Vec<Event>,
    /// What to change.
    pub hint: Option<String>,
    /// The way there, as Linux's verifier log prints it, the message last.
    pub log: Vec<String>,
}

/// An instruction and where it is in the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Index of the instruction.
    pub insn_idx: u32,
    /// The instruction, as Linux's log has it.
    pub insn: String,
    /// The C function that it belongs to.
    pub function: Option<String>,
    /// The line that it was compiled from.
    pub line: Option<Line>,
}

/// A line of the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// File name as compiled.
    pub file: String,
    /// 1-based.
    pub number: u32,
    /// What it says.
    pub text: String,
}

/// One instruction of a value's story.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event {
    /// The instruction.
    pub place: Place,
    /// What it did to the value.
    pub what: What,
    /// The register that held the value then; `None` where it was on the stack.
    pub reg: Option<u8>,
    /// What was known of the value behind it.
    pub known: Known,
}

/// What an instruction did to a value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// The program was started with it.
    Given,
    /// No instruction of this path has written it.
    NeverWritten,
    /// A constant, or a fixed address.
    Set,
    /// Read from memory.
    Loaded,
    /// Written to the stack.
    Spilled,
    /// Copied from another register.
    Copied,
    /// Computed from another value.
    Computed,
    /// The result of this helper or function.
    Returned {
        /// Its name.
        by: String,
    },
    /// Written, on the stack, by this helper or function.
    Filled {
        /// Its name.
        by: String,
    },
    /// Left unset by a call of this helper or function.
    Clobbered {
        /// Its name.
        by: String,
    },
    /// Handed to a function of the program.
    Passed,
    /// Must be given back, and comes from here.
    Acquired,
    /// Compared with something.
    Compared {
        /// The register that it was compared with; `None` for a constant.
        with_reg: Option<u8>,
        /// What was known of the other side.
        with: Known,
        /// Whether this path jumps there.
        jumps: bool,
    },
}

/// What is known of a value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Known {
    /// Nothing may be done with it.
    Unset,
    /// A number within these bounds, both signed and unsigned.
    Number {
        /// The smallest, signed.
        smin: i64,
        /// The largest, signed.
        smax: i64,
        /// The smallest, unsigned.
        umin: u64,
        /// The largest, unsigned.
        umax: u64,
    },
    /// An address.
    Pointer {
        /// Linux's name for the type, e.g. `map_value_or_null`.
        kind: &'static str,
        /// It may be NULL.
        or_null: bool,
        /// The map that it belongs to.
        map: Option<String>,
        /// Bytes of what it points into.
        size_bytes: Option<u32>,
        /// The smallest distance from the start of that, in bytes.
        min_offset: i64,
        /// The largest.
        max_offset: i64,
    },
}

impl Known {
    /// What `value` says.
    pub(crate) fn of(value: &Value, maps: &[MapSpec]) -> Self {
        match value {
            Value::NotInit => Self::Unset,
            Value::Scalar(n) => {
                let w = &n.set.wide;
                Self::Number { smin: w.smin, smax: w.smax, umin: w.umin, umax: w.umax }
            }
            Value::Pointer(p) => Self::Pointer {
                kind: p.kind.name(),
                or_null: p.or_null.is_some(),
                map: map_of(p, maps).map(|m| m.name.clone()),
                size_bytes: access::object_bytes(p, maps),
                min_offset: p.off.wide.smin,
                max_offset: p.off.wide.smax,
            },
        }
    }
}

fn map_of<'m>(p: &Pointer, maps: &'m [MapSpec]) -> Option<&'m MapSpec> {
    match p.kind {
        PointerKind::Map(map) | PointerKind::MapValue(map) | PointerKind::LockValue { map, .. } => {
            maps.get(map.0 as usize)
        }
        _ => None,
    }
}

impl Place {
    /// Instruction `idx` of `program`; `None` where there is no such instruction.
    pub(crate) fn of(idx: usize, program: &Program) -> Option<Self> {
        program.insns.get(idx)?;
        let function = program.functions.partition_point(|f| f.insn_idx as usize <= idx);
        let function = function.checked_sub(1).and_then(|i| program.functions.get(i));
        let start = function.map_or(0, |f| f.insn_idx);
        let line = program.lines.partition_point(|l| l.insn_idx as usize <= idx);
        let line = line.checked_sub(1).and_then(|i| program.lines.get(i));
        // A line of the function before says nothing of this one.
        let line = line.filter(|l| l.insn_idx >= start);
        Some(Self {
            insn_idx: u32::try_from(idx).ok()?,
            insn: Disasm::at(&program.insns, idx).to_string(),
            function: function.map(|f| f.name.clone()),
            line: line.map(|l| Line {
                file: l.file.clone(),
                number: l.line,
                text: l.text.trim().to_owned(),
            }),
        })
    }
}
