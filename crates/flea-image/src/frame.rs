//! Which bytes of a function's BPF stack can live in SSA values instead of memory.
//!
//! A forward data flow over one function tracks which registers hold `r10 + constant`. A
//! 4- or 8-byte cell is promoted if every access that can reach its bytes is of exactly that
//! offset and size, by a register known to be `r10 + constant`, and its address goes nowhere
//! else. The common case is the key of an array lookup: `*(u32 *)(r10 - 4) = 0; r2 = r10 - 4`.

use std::collections::BTreeMap;

use flea_object::helper::Helper;
use flea_object::insn::{Insn, PSEUDO_CALL};
use flea_verifier::Verified;
use flea_verifier::facts::{Fact, Function};

use crate::translate::op;

const STACK_BYTES: usize = 512;
const N_REGS: usize = 11;

/// What a register holds, as far as stack addresses go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Loc {
    /// No path has set it yet.
    #[default]
    Unset,
    /// Not derived from r10.
    Plain,
    /// `r10 + this`.
    Stack(i32),
    /// Derived from r10 in a way that is not followed.
    Lost,
}

/// The registers before one instruction.
type State = [Loc; N_REGS];

/// What the translation needs to know of a function's stack.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    /// First instruction of the function.
    start: u32,
    /// Registers before each instruction; `Unset` everywhere where no path leads.
    states: Vec<State>,
    /// Promoted cells: offset from r10 (negative) to size in bytes.
    pub cells: BTreeMap<i32, u8>,
    /// Some bytes of the stack must be real memory.
    pub needs_memory: bool,
}

impl Frame {
    /// The offset from r10 that `reg` is known to hold before `insn_idx`.
    pub fn stack_offset(&self, insn_idx: u32, reg: u8) -> Option<i32> {
        let state = self.states.get(insn_idx.checked_sub(self.start)? as usize)?;
        match state.get(usize::from(reg))? {
            Loc::Stack(offset) => Some(*offset),
            _ => None,
        }
    }

    /// Follows stack addresses through `function`. `inline_key(map lookup's insn_idx)` says
    /// whether the lookup there reads its key inline.
    pub fn analyse(
        verified: &Verified,
        function: Function,
        inline_key: impl Fn(u32) -> bool,
    ) -> Self {
        let mut frame = Self {
            start: function.start_insn_idx,
            states: flow(verified, function),
            cells: BTreeMap::new(),
            needs_memory: false,
        };
        let mut uses = Uses::default();
        for (i, state) in (function.start_insn_idx..).zip(&frame.states) {
            if state[10] == Loc::Unset {
                continue;
            }
            uses.add(verified.insns()[i as usize], verified.facts()[i as usize], state, || {
                inline_key(i)
            });
        }
        (frame.cells, frame.needs_memory) = uses.finish();
        frame
    }
}

fn flow(verified: &Verified, function: Function) -> Vec<State> {
    let start = function.start_insn_idx as usize;
    let n = (function.end_insn_idx as usize).saturating_sub(start);
    let mut states = vec![State::default(); n];
    if n == 0 {
        return states;
    }
    states[0] = [Loc::Plain; N_REGS];
    states[0][10] = Loc::Stack(0);
    // Each register climbs Unset -> Plain or Stack -> Lost, so this ends after at most
    // 2 * N_REGS changes per instruction.
    let mut work = vec![0usize];
    while let Some(at) = work.pop() {
        let insn = verified.insns()[start + at];
        let after = step(insn, states[at]);
        let idx = u32::try_from(start + at).unwrap_or(u32::MAX);
        let next = op::successors(insn, idx);
        for to in next.into_iter().flatten() {
            let Some(to) = (to as usize).checked_sub(start).filter(|t| *t < n) else { continue };
            let joined = join(states[to], after);
            if joined != states[to] {
                states[to] = joined;
                work.push(to);
            }
        }
    }
    states
}

fn join(a: State, b: State) -> State {
    std::array::from_fn(|r| match (a[r], b[r]) {
        (Loc::Unset, x) | (x, Loc::Unset) => x,
        (x, y) if x == y => x,
        _ => Loc::Lost,
    })
}

fn step(insn: Insn, mut s: State) -> State {
    let (dst, src) = (usize::from(insn.dst.min(10)), usize::from(insn.src.min(10)));
    match op::class(insn.opcode) {
        op::ALU64 | op::ALU => {
            let is_reg = insn.opcode & op::X != 0;
            let wide = op::class(insn.opcode) == op::ALU64;
            s[dst] = match (insn.opcode & 0xf0, s[dst]) {
                (op::MOV, _) if !is_reg => Loc::Plain,
                (op::MOV, _) if wide && insn.off == 0 => s[src],
                (op::MOV, _) => tainted(s[src], Loc::Plain),
                (op::ADD, Loc::Stack(o)) if wide && !is_reg => {
                    o.checked_add(insn.imm).map_or(Loc::Lost, Loc::Stack)
                }
                (op::SUB, Loc::Stack(o)) if wide && !is_reg => {
                    o.checked_sub(insn.imm).map_or(Loc::Lost, Loc::Stack)
                }
                (op::NEG | op::END, d) => tainted(d, Loc::Plain),
                (_, d) if is_reg => tainted(d, s[src]),
                (_, d) => tainted(d, Loc::Plain),
            };
        }
        op::LD | op::LDX => s[dst] = Loc::Plain,
        op::STX if op::mode(insn.opcode) == op::ATOMIC => {
            if insn.imm == op::CMPXCHG {
                s[0] = Loc::Plain;
            } else if insn.imm & op::FETCH != 0 {
                s[src] = Loc::Plain;
            } else if insn.imm == op::LOAD_ACQUIRE {
                s[dst] = Loc::Plain;
            }
        }
        op::JMP if matches!(insn.opcode, op::CALL | op::CALLX) => {
            s[..6].fill(Loc::Plain);
        }
        _ => {}
    }
    s
}

fn tainted(a: Loc, b: Loc) -> Loc {
    let plain = |l| matches!(l, Loc::Plain | Loc::Unset);
    if plain(a) && plain(b) { Loc::Plain } else { Loc::Lost }
}

/// All uses of stack bytes in one function.
#[derive(Default)]
struct Uses {
    accesses: Vec<(i32, u8)>,
    /// Accesses that only memory can serve (atomics, helpers that take a pointer).
    in_memory: Vec<(i32, u8)>,
    /// Everything from the lowest of these up is memory.
    escaped_from: Option<i32>,
    all_escaped: bool,
}

impl Uses {
    fn add(&mut self, insn: Insn, fact: Fact, s: &State, inline_key: impl Fn() -> bool) {
        let (dst, src) = (s[usize::from(insn.dst.min(10))], s[usize::from(insn.src.min(10))]);
        let off = i32::from(insn.off);
        let size = op::size_bytes(insn.opcode);
        match op::class(insn.opcode) {
            op::LDX => self.access(src, off, size),
            op::ST => self.access(dst, off, size),
            op::STX if op::mode(insn.opcode) == op::MEM => {
                self.access(dst, off, size);
                self.escape_all(src);
            }
            op::STX => {
                let base = if insn.imm == op::LOAD_ACQUIRE { src } else { dst };
                let value = if insn.imm == op::LOAD_ACQUIRE { Loc::Plain } else { src };
                self.atomic(base, off, size);
                self.escape_all(value);
            }
            op::JMP if matches!(insn.opcode, op::CALL | op::CALLX) => {
                self.call(insn, fact, s, inline_key);
            }
            op::JMP if insn.opcode == op::EXIT => self.escape_all(s[0]),
            _ => {}
        }
    }

    fn call(&mut self, insn: Insn, fact: Fact, s: &State, inline_key: impl Fn() -> bool) {
        // A helper's callback is code of the program as well.
        let calls_back = matches!(fact, Fact::Call { helper, .. } if helper.takes_callback());
        if insn.src == PSEUDO_CALL || insn.opcode == op::CALLX || calls_back {
            s[1..6].iter().for_each(|l| self.escape_all(*l));
            return;
        }
        match fact {
            Fact::Call { helper: Helper::MapLookupElem, .. } if inline_key() => {
                self.access(s[2], 0, 4);
            }
            Fact::Call { helper: Helper::GetFuncArg, .. } => self.access(s[3], 0, 8),
            Fact::Call { helper: Helper::GetFuncRet, .. } => self.access(s[2], 0, 8),
            _ => s[1..6].iter().for_each(|l| self.escape(*l)),
        }
    }

    fn access(&mut self, base: Loc, off: i32, size: u8) {
        match base {
            Loc::Stack(o) => self.accesses.push((o.saturating_add(off), size)),
            Loc::Lost => self.all_escaped = true,
            Loc::Plain | Loc::Unset => {}
        }
    }

    fn atomic(&mut self, base: Loc, off: i32, size: u8) {
        match base {
            Loc::Stack(o) => self.in_memory.push((o.saturating_add(off), size)),
            other => self.access(other, off, size),
        }
    }

    /// The address goes to someone who uses it upwards only (a helper's buffer).
    fn escape(&mut self, l: Loc) {
        match l {
            Loc::Stack(o) => {
                self.escaped_from = Some(self.escaped_from.map_or(o, |e| e.min(o)));
            }
            Loc::Lost => self.all_escaped = true,
            Loc::Plain | Loc::Unset => {}
        }
    }

    /// The address goes to code that may move it either way.
    fn escape_all(&mut self, l: Loc) {
        if matches!(l, Loc::Stack(_) | Loc::Lost) {
            self.all_escaped = true;
        }
    }

    fn finish(&self) -> (BTreeMap<i32, u8>, bool) {
        if self.all_escaped {
            return (BTreeMap::new(), true);
        }
        let overlaps = |a: (i32, u8), b: (i32, u8)| {
            a.0 < b.0.saturating_add(i32::from(b.1)) && b.0 < a.0.saturating_add(i32::from(a.1))
        };
        let mut cells = BTreeMap::new();
        let mut needs_memory = self.escaped_from.is_some() || !self.in_memory.is_empty();
        for &cell in &self.accesses {
            let escapes = self.escaped_from.is_some_and(|e| cell.0 + i32::from(cell.1) > e);
            let inside = cell.0 >= -i32::try_from(STACK_BYTES).unwrap_or(0)
                && cell.0 + i32::from(cell.1) <= 0;
            let alone = self.accesses.iter().all(|o| *o == cell || !overlaps(*o, cell))
                && !self.in_memory.iter().any(|o| overlaps(*o, cell));
            if inside && alone && !escapes && matches!(cell.1, 4 | 8) {
                cells.insert(cell.0, cell.1);
            } else {
                needs_memory = true;
            }
        }
        (cells, needs_memory)
    }
}
