//! What a walk writes down: the log in Linux's notation, and the states of a refused path.

use std::collections::BTreeSet;

use flea_object::disasm::Disasm;
use flea_object::spec::{Program, SourceLine};

use crate::op::Op;
use crate::report::{Named, registers, whole_state};
use crate::state::State;
use crate::story::Visit;

/// Steps that the log of a refusal shows; with source lines between them it may have twice as
/// many lines, of which [`MAX_LINES`] are kept.
const MAX_LOG_STEPS: usize = 200;
/// Lines of such a log.
pub(crate) const MAX_LINES: usize = 200;
/// Steps back from a fault that are kept to tell where a value came from.
pub(crate) const MAX_STEPS: usize = 2000;

/// Where a line's registers begin, as in Linux.
const COMMENT_COLUMN: usize = 38;

/// Where lines go, one by one.
pub(crate) type Sink<'s> = &'s mut dyn FnMut(&str);

/// What is wanted of a walk.
enum Wanted<'s> {
    /// These steps, which are the path to a fault.
    Path {
        steps: BTreeSet<usize>,
        /// The first of them that is in the log.
        shown_from: usize,
        lines: Vec<String>,
        visits: Vec<Visit>,
    },
    /// Everything, as Linux's level 2.
    All(Sink<'s>),
}

/// A log in the making.
pub(crate) struct Trace<'s> {
    wanted: Wanted<'s>,
    /// Index of the source line printed last.
    source_line: Option<usize>,
    /// The step written down last.
    last_step: Option<usize>,
}

/// One step about to be written down.
#[derive(Clone, Copy)]
pub(crate) struct Step<'a> {
    pub(crate) number: usize,
    pub(crate) idx: usize,
    /// The step before it on its path, and that one's instruction.
    pub(crate) prev: Option<(usize, usize)>,
    pub(crate) ops: &'a [Op],
    pub(crate) program: &'a Program,
    pub(crate) known: Named<'a>,
}

impl<'s> Trace<'s> {
    /// Of the path that has these steps.
    pub(crate) fn of_path(steps: BTreeSet<usize>) -> Self {
        let shown_from = steps.iter().rev().nth(MAX_LOG_STEPS - 1).copied().unwrap_or(0);
        Self::new(Wanted::Path { steps, shown_from, lines: Vec::new(), visits: Vec::new() })
    }

    /// Of everything.
    pub(crate) fn of_all(sink: Sink<'s>) -> Self {
        Self::new(Wanted::All(sink))
    }

    fn new(wanted: Wanted<'s>) -> Self {
        Self { wanted, source_line: None, last_step: None }
    }

    /// The log and the states of the path.
    pub(crate) fn into_path(self) -> (Vec<String>, Vec<Visit>) {
        match self.wanted {
            Wanted::Path { lines, visits, .. } => (lines, visits),
            Wanted::All(_) => (Vec::new(), Vec::new()),
        }
    }

    /// `step` is about to be executed.
    pub(crate) fn before(&mut self, step: Step<'_>, state: &State) {
        if let Wanted::Path { steps, visits, .. } = &mut self.wanted {
            if !steps.contains(&step.number) {
                return;
            }
            visits.push(Visit { idx: step.idx, state: state.clone() });
        }
        if !self.is_shown(step.number) {
            return;
        }
        let idx = step.idx;
        match (self.last_step, step.prev) {
            (Some(last), Some((prev, _))) if last == prev => {}
            (None, _) => self.line(&format!("{idx}:{}", whole_state(state, step.known))),
            (Some(_), prev) => {
                let from = prev.map_or(0, |(_, idx)| idx);
                let text = whole_state(state, step.known);
                self.line("");
                self.line(&format!("from {from} to {idx}:{text}"));
                self.source_line = None;
            }
        }
        self.last_step = Some(step.number);
        self.source(step);
        if self.is_last(step.number) {
            // The fault's own instruction: it has no state afterwards.
            self.line(&instruction(idx, step.program));
        }
    }

    /// `step` has been executed, with this outcome.
    pub(crate) fn after(&mut self, step: Step<'_>, outcome: Result<&State, ()>) {
        if !self.is_shown(step.number) || self.is_last(step.number) {
            return;
        }
        let text = instruction(step.idx, step.program);
        let regs = step.ops.get(step.idx).map(Op::registers).unwrap_or_default();
        let shown = outcome.map(|state| registers(state, &regs, step.known)).unwrap_or_default();
        match shown.is_empty() {
            true => self.line(&text),
            false => self.line(&format!("{text:<COMMENT_COLUMN$};{shown}")),
        }
        let entered = |state: &State| state.frame().call_idx == Some(step.idx);
        if let (Some(Op::CallLocal { .. }), Ok(state), Wanted::All(_)) =
            (step.ops.get(step.idx), outcome, &self.wanted)
            && entered(state)
        {
            self.line("callee:");
            self.line(whole_state(state, step.known).trim_start());
        }
    }

    /// A path ends before `idx`, where an earlier state includes its own.
    pub(crate) fn pruned(&mut self, step: Option<(usize, usize)>, idx: usize) {
        let straight = self.last_step == step.map(|(number, _)| number);
        if let Wanted::All(sink) = &mut self.wanted {
            let from = step.map_or(0, |(_, from)| from);
            let text = if straight {
                format!("{idx}: safe")
            } else {
                format!("from {from} to {idx}: safe")
            };
            sink(&text);
        }
    }

    /// Another function is walked alone.
    pub(crate) fn begin(&mut self, text: &str) {
        self.note(text);
        self.last_step = None;
        self.source_line = None;
    }

    /// Anything else worth a line in the complete log.
    pub(crate) fn note(&mut self, text: &str) {
        if let Wanted::All(sink) = &mut self.wanted {
            sink(text);
        }
    }

    fn source(&mut self, step: Step<'_>) {
        let lines = &step.program.lines;
        let at = lines.partition_point(|l| l.insn_idx as usize <= step.idx).checked_sub(1);
        let line = at.and_then(|at| lines.get(at));
        let before = self.source_line.and_then(|at| lines.get(at));
        self.source_line = at;
        // One line may be there once for each of its columns.
        let same = |a: &SourceLine, b: &SourceLine| (&a.file, a.line) == (&b.file, b.line);
        if let Some(line) = line
            && before.is_none_or(|before| !same(before, line))
        {
            let file = line.file.rsplit('/').next().unwrap_or(&line.file);
            self.line(&format!("; {} @ {file}:{}", line.text.trim(), line.line));
        }
    }

    fn is_shown(&self, step: usize) -> bool {
        match &self.wanted {
            Wanted::All(_) => true,
            Wanted::Path { steps, shown_from, .. } => step >= *shown_from && steps.contains(&step),
        }
    }

    fn is_last(&self, step: usize) -> bool {
        matches!(&self.wanted, Wanted::Path { steps, .. } if steps.last() == Some(&step))
    }

    fn line(&mut self, text: &str) {
        match &mut self.wanted {
            Wanted::Path { lines, .. } => lines.push(text.to_owned()),
            Wanted::All(sink) => sink(text),
        }
    }
}

fn instruction(idx: usize, program: &Program) -> String {
    let Some(insn) = program.insns.get(idx) else { return format!("{idx}:") };
    format!("{idx}: ({:02x}) {}", insn.opcode, Disasm::at(&program.insns, idx))
}
