//! The same program before our verifier and `prevail`, an abstract interpreter that joins paths
//! where ours follows each.
//!
//! Neither accepts all that the other does, so a difference is no fault by itself: what we accept
//! has to stand the test of [`crate::machines`], and what only prevail accepts is counted by our
//! reason, to be looked at. It is not asked whether a program ends: it takes nearly every loop
//! for endless. It works in a process of its own, as some programs keep it busy for ever.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};
use flea_generate::{Random, Style, maps};
use flea_object::insn::{Insn, PSEUDO_MAP, PSEUDO_MAP_VALUE};
use flea_object::spec::{MapSpec, Program};
use flea_vectors::worker::{Pool, serve_lines};
use flea_verifier::Context;
use prevail::crab::ebpf_domain::DomainContext;
use prevail::crab::var_registry::VariableRegistry;
use prevail::linux::linux_platform::LinuxPlatform;
use prevail::platform::EbpfPlatform as _;
use prevail::spec::config::EbpfVerifierOptions;
use prevail::spec::type_descriptors::{EbpfMapDescriptor, ProgramInfo};
use prevail::spec::vm_isa::EbpfInst;
use prevail::{fwd_analyzer, ir};

use crate::campaign::{Failure, Fuzzer, Kind, Outcome};
use crate::machines::{self, Tested};
use crate::minimise::minimise;
use crate::tally::Tally;
use crate::text;

const CONTEXT: Context = Context::Tracing { n_args: 12, n_results: 0, session: false };
const CONTEXT_LINE: &str = "ctx 12";
/// The section that gives prevail the same context: `u64[12]` to be read.
const SECTION: &str = "raw_tracepoint/f";

/// Joining paths takes time that may double with each of them.
const PATIENCE: Duration = Duration::from_secs(5);
/// What the worker says of a program that prevail accepts.
const ACCEPTED: &str = "accepted";

/// The worker's side: a program as hex in each line, and prevail's words for it.
///
/// # Errors
/// Reading or writing failed, or a line is no program.
pub fn serve() -> Result<()> {
    let prevail = Prevail::new(&maps());
    serve_lines(|line| {
        let verdict = prevail.verify(&unhex(line)?);
        Ok(verdict.map_or_else(|e| e.replace('\n', " "), |()| ACCEPTED.to_owned()))
    })
}

fn unhex(line: &str) -> Result<Vec<Insn>> {
    let word = |chunk: &[u8]| {
        let word = u64::from_str_radix(std::str::from_utf8(chunk)?, 16)?;
        Ok(Insn::decode(word.to_be_bytes()))
    };
    if !line.len().is_multiple_of(16) {
        bail!("{} digits are no instructions", line.len());
    }
    line.as_bytes().chunks(16).map(word).collect()
}

/// The fuzzer.
pub struct AgainstPrevail {
    specs: Vec<MapSpec>,
    pool: Pool,
    n_both: u64,
    n_neither: u64,
    only_prevail: Tally,
    only_we: Tally,
}

impl AgainstPrevail {
    /// `command` starts a process that calls [`serve`].
    #[must_use]
    pub fn new(command: fn() -> Result<Command>) -> Self {
        let pool = Pool::new(command, PATIENCE);
        let (only_prevail, only_we) = (Tally::default(), Tally::default());
        Self { specs: maps(), pool, n_both: 0, n_neither: 0, only_prevail, only_we }
    }

    /// `None` where prevail accepts the program. It may be lost on it, which says nothing.
    fn complaint(&mut self, insns: &[Insn]) -> Result<Option<String>> {
        let line: String =
            insns.iter().map(|i| format!("{:016x}", u64::from_be_bytes(i.encode()))).collect();
        Ok(match self.pool.reply(&line)? {
            Ok(verdict) if verdict == ACCEPTED => None,
            Ok(complaint) => Some(complaint),
            Err(lost) => Some(format!("prevail: {lost}")),
        })
    }

    fn stray(&self, insns: &[Insn], seed: u64, seen: String) -> Failure {
        let strays = |p: &[Insn]| {
            matches!(machines::run(&program(p), &self.specs, CONTEXT, seed), Tested::Stray(_))
        };
        let small = minimise(insns, strays);
        let name = "found by the prevail fuzzer";
        let input = text::case(name, CONTEXT_LINE, &self.specs, &small, "ok");
        Failure { kind: Kind::UnsafeAccept, seen, input }
    }
}

fn program(insns: &[Insn]) -> Program {
    Program { name: "random".into(), insns: insns.to_vec(), ..Program::default() }
}

impl Fuzzer for AgainstPrevail {
    fn name(&self) -> &'static str {
        "prevail"
    }

    fn judge(&mut self, seed: u64) -> Result<Outcome> {
        let style = if seed.is_multiple_of(2) { Style::Careful } else { Style::Careless };
        let insns = flea_generate::program(&mut Random::new(seed), style).insns;
        let ours = flea_verifier::verify(&program(&insns), &self.specs, CONTEXT);
        let theirs = self.complaint(&insns)?;
        match (&ours, theirs) {
            (Ok(_), None) => self.n_both += 1,
            (Ok(_), Some(theirs)) => self.only_we.count(&theirs, seed),
            (Err(ours), None) => self.only_prevail.count(&ours.message, seed),
            (Err(_), Some(_)) => self.n_neither += 1,
        }
        if ours.is_err() {
            return Ok(Outcome::Refused);
        }
        Ok(match machines::run(&program(&insns), &self.specs, CONTEXT, seed) {
            Tested::Stray(seen) => Outcome::Failed(self.stray(&insns, seed, seen)),
            Tested::Right | Tested::Refused | Tested::TooManyStates => Outcome::Accepted,
        })
    }

    fn summary(&self) -> String {
        format!(
            "both accept {}, both refuse {}\naccepted by prevail, refused by us: {}\n{}accepted \
             by us, refused by prevail: {}\n{}",
            self.n_both,
            self.n_neither,
            self.only_prevail.total(),
            self.only_prevail.lines(),
            self.only_we.total(),
            self.only_we.lines()
        )
    }
}

/// The other verifier, with our maps.
pub struct Prevail {
    platform: LinuxPlatform,
    info: ProgramInfo,
    options: EbpfVerifierOptions,
}

impl Prevail {
    /// For programs that name these maps by index.
    #[must_use]
    pub fn new(specs: &[MapSpec]) -> Self {
        let mut platform = LinuxPlatform::new();
        let program_type = platform.get_program_type(SECTION, "");
        platform.set_program_type(&program_type);
        platform.map_descriptors =
            (1..).zip(specs).map(|(fd, spec)| descriptor(fd, spec)).collect();
        let info = ProgramInfo {
            map_descriptors: platform.map_descriptors.clone(),
            program_type,
            ..ProgramInfo::default()
        };
        let options = EbpfVerifierOptions { mock_map_fds: true, ..Default::default() };
        Self { platform, info, options }
    }

    /// Its verdict, or its first complaint.
    ///
    /// # Errors
    /// Why it refuses the program.
    pub fn verify(&self, insns: &[Insn]) -> Result<(), String> {
        let insts: Vec<EbpfInst> = insns.iter().map(encode).collect();
        let mut info = self.info.clone();
        let mut notes = Vec::new();
        let sequence =
            ir::unmarshal::unmarshal(&insts, &mut notes, &info, &self.platform, &self.options)
                .map_err(|e| e.to_string())?;
        let program = ir::program::Program::from_sequence(
            &sequence,
            &mut info,
            &self.platform,
            &self.options,
        )
        .map_err(|e| e.to_string())?;
        let context = DomainContext {
            program_info: &info,
            program: &program,
            runtime: &self.options.runtime,
            options: &self.options,
            platform: &self.platform,
        };
        let result = fwd_analyzer::analyze(&program, &context, &mut VariableRegistry::new());
        if !result.failed {
            return Ok(());
        }
        Err(result.find_first_error().map_or_else(|| "refused".to_owned(), |e| e.to_string()))
    }
}

fn descriptor(fd: i32, spec: &MapSpec) -> EbpfMapDescriptor {
    EbpfMapDescriptor {
        original_fd: fd,
        map_type: spec.kind as u32,
        key_size: spec.key_size_bytes,
        value_size: spec.value_size_bytes,
        max_entries: spec.max_entries,
        inner_map_fd: -1,
        name: spec.name.clone(),
        is_inner_map_template: false,
    }
}

/// Maps are named by descriptor there: index and one.
fn encode(insn: &Insn) -> EbpfInst {
    let names_map = insn.is_lddw() && matches!(insn.src, PSEUDO_MAP | PSEUDO_MAP_VALUE);
    EbpfInst {
        opcode: insn.opcode,
        dst_src: insn.dst | insn.src << 4,
        offset: insn.off,
        imm: if names_map { insn.imm.wrapping_add(1) } else { insn.imm },
    }
}

#[cfg(test)]
mod tests {
    use flea_object::asm::{Asm, Reg::*, Size};

    use super::*;

    #[test]
    fn prevail_knows_right_from_wrong() {
        let prevail = Prevail::new(&maps());
        let mut asm = Asm::new();
        asm.store_imm(Size::DW, R10, -8, 1).load(Size::DW, R0, R10, -8).exit();
        assert_eq!(prevail.verify(&asm.finish().expect("a program")), Ok(()));
        let mut asm = Asm::new();
        asm.mov64_imm(R1, 0).load(Size::DW, R0, R1, 0).exit();
        assert!(prevail.verify(&asm.finish().expect("a program")).is_err());
    }
}
