//! What the compiler leaves out because of known ranges: random programs that narrow numbers,
//! branch on them, divide by them and use them as keys give what the interpreter gives.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::cell::Cell;

use flea_image::compile_plain;
use flea_object::insn::Insn;
use flea_object::interp::{Host, Interpreter, Memory, Protection};
use flea_object::spec::{MapIdx, Program};
use flea_verifier::facts::Operands;
use flea_verifier::{Context, Verified, verify};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use support::arithmetic::operation;
use support::{Pages, insn};

const MEMORY_BYTES: u32 = 48;
const N_REGS: u8 = 6;

/// The programs have neither helpers nor maps.
struct NoHost;

impl Host for NoHost {
    fn call(&mut self, helper: i32, _: [u64; 5], _: &mut Memory) -> Result<u64, String> {
        Err(format!("helper {helper}"))
    }

    fn map_handle(&self, _: MapIdx) -> Option<u64> {
        None
    }

    fn map_value_address(&self, _: MapIdx) -> Option<u64> {
        None
    }
}

/// One piece of a program: an instruction, or one that jumps over some that follow.
#[derive(Clone, Debug)]
enum Piece {
    Insn(Insn),
    /// The opcode, the registers, the immediate, and how many pieces are jumped over.
    Jump(Insn, usize),
}

fn reg() -> impl Strategy<Value = u8> {
    0..N_REGS
}

/// `r &= imm`, `r |= imm`, `r >>= imm`: what makes ranges known. 64 and 32 bits.
fn narrowing() -> impl Strategy<Value = Piece> {
    let mask = prop_oneof![Just(0), Just(1), Just(7), Just(255), Just(-2), any::<i32>()];
    let class = prop_oneof![Just(7u8), Just(4)];
    (class, 0..3, reg(), mask).prop_map(|(class, what, reg, mask)| {
        let one = match what {
            0 => insn(0x50 | class, reg, 0, 0, mask),
            1 => insn(0x40 | class, reg, 0, 0, mask & 15),
            _ => insn(0x70 | class, reg, 0, 0, mask & 31),
        };
        Piece::Insn(one)
    })
}

/// Division and remainder by a register, signed and unsigned; `w1 = w2`.
fn using() -> impl Strategy<Value = Piece> {
    let class = prop_oneof![Just(7u8), Just(4)];
    (class, 0..5, reg(), reg()).prop_map(|(class, what, dst, src)| {
        let one = match what {
            0 => insn(0x38 | class, dst, src, 0, 0),
            1 => insn(0x98 | class, dst, src, 0, 0),
            2 => insn(0x38 | class, dst, src, 1, 0),
            3 => insn(0x98 | class, dst, src, 1, 0),
            _ => insn(0xbc, dst, src, 0, 0),
        };
        Piece::Insn(one)
    })
}

fn jump() -> impl Strategy<Value = Piece> {
    let cond = prop_oneof![
        Just(0x10u8),
        Just(0x20),
        Just(0x30),
        Just(0x40),
        Just(0x50),
        Just(0x60),
        Just(0x70),
        Just(0xa0),
        Just(0xb0),
        Just(0xc0),
        Just(0xd0)
    ];
    let class = prop_oneof![Just(5u8), Just(6)];
    let imm = prop_oneof![-1..300, any::<i32>()];
    (cond, class, any::<bool>(), reg(), reg(), imm, 1..6usize).prop_map(
        |(cond, class, by_reg, dst, src, imm, over)| {
            let x = if by_reg { 8 } else { 0 };
            let (src, imm) = if by_reg { (src, 0) } else { (0, imm) };
            Piece::Jump(insn(cond | class | x, dst, src, 0, imm), over)
        },
    )
}

fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    let piece = prop_oneof![
        3 => narrowing(),
        3 => using(),
        2 => jump(),
        1 => operation().prop_map(Piece::Insn),
    ];
    proptest::collection::vec(piece, 4..30)
}

/// Loads six registers from memory, runs the pieces, folds the registers into r0.
fn program(pieces: &[Piece]) -> Program {
    let mut insns = vec![];
    for r in (0..N_REGS).filter(|r| *r != 1).chain([1]) {
        insns.push(insn(0x79, r, 1, 8 * i16::from(r), 0));
    }
    for (i, piece) in pieces.iter().enumerate() {
        insns.push(match piece {
            Piece::Insn(one) => *one,
            Piece::Jump(one, over) => {
                let over = (*over).min(pieces.len() - 1 - i);
                Insn { off: over as i16, ..*one }
            }
        });
    }
    for r in 1..N_REGS {
        insns.push(insn(0x27, 0, 0, 0, 31));
        insns.push(insn(0x0f, 0, r, 0, 0));
    }
    insns.push(insn(0x95, 0, 0, 0, 0));
    Program { insns, ..Program::default() }
}

fn interpret(program: &Program, words: &[u64; 6]) -> u64 {
    let mut memory = Memory::new();
    let bytes = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let at = memory.add(bytes, Protection::ReadOnly);
    let args = [at, u64::from(MEMORY_BYTES), 0, 0, 0];
    Interpreter::new(&program.insns).unwrap().run(args, &mut memory, &mut NoHost).unwrap()
}

fn run(verified: &Verified, words: &[u64; 6]) -> u64 {
    let bytes = compile_plain(verified).unwrap().resolve(|target| panic!("no {target:?} here"));
    let pages = Pages::new(bytes.len().next_multiple_of(4096));
    pages.write(0, &bytes);
    pages.executable();
    // SAFETY: the page holds a function of exactly this type that reads six words.
    let function: extern "sysv64" fn(*const u64, u64) -> u64 =
        unsafe { std::mem::transmute(pages.address()) };
    function(words.as_ptr(), u64::from(MEMORY_BYTES))
}

fn word() -> impl Strategy<Value = u64> {
    let edges = [0, 1, 255, u64::MAX, 1 << 63, 1 << 31, 0xffff_ffff, 0x1_0000_0000];
    prop_oneof![proptest::sample::select(edges.to_vec()), any::<u64>(), 0..300u64]
}

#[test]
fn what_is_left_out_is_not_missed() {
    let (n_known, n_decided) = (Cell::new(0), Cell::new(0));
    let mut runner = TestRunner::new_with_rng(
        Config { cases: 600, failure_persistence: None, ..Config::default() },
        proptest::test_runner::TestRng::deterministic_rng(
            proptest::test_runner::RngAlgorithm::ChaCha,
        ),
    );
    let outcome = runner.run(&(pieces(), proptest::array::uniform6(word())), |(pieces, words)| {
        let program = program(&pieces);
        let context = Context::Memory { size_bytes: MEMORY_BYTES };
        let Ok(verified) = verify(&program, &[], context) else {
            // A shift by a number that is too large, a constant divisor of 0.
            return Err(TestCaseError::reject("not accepted"));
        };
        let operands: Vec<Operands> =
            (0..).take(program.insns.len()).map(|i| verified.operands(i)).collect();
        let known = |o: &&Operands| (o.min, o.max) != (0, u64::MAX);
        n_known.set(n_known.get() + operands.iter().filter(known).count());
        n_decided.set(n_decided.get() + operands.iter().filter(|o| o.branch.is_some()).count());
        prop_assert_eq!(run(&verified, &words), interpret(&program, &words), "{:#?}", program);
        Ok(())
    });
    outcome.unwrap();
    let (n_known, n_decided) = (n_known.get(), n_decided.get());
    assert!(n_known > 1000 && n_decided > 100, "{n_known} ranges, {n_decided} branches");
}
