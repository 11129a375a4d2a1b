//! What a seccomp filter answers to a system call that is known in part.
//!
//! A filter is a classic BPF program over `struct seccomp_data`: number, architecture,
//! instruction pointer, arguments. It jumps forward only. Of the calls that code of ours will make
//! the number is known and some arguments are, so the program is run with unknown words: where
//! one of them decides, both ways are followed, and the worst answer counts.

use std::collections::HashSet;

/// `AUDIT_ARCH_X86_64` (<linux/audit.h>)
const ARCH: u32 = 0xc000_003e;
/// Bytes of `struct seccomp_data`, which a filter may ask for.
const DATA_BYTES: u32 = 64;
const SCRATCH_WORDS: usize = 16;
/// Far more than the filters of browsers and containers need. One that needs more is not known.
const MOST_STATES: usize = 1 << 16;

/// A system call, as far as it is known before it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SystemCall {
    /// Its name, for messages.
    pub name: &'static str,
    /// Its number.
    pub number: i64,
    /// Its arguments; `None` is one that may be anything.
    pub args: [Option<u64>; 6],
}

/// One instruction of a filter: the kernel's `struct sock_filter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Insn {
    pub(crate) code: u16,
    pub(crate) if_true: u8,
    pub(crate) if_false: u8,
    pub(crate) k: u32,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kills => "would kill it for",
            Self::Unknown => "may do anything to it for",
            Self::Fails => "forbids",
            Self::Allowed => "allows",
        })
    }
}

/// What becomes of a system call, the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// The process or thread is killed, or gets a SIGSYS, which kills unless it has a handler.
    Kills,
    /// Another process decides, or the filter is too intricate to be followed.
    Unknown,
    /// It is not made, and an error is returned.
    Fails,
    /// It is made.
    Allowed,
}

/// The worst answer of a filter.
pub(crate) fn judge(filter: &[Insn], call: &SystemCall) -> Verdict {
    let mut worst = Verdict::Allowed;
    let mut seen = HashSet::new();
    let mut todo = vec![State::default()];
    while let Some(state) = todo.pop() {
        if !seen.insert(state) {
            continue;
        }
        if seen.len() > MOST_STATES {
            return worst.min(Verdict::Unknown);
        }
        match filter.get(state.pc).and_then(|insn| step(*insn, state, call)) {
            Some(Next::Return(action)) => worst = worst.min(verdict(action)),
            Some(Next::Go(state)) => todo.push(state),
            Some(Next::Either(a, b)) => todo.extend([a, b]),
            // The kernel accepts no such filter.
            None => return worst.min(Verdict::Unknown),
        }
    }
    worst
}

/// `SECCOMP_RET_*` (<linux/seccomp.h>). An action that is not known kills, as in the kernel.
fn verdict(action: Option<u32>) -> Verdict {
    match action.map(|action| action & 0xffff_0000) {
        Some(0x7fff_0000 | 0x7ffc_0000) => Verdict::Allowed,
        // With no tracer that asked for it, SECCOMP_RET_TRACE is ENOSYS.
        Some(0x0005_0000 | 0x7ff0_0000) => Verdict::Fails,
        Some(0x7fc0_0000) | None => Verdict::Unknown,
        Some(_) => Verdict::Kills,
    }
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
struct State {
    pc: usize,
    a: Option<u32>,
    x: Option<u32>,
    scratch: [Option<u32>; SCRATCH_WORDS],
}

impl State {
    fn skip(mut self, n_insns: u8) -> Self {
        self.pc += usize::from(n_insns);
        self
    }
}

enum Next {
    Go(State),
    Either(State, State),
    Return(Option<u32>),
}

/// One instruction; `None` where there is none like it in a filter.
fn step(insn: Insn, mut state: State, call: &SystemCall) -> Option<Next> {
    let Insn { code, k, .. } = insn;
    let scratch = usize::try_from(k).ok().filter(|&k| k < SCRATCH_WORDS);
    state.pc += 1;
    // Class in bits 0 to 2; then size and mode, or operation and source.
    match (code & 0x07, code & 0xf8) {
        (0x00, 0x20) => state.a = word(k, call),
        (0x00, 0x80) => state.a = Some(DATA_BYTES),
        (0x00, 0x00) => state.a = Some(k),
        (0x00, 0x60) => state.a = state.scratch[scratch?],
        (0x01, 0x80) => state.x = Some(DATA_BYTES),
        (0x01, 0x00) => state.x = Some(k),
        (0x01, 0x60) => state.x = state.scratch[scratch?],
        (0x02, 0x00) => state.scratch[scratch?] = state.a,
        (0x03, 0x00) => state.scratch[scratch?] = state.x,
        (0x04, operation) => {
            let operand = if operation & 0x08 == 0 { Some(k) } else { state.x };
            state.a = match (operation & 0xf0, state.a, operand) {
                (0x80, a, _) => a.map(u32::wrapping_neg),
                (operation, Some(a), Some(b)) => arithmetic(operation, a, b)?,
                _ => None,
            };
        }
        (0x05, 0x00) => state.pc = state.pc.checked_add(usize::try_from(k).ok()?)?,
        (0x05, operation) => return jump(insn, operation, state),
        (0x06, 0x00) => return Some(Next::Return(Some(k))),
        (0x06, 0x10) => return Some(Next::Return(state.a)),
        (0x07, 0x00) => state.x = state.a,
        (0x07, 0x80) => state.a = state.x,
        _ => return None,
    }
    Some(Next::Go(state))
}

fn jump(insn: Insn, operation: u16, state: State) -> Option<Next> {
    let operand = if operation & 0x08 == 0 { Some(insn.k) } else { state.x };
    let (if_true, if_false) = (state.skip(insn.if_true), state.skip(insn.if_false));
    let (Some(a), Some(b)) = (state.a, operand) else {
        return Some(Next::Either(if_true, if_false));
    };
    let holds = match operation & 0xf0 {
        0x10 => a == b,
        0x20 => a > b,
        0x30 => a >= b,
        0x40 => a & b != 0,
        _ => return None,
    };
    Some(Next::Go(if holds { if_true } else { if_false }))
}

/// `Some(None)`: a division by zero, which ends a filter with 0, or a shift that the kernel's
/// translation leaves open. Nobody writes either.
fn arithmetic(operation: u16, a: u32, b: u32) -> Option<Option<u32>> {
    Some(match operation {
        0x00 => Some(a.wrapping_add(b)),
        0x10 => Some(a.wrapping_sub(b)),
        0x20 => Some(a.wrapping_mul(b)),
        0x30 => a.checked_div(b),
        0x40 => Some(a | b),
        0x50 => Some(a & b),
        0x60 => a.checked_shl(b),
        0x70 => a.checked_shr(b),
        0xa0 => Some(a ^ b),
        _ => return None,
    })
}

/// The word of `struct seccomp_data` at this offset.
fn word(offset: u32, call: &SystemCall) -> Option<u32> {
    let low = |value: u64| u32::try_from(value & u64::from(u32::MAX)).ok();
    match offset {
        0 => u32::try_from(call.number).ok(),
        4 => Some(ARCH),
        16..DATA_BYTES => {
            let value = call.args[usize::try_from((offset - 16) / 8).ok()?]?;
            low(if offset.is_multiple_of(8) { value } else { value >> 32 })
        }
        // The instruction pointer.
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0001;
    const NOTIFY: u32 = 0x7fc0_0000;
    const KILL: u32 = 0x8000_0000;

    fn insn(code: u16, if_true: u8, if_false: u8, k: u32) -> Insn {
        Insn { code, if_true, if_false, k }
    }
    fn load(offset: u32) -> Insn {
        insn(0x20, 0, 0, offset)
    }
    fn equal(k: u32, if_true: u8, if_false: u8) -> Insn {
        insn(0x15, if_true, if_false, k)
    }
    fn ret(action: u32) -> Insn {
        insn(0x06, 0, 0, action)
    }
    fn call(number: i64, args: &[Option<u64>]) -> SystemCall {
        let mut all = [None; 6];
        all[..args.len()].copy_from_slice(args);
        SystemCall { name: "a call", number, args: all }
    }

    #[test]
    fn by_number() {
        let filter = [
            load(4),
            equal(ARCH, 1, 0),
            ret(KILL),
            load(0),
            equal(39, 1, 0),
            equal(310, 1, 2),
            ret(ALLOW),
            ret(ERRNO),
            ret(NOTIFY),
        ];
        assert_eq!(judge(&filter, &call(39, &[])), Verdict::Allowed);
        assert_eq!(judge(&filter, &call(310, &[])), Verdict::Fails);
        assert_eq!(judge(&filter, &call(40, &[])), Verdict::Unknown);
    }

    #[test]
    fn by_an_argument_that_is_known_or_not() {
        // args[1], both halves: only 0 is allowed.
        let filter = [load(24), equal(0, 0, 2), load(28), equal(0, 1, 0), ret(KILL), ret(ALLOW)];
        assert_eq!(judge(&filter, &call(62, &[None, Some(0)])), Verdict::Allowed);
        assert_eq!(judge(&filter, &call(62, &[None, Some(9)])), Verdict::Kills);
        assert_eq!(judge(&filter, &call(62, &[None, Some(1 << 32)])), Verdict::Kills);
        assert_eq!(judge(&filter, &call(62, &[Some(0), None])), Verdict::Kills);
        // The instruction pointer decides: nobody knows it.
        let filter = [load(8), equal(7, 0, 1), ret(ERRNO), ret(ALLOW)];
        assert_eq!(judge(&filter, &call(62, &[])), Verdict::Fails);
    }

    #[test]
    fn arithmetic_scratch_and_computed_answers() {
        // A = number; M[3] = A; X = 2; A = M[3] << X; A = A - 100; A & 0xff == 0 ?
        let filter = [
            load(0),
            insn(0x02, 0, 0, 3),
            insn(0x01, 0, 0, 2),
            insn(0x00, 0, 0, 0),
            insn(0x60, 0, 0, 3),
            insn(0x6c, 0, 0, 0),
            insn(0x14, 0, 0, 100),
            insn(0x45, 1, 0, 0xff),
            ret(ALLOW),
            insn(0x00, 0, 0, KILL),
            insn(0x16, 0, 0, 0),
        ];
        assert_eq!(judge(&filter, &call(25, &[])), Verdict::Allowed);
        assert_eq!(judge(&filter, &call(26, &[])), Verdict::Kills);
    }

    #[test]
    fn what_cannot_be_followed_is_not_allowed() {
        assert_eq!(judge(&[], &call(0, &[])), Verdict::Unknown);
        assert_eq!(judge(&[load(0)], &call(0, &[])), Verdict::Unknown);
        assert_eq!(judge(&[insn(0xffff, 0, 0, 0)], &call(0, &[])), Verdict::Unknown);
        // Each of 20 unknown words doubles the states: all different sums.
        let mut filter = Vec::new();
        for bit in 0..20 {
            filter.extend([load(8), insn(0x25, 0, 3, 7), insn(0x60, 0, 0, 1)]);
            filter.extend([insn(0x04, 0, 0, 1 << bit), insn(0x02, 0, 0, 1)]);
        }
        filter.insert(0, insn(0x02, 0, 0, 1));
        filter.insert(0, insn(0x00, 0, 0, 0));
        filter.push(ret(ALLOW));
        assert_eq!(judge(&filter, &call(0, &[])), Verdict::Unknown);
    }

    #[test]
    fn the_worst_comes_first() {
        assert!(Verdict::Kills < Verdict::Unknown && Verdict::Fails < Verdict::Allowed);
        assert_eq!(verdict(Some(0)), Verdict::Kills);
        assert_eq!(verdict(Some(0x0003_0000)), Verdict::Kills);
        assert_eq!(verdict(Some(0x7ffc_0000)), Verdict::Allowed);
    }
}
