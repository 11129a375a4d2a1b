//! Where a value at fault came from, as the report tells it: one line per event.
#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a test's assembler: a wrong number or a mistake in a case fails the test"
)]

mod asm;

use expect_test::{Expect, expect};
use flea_object::spec::{MapKind, MapSpec, Program};
use flea_verifier::{Context, Known, verify};

const CONTEXT: Context = Context::Tracing { n_args: 2, n_results: 0, session: false };

fn maps() -> Vec<MapSpec> {
    vec![MapSpec {
        name: "rows".into(),
        kind: MapKind::Array,
        key_size_bytes: 4,
        value_size_bytes: 64,
        max_entries: 1,
        flags: 0,
        init: None,
        read_only: false,
        inner: None,
        lock_offset: None,
        template: false,
    }]
}

fn check(lines: &[&str], expected: Expect) {
    let program = Program { insns: asm::assemble(lines), ..Program::default() };
    let refused = verify(&program, &maps(), CONTEXT).unwrap_err();
    let known = |known: &Known| match known {
        Known::Number { umin, umax, .. } => format!("{umin}..={umax}"),
        Known::Pointer { kind, .. } => (*kind).to_owned(),
        Known::Unset => "?".to_owned(),
    };
    let mut told = format!("{}\n", refused.message);
    for event in &refused.story {
        let reg = event.reg.map_or("stack".to_owned(), |reg| format!("R{reg}"));
        let (at, what) = (event.place.insn_idx, &event.what);
        told += &format!("{at}: {reg} {} {what:?}\n", known(&event.known));
    }
    told += &refused.hint.unwrap_or_default();
    expected.assert_eq(&told);
}

#[test]
fn through_the_stack_and_a_copy() {
    check(
        &[
            "r6 = *(u64 *)(r1 + 8)",
            "*(u64 *)(r10 - 16) = r6",
            "r7 = 9",
            "r2 = *(u64 *)(r10 - 16)",
            "r3 = r2",
            "r0 = *(u8 *)(r3 + 0)",
            "exit",
        ],
        expect![[r#"
            R3 invalid mem access 'scalar'
            0: R6 0..=18446744073709551615 Loaded
            1: stack 0..=18446744073709551615 Spilled
            3: R2 0..=18446744073709551615 Loaded
            4: R3 0..=18446744073709551615 Copied
            R3 is a number, no pointer of the program's: memory of the target is read with `bpf_probe_read_user(&x, 1, pointer)`"#]],
    );
}

#[test]
fn the_callers_value_in_a_callee() {
    check(
        &[
            "r2 = *(u64 *)(r1 + 8)",
            "r2 &= 127",
            "r1 = value 0 0",
            "call f",
            "exit",
            "f:",
            "r1 += r2",
            "r0 = *(u64 *)(r1 + 0)",
            "exit",
        ],
        expect![[r#"
            R1 max value is outside of the allowed memory range
            0: R2 0..=18446744073709551615 Loaded
            1: R2 0..=127 Computed
            4: R2 0..=127 Passed
            6: R1 map_value Computed
            the offset may be 0 to 127 and fits up to 56: the offset must be known to be below 57, e.g. `if (i >= 57) return 0;` with an unsigned `i`"#]],
    );
}

#[test]
fn a_result_of_a_callee() {
    check(
        &["r6 = r1", "call f", "r0 = *(u64 *)(r0 + 0)", "exit", "f:", "r0 = 5", "r0 += 1", "exit"],
        expect![[r#"
            R0 invalid mem access 'scalar'
            4: R0 5..=5 Set
            5: R0 6..=6 Computed
            6: R0 6..=6 Returned { by: "the function of insn 6" }
            R0 is a number, no pointer of the program's: memory of the target is read with `bpf_probe_read_user(&x, 8, pointer)`"#]],
    );
}

#[test]
fn tests_on_an_equal_number_count() {
    check(
        &[
            "r6 = *(u64 *)(r1 + 8)",
            "r7 = *(u64 *)(r1 + 0)",
            "r2 = r6",
            "if r2 > 12 goto out",
            "if r6 > r7 goto out",
            "*(u32 *)(r10 - 4) = 0",
            "r2 = r10",
            "r2 += -4",
            "r1 = map 0",
            "call #1",
            "if r0 == 0 goto out",
            "r6 <<= 3",
            "r0 += r6",
            "r0 = *(u64 *)(r0 + 0)",
            "out:",
            "r0 = 0",
            "exit",
        ],
        expect![[r#"
            R0 max value is outside of the allowed memory range
            0: R6 0..=18446744073709551615 Loaded
            3: R6 0..=12 Compared { with_reg: None, with: Number { smin: 12, smax: 12, umin: 12, umax: 12 }, jumps: false }
            4: R6 0..=12 Compared { with_reg: Some(7), with: Number { smin: -9223372036854775808, smax: 9223372036854775807, umin: 0, umax: 18446744073709551615 }, jumps: false }
            12: R6 0..=96 Computed
            13: R0 map_value Computed
            the offset may be 0 to 96 and fits up to 56: the index must be known to be below 8 before insn 12, e.g. `if (i >= 8) return 0;` with an unsigned `i`; the comparison at insn 4 does not bound it: R7 may be any number itself"#]],
    );
}

#[test]
fn a_register_that_nobody_wrote() {
    check(
        &["r0 = r7", "exit"],
        expect![[r#"
        R7 !read_ok
        0: R7 ? NeverWritten
        set this register on every path; calls leave r1 to r5 unset"#]],
    );
}

/// A helper has filled the bytes: the story ends there.
#[test]
fn bytes_that_a_helper_filled() {
    check(
        &[
            "r3 = *(u64 *)(r1 + 0)",
            "r1 = r10",
            "r1 += -8",
            "r2 = 8",
            "call #112",
            "r2 = *(u64 *)(r10 - 8)",
            "r0 = *(u8 *)(r2 + 0)",
            "exit",
        ],
        expect![[r#"
            R2 invalid mem access 'scalar'
            4: stack 0..=18446744073709551615 Filled { by: "bpf_probe_read_user" }
            5: R2 0..=18446744073709551615 Loaded
            R2 is a number, no pointer of the program's: memory of the target is read with `bpf_probe_read_user(&x, 1, pointer)`"#]],
    );
}
