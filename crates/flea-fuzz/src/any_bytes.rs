//! Any bytes as instructions: each gets a verdict, in finite time and without a panic; what is
//! accepted does what was believed.
//!
//! Bytes come from bare chance, from chance within the encoding, and from programs of the
//! generator of which a few bytes are changed: the second and third get past the first checks.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use anyhow::Result;
use flea_generate::{Random, Style, maps};
use flea_object::disasm;
use flea_object::insn::Insn;
use flea_object::spec::{MapSpec, Program, ProgramKind};
use flea_object::validate::validate;
use flea_verifier::{Context, verify};

use crate::campaign::{Failure, Fuzzer, Kind, Outcome};
use crate::cpu::thread_time;
use crate::machines::{self, Tested};
use crate::minimise::minimise;
use crate::text;

/// CPU time: more than a million instructions need in a build without optimisation, by far.
const PATIENCE: Duration = Duration::from_secs(120);
/// What a program may be given.
const CONTEXTS: [(Context, &str); 4] = [
    (Context::Tracing { n_args: 12, n_results: 0, session: false }, "ctx 12"),
    (Context::Tracing { n_args: 3, n_results: 1, session: true }, "ctx 3 result session"),
    (Context::PtRegs, "regs"),
    (Context::Memory { size_bytes: 32 }, "mem 32"),
];
const KINDS: [ProgramKind; 6] = [
    ProgramKind::Fentry,
    ProgramKind::Fsession,
    ProgramKind::Uprobe,
    ProgramKind::FmodRet,
    ProgramKind::Fexit,
    ProgramKind::Uretprobe,
];

/// The fuzzer.
pub struct AnyBytes {
    specs: Vec<MapSpec>,
    n_well_formed: u64,
    slowest: (Duration, u64),
}

impl Default for AnyBytes {
    fn default() -> Self {
        Self::new()
    }
}

impl AnyBytes {
    /// For the generator's maps.
    #[must_use]
    pub fn new() -> Self {
        Self { specs: maps(), n_well_formed: 0, slowest: (Duration::ZERO, 0) }
    }

    fn failure(&self, program: &Program, seed: u64, seen: String, kind: Kind) -> Failure {
        let (context, line) = context(seed);
        let fails = |insns: &[Insn]| {
            let program = Program { insns: insns.to_vec(), ..program.clone() };
            match judged(&program, &self.specs, context, seed) {
                Ok(Tested::Stray(_)) => kind == Kind::UnsafeAccept,
                Ok(_) => false,
                Err(_) => kind == Kind::Misbehaviour,
            }
        };
        let small = minimise(&program.insns, fails);
        let input = text::case("found by the bytes fuzzer", line, &self.specs, &small, "?");
        Failure { kind, seen, input }
    }
}

fn context(seed: u64) -> (Context, &'static str) {
    CONTEXTS[(seed % 4) as usize]
}

/// The instructions of `seed`.
fn instructions(seed: u64) -> Vec<Insn> {
    let mut random = Random::new(seed);
    match random.below(8) {
        0 => (0..random.below(24)).map(|_| Insn::decode(random.word().to_le_bytes())).collect(),
        1 => (0..1 + random.below(16)).flat_map(|_| likely(&mut random)).collect(),
        _ => mutated(&mut random),
    }
}

/// A known opcode with fields that often mean something.
fn likely(random: &mut Random) -> Vec<Insn> {
    let mut insn = Insn {
        opcode: random.byte(),
        dst: random.byte() % 12,
        src: random.pick(&[0, 0, 1, 2, 6, 10]),
        off: random.pick(&[0, 0, 0, 1, -8, -16, 8, 2]),
        imm: random.imm(),
    };
    if random.chance(50) {
        insn.imm = random.pick(&[0, 0, 1, 16, 32]);
    }
    if insn.is_lddw() { vec![insn, Insn { imm: 0, ..Insn::default() }] } else { vec![insn] }
}

/// A program with a few changed bytes, or instructions moved, doubled and left out.
fn mutated(random: &mut Random) -> Vec<Insn> {
    let style = random.pick(&[Style::Careful, Style::Careless]);
    let mut insns = flea_generate::program(random, style).insns;
    for _ in 0..1 + random.below(4) {
        let at = random.index(insns.len());
        match random.below(6) {
            0 => {
                let insn = insns[at];
                insns.insert(random.index(insns.len()), insn);
            }
            1 if insns.len() > 1 => {
                insns.remove(at);
            }
            2 => insns[at].imm = random.imm(),
            3 => insns[at].off = random.pick(&[-1, 0, 1, 7, -8, i16::MIN, i16::MAX]),
            _ => {
                let mut bytes = insns[at].encode();
                bytes[random.index(8)] = random.byte();
                insns[at] = Insn::decode(bytes);
            }
        }
    }
    insns
}

/// `Err` is a panic's message.
fn judged(
    program: &Program,
    specs: &[MapSpec],
    context: Context,
    seed: u64,
) -> Result<Tested, String> {
    let whole = || {
        let _ = disasm::listing(&program.insns);
        let well_formed = validate(&program.insns).is_ok();
        let verdict = verify(program, specs, context);
        if verdict.is_ok() && !well_formed {
            return Tested::Stray("accepted, and no sequence of instructions".to_owned());
        }
        match verdict {
            Ok(_) => machines::run(program, specs, context, seed),
            Err(_) => Tested::Refused,
        }
    };
    catch_unwind(AssertUnwindSafe(whole)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        format!("panicked: {}", text.unwrap_or_default())
    })
}

impl Fuzzer for AnyBytes {
    fn name(&self) -> &'static str {
        "bytes"
    }

    fn judge(&mut self, seed: u64) -> Result<Outcome> {
        let insns = instructions(seed);
        self.n_well_formed += u64::from(validate(&insns).is_ok());
        let kind = KINDS[(seed / 4 % 6) as usize];
        let program = Program { name: "bytes".into(), kind, insns, ..Program::default() };
        let begun = thread_time();
        let judged = judged(&program, &self.specs, context(seed).0, seed);
        let took = thread_time().saturating_sub(begun);
        self.slowest = self.slowest.max((took, seed));
        Ok(match judged {
            Err(panic) => Outcome::Failed(self.failure(&program, seed, panic, Kind::Misbehaviour)),
            Ok(Tested::Stray(seen)) => {
                Outcome::Failed(self.failure(&program, seed, seen, Kind::UnsafeAccept))
            }
            Ok(_) if took > PATIENCE => {
                let input = text::program(&program.insns).join("\n");
                let seen = format!("{} s for a verdict", took.as_secs());
                Outcome::Failed(Failure { kind: Kind::Misbehaviour, seen, input })
            }
            Ok(Tested::Refused) => Outcome::Refused,
            Ok(Tested::Right | Tested::TooManyStates) => Outcome::Accepted,
        })
    }

    fn summary(&self) -> String {
        format!(
            "{} well-formed; the slowest verdict and its runs took {:.3} s of a CPU (seed {})\n",
            self.n_well_formed,
            self.slowest.0.as_secs_f64(),
            self.slowest.1
        )
    }
}
