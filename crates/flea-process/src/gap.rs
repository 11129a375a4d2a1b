//! Finding room for a code arena that every instruction of a module can reach.
//!
//! Pure arithmetic on a list of mappings. Whether the room is still free when it is mapped is
//! for `MAP_FIXED_NOREPLACE` to say: the target's threads map memory at any time.

use flea_symbols::addr::RemoteAddr;

use crate::maps::Mapping;

const PAGE: u64 = 4096;
/// How far a `jmp rel32` reaches, less what an image and its relocated operands may add.
const REACH: u64 = (2 << 30) - (64 << 20);
/// Lower addresses are left to `vm.mmap_min_addr` and to null pointers with an offset.
const LOWEST: u64 = 1 << 20;
/// End of user space with four-level page tables.
const HIGHEST: u64 = 0x7fff_ffff_f000;
/// The heap grows upwards from the executable, by brk(2), until it meets a mapping.
const HEAP_GROWTH: u64 = 1 << 30;
/// The first thread's stack grows downwards, to its limit.
const STACK_GROWTH: u64 = 256 << 20;

/// Why there is no room.
#[derive(Debug, thiserror::Error)]
pub enum GapError {
    /// `near` is not mapped.
    #[error("{near} is in no mapping of the process")]
    NotMapped {
        /// The address given.
        near: RemoteAddr,
    },
    /// Everything in reach is taken.
    #[error(
        "no {size_bytes} free bytes within 2 GiB of the module at {module_start}..{module_end}"
    )]
    Full {
        /// Bytes wanted.
        size_bytes: u64,
        /// The module's first byte.
        module_start: RemoteAddr,
        /// One past its last.
        module_end: RemoteAddr,
    },
}

/// Room of `size_bytes` within reach of every byte of the module that `near` is in. The
/// highest free range below the module is taken; above it where there is none below, behind
/// the room that the heap may want.
pub fn find_gap(
    maps: &[Mapping],
    near: RemoteAddr,
    size_bytes: u64,
) -> Result<RemoteAddr, GapError> {
    let (start, end) = module_extent(maps, near)?;
    let size = size_bytes.max(1).next_multiple_of(PAGE);
    let full = || GapError::Full {
        size_bytes,
        module_start: RemoteAddr(start),
        module_end: RemoteAddr(end),
    };
    let lowest = end.saturating_sub(REACH).max(LOWEST).next_multiple_of(PAGE);
    let highest = start.saturating_add(REACH).min(HIGHEST) / PAGE * PAGE;
    let mut taken: Vec<(u64, u64)> = maps.iter().map(|m| reserved(maps, m)).collect();
    taken.sort_unstable();
    let mut below = None;
    let mut above = None;
    let mut free_from = lowest;
    for (from, to) in taken.into_iter().chain([(highest, u64::MAX)]) {
        let free_to = from.min(highest);
        if free_to > free_from && free_to - free_from >= size {
            if free_to <= start {
                below = Some(free_to - size);
            } else if above.is_none() {
                above = Some(free_from);
            }
        }
        free_from = free_from.max(to.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX));
    }
    below.or(above).map(RemoteAddr).ok_or_else(full)
}

/// First and last mapping of the file that `near` belongs to, with what lies between.
fn module_extent(maps: &[Mapping], near: RemoteAddr) -> Result<(u64, u64), GapError> {
    let home = maps
        .iter()
        .find(|m| m.contains(near))
        .ok_or(GapError::NotMapped { near })?;
    let same = |m: &&Mapping| m.start == home.start || m.same_file(home);
    let start = maps
        .iter()
        .filter(same)
        .map(|m| m.start.0)
        .min()
        .unwrap_or(home.start.0);
    let end = maps
        .iter()
        .filter(same)
        .map(|m| m.end.0)
        .max()
        .unwrap_or(home.end.0);
    // One file mapped at far places (two linker namespaces): only the nearer one counts.
    if end - start < REACH {
        Ok((start, end))
    } else {
        Ok((home.start.0, home.end.0))
    }
}

/// What a mapping occupies, with the room it may grow into: up to its neighbour, no further.
fn reserved(maps: &[Mapping], mapping: &Mapping) -> (u64, u64) {
    let (start, end) = (mapping.start.0, mapping.end.0);
    let upwards = || {
        let next = maps
            .iter()
            .map(|m| m.start.0)
            .filter(|&next| next >= end)
            .min();
        end.saturating_add(HEAP_GROWTH)
            .min(next.unwrap_or(u64::MAX))
    };
    match mapping.path.as_str() {
        "[heap]" => (start, upwards()),
        "[stack]" => {
            let previous = maps
                .iter()
                .map(|m| m.end.0)
                .filter(|&previous| previous <= start)
                .max();
            (
                start
                    .saturating_sub(STACK_GROWTH)
                    .max(previous.unwrap_or(0)),
                end,
            )
        }
        // Before the first brk there is no [heap], and it will start up to 32 MiB (or, for a
        // PIE, right) behind the executable. The executable is the first mapping of all.
        _ if !maps.iter().any(|m| m.path == "[heap]")
            && maps.first().is_some_and(|first| first.same_file(mapping)) =>
        {
            (start, upwards())
        }
        _ => (start, end),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::maps::parse_maps;

    const PIE: &str = "\
555555554000-555555558000 r-xp 00000000 fe:01 77 /bin/prog
555555579000-55555559a000 rw-p 00000000 00:00 0 [heap]
7ffff7c00000-7ffff7e00000 r-xp 00000000 fe:01 88 /lib/libc.so.6
7ffff7fc0000-7ffff7fc2000 r-xp 00000000 00:00 0 [vdso]
7ffffffde000-7ffffffff000 rw-p 00000000 00:00 0 [stack]
";

    #[test]
    fn below_a_pie_and_a_library() {
        let maps = parse_maps(PIE);
        let gap = find_gap(&maps, RemoteAddr(0x5555_5555_5000), 0x10000).expect("room");
        assert_eq!(gap, RemoteAddr(0x5555_5554_4000));
        let gap = find_gap(&maps, RemoteAddr(0x7fff_f7c0_1000), 1).expect("room");
        assert_eq!(gap, RemoteAddr(0x7fff_f7bf_f000));
    }

    #[test]
    fn clear_of_the_heap_of_a_fixed_program() {
        let text = "\
00400000-00500000 r-xp 00000000 fe:01 77 /bin/prog
01000000-01021000 rw-p 00000000 00:00 0 [heap]
";
        let small = find_gap(&parse_maps(text), RemoteAddr(0x40_1000), 0x1000).expect("room");
        assert_eq!(small, RemoteAddr(0x3f_f000));
        let large = find_gap(&parse_maps(text), RemoteAddr(0x40_1000), 16 << 20).expect("room");
        assert_eq!(large, RemoteAddr(0x102_1000 + HEAP_GROWTH));
        assert!(large.0 + (16 << 20) < 0x40_0000 + REACH);
    }

    #[test]
    fn nothing_free() {
        let text = "\
00010000-00400000 r--p 00000000 fe:01 1 /a
00400000-00500000 r-xp 00000000 fe:01 77 /bin/prog
00500000-100000000 rw-p 00000000 00:00 0 
";
        let full = find_gap(&parse_maps(text), RemoteAddr(0x40_1000), 0x1000);
        assert!(matches!(full, Err(GapError::Full { .. })), "{full:?}");
        let nowhere = find_gap(&parse_maps(text), RemoteAddr(1), 0x1000);
        assert!(matches!(nowhere, Err(GapError::NotMapped { .. })));
    }
}
