//! Follows every path through an image; what may be called and left is judged in [`super::ways`].

use std::collections::{HashMap, HashSet};

use iced_x86::{
    Code, ConditionCode, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory,
    Mnemonic, OpKind,
};

use super::state::{State, Surroundings};
use super::step::step;
use super::value::Value;
use super::ways::Ways;
use super::{ImageError, ImageUnderCheck, Rule};

/// In front of what a skeleton calls, never executed: `nopl "flea"(%rax,%rax)`.
pub(super) const MARKER: [u8; 8] = [0x0f, 0x1f, 0x84, 0x00, 0x66, 0x6c, 0x65, 0x61];
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

/// Proves all paths: from the entry, and what stands in front of the moved instructions.
pub(super) fn explore(image: &ImageUnderCheck<'_>, code: &Decoded) -> Result<(), ImageError> {
    let immediates = code.immediates();
    let mut steps_left = STEPS_PER_INSN * u32::try_from(code.insns.len()).unwrap_or(u32::MAX / 64);
    let has_front = image.answer_bytes.is_some() || image.replacement.is_some();
    let starts = [(image.address.0, false), (image.original.0, true)];
    for (start, in_front) in starts.into_iter().filter(|(_, in_front)| !in_front || has_front) {
        let immediates = immediates.clone();
        let about = Surroundings { image, immediates, in_front, ip: image.address.0 };
        let mut walk = Walk {
            ways: Ways { image, about },
            code,
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
    ways: Ways<'a>,
    code: &'a Decoded,
    joins: HashSet<usize>,
    /// What is known at joins, apart for paths that have called the original or were switched.
    met: HashMap<(usize, bool, bool), State>,
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
                    let (taken, not_taken) = self.branch(at, state);
                    self.jump(at, to, taken)?;
                    state = not_taken;
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

    /// What is known if the branch at `at` is taken, and if it is not.
    fn branch(&self, at: usize, state: State) -> (State, State) {
        let condition = self.code.insn(at).map(Instruction::condition_code);
        match condition.filter(|_| state.tests_decision) {
            Some(ConditionCode::ne) => {
                let (calls, skips) = state.decided();
                (skips, calls)
            }
            Some(ConditionCode::e) => state.decided(),
            _ => (state.clone(), state),
        }
    }

    fn stops_at(&self, index: usize) -> bool {
        let ip = self.code.insn(index).map(Instruction::ip);
        self.joins.contains(&index) || ip.is_none_or(|ip| self.is_border(ip))
    }

    /// The original, its moved instructions, or the marker: paths end there.
    fn is_border(&self, ip: u64) -> bool {
        let is_marker = self.ways.bytes_at(ip, 8) == Some(&MARKER);
        ip == self.ways.image.original.0 || ip == self.ways.image.moved.at.0 || is_marker
    }

    /// Branches that will be written over the instruction at `at`.
    fn switches(&mut self, at: usize, state: &State) -> Result<(), ImageError> {
        let ip = self.code.insn(at).map(Instruction::ip);
        let image = self.ways.image;
        for (_, to) in image.switches.iter().filter(|(from, _)| Some(from.0) == ip) {
            let mut switched = state.clone();
            switched.switched = true;
            self.jump(at, to.0, switched)?;
        }
        Ok(())
    }

    /// A path goes from the instruction `from` to the address `to`.
    fn jump(&mut self, from: usize, to: u64, state: State) -> Result<(), ImageError> {
        if self.ways.is_original(to) {
            return self.ways.enter(&state).map_err(|e| self.code.broken(from, e));
        }
        let is_inside = self.ways.bytes_at(to, 1).is_some();
        let rule = if is_inside { Rule::BadTarget } else { Rule::UnknownTarget };
        let index = self.code.index_of(to).ok_or_else(|| self.code.broken(from, rule))?;
        self.arrive(index, state, from)
    }

    /// A path reaches the instruction `index` from `from`.
    fn arrive(&mut self, index: usize, state: State, from: usize) -> Result<(), ImageError> {
        let Some(insn) = self.code.insn(index) else {
            return Err(self.code.broken(from, Rule::RunsOff));
        };
        let ip = insn.ip();
        if self.ways.is_original(ip) {
            return self.ways.enter(&state).map_err(|e| self.code.broken(from, e));
        }
        let is_start = self.ways.about.in_front && ip == self.ways.image.original.0;
        if self.is_border(ip) && !is_start {
            return Err(self.code.broken(from, Rule::RunsOff));
        }
        let key = (index, state.called, state.switched);
        let known = match self.met.get(&key) {
            None => state,
            Some(known) => {
                let joined = known.join(&state, &self.ways.about);
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
        self.ways.about.ip = insn.ip();
        let was_used = state.used_return;
        let next = self.follow(insn, state)?;
        // While a call is inside the original, and only then, its return address is on a stack.
        if was_used.is_some() && state.used_return.is_some() {
            return Err(Rule::UsedReturn);
        }
        Ok(next)
    }

    fn follow(&mut self, insn: &Instruction, state: &mut State) -> Result<Next, Rule> {
        if state.used_return.is_some() && insn.flow_control() != FlowControl::Next {
            return Err(Rule::UsedReturn);
        }
        match insn.flow_control() {
            FlowControl::Next => {
                step(state, insn, &mut self.info, &self.ways.about)?;
                Ok(Next::Following)
            }
            FlowControl::Exception if insn.mnemonic() == Mnemonic::Ud2 => Ok(Next::Nowhere),
            FlowControl::ConditionalBranch if is_conditional(insn) => {
                Ok(Next::Either(insn.near_branch_target()))
            }
            FlowControl::UnconditionalBranch if insn.is_jmp_short_or_near() => {
                Ok(Next::Jump(insn.near_branch_target()))
            }
            FlowControl::IndirectBranch if insn.op0_kind() == OpKind::Register => {
                match state.gpr.get(insn.op0_register().number()) {
                    Some(Value::Number(to)) if insn.op0_register().is_gpr64() => {
                        Ok(Next::Jump(*to))
                    }
                    _ => Err(Rule::UnknownTarget),
                }
            }
            FlowControl::Call if insn.op0_kind() == OpKind::NearBranch64 => {
                self.ways.call(insn, state)?;
                Ok(Next::Following)
            }
            FlowControl::IndirectCall if insn.op0_kind() == OpKind::Register => {
                self.ways.call_runtime(insn.op0_register(), state)?;
                Ok(Next::Following)
            }
            FlowControl::Return if insn.code() == Code::Retnq => {
                self.ways.leave(state)?;
                Ok(Next::Nowhere)
            }
            _ => Err(Rule::UnknownTarget),
        }
    }
}

fn is_conditional(insn: &Instruction) -> bool {
    insn.is_jcc_short_or_near() || insn.is_jcx_short() || insn.is_loop() || insn.is_loopcc()
}
