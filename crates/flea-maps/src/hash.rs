//! HASH and PERCPU_HASH: the runtime's table, with a geometry that comes from the plan.

use std::sync::atomic::Ordering::Relaxed;
use std::thread;

use flea_layout::plan::MapPlacement;
use flea_object::spec::MapKind;
use flea_runtime::errno::Errno;
use flea_runtime::hash::change::{BPF_ANY, BPF_EXIST, BPF_F_LOCK, BPF_NOEXIST, Caller, Cells};
use flea_runtime::hash::{Geometry, NodeIdx, Table, Values, state};
use flea_runtime::mem::{Bytes, low_half, to_usize};
use flea_runtime::sys;

use crate::arena::Arena;
use crate::array::{cells, check_value, hide_lock, set_cells, value_buffer};
use crate::error::MapError;

/// Tries at a lock that stays taken, each a bounded wait of its own.
const LOCK_TRIES: u32 = 4;
/// Tries at reading a per-CPU element that keeps moving.
const READ_TRIES: u32 = 100;

/// What an update may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Update {
    /// `BPF_ANY`: make or change the element.
    Any,
    /// `BPF_NOEXIST`: only make it.
    NoExist,
    /// `BPF_EXIST`: only change it.
    Exist,
}

impl Update {
    pub(crate) fn flags(self) -> u64 {
        match self {
            Self::Any => BPF_ANY,
            Self::NoExist => BPF_NOEXIST,
            Self::Exist => BPF_EXIST,
        }
    }
}

/// A `BPF_MAP_TYPE_HASH`.
#[derive(Clone, Debug)]
pub struct HashMap {
    arena: Arena,
    placement: MapPlacement,
}

/// A `BPF_MAP_TYPE_PERCPU_HASH`: a value per element and slot, that is, per thread.
#[derive(Clone, Debug)]
pub struct PerCpuHashMap {
    arena: Arena,
    placement: MapPlacement,
}

impl HashMap {
    pub(crate) fn new(arena: Arena, placement: MapPlacement) -> Self {
        Self { arena, placement }
    }

    /// The value of `key`. A lock in it reads as zeros.
    ///
    /// # Errors
    /// [`MapError::KeySize`]
    pub fn lookup(&self, key: &[u8]) -> Result<Option<Vec<u8>>, MapError> {
        self.read(key, |_, _| Ok(()))
    }

    /// The value of `key`, read while its lock is held (`BPF_F_LOCK`): programs that change it
    /// under the lock are before or behind, never in between.
    ///
    /// # Errors
    /// [`MapError::KeySize`], [`MapError::NoLock`], [`MapError::Busy`]
    pub fn lookup_locked(&self, key: &[u8]) -> Result<Option<Vec<u8>>, MapError> {
        self.placement.lock_offset.ok_or(MapError::NoLock)?;
        let caller = caller(&self.arena)?;
        self.read(key, |table, node| {
            patiently(|| table.lock_value(&caller, node)).map_err(|e| explain(e, &self.placement))
        })
    }

    /// Copies the value of `key` while what `hold` returns for its element lives.
    fn read<'a, H>(
        &'a self,
        key: &[u8],
        hold: impl Fn(&Table<'a>, NodeIdx) -> Result<H, MapError>,
    ) -> Result<Option<Vec<u8>>, MapError> {
        check_key(&self.placement, key)?;
        let table = table(&self.arena, &self.placement)?;
        let (mut found, mut value) = (key.to_vec(), value_buffer(&self.placement));
        for _ in 0..READ_TRIES {
            let Some(node) = table.find(Bytes::from(key)) else { return Ok(None) };
            let _held = hold(&table, node)?;
            // The node may have become another key's in between: look again.
            if table.snapshot(node, &mut found, &mut value) == Some(true) && found == key {
                hide_lock(&self.placement, &mut value);
                return Ok(Some(value));
            }
        }
        Err(MapError::Busy)
    }

    /// Sets the value of `key`, all but a lock in it.
    ///
    /// # Errors
    /// Sizes; [`MapError::Exists`], [`MapError::NotFound`], [`MapError::Full`],
    /// [`MapError::Busy`].
    pub fn update(&self, key: &[u8], value: &[u8], mode: Update) -> Result<(), MapError> {
        update(&self.arena, &self.placement, key, value, mode.flags())
    }

    /// Sets the value of `key` while the lock of an element that is there is held
    /// (`BPF_F_LOCK`).
    ///
    /// # Errors
    /// As [`HashMap::update`]; [`MapError::NoLock`].
    pub fn update_locked(&self, key: &[u8], value: &[u8], mode: Update) -> Result<(), MapError> {
        self.placement.lock_offset.ok_or(MapError::NoLock)?;
        update(&self.arena, &self.placement, key, value, mode.flags() | BPF_F_LOCK)
    }

    /// Takes `key` out.
    ///
    /// # Errors
    /// [`MapError::KeySize`], [`MapError::NotFound`], [`MapError::Busy`].
    pub fn delete(&self, key: &[u8]) -> Result<(), MapError> {
        delete(&self.arena, &self.placement, key)
    }

    /// Every key and value, in no order. What changes meanwhile may be seen or missed.
    #[must_use]
    pub fn iter(&self) -> Iter<'_> {
        Iter { map: self, next: 0 }
    }

    /// Every key, in no order.
    pub fn keys(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        self.iter().map(|(key, _)| key)
    }
}

/// Of [`HashMap::iter`].
#[derive(Debug)]
pub struct Iter<'a> {
    map: &'a HashMap,
    next: u32,
}

impl Iterator for Iter<'_> {
    type Item = (Vec<u8>, Vec<u8>);

    fn next(&mut self) -> Option<Self::Item> {
        let map = self.map;
        let mut value = value_buffer(&map.placement);
        let (_, key) = next_element(&map.arena, &map.placement, &mut self.next, &mut value)?;
        hide_lock(&map.placement, &mut value);
        Some((key, value))
    }
}

impl<'a> IntoIterator for &'a HashMap {
    type Item = (Vec<u8>, Vec<u8>);
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

impl PerCpuHashMap {
    pub(crate) fn new(arena: Arena, placement: MapPlacement) -> Self {
        Self { arena, placement }
    }

    /// The values of `key`, one per slot in use.
    ///
    /// # Errors
    /// [`MapError::KeySize`]
    pub fn lookup(&self, key: &[u8]) -> Result<Option<Vec<Vec<u8>>>, MapError> {
        check_key(&self.placement, key)?;
        let table = table(&self.arena, &self.placement)?;
        for _ in 0..READ_TRIES {
            let Some(node) = table.find(Bytes::from(key)) else { return Ok(None) };
            let values = cells(&self.arena, &self.placement, self.cell_offset(node))?;
            if table.find(Bytes::from(key)) == Some(node) {
                return Ok(Some(values));
            }
        }
        Err(MapError::Busy)
    }

    /// Makes `value` the sum of the values of `key`: slot 0 gets it, the others zeros.
    ///
    /// # Errors
    /// As [`HashMap::update`].
    pub fn update(&self, key: &[u8], value: &[u8], mode: Update) -> Result<(), MapError> {
        update(&self.arena, &self.placement, key, value, mode.flags())?;
        let table = table(&self.arena, &self.placement)?;
        match table.find(Bytes::from(key)) {
            Some(node) => set_cells(&self.arena, &self.placement, self.cell_offset(node), value),
            // Somebody has taken it out since.
            None => Ok(()),
        }
    }

    /// Takes `key` out.
    ///
    /// # Errors
    /// As [`HashMap::delete`].
    pub fn delete(&self, key: &[u8]) -> Result<(), MapError> {
        delete(&self.arena, &self.placement, key)
    }

    /// Every key and its values, in no order. What changes meanwhile may be seen or missed.
    #[must_use]
    pub fn iter(&self) -> PerCpuIter<'_> {
        PerCpuIter { map: self, next: 0 }
    }

    /// Every key, in no order.
    pub fn keys(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            next_element(&self.arena, &self.placement, &mut next, &mut []).map(|(_, key)| key)
        })
    }

    fn cell_offset(&self, node: NodeIdx) -> u64 {
        let stride = u64::from(self.placement.value_stride);
        self.placement.slot_offset + u64::from(node.0) * stride
    }
}

/// Of [`PerCpuHashMap::iter`].
#[derive(Debug)]
pub struct PerCpuIter<'a> {
    map: &'a PerCpuHashMap,
    next: u32,
}

impl Iterator for PerCpuIter<'_> {
    type Item = (Vec<u8>, Vec<Vec<u8>>);

    fn next(&mut self) -> Option<Self::Item> {
        let map = self.map;
        let (node, key) = next_element(&map.arena, &map.placement, &mut self.next, &mut [])?;
        Some((key, cells(&map.arena, &map.placement, map.cell_offset(node)).ok()?))
    }
}

impl<'a> IntoIterator for &'a PerCpuHashMap {
    type Item = (Vec<u8>, Vec<Vec<u8>>);
    type IntoIter = PerCpuIter<'a>;

    fn into_iter(self) -> PerCpuIter<'a> {
        self.iter()
    }
}

pub(crate) fn table<'a>(arena: &'a Arena, placement: &MapPlacement) -> Result<Table<'a>, MapError> {
    let geometry = Geometry {
        key_size_bytes: placement.key_size_bytes,
        value_size_bytes: placement.value_size_bytes,
        value_stride: placement.value_stride,
        max_entries: placement.max_entries,
        values: match placement.kind {
            MapKind::PerCpuHash => Values::InSlots { slot_offset: placement.slot_offset },
            _ => Values::InNode,
        },
        lock_offset: placement.lock_offset,
    };
    let state = arena.state(placement).ok_or(MapError::Damaged)?;
    let data = arena.memory().part(placement.data_offset, placement.data_size_bytes);
    Table::new(geometry, state, data.ok_or(MapError::Damaged)?).ok_or(MapError::Damaged)
}

pub(crate) fn update(
    arena: &Arena,
    placement: &MapPlacement,
    key: &[u8],
    value: &[u8],
    flags: u64,
) -> Result<(), MapError> {
    check_key(placement, key)?;
    check_value(placement, value)?;
    let table = table(arena, placement)?;
    let caller = caller(arena)?;
    let (key, value) = (Bytes::from(key), Bytes::from(value));
    patiently(|| table.update(&caller, key, value, flags)).map_err(|e| explain(e, placement))
}

pub(crate) fn delete(arena: &Arena, placement: &MapPlacement, key: &[u8]) -> Result<(), MapError> {
    check_key(placement, key)?;
    let table = table(arena, placement)?;
    let caller = caller(arena)?;
    let deleted = patiently(|| table.delete(&caller, Bytes::from(key)));
    deleted.map_err(|e| explain(e, placement))
}

/// This thread, with slot 0 for its values.
pub(crate) fn caller(arena: &Arena) -> Result<Caller<'_>, MapError> {
    let stride = arena.plan().slot_stride;
    let size_bytes = stride * u64::from(arena.readable_slots());
    let slots = arena.memory().part(arena.plan().slots_offset, size_bytes);
    let cells = Cells { slots: slots.ok_or(MapError::Damaged)?, stride, own: 0 };
    Ok(Caller { tid: sys::gettid(), cells, held: None })
}

/// Tries again while the bucket or value is locked, a bounded number of times.
pub(crate) fn patiently<T>(mut change: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    for _ in 1..LOCK_TRIES {
        match change() {
            Err(Errno::EBUSY) => thread::yield_now(),
            done => return done,
        }
    }
    change()
}

pub(crate) fn explain(errno: Errno, placement: &MapPlacement) -> MapError {
    match errno {
        Errno::EEXIST => MapError::Exists,
        Errno::ENOENT => MapError::NotFound,
        Errno::E2BIG => MapError::Full { max_entries: placement.max_entries },
        Errno::EBUSY => MapError::Busy,
        _ => MapError::Damaged,
    }
}

pub(crate) fn check_key(placement: &MapPlacement, key: &[u8]) -> Result<(), MapError> {
    let expected_bytes = placement.key_size_bytes;
    if key.len() as u64 == u64::from(expected_bytes) {
        Ok(())
    } else {
        Err(MapError::KeySize { expected_bytes, found_bytes: key.len() })
    }
}

/// The next element from node `*next` on, in the order of nodes: each at most once, however
/// broken the chains are.
pub(crate) fn next_element(
    arena: &Arena,
    placement: &MapPlacement,
    next: &mut u32,
    value: &mut [u8],
) -> Option<(NodeIdx, Vec<u8>)> {
    let table = table(arena, placement).ok()?;
    let used = arena.state(placement)?.word(state::USED * 8)?.load(Relaxed);
    let end = low_half(used.min(u64::from(placement.max_entries)));
    let mut key = vec![0; to_usize(u64::from(placement.key_size_bytes))];
    while *next < end {
        let node = NodeIdx(*next);
        *next += 1;
        if table.snapshot(node, &mut key, value) == Some(true) {
            return Some((node, key));
        }
    }
    None
}
