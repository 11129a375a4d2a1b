//! Update and delete: the only code that changes a hash map. The rules are in `mod.rs`.

use core::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
    fence,
};

use super::{END, NodeIdx, Table, Values, Wanted, state};
use crate::errno::Errno;
use crate::lock::{self, Guard, Owners, Suspect};
use crate::mem::{Bytes, Shared, low_half};
use crate::spin::{Held, Taker};
use crate::sys::Tid;

/// `BPF_ANY`: make or change it.
pub const BPF_ANY: u64 = 0;
/// `BPF_NOEXIST`: make it; EEXIST where there is one.
pub const BPF_NOEXIST: u64 = 1;
/// `BPF_EXIST`: change it; ENOENT where there is none.
pub const BPF_EXIST: u64 = 2;
/// `BPF_F_LOCK`: with the lock in the value held.
pub const BPF_F_LOCK: u64 = 4;

/// Compare-and-swaps on the free list before it is left alone. Each failure is somebody
/// else's success, so this is never reached but in scribbled memory.
const FREE_LIST_TRIES: u32 = 100_000;

/// Who changes the map.
#[derive(Clone, Copy)]
pub struct Caller<'a> {
    /// The calling thread, as `lock.rs` knows it.
    pub tid: Tid,
    /// The slots in use, and which of them a value given to PERCPU_HASH goes to.
    pub cells: Cells<'a>,
    /// `held_lock` of the caller's slot, where it has one.
    pub held: Option<&'a AtomicU64>,
}

/// The slots in use.
#[derive(Clone, Copy)]
pub struct Cells<'a> {
    /// From slot 0 to the last one in use.
    pub slots: Shared<'a>,
    /// Bytes from slot to slot.
    pub stride: u64,
    /// Offset of the caller's slot from slot 0.
    pub own: u64,
}

impl<'a> Cells<'a> {
    /// The threads that may own locks.
    #[must_use]
    pub fn owners(&self) -> Owners<'a> {
        Owners { slots: self.slots, stride: self.stride }
    }
}

/// A node on its way into the map.
struct Fresh {
    index: NodeIdx,
    /// It was an element before: its cells in the slots are not zero.
    used_before: bool,
}

impl<'a> Table<'a> {
    /// Sets `key`'s value. In a PERCPU_HASH the caller's cell gets it, and the others of a
    /// new element are cleared.
    ///
    /// # Errors
    /// EINVAL (flags), EEXIST, ENOENT, E2BIG (full), EBUSY (see `lock.rs` and `spin.rs`).
    pub fn update(
        &self,
        caller: &Caller<'a>,
        key: Bytes<'_>,
        value: Bytes<'_>,
        flags: u64,
    ) -> Result<(), Errno> {
        let (flags, locked) = (flags & !BPF_F_LOCK, flags & BPF_F_LOCK != 0);
        if flags > BPF_EXIST || (locked && self.geometry.lock_offset.is_none()) {
            return Err(Errno::EINVAL);
        }
        let wanted = self.wanted(key).ok_or(Errno::EINVAL)?;
        let _guard = self.lock(wanted.bucket, caller)?;
        let before = self.locate(&wanted)?;
        match before {
            Some(_) if flags == BPF_NOEXIST => Err(Errno::EEXIST),
            None if flags == BPF_EXIST => Err(Errno::ENOENT),
            Some((node, _)) if locked => {
                let _held = self.lock_value(caller, node)?;
                self.store_value(caller, node, value).ok_or(Errno::EINVAL)
            }
            Some((node, _)) => self.store_value(caller, node, value).ok_or(Errno::EINVAL),
            None => {
                let fresh = self.allocate().ok_or(Errno::E2BIG)?;
                self.insert(caller, &wanted, value, &fresh).ok_or(Errno::EINVAL)
            }
        }
    }

    /// Takes `key`'s element out.
    ///
    /// # Errors
    /// ENOENT, EBUSY.
    pub fn delete(&self, caller: &Caller<'_>, key: Bytes<'_>) -> Result<(), Errno> {
        let wanted = self.wanted(key).ok_or(Errno::EINVAL)?;
        let _guard = self.lock(wanted.bucket, caller)?;
        let (index, link) = self.locate(&wanted)?.ok_or(Errno::ENOENT)?;
        let node = self.node(index).ok_or(Errno::EINVAL)?;
        link.store(node.next.load(Relaxed), Release);
        node.generation.fetch_add(1, Release);
        self.free(index);
        Ok(())
    }

    /// Takes the lock in a node's value.
    ///
    /// # Errors
    /// EBUSY (see `spin.rs`), EINVAL: there is none.
    pub fn lock_value(&self, caller: &Caller<'a>, node: NodeIdx) -> Result<Held<'a>, Errno> {
        let offset = self.geometry.lock_offset.ok_or(Errno::EINVAL)?;
        let at = self.value_offset(node) + u64::from(offset);
        let suspect = self.suspect(state::VALUE_SUSPECT, state::VALUE_SUSPECT_SINCE)?;
        let taker =
            Taker { me: caller.tid, held: caller.held, suspect, owners: caller.cells.owners() };
        let word = self.nodes.half(at).ok_or(Errno::EINVAL)?;
        taker.take(word, self.nodes.address(at), node.0)
    }

    fn suspect(&self, word: u64, since_ns: u64) -> Result<Suspect<'a>, Errno> {
        Ok(Suspect {
            word: self.word(word).ok_or(Errno::EINVAL)?,
            since_ns: self.word(since_ns).ok_or(Errno::EINVAL)?,
        })
    }

    fn lock(&self, bucket: u32, caller: &Caller<'_>) -> Result<Guard<'a>, Errno> {
        let word = self.lock_word(bucket).ok_or(Errno::EINVAL)?;
        let suspect = self.suspect(state::SUSPECT, state::SUSPECT_SINCE)?;
        lock::acquire(word, bucket, caller.tid, suspect, caller.cells.owners())
    }

    /// With the bucket locked: the node of `wanted` and the link that leads to it.
    ///
    /// # Errors
    /// EINVAL: the memory is no hash map any more.
    #[allow(clippy::type_complexity, reason = "a node and a link; a name would say no more")]
    fn locate(&self, wanted: &Wanted<'_>) -> Result<Option<(NodeIdx, &'a AtomicU32)>, Errno> {
        let mut from = self.first(wanted.bucket).ok_or(Errno::EINVAL)?;
        for _ in 0..=self.geometry.max_entries {
            let link = from.load(Acquire);
            if link == 0 || link & END != 0 {
                return Ok(None);
            }
            let index = NodeIdx(link - 1);
            let node = self.node(index).ok_or(Errno::EINVAL)?;
            if node.hash.load(Relaxed) == wanted.hash
                && self.nodes.equals(self.key_offset(index), wanted.key)
            {
                return Ok(Some((index, from)));
            }
            from = node.next;
        }
        Err(Errno::EINVAL)
    }

    /// Rule 1.
    fn insert(
        &self,
        caller: &Caller<'_>,
        wanted: &Wanted<'_>,
        value: Bytes<'_>,
        fresh: &Fresh,
    ) -> Option<()> {
        let node = self.node(fresh.index)?;
        let first = self.first(wanted.bucket)?;
        // A reader still on this node from its last life must see an even generation before
        // any byte of the new key.
        fence(Release);
        node.hash.store(wanted.hash, Relaxed);
        self.nodes.store(self.key_offset(fresh.index), wanted.key)?;
        if fresh.used_before {
            self.clear_cells(caller, fresh.index)?;
        }
        self.store_value(caller, fresh.index, value)?;
        let next = first.load(Relaxed);
        node.next.store(if next == 0 { END | wanted.bucket } else { next }, Release);
        // Odd, whatever scribbled memory held.
        node.generation.store(node.generation.load(Relaxed).wrapping_add(1) | 1, Release);
        first.store(fresh.index.0 + 1, Release);
        Some(())
    }

    fn store_value(&self, caller: &Caller<'_>, node: NodeIdx, value: Bytes<'_>) -> Option<()> {
        match self.geometry.values {
            Values::InNode => {
                let hole = self.geometry.lock_offset;
                self.nodes.store_around(self.value_offset(node), value, hole)
            }
            Values::InSlots { slot_offset } => {
                let cells = caller.cells;
                cells.slots.store(cells.own + self.cell_offset(slot_offset, node), value)
            }
        }
    }

    fn clear_cells(&self, caller: &Caller<'_>, node: NodeIdx) -> Option<()> {
        let Values::InSlots { slot_offset } = self.geometry.values else { return Some(()) };
        let cells = caller.cells;
        let mut slot = 0;
        // Slots that are claimed from now on have never been written to.
        while slot < cells.slots.size_bytes() && cells.stride > 0 {
            let at = slot + self.cell_offset(slot_offset, node);
            cells.slots.zero(at, u64::from(self.geometry.value_stride))?;
            slot += cells.stride;
        }
        Some(())
    }

    fn cell_offset(&self, slot_offset: u64, node: NodeIdx) -> u64 {
        slot_offset + u64::from(node.0) * u64::from(self.geometry.value_stride)
    }

    /// A node of the free list, else one that was never used.
    fn allocate(&self) -> Option<Fresh> {
        if let Some(index) = self.pop_free() {
            return Some(Fresh { index, used_before: true });
        }
        let used = self.word(state::USED)?;
        let max = u64::from(self.geometry.max_entries);
        // Scribbled over, it may be the largest number there is.
        let next = |n: u64| (n < max).then_some(n.wrapping_add(1));
        let index = used.fetch_update(Relaxed, Relaxed, next).ok()?;
        Some(Fresh { index: NodeIdx(low_half(index)), used_before: false })
    }

    fn pop_free(&self) -> Option<NodeIdx> {
        let list = self.word(state::FREE)?;
        let mut seen = list.load(Acquire);
        for _ in 0..FREE_LIST_TRIES {
            let link = low_half(seen);
            if link == 0 || link > self.geometry.max_entries {
                return None;
            }
            let index = NodeIdx(link - 1);
            let node = self.node(index)?;
            let next = tagged(seen, node.next_free.load(Relaxed));
            match list.compare_exchange_weak(seen, next, AcqRel, Acquire) {
                // An element in the free list is a scribbled one: leave it alone.
                Ok(_) if node.generation.load(Relaxed) & 1 == 1 => return None,
                Ok(_) => return Some(index),
                Err(now) => seen = now,
            }
        }
        None
    }

    /// Rule 2's last step.
    fn free(&self, index: NodeIdx) {
        let (Some(list), Some(node)) = (self.word(state::FREE), self.node(index)) else { return };
        let mut seen = list.load(Relaxed);
        for _ in 0..FREE_LIST_TRIES {
            node.next_free.store(low_half(seen), Relaxed);
            match list.compare_exchange_weak(seen, tagged(seen, index.0 + 1), AcqRel, Relaxed) {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }
}

/// The list's next head: its tag counts on, so that a head that was taken and put back
/// meanwhile is another one.
fn tagged(seen: u64, link: u32) -> u64 {
    ((seen >> 32).wrapping_add(1) << 32) | u64::from(link)
}
