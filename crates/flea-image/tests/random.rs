//! Random straight-line arithmetic against a model written from RFC 9669, once with operands
//! that the compiler knows and once with operands from memory.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use flea_image::compile_plain;
use flea_object::insn::Insn;
use proptest::prelude::*;
use support::arithmetic::operation;
use support::{Pages, insn, unverified};

/// One operation in the model.
fn model(r: &mut [u64; 6], i: Insn) {
    let wide = i.opcode & 7 == 7;
    let b =
        if i.opcode & 8 != 0 { r[usize::from(i.src)] } else { i64::from(i.imm).cast_unsigned() };
    let a = r[usize::from(i.dst)];
    r[usize::from(i.dst)] =
        if wide { model64(i, a, b) } else { u64::from(model32(i, a as u32, b as u32)) };
}

fn model64(i: Insn, a: u64, b: u64) -> u64 {
    let (sa, sb) = (a.cast_signed(), b.cast_signed());
    match (i.opcode & 0xf0, i.off) {
        (0x00, _) => a.wrapping_add(b),
        (0x10, _) => a.wrapping_sub(b),
        (0x20, _) => a.wrapping_mul(b),
        (0x30, 0) => a.checked_div(b).unwrap_or(0),
        (0x30, _) => {
            if b == 0 {
                0
            } else {
                sa.wrapping_div(sb).cast_unsigned()
            }
        }
        (0x40, _) => a | b,
        (0x50, _) => a & b,
        (0x60, _) => a << (b & 63),
        (0x70, _) => a >> (b & 63),
        (0x80, _) => a.wrapping_neg(),
        (0x90, 0) => a.checked_rem(b).unwrap_or(a),
        (0x90, _) => {
            if b == 0 {
                a
            } else {
                sa.wrapping_rem(sb).cast_unsigned()
            }
        }
        (0xa0, _) => a ^ b,
        (0xb0, 8) => i64::from(b as i8).cast_unsigned(),
        (0xb0, 16) => i64::from(b as i16).cast_unsigned(),
        (0xb0, 32) => i64::from(b as i32).cast_unsigned(),
        (0xb0, _) => b,
        _ => (sa >> (b & 63)).cast_unsigned(),
    }
}

fn model32(i: Insn, a: u32, b: u32) -> u32 {
    let (sa, sb) = (a.cast_signed(), b.cast_signed());
    match (i.opcode & 0xf0, i.off) {
        (0x00, _) => a.wrapping_add(b),
        (0x10, _) => a.wrapping_sub(b),
        (0x20, _) => a.wrapping_mul(b),
        (0x30, 0) => a.checked_div(b).unwrap_or(0),
        (0x30, _) => {
            if b == 0 {
                0
            } else {
                sa.wrapping_div(sb).cast_unsigned()
            }
        }
        (0x40, _) => a | b,
        (0x50, _) => a & b,
        (0x60, _) => a << (b & 31),
        (0x70, _) => a >> (b & 31),
        (0x80, _) => a.wrapping_neg(),
        (0x90, 0) => a.checked_rem(b).unwrap_or(a),
        (0x90, _) => {
            if b == 0 {
                a
            } else {
                sa.wrapping_rem(sb).cast_unsigned()
            }
        }
        (0xa0, _) => a ^ b,
        (0xb0, 8) => i32::from(b as i8).cast_unsigned(),
        (0xb0, 16) => i32::from(b as i16).cast_unsigned(),
        (0xb0, _) => b,
        _ => (sa >> (b & 31)).cast_unsigned(),
    }
}

fn start_value() -> impl Strategy<Value = u64> {
    let edges = [0, 1, u64::MAX, 1 << 63, 1 << 31, 0xffff_ffff, 0x8000_0000_8000_0000];
    prop_oneof![proptest::sample::select(edges.to_vec()), any::<u64>()]
}

/// All registers folded into r0, as the programs do it at their end.
fn folded(r: &[u64; 6]) -> u64 {
    r[1..].iter().fold(r[0], |sum, r| sum.wrapping_mul(31).wrapping_add(*r))
}

fn run(start: &[u64; 6], ops: &[Insn], known: bool) -> u64 {
    let mut insns = vec![];
    for (r, value) in (0u8..).zip(start) {
        // r1 points at the values in memory and is loaded last.
        if known {
            insns.push(insn(0x18, r, 0, 0, *value as i32));
            insns.push(insn(0, 0, 0, 0, (value >> 32) as i32));
        } else if r != 1 {
            insns.push(insn(0x79, r, 1, i16::from(r) * 8, 0));
        }
    }
    if !known {
        insns.push(insn(0x79, 1, 1, 8, 0));
    }
    insns.extend_from_slice(ops);
    for r in 1..6 {
        insns.push(insn(0x27, 0, 0, 0, 31));
        insns.push(insn(0x0f, 0, r, 0, 0));
    }
    insns.push(insn(0x95, 0, 0, 0, 0));
    let code = compile_plain(&unverified(&insns, &|_, _| None)).unwrap();
    let bytes = code.resolve(|target| panic!("no {target:?} here"));
    let pages = Pages::new(bytes.len().next_multiple_of(4096));
    pages.write(0, &bytes);
    pages.executable();
    // SAFETY: the page holds a function of exactly this type that reads six words.
    let function: extern "sysv64" fn(*const u64, u64) -> u64 =
        unsafe { std::mem::transmute(pages.address()) };
    function(start.as_ptr(), 48)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arithmetic_is_the_model(
        start in proptest::array::uniform6(start_value()),
        ops in proptest::collection::vec(operation(), 1..24),
    ) {
        let mut r = start;
        ops.iter().for_each(|i| model(&mut r, *i));
        prop_assert_eq!(run(&start, &ops, false), folded(&r), "from memory");
        prop_assert_eq!(run(&start, &ops, true), folded(&r), "known");
    }
}
