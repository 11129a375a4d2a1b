//! Nothing clobbered: what a function has to keep is kept, and everything else is after a traced
//! call what it was after the same call untraced. Start at [`check`].

use crate::emit::{N_LIVE, N_LIVE_DOUBLES, Places, live_word};
use crate::generate::{Form, Function};
use crate::target::{Round, State, word};

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];
const RSP: usize = 4;
/// rbx, rsp, rbp, r12 to r15.
const CALLEE_SAVED: [usize; 7] = [3, 4, 5, 12, 13, 14, 15];
/// The direction flag.
const DF: u64 = 0x400;
/// Addresses this far below a call's stack pointer may be those of the function's own frame,
/// which is further down where an exit program's frame is above it.
const BELOW_BYTES: u64 = 1 << 16;
/// And this far above, those of its stack arguments, of which it gets a copy then.
const ABOVE_BYTES: u64 = 1 << 11;

/// The same calls untraced, over two stacks with nothing in common: what differs between them
/// is padding, in which nobody can rely on anything.
pub struct Untraced {
    pub zeros: Round,
    pub ones: Round,
}

/// All that is wrong with the registers of function `f`'s call.
pub fn check(
    f: usize,
    function: &Function,
    places: &Places,
    untraced: &Untraced,
    traced: &Round,
    say: &mut dyn FnMut(String),
) {
    let calls = traced.word(places.calls);
    if calls != 1 {
        say(format!("it ran {calls} times for one call"));
    }
    match function.form {
        Form::Local => live(places, N_LIVE + N_LIVE_DOUBLES, traced, say),
        Form::Nested => live(places, N_LIVE, traced, say),
        _ => {}
    }
    match (&untraced.zeros.states[f], &untraced.ones.states[f], &traced.states[f]) {
        (Some(zeros), Some(ones), Some(traced)) => {
            promises(traced, say);
            same([zeros, ones], traced, say);
        }
        (None, None, None) if !function.form.has_thunk() => {}
        _ => say("its thunk was not passed".to_owned()),
    }
}

/// What the caller of a local function, or the frame around a nested one, still has.
fn live(places: &Places, n: usize, traced: &Round, say: &mut dyn FnMut(String)) {
    for i in 0..n {
        let (expected, found) = (live_word(i), traced.word(places.live + 8 * i));
        if found != expected {
            say(format!("live value {i}: expected {expected:#x}, found {found:#x}"));
        }
    }
}

/// What the ABI promises callers.
fn promises(state: &State, say: &mut dyn FnMut(String)) {
    for i in CALLEE_SAVED {
        let (expected, found) = (state.before[i], state.after[i]);
        if found != expected {
            say(format!("{} not kept: expected {expected:#x}, found {found:#x}", NAMES[i]));
        }
    }
    if state.flags & DF != 0 {
        say("the direction flag is set".to_owned());
    }
    let control = |bytes: &[u8]| (bytes[..2].to_vec(), word(bytes, 24) & 0xffff_ffc0);
    let (expected, found) = (control(&state.x_before), control(&state.x_after));
    if found != expected {
        say(format!("x87 control word and MXCSR: expected {expected:x?}, found {found:x?}"));
    }
}

/// A local function's caller may rely on more than the ABI says, so all of it is compared.
fn same([zeros, ones]: [&State; 2], traced: &State, say: &mut dyn FnMut(String)) {
    let rsp = traced.before[RSP];
    let own = rsp.saturating_sub(BELOW_BYTES)..rsp.saturating_add(ABOVE_BYTES);
    let mut compare = |what: &str, zeros: u64, ones: u64, traced: u64| {
        let padding = bytes_of(zeros ^ ones);
        let is_same = (zeros ^ traced) & !padding == 0;
        let are_own = own.contains(&zeros) && own.contains(&traced);
        if !(is_same || are_own) {
            say(format!(
                "{what} after the call: untraced {zeros:#x}, traced {traced:#x} (padding: \
                 {padding:#x})"
            ));
        }
    };
    for (i, name) in NAMES.iter().enumerate() {
        compare(name, zeros.after[i], ones.after[i], traced.after[i]);
    }
    let areas = [zeros, ones, traced].map(|state| comparable(&state.x_after));
    for at in (0..areas[0].len()).step_by(8) {
        let [zeros, ones, traced] = [0, 1, 2].map(|i| word(&areas[i], at));
        compare(&part(at), zeros, ones, traced);
    }
}

/// All bits of each byte that has any.
fn bytes_of(word: u64) -> u64 {
    u64::from_le_bytes(word.to_le_bytes().map(|byte| if byte == 0 { 0 } else { 0xff }))
}

/// Without what no program can rely on: which x87 instruction was the last, condition codes,
/// contents of empty x87 registers, and which parts the processor knows to be in their initial
/// state.
fn comparable(area: &[u8]) -> Vec<u8> {
    let mut area = area.to_vec();
    area[2] &= 0x3f;
    area[3] &= 0x38;
    area[5..24].fill(0);
    area[512..576].fill(0);
    let (top, tags) = (usize::from(area[3] >> 3 & 7), area[4]);
    for st in 0..8 {
        let is_empty = tags >> ((top + st) % 8) & 1 == 0;
        let at = 32 + 16 * st;
        area[at..at + 16][if is_empty { 0..16 } else { 10..16 }].fill(0);
    }
    area
}

fn part(at: usize) -> String {
    match at {
        0..24 => "x87 status".to_owned(),
        24..32 => "MXCSR".to_owned(),
        32..160 => format!("st{}", (at - 32) / 16),
        160..416 => format!("xmm{}", (at - 160) / 16),
        576..832 => format!("upper half of ymm{}", (at - 576) / 16),
        _ => format!("AVX-512 (byte {at} of the xsave area)"),
    }
}
