//! Calls through function references: `callx`, and the helpers that call a function of the
//! program in rounds.
//!
//! Meaning is that of Linux's `bpf_loop` as its verifier inlines it (all 64 bits of the number
//! of rounds count) and of `bpf_for_each_map_elem`, `kernel/bpf/` of 6.18.

use super::{CLOBBERED, FUNCTION_BASE, Frame, Host, State, Trap, Waiting};
use crate::helper::Helper;
use crate::insn::{Insn, PSEUDO_FUNC};

/// The most rounds of one `bpf_loop` (Linux: `BPF_MAX_LOOPS`).
pub const MAX_LOOPS: u64 = 1 << 23;

const E2BIG: i64 = -7;
const EINVAL: i64 = -22;

/// A helper that calls a function once per round.
pub(super) struct Rounds {
    callback: usize,
    context: u64,
    n_done: u64,
    over: Over,
}

/// What there is a round for.
enum Over {
    /// The numbers below this.
    Numbers(u64),
    /// The elements of a map. A round's key is a region of its own: `key` while it runs.
    Elements { map: u64, last_key: Option<Vec<u8>>, key: Option<u64> },
}

impl<'a, H: Host> State<'a, H> {
    /// The function that `value` refers to: one that the program takes a reference to.
    pub(super) fn function(&self, value: u64) -> Result<usize, Trap> {
        let start = value.wrapping_sub(FUNCTION_BASE);
        let refers = |(i, insn): (usize, &Insn)| {
            insn.is_lddw()
                && insn.src == PSEUDO_FUNC
                && super::offset_pc(i + 1, insn.imm) as u64 == start
        };
        let known = self.insns.iter().enumerate().any(refers);
        let no_function = Trap::NoFunction { insn_idx: self.pc, value };
        usize::try_from(start).ok().filter(|_| known).ok_or(no_function)
    }

    /// Starts `bpf_loop` or `bpf_for_each_map_elem`; where control goes.
    pub(super) fn start_rounds(&mut self, helper: Helper) -> Result<usize, Trap> {
        let [_, first, callback, context, flags, ..] = self.regs;
        let over = match helper {
            Helper::Loop => Over::Numbers(first),
            _ => Over::Elements { map: first, last_key: None, key: None },
        };
        let refused = match over {
            _ if flags != 0 => Some(EINVAL),
            Over::Numbers(n) if n > MAX_LOOPS => Some(E2BIG),
            _ => None,
        };
        let return_pc = self.pc + 1;
        if let Some(errno) = refused {
            self.regs[0] = errno.cast_unsigned();
            self.regs[1..6].fill(CLOBBERED);
            return Ok(return_pc);
        }
        let callback = self.function(callback)?;
        let mut rounds = Rounds { callback, context, n_done: 0, over };
        let Some(args) = self.round_args(&mut rounds)? else {
            return Ok(self.finish_rounds(0, return_pc));
        };
        self.enter(return_pc)?;
        self.regs[1..6].copy_from_slice(&args);
        if let Some(frame) = self.frames.last_mut() {
            frame.waiting = Waiting::Helper(rounds);
        }
        Ok(callback)
    }

    /// The callback of `frame`'s helper has returned; where control goes.
    pub(super) fn next_round(
        &mut self,
        frame: &Frame<'a>,
        mut rounds: Rounds,
    ) -> Result<usize, Trap> {
        let return_pc = self.leave(frame);
        rounds.n_done += 1;
        let stops = self.regs[0] != 0;
        let args = if stops { None } else { self.round_args(&mut rounds)? };
        let Some(args) = args else {
            rounds.forget_key(self.memory);
            return Ok(self.finish_rounds(rounds.n_done, return_pc));
        };
        let callback = rounds.callback;
        self.enter(return_pc)?;
        self.regs[1..6].copy_from_slice(&args);
        if let Some(frame) = self.frames.last_mut() {
            frame.waiting = Waiting::Helper(rounds);
        }
        Ok(callback)
    }

    fn finish_rounds(&mut self, n_done: u64, return_pc: usize) -> usize {
        self.regs[0] = n_done;
        self.regs[1..6].fill(CLOBBERED);
        return_pc
    }

    /// `r1` to `r5` of the next round; `None` where there is none.
    fn round_args(&mut self, rounds: &mut Rounds) -> Result<Option<[u64; 5]>, Trap> {
        rounds.forget_key(self.memory);
        let insn_idx = self.pc;
        let failed =
            |reason| Trap::HelperFailed { insn_idx, helper: Helper::ForEachMapElem as i32, reason };
        let Rounds { context, n_done, .. } = *rounds;
        match &mut rounds.over {
            Over::Numbers(n) => {
                Ok((n_done < *n).then_some([n_done, context, CLOBBERED, CLOBBERED, CLOBBERED]))
            }
            Over::Elements { map, last_key, key } => {
                let next = self.host.next_key(*map, last_key.as_deref()).map_err(failed)?;
                let Some(next) = next else { return Ok(None) };
                let at = self.memory.add(next.clone(), super::Protection::ReadOnly);
                *last_key = Some(next);
                *key = Some(at);
                let args = [*map, at, 0, 0, 0];
                let lookup = Helper::MapLookupElem as i32;
                let value = self.host.call(lookup, args, self.memory).map_err(failed)?;
                Ok(Some([*map, at, value, context, CLOBBERED]))
            }
        }
    }
}

impl Rounds {
    /// A key's region lives as long as its round.
    fn forget_key(&mut self, memory: &mut super::Memory) {
        if let Over::Elements { key, .. } = &mut self.over
            && let Some(at) = key.take()
        {
            memory.remove(at);
        }
    }
}
