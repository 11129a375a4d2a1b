//! What is printed of a program is that program to the assembler of the verifier's cases.
#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a test's assembler: a wrong number or a mistake in a case fails the test"
)]

#[path = "../../flea-verifier/tests/asm/mod.rs"]
mod asm;

use flea_fuzz::text::program;
use flea_generate::{Random, Style};
use flea_object::insn::Insn;

#[test]
fn programs_are_read_as_they_were() {
    for seed in 0..300 {
        let insns = flea_generate::program(&mut Random::new(seed), Style::Careless).insns;
        let lines = program(&insns);
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        assert_eq!(asm::assemble(&lines), insns, "seed {seed}:\n{}", lines.join("\n"));
    }
}

#[test]
fn nonsense_is_read_as_it_was() {
    let mut random = Random::new(1);
    for _ in 0..3000 {
        let insns: Vec<Insn> = (0..3).map(|_| Insn::decode(random.word().to_le_bytes())).collect();
        let lines = program(&insns);
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        assert_eq!(asm::assemble(&lines), insns, "{}", lines.join("\n"));
    }
}
