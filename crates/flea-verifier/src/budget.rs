//! What a person is told whose program is too large: which loop took the instructions.

use flea_object::spec::Program;

use crate::cfg::Successors;
use crate::op::Op;
use crate::precision::{Needs, Step};
use crate::report::{Fault, Named, show_value};
use crate::state::State;

/// A loop, known by its jump back.
pub(crate) struct Loop {
    head: usize,
    jump: usize,
    /// How often the jump back was followed, on all paths together.
    rounds: u32,
}

impl Loop {
    /// The one with most rounds, if any jump back was followed.
    pub(crate) fn hottest(ops: &[Op], back_jumps: &[u32]) -> Option<Self> {
        let (jump, rounds) = back_jumps.iter().enumerate().max_by_key(|(_, n)| **n)?;
        let head = Successors::of(jump, ops.get(jump)?).jump?;
        (*rounds > 0).then_some(Self { head, jump, rounds: *rounds })
    }

    /// Its first instruction, where states are remembered.
    pub(crate) fn head(&self) -> usize {
        self.head
    }

    /// Whose it is, how much it took, and what went on changing in it: `before` and `after` are its
    /// head's state in two rounds of one path, and what was needed of the first.
    pub(crate) fn describe(
        &self,
        program: &Program,
        known: Named<'_>,
        steps: &[Step],
        rounds: Option<(&State, &Needs, &State)>,
    ) -> String {
        let Self { head, jump, rounds: n } = self;
        let inside = steps.iter().filter(|s| (*head..=*jump).contains(&s.insn_idx)).count();
        let percent = 100 * inside / steps.len().max(1);
        let mut text = format!("the loop of insns {head} to {jump}");
        let at = program.lines.partition_point(|l| l.insn_idx as usize <= *head).checked_sub(1);
        if let Some(line) = at.and_then(|at| program.lines.get(at)) {
            text += &format!(" ({}:{}: {})", line.file, line.line, line.text.trim());
        }
        text += &format!(" took {percent} % of them in {n} rounds");
        if let Some((before, needed, after)) = rounds
            && let Some((reg, then, now)) = before.changed_register(after, needed)
        {
            let (r, then, now) = (reg.index(), show_value(&then, known), show_value(&now, known));
            text += &format!("; what differs from round to round is r{r}: {then}, later {now}");
        }
        text + ": give it a smaller bound"
    }
}

/// The program visits too many instructions; `eater` describes the loop that did.
pub(crate) fn too_large(n_processed: usize, eater: Option<String>) -> Fault {
    let no_loop = || "too many paths: split the program or join its branches earlier".to_owned();
    Fault::new(format!("BPF program is too large. Processed {} insn", n_processed + 1))
        .hint(eater.unwrap_or_else(no_loop))
}
