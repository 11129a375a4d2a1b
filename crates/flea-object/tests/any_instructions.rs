//! Random instructions: nothing that takes instructions panics, and what [`validate`] lets
//! through, the interpreter runs or traps on.
#![allow(clippy::unwrap_used, reason = "a test panics where its input is not as expected")]

use flea_object::asm::{Asm, Reg};
use flea_object::disasm;
use flea_object::insn::Insn;
use flea_object::interp::{Interpreter, Memory, NoHost, Protection};
use flea_object::opcode as op;
use flea_object::validate::{function_starts, validate};
use proptest::prelude::*;

/// Any bits at all.
fn any_insn() -> impl Strategy<Value = Insn> {
    any::<[u8; 8]>().prop_map(Insn::decode)
}

/// Opcodes that exist, fields that are mostly as they should be.
fn likely_insn() -> impl Strategy<Value = Insn> {
    let opcodes: Vec<u8> = (0..=u8::MAX).filter(|&o| takes_any_operands(o)).collect();
    let imm = prop_oneof![Just(0), Just(1), 16..17, -8..64i32, any::<i32>()];
    let off = prop_oneof![6 => Just(0i16), 1 => Just(1), 1 => Just(8), 2 => -20..20i16];
    (prop::sample::select(opcodes), 0..10u8, 0..11u8, off, imm).prop_map(
        |(opcode, dst, src, off, imm)| {
            let mut insn = Insn { opcode, dst, src, off, imm };
            if opcode & op::SOURCE_MASK == op::K || insn.class() == op::ST {
                insn.src = 0;
            } else {
                insn.imm = 0;
            }
            if matches!(insn.class(), op::LDX | op::STX) {
                insn.src = src;
                insn.imm = if insn.mode() == op::ATOMIC { imm & 0x51 } else { 0 };
            }
            insn
        },
    )
}

/// Whether `validate` knows the opcode as a whole instruction.
fn takes_any_operands(opcode: u8) -> bool {
    opcode != op::LDDW
        && [(0, 0, 0), (0, 0, 16)].into_iter().any(|(src, off, imm)| {
            let exit = Insn { opcode: op::EXIT_OP, ..Insn::default() };
            validate(&[Insn { opcode, dst: 0, src, off, imm }, exit, exit]).is_ok()
        })
}

fn check(insns: &[Insn]) -> bool {
    let _ = disasm::listing(insns);
    let Ok(mut interpreter) = Interpreter::new(insns) else { return false };
    assert_eq!(function_starts(insns)[0], 0);
    interpreter.max_steps = 500;
    let mut memory = Memory::new();
    let address = memory.add(vec![0x5a; 64], Protection::ReadWrite);
    let _ = interpreter.run([address, 64, address + 32, u64::MAX, 1], &mut memory, &mut NoHost);
    true
}

#[test]
fn most_opcodes_are_tried() {
    assert!((0..=u8::MAX).filter(|&o| takes_any_operands(o)).count() > 90);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bits(insns in prop::collection::vec(any_insn(), 0..12)) {
        check(&insns);
    }

    #[test]
    fn likely_programs(mut insns in prop::collection::vec(likely_insn(), 0..40)) {
        insns.push(Insn { opcode: op::EXIT_OP, ..Insn::default() });
        check(&insns);
    }

    /// One instruction at a time, so that nearly all pass `validate`.
    #[test]
    fn single_instructions(insn in likely_insn()) {
        let mut asm = Asm::new();
        asm.mov64_imm(Reg::R0, 7).raw(insn).exit().exit();
        check(&asm.finish().unwrap());
    }

    /// 32-bit arithmetic is 64-bit arithmetic on truncated operands, truncated, for the
    /// operations where that is so.
    #[test]
    fn alu32_is_truncated_alu64(a: u64, b: u64, code in prop::sample::select(vec![op::ADD, op::SUB, op::MUL, op::OR, op::AND, op::XOR, op::MOV])) {
        let run = |class| {
            let mut asm = Asm::new();
            asm.lddw(Reg::R0, a).lddw(Reg::R1, b);
            asm.raw(Insn { opcode: class | op::X | code, dst: 0, src: 1, off: 0, imm: 0 }).exit();
            let insns = asm.finish().unwrap();
            Interpreter::new(&insns).unwrap().run([0; 5], &mut Memory::new(), &mut NoHost).unwrap()
        };
        prop_assert_eq!(run(op::ALU), run(op::ALU64) & 0xffff_ffff);
    }
}
