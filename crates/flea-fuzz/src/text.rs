//! Programs as text that the verifier's case files understand
//! (`crates/flea-verifier/tests/asm/mod.rs`).

use std::collections::BTreeSet;

use flea_object::disasm;
use flea_object::helper::Helper;
use flea_object::insn::{Insn, PSEUDO_CALL, PSEUDO_MAP, PSEUDO_MAP_VALUE};
use flea_object::opcode as op;
use flea_object::spec::{MapKind, MapSpec};

/// A whole case, to be put under a name into a file of cases. `context` is its `ctx` line.
#[must_use]
pub fn case(name: &str, context: &str, maps: &[MapSpec], insns: &[Insn], verdict: &str) -> String {
    let mut lines = vec![format!("== {name}"), context.to_owned()];
    lines.extend(maps.iter().map(map));
    lines.extend(program(insns));
    lines.push(format!("=> {verdict}"));
    lines.join("\n") + "\n"
}

fn map(spec: &MapSpec) -> String {
    let kind = match spec.kind {
        MapKind::Hash => "hash",
        MapKind::Array => "array",
        MapKind::PerCpuHash => "percpu_hash",
        MapKind::PerCpuArray => "percpu_array",
        MapKind::ArrayOfMaps => "array_of_maps",
        MapKind::HashOfMaps => "hash_of_maps",
        MapKind::RingBuf => "ringbuf",
        MapKind::ProgArray => "prog_array",
    };
    let (key, value, max) = (spec.key_size_bytes, spec.value_size_bytes, spec.max_entries);
    let read_only = if spec.read_only { " ro" } else { "" };
    let lock = spec.lock_offset.map_or(String::new(), |offset| format!(" lock {offset}"));
    let template = if spec.template { " template" } else { "" };
    let of = spec.inner.as_ref().map_or(String::new(), |inner| format!(" of {}", inner.template.0));
    format!("map {kind} {key} {value} {max}{read_only}{lock}{template}{of}")
}

/// One line per instruction or label.
#[must_use]
pub fn program(insns: &[Insn]) -> Vec<String> {
    let places: Vec<usize> = starts(insns).collect();
    let is_place: BTreeSet<usize> = places.iter().copied().collect();
    let labelled: BTreeSet<usize> = places
        .iter()
        .filter_map(|&at| target(insns, at))
        .filter(|to| is_place.contains(to))
        .collect();
    let mut lines = Vec::new();
    for at in places {
        if labelled.contains(&at) {
            lines.push(format!("l{at}:"));
        }
        let label = target(insns, at).filter(|to| is_place.contains(to));
        let insn = insns[at];
        let second = insns.get(at + 1);
        match instruction(insn, second, label) {
            Some(line) => lines.push(line),
            None => {
                lines.push(raw(insn));
                lines.extend(second.filter(|_| insn.is_lddw()).map(|second| raw(*second)));
            }
        }
    }
    lines
}

/// Indices of instructions; second halves are none.
pub(crate) fn starts(insns: &[Insn]) -> impl Iterator<Item = usize> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let at = next;
        let insn = insns.get(at)?;
        next += if insn.is_lddw() { 2 } else { 1 };
        Some(at)
    })
}

/// Where a jump or call of a function leads.
pub(crate) fn target(insns: &[Insn], at: usize) -> Option<usize> {
    let insn = insns[at];
    let calls = insn.opcode == op::CALL_OP && insn.src == PSEUDO_CALL;
    let distance = if calls { insn.imm } else { insn.jump_offset()? };
    (at + 1).checked_add_signed(isize::try_from(distance).ok()?)
}

fn raw(insn: Insn) -> String {
    let Insn { opcode, dst, src, off, imm } = insn;
    format!(".raw {opcode:#x} {dst} {src} {off} {imm}")
}

fn instruction(insn: Insn, second: Option<&Insn>, label: Option<usize>) -> Option<String> {
    match insn.class() {
        op::ALU | op::ALU64 => arithmetic(insn),
        op::JMP | op::JMP32 => jump(insn, label),
        op::LDX | op::ST | op::STX => access(insn),
        _ if insn.is_lddw() => wide(insn, *second?),
        _ => None,
    }
}

fn wide(insn: Insn, second: Insn) -> Option<String> {
    let (dst, low, high) = (insn.dst, insn.imm.cast_unsigned(), second.imm.cast_unsigned());
    let plain = (second.opcode, second.dst, second.src, second.off, insn.off) == (0, 0, 0, 0, 0);
    match insn.src {
        _ if !plain => None,
        0 => Some(format!("r{dst} = {:#x} ll", u64::from(high) << 32 | u64::from(low))),
        PSEUDO_MAP if high == 0 => Some(format!("r{dst} = map {low}")),
        PSEUDO_MAP_VALUE => Some(format!("r{dst} = value {low} {high}")),
        _ => None,
    }
}

/// The second operand, where the other field of the two is 0.
fn operand(insn: Insn, register: char) -> Option<String> {
    if insn.is_source_register() {
        (insn.imm == 0).then(|| format!("{register}{}", insn.src))
    } else {
        (insn.src == 0).then(|| insn.imm.to_string())
    }
}

fn arithmetic(insn: Insn) -> Option<String> {
    let wide = insn.class() == op::ALU64;
    let r = if wide { 'r' } else { 'w' };
    let (dst, src, off, imm) = (insn.dst, insn.src, insn.off, insn.imm);
    let operator = match (insn.code(), off) {
        (op::NEG, 0) if !insn.is_source_register() && src == 0 && imm == 0 => {
            return Some(format!("{r}{dst} = -{r}{dst}"));
        }
        (op::END, 0) if src == 0 => {
            let name = match (wide, insn.is_source_register()) {
                (true, false) => "bswap",
                (false, false) => "le",
                (false, true) => "be",
                (true, true) => return None,
            };
            return Some(format!("r{dst} = {name}{imm} r{dst}"));
        }
        (op::MOV, 8 | 16 | 32) if insn.is_source_register() && imm == 0 => {
            return Some(format!("{r}{dst} = (s{off}){r}{src}"));
        }
        (op::DIV | op::MOD, 1) => disasm::assignment(insn.code(), true)?,
        (code, 0) => disasm::assignment(code, false)?,
        _ => return None,
    };
    Some(format!("{r}{dst} {operator} {}", operand(insn, r)?))
}

fn jump(insn: Insn, label: Option<usize>) -> Option<String> {
    let r = if insn.class() == op::JMP { 'r' } else { 'w' };
    let Some(condition) = disasm::condition(insn.code()) else {
        return unconditional(insn, label);
    };
    let second = operand(insn, r)?;
    Some(format!("if {r}{} {condition} {second} goto l{}", insn.dst, label?))
}

fn unconditional(insn: Insn, label: Option<usize>) -> Option<String> {
    let Insn { opcode, dst, src, off, imm } = insn;
    match opcode {
        op::EXIT_OP if (dst, src, off, imm) == (0, 0, 0, 0) => Some("exit".to_owned()),
        op::JA_OP if (dst, src, imm) == (0, 0, 0) => Some(format!("goto l{}", label?)),
        op::GOTOL_OP if (dst, src, off) == (0, 0, 0) => Some(format!("gotol l{}", label?)),
        op::CALL_OP if (dst, src, off) == (0, 0, 0) => Some(match Helper::from_id(imm) {
            Some(helper) => format!("call {}", helper.name()),
            None => format!("call #{imm}"),
        }),
        op::CALL_OP if (dst, src, off) == (0, PSEUDO_CALL, 0) => Some(format!("call l{}", label?)),
        _ => None,
    }
}

fn access(insn: Insn) -> Option<String> {
    let Insn { dst, src, off, imm, .. } = insn;
    let bits = insn.access_bytes() * 8;
    let place = |sign: char, base: u8| {
        let operator = if off < 0 { '-' } else { '+' };
        format!("*({sign}{bits} *)(r{base} {operator} {})", off.unsigned_abs())
    };
    match (insn.class(), insn.mode()) {
        (op::LDX, op::MEM) if imm == 0 => Some(format!("r{dst} = {}", place('u', src))),
        (op::LDX, op::MEMSX) if imm == 0 => Some(format!("r{dst} = {}", place('s', src))),
        (op::ST, op::MEM) if src == 0 => Some(format!("{} = {imm}", place('u', dst))),
        (op::STX, op::MEM) if imm == 0 => Some(format!("{} = r{src}", place('u', dst))),
        (op::STX, op::ATOMIC) => {
            let place = place('u', dst);
            let operator = match imm & !op::ATOMIC_FETCH {
                op::ATOMIC_ADD => "+=",
                op::ATOMIC_OR => "|=",
                op::ATOMIC_AND => "&=",
                op::ATOMIC_XOR => "^=",
                _ if imm == op::ATOMIC_XCHG => return Some(format!("xchg {place} r{src}")),
                _ if imm == op::ATOMIC_CMPXCHG => return Some(format!("cmpxchg {place} r{src}")),
                _ => return None,
            };
            let word = if imm & op::ATOMIC_FETCH == 0 { "lock" } else { "fetch" };
            Some(format!("{word} {place} {operator} r{src}"))
        }
        _ => None,
    }
}
