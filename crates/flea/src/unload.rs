//! Taking shared objects out of the target again, once nobody can be in them or hold an
//! address of theirs.
//!
//! Protected: whoever has a pointer to the object's code or variables: a thread inside it or
//! on its way back, a callback that it registered, a string of it that somebody keeps. By:
//! 1. no function leads to it, and no retired skeleton does;
//! 2. memory is searched while the target runs. Most objects that are still needed are found
//!    to be so here, at no cost to the target;
//! 3. the kernel is asked for signal handlers, which it keeps where nobody can search;
//! 4. all threads are stopped for one instant, and registers and memory are searched again.
//!    Without that a pointer could move from what is yet to be searched to what was. A process
//!    whose memory would take too long to search keeps the object.
//!
//! What shows up by accident keeps the object as well, until the next time. An object that has
//! imported one of [`HIDES_ADDRESSES`] is never searched for: it stays.

use std::{collections::HashMap, ops::Range, sync::Arc};

use flea_process::{FrozenThread, Mapping, Memory, Pid, Whereabouts};
use flea_symbols::addr::RemoteAddr;

use crate::{
    error::RemoteError,
    modules::{self, Module},
    pages::Pages,
    registry::{LoadedObject, MAPS_PATH, Registry},
    remote::Ground,
};

/// Functions that put an address away where it cannot be found: encrypted by the C library, or
/// in the kernel.
pub(crate) const HIDES_ADDRESSES: [&str; 16] = [
    "__cxa_at_quick_exit",
    "__cxa_atexit",
    "__cxa_thread_atexit",
    "__cxa_thread_atexit_impl",
    "aio_read",
    "aio_write",
    "at_quick_exit",
    "atexit",
    "epoll_ctl",
    "mq_notify",
    "on_exit",
    "pthread_sigqueue",
    "sigaltstack",
    "sigqueue",
    "syscall",
    "timer_create",
];
/// Memory that is searched while the target stands still, at most: some 30 ms.
const MAX_FROZEN_BYTES: u64 = 64 << 20;
/// As [`MAX_FROZEN_BYTES`], while it runs.
const MAX_SEARCH_BYTES: u64 = 8 << 30;
const CHUNK_BYTES: u64 = 1 << 20;
/// How far below a thread's stack pointer what is left of earlier calls is known to be dead.
const DEAD_STACK_BYTES: u64 = 256 << 10;
/// A leaf function may use this much below its stack pointer (psABI).
const RED_ZONE_BYTES: u64 = 128;
/// A mapping that stands on a no man's land of at most this size is a stack.
const MAX_GUARD_BYTES: u64 = 64 << 10;
/// `struct kernel_sigaction` begins with the handler and ends within this many bytes.
const SIGACTION_BYTES: usize = 32;
const SIGSET_BYTES: u64 = 8;

/// Takes out what can be. The caller stores the registry.
pub(crate) fn run(ground: &mut Ground<'_>) -> Result<(), RemoteError> {
    let mut candidates = idle(&ground.registry);
    if candidates.is_empty() {
        return Ok(());
    }
    let mut stacks = Stacks::of(ground.tracer.pid())?;
    search_running(ground, &mut stacks, &mut candidates)?;
    drop_handlers(ground, &mut candidates)?;
    if candidates.is_empty() {
        return Ok(());
    }
    let left = ground.tracer.frozen(|tracer, threads| {
        let mut left = candidates.clone();
        search_frozen(tracer.memory(), &mut stacks, threads, &mut left).map(|()| left)
    })?;
    for object in left.transpose()?.unwrap_or_default() {
        ground.unmap_object(&object)?;
    }
    Ok(())
}

/// Whether there is an object that only waits for somebody to leave it.
pub(crate) fn is_waiting(registry: &Registry) -> bool {
    !idle(registry).is_empty()
}

/// Step 1.
fn idle(registry: &Registry) -> Vec<LoadedObject> {
    let leads_to = |base: RemoteAddr| {
        let mut attached = registry.functions.iter().flat_map(|f| &f.replacements);
        let mut retired = registry.retired.iter().flat_map(|r| &r.arenas);
        attached.any(|r| r.object == base) || retired.any(|arena| *arena == base)
    };
    let objects = registry.objects.iter();
    objects.filter(|object| !object.pinned && !leads_to(object.base)).cloned().collect()
}

fn range(object: &LoadedObject) -> Range<u64> {
    object.base.0..object.base.0.saturating_add(object.size_bytes)
}

/// Whether `word` points into the object, or right behind it, as the end of a table does.
fn points_into(object: &LoadedObject, word: u64) -> bool {
    let range = range(object);
    range.start <= word && word <= range.end
}

/// Step 2.
fn search_running(
    ground: &Ground<'_>,
    stacks: &mut Stacks,
    candidates: &mut Vec<LoadedObject>,
) -> Result<(), RemoteError> {
    let pid = ground.tracer.pid();
    let maps = flea_process::maps(pid)?;
    let places = ground.tracer.threads().into_iter().map(|tid| flea_process::whereabouts(pid, tid));
    // Where a running thread is is not known: all of its stack counts.
    let sleeping = places.filter_map(|place| match place {
        Whereabouts::Syscall { sp, pc, .. } | Whereabouts::Elsewhere { sp, pc } => Some((sp, pc)),
        Whereabouts::Running | Whereabouts::Gone => None,
    });
    let dead: Vec<_> = sleeping.filter_map(|(sp, pc)| stacks.dead(&maps, sp, pc)).collect();
    let left_bytes = MAX_SEARCH_BYTES;
    let mut search = Search { memory: ground.memory(), pages: Pages::open(pid), left_bytes };
    search.memory_of(&maps, &dead, candidates);
    Ok(())
}

/// Step 3. The words are read into the registry's own page, behind its header: it is the one
/// place of ours that the target's kernel may write to.
fn drop_handlers(
    ground: &mut Ground<'_>,
    candidates: &mut Vec<LoadedObject>,
) -> Result<(), RemoteError> {
    let caught = flea_process::status(ground.tracer.pid())?.caught;
    let scratch = ground.storage.scratch();
    for signal in (1..=64).filter(|signal| caught.contains(*signal)) {
        if candidates.is_empty() {
            return Ok(());
        }
        let number = u64::from(signal.cast_unsigned());
        let args = [number, 0, scratch.0, SIGSET_BYTES, 0, 0];
        ground.tracer.with_own_thread(|thread| thread.syscall(libc::SYS_rt_sigaction, args))?;
        let action = ground.memory().read_vec(scratch, SIGACTION_BYTES)?;
        for word in words(&action) {
            candidates.retain(|object| !points_into(object, word));
        }
    }
    Ok(())
}

/// Step 4.
fn search_frozen(
    memory: &Memory,
    stacks: &mut Stacks,
    threads: &[FrozenThread],
    candidates: &mut Vec<LoadedObject>,
) -> Result<(), RemoteError> {
    for word in threads.iter().flat_map(|thread| &thread.words) {
        candidates.retain(|object| !points_into(object, *word));
    }
    let maps = flea_process::maps(stacks.pid)?;
    let dead: Vec<_> = threads.iter().filter_map(|t| stacks.dead(&maps, t.sp, t.pc)).collect();
    let left_bytes = MAX_FROZEN_BYTES;
    let mut search = Search { memory, pages: Pages::open(stacks.pid), left_bytes };
    search.memory_of(&maps, &dead, candidates);
    Ok(())
}

/// What of the threads' stacks is left of calls that are over.
struct Stacks {
    pid: Pid,
    modules: Vec<Arc<Module>>,
    /// Whether the function that has this address makes calls.
    makes_calls: HashMap<RemoteAddr, bool>,
}

impl Stacks {
    fn of(pid: Pid) -> Result<Self, RemoteError> {
        Ok(Self { pid, modules: modules::list(pid)?, makes_calls: HashMap::new() })
    }

    /// The dead part of the stack of a thread that stands at `pc` with `sp`. Below `sp` a
    /// function that makes no calls may keep what it likes, one that does has nothing there.
    fn dead(&mut self, maps: &[Mapping], sp: RemoteAddr, pc: RemoteAddr) -> Option<Range<u64>> {
        let modules = &self.modules;
        let makes_calls = *self.makes_calls.entry(pc).or_insert_with(|| {
            let found = modules.iter().find_map(|module| {
                let stated = module.stated(pc).ok()??;
                module.with_symbols(|s| s.makes_calls(stated)).ok()
            });
            found.unwrap_or(false)
        });
        dead_stack(maps, sp, if makes_calls { 0 } else { RED_ZONE_BYTES })
    }
}

/// What lies below the stack pointer `sp` and its red zone. None where it is not sure that the
/// mapping is a stack: a coroutine's may be in the middle of a heap.
fn dead_stack(maps: &[Mapping], sp: RemoteAddr, red_zone_bytes: u64) -> Option<Range<u64>> {
    let i = maps.iter().position(|mapping| mapping.contains(sp))?;
    let below = i.checked_sub(1).and_then(|i| maps.get(i));
    let stands_on_guard = below.is_some_and(|guard| {
        let perms = guard.perms;
        guard.end == maps[i].start
            && !(perms.read || perms.write || perms.execute)
            && guard.size_bytes() <= MAX_GUARD_BYTES
    });
    if maps[i].path != "[stack]" && !stands_on_guard {
        return None;
    }
    let end = sp.0.saturating_sub(red_zone_bytes);
    let start = end.saturating_sub(DEAD_STACK_BYTES).max(maps[i].start.0);
    (start < end).then_some(start..end)
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word))
}

/// A search of all memory that could hold a pointer.
struct Search<'a> {
    memory: &'a Memory,
    pages: Pages,
    left_bytes: u64,
}

impl Search<'_> {
    /// Drops those of `candidates` that a word outside of them points into; all of them where
    /// there is more memory than may be searched.
    fn memory_of(
        &mut self,
        maps: &[Mapping],
        dead: &[Range<u64>],
        candidates: &mut Vec<LoadedObject>,
    ) {
        let mut buffer = vec![0; usize::try_from(CHUNK_BYTES).unwrap_or(1 << 20)];
        let lowest = candidates.iter().map(|object| range(object).start).min().unwrap_or(0);
        let highest = candidates.iter().map(|object| range(object).end).max().unwrap_or(0);
        for mapping in maps.iter().filter(|mapping| may_hold_pointers(mapping)) {
            let mut at = mapping.start.0;
            while at < mapping.end.0 && !candidates.is_empty() {
                let chunk = at..(at + CHUNK_BYTES).min(mapping.end.0);
                for run in self.pages.existing(mapping, chunk.clone()) {
                    let n_bytes = run.end - run.start;
                    match self.left_bytes.checked_sub(n_bytes) {
                        Some(left) => self.left_bytes = left,
                        None => return candidates.clear(),
                    }
                    let want = usize::try_from(n_bytes).unwrap_or(buffer.len());
                    let got = self.memory.read_prefix(RemoteAddr(run.start), &mut buffer[..want]);
                    for (place, word) in (run.start..).step_by(8).zip(words(&buffer[..got])) {
                        if !(lowest..=highest).contains(&word) {
                            continue;
                        }
                        candidates.retain(|object| {
                            !points_into(object, word)
                                || range(object).contains(&place)
                                || dead.iter().any(|dead| dead.contains(&place))
                        });
                    }
                }
                at = chunk.end;
            }
        }
    }
}

/// The registry names addresses as text. Devices are not memory.
fn may_hold_pointers(mapping: &Mapping) -> bool {
    let device = mapping.path.starts_with("/dev/")
        && !["/dev/shm/", "/dev/zero"].iter().any(|path| mapping.path.starts_with(path));
    mapping.perms.write && mapping.perms.read && !mapping.path.starts_with(MAPS_PATH) && !device
}

#[cfg(test)]
mod tests {
    use flea_process::parse_maps;

    use super::*;

    fn object(base: u64, size_bytes: u64) -> LoadedObject {
        LoadedObject { base: RemoteAddr(base), size_bytes, pinned: false }
    }

    #[test]
    fn dead_is_only_what_is_below_in_a_stack() {
        let maps = parse_maps(
            "\
01000000-01400000 rw-p 00000000 00:00 0 [heap]
7f0000000000-7f0000001000 ---p 00000000 00:00 0 
7f0000001000-7f0000801000 rw-p 00000000 00:00 0 
7f0000900000-7f0004900000 ---p 00000000 00:00 0 
7f0004900000-7f0004a00000 rw-p 00000000 00:00 0 
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
",
        );
        let dead = |sp| dead_stack(&maps, RemoteAddr(sp), 128);
        assert_eq!(dead(0x0120_0000), None, "a coroutine in the heap");
        let end = 0x7f00_0080_0000 - 128;
        assert_eq!(dead(0x7f00_0080_0000), Some(end - DEAD_STACK_BYTES..end));
        assert_eq!(dead(0x7f00_0000_1100), Some(0x7f00_0000_1000..0x7f00_0000_1080));
        assert_eq!(dead(0x7f00_0000_1010), None, "all of it is in the red zone");
        assert_eq!(dead(0x7f00_0498_0000), None, "the reserve of a heap is no guard");
        assert_eq!(dead(0x7ffc_0001_0080), Some(0x7ffc_0000_0000..0x7ffc_0001_0000));
        assert_eq!(dead(1), None);
    }

    /// A page of our own plays all of the target's memory.
    #[test]
    fn a_word_keeps_what_it_points_into() {
        let pid = std::process::id().cast_signed();
        let memory = Memory::open(pid).unwrap();
        let mut bytes = vec![0u8; 3 * 4096];
        let into = bytes.as_ptr().addr().next_multiple_of(4096) - bytes.as_ptr().addr();
        let start = (bytes.as_ptr().addr() + into) as u64;
        let line = format!("{start:x}-{:x} rw-p 00000000 00:00 0 \n", start + 4096);
        let maps = parse_maps(&line);
        // Found or not, where the word at `at` of the page is `word` and all others are 0.
        let mut is_kept = |at: usize, word: u64, base: u64, dead: &[Range<u64>], left_bytes| {
            bytes[into..into + 4096].fill(0);
            bytes[into + at..into + at + 8].copy_from_slice(&word.to_le_bytes());
            let mut candidates = vec![object(base, 0x1000)];
            let mut search = Search { memory: &memory, pages: Pages::open(pid), left_bytes };
            search.memory_of(&maps, dead, &mut candidates);
            candidates.is_empty()
        };
        let far = 0x7000_0000_0000;
        for (word, kept) in
            [(far - 1, false), (far, true), (far + 0xfff, true), (far + 0x1000, true), (0, false)]
        {
            assert_eq!(is_kept(808, word, far, &[], MAX_SEARCH_BYTES), kept, "{word:#x}");
        }
        let dead = start + 800..start + 816;
        assert!(!is_kept(808, far, far, std::slice::from_ref(&dead), MAX_SEARCH_BYTES));
        assert!(is_kept(816, far, far, &[dead], MAX_SEARCH_BYTES));
        assert!(!is_kept(808, start, start, &[], MAX_SEARCH_BYTES), "its own memory");
        assert!(is_kept(808, 0, far, &[], 4095), "more than may be searched");
    }

    #[test]
    fn what_waits_is_what_nobody_leads_to() {
        use crate::registry::{Placed, Retired};
        let code = Placed { at: RemoteAddr(16), len: 16 };
        let retired = |base| Retired::plain(code, vec![RemoteAddr(base)]);
        let pinned = LoadedObject { pinned: true, ..object(0x3000, 0x1000) };
        let registry = Registry {
            objects: vec![object(0x1000, 0x1000), object(0x2000, 0x1000), pinned],
            retired: vec![retired(0x2000)],
            ..Registry::default()
        };
        assert_eq!(idle(&registry), [object(0x1000, 0x1000)]);
        assert!(is_waiting(&registry));
    }
}
