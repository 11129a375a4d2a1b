//! The helpers on maps, by the map's kind: from the addresses that compiled code passes to
//! the views that the algorithms take. Start with [`Map::new`].

use core::mem::offset_of;
use core::sync::atomic::Ordering::{Acquire, Relaxed};

use crate::errno::Errno;
use crate::hash::change::{BPF_EXIST, BPF_F_LOCK, BPF_NOEXIST, Caller, Cells};
use crate::hash::{Geometry, NodeIdx, Table, Values, state};
use crate::lock::Suspect;
use crate::mem::{Bytes, Shared, low_half};
use crate::ringbuf::{self, Ring};
use crate::shared::{ArenaHeader, MAP_HEADER_BYTES, MAP_HEADERS_OFFSET, MapHeader, SlotHeader};
use crate::spin::{self, Held, Taker};
use crate::sys::Tid;

/// Linux's numbers of the map types.
pub mod kind {
    /// `BPF_MAP_TYPE_HASH`
    pub const HASH: u32 = 1;
    /// `BPF_MAP_TYPE_ARRAY`
    pub const ARRAY: u32 = 2;
    /// `BPF_MAP_TYPE_PERCPU_HASH`
    pub const PERCPU_HASH: u32 = 5;
    /// `BPF_MAP_TYPE_PERCPU_ARRAY`
    pub const PERCPU_ARRAY: u32 = 6;
    /// `BPF_MAP_TYPE_ARRAY_OF_MAPS`
    pub const ARRAY_OF_MAPS: u32 = 12;
    /// `BPF_MAP_TYPE_HASH_OF_MAPS`
    pub const HASH_OF_MAPS: u32 = 13;
    /// `BPF_MAP_TYPE_RINGBUF`
    pub const RINGBUF: u32 = 27;
}

/// Offset of `MapHeader::state`.
pub const STATE_OFFSET: u64 = offset_of!(MapHeader, state) as u64;
const STATE_BYTES: u64 = 16 * 8;

/// The arena at `address`, as large as its header says.
///
/// # Safety
/// An arena is mapped there, for `'a`.
#[must_use]
pub unsafe fn arena<'a>(address: u64) -> Shared<'a> {
    let base = address as *mut u8;
    // SAFETY: the arena's header is at its start, as the caller says.
    let header = unsafe { Shared::new(base, size_of::<ArenaHeader>() as u64) };
    let size = header.word(offset_of!(ArenaHeader, size_bytes) as u64);
    // SAFETY: the controller has mapped this many bytes.
    unsafe { Shared::new(base, size.map_or(0, |s| s.load(Relaxed))) }
}

/// `bpf_ringbuf_query` by the map's header.
#[must_use]
pub fn ring_query(header: Shared<'_>, flags: u64) -> Option<u64> {
    let size = header.half(offset_of!(MapHeader, max_entries) as u64)?.load(Relaxed);
    ringbuf::query(header.part(STATE_OFFSET, STATE_BYTES)?, size, flags)
}

/// A map, as its header describes it. Only for code inside the target: the controller does
/// not believe headers.
#[derive(Clone, Copy)]
pub struct Map<'a> {
    arena: Shared<'a>,
    header: Shared<'a>,
    kind: u32,
    key_size_bytes: u32,
    value_size_bytes: u32,
    value_stride: u32,
    max_entries: u32,
    data_offset: u64,
    slot_offset: u64,
    lock_offset: Option<u32>,
    template_offset: u64,
}

impl<'a> Map<'a> {
    /// The map whose header is at `address`.
    #[must_use]
    pub fn new(arena: Shared<'a>, address: u64) -> Option<Self> {
        let header = arena.part(arena.offset_of(address)?, MAP_HEADER_BYTES)?;
        let half = |at: usize| Some(header.half(at as u64)?.load(Relaxed));
        let word = |at: usize| Some(header.word(at as u64)?.load(Relaxed));
        Some(Self {
            arena,
            header,
            kind: half(offset_of!(MapHeader, kind))?,
            key_size_bytes: half(offset_of!(MapHeader, key_size_bytes))?,
            value_size_bytes: half(offset_of!(MapHeader, value_size_bytes))?,
            value_stride: half(offset_of!(MapHeader, value_stride))?,
            max_entries: half(offset_of!(MapHeader, max_entries))?,
            data_offset: word(offset_of!(MapHeader, data_offset))?,
            slot_offset: word(offset_of!(MapHeader, slot_offset))?,
            lock_offset: half(offset_of!(MapHeader, lock_offset_plus_1))?.checked_sub(1),
            template_offset: word(offset_of!(MapHeader, template_offset))?,
        })
    }

    /// `bpf_map_lookup_elem`, all kinds with elements: the value's address.
    ///
    /// # Safety
    /// `key` is the address of a key; `slot`, in per-CPU maps, of the calling thread's slot.
    #[must_use]
    pub unsafe fn lookup(&self, key: u64, slot: u64) -> Option<u64> {
        // SAFETY: the verifier has proved that a whole key is readable there.
        let key = unsafe { self.key(key) };
        match self.kind {
            kind::ARRAY => self.element(self.data_offset, key),
            kind::PERCPU_ARRAY => {
                let own = self.arena.offset_of(slot)?;
                self.element(own.wrapping_add(self.slot_offset), key)
            }
            kind::HASH | kind::PERCPU_HASH => self.hash_lookup(key, slot),
            _ => None,
        }
    }

    /// `bpf_map_lookup_elem` in a map of maps: the address of the inner map's header. Compiled
    /// code relies on the shape that it was verified for, so a header of another shape is no
    /// map.
    ///
    /// # Safety
    /// `key` is the address of a key.
    #[must_use]
    pub unsafe fn inner(&self, key: u64) -> Option<u64> {
        // SAFETY: the verifier has proved that a whole key is readable there.
        let key = unsafe { self.key(key) };
        let value = match self.kind {
            kind::ARRAY_OF_MAPS => {
                let address = self.element(self.data_offset, key)?;
                self.arena.half(self.arena.offset_of(address)?)?
            }
            kind::HASH_OF_MAPS => {
                let table = self.table()?;
                table.value_half(table.find(key)?)?
            }
            _ => return None,
        };
        let offset = u64::from(value.load(Relaxed));
        let n_maps = self.arena.half(offset_of!(ArenaHeader, n_maps) as u64)?.load(Relaxed);
        // 0 where there is no map.
        let from_first = offset.checked_sub(MAP_HEADERS_OFFSET)?;
        if from_first % MAP_HEADER_BYTES != 0 || from_first / MAP_HEADER_BYTES >= u64::from(n_maps)
        {
            return None;
        }
        let address = self.arena.address(offset);
        let found = Self::new(self.arena, address)?;
        let template = Self::new(self.arena, self.arena.address(self.template_offset))?;
        (found.shape() == template.shape()).then_some(address)
    }

    /// What compiled code counts on.
    fn shape(&self) -> (u32, u32, u32, Option<u32>) {
        (self.kind, self.key_size_bytes, self.value_size_bytes, self.lock_offset)
    }

    /// The address of an array's element, all of it in the arena.
    fn element(&self, values: u64, key: Bytes<'_>) -> Option<u64> {
        let index = key.word(0) & u64::from(u32::MAX);
        if index >= u64::from(self.max_entries) {
            return None;
        }
        let stride = u64::from(self.value_stride);
        let element = self.arena.part(values.wrapping_add(index * stride), stride)?;
        Some(element.address(0))
    }

    fn hash_lookup(&self, key: Bytes<'_>, slot: u64) -> Option<u64> {
        let table = self.table()?;
        let node = table.find(key)?;
        Some(self.value(&table, node, slot))
    }

    /// One step of `bpf_for_each_map_elem`, hash kinds: the next element from number `cursor`
    /// on. Its key is copied, so that nobody changes it while the program looks at it; the
    /// value's address is as good as that of a lookup. `None` where there is no other, and where
    /// the header tells of keys of another size than the program was compiled for.
    #[must_use]
    pub fn next(&self, cursor: &mut u64, key: &mut [u8], slot: u64) -> Option<u64> {
        if key.len() as u64 != u64::from(self.key_size_bytes) {
            return None;
        }
        let table = self.table()?;
        let node = table.next(u32::try_from(*cursor).ok()?, key)?;
        *cursor = u64::from(node.0) + 1;
        Some(self.value(&table, node, slot))
    }

    fn value(&self, table: &Table<'_>, node: NodeIdx, slot: u64) -> u64 {
        match table.geometry().values {
            Values::InNode => table.value_address(node),
            Values::InSlots { slot_offset } => {
                let cell = u64::from(node.0) * u64::from(self.value_stride);
                slot + slot_offset + cell
            }
        }
    }

    /// `bpf_map_update_elem`.
    ///
    /// # Errors
    /// EINVAL, EEXIST, ENOENT, E2BIG, EBUSY, as Linux for the map's kind.
    ///
    /// # Safety
    /// `key` and `value` are the addresses of a key and a value, `slot` is that of the
    /// calling thread's slot.
    pub unsafe fn update(&self, key: u64, value: u64, flags: u64, slot: u64) -> Result<(), Errno> {
        // SAFETY: the verifier has proved that a whole key is readable there.
        let key = unsafe { self.key(key) };
        // SAFETY: the same, of the value.
        let value = unsafe { Bytes::new(value as *const u8, u64::from(self.value_size_bytes)) };
        let own = self.arena.offset_of(slot);
        match self.kind {
            kind::HASH | kind::PERCPU_HASH => {
                let table = self.table().ok_or(Errno::EINVAL)?;
                let caller = caller(self.arena, own).ok_or(Errno::EINVAL)?;
                table.update(&caller, key, value, flags)
            }
            kind::ARRAY => self.update_array(own, self.data_offset, key, value, flags),
            kind::PERCPU_ARRAY => {
                let values = own.ok_or(Errno::EINVAL)?.wrapping_add(self.slot_offset);
                self.update_array(own, values, key, value, flags)
            }
            _ => Err(Errno::EINVAL),
        }
    }

    /// `bpf_map_delete_elem`.
    ///
    /// # Errors
    /// ENOENT, EBUSY; EINVAL for kinds whose elements cannot go.
    ///
    /// # Safety
    /// `key` is the address of a key, `slot` of the calling thread's slot.
    pub unsafe fn delete(&self, key: u64, slot: u64) -> Result<(), Errno> {
        if self.kind == kind::HASH_OF_MAPS {
            return Err(Errno::EINVAL);
        }
        let table = self.table().ok_or(Errno::EINVAL)?;
        let caller = caller(self.arena, self.arena.offset_of(slot)).ok_or(Errno::EINVAL)?;
        // SAFETY: the verifier has proved that a whole key is readable there.
        table.delete(&caller, unsafe { self.key(key) })
    }

    /// The ring buffer, where it is one.
    #[must_use]
    pub fn ring(&self) -> Option<Ring<'a>> {
        if self.kind != kind::RINGBUF {
            return None;
        }
        let data = self.arena.part(self.data_offset, u64::from(self.max_entries))?;
        Ring::new(self.header.part(STATE_OFFSET, STATE_BYTES)?, data)
    }

    fn table(&self) -> Option<Table<'a>> {
        let values = match self.kind {
            kind::HASH | kind::HASH_OF_MAPS => Values::InNode,
            kind::PERCPU_HASH => Values::InSlots { slot_offset: self.slot_offset },
            _ => return None,
        };
        let geometry = Geometry {
            key_size_bytes: self.key_size_bytes,
            value_size_bytes: self.value_size_bytes,
            value_stride: self.value_stride,
            max_entries: self.max_entries,
            values,
            lock_offset: self.lock_offset,
        };
        let rest = self.arena.size_bytes().checked_sub(self.data_offset)?;
        let data = self.arena.part(self.data_offset, rest)?;
        Table::new(geometry, self.header.part(STATE_OFFSET, STATE_BYTES)?, data)
    }

    fn update_array(
        &self,
        own: Option<u64>,
        values: u64,
        key: Bytes<'_>,
        value: Bytes<'_>,
        flags: u64,
    ) -> Result<(), Errno> {
        let (flags, locked) = (flags & !BPF_F_LOCK, flags & BPF_F_LOCK != 0);
        if flags > BPF_EXIST || (locked && self.lock_offset.is_none()) {
            return Err(Errno::EINVAL);
        }
        let index = key.word(0) & u64::from(u32::MAX);
        if index >= u64::from(self.max_entries) {
            return Err(Errno::E2BIG);
        }
        if flags == BPF_NOEXIST {
            return Err(Errno::EEXIST);
        }
        let offset = values.wrapping_add(index * u64::from(self.value_stride));
        let caller =
            if locked { Some(caller(self.arena, own).ok_or(Errno::EINVAL)?) } else { None };
        let _held = match &caller {
            Some(caller) => Some(self.lock_element(caller, offset, low_half(index))?),
            None => None,
        };
        self.arena.store_around(offset, value, self.lock_offset).ok_or(Errno::EINVAL)
    }

    /// Takes the lock in an array's element, which is at `offset`.
    fn lock_element(
        &self,
        caller: &Caller<'a>,
        offset: u64,
        index: u32,
    ) -> Result<Held<'a>, Errno> {
        let lock = self.lock_offset.ok_or(Errno::EINVAL)?;
        let states = self.header.part(STATE_OFFSET, STATE_BYTES).ok_or(Errno::EINVAL)?;
        lock_element(self.arena, states, caller, offset + u64::from(lock), index)
    }

    /// # Safety
    /// A whole key is readable at `address`.
    unsafe fn key<'k>(&self, address: u64) -> Bytes<'k> {
        // SAFETY: as the caller says.
        unsafe { Bytes::new(address as *const u8, u64::from(self.key_size_bytes)) }
    }
}

/// Takes the lock at offset `at` of `memory`, in element `index` of an array whose header's
/// state words are `states`. For both sides.
///
/// # Errors
/// EBUSY (see `spin.rs`); EINVAL: there is none.
pub fn lock_element<'a>(
    memory: Shared<'a>,
    states: Shared<'a>,
    caller: &Caller<'a>,
    at: u64,
    index: u32,
) -> Result<Held<'a>, Errno> {
    let suspect = Suspect {
        word: states.word(state::VALUE_SUSPECT * 8).ok_or(Errno::EINVAL)?,
        since_ns: states.word(state::VALUE_SUSPECT_SINCE * 8).ok_or(Errno::EINVAL)?,
    };
    let owners = caller.cells.owners();
    let taker = Taker { me: caller.tid, held: caller.held, suspect, owners };
    taker.take(memory.half(at).ok_or(Errno::EINVAL)?, memory.address(at), index)
}

/// `bpf_spin_lock` of the lock at `address`, by the thread whose slot is at `slot`.
///
/// # Errors
/// EBUSY (see `spin.rs`); EINVAL: an address outside the arena.
pub fn spin_lock(arena: Shared<'_>, address: u64, slot: u64) -> Result<(), Errno> {
    let at = arena.offset_of(address).ok_or(Errno::EINVAL)?;
    let word = arena.half(at).ok_or(Errno::EINVAL)?;
    let caller = caller(arena, arena.offset_of(slot)).ok_or(Errno::EINVAL)?;
    let field = |at: usize| arena.word(at as u64).ok_or(Errno::EINVAL);
    let suspect = Suspect {
        word: field(offset_of!(ArenaHeader, lock_suspect))?,
        since_ns: field(offset_of!(ArenaHeader, lock_suspect_since_ns))?,
    };
    let owners = caller.cells.owners();
    let taker = Taker { me: caller.tid, held: caller.held, suspect, owners };
    // `spin_unlock` releases it.
    core::mem::forget(taker.take(word, address, low_half(at >> 2))?);
    Ok(())
}

/// `bpf_spin_unlock`.
pub fn spin_unlock(arena: Shared<'_>, address: u64, slot: u64) {
    let word = arena.offset_of(address).and_then(|at| arena.half(at));
    if let (Some(word), Some(caller)) = (word, caller(arena, arena.offset_of(slot))) {
        spin::release(word, caller.tid, caller.held);
    }
}

/// The thread whose slot is at offset `own`.
fn caller<'a>(arena: Shared<'a>, own: Option<u64>) -> Option<Caller<'a>> {
    let word = |at: usize| Some(arena.word(at as u64)?.load(Relaxed));
    let half = |at: usize| Some(arena.half(at as u64)?.load(Acquire));
    let first = word(offset_of!(ArenaHeader, slots_offset))?;
    let stride = word(offset_of!(ArenaHeader, slot_stride))?;
    let n_slots = half(offset_of!(ArenaHeader, n_slots))?;
    let used = half(offset_of!(ArenaHeader, used_slots))?.min(n_slots);
    let slots = arena.part(first, stride.checked_mul(u64::from(used))?)?;
    let own = own?.checked_sub(first)?;
    let slot = slots.part(own, size_of::<SlotHeader>() as u64)?;
    let owner = slot.word(offset_of!(SlotHeader, owner) as u64)?.load(Relaxed);
    let held = slot.word(offset_of!(SlotHeader, held_lock) as u64)?;
    let tid = Tid(low_half(owner));
    Some(Caller { tid, cells: Cells { slots, stride, own }, held: Some(held) })
}
