//! Finds or claims the calling thread's slot. Knows nothing of what programs keep there.
//!
//! Protected: which thread uses which slot. By: the thread table (this process's), where a
//! thread's entry maps its thread pointer to its slot, and `SlotHeader.owner`.
//! 1. Compiled code looks at the home entry only. What it finds must be whole at every
//!    instant, for signal handlers too: an entry's thread pointer is written last.
//! 2. A slot is claimed before the entry. A handler may come between and claim one of its
//!    own; the search before the entry is written finds that, and the slot goes back.
//! 3. A forked child starts with an empty table (MADV_WIPEONFORK) and claims new slots.
//! 4. When all slots are handed out, each call looks at a few of them, in turn:
//!    - the owner's process is gone: take it;
//!    - the owner's thread is gone but the process is this one: another thread may have its
//!      thread pointer by now and use the slot without us knowing. Remove the entry, mark
//!      the slot vacant, and take it after [`GRACE_NS`]: a thread that still uses it is
//!      done by then, finds no entry, and comes here.
//!
//!    An owner in another pid namespace looks gone; its slot is then shared, and the sums of
//!    both may miss counts. Memory stays sound.
//! 5. A slot that is taken over keeps its values, so that sums stay right. The programs'
//!    `active` marks of its dead owner are cleared.

use core::mem::offset_of;
use core::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};

use crate::mem::{Shared, low_half};
use crate::shared::{
    ArenaHeader, ENTRY_CLAIMING, ENTRY_TOMBSTONE, PROGRAM_STATES_OFFSET, ProgramState, SLOT_VACANT,
    SlotHeader, THREAD_TABLE_ENTRIES, THREAD_TABLE_SHIFT,
};
use crate::sys::{self, Tid};

/// How long a slot rests after it was taken from a dead thread of this process.
pub const GRACE_NS: u64 = 1_000_000_000;
/// Slots that one call looks at when all are handed out; each costs a system call.
const SLOTS_PER_SEARCH: u32 = 4;

const ENTRIES: u64 = THREAD_TABLE_ENTRIES as u64;

/// The thread that asks.
#[derive(Clone, Copy, Debug)]
pub struct Asking {
    /// What is at `fs:0`.
    pub thread_pointer: u64,
    /// Its process.
    pub tgid: u32,
    /// Its id.
    pub tid: Tid,
}

/// The slots of an arena.
#[derive(Clone, Copy)]
struct Slots<'a> {
    arena: Shared<'a>,
    first: u64,
    stride: u64,
    n_slots: u32,
    n_programs: u32,
    used: &'a AtomicU32,
    cursor: &'a AtomicU32,
}

/// The address of the slot of the thread with this thread pointer, if it has one.
#[must_use]
pub fn find(table: Shared<'_>, thread_pointer: u64) -> Option<u64> {
    if thread_pointer <= ENTRY_CLAIMING {
        return None;
    }
    for probe in 0..ENTRIES {
        let entry = entry(table, thread_pointer, probe)?;
        match entry.thread_pointer.load(Acquire) {
            0 => return None,
            found if found == thread_pointer => return Some(entry.slot.load(Relaxed)),
            _ => {}
        }
    }
    None
}

/// Claims a slot for a thread that has none, and returns its address. Where there is none
/// left, counts that in `no_slot`.
#[must_use]
pub fn claim(arena: Shared<'_>, table: Shared<'_>, asking: Asking) -> Option<u64> {
    let address = try_claim(arena, table, asking);
    if address.is_none()
        && let Some(no_slot) = arena.word(offset_of!(ArenaHeader, no_slot) as u64)
    {
        no_slot.fetch_add(1, Relaxed);
    }
    address
}

fn try_claim(arena: Shared<'_>, table: Shared<'_>, asking: Asking) -> Option<u64> {
    if asking.thread_pointer <= ENTRY_CLAIMING {
        return None;
    }
    let slots = Slots::new(arena)?;
    let offset = match slots.claim_new(asking) {
        Some(offset) => offset,
        None => slots.take_over(table, asking)?,
    };
    let address = arena.address(offset);
    match enter(table, asking.thread_pointer, address) {
        Entered::Here => Some(address),
        Entered::Before(other) => {
            slots.give_back(offset);
            Some(other)
        }
        Entered::Full => {
            slots.give_back(offset);
            None
        }
    }
}

enum Entered {
    Here,
    /// A signal handler on this thread was faster.
    Before(u64),
    Full,
}

/// Rules 1 and 2.
fn enter(table: Shared<'_>, thread_pointer: u64, slot: u64) -> Entered {
    for probe in 0..ENTRIES {
        let Some(entry) = entry(table, thread_pointer, probe) else { break };
        let found = entry.thread_pointer.load(Acquire);
        if found == thread_pointer {
            return Entered::Before(entry.slot.load(Relaxed));
        }
        let free = found == 0 || found == ENTRY_TOMBSTONE;
        if free
            && entry.thread_pointer.compare_exchange(found, ENTRY_CLAIMING, AcqRel, Relaxed).is_ok()
        {
            entry.slot.store(slot, Relaxed);
            entry.thread_pointer.store(thread_pointer, Release);
            return Entered::Here;
        }
    }
    Entered::Full
}

struct Entry<'a> {
    thread_pointer: &'a AtomicU64,
    slot: &'a AtomicU64,
}

fn entry<'a>(table: Shared<'a>, thread_pointer: u64, probe: u64) -> Option<Entry<'a>> {
    let at = ((thread_pointer >> THREAD_TABLE_SHIFT) + probe) % ENTRIES * 16;
    Some(Entry { thread_pointer: table.word(at)?, slot: table.word(at + 8)? })
}

impl<'a> Slots<'a> {
    fn new(arena: Shared<'a>) -> Option<Self> {
        let word = |at: usize| Some(arena.word(at as u64)?.load(Relaxed));
        let half = |at: usize| arena.half(at as u64);
        Some(Self {
            arena,
            first: word(offset_of!(ArenaHeader, slots_offset))?,
            stride: word(offset_of!(ArenaHeader, slot_stride))?,
            n_slots: half(offset_of!(ArenaHeader, n_slots))?.load(Relaxed),
            n_programs: half(offset_of!(ArenaHeader, n_programs))?.load(Relaxed),
            used: half(offset_of!(ArenaHeader, used_slots))?,
            cursor: half(offset_of!(ArenaHeader, scan_cursor))?,
        })
    }

    fn claim_new(&self, asking: Asking) -> Option<u64> {
        let next = |n: u32| (n < self.n_slots).then_some(n.wrapping_add(1));
        let index = self.used.fetch_update(AcqRel, Acquire, next).ok()?;
        let offset = self.offset(index);
        let slot = SlotWords::new(self.arena, offset)?;
        slot.random.store(seed(asking), Relaxed);
        slot.owner.store(asking.owner(), Release);
        Some(offset)
    }

    /// Rule 4.
    fn take_over(&self, table: Shared<'_>, asking: Asking) -> Option<u64> {
        for _ in 0..SLOTS_PER_SEARCH.min(self.n_slots) {
            let index = self.cursor.fetch_add(1, Relaxed) % self.n_slots;
            let offset = self.offset(index);
            let slot = SlotWords::new(self.arena, offset)?;
            let owner = slot.owner.load(Acquire);
            if self.is_free_to_take(table, asking, offset, &slot, owner)
                && slot.owner.compare_exchange(owner, asking.owner(), AcqRel, Relaxed).is_ok()
            {
                slot.random.store(seed(asking), Relaxed);
                self.clear_active(offset);
                return Some(offset);
            }
        }
        None
    }

    fn is_free_to_take(
        &self,
        table: Shared<'_>,
        asking: Asking,
        offset: u64,
        slot: &SlotWords<'_>,
        owner: u64,
    ) -> bool {
        let (tgid, tid) = (low_half(owner >> 32), Tid(low_half(owner)));
        match owner {
            // Being claimed right now.
            0 => false,
            SLOT_VACANT => {
                let since_ns = slot.vacated_ns.load(Relaxed);
                let now_ns = sys::clock_ns(sys::CLOCK_MONOTONIC);
                since_ns == 0 || now_ns.wrapping_sub(since_ns) >= GRACE_NS
            }
            _ if tgid != asking.tgid => sys::is_process_dead(tgid),
            _ => {
                if sys::is_thread_of_process_dead(tgid, tid) {
                    remove_entry(table, self.arena.address(offset));
                    slot.vacated_ns.store(sys::clock_ns(sys::CLOCK_MONOTONIC), Relaxed);
                    let _ = slot.owner.compare_exchange(owner, SLOT_VACANT, AcqRel, Relaxed);
                }
                false
            }
        }
    }

    /// Rule 2: nobody has used it.
    fn give_back(&self, offset: u64) {
        if let Some(slot) = SlotWords::new(self.arena, offset) {
            slot.vacated_ns.store(0, Relaxed);
            slot.owner.store(SLOT_VACANT, Release);
        }
    }

    /// Rule 5.
    fn clear_active(&self, offset: u64) {
        if let Some(slot) = SlotWords::new(self.arena, offset) {
            slot.locking.store(0, Relaxed);
            slot.held_lock.store(0, Relaxed);
        }
        let stride = size_of::<ProgramState>() as u64;
        for program in 0..u64::from(self.n_programs) {
            let at = offset + PROGRAM_STATES_OFFSET + program * stride;
            let Some(active) = self.arena.word(at + offset_of!(ProgramState, active) as u64) else {
                return;
            };
            active.store(0, Relaxed);
        }
    }

    fn offset(&self, index: u32) -> u64 {
        self.first.wrapping_add(self.stride.wrapping_mul(u64::from(index)))
    }
}

/// The words of a slot's header.
struct SlotWords<'a> {
    owner: &'a AtomicU64,
    random: &'a AtomicU64,
    vacated_ns: &'a AtomicU64,
    locking: &'a AtomicU64,
    held_lock: &'a AtomicU64,
}

impl<'a> SlotWords<'a> {
    fn new(arena: Shared<'a>, offset: u64) -> Option<Self> {
        let header = arena.part(offset, size_of::<SlotHeader>() as u64)?;
        Some(Self {
            owner: header.word(offset_of!(SlotHeader, owner) as u64)?,
            random: header.word(offset_of!(SlotHeader, random) as u64)?,
            vacated_ns: header.word(offset_of!(SlotHeader, vacated_ns) as u64)?,
            locking: header.word(offset_of!(SlotHeader, locking) as u64)?,
            held_lock: header.word(offset_of!(SlotHeader, held_lock) as u64)?,
        })
    }
}

/// Removes the entry that leads to the slot at `address`.
fn remove_entry(table: Shared<'_>, address: u64) {
    for i in 0..ENTRIES {
        let (Some(pointer), Some(slot)) = (table.word(i * 16), table.word(i * 16 + 8)) else {
            return;
        };
        let found = pointer.load(Acquire);
        if found > ENTRY_CLAIMING && slot.load(Relaxed) == address {
            let _ = pointer.compare_exchange(found, ENTRY_TOMBSTONE, AcqRel, Relaxed);
            return;
        }
    }
}

/// Where a thread's random numbers start: anything that differs between threads and runs.
fn seed(asking: Asking) -> u64 {
    let time = sys::clock_ns(sys::CLOCK_MONOTONIC);
    (time ^ asking.thread_pointer.rotate_left(32) ^ u64::from(asking.tid.0)) | 1
}

impl Asking {
    /// The calling thread.
    #[must_use]
    pub fn current(thread_pointer: u64) -> Self {
        Self { thread_pointer, tgid: sys::getpid(), tid: sys::gettid() }
    }

    fn owner(self) -> u64 {
        (u64::from(self.tgid) << 32) | u64::from(self.tid.0)
    }
}
