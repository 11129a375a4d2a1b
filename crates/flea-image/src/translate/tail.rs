//! Tail calls. What they lead to is known when a program is compiled, so all programs that a
//! run may come through are one function, and a tail call is a jump:
//!
//! ```text
//!   r3 known:      [count]  jmp target          nothing at all where the slot is empty
//!   r3 not known:  binary search for r3 among the slots that are taken; found: [count] jmp target
//!   count:         if n >= 33 goto miss; n += 1       only where a run can come so far
//!   miss:          the next instruction
//! ```
//!
//! A jump table would be shorter, but a body holds instructions alone.
//!
//! A target takes the place of the function that calls, and ends where that would have ended. So
//! each function with tail calls that is put into the code opens a [`Region`]: its targets once
//! each, and one place behind them all, with r0. Of a function that is called (and inlined)
//! twice there are two regions, as they go on in two places.
//!
//! Frames of one depth share one stack slot: of those, one is in use at a time.

use std::collections::BTreeMap;

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{
    Block, InstBuilder, StackSlot, StackSlotData, StackSlotKind, Value, types,
};
use cranelift_frontend::Variable;
use flea_object::helper::MAX_TAIL_CALLS;
use flea_verifier::Verified;
use flea_verifier::facts::Fact;
use flea_verifier::targets::{Member, TailCall};

use super::{Scope, Translator, Use};
use crate::request::CompileError;

/// What a translator knows of tail calls.
#[derive(Default)]
pub(super) struct Tails {
    /// r1 and r2 of the program, with which each target begins too: no target reads r2.
    args: Option<[Value; 2]>,
    /// Tail calls of this run so far, where they have to be counted.
    count: Option<Variable>,
    /// The programs that are being translated, each inside a function of the one before.
    nested: Vec<Member>,
    /// Open ones, the innermost last.
    regions: Vec<Region>,
    /// The stack of each depth of calls.
    slots: BTreeMap<u32, StackSlot>,
}

/// The targets that end where one function does.
struct Region {
    /// Behind them, with r0.
    end: Block,
    entries: BTreeMap<Member, Block>,
    /// Targets that are still to be translated, with a call that leads there.
    waiting: Vec<(Member, u32)>,
}

/// Neighbouring indices that lead to one program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    first: u32,
    last: u32,
    member: Member,
}

impl<'a> Use<'a> {
    /// A program and all that its tail calls lead to, which run as it does: of its kind, with its
    /// cookies.
    pub fn members(first: Self) -> Vec<Self> {
        first.verified.members().map(|verified| Self { verified, ..first }).collect()
    }
}

/// Can a run make more tail calls than are allowed? Where there is no circle, the longest way is
/// short; but a function that is called can make any number one after another.
fn must_count(members: &[Use<'_>]) -> bool {
    let first = members[0].verified;
    let main_end = |v: &Verified| v.functions().first().map_or(0, |f| f.end_insn_idx);
    let by_callees = |v: &Verified| v.tail_calls().any(|call| call.insn_idx >= main_end(v));
    if members.iter().any(|member| by_callees(member.verified)) {
        return true;
    }
    let mut reached = vec![Member::FIRST];
    for _ in 0..=MAX_TAIL_CALLS {
        let calls = reached.iter().flat_map(|m| members[m.0].verified.tail_calls());
        let next = calls.flat_map(|call| call.reached(&first.targets().slots));
        let mut next: Vec<Member> = next.map(|(_, member)| *member).collect();
        next.sort_unstable();
        next.dedup();
        reached = next;
    }
    !reached.is_empty()
}

/// What stands at the indices that `call` may have, neighbours put together.
fn runs(first: &Verified, call: TailCall) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (index, &member) in call.reached(&first.targets().slots) {
        let next = Run { first: index, last: index, member };
        match runs.last_mut() {
            Some(run)
                if run.member == next.member && run.last.checked_add(1) == Some(next.first) =>
            {
                run.last = next.last;
            }
            _ => runs.push(next),
        }
    }
    runs
}

impl Translator<'_, '_> {
    /// Begins the program: its r1 and r2.
    pub(super) fn start_tails(&mut self, r1: Value, r2: Value) {
        self.tails.args = Some([r1, r2]);
        self.tails.nested = vec![Member::FIRST];
        if must_count(self.members) {
            let count = self.b.declare_var(types::I32);
            let zero = self.b.ins().iconst(types::I32, 0);
            self.b.def_var(count, zero);
            self.tails.count = Some(count);
        }
    }

    /// The program whose instructions are being translated.
    pub(super) fn member(&self) -> Member {
        self.tails.nested.last().copied().unwrap_or(Member::FIRST)
    }

    /// Whether a function of the present program has a region of its own.
    pub(super) fn makes_tail_calls(&self, function: u32) -> bool {
        let verified = self.used.verified;
        let Some(function) = verified.functions().get(function as usize) else { return false };
        let range = function.start_insn_idx as usize..function.end_insn_idx as usize;
        let facts = verified.facts().get(range).unwrap_or_default();
        facts.iter().any(|fact| TailCall::of(0, *fact).is_some())
    }

    /// A function with tail calls and all that they lead to. Returns r0 with the current block
    /// behind them.
    pub(super) fn region(
        &mut self,
        function: u32,
        args: [Value; 5],
        depth: u32,
    ) -> Result<Value, CompileError> {
        let end = self.b.create_block();
        let r0 = match depth == 0 && !self.wants_result {
            true => None,
            false => Some(self.b.append_block_param(end, types::I64)),
        };
        let region = Region { end, entries: BTreeMap::new(), waiting: Vec::new() };
        self.tails.regions.push(region);
        let is_main = function == 0;
        let (used, member) = (self.used, self.member());
        if is_main {
            // Tail calls may come back to it.
            let entry = self.entry(member, 0);
            self.b.ins().jump(entry, &[]);
            self.tails.nested.pop();
        } else {
            let result = self.one_function(function, args, depth)?;
            self.end_with(result);
        }
        while let Some((member, insn_idx)) = self.next_waiting() {
            self.target(member, insn_idx, depth)?;
        }
        if is_main {
            self.tails.nested.push(member);
        }
        self.used = used;
        self.tails.regions.pop();
        self.b.switch_to_block(end);
        Ok(r0.unwrap_or_else(|| self.iconst(0)))
    }

    /// Goes behind the innermost region with `result`, if that is looked at.
    fn end_with(&mut self, result: Value) {
        let end = self.tails.regions.last().expect("`region` has opened it").end;
        match self.b.block_params(end).is_empty() {
            true => self.b.ins().jump(end, &[]),
            false => self.b.ins().jump(end, &[result.into()]),
        };
    }

    fn next_waiting(&mut self) -> Option<(Member, u32)> {
        self.tails.regions.last_mut()?.waiting.pop()
    }

    /// Translates one target of the innermost region.
    fn target(&mut self, member: Member, insn_idx: u32, depth: u32) -> Result<(), CompileError> {
        if self.tails.nested.contains(&member) {
            return Err(CompileError::TailRecursion { insn_idx });
        }
        let region = self.tails.regions.last().expect("`region` has opened it");
        let entry = region.entries[&member];
        let [r1, r2] = self.tails.args.expect("the program has begun");
        self.tails.nested.push(member);
        self.used = &self.members[member.0];
        self.b.switch_to_block(entry);
        let zero = self.iconst(0);
        let result = self.one_function(0, [r1, r2, zero, zero, zero], depth)?;
        self.end_with(result);
        self.tails.nested.pop();
        Ok(())
    }

    /// Where `member` begins in the innermost region.
    fn entry(&mut self, member: Member, insn_idx: u32) -> Block {
        let region = self.tails.regions.last_mut().expect("a function with tail calls has one");
        *region.entries.entry(member).or_insert_with(|| {
            region.waiting.push((member, insn_idx));
            self.b.create_block()
        })
    }

    /// `bpf_tail_call`; what follows runs where it misses.
    pub(super) fn tail_call(
        &mut self,
        scope: &Scope,
        idx: u32,
        fact: Fact,
    ) -> Result<(), CompileError> {
        let call = TailCall::of(idx, fact)
            .ok_or(CompileError::BadFacts { insn_idx: idx, what: "which program array?" })?;
        let taken = runs(self.members[0].verified, call);
        self.count_insns(taken.len())?;
        if taken.is_empty() {
            return Ok(());
        }
        let miss = self.b.create_block();
        self.check_count(miss);
        if call.index.is_some() {
            self.hit(taken[0].member, idx);
        } else {
            let index = self.reg(scope, 3);
            let index = self.narrow(index, types::I32);
            let mut hits = BTreeMap::new();
            self.search(index, &taken, miss, &mut hits);
            for (member, block) in hits {
                self.b.switch_to_block(block);
                self.hit(member, idx);
            }
        }
        self.b.switch_to_block(miss);
        Ok(())
    }

    fn check_count(&mut self, miss: Block) {
        let Some(count) = self.tails.count else { return };
        let n = self.b.use_var(count);
        let more = self.b.create_block();
        let max = i64::from(MAX_TAIL_CALLS);
        let left = self.b.ins().icmp_imm_u(IntCC::UnsignedLessThan, n, max);
        self.b.ins().brif(left, more, &[], miss, &[]);
        self.b.switch_to_block(more);
    }

    fn hit(&mut self, member: Member, idx: u32) {
        if let Some(count) = self.tails.count {
            let n = self.b.use_var(count);
            let n = self.b.ins().iadd_imm_s(n, 1);
            self.b.def_var(count, n);
        }
        let entry = self.entry(member, idx);
        self.b.ins().jump(entry, &[]);
    }

    /// Goes to the block in `hits` of the program that `index` leads to, or to `miss`. `runs` is
    /// sorted and not empty.
    fn search(
        &mut self,
        index: Value,
        runs: &[Run],
        miss: Block,
        hits: &mut BTreeMap<Member, Block>,
    ) {
        if let [run] = runs {
            let hit = *hits.entry(run.member).or_insert_with(|| self.b.create_block());
            let width = run.last - run.first;
            let found = if width == 0 {
                self.b.ins().icmp_imm_u(IntCC::Equal, index, i64::from(run.first))
            } else {
                let from = self.b.ins().iadd_imm_s(index, -i64::from(run.first));
                self.b.ins().icmp_imm_u(IntCC::UnsignedLessThanOrEqual, from, i64::from(width))
            };
            self.b.ins().brif(found, hit, &[], miss, &[]);
            return;
        }
        let (low, high) = runs.split_at(runs.len() / 2);
        let (below, above) = (self.b.create_block(), self.b.create_block());
        let bound = i64::from(high[0].first);
        let is_below = self.b.ins().icmp_imm_u(IntCC::UnsignedLessThan, index, bound);
        self.b.ins().brif(is_below, below, &[], above, &[]);
        self.b.switch_to_block(below);
        self.search(index, low, miss, hits);
        self.b.switch_to_block(above);
        self.search(index, high, miss, hits);
    }

    /// Memory for a frame, `depth` calls deep.
    pub(super) fn stack_slot(&mut self, depth: u32, size_bytes: u32) -> StackSlot {
        let data = StackSlotData::new(StackSlotKind::ExplicitSlot, size_bytes, 3);
        if self.members[0].verified.targets().slots.is_empty() {
            return self.b.create_sized_stack_slot(data);
        }
        let slot = self.tails.slots.get(&depth).copied();
        let slot = slot.unwrap_or_else(|| self.b.create_sized_stack_slot(data));
        self.tails.slots.insert(depth, slot);
        let shared = &mut self.b.func.sized_stack_slots[slot].size;
        *shared = size_bytes.max(*shared);
        slot
    }
}
