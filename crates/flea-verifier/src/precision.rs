//! Which numbers the verdict on a path hangs on, found by walking back along it.
//!
//! A remembered state prunes later ones. To compare every number of it would part paths for
//! nothing: after `if (flags & 1) ..; if (flags & 2) ..;` each path knows other bits of `flags`, and
//! nobody cares. So a number is compared only if something that was explored after that state
//! *needed* it (Linux: `precise`, mark_chain_precision).
//!
//! What is claimed, and why: let all paths behind a remembered state have been explored. A state
//! that differs from it only in numbers that are not needed would be explored with the same
//! verdict and the same facts.
//!
//! 1. Every decision that depends on a number needs it ([`crate::machine::Trail::needs`]): a branch
//!    that is not taken both ways, an offset added to a pointer, a helper's sizes and whatever
//!    else it must know, a number that becomes a fact for the compiler. A branch that is taken both
//!    ways is explored both ways, so it decides nothing.
//! 2. What is needed behind an instruction is needed of what it was made of before ([`undo`]). A
//!    comparison narrows both sides and every number linked to them: who needs one needs all.
//! 3. What is not understood (control coming from where no rule says) needs everything.
//! 4. A path that is pruned needs what the state needs that pruned it: its followers have been
//!    explored there. Where they have not all been, at the end of a callback's round that its own
//!    call's states include ([`crate::explore`]), it needs everything.
//! 5. Whether a register is set, what kind of pointer it holds and where that may point, and which
//!    bytes of the stack are written is compared always.

use crate::op::{Atomic, Op, Operand, Reg};
use crate::stack::Span;
use crate::tail::TAIL_CALL;

/// Frames that may be on top of each other.
const MAX_FRAMES: usize = crate::cfg::MAX_CALL_DEPTH + 1;
/// A walk back ends where what it needs is known to be needed. That is written down after so many
/// steps at least, or many walks in a program without joins would each go back to its start.
const STEPS_BETWEEN_MARKS: usize = 32;

/// Registers and stack slots by frame, the main function's first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    frames: [FrameNeeds; MAX_FRAMES],
}

/// Registers and stack slots of one frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FrameNeeds {
    pub(crate) regs: u16,
    /// Slot 0 is at -8.
    pub(crate) slots: u64,
}

impl FrameNeeds {
    pub(crate) const ALL: Self = Self { regs: u16::MAX, slots: u64::MAX };

    pub(crate) const fn has_reg(&self, reg: usize) -> bool {
        self.regs >> reg & 1 != 0
    }

    pub(crate) const fn has_slot(&self, slot: usize) -> bool {
        self.slots >> slot & 1 != 0
    }

    fn has(&self, reg: Reg) -> bool {
        self.has_reg(reg.index())
    }

    fn add(&mut self, reg: Reg) {
        self.regs |= 1 << reg.index();
    }

    fn add_operand(&mut self, operand: Operand) {
        if let Operand::Reg(reg) = operand {
            self.add(reg);
        }
    }

    /// `reg` is overwritten: whether it was needed.
    fn take(&mut self, reg: Reg) -> bool {
        let had = self.has(reg);
        self.regs &= !(1 << reg.index());
        had
    }
}

impl Needs {
    pub(crate) const ALL: Self = Self { frames: [FrameNeeds::ALL; MAX_FRAMES] };

    /// Of frame `depth`: everything where that is deeper than frames can be.
    pub(crate) fn frame(&self, depth: usize) -> FrameNeeds {
        self.frames.get(depth).copied().unwrap_or(FrameNeeds::ALL)
    }

    pub(crate) fn add_reg(&mut self, depth: usize, reg: usize) {
        if let Some(frame) = self.frames.get_mut(depth) {
            frame.regs |= 1 << reg;
        }
    }

    pub(crate) fn add_slots(&mut self, depth: usize, slots: u64) {
        if let Some(frame) = self.frames.get_mut(depth) {
            frame.slots |= slots;
        }
    }

    fn of_regs(depth: usize, regs: u16) -> Self {
        let mut needs = Self::default();
        if let Some(frame) = needs.frames.get_mut(depth) {
            frame.regs = regs;
        }
        needs
    }

    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn meets(&self, other: &Self) -> bool {
        let pairs = self.frames.iter().zip(&other.frames);
        pairs.into_iter().any(|(a, b)| a.regs & b.regs != 0 || a.slots & b.slots != 0)
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (a, b) in self.frames.iter_mut().zip(&other.frames) {
            a.regs |= b.regs;
            a.slots |= b.slots;
        }
    }

    /// What of this is not in `known`.
    fn without(&self, known: &Self) -> Self {
        let mut rest = *self;
        for (a, b) in rest.frames.iter_mut().zip(&known.frames) {
            a.regs &= !b.regs;
            a.slots &= !b.slots;
        }
        rest
    }
}

/// The stack slots that a load or store touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Touched {
    frame: u8,
    first: u8,
    last: u8,
    /// They were overwritten from end to end, certainly.
    whole: bool,
}

impl Touched {
    pub(crate) fn new(frame: usize, span: Span, certainly: bool) -> Self {
        let (first, last) = span.first_and_last_slot();
        // At most 64 slots and 9 frames.
        let small = |n: usize| u8::try_from(n).unwrap_or(u8::MAX);
        let whole = certainly && span.is_whole_slot();
        Self { frame: small(frame), first: small(first), last: small(last), whole }
    }

    fn slots(self) -> u64 {
        let upto = u64::MAX >> 63u8.saturating_sub(self.last).min(63);
        upto & u64::MAX << self.first.min(63)
    }
}

/// What one step left behind for walks back.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trail {
    /// Registers of the current frame, as they were before the step, that a decision was made by.
    pub(crate) needs: u16,
    /// Slots that a decision was made by.
    needed_slots: Option<Touched>,
    pub(crate) touched: Option<Touched>,
    /// What a comparison narrowed beside its two sides, and its sides.
    pub(crate) linked: Option<Needs>,
}

impl Trail {
    /// A decision depends on the number in `reg`.
    pub(crate) fn need(&mut self, reg: Reg) {
        self.needs |= 1 << reg.index();
    }

    /// A decision depends on the bytes of `span`.
    pub(crate) fn need_stack(&mut self, frame: usize, span: Span) {
        self.needed_slots = Some(Touched::new(frame, span, false));
    }

    pub(crate) fn need_operand(&mut self, operand: Operand) {
        if let Operand::Reg(reg) = operand {
            self.need(reg);
        }
    }
}

/// One visit of an instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    /// The step before it on its path.
    pub(crate) prev: Option<usize>,
    pub(crate) insn_idx: usize,
    /// Number of the frame it ran in.
    depth: usize,
    touched: Option<Touched>,
    /// Index into [`Precision::linked`].
    linked: Option<u32>,
}

/// What is known to be needed after some step.
#[derive(Clone, Copy, Debug)]
struct Mark {
    prev: Option<usize>,
    /// The last step before it.
    step: Option<usize>,
    needs: Needs,
}

/// A place on a path: behind its last step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) last_step: Option<usize>,
    /// The last mark on the path.
    pub(crate) mark: usize,
    /// The instruction that comes next.
    pub(crate) insn_idx: usize,
    /// Number of the frame that it runs in.
    pub(crate) depth: usize,
}

/// All steps of all paths, and what was needed where.
pub(crate) struct Precision<'a> {
    ops: &'a [Op],
    pub(crate) steps: Vec<Step>,
    marks: Vec<Mark>,
    linked: Vec<Needs>,
    /// What was needed before each step.
    #[cfg(any(test, feature = "beliefs"))]
    pub(crate) before_steps: Option<Vec<Needs>>,
}

impl<'a> Precision<'a> {
    pub(crate) fn new(ops: &'a [Op]) -> Self {
        Self {
            ops,
            steps: Vec::new(),
            marks: Vec::new(),
            linked: Vec::new(),
            #[cfg(any(test, feature = "beliefs"))]
            before_steps: None,
        }
    }

    /// The mark at the entry of a function that is walked from there on.
    pub(crate) fn entry(&mut self) -> usize {
        self.marks.push(Mark { prev: None, step: None, needs: Needs::default() });
        self.marks.len() - 1
    }

    /// A step is about to be made at `place`: its number.
    pub(crate) fn begin(&mut self, place: &mut Place) -> usize {
        let since = self.marks[place.mark].step.map_or(0, |s| s + 1);
        // Steps of other paths may lie between: then there is a mark too many.
        if self.steps.len() - since >= STEPS_BETWEEN_MARKS {
            self.mark(place);
        }
        let (prev, insn_idx, depth) = (place.last_step, place.insn_idx, place.depth);
        self.steps.push(Step { prev, insn_idx, depth, touched: None, linked: None });
        #[cfg(any(test, feature = "beliefs"))]
        if let Some(before) = &mut self.before_steps {
            before.push(Needs::default());
        }
        self.steps.len() - 1
    }

    /// The step that began last, at `place`, is done.
    pub(crate) fn end(&mut self, place: Place, trail: Trail) {
        let mut needs = Needs::of_regs(place.depth, trail.needs);
        if let Some(slots) = trail.needed_slots {
            needs.add_slots(usize::from(slots.frame), slots.slots());
        }
        if !needs.is_empty() {
            self.need(place, needs);
        }
        let linked = trail.linked.map(|linked| {
            self.linked.push(linked);
            // As many as steps, which are bounded.
            u32::try_from(self.linked.len() - 1).unwrap_or(u32::MAX)
        });
        #[cfg(any(test, feature = "beliefs"))]
        if let Some(last) = self.before_steps.as_mut().and_then(|b| b.last_mut()) {
            last.add(&needs);
        }
        debug_assert!(self.steps.last().is_some_and(|s| s.prev == place.last_step));
        if let Some(step) = self.steps.last_mut() {
            step.touched = trail.touched;
            step.linked = linked;
        }
    }

    /// Makes a mark at `place`: where a state is remembered.
    pub(crate) fn mark(&mut self, place: &mut Place) {
        let needs = Needs::default();
        self.marks.push(Mark { prev: Some(place.mark), step: place.last_step, needs });
        place.mark = self.marks.len() - 1;
    }

    /// What is needed at a mark, by all that was explored behind it so far.
    pub(crate) fn needed_at(&self, mark: usize) -> &Needs {
        &self.marks[mark].needs
    }

    /// `needs` are needed at `place`.
    pub(crate) fn need(&mut self, place: Place, mut needs: Needs) {
        let Place { mut last_step, mut mark, mut insn_idx, mut depth } = place;
        loop {
            while self.marks[mark].step == last_step {
                let Mark { prev, needs: known, .. } = &mut self.marks[mark];
                // What was known here has been followed further back then.
                let news = needs.without(known);
                known.add(&news);
                needs = news;
                let Some(prev) = *prev else { return };
                mark = prev;
            }
            let Some(number) = last_step else { return };
            if needs.is_empty() {
                return;
            }
            let step = self.steps[number];
            undo(self.ops, &step, (insn_idx, depth), &self.linked, &mut needs);
            #[cfg(any(test, feature = "beliefs"))]
            if let Some(before) = &mut self.before_steps {
                before[number].add(&needs);
            }
            (last_step, insn_idx, depth) = (step.prev, step.insn_idx, step.depth);
        }
    }
}

/// Makes what is needed behind `step`, after which instruction `next_idx` runs in frame
/// `next_depth`, what is needed before it.
///
/// What is needed of the union of two sets is the union of what is needed of each: a walk back may
/// leave out what an earlier one has followed.
fn undo(
    ops: &[Op],
    step: &Step,
    (next_idx, next_depth): (usize, usize),
    linked: &[Needs],
    needs: &mut Needs,
) {
    if needs.is_empty() {
        return;
    }
    let depth = step.depth;
    let same_frame = next_depth == depth;
    let Some(frame) = needs.frames.get_mut(depth).filter(|_| next_depth < MAX_FRAMES) else {
        *needs = Needs::ALL;
        return;
    };
    match ops[step.insn_idx] {
        Op::CallLocal { .. } | Op::CallPointer { .. } if next_depth == depth + 1 => {
            enter(needs, depth);
        }
        ref op if op.takes_callback() && next_depth == depth + 1 => enter_round(needs, depth),
        // Whether a round's result stops the helper was needed; the caller's registers stay.
        Op::Exit if next_depth + 1 == depth && ops[next_idx].takes_callback() => {
            needs.frames[depth] = FrameNeeds::default();
        }
        Op::Exit if next_depth + 1 == depth && returns_from_call(ops, next_idx) => {
            leave(needs, depth);
        }
        // The result is the target's: any number.
        Op::CallHelper { id: TAIL_CALL }
            if next_depth + 1 == depth && returns_from_call(ops, next_idx) =>
        {
            needs.frames[next_depth].take(Reg::R0);
        }
        _ if !same_frame => *needs = Needs::ALL,
        Op::Alu { dst, src, .. } if frame.has(dst) => frame.add_operand(src),
        Op::Alu { .. } | Op::Neg { .. } | Op::Swap { .. } | Op::Trunc { .. } => {}
        Op::Mov { dst, src, .. } => {
            if frame.take(dst) {
                frame.add_operand(src);
            }
        }
        Op::MovSx { dst, src, .. } => {
            if frame.take(dst) {
                frame.add(src);
            }
        }
        Op::Const { dst, .. }
        | Op::MapAddress { dst, .. }
        | Op::MapValueAddress { dst, .. }
        | Op::FunctionAddress { dst, .. } => {
            frame.take(dst);
        }
        Op::Load { dst, .. } => {
            if frame.take(dst)
                && let Some(t) = step.touched
                && let Some(frame) = needs.frames.get_mut(usize::from(t.frame))
            {
                frame.slots |= t.slots();
            }
        }
        Op::Store { src, .. } => undo_store(needs, depth, step.touched, src),
        // What it leaves in memory is any number; what it fetches is what was there.
        Op::Atomic { op, fetch, src, .. } => {
            let result = if op == Atomic::Cmpxchg { Reg::R0 } else { src };
            if (fetch || op == Atomic::Cmpxchg)
                && frame.take(result)
                && let Some(t) = step.touched
                && let Some(frame) = needs.frames.get_mut(usize::from(t.frame))
            {
                frame.slots |= t.slots();
            }
        }
        Op::Goto { .. } => {}
        Op::If { dst, src, .. } => {
            let mut sides = Needs::of_regs(depth, 1 << dst.index());
            if let Operand::Reg(src) = src {
                sides.add_reg(depth, src.index());
            }
            if let Some(group) = step.linked.and_then(|l| linked.get(l as usize)) {
                sides.add(group);
            }
            if needs.meets(&sides) {
                needs.add(&sides);
            }
        }
        // What a helper's result depends on is needed by its call. A global function's is any
        // number.
        Op::CallHelper { .. } | Op::CallLocal { .. } => frame.regs &= !0x3f,
        _ => *needs = Needs::ALL,
    }
}

/// The arguments are what the callee has.
fn enter(needs: &mut Needs, depth: usize) {
    let callee = std::mem::take(&mut needs.frames[depth + 1]);
    let caller = &mut needs.frames[depth];
    caller.regs = (caller.regs & !0x3f) | (callee.regs & 0x3e);
}

/// A round's number is below the helper's first argument; all other arguments are pointers, or
/// NULL for the context, which is the third one.
fn enter_round(needs: &mut Needs, depth: usize) {
    let callee = std::mem::take(&mut needs.frames[depth + 1]);
    let caller = &mut needs.frames[depth];
    if callee.regs & 0x3e != 0 {
        caller.add(Reg::arg(0));
        caller.add(Reg::arg(2));
    }
}

/// The result is what the callee left in r0.
fn leave(needs: &mut Needs, depth: usize) {
    if needs.frames[depth - 1].take(Reg::R0) {
        needs.frames[depth].add(Reg::R0);
    }
}

fn returns_from_call(ops: &[Op], next_idx: usize) -> bool {
    let call = next_idx.checked_sub(1).and_then(|idx| ops.get(idx));
    matches!(call, Some(Op::CallLocal { .. } | Op::CallPointer { .. }))
}

fn undo_store(needs: &mut Needs, depth: usize, touched: Option<Touched>, src: Operand) {
    let Some(t) = touched else { return };
    let Some(target) = needs.frames.get_mut(usize::from(t.frame)) else { return };
    if target.slots & t.slots() == 0 {
        return;
    }
    if t.whole {
        target.slots &= !t.slots();
    }
    if let Some(frame) = needs.frames.get_mut(depth) {
        frame.add_operand(src);
    }
}
