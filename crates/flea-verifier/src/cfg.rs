//! Control flow as far as it can be seen without values: functions, jump targets, reachable
//! instructions, depth of calls.

use flea_object::spec::{Program, ProgramFunction, Prototype};

use crate::op::Op;
use crate::report::Fault;

/// Frames that may be on top of each other, the main function's included.
pub(crate) const MAX_CALL_DEPTH: usize = 8;

/// The shape of a program.
#[derive(Debug)]
pub(crate) struct Cfg {
    /// The main function first, then by position.
    pub(crate) functions: Vec<Span>,
    /// Functions so that each comes after all that it calls.
    pub(crate) callees_first: Vec<usize>,
    /// Instructions that can be reached from more than one other.
    joins: Vec<bool>,
    /// Those functions that are verified alone.
    globals: Vec<Option<ProgramFunction>>,
}

/// Instructions `start..end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// What control does after an instruction, within its function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Successors {
    pub(crate) next: Option<usize>,
    pub(crate) jump: Option<usize>,
}

impl Successors {
    pub(crate) fn of(idx: usize, op: &Op) -> Self {
        match *op {
            Op::Exit => Self { next: None, jump: None },
            Op::Goto { target } => Self { next: None, jump: Some(target) },
            Op::If { target, .. } => Self { next: Some(idx + 1), jump: Some(target) },
            Op::Const { .. }
            | Op::MapAddress { .. }
            | Op::MapValueAddress { .. }
            | Op::FunctionAddress { .. } => Self { next: Some(idx + 2), jump: None },
            _ => Self { next: Some(idx + 1), jump: None },
        }
    }

    pub(crate) fn iter(self) -> impl Iterator<Item = usize> {
        self.next.into_iter().chain(self.jump)
    }
}

impl Cfg {
    /// Checks the shape of `ops`.
    ///
    /// # Errors
    /// The instruction at fault, and what is wrong with it.
    pub(crate) fn new(ops: &[Op]) -> Result<Self, (usize, Fault)> {
        let functions = find_functions(ops);
        check_jumps(ops, &functions)?;
        let mut cfg =
            Self { functions, callees_first: Vec::new(), joins: Vec::new(), globals: Vec::new() };
        cfg.order_calls(ops)?;
        cfg.joins = cfg.reach(ops)?;
        Ok(cfg)
    }

    /// The index of the function that starts at `start`, which must be one.
    pub(crate) fn function_at(&self, start: usize) -> usize {
        self.functions.partition_point(|f| f.start < start)
    }

    /// Which functions are global, as `program` says.
    pub(crate) fn with_globals(mut self, program: &Program) -> Self {
        let of = |span: &Span| {
            let idx = u32::try_from(span.start).ok().filter(|idx| *idx > 0)?;
            let function = program.functions.iter().find(|f| f.insn_idx == idx)?;
            function.prototype.is_some().then(|| function.clone())
        };
        self.globals = self.functions.iter().map(of).collect();
        self
    }

    /// What `function` takes, where it is verified alone.
    pub(crate) fn prototype(&self, function: usize) -> Option<&Prototype> {
        self.globals.get(function)?.as_ref()?.prototype.as_ref()
    }

    /// The name of a `function` that is verified alone.
    pub(crate) fn global_name(&self, function: usize) -> &str {
        let global = self.globals.get(function).and_then(Option::as_ref);
        global.map_or("", |f| f.name.as_str())
    }

    /// Several ways lead here: where states are compared.
    pub(crate) fn is_join(&self, idx: usize) -> bool {
        self.joins.get(idx).copied().unwrap_or(false)
    }

    fn order_calls(&mut self, ops: &[Op]) -> Result<(), (usize, Fault)> {
        let mut heights = vec![None; self.functions.len()];
        self.height(ops, 0, 0, &mut heights)?;
        Ok(())
    }

    /// How many frames a call of `function` needs. Recursion (of the program as of this
    /// function) ends at the depth limit.
    fn height(
        &mut self,
        ops: &[Op],
        function: usize,
        depth: usize,
        heights: &mut [Option<usize>],
    ) -> Result<usize, (usize, Fault)> {
        let span = self.functions[function];
        let too_deep = |height: usize| {
            (depth + height > MAX_CALL_DEPTH).then(|| {
                let frames = MAX_CALL_DEPTH + 1;
                let fault = Fault::new(format!("the call stack of {frames} frames is too deep !"));
                (span.start, fault.hint("recursion is not possible; nest fewer calls"))
            })
        };
        if let Some(e) = too_deep(heights[function].unwrap_or(1)) {
            return Err(e);
        }
        if let Some(height) = heights[function] {
            return Ok(height);
        }
        let mut height = 1;
        for op in &ops[span.start..span.end] {
            // As in Linux: who takes a function's address is taken to call it.
            if let Some(target) = op.function() {
                let callee = self.function_at(target);
                height = height.max(1 + self.height(ops, callee, depth + 1, heights)?);
            }
        }
        heights[function] = Some(height);
        self.callees_first.push(function);
        Ok(height)
    }

    /// Every instruction must be reachable; returns which are reached more than one way.
    fn reach(&self, ops: &[Op]) -> Result<Vec<bool>, (usize, Fault)> {
        let mut ways = vec![0u8; ops.len()];
        let mut todo = vec![0];
        ways[0] = 1;
        while let Some(idx) = todo.pop() {
            for to in Successors::of(idx, &ops[idx]).iter().chain(ops[idx].function()) {
                if ways[to] == 0 {
                    todo.push(to);
                }
                ways[to] = ways[to].saturating_add(1);
            }
            // A helper that calls back is come to again after each round, and what is behind it
            // after any number of them.
            if ops[idx].takes_callback() {
                for to in [idx, idx + 1] {
                    ways[to] = ways[to].saturating_add(1);
                }
            }
        }
        for (idx, op) in ops.iter().enumerate() {
            if ways[idx] == 0 && *op != Op::SecondHalf {
                return Err((
                    idx,
                    Fault::new(format!("unreachable insn {idx}"))
                        .hint("remove the instructions that no jump leads to"),
                ));
            }
        }
        Ok(ways.into_iter().map(|n| n > 1).collect())
    }
}

fn find_functions(ops: &[Op]) -> Vec<Span> {
    let mut starts = vec![0];
    starts.extend(ops.iter().filter_map(Op::function));
    starts.sort_unstable();
    starts.dedup();
    let ends = starts.iter().skip(1).copied().chain([ops.len()]);
    starts.iter().zip(ends).map(|(&start, end)| Span { start, end }).collect()
}

fn check_jumps(ops: &[Op], functions: &[Span]) -> Result<(), (usize, Fault)> {
    for span in functions {
        for idx in span.start..span.end {
            let op = &ops[idx];
            let last = idx + 1 == span.end;
            if last && *op != Op::SecondHalf && !matches!(op, Op::Exit | Op::Goto { .. })
                || last && *op == Op::SecondHalf
            {
                return Err((idx, Fault::new("last insn is not an exit or jmp")));
            }
            let jump = Successors::of(idx, op).jump;
            if let Some(to) = jump
                && !(span.start..span.end).contains(&to)
            {
                let text = format!("jump out of range from insn {idx} to {to}");
                return Err((idx, Fault::new(text)));
            }
            for to in jump.into_iter().chain(op.function()) {
                if ops[to] == Op::SecondHalf {
                    let text = format!("jump into the middle of ldimm64 insn {to}");
                    return Err((idx, Fault::new(text)));
                }
            }
        }
    }
    Ok(())
}
