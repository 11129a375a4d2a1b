//! The made-up process: threads that call functions, sleep, are interrupted by signals, switch
//! stacks, end and begin, one step at a time, in an order that the seed says.
//!
//! It executes the bytes that are there (`execute.rs`) and remembers the first thing that
//! must not happen. Who changes it knows nothing of that.

use std::ops::Range;

use flea::registry::Registry;
use flea_process::Trap;

use crate::context::{Call, Context, Doing, HANDLER, OUTSIDE, RBP, RBX, RSP};
use crate::dice::Dice;
use crate::functions::{Function, LAYOUTS};
use crate::loader::Loader;
use crate::text::Text;

/// Handlers of signals on one stack.
const MAX_HANDLERS: usize = 2;
/// Calls on one stack.
const MAX_CALLS: usize = 3;
/// What a trace keeps at most.
const MAX_TRACE: usize = 100_000;

/// How large a process is. What is smaller has the same life otherwise, as far as it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Functions at most.
    pub functions: usize,
    /// Threads at most.
    pub threads: usize,
    /// Sessions of controllers at most.
    pub sessions: usize,
}

impl Size {
    /// No smaller than the seed says.
    pub const FULL: Self = Self { functions: 4, threads: 5, sessions: 8 };
}

/// A thread, and the CPU that it is on.
#[derive(Clone, Debug)]
pub struct Thread {
    /// What it is in the middle of.
    pub context: Context,
    /// Its CPU.
    pub cpu: usize,
}

/// A body that somebody attaches, and when.
#[derive(Clone, Debug)]
pub struct Body {
    /// The function.
    pub function: usize,
    /// It runs at entry.
    pub at_entry: bool,
    /// It runs at exit.
    pub at_exit: bool,
    /// Start of the data arena's mapping that it works on.
    pub mapping: u64,
    /// When somebody began to attach it.
    pub born: u64,
    /// Since when it is sure to be attached.
    pub firm_since: Option<u64>,
    /// Since when it is sure not to be.
    pub gone_since: Option<u64>,
}

/// See the module.
#[derive(Debug)]
pub struct Machine {
    /// What decides.
    pub dice: Dice,
    /// What can be called.
    pub functions: Vec<Function>,
    /// Code, as CPUs see it.
    pub text: Text,
    /// What takes functions away and brings them back.
    pub loader: Loader,
    /// The threads.
    pub threads: Vec<Thread>,
    /// Coroutines without a thread.
    pub switched_away: Vec<Context>,
    /// Breakpoints that a tracer answers.
    pub traps: Vec<Trap>,
    /// All bodies there ever were.
    pub bodies: Vec<Body>,
    /// Data arenas that are mapped: their starts.
    pub data: Vec<u64>,
    /// Code of Flea's that the registry names.
    pub live: Vec<Range<u64>>,
    /// Steps made.
    pub now: u64,
    /// It has ended.
    pub is_gone: bool,
    /// Nothing new begins any more; what has begun comes to its end.
    pub is_quiet: bool,
    /// The first thing that must not happen.
    pub violation: Option<String>,
    /// What has happened, where somebody wants to know.
    pub trace: Option<Vec<String>>,
}

impl Machine {
    /// The process of a seed.
    pub fn new(seed: u64, size: Size, traced: bool) -> Self {
        let mut dice = Dice::new(seed);
        let n_functions = (1 + dice.index(4)).min(size.functions);
        let n_threads = (1 + dice.index(5)).min(size.threads);
        let n_cpus = 1 + dice.index(3);
        let n_coroutines = dice.index(3);
        let functions: Vec<Function> = (0..n_functions)
            .map(|i| Function::new(i, &LAYOUTS[dice.index(LAYOUTS.len())]))
            .collect();
        let text = Text::new(&functions, n_cpus);
        let thread = |i| Thread { context: Context::new(i), cpu: i % n_cpus };
        let threads = (0..n_threads).map(thread).collect();
        let others = n_threads..n_threads + n_coroutines;
        let mut machine = Self {
            dice,
            loader: Loader::new(functions.len()),
            functions,
            text,
            threads,
            switched_away: others.map(Context::new).collect(),
            traps: Vec::new(),
            bodies: Vec::new(),
            data: Vec::new(),
            live: Vec::new(),
            now: 0,
            is_gone: false,
            is_quiet: false,
            violation: None,
            trace: traced.then(Vec::new),
        };
        let functions: Vec<&str> = machine.functions.iter().map(|f| f.layout.name).collect();
        let about = format!("functions {functions:?}, {n_threads} threads, {n_cpus} CPUs");
        machine.note(|| about);
        machine.run(60);
        machine
    }

    /// Writes down what happens.
    pub fn note(&mut self, what: impl FnOnce() -> String) {
        // What comes behind the first violation explains nothing.
        if self.violation.is_some() {
            return;
        }
        let now = self.now;
        if let Some(trace) = &mut self.trace
            && trace.len() < MAX_TRACE
        {
            trace.push(format!("{now:6} {}", what()));
        }
    }

    /// Writes down what must not happen.
    pub fn violate(&mut self, what: String) {
        self.note(|| format!("MUST NOT BE: {what}"));
        self.violation.get_or_insert(what);
    }

    /// Some threads go on for a while.
    pub fn run(&mut self, n_steps: u64) {
        for _ in 0..n_steps {
            if self.is_gone || self.violation.is_some() {
                return;
            }
            self.now += 1;
            let i = self.dice.index(self.threads.len());
            self.step(i);
            if self.dice.one_in(3) {
                self.step_loader();
            }
        }
    }

    /// A few steps, or none.
    pub fn run_a_little(&mut self) {
        let n_steps = self.dice.below(10);
        self.run(n_steps);
    }

    fn step(&mut self, i: usize) {
        let cpu = self.threads[i].cpu;
        let n_stale = self.text.n_stale(cpu);
        if n_stale > 0 && self.dice.one_in(4) {
            let which = self.dice.index(n_stale);
            self.text.arrive(cpu, which);
        }
        if self.text.n_cpus() > 1 && self.dice.one_in(16) {
            let cpu = self.dice.index(self.text.n_cpus());
            self.threads[i].cpu = cpu;
            self.text.arrive_by_scheduler(cpu);
        }
        match self.threads[i].context.doing {
            Doing::Trapped if self.dice.one_in(2) => self.answer(i),
            Doing::Trapped => {}
            Doing::Sleeps(left) => self.sleep(i, left),
            Doing::Runs => self.go_on(i),
        }
    }

    fn sleep(&mut self, i: usize, left: u64) {
        let context = &mut self.threads[i].context;
        if !self.is_quiet && self.dice.one_in(32) && context.handlers.len() < MAX_HANDLERS {
            context.interrupt(self.dice.below(8));
            return;
        }
        context.doing = if left == 0 { Doing::Runs } else { Doing::Sleeps(left - 1) };
        let may_switch = !self.is_quiet && !self.switched_away.is_empty();
        if may_switch && self.dice.one_in(8) && context.handlers.is_empty() {
            let other = self.dice.index(self.switched_away.len());
            let back = &mut self.switched_away[other];
            std::mem::swap(&mut self.threads[i].context, back);
            self.note(|| format!("thread {i} switches to another stack"));
        }
    }

    fn go_on(&mut self, i: usize) {
        let context = &mut self.threads[i].context;
        if !self.is_quiet && context.handlers.len() < MAX_HANDLERS && self.dice.one_in(20) {
            let longest = if self.dice.one_in(6) { 100 } else { 6 };
            let left = self.dice.below(longest);
            context.interrupt(left);
            let at = context.handlers.last().map_or(0, |handler| handler.rip);
            self.note(|| format!("thread {i} is interrupted at {at:#x}"));
            return;
        }
        match context.rip {
            OUTSIDE if self.is_quiet => self.switch_back(i),
            OUTSIDE if self.dice.one_in(40) => self.end_and_begin(i),
            OUTSIDE => self.call(i),
            HANDLER => self.handle(i),
            _ => self.execute(i),
        }
    }

    fn handle(&mut self, i: usize) {
        let context = &mut self.threads[i].context;
        let handler = context.handlers.last_mut().expect("who is there was interrupted");
        if handler.left == 0 {
            context.return_from_handler();
        } else {
            handler.left -= 1;
            if !self.is_quiet && context.calls.len() < MAX_CALLS && self.dice.one_in(10) {
                self.call(i);
            }
        }
    }

    /// A thread with nothing to do takes up what was switched away.
    fn switch_back(&mut self, i: usize) {
        let waits = |context: &&mut Context| !context.calls.is_empty();
        if let Some(other) = self.switched_away.iter_mut().find(waits) {
            std::mem::swap(&mut self.threads[i].context, other);
        }
    }

    /// Whether nobody is in the middle of anything.
    pub fn is_idle(&self) -> bool {
        self.contexts().all(|context| context.rip == OUTSIDE && context.handlers.is_empty())
    }

    /// One thread ends and another begins: its stack is used again.
    fn end_and_begin(&mut self, i: usize) {
        let context = &mut self.threads[i].context;
        if context.calls.is_empty() && context.handlers.is_empty() {
            context.scrub();
            let cpu = self.dice.index(self.text.n_cpus());
            self.threads[i].cpu = cpu;
            self.text.arrive_by_scheduler(cpu);
        }
    }

    fn call(&mut self, i: usize) {
        let function = self.dice.index(self.functions.len());
        if self.loader.is_closed(function) {
            return;
        }
        let entry = self.functions[function].entry();
        let context = &mut self.threads[i].context;
        let kept = [RSP, RBP, RBX].map(|register| context.regs[register]);
        context.calls.push(Call { function, started: self.now, kept, hits: Vec::new() });
        let back = context.rip;
        let has_room = context.call(entry, back);
        assert!(has_room, "a stack has room for the few calls that there are");
        self.note(|| format!("thread {i} calls function {function}"));
    }

    /// The tracer's answer to a thread that has run into a breakpoint.
    pub fn answer(&mut self, i: usize) {
        let thread = &mut self.threads[i];
        let site = thread.context.rip - 1;
        let Some(trap) = self.traps.iter().find(|trap| trap.site.0 == site) else {
            return self.violate(format!("thread {i} dies of a breakpoint at {site:#x}"));
        };
        let goes_to = trap.goes_to.0;
        thread.context.rip = goes_to;
        thread.context.doing = Doing::Runs;
        // It was stopped, and goes on by `iret`.
        self.text.serialise(thread.cpu);
        self.note(|| format!("thread {i} goes on from {site:#x} at {goes_to:#x}"));
    }

    /// A thread has come back to who called a function.
    pub fn returned(&mut self, i: usize) {
        let context = &mut self.threads[i].context;
        let call = context.calls.pop().expect("who returns was called");
        if [RSP, RBP, RBX].map(|register| context.regs[register]) != call.kept {
            return self.violate(format!("thread {i} comes back with other registers"));
        }
        self.note(|| format!("thread {i} comes back from function {}", call.function));
        if let Some(what) = self.miscounted(&call) {
            self.violate(format!("thread {i}: {what}"));
        }
    }

    /// What is wrong with the programs that have run for a call.
    fn miscounted(&self, call: &Call) -> Option<String> {
        for (key, body) in (0u32..).zip(&self.bodies).filter(|(_, b)| b.function == call.function) {
            let is_sure = body.firm_since.is_some_and(|since| since <= call.started);
            let is_over = body.gone_since.is_some_and(|since| since < call.started);
            for (at_exit, runs) in [(false, body.at_entry), (true, body.at_exit)] {
                let n_hits = call.hits.iter().filter(|hit| **hit == (key, at_exit)).count();
                let side = if at_exit { "exit" } else { "entry" };
                let expected = match (is_sure && runs, is_over || !runs) {
                    (true, _) => 1..=1,
                    (_, true) => 0..=0,
                    _ => 0..=1,
                };
                if !expected.contains(&n_hits) {
                    return Some(format!(
                        "body {key} ran {n_hits} times at {side} of function {}, not {expected:?}",
                        call.function
                    ));
                }
            }
        }
        None
    }

    /// A body runs.
    pub fn hit(&mut self, i: usize, key: u32, at_exit: bool) {
        self.note(|| format!("thread {i} runs body {key}"));
        let Some(body) = usize::try_from(key).ok().and_then(|key| self.bodies.get(key)) else {
            return self.violate(format!("thread {i} runs body {key}, which never was"));
        };
        if !self.data.contains(&body.mapping) {
            return self.violate(format!("body {key} runs on memory that was given back"));
        }
        match self.threads[i].context.calls.last_mut() {
            Some(call) => call.hits.push((key, at_exit)),
            None => self.violate(format!("thread {i} runs body {key} outside of a call")),
        }
    }

    /// All stacks.
    pub fn contexts(&self) -> impl Iterator<Item = &Context> {
        self.threads.iter().map(|thread| &thread.context).chain(&self.switched_away)
    }

    /// Complains where somebody is, or comes back to, what is not there any more.
    pub fn nobody_in(&mut self, range: &Range<u64>, what: &str) {
        if self.contexts().any(|context| context.leads_into(range)) {
            self.violate(format!(
                "{what} {range:#x?} while a thread is in it, or comes back to it"
            ));
        }
    }

    /// From now on the registry names this code and no other.
    pub fn stored(&mut self, registry: &Registry) {
        let range = |at: u64, len: u32| at..at + u64::from(len);
        let functions = registry.functions.iter().flat_map(|f| {
            let bodies = f.bodies.iter().flat_map(|b| [b.entry, b.session, b.modify, b.exit]);
            bodies.flatten().chain(f.skeleton)
        });
        let placed = functions.chain(registry.retired.iter().map(|retired| retired.code));
        self.live = placed.map(|placed| range(placed.at.0, placed.len)).collect();
        let arenas: Vec<_> = self.text.arenas.iter().map(crate::text::Arena::range).collect();
        let is_lost = |at: u64| {
            arenas.iter().any(|arena| arena.contains(&at))
                && !self.live.iter().any(|live| live.contains(&at))
        };
        let mut lost = None;
        for context in self.contexts() {
            let returns = context.returns.iter().map(|(_, back)| *back);
            let handlers = context.handlers.iter().map(|handler| handler.rip);
            lost = lost.or(returns.chain(handlers).chain([context.rip]).find(|at| is_lost(*at)));
        }
        if let Some(at) = lost {
            self.violate(format!("code at {at:#x} was freed that a thread is in or comes back to"));
        }
    }
}
