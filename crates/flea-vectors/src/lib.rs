//! Anybody's suite of eBPF programs, one JSON object per line, through verifier, interpreter
//! and compiler. In development only; `cargo xtask vectors` is its command.
//!
//! ```text
//!   {"id":any, "insns":"hex", "maps":[{"type":2,"key":4,"value":8,"max":1,"flags":0,"init":"hex"}],
//!    "mem":"hex", "check":true}
//!   {"id":any, "verdict":"accept", "message":"", "r0_interpreted":"0x1", "r0_compiled":"0x1"}
//! ```
//!
//! A rejected one has a `report` as well, with the facts that `flea run` tells of a refusal.
//!
//! With `mem`, r1 is its address and r2 its length, writable. Without, r1 is a context as
//! fentry programs have it: 12 words, argument `i` (from 1) being `(i << 36) | i`. A `lddw`
//! with source 1 is map `imm`, with source 2 the value of element 0 of it.
//!
//! [`answer`] runs one line in this process, which a program that no verifier saw may bring
//! down or keep busy for ever: [`worker`] puts it into another process with a time limit.

mod facts;
mod host;
#[cfg(test)]
mod inner_tests;
mod native;
pub mod worker;

use flea_layout::plan::ArenaPlan;
use flea_object::insn::{INSN_BYTES, Insn};
use flea_object::interp::{Interpreter, Memory, Protection};
use flea_object::spec::{MapKind, MapSpec, Program};
use flea_verifier::{Context, Verified};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use host::MapsHost;

/// Argument words of the context.
const CONTEXT_WORDS: u8 = 12;
/// `BPF_F_RDONLY_PROG`
const RDONLY_PROG: u32 = 1 << 7;

/// A line in.
#[derive(Clone, Debug, Deserialize)]
pub struct Vector {
    /// Comes back as it is.
    #[serde(default)]
    pub id: Value,
    /// Instructions of 8 bytes each, as hex.
    pub insns: String,
    /// The maps that `lddw`s name by index.
    #[serde(default)]
    pub maps: Vec<VectorMap>,
    /// Memory for r1 and r2, as hex.
    #[serde(default)]
    pub mem: Option<String>,
    /// Whether the verifier is asked.
    #[serde(default = "yes")]
    pub check: bool,
}

fn yes() -> bool {
    true
}

/// A map of a [`Vector`].
#[derive(Clone, Debug, Deserialize)]
pub struct VectorMap {
    /// Linux's number.
    #[serde(rename = "type")]
    pub kind: u32,
    /// Bytes per key.
    #[serde(default)]
    pub key: u32,
    /// Bytes per value.
    #[serde(default)]
    pub value: u32,
    /// Elements, or bytes of a ring buffer.
    #[serde(default)]
    pub max: u32,
    /// `BPF_F_*`
    #[serde(default)]
    pub flags: u32,
    /// Element 0, as hex.
    #[serde(default)]
    pub init: Option<String>,
}

/// A line out.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Answer {
    /// The vector's.
    pub id: Value,
    /// What the verifier said.
    pub verdict: Verdict,
    /// Why it was not accepted, or why there is no result.
    pub message: String,
    /// What the interpreter found, as hex.
    pub r0_interpreted: Option<String>,
    /// What the compiled program returned, as hex.
    pub r0_compiled: Option<String>,
    /// Of a rejected one, all facts of the report: the instruction, the story of the register at
    /// fault, what to change, the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<Value>,
}

/// What the verifier said.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Safe.
    Accept,
    /// Refused.
    Reject,
    /// It was not asked: `check` is false, or this build has no such map.
    Skipped,
}

impl Answer {
    /// One without results.
    #[must_use]
    pub fn without_result(id: Value, verdict: Verdict, message: String) -> Self {
        Self { id, verdict, message, r0_interpreted: None, r0_compiled: None, report: None }
    }
}

/// A vector made ready.
struct Prepared {
    program: Program,
    maps: Vec<MapSpec>,
    memory: Option<Vec<u8>>,
}

/// Runs one vector here.
#[must_use]
pub fn answer(vector: &Vector) -> Answer {
    let id = vector.id.clone();
    let prepared = match prepare(vector) {
        Ok(prepared) => prepared,
        Err(Refused { verdict, message }) => return Answer::without_result(id, verdict, message),
    };
    let (verdict, verified) = if vector.check {
        match verify(&prepared) {
            Ok(verified) => (Verdict::Accept, verified),
            Err(Unverified { message, report }) => {
                let answer = Answer::without_result(id, Verdict::Reject, message);
                return Answer { report, ..answer };
            }
        }
    } else {
        match facts::unverified(&prepared.program.insns) {
            Ok(verified) => (Verdict::Skipped, verified),
            Err(message) => return Answer::without_result(id, Verdict::Skipped, message),
        }
    };
    let interpreted = interpret(&prepared);
    let compiled = native::run(&verified, &prepared.maps, prepared.memory.clone(), context());
    let mut messages = Vec::new();
    let mut show = |what: &str, result: Result<u64, String>| match result {
        Ok(r0) => Some(format!("{r0:#x}")),
        Err(message) => {
            messages.push(format!("{what}: {message}"));
            None
        }
    };
    let r0_interpreted = show("interpreter", interpreted);
    let r0_compiled = show("compiler", compiled);
    let message = messages.join("; ");
    Answer { id, verdict, message, r0_interpreted, r0_compiled, report: None }
}

/// Why a vector was not run.
struct Refused {
    verdict: Verdict,
    message: String,
}

fn prepare(vector: &Vector) -> Result<Prepared, Refused> {
    let malformed = |message| Refused {
        verdict: if vector.check { Verdict::Reject } else { Verdict::Skipped },
        message,
    };
    let bytes = unhex(&vector.insns).map_err(malformed)?;
    let insn_bytes = usize::try_from(INSN_BYTES).unwrap_or(8);
    if !bytes.len().is_multiple_of(insn_bytes) {
        return Err(malformed(format!("{} bytes are no whole instructions", bytes.len())));
    }
    let insns = bytes.chunks_exact(insn_bytes);
    let insns = insns.filter_map(|chunk| Some(Insn::decode(*chunk.first_chunk()?))).collect();
    let maps = vector.maps.iter().enumerate().map(|(i, map)| spec(i, map));
    let maps = maps.collect::<Result<_, _>>()?;
    let memory = vector.mem.as_deref().map(unhex).transpose().map_err(malformed)?;
    Ok(Prepared { program: Program { insns, ..Program::default() }, maps, memory })
}

fn spec(index: usize, map: &VectorMap) -> Result<MapSpec, Refused> {
    let skipped = |message| Refused { verdict: Verdict::Skipped, message };
    let kind = MapKind::ALL.iter().copied().find(|kind| *kind as u32 == map.kind);
    let kind = kind.ok_or_else(|| skipped(format!("map {index}: no type {} here", map.kind)))?;
    if kind.holds_maps() {
        let what = "a vector does not say which maps a map of maps holds";
        return Err(skipped(format!("map {index}: {what}")));
    }
    let init = map.init.as_deref().map(unhex).transpose();
    Ok(MapSpec {
        name: format!("map{index}"),
        kind,
        key_size_bytes: map.key,
        value_size_bytes: map.value,
        max_entries: map.max,
        flags: map.flags,
        init: init.map_err(skipped)?,
        read_only: map.flags & RDONLY_PROG != 0,
        ..MapSpec::default()
    })
}

/// What the verifier has against a program.
struct Unverified {
    message: String,
    report: Option<Value>,
}

fn verify(prepared: &Prepared) -> Result<Verified, Unverified> {
    let context = match &prepared.memory {
        Some(memory) => {
            let size_bytes = u32::try_from(memory.len())
                .map_err(|e| Unverified { message: e.to_string(), report: None })?;
            Context::Memory { size_bytes }
        }
        None => Context::Tracing { n_args: CONTEXT_WORDS, n_results: 0, session: false },
    };
    flea_verifier::verify(&prepared.program, &prepared.maps, context).map_err(|rejection| {
        let report = serde_json::to_value(&rejection).ok();
        Unverified { message: rejection.message, report }
    })
}

/// The context's words.
fn context() -> Vec<u64> {
    (1..=u64::from(CONTEXT_WORDS)).map(|i| i << 36 | i).collect()
}

fn interpret(prepared: &Prepared) -> Result<u64, String> {
    let interpreter = Interpreter::new(&prepared.program.insns).map_err(|e| e.to_string())?;
    let mut memory = Memory::new();
    let (r1, r2) = match &prepared.memory {
        Some(bytes) if bytes.is_empty() => (0, 0),
        Some(bytes) => (memory.add(bytes.clone(), Protection::ReadWrite), bytes.len() as u64),
        None => {
            let bytes: Vec<u8> = context().iter().flat_map(|word| word.to_le_bytes()).collect();
            (memory.add(bytes, Protection::ReadOnly), 0)
        }
    };
    let plan = ArenaPlan::new(&prepared.maps, 1);
    let mut host = MapsHost::new(&prepared.maps, &plan, &mut memory, context());
    interpreter.run([r1, r2, 0, 0, 0], &mut memory, &mut host).map_err(|trap| trap.to_string())
}

fn unhex(text: &str) -> Result<Vec<u8>, String> {
    let text = text.trim();
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return Err(format!("`{}` is no hex", text.chars().take(32).collect::<String>()));
    }
    let byte = |i| {
        u8::from_str_radix(&text[i..i + 2], 16)
            .map_err(|_| format!("`{}` is no hex", &text[i..i + 2]))
    };
    (0..text.len()).step_by(2).map(byte).collect()
}
