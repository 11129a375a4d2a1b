//! Soundness of the arithmetic: exhaustive at 4 bits, random at 32 and 64.
//!
//! The oracles are written from RFC 9669's text on plain integers, apart from the code under
//! test: [`crate::soundness::meaning`].

#![allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]

use proptest::prelude::*;

use super::compare::Cond;
use super::range::Range;
use super::scalar::{AluOp, Scalar, Width};
use super::tnum::{Tnum, low_bits};
use crate::soundness::meaning::{concrete, holds, sext};

const OPS: [AluOp; 13] = [
    AluOp::Add,
    AluOp::Sub,
    AluOp::Mul,
    AluOp::Div,
    AluOp::Sdiv,
    AluOp::Mod,
    AluOp::Smod,
    AluOp::Or,
    AluOp::And,
    AluOp::Xor,
    AluOp::Lsh,
    AluOp::Rsh,
    AluOp::Arsh,
];

const CONDS: [Cond; 12] = [
    Cond::Eq,
    Cond::Ne,
    Cond::Gt,
    Cond::Ge,
    Cond::Lt,
    Cond::Le,
    Cond::Sgt,
    Cond::Sge,
    Cond::Slt,
    Cond::Sle,
    Cond::Set,
    Cond::Unset,
];

fn apply(op: AluOp, a: &Range<4>, b: &Range<4>) -> Range<4> {
    match op {
        AluOp::Add => a.add(b),
        AluOp::Sub => a.sub(b),
        AluOp::Mul => a.mul(b),
        AluOp::Div => a.udiv(b),
        AluOp::Sdiv => a.sdiv(b),
        AluOp::Mod => a.umod(b),
        AluOp::Smod => a.smod(b),
        AluOp::Or => a.or(b),
        AluOp::And => a.and(b),
        AluOp::Xor => a.xor(b),
        AluOp::Lsh => a.shl(b),
        AluOp::Rsh => a.lshr(b),
        AluOp::Arsh => a.ashr(b),
    }
}

/// Every tristate number, unsigned interval and signed interval of 4 bits, the ones that
/// contradictions and overlaps of two such make, once each.
fn all_small() -> Vec<(Range<4>, Vec<u64>)> {
    let mut basic: Vec<Range<4>> = Vec::new();
    for value in 0..16u64 {
        for mask in 0..16u64 {
            if value & mask == 0 {
                basic.push(Range::from_bits(Tnum { value, mask }));
            }
        }
    }
    for lo in 0..16u64 {
        for hi in lo..16 {
            basic.push(Range::unsigned(lo, hi));
            let (smin, smax) = (lo as i64 - 8, hi as i64 - 8);
            basic.push(Range { smin, smax, ..Range::UNKNOWN }.settled());
        }
    }
    let mut all: Vec<Range<4>> = basic.clone();
    for (i, a) in basic.iter().enumerate() {
        for b in basic.iter().skip(i % 7).step_by(7) {
            all.extend(a.intersect(b));
        }
    }
    let mut unique: Vec<(Range<4>, Vec<u64>)> = Vec::new();
    for r in all {
        if !unique.iter().any(|(u, _)| *u == r) {
            let members = (0..16).filter(|x| r.contains(*x)).collect();
            unique.push((r, members));
        }
    }
    unique
}

#[test]
fn settling_loses_no_member() {
    for lo in 0..16u64 {
        for hi in lo..16 {
            for slo in -8..8i64 {
                for shi in slo..8 {
                    for value in 0..16u64 {
                        for mask in (0..16u64).filter(|m| m & value == 0) {
                            let raw: Range<4> = Range {
                                bits: Tnum { value, mask },
                                umin: lo,
                                umax: hi,
                                smin: slo,
                                smax: shi,
                            };
                            let settled = raw.settle();
                            for x in (0..16).filter(|x| raw.contains(*x)) {
                                assert!(settled.is_some_and(|s| s.contains(x)));
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn every_operation_on_every_small_set() {
    let all = all_small();
    for op in OPS {
        for (a, xs) in &all {
            for (b, ys) in &all {
                let r = apply(op, a, b);
                for &x in xs {
                    for &y in ys {
                        let z = concrete(op, 4, x, y);
                        assert!(r.contains(z), "{x} {op:?} {y} = {z}");
                    }
                }
            }
        }
    }
}

#[test]
fn every_comparison_on_every_small_set() {
    let all = all_small();
    for cond in CONDS {
        for (a, xs) in &all {
            for (b, ys) in &all {
                let refined = Range::refine(cond, a, b);
                for &x in xs {
                    for &y in ys.iter().filter(|y| holds(cond, 4, x, **y)) {
                        let (ra, rb) = refined.expect("a pair takes the branch");
                        assert!(ra.contains(x) && rb.contains(y), "{x} {cond:?} {y}");
                    }
                }
            }
        }
    }
}

#[test]
fn every_small_unary() {
    for (a, xs) in all_small() {
        for &x in &xs {
            assert!(a.neg().contains(x.wrapping_neg() & 15));
            for n in 1..=4 {
                assert!(a.zero_extend(n).contains(x & low_bits(n)));
                assert!(a.sign_extend(n).contains(sext(x, n) as u64 & 15), "{x} from {n}");
            }
        }
    }
}

#[test]
fn a_constant_gives_a_constant() {
    for op in OPS {
        for x in 0..16 {
            for y in 0..16 {
                let r = apply(op, &Range::constant(x), &Range::constant(y));
                assert_eq!(r.as_const(), Some(concrete(op, 4, x, y)), "{x} {op:?} {y}");
            }
        }
    }
}

/// Numbers near the places where orders and halves break.
fn interesting() -> impl Strategy<Value = u64> {
    let edges = prop::sample::select(vec![
        0u64,
        1,
        7,
        0x7f,
        0x80,
        0xff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x1_0000_0000,
        i64::MAX as u64,
        i64::MIN as u64,
        u64::MAX,
        0xffff_ffff_8000_0000,
        0xffff_ffff_0000_0000,
        0x7fff_ffff_ffff_0000,
    ]);
    prop_oneof![
        any::<u64>(),
        0..70u64,
        (edges, -3..=3i64).prop_map(|(e, d)| e.wrapping_add_signed(d)),
        (any::<u32>(), any::<bool>()).prop_map(|(x, s)| if s {
            x as i32 as i64 as u64
        } else {
            u64::from(x)
        }),
    ]
}

/// A set that holds the number beside it: narrowed from "anything" by true statements, so
/// that all of its descriptions are exercised.
fn scalar_with_member() -> impl Strategy<Value = (Scalar, u64)> {
    let step = (0..9u8, interesting());
    (interesting(), prop::collection::vec(step, 0..5)).prop_map(|(x, steps)| {
        let mut s = Scalar::UNKNOWN;
        for (kind, y) in steps {
            s = narrow(s, x, kind, y);
            assert!(s.contains(x));
        }
        (s, x)
    })
}

fn narrow(s: Scalar, x: u64, kind: u8, y: u64) -> Scalar {
    let other = match kind {
        0 => {
            let t = Tnum::new(x, y);
            let wide = s.wide.intersect(&Range::from_bits(t)).expect("x is a member");
            return Scalar::refine(Cond::Eq, Width::W64, &Scalar { wide, ..s }, &Scalar::UNKNOWN)
                .expect("x is a member")
                .0;
        }
        1 => return Scalar::constant(x),
        _ => Scalar::constant(y),
    };
    let conds = [Cond::Ge, Cond::Le, Cond::Sge, Cond::Sle, Cond::Ne, Cond::Set];
    let cond = conds[usize::from(kind) % conds.len()];
    let width = if kind.is_multiple_of(2) { Width::W64 } else { Width::W32 };
    let cond = if holds(cond, bits(width), x, y) { cond } else { cond.opposite() };
    Scalar::refine(cond, width, &s, &other).expect("x takes this branch").0
}

fn bits(width: Width) -> u32 {
    if width == Width::W64 { 64 } else { 32 }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn operations_are_sound((a, x) in scalar_with_member(), (b, y) in scalar_with_member()) {
        for op in OPS {
            for width in [Width::W64, Width::W32] {
                let r = Scalar::alu(op, width, &a, &b);
                let z = concrete(op, bits(width), x, y);
                prop_assert!(r.contains(z), "{x:#x} {op:?} {y:#x} = {z:#x} ({width:?})");
            }
        }
    }

    #[test]
    fn refinement_is_sound((a, x) in scalar_with_member(), (b, y) in scalar_with_member()) {
        for cond in CONDS {
            for width in [Width::W64, Width::W32] {
                let (cond, n) = (cond, bits(width));
                let cond = if holds(cond, n, x, y) { cond } else { cond.opposite() };
                let refined = Scalar::refine(cond, width, &a, &b);
                prop_assert!(refined.is_some(), "{x:#x} {cond:?} {y:#x} ({width:?})");
                let (ra, rb) = refined.expect("checked");
                prop_assert!(ra.contains(x) && rb.contains(y), "{x:#x} {cond:?} {y:#x}");
            }
        }
    }

    #[test]
    fn unary_operations_are_sound((a, x) in scalar_with_member()) {
        prop_assert!(a.neg(Width::W64).contains(x.wrapping_neg()));
        prop_assert!(a.neg(Width::W32).contains(u64::from((x as u32).wrapping_neg())));
        for n in [8, 16, 32, 64] {
            prop_assert!(a.zero_extend(n).contains(x & low_bits(n)));
        }
        for n in [8, 16, 32] {
            let s = sext(x, n) as u64;
            prop_assert!(a.sign_extend(n, Width::W64).contains(s));
            prop_assert!(a.sign_extend(n, Width::W32).contains(s & 0xffff_ffff));
        }
        prop_assert!(a.swap_bytes(16).contains(u64::from((x as u16).swap_bytes())));
        prop_assert!(a.swap_bytes(32).contains(u64::from((x as u32).swap_bytes())));
        prop_assert!(a.swap_bytes(64).contains(x.swap_bytes()));
    }

    #[test]
    fn inclusion_means_inclusion((a, x) in scalar_with_member(), (b, _) in scalar_with_member()) {
        if b.includes(&a) {
            prop_assert!(b.contains(x));
        }
        prop_assert!(Scalar::UNKNOWN.includes(&a) && a.includes(&a));
    }
}
