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

const ALL: [Knowledge; 8] = [
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
    // Linux keeps the bounds of the low half, which knows the last test alone, for the whole.
    Knowledge {
        is_had: |insns| are_tested(insns, bounds_signed, is_wide_unsigned_order),
        why: "a signed bound with an unsigned one behind it",
        words: &[],
    },
    // Linux asks the bits that it knows, and goes on with a number that is outside of its bounds.
    Knowledge {
        is_had: |insns| are_tested(insns, is_order, is_bit_test),
        why: "bits that must be there within a number's bounds",
        words: &[],
    },
    Knowledge {
        is_had: |insns| are_tested(insns, is_union, is_signed_order),
        why: "signed bounds of a number that is given more bits",
        words: &[],
    },
    // Linux puts the other number and the distance in the place of what the test has shown.
    Knowledge {
        is_had: is_compared_with_copy,
        why: "a number compared with its copy plus a constant",
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

/// Linux has followed a million instructions and says nothing of what the program does. It takes
/// many seconds for that: such a program is not made smaller.
const TOO_LARGE: &str = "BPF program is too large";

/// What a program has that explains this reason of the kernel's.
#[must_use]
pub fn by_reason(insns: &[Insn], reason: &str) -> Option<&'static str> {
    if reason.contains(NO_TYPES) {
        return Some("what a function with a tail call returns");
    }
    if reason.contains(TOO_LARGE) {
        return Some("more instructions than Linux follows");
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

/// One register is in both tests, in this order.
fn are_tested(insns: &[Insn], first: fn(&Insn) -> bool, second: fn(&Insn) -> bool) -> bool {
    let seconds = |from: usize| insns[from..].iter().filter(|insn| second(insn));
    let firsts = insns.iter().enumerate().filter(|(_, insn)| first(insn));
    firsts.into_iter().any(|(i, one)| {
        let shares = |other: &Insn| tested(one).any(|r| tested(other).any(|other| other == r));
        seconds(i + 1).any(shares) || jumps_back_over(insns, i) && seconds(0).any(shares)
    })
}

/// The registers that a conditional jump compares.
fn tested(insn: &Insn) -> impl Iterator<Item = u8> {
    [Some(insn.dst), insn.is_source_register().then_some(insn.src)].into_iter().flatten()
}

fn is_test(insn: &Insn) -> bool {
    matches!(insn.class(), op::JMP | op::JMP32)
}

fn is_signed_order(insn: &Insn) -> bool {
    is_test(insn) && matches!(insn.code(), op::JSGT | op::JSGE | op::JSLT | op::JSLE)
}

fn is_unsigned_order(insn: &Insn) -> bool {
    is_test(insn) && matches!(insn.code(), op::JGT | op::JGE | op::JLT | op::JLE)
}

/// A signed order of 64 bits, or what turns an unsigned bound into a signed one.
fn bounds_signed(insn: &Insn) -> bool {
    is_signed_order(insn) && insn.class() == op::JMP || insn.opcode == op::ALU64 | op::NEG
}

fn is_union(insn: &Insn) -> bool {
    matches!(insn.class(), op::ALU | op::ALU64) && insn.code() == op::OR
}

/// One of two equal numbers is moved by a constant, and then the two are compared.
fn is_compared_with_copy(insns: &[Insn]) -> bool {
    let is_sum = |insn: &Insn| {
        matches!(insn.class(), op::ALU | op::ALU64)
            && matches!(insn.code(), op::ADD | op::SUB)
            && !insn.is_source_register()
    };
    let copies = insns.iter().enumerate().filter(|(_, insn)| is_copy(insn));
    copies.into_iter().any(|(i, copy)| {
        let are_equal = [copy.dst, copy.src];
        let behind = &insns[i + 1..];
        let sum = behind.iter().position(|insn| is_sum(insn) && are_equal.contains(&insn.dst));
        sum.is_some_and(|at| {
            behind[at + 1..].iter().filter(|insn| is_order(insn)).any(|insn| {
                insn.is_source_register()
                    && ([insn.dst, insn.src] == are_equal || [insn.src, insn.dst] == are_equal)
            })
        })
    })
}

fn is_wide_unsigned_order(insn: &Insn) -> bool {
    is_unsigned_order(insn) && insn.class() == op::JMP
}

fn is_order(insn: &Insn) -> bool {
    is_signed_order(insn) || is_unsigned_order(insn)
}

fn is_bit_test(insn: &Insn) -> bool {
    is_test(insn) && insn.code() == op::JSET
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
    fn a_budget_is_no_fault() {
        let reason = "BPF program is too large. Processed 1000001 insn";
        assert!(by_reason(&[], reason).is_some());
        assert_eq!(by_reason(&[], "R1 invalid mem access 'scalar'"), None);
    }

    #[test]
    fn two_tests_are_of_one_number() {
        let test = |code: u8, dst| insn(op::JMP | code, dst, 0, 45);
        let (signed, unsigned, bits) = (test(op::JSGE, 1), test(op::JGT, 1), test(op::JSET, 1));
        for known in [[signed, unsigned], [signed, bits], [unsigned, bits]] {
            assert!(by_instructions(&known).is_some(), "{known:?}");
            let [one, other] = known;
            assert_eq!(by_instructions(&[one, Insn { dst: 2, ..other }]), None);
            assert_eq!(by_instructions(&[other, one]), None);
        }
        let half = insn(op::JMP32 | op::JGT, 1, 0, 45);
        assert_eq!(by_instructions(&[signed, half]), None);
        let back = Insn { off: -3, ..insn(op::JMP | op::JA, 0, 0, 0) };
        assert!(by_instructions(&[bits, unsigned, back]).is_some());
        let register = Insn { opcode: op::JMP | op::JSET | op::X, dst: 2, src: 1, off: 0, imm: 0 };
        assert!(by_instructions(&[signed, register]).is_some());
    }

    #[test]
    fn signed_bounds_come_of_more_than_tests() {
        let unsigned = insn(op::JMP | op::JGT, 1, 0, 90);
        let signed = insn(op::JMP | op::JSLT, 1, 0, -5);
        let negation = insn(op::ALU64 | op::NEG, 1, 0, 0);
        let union = insn(op::ALU64 | op::OR, 1, 0, 6);
        assert!(by_instructions(&[negation, unsigned]).is_some());
        assert!(by_instructions(&[union, signed]).is_some());
        assert_eq!(by_instructions(&[negation, signed]), None);
        assert_eq!(by_instructions(&[union, unsigned]), None);
    }

    #[test]
    fn a_copy_is_moved_and_compared() {
        let copy = insn(op::ALU | op::MOV | op::X, 4, 5, 0);
        let moved = |dst| insn(op::ALU64 | op::SUB, dst, 0, 16);
        let order = |dst, src| insn(op::JMP | op::JLE | op::X, dst, src, 0);
        for known in [[copy, moved(4), order(4, 5)], [copy, moved(5), order(5, 4)]] {
            assert!(by_instructions(&known).is_some(), "{known:?}");
        }
        for unfit in [
            [copy, moved(3), order(4, 5)],
            [copy, moved(4), order(4, 3)],
            [moved(4), copy, order(4, 5)],
            [copy, order(4, 5), moved(4)],
        ] {
            assert_eq!(by_instructions(&unfit), None, "{unfit:?}");
        }
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
