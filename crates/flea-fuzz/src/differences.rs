//! All that we accept and Linux 6.18 refuses, with the reason: numbers that it knows less of.
//!
//! What is counted here has stood the test of [`crate::machines`] as well. A program that the
//! kernel refuses for something else is an unsafe accept until somebody has looked at it.
//!
//! And one fault of Linux's, by which a program that both accept returns something else there:
//! [`veiled`].

use flea_object::insn::Insn;
use flea_object::opcode as op;

use crate::minimise::with_behind;

/// An instruction that leaves us with more knowledge than Linux.
struct Knowledge {
    is_had: fn(&[Insn]) -> bool,
    why: &'static str,
    /// It puts the kernel off in these words and is in most programs, so that no other reason has
    /// to be looked for.
    words: &'static [&'static str],
}

/// Ranges that the kernel has lost.
const RANGES: [&str; 3] = [
    "with unbounded min value is not allowed",
    "min value is negative, either use unsigned index",
    "unbounded memory access, make sure to bounds check",
];

const ALL: [Knowledge; 4] = [
    Knowledge {
        is_had: |insns| insns.iter().any(is_remainder),
        why: "bounds of quotients and remainders",
        words: &RANGES,
    },
    Knowledge {
        is_had: |insns| insns.iter().any(is_subtraction),
        why: "bounds of what is subtracted from a pointer",
        words: &RANGES,
    },
    Knowledge {
        is_had: |insns| insns.iter().any(is_open_shift),
        why: "what a shift by any number leaves",
        words: &[],
    },
    Knowledge {
        is_had: |insns| insns.iter().any(is_stored) && insns.iter().any(is_narrow_read),
        why: "parts of a stored number",
        words: &[],
    },
];

/// No knowledge of ours: Linux keeps the constant that is between two equal numbers where a pointer
/// keeps its offset, and holds it to that one's bounds. It says so, and no branch hangs on it: this
/// explains nothing else.
const OFFSET: Knowledge = Knowledge {
    is_had: has_far_copy,
    why: "a copied number plus a constant: Linux takes that for a pointer's offset, too",
    words: &["pointer offset"],
};

/// Linux wants a function that makes a tail call to return int, and types that say so. These
/// programs have none, and we take any number from such a function.
const NO_TYPES: &str = "tail_call is not allowed in subprogs without BTF";

/// What a program has that explains this reason of the kernel's.
#[must_use]
pub fn by_reason(insns: &[Insn], reason: &str) -> Option<&'static str> {
    if reason.contains(NO_TYPES) {
        return Some("what a function with a tail call returns");
    }
    let explains =
        |k: &&Knowledge| k.words.iter().any(|words| reason.contains(words)) && (k.is_had)(insns);
    ALL.iter().chain([&OFFSET]).find(explains).map(|k| k.why)
}

/// What a program has that can explain any reason: where we know that a branch is not taken, the
/// kernel may find anything in it. For programs of which nothing can be spared.
#[must_use]
pub fn by_instructions(insns: &[Insn]) -> Option<&'static str> {
    ALL.iter().find(|k| (k.is_had)(insns)).map(|k| k.why)
}

/// What [`veiled`] programs of which the kernel gives our result show.
pub const FETCHED: &str = "a fetch from the stack that Linux takes for a store";

/// The same program, where the kernel's verifier knows nothing of what atomic operations fetch.
///
/// Until "bpf: Fix incorrect pruning due to atomic fetch precision tracking" (2026), Linux takes
/// such an operation for a store when it looks for all that a number was made of. A branch that
/// hangs on the number then asks nothing of the stack word that it came from: a path with another
/// word there is found equal to the first one and not followed, and where the first one never
/// takes the branch, the branch is taken out of the program. 6.18 has this fault.
///
/// A quotient by one is the number itself, of which that verifier knows nothing. So if the kernel's
/// result is ours as soon as there is one, this fault is what made it another. `None` where nothing
/// is fetched.
#[must_use]
pub fn veiled(insns: &[Insn]) -> Option<Vec<Insn>> {
    insns.iter().find_map(fetched)?;
    with_behind(insns, |insn| fetched(insn).map(by_one).into_iter().collect())
}

/// The register that an atomic operation fetches into.
fn fetched(insn: &Insn) -> Option<u8> {
    let is_atomic = insn.class() == op::STX && insn.mode() == op::ATOMIC;
    match insn.imm {
        op::ATOMIC_CMPXCHG if is_atomic => Some(0),
        imm if is_atomic && imm & op::ATOMIC_FETCH != 0 => Some(insn.src),
        _ => None,
    }
}

fn by_one(dst: u8) -> Insn {
    Insn { opcode: op::ALU64 | op::DIV, dst, src: 0, off: 0, imm: 1 }
}

fn is_remainder(insn: &Insn) -> bool {
    matches!(insn.class(), op::ALU | op::ALU64) && matches!(insn.code(), op::MOD | op::DIV)
}

fn is_subtraction(insn: &Insn) -> bool {
    insn.opcode == op::ALU64 | op::SUB | op::X
}

fn is_open_shift(insn: &Insn) -> bool {
    matches!(insn.class(), op::ALU | op::ALU64)
        && insn.is_source_register()
        && matches!(insn.code(), op::LSH | op::RSH | op::ARSH)
}

fn is_stored(insn: &Insn) -> bool {
    matches!(insn.class(), op::ST | op::STX) && insn.mode() == op::MEM && insn.access_bytes() == 8
}

fn is_copy(insn: &Insn) -> bool {
    [op::ALU | op::MOV | op::X, op::ALU64 | op::MOV | op::X].contains(&insn.opcode)
}

/// Somewhere behind a copy, a constant that no pointer's offset may have (BPF_MAX_VAR_OFF) is added
/// to one of the two numbers.
fn has_far_copy(insns: &[Insn]) -> bool {
    let sums = |from: usize| insns[from..].iter().filter(|insn| is_far_sum(insn));
    let copies = insns.iter().enumerate().filter(|(_, insn)| is_copy(insn));
    copies.into_iter().any(|(i, copy)| {
        let are_equal = [copy.dst, copy.src];
        sums(i + 1).any(|sum| are_equal.contains(&sum.dst))
            || jumps_back_over(insns, i) && sums(0).any(|sum| are_equal.contains(&sum.dst))
    })
}

/// In a loop, what is in front of an instruction runs behind it as well.
fn jumps_back_over(insns: &[Insn], at: usize) -> bool {
    let mut jumps = insns.iter().enumerate().skip(at);
    jumps.any(|(_, insn)| matches!(insn.class(), op::JMP | op::JMP32) && insn.off < 0)
}

fn is_far_sum(insn: &Insn) -> bool {
    const MAX_OFFSET: u32 = 1 << 29;
    [op::ALU | op::ADD, op::ALU | op::SUB, op::ALU64 | op::ADD, op::ALU64 | op::SUB]
        .contains(&insn.opcode)
        && insn.imm.unsigned_abs() >= MAX_OFFSET
}

/// A load, or an atomic operation that fetches what was there.
fn is_narrow_read(insn: &Insn) -> bool {
    let reads = insn.class() == op::LDX || fetched(insn).is_some();
    reads && insn.access_bytes() < 8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn insn(opcode: u8, dst: u8, src: u8, imm: i32) -> Insn {
        Insn { opcode, dst, src, off: 0, imm }
    }

    #[test]
    fn parts_are_loaded_or_fetched() {
        let stored = insn(op::ST | op::MEM | op::DW, 10, 0, 71);
        let fetched = |size: u8, imm: i32| {
            let or = insn(op::STX | op::ATOMIC | size, 10, 3, imm);
            by_instructions(&[stored, or])
        };
        assert!(fetched(op::W, op::ATOMIC_OR | op::ATOMIC_FETCH).is_some());
        assert!(fetched(op::W, op::ATOMIC_OR).is_none());
        assert!(fetched(op::DW, op::ATOMIC_OR | op::ATOMIC_FETCH).is_none());
    }

    #[test]
    fn a_far_copy_explains_an_offset_and_nothing_else() {
        let copy = insn(op::ALU64 | op::MOV | op::X, 2, 1, 0);
        let far = |dst| insn(op::ALU64 | op::ADD, dst, 0, -(1 << 29));
        let reason = "value -536870912 pointer offset is not allowed";
        for dst in [1, 2] {
            assert!(by_reason(&[copy, far(dst)], reason).is_some(), "r{dst}");
        }
        let near = insn(op::ALU64 | op::ADD, 2, 0, (1 << 29) - 1);
        for unfit in [[copy, near], [copy, far(3)], [far(2), copy]] {
            assert_eq!(by_reason(&unfit, reason), None, "{unfit:?}");
        }
        let back = Insn { off: -3, ..insn(op::JMP | op::JA, 0, 0, 0) };
        assert!(by_reason(&[far(2), copy, back], reason).is_some());
        assert_eq!(by_reason(&[copy, far(2)], "R1 invalid mem access 'scalar'"), None);
        assert_eq!(by_instructions(&[copy, far(2)]), None);
    }
}
