//! Which registers and stack slots may still be read after an instruction, and on which of
//! them a branch, an address or a helper's argument depends ("exact").
//!
//! A static analysis, backwards over each function, callees before callers. It serves
//! pruning alone: [`crate::state::State::forget_dead`] drops what it finds dead. A mistake
//! here makes the verifier refuse; it cannot make it accept.
//!
//! Stack slots are followed where an address is r10 plus a constant; where it may be some
//! other stack address, all slots are taken to be read.

use std::collections::BTreeSet;

use flea_object::helper::Helper;
use flea_object::spec::{Param, ProgramKind, Prototype};

use crate::cfg::{Cfg, Span, Successors};
use crate::number::scalar::{AluOp, Width};
use crate::op::{Atomic, Op, Operand, Place, Reg};
use crate::proto::proto;
use crate::stack::STACK_SLOTS;

/// What is read from some point on. Registers by number; slot 0 is at -8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Live {
    pub(crate) regs: u16,
    pub(crate) exact_regs: u16,
    pub(crate) slots: u64,
    pub(crate) exact_slots: u64,
}

/// The analysis of a whole program.
#[derive(Debug)]
pub(crate) struct Liveness {
    before: Vec<Live>,
    /// Instructions that are executed again when what they called returns: helpers with
    /// callbacks.
    repeated: BTreeSet<usize>,
}

/// Whether a register holds an address in its own function's frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FrameAddress {
    No,
    /// r10 plus this.
    At(i32),
    Maybe,
}

type Addresses = [FrameAddress; 11];

const ALL_SLOTS: u64 = u64::MAX;
const _: () = assert!(STACK_SLOTS == 64, "a slot per bit");

impl Liveness {
    /// `result` says whether somebody wants to know what the program returns.
    pub(crate) fn new(ops: &[Op], cfg: &Cfg, result: ProgramResult) -> Self {
        let repeated = (0..ops.len()).filter(|idx| ops[*idx].takes_callback()).collect();
        let mut this = Self { before: vec![Live::default(); ops.len()], repeated };
        for &function in &cfg.callees_first {
            let span = cfg.functions[function];
            let addresses = frame_addresses(ops, span);
            let role = if span.start == 0 { Role::Main(result) } else { Role::Callee };
            this.analyse(ops, cfg, span, &addresses, role);
        }
        this
    }

    /// What is read from `idx` on, in its own function.
    pub(crate) fn before(&self, idx: usize) -> Live {
        self.before.get(idx).copied().unwrap_or_default()
    }

    /// What the caller still reads, or has given away, while its call at `call_idx` runs.
    pub(crate) fn across_call(&self, call_idx: usize) -> Live {
        let (call, after) = (self.before(call_idx), self.before(call_idx + 1));
        // r0 to r5 are set by the call; a helper that calls back needs its arguments again.
        let (args, exact_args) =
            if self.repeated.contains(&call_idx) { (call.regs, call.exact_regs) } else { (0, 0) };
        Live {
            regs: args | after.regs & !0x3f,
            exact_regs: exact_args | after.exact_regs & !0x3f,
            slots: call.slots | after.slots,
            exact_slots: call.exact_slots | after.exact_slots,
        }
    }

    fn analyse(&mut self, ops: &[Op], cfg: &Cfg, span: Span, addresses: &[Addresses], role: Role) {
        let n = span.end - span.start;
        let mut predecessors = vec![Vec::new(); n];
        for (idx, op) in ops.iter().enumerate().take(span.end).skip(span.start) {
            for to in Successors::of(idx, op).iter() {
                predecessors[to - span.start].push(idx);
            }
        }
        // Last instruction first; then whatever leads to a change. Sets only grow, so this
        // ends.
        let mut todo: Vec<usize> = (span.start..span.end).collect();
        let mut queued = vec![true; n];
        while let Some(idx) = todo.pop() {
            queued[idx - span.start] = false;
            let mut live = Live::default();
            for to in Successors::of(idx, &ops[idx]).iter() {
                live = live.union(self.before[to]);
            }
            let at = &addresses[idx - span.start];
            let live = match ops[idx] {
                Op::CallLocal { target } if cfg.prototype(cfg.function_at(target)).is_some() => {
                    call_global(live, cfg.prototype(cfg.function_at(target)), at)
                }
                _ => self.step(&ops[idx], live, at, role),
            };
            if live == self.before[idx] {
                continue;
            }
            self.before[idx] = live;
            for &from in &predecessors[idx - span.start] {
                if !std::mem::replace(&mut queued[from - span.start], true) {
                    todo.push(from);
                }
            }
        }
    }

    /// What is live before `op`, given what is live after it.
    fn step(&self, op: &Op, after: Live, at: &Addresses, role: Role) -> Live {
        let mut l = after;
        match *op {
            Op::Alu { dst, src, .. } => {
                l.read(dst, after.is_exact(dst));
                l.read_operand(src, after.is_exact(dst));
            }
            Op::Neg { dst, .. } | Op::Swap { dst, .. } | Op::Trunc { dst, .. } => {
                l.read(dst, after.is_exact(dst));
            }
            Op::Mov { dst, src, .. } => {
                l.kill(dst);
                l.read_operand(src, after.is_exact(dst));
            }
            Op::MovSx { dst, src, .. } => {
                l.kill(dst);
                l.read(src, after.is_exact(dst));
            }
            Op::Const { dst, .. }
            | Op::MapAddress { dst, .. }
            | Op::MapValueAddress { dst, .. }
            | Op::FunctionAddress { dst, .. } => {
                l.kill(dst);
            }
            Op::SecondHalf | Op::Goto { .. } => {}
            Op::Load { dst, place, .. } => {
                let exact = after.is_exact(dst);
                l.kill(dst);
                l.read(place.base, true);
                l.read_slots(reach(at, place), exact);
            }
            Op::Store { place, src } => {
                store(&mut l, after, reach(at, place), place, src);
                // A pointer that a callee was given may lead to its caller's frame, where the
                // number may be asked for.
                if role == Role::Callee && at[place.base.index()] == FrameAddress::No {
                    l.read_operand(src, true);
                }
            }
            Op::Atomic { op, fetch, place, src } => {
                if op == Atomic::Cmpxchg {
                    l.read(Reg::R0, true);
                } else if fetch {
                    l.kill(src);
                }
                l.read(place.base, true);
                l.read(src, true);
                l.read_slots(reach(at, place), true);
            }
            Op::If { dst, src, .. } => {
                l.read(dst, true);
                l.read_operand(src, true);
            }
            Op::CallHelper { id } => call_helper(&mut l, id, at),
            Op::CallPointer { callee } => {
                l.kill_caller_saved();
                l.read(callee, true);
                for reg in (0..5).map(Reg::arg) {
                    l.read(reg, true);
                    read_by_callee(&mut l, at, reg);
                }
            }
            Op::CallLocal { target } => self.call_local(&mut l, target, at),
            Op::Exit => l.read(Reg::R0, role != Role::Main(ProgramResult::Ignored)),
        }
        l
    }

    fn call_local(&self, l: &mut Live, target: usize, at: &Addresses) {
        l.kill_caller_saved();
        let callee = self.before(target);
        for reg in (0..5).map(Reg::arg) {
            if callee.regs >> reg.index() & 1 != 0 {
                l.read(reg, callee.is_exact(reg));
                read_by_callee(l, at, reg);
            }
        }
    }
}

/// Whether a main function's result is looked at: it is for nobody's address or branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProgramResult {
    Ignored,
    Used,
}

impl ProgramResult {
    pub(crate) fn of(kind: ProgramKind) -> Self {
        match kind {
            ProgramKind::FmodRet => Self::Used,
            _ => Self::Ignored,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Main(ProgramResult),
    Callee,
}

/// Which slots of its own frame an access may touch.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// Some of these.
    Slots(u64),
    /// All of exactly this one.
    Whole(u64),
}

fn reach(at: &Addresses, place: Place) -> Reach {
    match at[place.base.index()] {
        FrameAddress::No => Reach::Slots(0),
        FrameAddress::Maybe => Reach::Slots(ALL_SLOTS),
        FrameAddress::At(k) => {
            let off = k + i32::from(place.off);
            let slots = slots_between(off, off + place.size.bytes().cast_signed());
            if place.size.bytes() == 8 && off % 8 == 0 {
                Reach::Whole(slots)
            } else {
                Reach::Slots(slots)
            }
        }
    }
}

/// The slots with a byte in `low..high`, offsets from the frame's top.
fn slots_between(low: i32, high: i32) -> u64 {
    let mut slots = 0;
    for (i, bottom) in (0..STACK_SLOTS).zip((1..).map(|n| -8 * n)) {
        if bottom < high && bottom + 8 > low {
            slots |= 1 << i;
        }
    }
    slots
}

fn store(l: &mut Live, after: Live, reach: Reach, place: Place, src: Operand) {
    let mask = match reach {
        Reach::Slots(mask) => mask,
        Reach::Whole(mask) => {
            l.slots &= !mask;
            l.exact_slots &= !mask;
            mask
        }
    };
    l.read(place.base, true);
    l.read_operand(src, after.exact_slots & mask != 0);
}

/// A function of the program is given what is in `reg`: a frame's address reaches all of it.
fn read_by_callee(l: &mut Live, at: &Addresses, reg: Reg) {
    if at[reg.index()] != FrameAddress::No {
        l.read_slots(Reach::Slots(ALL_SLOTS), true);
    }
}

/// A global function's parameters are all checked, whether it reads them or not.
fn call_global(after: Live, prototype: Option<&Prototype>, at: &Addresses) -> Live {
    let mut l = after;
    l.kill_caller_saved();
    for (reg, param) in (0..5).map(Reg::arg).zip(prototype.iter().flat_map(|p| &p.params)) {
        l.read(reg, *param != Param::Number);
        read_by_callee(&mut l, at, reg);
    }
    l
}

fn call_helper(l: &mut Live, id: i32, at: &Addresses) {
    l.kill_caller_saved();
    let helper = Helper::from_id(id);
    let n_args = helper.map_or(5, |h| proto(h).args.len());
    let calls_back = helper.is_some_and(Helper::takes_callback);
    for reg in (0..n_args).map(Reg::arg) {
        l.read(reg, true);
        if calls_back {
            read_by_callee(l, at, reg);
        }
        match at[reg.index()] {
            FrameAddress::No => {}
            // A helper reads upwards from where it is pointed to.
            FrameAddress::At(k) => l.read_slots(Reach::Slots(slots_between(k, 0)), false),
            FrameAddress::Maybe => l.read_slots(Reach::Slots(ALL_SLOTS), false),
        }
    }
}

impl Live {
    fn union(self, other: Self) -> Self {
        Self {
            regs: self.regs | other.regs,
            exact_regs: self.exact_regs | other.exact_regs,
            slots: self.slots | other.slots,
            exact_slots: self.exact_slots | other.exact_slots,
        }
    }

    fn is_exact(&self, reg: Reg) -> bool {
        self.exact_regs >> reg.index() & 1 != 0
    }

    fn kill(&mut self, reg: Reg) {
        self.regs &= !(1 << reg.index());
        self.exact_regs &= !(1 << reg.index());
    }

    fn kill_caller_saved(&mut self) {
        self.kill(Reg::R0);
        (0..5).for_each(|n| self.kill(Reg::arg(n)));
    }

    fn read(&mut self, reg: Reg, exact: bool) {
        self.regs |= 1 << reg.index();
        if exact {
            self.exact_regs |= 1 << reg.index();
        }
    }

    fn read_operand(&mut self, operand: Operand, exact: bool) {
        if let Operand::Reg(reg) = operand {
            self.read(reg, exact);
        }
    }

    fn read_slots(&mut self, reach: Reach, exact: bool) {
        let (Reach::Slots(mask) | Reach::Whole(mask)) = reach;
        self.slots |= mask;
        if exact {
            self.exact_slots |= mask;
        }
    }
}

/// For each instruction of a function, which registers hold addresses of its own frame.
fn frame_addresses(ops: &[Op], span: Span) -> Vec<Addresses> {
    // A load from memory can give such an address only where one was stored. Assume not;
    // where that turns out wrong, once more without the assumption.
    let (found, stored) = flow(ops, span, FrameAddress::No);
    if stored { flow(ops, span, FrameAddress::Maybe).0 } else { found }
}

fn flow(ops: &[Op], span: Span, loaded: FrameAddress) -> (Vec<Addresses>, bool) {
    let mut before: Vec<Option<Addresses>> = vec![None; span.end - span.start];
    let mut at_entry = [FrameAddress::No; 11];
    at_entry[Reg::R10.index()] = FrameAddress::At(0);
    before[0] = Some(at_entry);
    let mut todo = vec![span.start];
    let mut stored = false;
    while let Some(idx) = todo.pop() {
        let Some(mut at) = before[idx - span.start] else { continue };
        stored |= stores_address(&ops[idx], &at);
        follow(&ops[idx], &mut at, loaded);
        for to in Successors::of(idx, &ops[idx]).iter() {
            let known = &mut before[to - span.start];
            let joined = known.map_or(at, |known| join(&known, &at));
            if *known != Some(joined) {
                *known = Some(joined);
                todo.push(to);
            }
        }
    }
    let found = before.into_iter().map(|at| at.unwrap_or([FrameAddress::Maybe; 11]));
    (found.collect(), stored)
}

fn join(a: &Addresses, b: &Addresses) -> Addresses {
    std::array::from_fn(|i| if a[i] == b[i] { a[i] } else { FrameAddress::Maybe })
}

/// The address of the frame may get into memory here, or into a callee, who may store it.
fn stores_address(op: &Op, at: &Addresses) -> bool {
    match op {
        Op::Store { src: Operand::Reg(src), .. } | Op::Atomic { src, .. } => {
            at[src.index()] != FrameAddress::No
        }
        Op::CallLocal { .. } | Op::CallPointer { .. } => gives_address(at),
        _ => op.takes_callback() && gives_address(at),
    }
}

fn gives_address(at: &Addresses) -> bool {
    at[1..=5].iter().any(|a| *a != FrameAddress::No)
}

fn follow(op: &Op, at: &mut Addresses, loaded: FrameAddress) {
    match *op {
        Op::Mov { width: Width::W64, dst, src: Operand::Reg(src) } => {
            at[dst.index()] = at[src.index()];
        }
        Op::Alu { op, width: Width::W64, dst, src: Operand::Imm(imm) } => {
            let moved = match (at[dst.index()], op) {
                (FrameAddress::No, _) => FrameAddress::No,
                (FrameAddress::At(k), AluOp::Add) => near(k.checked_add(imm)),
                (FrameAddress::At(k), AluOp::Sub) => near(k.checked_sub(imm)),
                _ => FrameAddress::Maybe,
            };
            at[dst.index()] = moved;
        }
        Op::Alu { dst, src: Operand::Reg(src), .. } if at[src.index()] != FrameAddress::No => {
            at[dst.index()] = FrameAddress::Maybe;
        }
        Op::Alu { dst, .. } if at[dst.index()] != FrameAddress::No => {
            at[dst.index()] = FrameAddress::Maybe;
        }
        Op::Mov { dst, .. } | Op::MovSx { dst, .. } | Op::Const { dst, .. } => {
            at[dst.index()] = FrameAddress::No;
        }
        Op::MapAddress { dst, .. }
        | Op::MapValueAddress { dst, .. }
        | Op::FunctionAddress { dst, .. } => {
            at[dst.index()] = FrameAddress::No;
        }
        Op::Load { dst, .. } => at[dst.index()] = loaded,
        Op::Atomic { fetch: true, op, src, .. } => {
            at[if op == Atomic::Cmpxchg { Reg::R0 } else { src }.index()] = loaded;
        }
        Op::CallHelper { .. } | Op::CallLocal { .. } | Op::CallPointer { .. } => {
            at[0..=5].fill(FrameAddress::No)
        }
        _ => {}
    }
}

/// Offsets far outside the frame are of no use to anyone.
fn near(off: Option<i32>) -> FrameAddress {
    match off {
        Some(k) if (-4096..=4096).contains(&k) => FrameAddress::At(k),
        _ => FrameAddress::Maybe,
    }
}
