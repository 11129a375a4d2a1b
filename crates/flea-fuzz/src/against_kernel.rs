//! The same program before our verifier and the running kernel's, and run by both.
//!
//! 1. Both accept: r0 of the kernel, of our interpreter and of our compiled code are one number,
//!    unless it is the kernel's fault that [`differences::veiled`] shows.
//! 2. We accept and the kernel refuses: an unsafe accept, unless it is one of the differences that
//!    [`crate::differences`] lists.
//! 3. The kernel accepts and we refuse: counted by cause; at most 3 % is the aim.

use std::fmt::Write as _;
use std::process::Command;

use anyhow::Result;
use flea_generate::{Generated, Random, Style, map, maps};
use flea_object::insn::{Insn, PSEUDO_MAP, PSEUDO_MAP_VALUE};
use flea_object::spec::{MapIdx, MapSpec, Program, ProgramKind};
use flea_verifier::Context;

use crate::campaign::{Failure, Fuzzer, Kind, Outcome};
use crate::compiled::{Ran, Runner};
use crate::differences;
use crate::kernel::{CONTEXT_WORDS, Kernel, KernelMaps, Loaded, LogLevel, Refusal};
use crate::machines::{self, Tested};
use crate::minimise::minimise;
use crate::tally::Tally;
use crate::text;

/// The shape that both see.
pub const CONTEXT: Context = Context::Tracing { n_args: 12, n_results: 0, session: false };
/// [`CONTEXT`] in a case file.
pub const CONTEXT_LINE: &str = "ctx 12";

/// What came of one program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judged {
    /// Both accept it, and all results are equal or not comparable.
    Agree,
    /// Both accept it, and results differ.
    Differ(Results),
    /// A run did not end as it should.
    Lost(String),
    /// Both refuse it.
    BothRefuse,
    /// Only we accept it: the kernel's reason.
    OnlyWe(String),
    /// Only the kernel accepts it: our reason.
    OnlyKernel(String),
}

/// What a program returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Results {
    /// In the kernel: the low half.
    pub kernel_low: u32,
    /// In the kernel: all of it, where the program stores it.
    pub kernel: Option<u64>,
    /// In our interpreter.
    pub interpreted: u64,
    /// In our compiled code.
    pub compiled: u64,
}

impl Results {
    fn agrees(self, ours: u64) -> bool {
        u64::from(self.kernel_low) == ours & 0xffff_ffff
            && self.kernel.is_none_or(|kernel| kernel == ours)
    }

    /// Who agrees with whom.
    fn shape(self) -> (bool, bool, bool) {
        let (interpreted, compiled) = (self.interpreted, self.compiled);
        (interpreted == compiled, self.agrees(interpreted), self.agrees(compiled))
    }
}

/// The fuzzer.
pub struct AgainstKernel {
    kernel: Kernel,
    specs: Vec<MapSpec>,
    maps: KernelMaps,
    runner: Runner,
    n_both: u64,
    n_compared: u64,
    only_kernel: Tally,
    by_design: Tally,
    by_fault: Tally,
}

impl AgainstKernel {
    /// `command` starts a process that runs programs.
    ///
    /// # Errors
    /// The kernel takes no programs from us, or makes no maps.
    pub fn new(command: fn() -> Result<Command>) -> Result<Self> {
        let specs = maps();
        Ok(Self {
            kernel: Kernel::open()?,
            maps: KernelMaps::create(&specs)?,
            runner: Runner::new(command, &specs),
            specs,
            n_both: 0,
            n_compared: 0,
            only_kernel: Tally::default(),
            by_design: Tally::default(),
            by_fault: Tally::default(),
        })
    }

    /// The program of `seed`: every other one is careless.
    #[must_use]
    pub fn program(seed: u64) -> Generated {
        let style = if seed.is_multiple_of(2) { Style::Careful } else { Style::Careless };
        flea_generate::program(&mut Random::new(seed), style)
    }

    /// Both verdicts, and all results.
    ///
    /// # Errors
    /// The kernel or the worker cannot be asked.
    pub fn compare(&mut self, insns: &[Insn], comparable: bool) -> Result<Judged> {
        let ours = flea_verifier::verify(&program(insns), &self.specs, CONTEXT);
        let kernels = self.kernel.load(insns, &self.maps, LogLevel::Silent)?;
        let loaded = match (ours, kernels) {
            (Ok(_), Ok(loaded)) => loaded,
            (Ok(_), Err(_)) => return Ok(Judged::OnlyWe(self.refusal(insns)?.reason())),
            (Err(ours), Ok(_)) => return Ok(Judged::OnlyKernel(ours.message)),
            (Err(_), Err(_)) => return Ok(Judged::BothRefuse),
        };
        let (kernel_low, kernel) = self.run_in_kernel(insns, &loaded)?;
        Ok(match self.runner.run(insns)? {
            Ran::Both { interpreted, compiled } => {
                let results = Results { kernel_low, kernel, interpreted, compiled };
                if !comparable || results.shape() == (true, true, true) {
                    Judged::Agree
                } else {
                    Judged::Differ(results)
                }
            }
            Ran::Lost(message) => Judged::Lost(message),
            Ran::Refused => Judged::Lost("the worker's verifier refuses it".to_owned()),
        })
    }

    /// `r0`: its low half, and all of it where the program stores it.
    fn run_in_kernel(&mut self, insns: &[Insn], loaded: &Loaded) -> Result<(u32, Option<u64>)> {
        let low = loaded.run(&context())?;
        let stores = names_map(insns, map::RESULT);
        let whole = stores.then(|| self.stored()).transpose()?;
        self.renew_maps(insns)?;
        Ok((low, whole))
    }

    fn refusal(&self, insns: &[Insn]) -> Result<Refusal> {
        let again = self.kernel.load(insns, &self.maps, LogLevel::Branches)?;
        again.err().ok_or_else(|| anyhow::anyhow!("the kernel has changed its mind"))
    }

    fn stored(&self) -> Result<u64> {
        let value = self.maps.first_value(MapIdx(map::RESULT))?;
        Ok(value.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)))
    }

    /// The next program finds them as this one did.
    fn renew_maps(&mut self, insns: &[Insn]) -> Result<()> {
        for index in 0..u32::try_from(self.specs.len())? {
            if names_map(insns, index) && !self.specs[index as usize].read_only {
                self.maps.renew(MapIdx(index))?;
            }
        }
        Ok(())
    }

    /// A program that only we accept: by design, or an unsafe accept. Only what is left of it when
    /// it is made smaller shows by which of its instructions the kernel is put off.
    fn only_we(&mut self, insns: &[Insn], reason: &str, seed: u64) -> Outcome {
        let small;
        let why = match differences::by_reason(insns, reason) {
            Some(why) => Some(why),
            None => {
                small = self.smaller(insns, &Judged::OnlyWe(reason.to_owned()));
                differences::by_instructions(&small)
            }
        };
        let stray = match machines::run(&program(insns), &self.specs, CONTEXT, seed) {
            Tested::Stray(seen) => Some(seen),
            Tested::Right | Tested::Refused | Tested::TooManyStates => None,
        };
        match (why, stray) {
            (Some(why), None) => {
                self.by_design.count(why, seed);
                Outcome::Accepted
            }
            (_, stray) => {
                let mut failure = self.failure(insns, &Judged::OnlyWe(reason.to_owned()));
                failure.seen += &stray.unwrap_or_default();
                Outcome::Failed(failure)
            }
        }
    }

    /// Whether the kernel's own run of the program says that its first one was wrong: its result is
    /// ours once its verifier is mistaken no more.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    pub fn is_kernels_fault(&mut self, insns: &[Insn], results: Results) -> Result<bool> {
        let Some(veiled) = differences::veiled(insns) else { return Ok(false) };
        let Ok(loaded) = self.kernel.load(&veiled, &self.maps, LogLevel::Silent)? else {
            return Ok(false);
        };
        let (kernel_low, kernel) = self.run_in_kernel(&veiled, &loaded)?;
        Ok(Results { kernel_low, kernel, ..results }.shape() == (true, true, true))
    }

    /// The smallest program that comes to the same.
    fn smaller(&mut self, insns: &[Insn], judged: &Judged) -> Vec<Insn> {
        let same = |again: &Judged| match (judged, again) {
            (Judged::Differ(a), Judged::Differ(b)) => a.shape() == b.shape(),
            (Judged::OnlyWe(a), Judged::OnlyWe(b)) => alike(a, b),
            (Judged::Lost(_), Judged::Lost(_)) => true,
            _ => false,
        };
        minimise(insns, |p| self.compare(p, true).is_ok_and(|again| same(&again)))
    }

    fn failure(&mut self, insns: &[Insn], judged: &Judged) -> Failure {
        let small = self.smaller(insns, judged);
        let seen = match self.compare(&small, true) {
            Ok(judged) => format!("{judged:?}"),
            Err(e) => e.to_string(),
        };
        let (kind, verdict) = match judged {
            Judged::OnlyWe(reason) => (Kind::UnsafeAccept, format!("@0 {reason}")),
            _ => (Kind::Disagreement, "ok".to_owned()),
        };
        let input = self.case(&small, &verdict);
        Failure { kind, seen: format!("{judged:?}; made smaller: {seen}"), input }
    }

    fn case(&self, insns: &[Insn], verdict: &str) -> String {
        text::case("found by the kernel fuzzer", CONTEXT_LINE, &self.specs, insns, verdict)
    }

    /// Everything that both verifiers say of a program.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    pub fn explain(&mut self, insns: &[Insn], comparable: bool) -> Result<String> {
        let mut text = text::case("shown", CONTEXT_LINE, &self.specs, insns, "?");
        let ours = match flea_verifier::verify(&program(insns), &self.specs, CONTEXT) {
            Ok(_) => "accepted".to_owned(),
            Err(e) => format!("refused\n{}", e.log.join("\n")),
        };
        writeln!(text, "\nours: {ours}\n")?;
        let log = self.kernel.log(insns, &self.maps, LogLevel::Steps)?;
        writeln!(text, "kernel:\n{log}\n{:?}", self.compare(insns, comparable)?)?;
        Ok(text)
    }
}

/// Whether two reasons are the same but for registers and numbers.
fn alike(a: &str, b: &str) -> bool {
    let words = |s: &str| s.chars().filter(|c| c.is_alphabetic()).take(40).collect::<String>();
    words(a) == words(b)
}

fn program(insns: &[Insn]) -> Program {
    Program {
        name: "random".into(),
        section: "fentry/f".into(),
        kind: ProgramKind::Fentry,
        insns: insns.to_vec(),
        ..Program::default()
    }
}

/// As in the vectors: argument `i` is `(i << 36) | i`.
fn context() -> [u64; CONTEXT_WORDS] {
    std::array::from_fn(|word| (word as u64 + 1) << 36 | (word as u64 + 1))
}

fn names_map(insns: &[Insn], map: u32) -> bool {
    let names = |insn: &Insn| insn.is_lddw() && matches!(insn.src, PSEUDO_MAP | PSEUDO_MAP_VALUE);
    insns.iter().any(|insn| names(insn) && insn.imm.cast_unsigned() == map)
}

impl Fuzzer for AgainstKernel {
    fn name(&self) -> &'static str {
        "kernel"
    }

    fn judge(&mut self, seed: u64) -> Result<Outcome> {
        let Generated { insns, comparable } = Self::program(seed);
        let judged = self.compare(&insns, comparable)?;
        Ok(match &judged {
            Judged::Agree => {
                self.n_both += 1;
                self.n_compared += u64::from(comparable);
                Outcome::Accepted
            }
            Judged::BothRefuse => Outcome::Refused,
            Judged::OnlyKernel(reason) => {
                self.only_kernel.count(reason, seed);
                Outcome::Refused
            }
            Judged::OnlyWe(reason) => self.only_we(&insns, reason, seed),
            Judged::Differ(results) if self.is_kernels_fault(&insns, *results)? => {
                self.n_both += 1;
                self.by_fault.count(differences::FETCHED, seed);
                Outcome::Accepted
            }
            Judged::Differ(_) | Judged::Lost(_) => Outcome::Failed(self.failure(&insns, &judged)),
        })
    }

    fn summary(&self) -> String {
        let by_kernel = self.n_both + self.only_kernel.total();
        let share = 100.0 * self.n_both as f64 / by_kernel.max(1) as f64;
        let mut text = format!(
            "the kernel accepts {by_kernel}, of which we accept {} ({share:.2} %); {} results compared\n",
            self.n_both, self.n_compared
        );
        text += &section("accepted by the kernel, refused by us:", &self.only_kernel);
        text += &section("accepted by us, refused by the kernel, by design:", &self.by_design);
        text += &section("another r0 in the kernel, by its fault:", &self.by_fault);
        text
    }
}

fn section(title: &str, tally: &Tally) -> String {
    if tally.total() == 0 { String::new() } else { format!("{title}\n{}", tally.lines()) }
}
