//! eBPF to CLIF, one function after another, local calls inlined.
//!
//! BPF registers are Cranelift variables, so SSA construction and register allocation are
//! Cranelift's. Start with [`Translator::function`]; arithmetic is in [`alu`], loads and stores
//! in [`mem`], from the target's data in [`target`], helpers in [`helper`], what the context shows in [`context`] and [`registers`].

mod alu;
mod context;
mod helper;
mod jump;
mod mem;
pub(crate) mod op;
mod records;
mod registers;
mod rounds;
mod saves;
mod tail;
mod target;

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use cranelift_codegen::ir::{Block, InstBuilder, MemFlagsData, StackSlot, Type, Value, types};
use cranelift_frontend::{FunctionBuilder, Variable};
use flea_layout::plan::{ArenaPlan, MapPlacement};
use flea_object::helper::Helper;
use flea_object::insn::{Insn, PSEUDO_CALL, PSEUDO_FUNC, PSEUDO_MAP, PSEUDO_MAP_VALUE};
use flea_object::spec::{MapIdx, MapKind, ProgramKind};
use flea_verifier::Verified;
use flea_verifier::facts::Fact;

use crate::clif::{Number, constant, known_constant, number, symbol};
use crate::code::RelocTarget;
use crate::frame::Frame;
use crate::request::{CompileError, Reads};

pub(crate) use context::{Arguments, Parameters, Probes, Side, store_skip_value, zero_cookie};
pub(crate) use helper::{call_runtime, is_inline_array};
pub(crate) use registers::{ARGUMENTS, is_saved_at_entry, probed};
pub(crate) use saves::Saves;
use tail::Tails;

use records::Records;

/// Instructions that one body may hold, calls inlined: Cranelift takes about a second for it.
const MAX_INSNS: u32 = 100_000;
/// Frames of local calls, as in Linux.
const MAX_CALL_DEPTH: u32 = 8;

/// What one program is translated with.
#[derive(Clone, Copy)]
pub(crate) struct Use<'a> {
    pub verified: &'a Verified,
    pub kind: Option<ProgramKind>,
    pub cookie: Number,
    /// Word of this body's frame that holds the program's session cookie.
    pub cookie_word: u32,
    /// Where a run goes that cannot get a lock; `None` where the program takes none.
    pub given_up: Option<Block>,
}

/// What all programs of one body are translated with.
pub(crate) struct Env<'a> {
    pub plan: &'a ArenaPlan,
    pub printk_map: Option<MapIdx>,
    pub function_address: Number,
    pub frame_offset: u32,
    pub args: Arguments,
    /// Helpers may be called: false in a plain function without an arena.
    pub has_runtime: bool,
    /// The thread's slot, where the body looked it up.
    pub slot: Option<Value>,
}

impl Env<'_> {
    /// Offset in a slot of a program's state.
    pub fn plan_offset(&self, state_index: u32) -> i64 {
        self.plan.program_state_offset(state_index).cast_signed()
    }
}

/// Collected while translating.
#[derive(Default)]
pub(crate) struct Outcome {
    pub reads: Reads,
    pub saves: Saves,
    pub calls_runtime: bool,
    /// Where the target's data is read into.
    target_buffer: Option<StackSlot>,
    n_insns: u32,
}

impl Outcome {
    /// Nothing yet, but for frame words that other sides of the body use.
    pub fn new(saves: Saves) -> Self {
        Self { saves, ..Self::default() }
    }
}

/// Translates one program into the current block of a CLIF function.
pub(crate) struct Translator<'a, 'b> {
    pub b: &'a mut FunctionBuilder<'b>,
    pub env: &'a Env<'a>,
    /// The program whose instructions are being translated: one of `members`.
    pub used: &'a Use<'a>,
    pub out: &'a mut Outcome,
    members: &'a [Use<'a>],
    tails: Tails,
    /// Values that cannot be 0: addresses of array elements at a known index.
    nonnull: HashSet<Value>,
    /// Somebody looks at what the main function returns.
    wants_result: bool,
    records: Records,
}

/// One activation of one BPF function.
struct Scope {
    regs: [Variable; 11],
    frame: Frame,
    cells: BTreeMap<i32, Variable>,
    /// The BPF stack, where some of it must be memory.
    slot: Option<StackSlot>,
    stack_bytes: i32,
    blocks: BTreeMap<u32, Block>,
    /// What loads from the target that are still to come will give: read with an earlier one.
    loaded: BTreeMap<u32, Value>,
    /// The function's instructions.
    range: Range<u32>,
    /// Where `exit` goes.
    end: Block,
    depth: u32,
}

/// Flags of an access that was proved to be inside its object.
pub(crate) fn proved() -> MemFlagsData {
    MemFlagsData::new().with_notrap()
}

impl<'a, 'b> Translator<'a, 'b> {
    /// `members` are a program and what its tail calls lead to: [`Use::members`].
    pub fn new(
        b: &'a mut FunctionBuilder<'b>,
        env: &'a Env<'a>,
        members: &'a [Use<'a>],
        out: &'a mut Outcome,
    ) -> Self {
        let (used, tails) = (&members[0], Tails::default());
        Self {
            b,
            env,
            used,
            out,
            members,
            tails,
            nonnull: HashSet::new(),
            wants_result: true,
            records: Records::default(),
        }
    }

    /// Translates the whole program for what it does: its result is not even computed.
    pub fn program_without_result(mut self, r1: Value, r2: Value) -> Result<(), CompileError> {
        self.wants_result = false;
        self.program(r1, r2).map(|_| ())
    }

    /// Translates the whole program; `r1` and `r2` as given. Returns r0 with the current block
    /// behind the program's end.
    pub fn program(&mut self, r1: Value, r2: Value) -> Result<Value, CompileError> {
        self.start_tails(r1, r2);
        self.begin_records();
        let zero = self.iconst(0);
        self.function(0, [r1, r2, zero, zero, zero], 0)
    }

    fn function(
        &mut self,
        index: u32,
        args: [Value; 5],
        depth: u32,
    ) -> Result<Value, CompileError> {
        if self.makes_tail_calls(index) {
            self.region(index, args, depth)
        } else {
            self.one_function(index, args, depth)
        }
    }

    fn one_function(
        &mut self,
        index: u32,
        args: [Value; 5],
        depth: u32,
    ) -> Result<Value, CompileError> {
        let mut scope = self.open_scope(index, args, depth)?;
        let function = self.used.verified.functions()[index as usize];
        let mut filled = false;
        let mut idx = function.start_insn_idx;
        while idx < function.end_insn_idx {
            let insn = self.used.verified.insns()[idx as usize];
            let fact = self.used.verified.facts()[idx as usize];
            if let Some(&block) = scope.blocks.get(&idx) {
                if !filled {
                    self.b.ins().jump(block, &[]);
                }
                self.b.switch_to_block(block);
                filled = false;
            }
            if fact == Fact::Unreachable {
                // If the proof were wrong, leaving the program is the harmless way out.
                if !filled {
                    self.b.ins().jump(scope.end, &[]);
                    filled = true;
                }
            } else if !filled {
                filled = self.insn(&mut scope, idx, insn, fact)?;
            }
            idx += if insn.opcode == op::LDDW { 2 } else { 1 };
        }
        if !filled {
            self.b.ins().jump(scope.end, &[]);
        }
        self.b.switch_to_block(scope.end);
        if depth == 0 && !self.wants_result {
            return Ok(self.iconst(0));
        }
        Ok(self.b.use_var(scope.regs[0]))
    }

    fn open_scope(
        &mut self,
        index: u32,
        args: [Value; 5],
        depth: u32,
    ) -> Result<Scope, CompileError> {
        let verified = self.used.verified;
        let function = verified
            .functions()
            .get(index as usize)
            .copied()
            .ok_or(CompileError::BadFacts { insn_idx: 0, what: "no such function" })?;
        let n = u32::try_from(verified.insns().len()).unwrap_or(u32::MAX);
        if function.end_insn_idx > n || verified.facts().len() != verified.insns().len() {
            return Err(CompileError::BadFacts {
                insn_idx: function.start_insn_idx,
                what: "function outside the program",
            });
        }
        let frame = Frame::analyse(verified, function, |i| self.reads_key_inline(i));
        let stack_bytes = function.stack_bytes.min(512).next_multiple_of(8);
        let slot = frame.needs_memory.then(|| self.stack_slot(depth, stack_bytes));
        let stack_bytes = i32::try_from(stack_bytes).unwrap_or(0);
        let zero = self.iconst(0);
        let regs = std::array::from_fn(|_| self.b.declare_var(types::I64));
        let r10 = match slot {
            Some(slot) => self.b.ins().stack_addr(types::I64, slot, stack_bytes),
            None => zero,
        };
        for (i, var) in (0usize..).zip(regs) {
            let value = match i {
                1..=5 => args[i - 1],
                10 => r10,
                _ => zero,
            };
            self.b.def_var(var, value);
        }
        let mut cells = BTreeMap::new();
        for (&off, &size) in &frame.cells {
            let ty = if size == 4 { types::I32 } else { types::I64 };
            let var = self.b.declare_var(ty);
            let undefined = self.b.ins().iconst(ty, 0);
            self.b.def_var(var, undefined);
            cells.insert(off, var);
        }
        let blocks = self.leaders(function.start_insn_idx, function.end_insn_idx);
        let end = self.b.create_block();
        let range = function.start_insn_idx..function.end_insn_idx;
        let loaded = BTreeMap::new();
        Ok(Scope { regs, frame, cells, slot, stack_bytes, blocks, loaded, range, end, depth })
    }

    /// A block for each instruction that a reachable jump goes to.
    fn leaders(&mut self, start: u32, end: u32) -> BTreeMap<u32, Block> {
        let (insns, facts) = (self.used.verified.insns(), self.used.verified.facts());
        let mut blocks = BTreeMap::new();
        for idx in start..end {
            if facts[idx as usize] == Fact::Unreachable {
                continue;
            }
            let Some(to) = op::jump_target(insns[idx as usize], idx) else { continue };
            if (start..end).contains(&to) && facts[to as usize] != Fact::Unreachable {
                blocks.entry(to).or_insert_with(|| self.b.create_block());
            }
        }
        blocks
    }

    /// Translates one instruction. True if it ends the block.
    fn insn(
        &mut self,
        scope: &mut Scope,
        idx: u32,
        insn: Insn,
        fact: Fact,
    ) -> Result<bool, CompileError> {
        self.count_insns(1)?;
        if insn.dst > 10 || insn.src > 10 {
            return Err(CompileError::Unsupported { insn_idx: idx, opcode: insn.opcode });
        }
        match op::class(insn.opcode) {
            op::ALU | op::ALU64 => self.alu(scope, idx, insn).map(|()| false),
            op::LD if insn.opcode == op::LDDW => self.lddw(scope, idx, insn).map(|()| false),
            op::LDX => self.load(scope, idx, insn, fact).map(|()| false),
            op::ST | op::STX => self.store(scope, idx, insn, fact).map(|()| false),
            op::JMP if insn.opcode == op::EXIT => {
                self.b.ins().jump(scope.end, &[]);
                Ok(true)
            }
            op::JMP if matches!(insn.opcode, op::CALL | op::CALLX) => {
                self.call(scope, idx, insn, fact).map(|()| false)
            }
            op::JMP | op::JMP32 => self.jump(scope, idx, insn).map(|()| true),
            _ => Err(CompileError::Unsupported { insn_idx: idx, opcode: insn.opcode }),
        }
    }

    fn count_insns(&mut self, n: usize) -> Result<(), CompileError> {
        let n = u32::try_from(n).unwrap_or(u32::MAX);
        self.out.n_insns = self.out.n_insns.saturating_add(n);
        if self.out.n_insns > MAX_INSNS {
            return Err(CompileError::TooLarge { max: MAX_INSNS });
        }
        Ok(())
    }

    fn call(
        &mut self,
        scope: &mut Scope,
        idx: u32,
        insn: Insn,
        fact: Fact,
    ) -> Result<(), CompileError> {
        let result = match fact {
            Fact::CallLocal { function } if insn.src == PSEUDO_CALL => {
                let args = std::array::from_fn(|i| self.b.use_var(scope.regs[i + 1]));
                self.deeper(scope, idx, function, args)?
            }
            Fact::CallPointer => {
                let register = insn
                    .callx()
                    .ok_or(CompileError::Unsupported { insn_idx: idx, opcode: insn.opcode })?;
                let callee = self.reg(scope, register);
                let args = std::array::from_fn(|i| self.b.use_var(scope.regs[i + 1]));
                self.call_through(scope, idx, callee, args)?
            }
            Fact::Call { helper: Helper::TailCall, .. }
                if insn.opcode == op::CALL && insn.src == 0 =>
            {
                self.tail_call(scope, idx, fact)?;
                self.iconst(0)
            }
            Fact::Call { helper, map, constants } if insn.opcode == op::CALL && insn.src == 0 => {
                self.helper(scope, idx, helper, map, constants)?
            }
            _ => {
                return Err(CompileError::BadFacts {
                    insn_idx: idx,
                    what: "call without its fact",
                });
            }
        };
        self.b.def_var(scope.regs[0], result);
        Ok(())
    }

    /// A call of `function` from `scope`.
    fn deeper(
        &mut self,
        scope: &Scope,
        idx: u32,
        function: u32,
        args: [Value; 5],
    ) -> Result<Value, CompileError> {
        if scope.depth + 1 >= MAX_CALL_DEPTH {
            return Err(CompileError::TooDeep { insn_idx: idx, max: MAX_CALL_DEPTH });
        }
        self.function(function, args, scope.depth + 1)
    }

    fn lddw(&mut self, scope: &Scope, idx: u32, insn: Insn) -> Result<(), CompileError> {
        let second = self.used.verified.insns().get(idx as usize + 1).copied().ok_or(
            CompileError::BadFacts { insn_idx: idx, what: "lddw without its second half" },
        )?;
        let low = u64::from(insn.imm.cast_unsigned());
        let high = u64::from(second.imm.cast_unsigned());
        let value = match insn.src {
            0 => self.iconst((low | (high << 32)).cast_signed()),
            PSEUDO_MAP => {
                let placed = self.map(MapIdx(insn.imm.cast_unsigned()))?;
                self.arena(placed.header_offset, 0)
            }
            PSEUDO_MAP_VALUE => {
                let placed = self.map(MapIdx(insn.imm.cast_unsigned()))?;
                self.element(idx, placed, i64::from(second.imm))?
            }
            PSEUDO_FUNC => {
                let start = (idx + 1).wrapping_add_signed(insn.imm);
                self.iconst(Verified::function_value(start).cast_signed())
            }
            _ => return Err(CompileError::Unsupported { insn_idx: idx, opcode: insn.opcode }),
        };
        self.b.def_var(scope.regs[usize::from(insn.dst)], value);
        Ok(())
    }

    /// The address `offset` bytes into an array's element 0.
    fn element(&mut self, idx: u32, map: MapPlacement, offset: i64) -> Result<Value, CompileError> {
        let value = match map.kind {
            MapKind::Array => self.arena(map.data_offset, offset),
            MapKind::PerCpuArray => {
                let slot = self.slot(idx)?;
                let at = i64::try_from(map.slot_offset).unwrap_or(i64::MAX).wrapping_add(offset);
                self.b.ins().iadd_imm_s(slot, at)
            }
            MapKind::Hash
            | MapKind::PerCpuHash
            | MapKind::ArrayOfMaps
            | MapKind::HashOfMaps
            | MapKind::ProgArray
            | MapKind::RingBuf => {
                return Err(CompileError::BadFacts { insn_idx: idx, what: "map has no element 0" });
            }
        };
        self.nonnull.insert(value);
        Ok(value)
    }

    fn map(&self, map: MapIdx) -> Result<MapPlacement, CompileError> {
        let maps = &self.env.plan.maps;
        maps.get(map.0 as usize).copied().ok_or(CompileError::NoSuchMap { map, n_maps: maps.len() })
    }

    fn slot(&self, idx: u32) -> Result<Value, CompileError> {
        self.env.slot.ok_or(CompileError::BadFacts { insn_idx: idx, what: "no thread slot here" })
    }

    fn arena(&mut self, offset: u64, more: i64) -> Value {
        let addend = offset.cast_signed().wrapping_add(more);
        symbol(self.b, RelocTarget::Arena { addend })
    }

    fn iconst(&mut self, value: i64) -> Value {
        constant(self.b, value)
    }

    fn number(&mut self, value: Number) -> Value {
        number(self.b, value)
    }

    fn reg(&mut self, scope: &Scope, reg: u8) -> Value {
        self.b.use_var(scope.regs[usize::from(reg)])
    }

    fn set(&mut self, scope: &Scope, reg: u8, value: Value) {
        self.b.def_var(scope.regs[usize::from(reg)], value);
    }

    /// `value`, of any integer type, zero-extended.
    fn widen(&mut self, value: Value) -> Value {
        match self.type_of(value) {
            types::I64 => value,
            ty => match known_constant(self.b, value) {
                // Extended by us: the extended one may be too large for an immediate.
                Some(bits) => {
                    let mask = u64::MAX >> (64 - ty.bits());
                    constant(self.b, (bits & mask).cast_signed())
                }
                None => self.b.ins().uextend(types::I64, value),
            },
        }
    }

    fn type_of(&self, value: Value) -> Type {
        self.b.func.dfg.value_type(value)
    }
}
