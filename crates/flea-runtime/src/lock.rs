//! A lock in shared memory that neither a signal handler nor a killed owner can turn into
//! a hang. Knows nothing of what it protects; `hash/` has one per bucket.
//!
//! Protected: who may change one bucket's chain. By: the bucket's lock word,
//!
//! ```text
//!   bits 31-22  how often it was taken, modulo 1024
//!   bits 21-0   thread id of the owner, 0 where free (Linux's ids end at 2^22)
//! ```
//! A thread of the target is known by the id in its slot, as asking the kernel would cost
//! more than the rest of an update. The slot may have passed to a later thread with the same
//! thread pointer; the id is then a dead thread's, and still no other slot's of this process.

//! 1. Taking is one compare-and-swap from a free word. Waiting is bounded: -EBUSY follows.
//! 2. A word with one's own thread id means that this is a signal handler and the owner is
//!    further up the same stack: -EBUSY at once.
//! 3. An owner that the kernel does not know (ESRCH) is not dead while a living process has
//!    a slot with its id. Else it is dead, or in another pid namespace. So the word must also
//!    stay the same for [`STEAL_AFTER_NS`]; only then is the lock taken from it. The time is
//!    kept in the map, as no waiter stays that long.
//! 4. Releasing compares: an owner that lost its lock by 3 (it was stopped for long, in
//!    another namespace) changes nothing more.
//!
//! What a dead owner leaves is a well-formed chain at every instant; at worst one node is in
//! no chain and in no free list any more.

use core::hint::spin_loop;
use core::mem::offset_of;
use core::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

use crate::errno::Errno;
use crate::mem::{Shared, low_half};
use crate::shared::{SLOT_VACANT, SlotHeader};
use crate::sys::{self, Tid};

/// An unchanged lock word of a thread that nobody knows is given up after this.
pub const STEAL_AFTER_NS: u64 = 1_000_000_000;

/// Bits of a thread id.
pub(crate) const TID_BITS: u32 = 22;
/// The part of a lock word that names its owner.
pub(crate) const TID_MASK: u32 = (1 << TID_BITS) - 1;
/// Tries with a pause between them: some microseconds.
const SPINS: u32 = 100;
/// Then tries with the processor given to others between them, for at most this long.
const YIELDS_NS: u64 = 10_000_000;
/// And at most this often.
const YIELDS: u32 = 1000;

/// Where a map remembers which lock it suspects, and since when.
#[derive(Clone, Copy)]
pub struct Suspect<'a> {
    /// bucket << 32 | lock word
    pub word: &'a AtomicU64,
    /// CLOCK_MONOTONIC, ns
    pub since_ns: &'a AtomicU64,
}

/// The slots, whose owners may hold locks.
#[derive(Clone, Copy)]
pub struct Owners<'a> {
    /// From slot 0 to the last one in use.
    pub slots: Shared<'a>,
    /// Bytes from slot to slot.
    pub stride: u64,
}

/// A lock that is held; dropping releases it.
pub struct Guard<'a> {
    lock: &'a AtomicU32,
    word: u32,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        let free = self.word & !TID_MASK;
        // Fails only where the lock was given up for dead: rule 4.
        let _ = self.lock.compare_exchange(self.word, free, Release, Relaxed);
    }
}

/// Takes `lock`, the one of bucket `bucket`, for thread `me`.
///
/// # Errors
/// EBUSY: `me` has it already, or somebody kept it for all of the bounded wait.
pub fn acquire<'a>(
    lock: &'a AtomicU32,
    bucket: u32,
    me: Tid,
    suspect: Suspect<'_>,
    owners: Owners<'_>,
) -> Result<Guard<'a>, Errno> {
    if me.0 & TID_MASK == 0 {
        // No thread's id: the word would say "free".
        return Err(Errno::EBUSY);
    }
    let mut tries = 0;
    let mut until_ns = u64::MAX;
    loop {
        let seen = lock.load(Relaxed);
        let owner = Tid(seen & TID_MASK);
        if owner.0 == 0 {
            if let Some(guard) = take(lock, seen, me) {
                return Ok(guard);
            }
        } else if owner == me {
            return Err(Errno::EBUSY);
        }
        tries += 1;
        if tries < SPINS {
            spin_loop();
            continue;
        }
        if tries == SPINS && owner.0 != 0 && owners.is_dead(owner) {
            return if is_given_up(suspect, bucket, seen) {
                take(lock, seen, me).ok_or(Errno::EBUSY)
            } else {
                Err(Errno::EBUSY)
            };
        }
        let now_ns = sys::clock_ns(sys::CLOCK_MONOTONIC);
        until_ns = until_ns.min(now_ns.wrapping_add(YIELDS_NS));
        if tries >= SPINS + YIELDS || now_ns >= until_ns {
            return Err(Errno::EBUSY);
        }
        sys::sched_yield();
    }
}

impl Owners<'_> {
    /// Rule 3's first half.
    pub(crate) fn is_dead(self, owner: Tid) -> bool {
        if !sys::is_thread_dead(owner) {
            return false;
        }
        let mut slot = 0;
        while slot < self.slots.size_bytes() && self.stride > 0 {
            let word = self.slots.word(slot + offset_of!(SlotHeader, owner) as u64);
            let of_slot = word.map_or(0, |w| w.load(Acquire));
            let same = of_slot != SLOT_VACANT && low_half(of_slot) == owner.0;
            if same && !sys::is_process_dead(low_half(of_slot >> 32)) {
                return false;
            }
            slot += self.stride;
        }
        true
    }
}

/// Rules 1 and 3: from the word that was seen to one with `me` and the next count.
fn take(lock: &AtomicU32, seen: u32, me: Tid) -> Option<Guard<'_>> {
    let count = (seen >> TID_BITS).wrapping_add(1);
    let word = (count << TID_BITS) | (me.0 & TID_MASK);
    lock.compare_exchange(seen, word, Acquire, Relaxed).ok()?;
    Some(Guard { lock, word })
}

/// Rule 3: whether this very word has been under suspicion for long enough. Starts the
/// clock where it has not.
pub(crate) fn is_given_up(suspect: Suspect<'_>, bucket: u32, seen: u32) -> bool {
    let now_ns = sys::clock_ns(sys::CLOCK_MONOTONIC);
    let word = (u64::from(bucket) << 32) | u64::from(seen);
    if suspect.word.load(Acquire) == word {
        let since_ns = suspect.since_ns.load(Relaxed);
        if now_ns < since_ns {
            // Another clock, or scribbled: begin again.
            suspect.since_ns.store(now_ns, Relaxed);
            return false;
        }
        return now_ns - since_ns >= STEAL_AFTER_NS;
    }
    // Another bucket's suspicion is not thrown away before its time: else two dead owners
    // would hide each other. It lapses at twice the time.
    let since_ns = suspect.since_ns.load(Relaxed);
    if now_ns.wrapping_sub(since_ns) > 2 * STEAL_AFTER_NS {
        suspect.since_ns.store(now_ns, Relaxed);
        suspect.word.store(word, Release);
    }
    false
}
