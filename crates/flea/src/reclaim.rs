//! Giving back code that nobody enters any more, once nobody can be in it.
//!
//! Protected: a thread that is about to execute retired code, wherever it is now. By: a word
//! that would lead it there is looked for in every place that it could be.
//! 1. Registers and stacks of all threads. An entry body runs to its end without letting go of
//!    its thread, but a signal handler may lie above it, with the interrupted address in its
//!    frame: any word on the stack that points into the code counts.
//! 2. Code that calls the original has its return address on the stack for as long as the
//!    traced function takes, and the stack may be a coroutine's, switched away and anywhere in
//!    memory. So all writable memory is read for such words. Nobody enters the code any more,
//!    so a word that is not there can only come from one that is.
//! 3. What lies below a thread's stack pointer on its own stack is left over from calls that
//!    have returned, most likely ours: it does not count. See [`dead_stacks`].
//! 4. What shows up in 1 or 2, by accident or truly, stays retired until the next time.

use std::{collections::HashMap, ops::Range};

use flea_process::{Mapping, Memory, Whereabouts};
use flea_symbols::addr::RemoteAddr;

use crate::{
    error::RemoteError,
    registry::{MAPS_PATH, Retired},
    remote::Ground,
};

/// Writable memory that is read for words, at most. A larger target keeps what it has of
/// retired exit code.
const MAX_SCAN_BYTES: u64 = 8 << 30;
const CHUNK_BYTES: usize = 1 << 20;
const PAGE_BYTES: u64 = 4096;
/// What counts below a stack pointer all the same: a return address that was popped and is
/// still to be jumped through (`pop`, `jmp [rsp-8]`). A leaf's red zone holds no others.
const POPPED_BYTES: u64 = 16;
/// Within how many bytes of a stack's upper end glibc puts `struct pthread`.
const CONTROL_BLOCK_BYTES: u64 = 8192;

/// What a thread is in, by step 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inside {
    /// Code that runs to its end without letting go of its thread.
    Body,
    /// Code that calls the original: it takes as long as that.
    Original,
}

/// Whether some thread is in retired code.
pub(crate) fn who_is_inside(ground: &mut Ground<'_>) -> Result<Option<Inside>, RemoteError> {
    let mut retired = ground.registry.retired.clone();
    retired.sort_unstable_by_key(|r| r.code.at);
    let (_, in_use) = on_stacks(ground, &retired)?;
    let mut inside = None;
    for (one, _) in retired.iter().zip(in_use).filter(|(_, used)| *used) {
        if !one.calls_original {
            return Ok(Some(Inside::Body));
        }
        inside = Some(Inside::Original);
    }
    Ok(inside)
}

/// Step 1: the ranges of `retired`, which is sorted, and which of them some thread may be in.
fn on_stacks(
    ground: &mut Ground<'_>,
    retired: &[Retired],
) -> Result<(Vec<Range<RemoteAddr>>, Vec<bool>), RemoteError> {
    let ranges: Vec<_> = retired.iter().map(code_range).collect();
    let mut in_use = vec![false; ranges.len()];
    if !ranges.is_empty() {
        for word in ground.tracer.words_on_stacks(&ranges)? {
            mark(&ranges, &mut in_use, word.value);
        }
    }
    Ok((ranges, in_use))
}

/// Frees what can be freed. The caller stores the registry.
pub(crate) fn run(ground: &mut Ground<'_>) -> Result<(), RemoteError> {
    if ground.registry.retired.is_empty() {
        return Ok(());
    }
    let mut retired = std::mem::take(&mut ground.registry.retired);
    retired.sort_unstable_by_key(|r| r.code.at);
    let (ranges, mut in_use) = on_stacks(ground, &retired)?;
    if retired.iter().zip(&in_use).any(|(r, used)| r.calls_original && !used) {
        scan_memory(ground, &ranges, &mut in_use, &retired)?;
    }
    for (one, used) in retired.into_iter().zip(in_use) {
        if used {
            ground.registry.retired.push(one);
        } else {
            ground.registry.unplace(one.code);
        }
    }
    Ok(())
}

fn code_range(retired: &Retired) -> Range<RemoteAddr> {
    let end = RemoteAddr(retired.code.at.0.saturating_add(retired.code.len.into()));
    retired.code.at..end
}

/// Marks the ranges that `value` points into. They are sorted and do not overlap.
fn mark(ranges: &[Range<RemoteAddr>], in_use: &mut [bool], value: RemoteAddr) {
    let after = ranges.partition_point(|range| range.start <= value);
    // One past the end counts: a call may be the last instruction. So the value may belong to
    // two ranges, this one and the one that ends where it begins.
    for i in after.saturating_sub(2)..after {
        in_use[i] |= value <= ranges[i].end;
    }
}

/// Step 2: marks everything that calls the original and that some word points into.
fn scan_memory(
    ground: &mut Ground<'_>,
    ranges: &[Range<RemoteAddr>],
    in_use: &mut [bool],
    retired: &[Retired],
) -> Result<(), RemoteError> {
    let lowest = ranges.iter().map(|r| r.start).min().unwrap_or_default().0;
    let highest = ranges.iter().map(|r| r.end).max().unwrap_or_default().0;
    let maps = flea_process::maps(ground.tracer.pid())?;
    let dead = dead_stacks(ground, &maps)?;
    let memory = ground.memory();
    let mut n_scanned = 0u64;
    for mapping in maps.iter().filter(|m| may_hold_stacks(m)) {
        let alive = dead.iter().find(|dead| dead.start == mapping.start).map(|dead| dead.end);
        let start = alive.unwrap_or(mapping.start);
        n_scanned += mapping.end.0 - start.0;
        if n_scanned > MAX_SCAN_BYTES {
            for (used, r) in in_use.iter_mut().zip(retired) {
                *used |= r.calls_original;
            }
            return Ok(());
        }
        for_each_word(memory, start..mapping.end, |_, word| {
            if lowest <= word && word <= highest {
                mark(ranges, in_use, RemoteAddr(word));
            }
        });
    }
    Ok(())
}

/// Visits the words of `range` with their addresses. A page that cannot be read (a guard, a
/// hole in a file) holds no stack.
fn for_each_word(memory: &Memory, range: Range<RemoteAddr>, mut visit: impl FnMut(u64, u64)) {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut at = range.start.0 & !7;
    while at < range.end.0 {
        let left = range.end.0 - at;
        let want = usize::try_from(left).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        let got = memory.read_prefix(RemoteAddr(at), &mut buffer[..want]);
        for (i, chunk) in (0u64..).zip(buffer[..got].chunks_exact(8)) {
            visit(at + 8 * i, u64::from_le_bytes(chunk.try_into().expect("chunks of 8")));
        }
        let next = at + got as u64;
        at = if got == want { next } else { (next & !(PAGE_BYTES - 1)) + PAGE_BYTES };
    }
}

/// The parts of mappings, from their start on, that lie below the stack pointer of the one
/// thread whose stack they are.
///
/// Protected: frames of another stack that shares the mapping. By: a mapping counts only if
/// it is nothing but one stack: the first thread's, as the kernel names it; or one that has a
/// guard below, the thread's control block at its upper end, no other control block, and no
/// other thread on it. Coroutine stacks, wherever they are, have no control block.
///
/// The stack pointers are read after registers and stacks were looked at for words (step 1).
/// Who was not in retired code then never will be; who was is marked already.
fn dead_stacks(
    ground: &mut Ground<'_>,
    maps: &[Mapping],
) -> Result<Vec<Range<RemoteAddr>>, RemoteError> {
    let pid = ground.tracer.pid();
    let mut pointers = HashMap::new();
    ground.tracer.interrupt_running(|tid, registers| {
        pointers.insert(tid, registers.sp());
        None
    })?;
    for tid in ground.tracer.threads() {
        match flea_process::whereabouts(pid, tid) {
            Whereabouts::Syscall { sp, .. } | Whereabouts::Elsewhere { sp, .. } => {
                pointers.entry(tid).or_insert(sp);
            }
            Whereabouts::Gone => {}
            // It woke up just now: where it was asleep is not known.
            Whereabouts::Running if pointers.contains_key(&tid) => {}
            Whereabouts::Running => return Ok(Vec::new()),
        }
    }
    let mut dead = Vec::new();
    for (i, mapping) in maps.iter().enumerate() {
        let mut threads = pointers.iter().filter(|(_, sp)| mapping.contains(**sp));
        let (Some((&tid, sp)), None) = (threads.next(), threads.next()) else { continue };
        let end = RemoteAddr(sp.0.saturating_sub(POPPED_BYTES) & !7);
        let guarded = i.checked_sub(1).is_some_and(|below| {
            let below = &maps[below];
            below.end == mapping.start && !below.perms.read && !below.perms.write
        });
        let is_first = tid == pid && mapping.path == "[stack]";
        let memory = ground.memory();
        let is_thread = || {
            let top = RemoteAddr(mapping.end.0.saturating_sub(CONTROL_BLOCK_BYTES).max(sp.0));
            guarded
                && mapping.path.is_empty()
                && control_blocks(memory, top..mapping.end) == 1
                && control_blocks(memory, mapping.start..top) == 0
        };
        if end > mapping.start && (is_first || is_thread()) {
            dead.push(mapping.start..end);
        }
    }
    Ok(dead)
}

/// How many thread control blocks of glibc's lie in `range`: `tcbhead_t` holds its own address
/// in its first and in its third word (sysdeps/x86_64/nptl/tls.h).
fn control_blocks(memory: &Memory, range: Range<RemoteAddr>) -> usize {
    let mut n_found = 0;
    let mut before = [0, 0];
    for_each_word(memory, range, |at, word| {
        n_found += usize::from(at >= 16 && word == at - 16 && before[0] == word);
        before = [before[1], word];
    });
    n_found
}

/// Our own memory holds no stack of anybody's, and the registry names addresses as text.
fn may_hold_stacks(mapping: &Mapping) -> bool {
    mapping.perms.write
        && mapping.perms.read
        && !mapping.path.starts_with(MAPS_PATH)
        && !mapping.path.starts_with("/dev/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_marks_what_it_points_into_and_what_ends_there() {
        let ranges = [(16, 32), (32, 40), (48, 64)].map(|(a, b)| RemoteAddr(a)..RemoteAddr(b));
        let marked = |value| {
            let mut in_use = [false; 3];
            mark(&ranges, &mut in_use, RemoteAddr(value));
            in_use
        };
        assert_eq!(marked(15), [false; 3]);
        assert_eq!(marked(16), [true, false, false]);
        assert_eq!(marked(32), [true, true, false]);
        assert_eq!(marked(40), [false, true, false]);
        assert_eq!(marked(41), [false; 3]);
        assert_eq!(marked(64), [false, false, true]);
        assert_eq!(marked(u64::MAX), [false; 3]);
    }
}
