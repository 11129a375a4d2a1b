//! The helpers on maps, by the map's kind: from the addresses that compiled code passes to
//! the views that the algorithms take. Start with [`Map::new`].

use core::mem::offset_of;
use core::sync::atomic::Ordering::{Acquire, Relaxed};

use crate::errno::Errno;
use crate::hash::change::{BPF_EXIST, BPF_NOEXIST, Caller, Cells};
use crate::hash::{Geometry, NodeIdx, Table, Values};
use crate::mem::{Bytes, Shared, low_half};
use crate::ringbuf::{self, Ring};
use crate::shared::{ArenaHeader, MAP_HEADER_BYTES, MapHeader, SlotHeader};
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
        })
    }

    /// `bpf_map_lookup_elem`, hash kinds: the value's address.
    ///
    /// # Safety
    /// `key` is the address of a key, `slot` of the calling thread's slot.
    #[must_use]
    pub unsafe fn lookup(&self, key: u64, slot: u64) -> Option<u64> {
        let table = self.table()?;
        // SAFETY: the verifier has proved that a whole key is readable there.
        let node = table.find(unsafe { self.key(key) })?;
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
                let caller = self.caller(own).ok_or(Errno::EINVAL)?;
                table.update(&caller, key, value, flags)
            }
            kind::ARRAY => self.update_array(self.data_offset, key, value, flags),
            kind::PERCPU_ARRAY => {
                let values = own.ok_or(Errno::EINVAL)?.wrapping_add(self.slot_offset);
                self.update_array(values, key, value, flags)
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
        let table = self.table().ok_or(Errno::EINVAL)?;
        let caller = self.caller(self.arena.offset_of(slot)).ok_or(Errno::EINVAL)?;
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
            kind::HASH => Values::InNode,
            kind::PERCPU_HASH => Values::InSlots { slot_offset: self.slot_offset },
            _ => return None,
        };
        let geometry = Geometry {
            key_size_bytes: self.key_size_bytes,
            value_size_bytes: self.value_size_bytes,
            value_stride: self.value_stride,
            max_entries: self.max_entries,
            values,
        };
        let rest = self.arena.size_bytes().checked_sub(self.data_offset)?;
        let data = self.arena.part(self.data_offset, rest)?;
        Table::new(geometry, self.header.part(STATE_OFFSET, STATE_BYTES)?, data)
    }

    fn update_array(
        &self,
        values: u64,
        key: Bytes<'_>,
        value: Bytes<'_>,
        flags: u64,
    ) -> Result<(), Errno> {
        if flags > BPF_EXIST {
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
        self.arena.store(offset, value).ok_or(Errno::EINVAL)
    }

    /// The thread whose slot is at offset `own`.
    fn caller(&self, own: Option<u64>) -> Option<Caller<'a>> {
        let word = |at: usize| Some(self.arena.word(at as u64)?.load(Relaxed));
        let half = |at: usize| Some(self.arena.half(at as u64)?.load(Acquire));
        let first = word(offset_of!(ArenaHeader, slots_offset))?;
        let stride = word(offset_of!(ArenaHeader, slot_stride))?;
        let n_slots = half(offset_of!(ArenaHeader, n_slots))?;
        let used = half(offset_of!(ArenaHeader, used_slots))?.min(n_slots);
        let slots = self.arena.part(first, stride.checked_mul(u64::from(used))?)?;
        let own = own?.checked_sub(first)?;
        let owner = slots.word(own + offset_of!(SlotHeader, owner) as u64)?.load(Relaxed);
        let tid = Tid(low_half(owner));
        Some(Caller { tid, cells: Cells { slots, stride, own } })
    }

    /// # Safety
    /// A whole key is readable at `address`.
    unsafe fn key<'k>(&self, address: u64) -> Bytes<'k> {
        // SAFETY: as the caller says.
        unsafe { Bytes::new(address as *const u8, u64::from(self.key_size_bytes)) }
    }
}
