//! `bpf_spin_lock`: the lock in a map's value. Knows nothing of values.
//!
//! In the kernel nothing comes between a lock's owner and its release. Here a signal handler
//! can, the owner can be stopped or killed, and a handler may jump away and never come back.
//!
//! ```text
//!   bit  31      a waiter has given up: later ones do not wait
//!   bits 30-22   how often it was taken, modulo 512
//!   bits 21-0    thread id of the owner, 0 where free; see lock.rs
//! ```
//!
//! 1. Waiting is bounded: -EBUSY follows, and a program that gets that for an answer ends there
//!    and counts as a miss. The first who waits in vain marks the word, so that an owner that
//!    never comes back costs the target one such wait and not one at every hit.
//! 2. Programs that take locks share one recursion guard per thread (`SlotHeader::locking`): none
//!    of them runs in a signal handler above another. So where a thread finds the lock that its
//!    slot holds already, that run was left half done (siglongjmp): it takes the lock again.
//! 3. A dead owner's lock passes on as in `lock.rs`, after a second of the same word.
//! 4. Releasing looks whether the lock is still one's own, and else changes nothing.

use core::hint::spin_loop;
use core::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

use crate::errno::Errno;
use crate::lock::{Owners, Suspect, TID_BITS, TID_MASK, is_given_up};
use crate::sys::{self, Tid};

const GIVEN_UP: u32 = 1 << 31;
const COUNT_MASK: u32 = !(GIVEN_UP | TID_MASK);
/// Tries with a pause between them: some microseconds.
const SPINS: u32 = 100;
/// Then tries with the processor given to others between them, for at most this long. An owner
/// that was preempted on a busy machine is back by then.
const YIELDS_NS: u64 = 200_000_000;
/// And at most this often.
const YIELDS: u32 = 1_000_000;
/// Nobody but a waiter changes a word that is taken, and each only once.
const RELEASE_TRIES: u32 = 4;

/// Who wants locks.
#[derive(Clone, Copy)]
pub struct Taker<'a> {
    /// The thread, as its slot says.
    pub me: Tid,
    /// Its slot's `held_lock`; the controller has no slot.
    pub held: Option<&'a AtomicU64>,
    /// Where the suspicion of dead owners is kept.
    pub suspect: Suspect<'a>,
    /// Whose threads may own locks.
    pub owners: Owners<'a>,
}

/// A lock that is held; dropping releases it.
pub struct Held<'a> {
    word: &'a AtomicU32,
    taker: Taker<'a>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        release(self.word, self.taker.me, self.taker.held);
    }
}

impl<'a> Taker<'a> {
    /// Takes the lock `word`, which is at `address` here. `key` tells it from others that share
    /// the suspicion.
    ///
    /// # Errors
    /// EBUSY: somebody kept it for all of the bounded wait, or this thread has it already.
    pub fn take(self, word: &'a AtomicU32, address: u64, key: u32) -> Result<Held<'a>, Errno> {
        if self.me.0 & TID_MASK == 0 {
            // No thread's id: the word would say "free".
            return Err(Errno::EBUSY);
        }
        let mut left_over = false;
        if let Some(held) = self.held {
            // Said before it is true: whoever leaves in between has it said.
            left_over = held.swap(address, Relaxed) == address;
        }
        let taken = self.wait(word, key, left_over);
        if taken.is_err()
            && let Some(held) = self.held
        {
            held.store(0, Relaxed);
        }
        taken.map(|()| Held { word, taker: self })
    }

    fn wait(&self, word: &AtomicU32, key: u32, left_over: bool) -> Result<(), Errno> {
        let mut tries = 0;
        let mut until_ns = u64::MAX;
        loop {
            let seen = word.load(Relaxed);
            let owner = Tid(seen & TID_MASK);
            let own = owner == self.me;
            if (owner.0 == 0 || (own && left_over)) && self.try_take(word, seen) {
                return Ok(());
            }
            if own && !left_over {
                return Err(Errno::EBUSY);
            }
            tries += 1;
            if tries < SPINS || owner.0 == 0 {
                spin_loop();
                if tries < SPINS + YIELDS {
                    continue;
                }
                return Err(Errno::EBUSY);
            }
            if tries == SPINS && self.owners.is_dead(owner) {
                let passes_on = is_given_up(self.suspect, key, seen) && self.try_take(word, seen);
                return if passes_on { Ok(()) } else { Err(Errno::EBUSY) };
            }
            let now_ns = sys::clock_ns(sys::CLOCK_MONOTONIC);
            until_ns = until_ns.min(now_ns.wrapping_add(YIELDS_NS));
            if seen & GIVEN_UP != 0 {
                return Err(Errno::EBUSY);
            }
            if tries >= SPINS + YIELDS || now_ns >= until_ns {
                // Fails where it has just been released: then the next one need not give up.
                let _ = word.compare_exchange(seen, seen | GIVEN_UP, Relaxed, Relaxed);
                return Err(Errno::EBUSY);
            }
            sys::sched_yield();
        }
    }

    fn try_take(&self, word: &AtomicU32, seen: u32) -> bool {
        let count = seen.wrapping_add(1 << TID_BITS) & COUNT_MASK;
        word.compare_exchange(seen, count | (self.me.0 & TID_MASK), Acquire, Relaxed).is_ok()
    }
}

/// Rule 4.
pub fn release(word: &AtomicU32, me: Tid, held: Option<&AtomicU64>) {
    for _ in 0..RELEASE_TRIES {
        let seen = word.load(Relaxed);
        if seen & TID_MASK != me.0 & TID_MASK
            || word.compare_exchange(seen, seen & COUNT_MASK, Release, Relaxed).is_ok()
        {
            break;
        }
    }
    if let Some(held) = held {
        held.store(0, Relaxed);
    }
}
