//! Random arithmetic on r0 to r5.

use flea_object::insn::Insn;
use proptest::prelude::*;

use super::insn;

/// One operation of any kind, width and operand.
pub fn operation() -> impl Strategy<Value = Insn> {
    let imm = prop_oneof![Just(0), Just(-1), Just(1), Just(i32::MIN), -70..70, any::<i32>()];
    (0u8..13, any::<bool>(), any::<bool>(), 0u8..6, 0u8..6, imm, 0usize..4).prop_map(
        |(op, wide, reg, dst, src, imm, variant)| {
            let off = match op {
                3 | 9 => [0, 1, 0, 1][variant],
                11 if reg => [0, 8, 16, if wide { 32 } else { 0 }][variant],
                _ => 0,
            };
            // NEG has no operand.
            let reg = reg && op != 8;
            let opcode = op << 4 | if reg { 8 } else { 0 } | if wide { 7 } else { 4 };
            insn(opcode, dst, if reg { src } else { 0 }, off, if reg || op == 8 { 0 } else { imm })
        },
    )
}
