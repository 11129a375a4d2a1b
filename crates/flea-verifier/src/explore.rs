//! Walks all paths through a program, depth first, each with its own state.
//!
//! What makes it end, and what makes that sound:
//!
//! 1. Where several ways lead to an instruction (a join), the state is compared with those
//!    that were there before. A state that an earlier one includes needs no second look,
//!    *once everything that followed from the earlier one has been explored*: only then is it
//!    known which of its numbers matter ([`crate::precision`]), and only those are compared.
//! 2. [`Node::open`] counts what is still to be explored below a remembered state; only at 0
//!    may it prune. A state with `open > 0` is an ancestor of the current path (depth first:
//!    every waiting branch hangs on one). To meet an equal one again is an infinite loop.
//! 3. So the remembered states form a graph without cycles, and no accepted program runs
//!    more instructions than were visited here: at most [`BUDGET`].

use std::collections::BTreeSet;

use flea_object::spec::Program;

use crate::budget::{self, Loop};
use crate::cfg::Cfg;
use crate::liveness::Liveness;
use crate::machine::{Flow, Machine};
use crate::op::Op;
#[cfg(any(test, feature = "beliefs"))]
use crate::precision::Needs;
use crate::precision::{Place, Precision};
use crate::report::Fault;
use crate::state::State;
use crate::story::Visit;
use crate::trace::{self, Sink, Trace};

/// Instructions that may be visited (Linux: BPF_COMPLEXITY_LIMIT_INSNS).
pub(crate) const BUDGET: usize = 1_000_000;
/// Branches that may wait (Linux: BPF_COMPLEXITY_LIMIT_JMP_SEQ).
const MAX_WAITING: usize = 8192;
/// Explored states remembered per instruction: those that closed or pruned last. A loop of a
/// thousand rounds with a branch in it leaves a thousand branches waiting, and each, the innermost
/// first, is pruned by what the one before it has left.
const MAX_CLOSED: usize = 64;
/// Of its own path's states, so many are looked at. A cycle that is longer is not seen as
/// one, and ends at the budget.
const MAX_ANCESTORS: usize = 16;
/// A state is remembered if so many instructions and jumps lie behind the last one: fewer
/// would cost more than they save (Linux's numbers).
const MIN_INSNS_BETWEEN: u32 = 8;
const MIN_JUMPS_BETWEEN: u32 = 2;

/// States that are kept for a comparison with a running program; beyond it none are.
#[cfg(any(test, feature = "beliefs"))]
const MAX_BELIEFS: usize = 20_000;

/// The walk.
pub(crate) struct Explorer<'a> {
    pub(crate) machine: Machine<'a>,
    program: &'a Program,
    cfg: &'a Cfg,
    live: &'a Liveness,
    nodes: Vec<Node>,
    /// For each instruction.
    remembered: Vec<Remembered>,
    waiting: Vec<Path>,
    precision: Precision<'a>,
    /// How often each jump backwards was followed.
    back_jumps: Vec<u32>,
    /// What is written down: the path, in the second run of a refused program, or everything.
    trace: Option<Trace<'a>>,
    /// Every state on arrival at every instruction, and the number of the step.
    #[cfg(any(test, feature = "beliefs"))]
    beliefs: Option<Vec<Vec<(State, usize)>>>,
}

/// A refusal, and the last step of the path that led to it.
pub(crate) struct Refusal {
    pub(crate) insn_idx: usize,
    pub(crate) fault: Fault,
    /// Numbers of the steps on that path, as many as the log shows.
    pub(crate) steps: BTreeSet<usize>,
}

/// The remembered states of one instruction, by their index into `nodes`, the newest last.
#[derive(Clone, Default)]
struct Remembered {
    /// Ancestors of the current path.
    open: Vec<usize>,
    /// Explored to their end.
    closed: Vec<usize>,
}

/// A remembered state.
struct Node {
    parent: Option<usize>,
    /// Paths below it that are not yet explored to their end.
    open: u32,
    /// `None` where it can prune nothing any more.
    state: Option<State>,
    insn_idx: usize,
    /// Where [`Precision`] keeps what is needed of it.
    mark: usize,
}

/// A path that waits to be explored, or is being explored.
struct Path {
    state: State,
    idx: usize,
    /// The last remembered state on it.
    node: usize,
    last_step: Option<usize>,
    /// The last mark on it.
    mark: usize,
    insns_since: u32,
    jumps_since: u32,
}

impl Path {
    fn place(&self) -> Place {
        let (last_step, mark, insn_idx) = (self.last_step, self.mark, self.idx);
        Place { last_step, mark, insn_idx, depth: self.state.depth() }
    }
}

impl<'a> Explorer<'a> {
    pub(crate) fn new(
        machine: Machine<'a>,
        program: &'a Program,
        cfg: &'a Cfg,
        live: &'a Liveness,
    ) -> Self {
        let n_insns = machine.ops.len();
        let precision = Precision::new(machine.ops);
        Self {
            machine,
            program,
            cfg,
            live,
            nodes: Vec::new(),
            remembered: vec![Remembered::default(); n_insns],
            waiting: Vec::new(),
            precision,
            back_jumps: vec![0; n_insns],
            trace: None,
            #[cfg(any(test, feature = "beliefs"))]
            beliefs: None,
        }
    }

    /// The same walk again, writing down the given steps: what a refused program's log shows.
    pub(crate) fn traced(mut self, steps: BTreeSet<usize>) -> Self {
        self.trace = Some(Trace::of_path(steps));
        self
    }

    /// The same walk, everything that it sees written down.
    pub(crate) fn logged(mut self, sink: Sink<'a>) -> Self {
        self.trace = Some(Trace::of_all(sink));
        self
    }

    /// The log and the states of a traced walk.
    pub(crate) fn into_path(self) -> (Vec<String>, Vec<Visit>) {
        self.trace.map(Trace::into_path).unwrap_or_default()
    }

    /// Linux's last lines of a log: what the walk took.
    pub(crate) fn summary(&mut self, refusal: Option<&Refusal>) {
        let n_insns = self.precision.steps.len();
        let most = self.remembered.iter().map(|r| r.open.len() + r.closed.len()).max().unwrap_or(0);
        let n_states = self.nodes.len();
        let depths: Vec<String> = self.machine.stack_bytes.iter().map(u32::to_string).collect();
        if let Some(trace) = &mut self.trace {
            if let Some(refusal) = refusal {
                trace.note(&refusal.fault.message);
            }
            trace.note(&format!("stack depth {}", depths.join("+")));
            trace.note(&format!(
                "processed {n_insns} insns (limit {BUDGET}) max_states_per_insn {most} \
                 total_states {n_states} peak_states {n_states} mark_read 0"
            ));
        }
    }

    /// The same walk, keeping every state.
    #[cfg(any(test, feature = "beliefs"))]
    pub(crate) fn remembering(mut self) -> Self {
        self.beliefs = Some(vec![Vec::new(); self.machine.ops.len()]);
        self.precision.before_steps = Some(Vec::new());
        self
    }

    /// Every state on arrival at every instruction, with what was needed of it; `None` where they
    /// were too many.
    #[cfg(any(test, feature = "beliefs"))]
    pub(crate) fn into_beliefs(self) -> Option<Vec<Vec<(State, Needs)>>> {
        let needs = self.precision.before_steps?;
        let with_needs = |(state, step): (State, usize)| Some((state, *needs.get(step)?));
        let of_insn = |states: Vec<_>| states.into_iter().map(with_needs).collect();
        self.beliefs?.into_iter().map(of_insn).collect()
    }

    /// Explores everything.
    pub(crate) fn run(&mut self) -> Result<(), Refusal> {
        self.run_from(0, self.machine.entry_state())?;
        // Global functions, each once: those that some path has called, and whom these call.
        let mut done = BTreeSet::new();
        while let Some(&function) = self.machine.called.difference(&done).next() {
            done.insert(function);
            if let Some(trace) = &mut self.trace {
                trace.begin(&format!(
                    "Validating {}() func#{function}...",
                    self.cfg.global_name(function)
                ));
            }
            let state = self.machine.global_entry(function);
            self.run_from(self.cfg.functions[function].start, state)?;
        }
        Ok(())
    }

    /// Explores everything from `idx` on.
    fn run_from(&mut self, idx: usize, state: State) -> Result<(), Refusal> {
        let (node, mark, last_step) = (self.nodes.len(), self.precision.entry(), None);
        self.nodes.push(Node { parent: None, open: 1, state: None, insn_idx: idx, mark });
        let mut path = Path { state, idx, node, last_step, mark, insns_since: 0, jumps_since: 0 };
        loop {
            let ended = self.advance(&mut path).map_err(|fault| self.refuse(&path, fault))?;
            if ended {
                self.close(path.node);
                match self.waiting.pop() {
                    Some(next) => path = next,
                    None => return Ok(()),
                }
            }
        }
    }

    /// Executes one instruction of `path`; `true` where the path ends.
    fn advance(&mut self, path: &mut Path) -> Result<bool, Fault> {
        if self.cfg.is_join(path.idx) && self.arrive(path)? {
            return Ok(true);
        }
        let idx = path.idx;
        let step = self.precision.steps.len();
        if step >= BUDGET {
            return Err(self.too_large(step));
        }
        let prev = path.last_step.map(|prev| (prev, self.precision.steps[prev].insn_idx));
        let mut place = path.place();
        self.precision.begin(&mut place);
        path.mark = place.mark;
        path.last_step = Some(step);
        path.insns_since += 1;
        #[cfg(any(test, feature = "beliefs"))]
        if let Some(beliefs) = &mut self.beliefs {
            if step < MAX_BELIEFS {
                beliefs[idx].push((path.state.clone(), step));
            } else {
                self.beliefs = None;
            }
        }
        let (program, ops, maps) = (self.program, self.machine.ops, self.machine.maps);
        let seen = trace::Step { number: step, idx, prev, ops, program, maps };
        if let Some(trace) = &mut self.trace {
            trace.before(seen, &path.state);
        }
        let flow = self.machine.step(idx, &mut path.state);
        if let Some(trace) = &mut self.trace {
            trace.after(seen, flow.as_ref().map(|_| &path.state).map_err(|_| ()));
        }
        let flow = flow?;
        self.machine.note_branch(idx, &flow);
        self.precision.end(place, std::mem::take(&mut self.machine.trail));
        if matches!(self.machine.ops[idx], Op::Goto { .. } | Op::If { .. }) {
            path.jumps_since += 1;
        }
        match flow {
            Flow::End => return Ok(true),
            Flow::To(to) => self.follow(path, to),
            Flow::Both { next, jump, jump_state } => {
                self.wait(path, jump, *jump_state)?;
                self.follow(path, next);
            }
        }
        Ok(false)
    }

    fn follow(&mut self, path: &mut Path, to: usize) {
        self.count_back_jump(path.idx, to);
        path.idx = to;
    }

    fn wait(&mut self, path: &Path, to: usize, state: State) -> Result<(), Fault> {
        if self.waiting.len() >= MAX_WAITING {
            let n = self.waiting.len() + 1;
            return Err(Fault::new(format!("The sequence of {n} jumps is too complex.")));
        }
        self.count_back_jump(path.idx, to);
        self.nodes[path.node].open += 1;
        self.waiting.push(Path { state, idx: to, ..*path });
        Ok(())
    }

    fn count_back_jump(&mut self, from: usize, to: usize) {
        let returns = matches!(
            self.machine.ops[from],
            Op::Exit | Op::CallLocal { .. } | Op::CallHelper { .. }
        );
        if to <= from && !returns {
            self.back_jumps[from] = self.back_jumps[from].saturating_add(1);
        }
    }

    /// `path` comes to a join; `true` where all that follows is known to be safe.
    fn arrive(&mut self, path: &mut Path) -> Result<bool, Fault> {
        let idx = path.idx;
        path.state.forget_dead(idx, self.live);
        let same = |n: &usize| {
            self.nodes[*n].state.as_ref().is_some_and(|state| state.equals(&path.state))
        };
        if self.remembered[idx].open.iter().rev().take(MAX_ANCESTORS).any(same) {
            return Err(Fault::new(format!("infinite loop detected at insn {idx}"))
                .hint("nothing that the loop's end depends on changes in it"));
        }
        if self.prune(path) {
            if let Some(trace) = &mut self.trace {
                let insn_idx = |step: usize| self.precision.steps[step].insn_idx;
                trace.pruned(path.last_step.map(|step| (step, insn_idx(step))), idx);
            }
            return Ok(true);
        }
        let far = path.insns_since >= MIN_INSNS_BETWEEN && path.jumps_since >= MIN_JUMPS_BETWEEN;
        let Remembered { open, closed } = &self.remembered[idx];
        if far || (open.is_empty() && closed.is_empty()) {
            self.remember(path);
        }
        Ok(false)
    }

    /// Whether what follows was explored from a state that includes this one.
    fn prune(&mut self, path: &Path) -> bool {
        let closed = &self.remembered[path.idx].closed;
        let includes = |n: &usize| {
            let Node { state, mark, .. } = &self.nodes[*n];
            let needed = self.precision.needed_at(*mark);
            state.as_ref().is_some_and(|state| state.includes(&path.state, needed))
        };
        let Some(at) = closed.iter().rposition(includes) else { return false };
        let n = self.remembered[path.idx].closed.remove(at);
        self.remembered[path.idx].closed.push(n);
        // What was needed there is needed here.
        let needed = *self.precision.needed_at(self.nodes[n].mark);
        self.precision.need(path.place(), needed);
        true
    }

    fn remember(&mut self, path: &mut Path) {
        let n = self.nodes.len();
        let mut place = path.place();
        self.precision.mark(&mut place);
        path.mark = place.mark;
        // The path now counts for the new node, and the new node for the old one.
        let (parent, state) = (Some(path.node), Some(path.state.clone()));
        self.nodes.push(Node { parent, open: 1, state, insn_idx: path.idx, mark: path.mark });
        path.node = n;
        path.insns_since = 0;
        path.jumps_since = 0;
        self.remembered[path.idx].open.push(n);
    }

    /// A path below `node` has been explored to its end.
    fn close(&mut self, node: usize) {
        let mut at = Some(node);
        while let Some(n) = at {
            self.nodes[n].open -= 1;
            if self.nodes[n].open > 0 {
                return;
            }
            self.closed(n);
            at = self.nodes[n].parent;
        }
    }

    /// Everything below `n` has been explored.
    fn closed(&mut self, n: usize) {
        let Remembered { open, closed } = &mut self.remembered[self.nodes[n].insn_idx];
        let Some(at) = open.iter().rposition(|o| *o == n) else { return };
        open.remove(at);
        closed.push(n);
        if closed.len() > MAX_CLOSED {
            let oldest = closed.remove(0);
            self.nodes[oldest].state = None;
        }
    }

    fn too_large(&self, n_processed: usize) -> Fault {
        let eater = Loop::hottest(self.machine.ops, &self.back_jumps).map(|eater| {
            // Two rounds of the current path: the newest, and the one before it.
            let mut rounds = self.remembered[eater.head()].open.iter().rev();
            let (after, before) = (rounds.next(), rounds.next());
            let node = |n: &usize| Some((self.nodes[*n].state.as_ref()?, self.nodes[*n].mark));
            let before = before.and_then(node);
            let rounds = before.zip(after.and_then(node)).map(|((before, mark), (after, _))| {
                (before, self.precision.needed_at(mark), after)
            });
            eater.describe(self.program, self.machine.maps, &self.precision.steps, rounds)
        });
        budget::too_large(n_processed, eater)
    }

    fn refuse(&self, path: &Path, fault: Fault) -> Refusal {
        let mut steps = BTreeSet::new();
        let mut at = path.last_step;
        while let Some(step) = at
            && steps.len() < trace::MAX_STEPS
        {
            steps.insert(step);
            at = self.precision.steps.get(step).and_then(|s| s.prev);
        }
        let insn_idx = path.last_step.map_or(0, |s| self.precision.steps[s].insn_idx);
        let insn_idx = if fault.message.starts_with("infinite") { path.idx } else { insn_idx };
        Refusal { insn_idx, fault, steps }
    }
}
