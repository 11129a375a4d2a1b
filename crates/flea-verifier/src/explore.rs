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
//!    more instructions than were visited here: at most [`BUDGET`], callbacks' rounds apart.
//!
//! A helper that calls a function in rounds adds the one kind of cycle that is allowed, back
//! to its call ([`crate::callback`]). Each arrival there is remembered; those of one call
//! form a family, named by the first one, the root ([`crate::state::Rounds`]).
//!
//! 4. A round that ends in a state included by any of its own family needs no second look,
//!    even while that one is being explored. *Nothing unsafe is missed*: whatever can happen
//!    from the new state can happen from the older one, and all of that is looked at before
//!    the program is accepted. (Which numbers will matter is not known yet: all are compared,
//!    and all count as needed.) *It ends*: the edge back is taken once per round, and at run
//!    time the helper counts its rounds, or its map's elements. Another call's family will not
//!    do: `for (i = 0; i < 9; i++) bpf_loop(1, set_to_0, &i, 0)` never ends, and each call's
//!    round leaves what the first call found.
//! 5. For the same reason no state may be pruned by one within a round of another call, as
//!    long as that call is being explored: [`Explorer::may_prune`]. Then order all remembered
//!    states by when their exploration is complete, and let a family count as its root.
//!    Outside of rounds every edge leads to an earlier one; a round's edges lead to the same
//!    family or to an earlier one. So a program that never ended would have to do endless
//!    rounds in one call.
//! 6. Where rounds change a number again and again, the arrivals would go on as long as it
//!    changes. After some rounds such numbers are widened, which only forgets. What is
//!    refused then is tried again without, as Linux does it ([`Patience`]). A round is
//!    followed before what comes behind the call, so that the widest state gets there first
//!    and the others find it explored.

use std::collections::BTreeSet;

use flea_object::spec::Program;

use crate::budget::{self, Loop};
use crate::cfg::Cfg;
use crate::liveness::Liveness;
use crate::machine::{Flow, Machine};
use crate::op::Op;
use crate::precision::{Needs, Place, Precision};
use crate::report::Fault;
use crate::report::Named;
use crate::state::{Rounds, State, Widening};
use crate::story::Visit;
use crate::trace::{self, Sink, Trace};

/// Instructions that may be visited (Linux: BPF_COMPLEXITY_LIMIT_INSNS). Fewer where thousands
/// of random programs are tried, some of which use up all of it.
pub(crate) const BUDGET: usize = if cfg!(test) { 5_000 } else { 1_000_000 };
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
/// Rounds of a callback, on all paths together, that are looked at before numbers which change
/// in them are widened: of a call in the main function or its callees, and of one within a round.
const EXACT_ROUNDS: u32 = 8;
const EXACT_ROUNDS_WITHIN: u32 = 2;
/// So many more widen bounds that move; then the whole number is given up.
const ROUNDS_OF_BOUNDS: u32 = 8;

/// Whether numbers that change in each round of a callback are followed for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// They are widened after some rounds.
    Short,
    /// They are, until the budget is used up.
    Endless,
}

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
    /// How many of them have a state, and had at once.
    n_states: usize,
    peak_states: usize,
    /// For each instruction.
    remembered: Vec<Remembered>,
    waiting: Vec<Path>,
    precision: Precision<'a>,
    /// How often each jump backwards was followed.
    back_jumps: Vec<u32>,
    patience: Patience,
    /// A number was widened, so that with endless patience the verdict may be another one.
    pub(crate) has_widened: bool,
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
    /// Of the first arrival at a helper's call: arrivals after rounds, on all paths.
    n_rounds: u32,
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
        patience: Patience,
    ) -> Self {
        let n_insns = machine.ops.len();
        let precision = Precision::new(machine.ops);
        Self {
            machine,
            program,
            cfg,
            live,
            nodes: Vec::new(),
            n_states: 0,
            peak_states: 0,
            remembered: vec![Remembered::default(); n_insns],
            waiting: Vec::new(),
            precision,
            back_jumps: vec![0; n_insns],
            patience,
            has_widened: false,
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

    fn named(&self) -> Named<'a> {
        Named { maps: self.machine.maps, types: self.machine.types() }
    }

    /// Linux's last lines of a log: what the walk took.
    pub(crate) fn summary(&mut self, refusal: Option<&Refusal>) {
        let n_insns = self.precision.steps.len();
        let most = self.remembered.iter().map(|r| r.open.len() + r.closed.len()).max().unwrap_or(0);
        let (n_states, peak) = (self.nodes.len(), self.peak_states);
        let depths: Vec<String> = self.machine.stack_bytes.iter().map(u32::to_string).collect();
        if let Some(trace) = &mut self.trace {
            if let Some(refusal) = refusal {
                trace.note(&refusal.fault.message);
            }
            trace.note(&format!("stack depth {}", depths.join("+")));
            trace.note(&format!(
                "processed {n_insns} insns (limit {BUDGET}) max_states_per_insn {most} \
                 total_states {n_states} peak_states {peak} mark_read 0"
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
        self.nodes.push(Node {
            parent: None,
            open: 1,
            state: None,
            insn_idx: idx,
            mark,
            n_rounds: 0,
        });
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
        let (program, ops, known) = (self.program, self.machine.ops, self.named());
        let seen = trace::Step { number: step, idx, prev, ops, program, known };
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
        let ops = self.machine.ops;
        // A round's way back counts for the call.
        let looping = match ops[from] {
            Op::Exit if ops[to].takes_callback() => to,
            Op::Goto { .. } | Op::If { .. } if to <= from => from,
            _ => return,
        };
        self.back_jumps[looping] = self.back_jumps[looping].saturating_add(1);
    }

    /// `path` comes to a join; `true` where all that follows is known to be safe.
    fn arrive(&mut self, path: &mut Path) -> Result<bool, Fault> {
        let idx = path.idx;
        path.state.forget_dead(idx, self.live);
        let call = path.state.rounds().map(|r| r.root);
        // To come back to where another round was is no loop.
        let loops = |state: &State| {
            let family = state.rounds().map(|r| r.root);
            let same_round = || state.all_rounds().eq(path.state.all_rounds());
            (call.is_none() || call != family)
                && (family.is_some() || same_round())
                && state.equals(&path.state)
        };
        let same = |n: &usize| self.nodes[*n].state.as_ref().is_some_and(loops);
        if self.remembered[idx].open.iter().rev().take(MAX_ANCESTORS).any(same) {
            return Err(Fault::new(format!("infinite loop detected at insn {idx}"))
                .hint("nothing that the loop's end depends on changes in it"));
        }
        if self.prune(path) {
            return Ok(true);
        }
        if self.machine.ops[idx].takes_callback() {
            return Ok(self.arrive_at_rounds(path));
        }
        let far = path.insns_since >= MIN_INSNS_BETWEEN && path.jumps_since >= MIN_JUMPS_BETWEEN;
        let Remembered { open, closed } = &self.remembered[idx];
        if far || (open.is_empty() && closed.is_empty()) {
            self.remember(path);
        }
        Ok(false)
    }

    /// Whether `path` ends here: what follows was explored from a state that includes this one.
    fn prune(&mut self, path: &Path) -> bool {
        let Some(needed) = self.known_by_family(path).or_else(|| self.known(path)) else {
            return false;
        };
        // What was needed there is needed here.
        self.precision.need(path.place(), needed);
        if let Some(trace) = &mut self.trace {
            let insn_idx = |step: usize| self.precision.steps[step].insn_idx;
            trace.pruned(path.last_step.map(|step| (step, insn_idx(step))), path.idx);
        }
        true
    }

    /// An arrival after a round, and one of its family includes it. Nobody knows yet what that one
    /// will need, so all of it is compared, and needed.
    fn known_by_family(&self, path: &Path) -> Option<Needs> {
        let call = path.state.rounds()?.root;
        let Remembered { open, closed } = &self.remembered[path.idx];
        let includes = |n: &usize| {
            self.nodes[*n].state.as_ref().is_some_and(|state| {
                state.rounds().is_some_and(|r| r.root == call)
                    && state.includes(&path.state, &Needs::ALL)
            })
        };
        open.iter().rev().chain(closed.iter().rev()).any(includes).then_some(Needs::ALL)
    }

    /// What a state needs that was explored to its end and includes this one.
    fn known(&mut self, path: &Path) -> Option<Needs> {
        let closed = &self.remembered[path.idx].closed;
        let includes = |n: &usize| {
            let Node { state, mark, .. } = &self.nodes[*n];
            let needed = self.precision.needed_at(*mark);
            state.as_ref().is_some_and(|state| {
                self.may_prune(state, path) && state.includes(&path.state, needed)
            })
        };
        let at = closed.iter().rposition(includes)?;
        let n = self.remembered[path.idx].closed.remove(at);
        self.remembered[path.idx].closed.push(n);
        Some(*self.precision.needed_at(self.nodes[n].mark))
    }

    /// What `known` stands for is explored to its end: every call in a round of which it is has
    /// been, or `path` is in a round of that very call.
    fn may_prune(&self, known: &State, path: &Path) -> bool {
        known.all_rounds().zip(path.state.all_rounds()).all(|(at_known, on_path)| {
            at_known.is_none_or(|r| {
                self.nodes[r.root].open == 0 || on_path.is_some_and(|p| p.root == r.root)
            })
        })
    }

    /// `path` comes to the call of a helper that calls a function in rounds, for the first time
    /// or after a round; `true` where all that follows is known to be safe.
    fn arrive_at_rounds(&mut self, path: &mut Path) -> bool {
        if self.widen(path) && self.prune(path) {
            return true;
        }
        if let Some(rounds) = path.state.rounds() {
            self.nodes[rounds.root].n_rounds += 1;
        }
        let first = Rounds { root: self.nodes.len(), n_done: 0, n_seen: 0 };
        path.state.set_rounds(Some(path.state.rounds().unwrap_or(first)));
        self.remember(path);
        false
    }

    /// After some rounds, forgets the numbers that the last one has changed. A walk back goes on
    /// as if they were the same, so what is needed of the wider number is needed of the other.
    fn widen(&mut self, path: &mut Path) -> bool {
        let Some(rounds) = path.state.rounds() else { return false };
        let within = path.state.innermost_callback() > 0;
        let exact = if within { EXACT_ROUNDS_WITHIN } else { EXACT_ROUNDS };
        let n_rounds = self.nodes[rounds.root].n_rounds;
        if n_rounds < exact || self.patience == Patience::Endless {
            return false;
        }
        let open = self.remembered[path.idx].open.iter().rev();
        let mut states = open.filter_map(|n| self.nodes[*n].state.as_ref());
        let before = states.find(|state| state.rounds().is_some_and(|r| r.root == rounds.root));
        let Some(before) = before else { return false };
        let bounds = n_rounds < exact + ROUNDS_OF_BOUNDS;
        let how = if bounds { Widening::Bounds } else { Widening::Whole };
        path.state.widen(before, how);
        self.has_widened = true;
        true
    }

    fn remember(&mut self, path: &mut Path) {
        let n = self.nodes.len();
        let mut place = path.place();
        self.precision.mark(&mut place);
        path.mark = place.mark;
        // The path now counts for the new node, and the new node for the old one.
        let (parent, state) = (Some(path.node), Some(path.state.clone()));
        let (insn_idx, mark) = (path.idx, path.mark);
        self.nodes.push(Node { parent, open: 1, state, insn_idx, mark, n_rounds: 0 });
        self.n_states += 1;
        self.peak_states = self.peak_states.max(self.n_states);
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
            self.n_states -= 1;
        }
    }

    fn too_large(&self, n_processed: usize) -> Fault {
        let hottest = self.back_jumps.iter().enumerate().max_by_key(|(_, n)| **n);
        if let Some((idx, n)) = hottest
            && *n > 0
            && self.machine.ops[idx].takes_callback()
        {
            let eater = format!(
                "the function that is called back at insn {idx} was verified for {n} rounds, and \
                 each left something else behind: bound what it changes"
            );
            return budget::too_large(n_processed, Some(eater));
        }
        let eater = Loop::hottest(self.machine.ops, &self.back_jumps).map(|eater| {
            // Two rounds of the current path: the newest, and the one before it.
            let mut rounds = self.remembered[eater.head()].open.iter().rev();
            let (after, before) = (rounds.next(), rounds.next());
            let node = |n: &usize| Some((self.nodes[*n].state.as_ref()?, self.nodes[*n].mark));
            let before = before.and_then(node);
            let rounds = before.zip(after.and_then(node)).map(|((before, mark), (after, _))| {
                (before, self.precision.needed_at(mark), after)
            });
            eater.describe(self.program, self.named(), &self.precision.steps, rounds)
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
