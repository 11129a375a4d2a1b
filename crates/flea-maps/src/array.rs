//! ARRAY and PERCPU_ARRAY.

use flea_layout::plan::MapPlacement;
use flea_object::LOCK_BYTES;
use flea_runtime::map::lock_element;
use flea_runtime::mem::{Bytes, to_usize};
use flea_runtime::spin::Held;

use crate::arena::Arena;
use crate::error::MapError;
use crate::hash::{caller, explain, patiently};

/// A `BPF_MAP_TYPE_ARRAY`; global data is one with a single element.
#[derive(Clone, Debug)]
pub struct ArrayMap {
    arena: Arena,
    placement: MapPlacement,
}

/// A `BPF_MAP_TYPE_PERCPU_ARRAY`: a value per element and slot, that is, per thread.
#[derive(Clone, Debug)]
pub struct PerCpuArrayMap {
    arena: Arena,
    placement: MapPlacement,
}

impl ArrayMap {
    pub(crate) fn new(arena: Arena, placement: MapPlacement) -> Self {
        Self { arena, placement }
    }

    /// How many elements it has.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.placement.max_entries
    }

    /// Never: an array has all its elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The value at `index`. A lock in it reads as zeros.
    ///
    /// # Errors
    /// [`MapError::OutOfRange`]
    pub fn get(&self, index: u32) -> Result<Vec<u8>, MapError> {
        let mut value = value_buffer(&self.placement);
        self.arena.memory().load(self.place(index)?, &mut value).ok_or(MapError::Damaged)?;
        hide_lock(&self.placement, &mut value);
        Ok(value)
    }

    /// The value at `index`, read while its lock is held (`BPF_F_LOCK`): programs that change
    /// it under the lock are before or behind, never in between.
    ///
    /// # Errors
    /// [`MapError::OutOfRange`], [`MapError::NoLock`], [`MapError::Busy`]
    pub fn get_locked(&self, index: u32) -> Result<Vec<u8>, MapError> {
        let _held = self.lock(index)?;
        self.get(index)
    }

    /// Sets the value at `index`, all but a lock in it.
    ///
    /// # Errors
    /// [`MapError::OutOfRange`], [`MapError::ValueSize`]
    pub fn set(&self, index: u32, value: &[u8]) -> Result<(), MapError> {
        check_value(&self.placement, value)?;
        let (at, hole) = (self.place(index)?, self.placement.lock_offset);
        let stored = self.arena.memory().store_around(at, Bytes::from(value), hole);
        stored.ok_or(MapError::Damaged)
    }

    /// Sets the value at `index` while its lock is held (`BPF_F_LOCK`).
    ///
    /// # Errors
    /// As [`ArrayMap::set`] and [`ArrayMap::get_locked`].
    pub fn set_locked(&self, index: u32, value: &[u8]) -> Result<(), MapError> {
        let _held = self.lock(index)?;
        self.set(index, value)
    }

    fn lock(&self, index: u32) -> Result<Held<'_>, MapError> {
        let offset = self.placement.lock_offset.ok_or(MapError::NoLock)?;
        let at = self.place(index)? + u64::from(offset);
        let states = self.arena.state(&self.placement).ok_or(MapError::Damaged)?;
        let caller = caller(&self.arena)?;
        patiently(|| lock_element(self.arena.memory(), states, &caller, at, index))
            .map_err(|errno| explain(errno, &self.placement))
    }

    fn place(&self, index: u32) -> Result<u64, MapError> {
        Ok(self.placement.data_offset + element_offset(&self.placement, index)?)
    }

    /// All values, in order.
    pub fn iter(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        (0..self.len()).filter_map(|index| self.get(index).ok())
    }
}

impl PerCpuArrayMap {
    pub(crate) fn new(arena: Arena, placement: MapPlacement) -> Self {
        Self { arena, placement }
    }

    /// How many elements it has.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.placement.max_entries
    }

    /// Never: an array has all its elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values at `index`, one per slot in use.
    ///
    /// # Errors
    /// [`MapError::OutOfRange`]
    pub fn get(&self, index: u32) -> Result<Vec<Vec<u8>>, MapError> {
        let offset = self.placement.slot_offset + element_offset(&self.placement, index)?;
        cells(&self.arena, &self.placement, offset)
    }

    /// Makes `value` the sum of the values at `index`: slot 0 gets it, the others zeros.
    ///
    /// # Errors
    /// [`MapError::OutOfRange`], [`MapError::ValueSize`]
    pub fn set(&self, index: u32, value: &[u8]) -> Result<(), MapError> {
        check_value(&self.placement, value)?;
        let offset = self.placement.slot_offset + element_offset(&self.placement, index)?;
        set_cells(&self.arena, &self.placement, offset, value)
    }
}

/// The values at `offset` in every slot that counts.
pub(crate) fn cells(
    arena: &Arena,
    placement: &MapPlacement,
    offset: u64,
) -> Result<Vec<Vec<u8>>, MapError> {
    let one = |slot| {
        let mut value = value_buffer(placement);
        let loaded = arena.memory().load(arena.slot_offset(slot) + offset, &mut value);
        loaded.map(|()| value).ok_or(MapError::Damaged)
    };
    (0..arena.readable_slots()).map(one).collect()
}

/// Slot 0's value at `offset` becomes `value`, those of the other slots zeros.
pub(crate) fn set_cells(
    arena: &Arena,
    placement: &MapPlacement,
    offset: u64,
    value: &[u8],
) -> Result<(), MapError> {
    let memory = arena.memory();
    memory.store(arena.slot_offset(0) + offset, Bytes::from(value)).ok_or(MapError::Damaged)?;
    for slot in 1..arena.readable_slots() {
        let size = u64::from(placement.value_size_bytes);
        memory.zero(arena.slot_offset(slot) + offset, size).ok_or(MapError::Damaged)?;
    }
    Ok(())
}

/// What is in a lock is nobody's business.
pub(crate) fn hide_lock(placement: &MapPlacement, value: &mut [u8]) {
    let Some(start) = placement.lock_offset else { return };
    let range = to_usize(u64::from(start))..to_usize(u64::from(start) + u64::from(LOCK_BYTES));
    if let Some(lock) = value.get_mut(range) {
        lock.fill(0);
    }
}

pub(crate) fn value_buffer(placement: &MapPlacement) -> Vec<u8> {
    vec![0; to_usize(u64::from(placement.value_size_bytes))]
}

pub(crate) fn check_value(placement: &MapPlacement, value: &[u8]) -> Result<(), MapError> {
    let expected_bytes = placement.value_size_bytes;
    if value.len() as u64 == u64::from(expected_bytes) {
        Ok(())
    } else {
        Err(MapError::ValueSize { expected_bytes, found_bytes: value.len() })
    }
}

pub(crate) fn element_offset(placement: &MapPlacement, index: u32) -> Result<u64, MapError> {
    let max_entries = placement.max_entries;
    if index < max_entries {
        Ok(u64::from(index) * u64::from(placement.value_stride))
    } else {
        Err(MapError::OutOfRange { index, max_entries })
    }
}
