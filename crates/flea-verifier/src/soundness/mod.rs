//! The verifier against running programs: random programs that it accepts run in a checking
//! interpreter. No access may leave its object, and before every instruction at least one of
//! the states that the verifier had there must describe the machine: every register, every
//! spilled register, every byte known to be zero, and the equality of numbers with one id. What
//! the program returns is in the range that was said.

#![allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]

mod generate;
mod interpret;

use flea_object::spec::{MapKind, MapSpec, Program, ProgramKind};
use proptest::prelude::*;

use crate::Context;
use crate::cfg::Cfg;
use crate::explore::{Explorer, Patience};
use crate::liveness::{Liveness, ProgramResult};
use crate::machine::Machine;
use crate::op::{Op, decode};
use crate::state::State;
use generate::Random;
use interpret::Interpreter;

pub(crate) const CONTEXT: Context = Context::Tracing { n_args: 3, n_results: 1, session: true };

/// A direct array, a hash with 8-byte keys, a ring buffer, a read-only array.
pub(crate) fn maps() -> Vec<MapSpec> {
    let map = |name: &str, kind, key, value, max_entries, read_only| MapSpec {
        name: name.into(),
        kind,
        key_size_bytes: key,
        value_size_bytes: value,
        max_entries,
        flags: 0,
        init: None,
        read_only,
    };
    vec![
        map(".data", MapKind::Array, 4, 64, 1, false),
        map("hash", MapKind::Hash, 8, 32, 4, false),
        map("rb", MapKind::RingBuf, 0, 0, 4096, false),
        map(".rodata", MapKind::Array, 4, 16, 1, true),
    ]
}

fn program(insns: Vec<flea_object::insn::Insn>) -> Program {
    Program {
        name: "random".into(),
        section: "fsession/f".into(),
        kind: ProgramKind::Fsession,
        target: None,
        insns,
        lines: Vec::new(),
        ..Program::default()
    }
}

/// Verifies and keeps every state; `None` where the program is refused.
fn beliefs(program: &Program) -> Option<(Vec<Op>, Vec<Vec<State>>)> {
    let maps = maps();
    let ops = decode(&program.insns).ok()?;
    let cfg = Cfg::new(&ops).ok()?;
    let live = Liveness::new(&ops, &cfg, ProgramResult::of(program.kind));
    let beliefs = [Patience::Short, Patience::Endless].into_iter().find_map(|patience| {
        let machine = Machine::new(&maps, CONTEXT, &ops, &cfg);
        let mut explorer = Explorer::new(machine, program, &cfg, &live, patience);
        explorer.beliefs = Some(vec![Vec::new(); ops.len()]);
        explorer.run().ok()?;
        explorer.beliefs.take()
    });
    Some((ops, beliefs?))
}

/// Runs the program of `seed` if it is accepted; whether it was.
fn check(seed: u64, style: generate::Style) -> bool {
    let insns = generate::program(&mut Random::new(seed), style);
    // The result of every other program is looked at.
    let kind = if seed.is_multiple_of(2) { ProgramKind::FmodRet } else { ProgramKind::Fsession };
    let program = Program { kind, ..program(insns) };
    let verdict = crate::verify(&program, &maps(), CONTEXT);
    let Some((ops, beliefs)) = beliefs(&program) else {
        assert!(verdict.is_err(), "seed {seed}: two verdicts");
        return false;
    };
    let Ok(verified) = verdict else { return false };
    for run in 0..6 {
        let mut interpreter = Interpreter::new(&ops, Random::new(seed ^ (run << 56) ^ 0x5eed));
        let outcome = interpreter.run(&beliefs, &verified).and_then(|r0| {
            let range = verified.return_range();
            let inside = range.contains(&r0.cast_signed());
            inside.then_some(()).ok_or_else(|| format!("returns {r0:#x}, not in {range:?}"))
        });
        if let Err(e) = outcome {
            let listing = flea_object::disasm::listing(&program.insns);
            panic!("seed {seed} run {run}: {e}\n{listing}");
        }
    }
    true
}

#[test]
fn accepted_programs_do_what_was_believed() {
    let mut accepted = 0;
    for seed in 0..1500 {
        accepted += u32::from(check(seed, generate::Style::Careful));
    }
    println!("{accepted} of 1500 careful programs were accepted");
    assert!(accepted > 500, "only {accepted} of 1500 were accepted: nothing is tested");
}

#[test]
fn accepted_programs_with_mistakes_do_what_was_believed() {
    let mut accepted = 0;
    for seed in 0..3000 {
        accepted += u32::from(check(seed, generate::Style::Careless));
    }
    println!("{accepted} of 3000 careless programs were accepted");
    assert!(accepted > 100, "only {accepted} of 3000 were accepted: nothing is tested");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn programs_of_any_seed(seed in any::<u64>()) {
        check(seed, generate::Style::Careful);
        check(seed, generate::Style::Careless);
    }

    #[test]
    fn any_bytes_get_a_verdict(words in prop::collection::vec(any::<[u8; 8]>(), 0..24)) {
        let insns = words.into_iter().map(flea_object::insn::Insn::decode).collect();
        let _ = crate::verify(&program(insns), &maps(), CONTEXT);
    }

    #[test]
    fn nearly_valid_bytes_get_a_verdict(seed in any::<u64>(), edits in 1..6usize) {
        let mut random = Random::new(seed);
        let mut insns = generate::program(&mut random, generate::Style::Careless);
        for _ in 0..edits {
            let at = random.below(insns.len() as u64) as usize;
            let mut bytes = insns[at].encode();
            bytes[random.below(8) as usize] = random.next() as u8;
            insns[at] = flea_object::insn::Insn::decode(bytes);
        }
        let program = program(insns);
        let _ = crate::verify(&program, &maps(), CONTEXT);
        let memory = Context::Memory { size_bytes: 32 };
        let _ = crate::verify(&program, &maps(), memory);
    }
}
