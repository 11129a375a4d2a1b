//! Proves that an eBPF program cannot harm the process it runs in.
//!
//! [`verify`] is the only door: it decodes ([`op`]), looks at the shape ([`cfg`]), asks which
//! registers matter where ([`liveness`]), then walks all paths ([`explore`], which asks
//! [`precision`] what they hang on) with one instruction at a time ([`machine`]) over states ([`state`]) of registers ([`value`]),
//! stack slots ([`stack`]) and numbers ([`number`]). What it learns on the way becomes
//! [`facts`] for the compiler.
//!
//! **Invariant**: knows nothing of processes, machine code or files; the same program, maps
//! and context always give the same verdict.
#![forbid(unsafe_code)]
#![allow(
    rustdoc::private_intra_doc_links,
    reason = "the module map above is for who reads the source"
)]

mod access;
mod advice;
mod alu;
mod budget;
mod call;
mod callback;
mod cfg;
mod changeable;
mod collect;
mod explore;
pub mod facts;
mod global;
mod liveness;
mod lock;
mod machine;
mod note;
mod number;
mod op;
mod pointer;
mod precision;
mod proto;
mod rejection;
mod report;
#[cfg(any(test, feature = "beliefs"))]
pub mod soundness;
mod stack;
mod state;
mod story;
mod tail;
pub mod targets;
mod trace;
mod typed;
mod upper;
mod value;

use std::collections::BTreeSet;

use flea_object::spec::{MapSpec, Program};
use flea_object::types::{TypeId, Types};

use cfg::{Cfg, MAX_CALL_DEPTH};
use explore::{BUDGET, Explorer, Patience, Refusal};
use facts::Function;
use liveness::{Liveness, ProgramResult};
use machine::Machine;
use op::Op;
use report::Fault;
use stack::STACK_BYTES;
use story::Path;
use targets::Targets;
use trace::Sink;

pub use access::PT_REGS_BYTES;
pub use changeable::Changeable;
pub use facts::Verified;
pub use rejection::{Event, Known, Line, Place, Rejection, What};

/// What a program is given in `r1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Context {
    /// `u64 ctx[n_args]`, then the result in the next slots where the kind sees one; `ctx[-1]`
    /// and `ctx[-2]` as in Linux.
    Tracing {
        /// Argument words.
        n_args: u8,
        /// Slots after the arguments that hold the result (fexit; fsession may read them at
        /// entry too, where they are 0). One where there is none, as in Linux; more where it
        /// is in several registers.
        n_results: u8,
        /// `bpf_session_is_return` and `bpf_session_cookie` may be called.
        session: bool,
    },
    /// `struct pt_regs` of x86-64 (uprobe, uretprobe), to be read alone.
    PtRegs,
    /// Writable bytes: `r1` their address, `r2` their number. For tests and vectors.
    Memory {
        /// How many.
        size_bytes: u32,
    },
}

/// Proves `program` safe against `maps` and `context`, or says why not: [`Verifier`] with
/// nothing else asked of it.
///
/// # Errors
/// [`Rejection`] with the first fault found.
pub fn verify(
    program: &Program,
    maps: &[MapSpec],
    context: Context,
) -> Result<Verified, Rejection> {
    Verifier::new(program, maps, context).verify()
}

/// What a program is verified against.
#[derive(Clone, Copy, Debug)]
pub struct Verifier<'a> {
    program: &'a Program,
    maps: &'a [MapSpec],
    context: Context,
    target: Option<Target<'a>>,
    permissions: Permissions,
    changeable: Changeable,
}

/// What a program may do that it may not unless somebody has said so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Permissions {
    /// `bpf_probe_write_user`, and stores to the words of the context that [`Verifier::changeable`]
    /// names: a mistake can crash the target, or make it do anything.
    pub write_target: bool,
}

/// The types of the function that a program is attached to.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The types of its module.
    pub types: &'a Types,
    /// The type of each slot of [`Context::Tracing`], results included; `None` where it is a
    /// part of a larger value, or not known.
    pub slots: &'a [Option<TypeId>],
}

impl<'a> Verifier<'a> {
    /// A program that runs with `context` and names `maps` by index.
    #[must_use]
    pub fn new(program: &'a Program, maps: &'a [MapSpec], context: Context) -> Self {
        let permissions = Permissions::default();
        let changeable = Changeable::NONE;
        Self { program, maps, context, target: None, permissions, changeable }
    }

    /// The context's words have the types of `target`.
    #[must_use]
    pub fn target(self, target: Target<'a>) -> Self {
        Self { target: Some(target), ..self }
    }

    /// It may do what `permissions` say.
    #[must_use]
    pub fn permit(self, permissions: Permissions) -> Self {
        Self { permissions, ..self }
    }

    /// The words of its context that it can store to where [`Permissions::write_target`] lets it:
    /// arguments that the function is called with, or results that its caller gets.
    #[must_use]
    pub fn changeable(self, changeable: Changeable) -> Self {
        Self { changeable, ..self }
    }

    /// Proves the program safe, or says why not.
    ///
    /// # Errors
    /// [`Rejection`] with the first fault found.
    pub fn verify(&self) -> Result<Verified, Rejection> {
        self.prove(None)
    }

    /// The same, and `line` is called with each line of a log like that of Linux's level 2: all
    /// visited instructions with the registers they touch, of an accepted program too.
    ///
    /// # Errors
    /// [`Rejection`] with the first fault found.
    pub fn verify_logged(&self, line: &mut dyn FnMut(&str)) -> Result<Verified, Rejection> {
        self.prove(Some(line))
    }

    fn prove(&self, sink: Option<Sink<'_>>) -> Result<Verified, Rejection> {
        let Self { program, maps, .. } = *self;
        let structural = |(idx, fault)| rejection(program, idx, fault);
        check_size(program).map_err(structural)?;
        let ops = op::decode(&program.insns).map_err(structural)?;
        let cfg = Cfg::new(&ops).map_err(structural)?.with_globals(program);
        let live = Liveness::new(&ops, &cfg, ProgramResult::of(program.kind));
        let walk = Walk { asked: *self, ops: &ops, cfg: &cfg, live: &live };
        let mut sink = sink;
        let mut attempt = |patience| {
            let mut walk = match &mut sink {
                Some(sink) => walk.explorer(patience).logged(&mut **sink),
                None => walk.explorer(patience),
            };
            let outcome = walk.run();
            walk.summary(outcome.as_ref().err());
            match outcome {
                Ok(()) => Ok(accepted(program, &cfg, walk.machine)),
                Err(refusal) => Err((refusal, walk.has_widened)),
            }
        };
        let outcome = match attempt(Patience::Short) {
            Err((refusal, true)) => attempt(Patience::Endless).map_err(|_| refusal),
            outcome => outcome.map_err(|(refusal, _)| refusal),
        };
        match outcome {
            Ok(verified) => verified.map_err(structural),
            Err(Refusal { insn_idx, fault, steps }) => {
                // Keeping every state on the way would cost more than the proof: the same walk
                // again, now that it is known which steps are worth it.
                let mut again = walk.explorer(Patience::Short).traced(steps);
                let refused_again = again.run().is_err();
                let (log, visits) =
                    if refused_again { again.into_path() } else { Default::default() };
                let path = Path { visits: &visits, ops: &ops, program, maps };
                Err(told(path, insn_idx, fault, log))
            }
        }
    }
}

/// What a walk through a program needs.
#[derive(Clone, Copy)]
struct Walk<'a> {
    asked: Verifier<'a>,
    ops: &'a [Op],
    cfg: &'a Cfg,
    live: &'a Liveness,
}

impl<'a> Walk<'a> {
    fn explorer(self, patience: Patience) -> Explorer<'a> {
        let Verifier { program, maps, context, target, permissions, changeable } = self.asked;
        let machine = Machine::new(maps, context, self.ops, self.cfg);
        let machine = machine.typed_by(target).permit(permissions, changeable);
        Explorer::new(machine, program, self.cfg, self.live, patience)
    }
}

/// What was proved on all paths.
fn accepted(
    program: &Program,
    cfg: &Cfg,
    machine: Machine<'_>,
) -> Result<Verified, (usize, Fault)> {
    check_stack(cfg, machine.ops, &machine.calls, &machine.stack_bytes)?;
    let (returns, operands) = (machine.return_range(), machine.facts.operands());
    let (facts, callees) = machine.facts.into_parts();
    Ok(Verified {
        insns: program.insns.clone(),
        functions: functions(cfg, &machine.stack_bytes),
        facts,
        operands,
        callees,
        returns,
        targets: Targets::default(),
    })
}

fn check_size(program: &Program) -> Result<(), (usize, Fault)> {
    let n = program.insns.len();
    if n == 0 {
        return Err((0, Fault::new("BPF program has no instructions")));
    }
    if n > BUDGET {
        return Err((0, Fault::new(format!("BPF program is too large. It has {n} insn"))));
    }
    Ok(())
}

/// The stack of the deepest chain of `calls` (each frame rounded up as in Linux) must fit.
fn check_stack(
    cfg: &Cfg,
    ops: &[Op],
    calls: &BTreeSet<(usize, usize)>,
    stack_bytes: &[u32],
) -> Result<(), (usize, Fault)> {
    let own = |function: usize| stack_bytes[function].max(1).next_multiple_of(32);
    // Bytes and frames of the deepest chains from each function. Calls through a register may
    // lead in circles: one frame more than there can be says enough.
    let one_frame: Vec<(u32, usize)> = (0..stack_bytes.len()).map(|f| (own(f), 1)).collect();
    let mut chains = one_frame.clone();
    for _ in 0..MAX_CALL_DEPTH {
        let mut longer = one_frame.clone();
        for &(caller, callee) in calls {
            let (bytes, frames) = chains[callee];
            let (most_bytes, most_frames) = longer[caller];
            longer[caller] = (most_bytes.max(bytes + own(caller)), most_frames.max(frames + 1));
        }
        chains = longer;
    }
    let (bytes, frames) = chains[0];
    if frames > MAX_CALL_DEPTH {
        let fault = Fault::new(format!("the call stack of {frames} frames is too deep !"));
        return Err((0, fault.hint("recursion is not possible; nest fewer calls")));
    }
    // A program without calls has been held to its own 512 bytes already.
    if frames > 1 && bytes > STACK_BYTES.unsigned_abs() {
        let text = format!("combined stack size of {frames} calls is {bytes}. Too large");
        return Err((0, Fault::new(text).hint("keep large variables in a per-CPU array")));
    }
    tail::check_callers(cfg, ops, own)
}

fn functions(cfg: &Cfg, stack_bytes: &[u32]) -> Vec<Function> {
    // `check_size` has bounded the number of instructions.
    let idx = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    cfg.functions
        .iter()
        .zip(stack_bytes)
        .map(|(span, bytes)| Function {
            start_insn_idx: idx(span.start),
            end_insn_idx: idx(span.end),
            stack_bytes: *bytes,
        })
        .collect()
}

/// A fault that no path leads to.
fn rejection(program: &Program, insn_idx: usize, fault: Fault) -> Rejection {
    let Fault { message, hint } = fault;
    Rejection {
        insn_idx: u32::try_from(insn_idx).unwrap_or(u32::MAX),
        log: vec![message.clone()],
        message,
        place: Place::of(insn_idx, program),
        story: Vec::new(),
        hint,
    }
}

/// A fault at the end of `path`.
fn told(path: Path<'_>, insn_idx: usize, fault: Fault, mut log: Vec<String>) -> Rejection {
    let story = story::story(path, &fault.message);
    let hint = advice::advice(path, &fault, &story);
    let hint = global::with_advice(path, hint);
    log.push(fault.message.clone());
    let surplus = log.len().saturating_sub(trace::MAX_LINES);
    log.drain(..surplus);
    Rejection { story, hint, log, ..rejection(path.program, insn_idx, fault) }
}
