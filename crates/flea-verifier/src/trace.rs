//! The log of a refused program: the last steps of the path to the fault.

use std::collections::BTreeSet;

use flea_object::disasm::Disasm;
use flea_object::spec::{MapSpec, Program};

use crate::op::Op;
use crate::report::{registers, whole_state};
use crate::state::State;

/// Steps that a log shows; with source lines between them it may have twice as many lines,
/// of which [`MAX_LINES`] are kept.
pub(crate) const MAX_STEPS: usize = 200;
/// Lines of a log.
pub(crate) const MAX_LINES: usize = 200;

/// A log in the making.
pub(crate) struct Trace {
    wanted: BTreeSet<usize>,
    lines: Vec<String>,
    /// Index of the source line printed last.
    source_line: Option<usize>,
}

impl Trace {
    pub(crate) fn new(wanted: BTreeSet<usize>) -> Self {
        Self { wanted, lines: Vec::new(), source_line: None }
    }

    pub(crate) fn into_lines(self) -> Vec<String> {
        self.lines
    }

    /// Step number `step` is about to execute instruction `idx`.
    pub(crate) fn before(
        &mut self,
        step: usize,
        idx: usize,
        program: &Program,
        state: &State,
        maps: &[MapSpec],
    ) {
        if !self.wanted.contains(&step) {
            return;
        }
        if self.wanted.first() == Some(&step) {
            self.lines.push(format!("{idx}:{}", whole_state(state, maps)));
        }
        let at = program.lines.partition_point(|l| l.insn_idx as usize <= idx).checked_sub(1);
        if at != self.source_line
            && let Some(line) = at.and_then(|at| program.lines.get(at))
        {
            self.lines.push(format!("; {} @ {}:{}", line.text.trim(), line.file, line.line));
        }
        self.source_line = at;
        if self.wanted.last() == Some(&step) {
            // The fault's own instruction: it has no state afterwards.
            self.lines.push(instruction(idx, program));
        }
    }

    /// Step number `step` has executed instruction `idx`.
    pub(crate) fn after(
        &mut self,
        step: usize,
        idx: usize,
        ops: &[Op],
        program: &Program,
        state: &State,
        maps: &[MapSpec],
    ) {
        if !self.wanted.contains(&step) || self.wanted.last() == Some(&step) {
            return;
        }
        let regs = ops.get(idx).map(Op::registers).unwrap_or_default();
        let shown = registers(state, &regs, maps);
        let text = instruction(idx, program);
        let separator = if shown.is_empty() { "" } else { " ;" };
        self.lines.push(format!("{text}{separator}{shown}"));
    }
}

fn instruction(idx: usize, program: &Program) -> String {
    let Some(insn) = program.insns.get(idx) else { return format!("{idx}:") };
    format!("{idx}: ({:02x}) {}", insn.opcode, Disasm::at(&program.insns, idx))
}
