//! Proves that an eBPF program cannot harm the process it runs in.
//!
//! [`verify`] is the only door: it decodes ([`op`]), looks at the shape ([`cfg`]), asks which
//! registers matter where ([`liveness`]), then walks all paths ([`explore`]) with one
//! instruction at a time ([`machine`]) over states ([`state`]) of registers ([`value`]),
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
mod call;
mod callback;
mod cfg;
mod collect;
mod explore;
pub mod facts;
mod liveness;
mod machine;
mod number;
mod op;
mod pointer;
mod proto;
mod report;
#[cfg(any(test, feature = "beliefs"))]
pub mod soundness;
mod stack;
mod state;
mod trace;
mod value;

use std::collections::BTreeSet;

use flea_object::spec::{MapSpec, Program};
use flea_object::types::{TypeId, Types};

use cfg::{Cfg, MAX_CALL_DEPTH};
use explore::{BUDGET, Explorer, Patience, Refusal};
use facts::Function;
use liveness::{Liveness, ProgramResult};
use machine::Machine;
use report::Fault;
use stack::STACK_BYTES;

pub use access::PT_REGS_BYTES;
pub use facts::Verified;

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

/// Why a program was refused: the report that a person reads.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .log.last().map_or("rejected", |l| l.as_str()))]
pub struct Rejection {
    /// The instruction at fault.
    pub insn_idx: u32,
    /// Linux's words for it (`R1 invalid mem access 'scalar'`).
    pub message: String,
    /// The way there, as Linux's verifier log prints it, the message last.
    pub log: Vec<String>,
    /// What to change.
    pub hint: Option<String>,
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
    #[expect(dead_code, reason = "typed pointers into the target are built upon it")]
    target: Option<Target<'a>>,
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
        Self { program, maps, context, target: None }
    }

    /// The context's words have the types of `target`.
    #[must_use]
    pub fn target(self, target: Target<'a>) -> Self {
        Self { target: Some(target), ..self }
    }

    /// Proves the program safe, or says why not.
    ///
    /// # Errors
    /// [`Rejection`] with the first fault found.
    pub fn verify(&self) -> Result<Verified, Rejection> {
        let Self { program, maps, context, .. } = *self;
        let structural = |(idx, fault)| rejection(idx, fault, Vec::new());
        check_size(program).map_err(structural)?;
        let ops = op::decode(&program.insns).map_err(structural)?;
        let cfg = Cfg::new(&ops).map_err(structural)?;
        let live = Liveness::new(&ops, &cfg, ProgramResult::of(program.kind));
        let explorer = |patience| {
            let machine = Machine::new(maps, context, &ops, &cfg);
            Explorer::new(machine, program, &cfg, &live, patience)
        };
        let mut walk = explorer(Patience::Short);
        let mut refused = walk.run().err();
        if refused.is_some() && walk.has_widened {
            let mut patient = explorer(Patience::Endless);
            if patient.run().is_ok() {
                (walk, refused) = (patient, None);
            }
        }
        if let Some(Refusal { insn_idx, fault, steps }) = refused {
            // Printing every state on the way would cost more than the proof: the same walk
            // again, now that it is known which steps are worth printing.
            let mut again = explorer(Patience::Short).traced(steps);
            let log = again.run().err().map(|_| again.into_log()).unwrap_or_default();
            return Err(rejection(insn_idx, fault, log));
        }
        let machine = walk.machine;
        check_stack(&machine.calls, &machine.stack_bytes).map_err(structural)?;
        let returns = machine.return_range();
        let (facts, callees) = machine.facts.into_parts();
        Ok(Verified {
            insns: program.insns.clone(),
            functions: functions(&cfg, &machine.stack_bytes),
            returns,
            facts,
            callees,
        })
    }
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
    calls: &BTreeSet<(usize, usize)>,
    stack_bytes: &[u32],
) -> Result<(), (usize, Fault)> {
    let own = |function: usize| stack_bytes[function].max(1).next_multiple_of(32);
    // Bytes and frames of the deepest chain from each function, of at most so many frames as
    // there can be: calls through a register may lead in circles that no path goes round.
    let one_frame: Vec<(u32, usize)> = (0..stack_bytes.len()).map(|f| (own(f), 1)).collect();
    let mut chains = one_frame.clone();
    for _ in 1..MAX_CALL_DEPTH {
        let mut longer = one_frame.clone();
        for &(caller, callee) in calls {
            let (bytes, frames) = chains[callee];
            longer[caller] = longer[caller].max((bytes + own(caller), frames + 1));
        }
        chains = longer;
    }
    let (bytes, frames) = chains[0];
    // A program without calls has been held to its own 512 bytes already.
    if frames > 1 && bytes > STACK_BYTES.unsigned_abs() {
        let text = format!("combined stack size of {frames} calls is {bytes}. Too large");
        return Err((0, Fault::new(text).hint("keep large variables in a per-CPU array")));
    }
    Ok(())
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

fn rejection(insn_idx: usize, fault: Fault, mut log: Vec<String>) -> Rejection {
    let Fault { message, hint } = fault;
    log.push(message.clone());
    let surplus = log.len().saturating_sub(trace::MAX_LINES);
    log.drain(..surplus);
    Rejection { insn_idx: u32::try_from(insn_idx).unwrap_or(u32::MAX), message, log, hint }
}
