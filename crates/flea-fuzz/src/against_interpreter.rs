//! Accepted programs on machines full of random numbers: every access in its object, every
//! register inside what the verifier believed there, and the compiled code returns what the
//! interpreter returns.

use std::process::Command;

use anyhow::Result;
use flea_generate::{Random, Style, maps};
use flea_object::insn::Insn;
use flea_object::spec::{MapSpec, Program, ProgramKind};
use flea_verifier::Context;

use crate::campaign::{Failure, Fuzzer, Kind, Outcome};
use crate::compiled::{Ran, Runner};
use crate::machines::{self, RUNS, Tested};
use crate::minimise::minimise;
use crate::text;

/// Three arguments and a result, at both ends of a call: what an fsession program sees.
const CONTEXT: Context = Context::Tracing { n_args: 3, n_results: 1, session: true };
const CONTEXT_LINE: &str = "ctx 3 result session";

/// The fuzzer.
pub struct AgainstInterpreter {
    specs: Vec<MapSpec>,
    runner: Runner,
    n_compiled: u64,
    n_too_many: u64,
}

/// What came of one program.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Judged {
    Right,
    Refused,
    TooManyStates,
    /// The machine was as the verifier had excluded.
    Stray(String),
    Differ {
        interpreted: u64,
        compiled: u64,
    },
    Lost(String),
}

impl AgainstInterpreter {
    /// `command` starts a process that runs programs.
    #[must_use]
    pub fn new(command: fn() -> Result<Command>) -> Self {
        let specs = maps();
        let runner = Runner::new(command, &specs);
        Self { specs, runner, n_compiled: 0, n_too_many: 0 }
    }

    fn compare(&mut self, insns: &[Insn], seed: u64, comparable: bool) -> Result<Judged> {
        match machines::run(&program(insns, seed), &self.specs, CONTEXT, seed) {
            Tested::Right => {}
            Tested::Refused => return Ok(Judged::Refused),
            Tested::TooManyStates => return Ok(Judged::TooManyStates),
            Tested::Stray(seen) => return Ok(Judged::Stray(seen)),
        }
        Ok(match self.runner.run(insns)? {
            Ran::Both { interpreted, compiled } if comparable && interpreted != compiled => {
                Judged::Differ { interpreted, compiled }
            }
            Ran::Both { .. } => {
                self.n_compiled += 1;
                Judged::Right
            }
            // Its context has other slots, and its result is that of an fentry program.
            Ran::Refused => Judged::Right,
            Ran::Lost(message) => Judged::Lost(message),
        })
    }

    fn failure(&mut self, insns: &[Insn], seed: u64, judged: &Judged) -> Failure {
        let same = |again: &Judged| std::mem::discriminant(again) == std::mem::discriminant(judged);
        let small =
            minimise(insns, |p| self.compare(p, seed, true).is_ok_and(|again| same(&again)));
        let seen =
            self.compare(&small, seed, true).map_or_else(|e| e.to_string(), |j| format!("{j:?}"));
        let kind = match judged {
            Judged::Stray(_) => Kind::UnsafeAccept,
            _ => Kind::Disagreement,
        };
        let name = "found by the interpreter fuzzer";
        let input = text::case(name, CONTEXT_LINE, &self.specs, &small, "ok");
        Failure { kind, seen: format!("{judged:?}; made smaller: {seen}"), input }
    }
}

fn program(insns: &[Insn], seed: u64) -> Program {
    // The result of every other program is looked at.
    let kind = if seed & 2 == 0 { ProgramKind::FmodRet } else { ProgramKind::Fsession };
    Program {
        name: "random".into(),
        section: "fsession/f".into(),
        kind,
        insns: insns.to_vec(),
        ..Program::default()
    }
}

impl Fuzzer for AgainstInterpreter {
    fn name(&self) -> &'static str {
        "interpreter"
    }

    fn judge(&mut self, seed: u64) -> Result<Outcome> {
        let style = if seed.is_multiple_of(2) { Style::Careful } else { Style::Careless };
        let generated = flea_generate::program(&mut Random::new(seed), style);
        let judged = self.compare(&generated.insns, seed, generated.comparable)?;
        Ok(match &judged {
            Judged::Right => Outcome::Accepted,
            Judged::Refused => Outcome::Refused,
            Judged::TooManyStates => {
                self.n_too_many += 1;
                Outcome::Accepted
            }
            _ => Outcome::Failed(self.failure(&generated.insns, seed, &judged)),
        })
    }

    fn summary(&self) -> String {
        format!(
            "each on {RUNS} machines; {} compiled and compared, {} with too many states\n",
            self.n_compiled, self.n_too_many
        )
    }
}
