//! A moment of each fuzzer, with fixed seeds.

use flea_generate::{Random, Style, maps};
use flea_object::insn::{Insn, PSEUDO_FUNC};
use flea_object::spec::{Program, ProgramKind};
use proptest::prelude::*;

use super::{Beliefs, NoBeliefs};
use crate::Context;

const CONTEXT: Context = Context::Tracing { n_args: 3, n_results: 1, session: true };

fn program(insns: Vec<Insn>) -> Program {
    Program {
        name: "random".into(),
        section: "fsession/f".into(),
        kind: ProgramKind::Fsession,
        insns,
        ..Program::default()
    }
}

/// Runs the program of `seed` if it is accepted; whether it was.
fn check(seed: u64, style: Style) -> bool {
    check_one(seed, flea_generate::program(&mut Random::new(seed), style).insns)
}

fn check_one(seed: u64, insns: Vec<Insn>) -> bool {
    // The result of every other program is looked at.
    let kind = if seed.is_multiple_of(2) { ProgramKind::FmodRet } else { ProgramKind::Fsession };
    let program = Program { kind, ..program(insns) };
    let maps = maps();
    let beliefs = match Beliefs::of(&program, &maps, CONTEXT) {
        Ok(beliefs) => beliefs,
        Err(NoBeliefs::TwoVerdicts) => panic!("seed {seed}: two verdicts"),
        Err(NoBeliefs::Refused(_) | NoBeliefs::TooMany) => return false,
    };
    for run in 0..6 {
        let mut random = Random::new(seed ^ (run << 56) ^ 0x5eed);
        if let Err(e) = beliefs.run(&mut || random.number()) {
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
        accepted += u32::from(check(seed, Style::Careful));
    }
    println!("{accepted} of 1500 careful programs were accepted");
    assert!(accepted > 500, "only {accepted} of 1500 were accepted: nothing is tested");
}

#[test]
fn accepted_programs_with_callbacks_do_what_was_believed() {
    let (mut accepted, mut with_rounds) = (0, 0);
    for seed in 0..600 {
        let style = if seed % 3 == 0 { Style::Careless } else { Style::Careful };
        let insns = flea_generate::program_with_callbacks(&mut Random::new(seed), style).insns;
        let has_rounds = insns.iter().any(|insn| insn.is_lddw() && insn.src == PSEUDO_FUNC);
        let ran = check_one(seed, insns);
        accepted += u32::from(ran);
        with_rounds += u32::from(ran && has_rounds);
    }
    println!("{accepted} of 600 programs were accepted, {with_rounds} of them with callbacks");
    assert!(with_rounds > 100, "only {with_rounds} of 600 were accepted: nothing is tested");
}

#[test]
fn accepted_programs_with_mistakes_do_what_was_believed() {
    let mut accepted = 0;
    for seed in 0..3000 {
        accepted += u32::from(check(seed, Style::Careless));
    }
    println!("{accepted} of 3000 careless programs were accepted");
    assert!(accepted > 100, "only {accepted} of 3000 were accepted: nothing is tested");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn programs_of_any_seed(seed in any::<u64>()) {
        check(seed, Style::Careful);
        check(seed, Style::Careless);
    }

    #[test]
    fn any_bytes_get_a_verdict(words in prop::collection::vec(any::<[u8; 8]>(), 0..24)) {
        let insns = words.into_iter().map(Insn::decode).collect();
        let _ = crate::verify(&program(insns), &maps(), CONTEXT);
    }

    #[test]
    fn nearly_valid_bytes_get_a_verdict(seed in any::<u64>(), edits in 1..6usize) {
        let mut random = Random::new(seed);
        let mut insns = flea_generate::program(&mut random, Style::Careless).insns;
        for _ in 0..edits {
            let at = random.below(insns.len() as u64) as usize;
            let mut bytes = insns[at].encode();
            bytes[random.below(8) as usize] = random.word() as u8;
            insns[at] = Insn::decode(bytes);
        }
        let program = program(insns);
        let _ = crate::verify(&program, &maps(), CONTEXT);
        let memory = Context::Memory { size_bytes: 32 };
        let _ = crate::verify(&program, &maps(), memory);
    }
}
