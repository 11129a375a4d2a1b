//! Giving back code that nobody enters any more, once nobody can be in it.
//!
//! Protected: a thread that is about to execute retired code, wherever it is now. By: a word
//! that would lead it there is looked for in every place that it could be.
//! 1. Registers and stacks of all threads. A thread executes our code, or what that calls
//!    (runtime and vDSO), or a signal interrupted it there: then any word on its stack that
//!    points into the code counts, for it may be a return address. In other threads only the
//!    addresses that originals return to count; what else looks like code of ours is left of
//!    calls that are over, in the holes of the frames of later ones.
//! 2. Code that calls the original has its return address on the stack for as long as the
//!    traced function takes, and the stack may be a coroutine's, switched away and anywhere in
//!    memory. So all writable memory is read for that one word, which the code overwrites
//!    when it was used, and for signal frames inside the code, whose handler may have switched
//!    stacks. Nobody enters the code any more, so a word that is not there can only come from
//!    one that is. Then 1 once more: a coroutine may have been switched away at first, and may have
//!    come back and used its return address before that was looked for.
//! 3. Bodies that the code calls, and the memory that they work on, are needed for as long as a
//!    thread runs in the code. Of those that are inside the original, nothing but the exit bodies
//!    that have not been switched off ([`crate::registry::Switch`]): programs that were taken
//!    off go at once, also where a thread sleeps in the traced function for hours.
//! 4. What shows up in 1 or 2, by accident or truly, stays retired until the next time. (By
//!    accident: a call that an exception has left, on the dead stack of an ended thread.)

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

use flea_process::{Holder, Mapping};
use flea_symbols::addr::RemoteAddr;

use crate::{
    error::RemoteError,
    host::Host,
    registry::{MAPS_PATH, Retired},
};

/// Writable memory that is read for words, at most. A larger target keeps what it has of
/// retired exit code.
const MAX_SCAN_BYTES: u64 = 8 << 30;
const CHUNK_BYTES: usize = 1 << 20;
/// The kernel is asked for so much at a time which pages there are.
const PART_BYTES: usize = 64 << 20;

/// Frees what can be freed. The caller stores the registry.
pub(crate) fn run<H: Host>(ground: &mut H) -> Result<(), RemoteError> {
    if ground.registry().retired.is_empty() {
        return Ok(());
    }
    // A copy: where this fails, all of it stays retired.
    let mut retired = ground.registry().retired.clone();
    retired.sort_unstable_by_key(|r| r.code.at);
    let ranges: Vec<_> = retired.iter().map(code_range).collect();
    let n = ranges.len();
    let mut uses = Uses { ranges: &ranges, in_use: vec![false; n], executed: vec![false; n] };
    search_threads(ground, &mut uses, &retired)?;
    if uses.may_free_exit_code(&retired) {
        scan_memory(ground, &mut uses, &retired)?;
    }
    if uses.may_free_exit_code(&retired) {
        search_threads(ground, &mut uses, &retired)?;
    }
    let Uses { mut in_use, executed, .. } = uses;
    for (one, _) in retired.iter_mut().zip(executed).filter(|(_, executed)| !executed) {
        one.is_only_returned_to();
    }
    keep_called(&retired, &mut in_use);
    let registry = ground.registry_mut();
    registry.retired.clear();
    for (one, used) in retired.into_iter().zip(in_use) {
        if used {
            registry.retired.push(one);
        } else {
            registry.unplace(one.code);
        }
    }
    Ok(())
}

fn code_range(retired: &Retired) -> Range<RemoteAddr> {
    let end = RemoteAddr(retired.code.at.0.saturating_add(retired.code.len.into()));
    retired.code.at..end
}

/// What was found out about each stretch of retired code.
struct Uses<'a> {
    /// Where they are.
    ranges: &'a [Range<RemoteAddr>],
    /// It must stay.
    in_use: Vec<bool>,
    /// A thread runs in it, or will go on inside, elsewhere than where originals return to.
    executed: Vec<bool>,
}

impl Uses<'_> {
    /// Whether some code that calls the original has not been found to be in use.
    fn may_free_exit_code(&self, retired: &[Retired]) -> bool {
        retired.iter().zip(&self.in_use).any(|(r, used)| r.calls_original && !used)
    }

    /// Somebody runs at `value`, or returns to it.
    fn executes(&mut self, value: RemoteAddr) {
        mark(self.ranges, &mut self.in_use, value);
        mark(self.ranges, &mut self.executed, value);
    }
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

/// Step 1.
fn search_threads<H: Host>(
    ground: &mut H,
    uses: &mut Uses<'_>,
    retired: &[Retired],
) -> Result<(), RemoteError> {
    let maps = ground.maps()?;
    let vdso = maps.iter().filter(|m| m.path == "[vdso]").map(|m| m.start..m.end);
    let arenas = ground.registry().code.iter();
    let arenas = arenas.map(|a| a.base..RemoteAddr(a.base.0.saturating_add(a.size_bytes)));
    let words = ground.words_on_stacks(&vdso.chain(arenas).collect::<Vec<_>>())?;
    let executes = words.iter().filter(|word| !matches!(word.holder, Holder::Stack(_)));
    let inside: HashSet<_> = executes.map(|word| word.tid).collect();
    let returns: HashSet<RemoteAddr> = retired.iter().filter_map(|r| r.returns_to).collect();
    for word in words {
        if returns.contains(&word.value) {
            mark(uses.ranges, &mut uses.in_use, word.value);
        } else if inside.contains(&word.tid) {
            uses.executes(word.value);
        }
    }
    Ok(())
}

/// Step 3.
fn keep_called(retired: &[Retired], in_use: &mut [bool]) {
    let used = retired.iter().zip(&*in_use).filter(|(_, used)| **used);
    let called: HashSet<RemoteAddr> = used.flat_map(|(r, _)| r.calls.iter().copied()).collect();
    for (one, used) in retired.iter().zip(in_use) {
        *used |= called.contains(&one.code.at);
    }
}

/// Step 2: marks everything that the original returns to, or that a signal interrupted.
fn scan_memory<H: Host>(
    ground: &H,
    uses: &mut Uses<'_>,
    retired: &[Retired],
) -> Result<(), RemoteError> {
    let ranges = uses.ranges;
    let returns: HashMap<u64, usize> =
        retired.iter().enumerate().filter_map(|(i, r)| Some((r.returns_to?.0, i))).collect();
    let lowest = ranges.iter().map(|r| r.start).min().unwrap_or_default().0;
    let highest = ranges.iter().map(|r| r.end).max().unwrap_or_default().0;
    let maps = ground.maps()?;
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut n_scanned = 0u64;
    for mapping in maps.iter().filter(|m| may_hold_stacks(m)) {
        // A signal frame has rip, eflags and the segments in a row.
        let mut before = [0; 2];
        let mut see = |word: u64| {
            if (lowest..=highest).contains(&word)
                && let Some(&i) = returns.get(&word)
            {
                uses.in_use[i] = true;
            }
            let [rip, eflags] = before;
            if word == flea_process::SIGNAL_FRAME_SEGMENTS && (lowest..=highest).contains(&rip) {
                uses.executes(RemoteAddr(rip));
            }
            before = [eflags, word];
        };
        for part in parts(mapping) {
            for written in ground.written(mapping, part) {
                n_scanned += written.end - written.start;
                if n_scanned > MAX_SCAN_BYTES {
                    for (used, r) in uses.in_use.iter_mut().zip(retired) {
                        *used |= r.calls_original;
                    }
                    return Ok(());
                }
                for_each_word(ground, written, &mut buffer, &mut see)?;
            }
        }
    }
    Ok(())
}

/// A mapping in parts of which it is asked at a time what was written.
fn parts(mapping: &Mapping) -> impl Iterator<Item = Range<u64>> + use<> {
    let Range { start, end } = mapping.start.0..mapping.end.0;
    let starts = (start..end).step_by(PART_BYTES);
    starts.map(move |at| at..at.saturating_add(PART_BYTES as u64).min(end))
}

/// Calls `see` with each word of `range` that can be read.
fn for_each_word<H: Host>(
    ground: &H,
    range: Range<u64>,
    buffer: &mut [u8],
    see: &mut impl FnMut(u64),
) -> Result<(), RemoteError> {
    let mut at = range.start;
    while at < range.end {
        let want = usize::try_from(range.end - at).unwrap_or(buffer.len()).min(buffer.len());
        let got = ground.read_to_hole(RemoteAddr(at), &mut buffer[..want])?;
        for chunk in buffer[..got].chunks_exact(8) {
            see(u64::from_le_bytes(chunk.try_into().expect("chunks of 8")));
        }
        // A page that cannot be read (a guard, a hole in a file) holds no stack.
        at += (got as u64).next_multiple_of(4096).max(4096);
    }
    Ok(())
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
    use crate::registry::Placed;

    #[test]
    fn bodies_stay_with_the_skeleton_that_calls_them() {
        let retired = |at, calls: &[u64]| Retired {
            calls: calls.iter().copied().map(RemoteAddr).collect(),
            ..Retired::plain(Placed { at: RemoteAddr(at), len: 16 }, Vec::new())
        };
        let retired = [retired(16, &[]), retired(32, &[16]), retired(48, &[]), retired(64, &[48])];
        let mut in_use = [false, true, false, false];
        keep_called(&retired, &mut in_use);
        assert_eq!(in_use, [true, true, false, false]);
    }

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
