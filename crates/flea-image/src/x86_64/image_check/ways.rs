//! The ways out of an image, for good or for a call: what has to be true there.

use iced_x86::{Instruction, Register};

use super::state::{
    Address, CALLEE_SAVED, DECISION, FRAME, RAX, RBP, RDI, RDX, RSP, State, Surroundings, small,
};
use super::step::push_value;
use super::value::{Source, Value};
use super::walk::MARKER;
use super::{ImageUnderCheck, KnownCall, Rule, Runs};

const RAX_SOURCE: Source = Source::Gpr(0);
const R11_SOURCE: Source = Source::Gpr(11);

/// An image, and the part of it that is explored.
pub(super) struct Ways<'a> {
    pub image: &'a ImageUnderCheck<'a>,
    pub about: Surroundings<'a>,
}

impl Ways<'_> {
    /// The code at `ip`, if it is inside.
    pub fn bytes_at(&self, ip: u64, n_bytes: usize) -> Option<&[u8]> {
        let offset = usize::try_from(ip.checked_sub(self.image.address.0)?).ok()?;
        self.image.bytes.get(offset..offset.checked_add(n_bytes)?)
    }

    /// Where a path ends well: at the original, or, if that is explored, at what follows it.
    pub fn is_original(&self, ip: u64) -> bool {
        let image = self.image;
        let begins = match image.replacement {
            _ if !self.about.in_front => image.original,
            Some(replacement) => replacement,
            None => image.moved.at,
        };
        ip == begins.0
    }

    /// What may have changed in front of the original.
    fn is_scratch(&self, source: Source) -> bool {
        let image = self.image;
        match source {
            _ if !self.about.in_front => false,
            RAX_SOURCE => image.answer_bytes.is_some(),
            R11_SOURCE => image.answer_bytes.is_some() || image.replacement.is_some(),
            _ => false,
        }
    }

    /// `call` of the original or a body.
    pub fn call(&self, insn: &Instruction, state: &mut State) -> Result<(), Rule> {
        let target = insn.near_branch_target();
        if self.about.in_front {
            return Err(Rule::UnknownTarget);
        }
        if target == self.image.original.0 {
            return self.call_original(insn, state);
        }
        let is_called = |call: &KnownCall| call.address.0 == target;
        // One body may be called several times: the next one that has this address.
        let later = self.image.calls.iter().skip(state.n_calls).position(is_called);
        let Some(n_left_out) = later else {
            let known = self.image.calls.iter().any(is_called);
            return Err(if known { Rule::WrongOrder } else { Rule::UnknownTarget });
        };
        let index = state.n_calls + n_left_out;
        let left_out = &self.image.calls[state.n_calls..index];
        let body = &self.image.calls[index];
        self.may_leave_out(left_out, state)?;
        self.call_body(insn, body, state)?;
        state.n_calls = index + 1;
        Ok(())
    }

    /// Bodies are left out behind a decision to skip the original, or once they are switched off.
    fn may_leave_out(&self, bodies: &[KnownCall], state: &State) -> Result<(), Rule> {
        let may = |body: &KnownCall| match body.runs {
            Runs::AtEntry => false,
            Runs::InFrame => false,
            Runs::Modifies => state.skips && !state.called,
            Runs::AtExit => state.switched,
        };
        if bodies.iter().all(may) { Ok(()) } else { Err(Rule::LeavesOut) }
    }

    /// All bodies that come before the original were run.
    fn ran_before(&self, state: &State) -> Result<(), Rule> {
        let rest = &self.image.calls[state.n_calls..];
        let all_at_exit = rest.iter().all(|body| body.runs == Runs::AtExit);
        if all_at_exit { Ok(()) } else { Err(Rule::LeavesOut) }
    }

    /// The original finds its caller's machine, and leaves another.
    fn call_original(&self, insn: &Instruction, state: &mut State) -> Result<(), Rule> {
        if state.called {
            return Err(Rule::CallsTwice);
        }
        compare(state, |source| state.given(source, &self.about), is_rbp)?;
        self.in_frame(state, self.image.stack_align_bytes)?;
        self.ran_before(state)?;
        let marker = self.image.original.0.wrapping_sub(8);
        if self.bytes_at(marker, 8) != Some(&MARKER) {
            return Err(Rule::NoMarker);
        }
        let rsp = state.rsp()?;
        if self.image.skip.is_some() && state.word(DECISION) != Value::Number(0) {
            return Err(Rule::Undecided);
        }
        for i in 0..self.image.stack_words {
            let at = rsp + 8 * i64::from(i);
            // Copies, not the words themselves: the original may write there.
            if at >= 0 || state.word(at) != Value::CallerWord(i) {
                return Err(Rule::StackWord(i));
            }
        }
        push_value(state, Value::Number(insn.next_ip()), &self.about)?;
        state.set_rsp(Value::Stack(rsp))?;
        state.forget(rsp, self.image.stack_words);
        state.called = true;
        state.used_return = Some(rsp - 8);
        for i in (0..16u8).filter(|i| usize::from(*i) != RSP && !CALLEE_SAVED.contains(i)) {
            state.gpr[usize::from(i)] = Value::Left(Source::Gpr(i));
        }
        for (reg, words) in state.vector.iter_mut().enumerate() {
            for (word, value) in words.iter_mut().enumerate() {
                *value = Value::Left(Source::Vector { reg: small(reg), word: small(word) });
            }
        }
        Ok(())
    }

    /// A body finds the registers that it shows to programs, and keeps them all.
    fn call_body(
        &self,
        insn: &Instruction,
        body: &KnownCall,
        state: &mut State,
    ) -> Result<(), Rule> {
        let rsp = state.rsp()?;
        match body.runs {
            Runs::AtEntry => {
                compare(state, Value::Caller, |_| false)?;
                level(state)?;
            }
            Runs::InFrame | Runs::Modifies if state.called => return Err(Rule::WrongTime),
            Runs::InFrame | Runs::Modifies => {
                compare(state, |source| state.given(source, &self.about), is_rbp)?;
                self.in_frame(state, 16)?;
                self.frame_words(body, state)?;
                let is_undecided = state.word(DECISION) != Value::Number(0);
                if body.runs == Runs::Modifies && self.image.skip.is_some() && is_undecided {
                    return Err(Rule::Undecided);
                }
            }
            Runs::AtExit => {
                if !state.called && !state.skips {
                    return Err(Rule::WrongTime);
                }
                self.in_frame(state, 16)?;
                self.frame_words(body, state)?;
            }
        }
        push_value(state, Value::Number(insn.next_ip()), &self.about)?;
        state.set_rsp(Value::Stack(rsp))?;
        state.tests_decision = false;
        state.tests_argument = None;
        body.changes.iter().try_for_each(|below_rbp| state.change(*below_rbp, &self.about))?;
        if body.runs == Runs::Modifies {
            state.write(Address::Stack(DECISION), 8, Value::Unknown, &self.about)?;
        }
        Ok(())
    }

    fn frame_words(&self, body: &KnownCall, state: &State) -> Result<(), Rule> {
        let mut words = body.reads.iter().map(|below_rbp| FRAME - i64::from(*below_rbp));
        words.try_for_each(|at| state.check_frame_word(at, &self.about))
    }

    /// The frame is as its unwind row says, has room for all that it holds, and a call finds the
    /// stack aligned.
    fn in_frame(&self, state: &State, align_bytes: u32) -> Result<(), Rule> {
        if state.gpr[RBP] != Value::Stack(FRAME)
            || state.word(FRAME) != Value::Caller(Source::Gpr(small(RBP)))
        {
            return Err(Rule::NoFrame);
        }
        let rsp = state.rsp()?;
        let held = i64::from(self.image.frame_bytes) + 8 * i64::from(self.image.stack_words);
        if rsp > FRAME - held {
            return Err(Rule::SmallFrame);
        }
        // The first stack argument, which is aligned, is 8 bytes above the entry's rsp.
        let is_aligned = (rsp - 8).rem_euclid(i64::from(align_bytes)) == 0;
        if is_aligned { Ok(()) } else { Err(Rule::Misaligned) }
    }

    /// The runtime aligns its stack itself, and keeps everything but its result.
    pub fn call_runtime(&self, register: Register, state: &mut State) -> Result<(), Rule> {
        let Value::Number(target) = state.gpr[register.number()] else {
            return Err(Rule::UnknownTarget);
        };
        let is_probe = self.image.probe_read_user.is_some_and(|probe| probe.0 == target);
        if self.about.in_front || !(is_probe || self.about.is_runtime(target)) {
            return Err(Rule::UnknownTarget);
        }
        let rsp = state.rsp()?;
        state.write(Address::Stack(rsp - 8), 8, Value::Unknown, &self.about)?;
        if is_probe {
            self.copies_the_rest(state)?;
        }
        state.gpr[RAX] = Value::Shared;
        Ok(())
    }

    /// `flea_probe_read_user(to, size_bytes, from)` behind a `rep movsb` of what is mapped: if
    /// both parts went from the caller's stack words to where the original looks, it finds them.
    fn copies_the_rest(&self, state: &mut State) -> Result<(), Rule> {
        let rsp = state.rsp()?;
        let [from, to] = [state.gpr[RDX], state.gpr[RDI]];
        if from == Value::Near(8) && to == Value::Near(rsp) && state.half_copied == Some(rsp) {
            state.half_copied = None;
            for i in 0..self.image.stack_words {
                let at = Address::Stack(rsp + 8 * i64::from(i));
                state.write(at, 8, Value::CallerWord(i), &self.about)?;
            }
        }
        Ok(())
    }

    /// The original begins: by a jump, or because it is next.
    pub fn enter(&self, state: &State) -> Result<(), Rule> {
        if state.called {
            return Err(Rule::CallsTwice);
        }
        level(state)?;
        if !self.about.in_front {
            self.ran_before(state)?;
        }
        compare(state, Value::Caller, |source| self.is_scratch(source))
    }

    /// `ret`
    pub fn leave(&self, state: &State) -> Result<(), Rule> {
        level(state)?;
        if self.about.in_front {
            if self.image.answer_bytes.is_none() {
                return Err(Rule::Skips);
            }
            return compare(state, Value::Caller, |source| self.is_scratch(source));
        }
        let set = match &self.image.skip {
            _ if state.called => &[][..],
            Some(set) if state.skips => set,
            _ => return Err(Rule::Skips),
        };
        self.may_leave_out(&self.image.calls[state.n_calls..], state)?;
        if let Some(source) = set.iter().find(|source| !is_decided(state, **source)) {
            return Err(Rule::NotKept(*source));
        }
        compare(
            state,
            |source| self.returned(state, source),
            |source| set.iter().any(|s| whole(*s) == whole(source)),
        )
    }

    /// What has to be in a register at `ret`.
    fn returned(&self, state: &State, source: Source) -> Value {
        if self.image.given_back.contains(&source) {
            return Value::GivenBack(source);
        }
        let changed = Value::Changed(source);
        let is_result = source == RAX_SOURCE && state.result == changed;
        if is_result { changed } else { state.left(source) }
    }
}

/// All registers but `rsp` and those that are free hold what is expected, and the x87 stack is
/// as it was.
fn compare(
    state: &State,
    expected: impl Fn(Source) -> Value,
    is_free: impl Fn(Source) -> bool,
) -> Result<(), Rule> {
    let general = state.gpr.iter().enumerate().map(|(i, v)| (Source::Gpr(small(i)), *v));
    let vectors = state.vector.iter().enumerate().flat_map(|(reg, words)| {
        let source = move |word| Source::Vector { reg: small(reg), word: small(word) };
        words.iter().enumerate().map(move |(word, v)| (source(word), *v))
    });
    for (source, value) in general.chain(vectors) {
        let is_rsp = source == Source::Gpr(small(RSP));
        if !is_rsp && !is_free(source) && value != expected(source) {
            return Err(Rule::NotKept(source));
        }
    }
    let balanced = state.x87.n_popped == 0 && state.x87.pushed.is_empty();
    if balanced { Ok(()) } else { Err(Rule::X87) }
}

fn is_rbp(source: Source) -> bool {
    source == Source::Gpr(small(RBP))
}

/// Does the register hold what a modify body decided?
fn is_decided(state: &State, source: Source) -> bool {
    let value = match source {
        Source::Gpr(reg) => state.gpr.get(usize::from(reg)),
        Source::Vector { reg, .. } => state.vector.get(usize::from(reg)).map(|words| &words[0]),
        Source::X87 { .. } => None,
    };
    let changed = Value::Changed(source);
    value == Some(&Value::Decision) || (state.result == changed && value == Some(&changed))
}

/// A register, whichever of its words is named.
fn whole(source: Source) -> Source {
    match source {
        Source::Gpr(_) => source,
        Source::Vector { reg, .. } => Source::Vector { reg, word: 0 },
        Source::X87 { reg, .. } => Source::X87 { reg, word: 0 },
    }
}

/// `rsp` is the entry's.
fn level(state: &State) -> Result<(), Rule> {
    match state.rsp()? {
        0 => Ok(()),
        off => Err(Rule::StackNotLevel(off)),
    }
}
