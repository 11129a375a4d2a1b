//! Follows every path through an image, and judges the ways out.

use std::collections::{HashMap, HashSet};

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic,
    OpKind, Register,
};

use super::state::{Address, FRAME, RAX, RBP, RSP, State, Surroundings, small};
use super::step::{push_value, step};
use super::value::{Source, Value};
use super::{ImageError, ImageUnderCheck, KnownCall, Rule, Runs};

/// In front of what a skeleton calls, never executed: `nopl "flea"(%rax,%rax)`.
const MARKER: [u8; 8] = [0x0f, 0x1f, 0x84, 0x00, 0x66, 0x6c, 0x65, 0x61];
/// rbx, rbp, r12 to r15.
const CALLEE_SAVED: [u8; 6] = [3, 5, 12, 13, 14, 15];
/// What the questions in front of an unwinder may change: rax, r11.
const SCRATCH: [u8; 2] = [0, 11];
/// Steps per instruction of an image. A word changes at most three times where paths meet, and
/// a loop is as long as it is; what needs more is not what Flea makes.
const STEPS_PER_INSN: u32 = 64;

/// An image's instructions.
pub(super) struct Decoded {
    start: u64,
    insns: Vec<Instruction>,
    index: HashMap<u64, usize>,
}

impl Decoded {
    pub fn of(image: &ImageUnderCheck<'_>) -> Result<Self, ImageError> {
        let start = image.address.0;
        let mut insns = Vec::new();
        let mut decoder = Decoder::with_ip(64, image.bytes, start, DecoderOptions::NONE);
        while decoder.can_decode() {
            let insn = decoder.decode();
            if insn.is_invalid() {
                return Err(ImageError::NotAnInstruction { offset: insn.ip().wrapping_sub(start) });
            }
            insns.push(insn);
        }
        let index = insns.iter().enumerate().map(|(i, insn)| (insn.ip(), i)).collect();
        Ok(Self { start, insns, index })
    }

    pub fn index_of(&self, address: u64) -> Option<usize> {
        self.index.get(&address).copied()
    }

    pub fn insn(&self, index: usize) -> Option<&Instruction> {
        self.insns.get(index)
    }

    fn broken(&self, index: usize, rule: Rule) -> ImageError {
        let insn = self.insns.get(index);
        ImageError::Broken {
            offset: insn.map_or(0, |i| i.ip().wrapping_sub(self.start)),
            rule,
            insn: insn.map(ToString::to_string).unwrap_or_default(),
        }
    }

    fn immediates(&self) -> HashSet<u64> {
        let loads = self.insns.iter().filter(|i| i.code() == Code::Mov_r64_imm64);
        loads.map(|i| i.immediate(1)).filter(|n| *n != 0).collect()
    }
}

/// Proves all paths, from the entry and from where an unwinder is asked.
pub(super) fn explore(image: &ImageUnderCheck<'_>, code: &Decoded) -> Result<(), ImageError> {
    let immediates = code.immediates();
    let mut steps_left = STEPS_PER_INSN * u32::try_from(code.insns.len()).unwrap_or(u32::MAX / 64);
    let starts = [(image.address.0, false), (image.original.0, true)];
    for (start, asks) in starts.into_iter().filter(|(_, asks)| !asks || image.asks_first) {
        let about = Surroundings { image, immediates: immediates.clone(), asks };
        let mut walk = Walk {
            image,
            code,
            about,
            joins: code.joins(image),
            met: HashMap::new(),
            work: Vec::new(),
            info: InstructionInfoFactory::new(),
        };
        walk.run(start, &mut steps_left)?;
    }
    Ok(())
}

impl Decoded {
    /// Where paths may meet: what is jumped to.
    fn joins(&self, image: &ImageUnderCheck<'_>) -> HashSet<usize> {
        let jumps = self.insns.iter().filter(|i| i.is_jmp_short_or_near() || is_conditional(i));
        let targets = jumps.map(Instruction::near_branch_target);
        let switched = image.switches.iter().map(|(_, to)| to.0);
        targets.chain(switched).filter_map(|to| self.index_of(to)).collect()
    }
}

/// A place and what is known there.
type Way = (usize, State);

struct Walk<'a> {
    image: &'a ImageUnderCheck<'a>,
    code: &'a Decoded,
    about: Surroundings<'a>,
    joins: HashSet<usize>,
    /// What is known at joins, apart for paths that have called the original.
    met: HashMap<(usize, bool), State>,
    work: Vec<Way>,
    info: InstructionInfoFactory,
}

/// What one instruction leads to.
enum Next {
    Following,
    Nowhere,
    Jump(u64),
    Either(u64),
}

impl Walk<'_> {
    fn run(&mut self, start: u64, steps_left: &mut u32) -> Result<(), ImageError> {
        let bound = *steps_left;
        let outside = self.code.broken(0, Rule::BadTarget);
        let start = self.code.index_of(start).ok_or(outside)?;
        self.arrive(start, State::at_entry(), start)?;
        while let Some((mut at, mut state)) = self.work.pop() {
            loop {
                *steps_left =
                    steps_left.checked_sub(1).ok_or(ImageError::TooComplex { steps: bound })?;
                self.switches(at, &state)?;
                let next = self.one(at, &mut state).map_err(|e| self.code.broken(at, e))?;
                let (jump, falls) = match next {
                    Next::Nowhere => (None, false),
                    Next::Following => (None, true),
                    Next::Jump(to) => (Some(to), false),
                    Next::Either(to) => (Some(to), true),
                };
                if let Some(to) = jump {
                    self.jump(at, to, state.clone())?;
                }
                if !falls {
                    break;
                }
                // The last instruction's successor is a place where nothing is.
                let following = at + 1;
                if self.stops_at(following) {
                    self.arrive(following, state, at)?;
                    break;
                }
                at = following;
            }
        }
        Ok(())
    }

    fn stops_at(&self, index: usize) -> bool {
        let ip = self.code.insn(index).map(Instruction::ip);
        self.joins.contains(&index) || ip.is_none_or(|ip| self.is_border(ip))
    }

    /// The original, its moved instructions, or the marker: paths end there.
    fn is_border(&self, ip: u64) -> bool {
        let is_marker = self.bytes_at(ip, 8) == Some(&MARKER);
        ip == self.image.original.0 || ip == self.image.moved.at.0 || is_marker
    }

    fn bytes_at(&self, ip: u64, n_bytes: usize) -> Option<&[u8]> {
        let offset = usize::try_from(ip.checked_sub(self.image.address.0)?).ok()?;
        self.image.bytes.get(offset..offset.checked_add(n_bytes)?)
    }

    /// Branches that will be written over the instruction at `at`.
    fn switches(&mut self, at: usize, state: &State) -> Result<(), ImageError> {
        let ip = self.code.insn(at).map(Instruction::ip);
        let image = self.image;
        for (_, to) in image.switches.iter().filter(|(from, _)| Some(from.0) == ip) {
            self.jump(at, to.0, state.clone())?;
        }
        Ok(())
    }

    /// A path goes from the instruction `from` to the address `to`.
    fn jump(&mut self, from: usize, to: u64, state: State) -> Result<(), ImageError> {
        if to == self.image.original.0 && !self.about.asks {
            return self.enter(&state).map_err(|e| self.code.broken(from, e));
        }
        let inside = self.code.index_of(to);
        let rule =
            if self.bytes_at(to, 1).is_some() { Rule::BadTarget } else { Rule::UnknownTarget };
        let index = inside.ok_or_else(|| self.code.broken(from, rule))?;
        self.arrive(index, state, from)
    }

    /// A path reaches the instruction `index` from `from`.
    fn arrive(&mut self, index: usize, state: State, from: usize) -> Result<(), ImageError> {
        let Some(insn) = self.code.insn(index) else {
            return Err(self.code.broken(from, Rule::RunsOff));
        };
        let ip = insn.ip();
        let first_question = self.about.asks && ip == self.image.original.0;
        if ip == self.image.moved.at.0 && (self.about.asks || ip == self.image.original.0)
            || ip == self.image.original.0 && !self.about.asks
        {
            return self.enter(&state).map_err(|e| self.code.broken(from, e));
        }
        if self.is_border(ip) && !first_question {
            return Err(self.code.broken(from, Rule::RunsOff));
        }
        let key = (index, state.called);
        let known = match self.met.get(&key) {
            None => state,
            Some(known) => {
                let joined = known.join(&state, &self.about);
                let joined = joined.map_err(|e| self.code.broken(index, e))?;
                if joined == *known {
                    return Ok(());
                }
                joined
            }
        };
        self.met.insert(key, known.clone());
        self.work.push((index, known));
        Ok(())
    }

    /// One instruction.
    fn one(&mut self, at: usize, state: &mut State) -> Result<Next, Rule> {
        let insn = &self.code.insns[at];
        match insn.flow_control() {
            FlowControl::Next => {
                step(state, insn, &mut self.info, &self.about)?;
                Ok(Next::Following)
            }
            FlowControl::Exception if insn.mnemonic() == Mnemonic::Ud2 => Ok(Next::Nowhere),
            FlowControl::ConditionalBranch if is_conditional(insn) => {
                Ok(Next::Either(insn.near_branch_target()))
            }
            FlowControl::UnconditionalBranch if insn.is_jmp_short_or_near() => {
                Ok(Next::Jump(insn.near_branch_target()))
            }
            FlowControl::Call if insn.op0_kind() == OpKind::NearBranch64 => {
                self.call(insn, state)?;
                Ok(Next::Following)
            }
            FlowControl::IndirectCall if insn.op0_kind() == OpKind::Register => {
                self.call_runtime(insn.op0_register(), state)?;
                Ok(Next::Following)
            }
            FlowControl::Return if insn.code() == Code::Retnq => {
                self.leave(state)?;
                Ok(Next::Nowhere)
            }
            _ => Err(Rule::UnknownTarget),
        }
    }

    fn call(&self, insn: &Instruction, state: &mut State) -> Result<(), Rule> {
        let target = insn.near_branch_target();
        if self.about.asks {
            return Err(Rule::UnknownTarget);
        }
        if target == self.image.original.0 {
            return self.call_original(insn, state);
        }
        let body = self.image.calls.iter().find(|c| c.address.0 == target);
        self.call_body(insn, body.ok_or(Rule::UnknownTarget)?, state)
    }

    /// The original finds its caller's machine, and leaves another.
    fn call_original(&self, insn: &Instruction, state: &mut State) -> Result<(), Rule> {
        if state.called {
            return Err(Rule::CallsTwice);
        }
        self.registers(state, Value::Caller, &[RSP, RBP])?;
        in_frame(state)?;
        let marker = self.image.original.0.wrapping_sub(8);
        if self.bytes_at(marker, 8) != Some(&MARKER) {
            return Err(Rule::NoMarker);
        }
        let rsp = state.rsp()?;
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
                self.registers(state, Value::Caller, &[RSP])?;
                level(state)?;
            }
            Runs::InFrame if state.called => return Err(Rule::WrongTime),
            Runs::InFrame => {
                self.registers(state, Value::Caller, &[RSP, RBP])?;
                in_frame(state)?;
            }
            Runs::AtExit => {
                if !state.called && self.image.skip.is_none() {
                    return Err(Rule::WrongTime);
                }
                in_frame(state)?;
                for below_rbp in &body.reads {
                    state.check_frame_word(FRAME - i64::from(*below_rbp), &self.about)?;
                }
            }
        }
        push_value(state, Value::Number(insn.next_ip()), &self.about)?;
        state.set_rsp(Value::Stack(rsp))?;
        state.body_ran = true;
        Ok(())
    }

    /// The runtime aligns its stack itself, and keeps everything but its result.
    fn call_runtime(&self, register: Register, state: &mut State) -> Result<(), Rule> {
        let Value::Number(target) = state.gpr[register.number()] else {
            return Err(Rule::UnknownTarget);
        };
        if self.about.asks || !self.about.is_runtime(target) {
            return Err(Rule::UnknownTarget);
        }
        let rsp = state.rsp()?;
        state.write(Address::Stack(rsp - 8), 8, Value::Unknown, &self.about)?;
        state.gpr[RAX] = Value::Shared;
        Ok(())
    }

    /// The original begins: by a jump, or because it is next.
    fn enter(&self, state: &State) -> Result<(), Rule> {
        if state.called {
            return Err(Rule::CallsTwice);
        }
        level(state)?;
        let scratch: Vec<usize> = SCRATCH.iter().map(|i| usize::from(*i)).collect();
        let ours = if self.about.asks { scratch } else { vec![] };
        self.registers(state, Value::Caller, &[&[RSP], &ours[..]].concat())
    }

    /// `ret`
    fn leave(&self, state: &State) -> Result<(), Rule> {
        level(state)?;
        if state.used_return.is_some() {
            return Err(Rule::UsedReturn);
        }
        let expected = |source| match source {
            Source::Gpr(i) if CALLEE_SAVED.contains(&i) => Value::Caller(source),
            source => state.left(source),
        };
        if state.called {
            return self.registers(state, expected, &[RSP]);
        }
        if self.about.asks {
            return self.registers(state, Value::Caller, &[RSP, RAX, usize::from(SCRATCH[1])]);
        }
        let set = self.image.skip.as_ref().ok_or(Rule::Skips)?;
        self.compare(state, Value::Caller, |source| {
            source == Source::Gpr(4) || set.iter().any(|s| whole(*s) == whole(source))
        })
    }

    /// All registers but the general ones in `but`.
    fn registers(
        &self,
        state: &State,
        expected: impl Fn(Source) -> Value,
        but: &[usize],
    ) -> Result<(), Rule> {
        self.compare(
            state,
            expected,
            |source| matches!(source, Source::Gpr(i) if but.contains(&usize::from(i))),
        )
    }

    fn compare(
        &self,
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
            if !is_free(source) && value != expected(source) {
                return Err(Rule::NotKept(source));
            }
        }
        let balanced = state.x87.n_popped == 0 && state.x87.pushed.is_empty();
        if balanced { Ok(()) } else { Err(Rule::X87) }
    }
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

/// The frame is as its unwind row says, and a call finds the stack aligned.
fn in_frame(state: &State) -> Result<(), Rule> {
    if state.gpr[RBP] != Value::Stack(FRAME)
        || state.word(FRAME) != Value::Caller(Source::Gpr(small(RBP)))
    {
        return Err(Rule::NoFrame);
    }
    // The entry's rsp is 8 more than a multiple of 16.
    if (state.rsp()? + 8).rem_euclid(16) == 0 { Ok(()) } else { Err(Rule::Misaligned) }
}

fn is_conditional(insn: &Instruction) -> bool {
    insn.is_jcc_short_or_near() || insn.is_jcx_short() || insn.is_loop() || insn.is_loopcc()
}
