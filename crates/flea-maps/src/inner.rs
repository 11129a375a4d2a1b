//! ARRAY_OF_MAPS and HASH_OF_MAPS: which map is at an index or key. A value is the offset of the
//! inner map's header in the arena, 0 where there is none: programs and this process see the
//! arena at different addresses.

use std::sync::atomic::Ordering::{Relaxed, Release};

use flea_layout::plan::MapPlacement;
use flea_layout::shared::{MAP_HEADER_BYTES, MAP_HEADERS_OFFSET};
use flea_object::spec::MapIdx;
use flea_runtime::mem::{Bytes, to_usize};

use crate::arena::Arena;
use crate::array::element_offset;
use crate::error::MapError;
use crate::hash::{Update, check_key, delete, next_element, table, update};

/// A `BPF_MAP_TYPE_ARRAY_OF_MAPS`.
///
/// What is put in are maps of the same object, any of the template's shape. A program that has
/// found a map that is taken out meanwhile goes on with it: maps live as long as the object.
#[derive(Clone, Debug)]
pub struct ArrayOfMaps {
    arena: Arena,
    placement: MapPlacement,
}

/// A `BPF_MAP_TYPE_HASH_OF_MAPS`; see [`ArrayOfMaps`].
#[derive(Clone, Debug)]
pub struct HashOfMaps {
    arena: Arena,
    placement: MapPlacement,
}

impl ArrayOfMaps {
    pub(crate) fn new(arena: Arena, placement: MapPlacement) -> Self {
        Self { arena, placement }
    }

    /// How many maps it has room for.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.placement.max_entries
    }

    /// Never: it has all its places, whatever is in them.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The map at `index`.
    ///
    /// # Errors
    /// [`MapError::OutOfRange`], [`MapError::Damaged`]
    pub fn get(&self, index: u32) -> Result<Option<MapIdx>, MapError> {
        let word = self.arena.memory().half(self.place(index)?).ok_or(MapError::Damaged)?;
        map_of(&self.arena, &self.placement, word.load(Relaxed))
    }

    /// Puts `map` at `index`. Programs see it from their next lookup on.
    ///
    /// # Errors
    /// [`MapError::OutOfRange`], [`MapError::NotLoaded`], [`MapError::WrongShape`]
    pub fn set(&self, index: u32, map: MapIdx) -> Result<(), MapError> {
        let value = value_of(&self.arena, &self.placement, map)?;
        self.put(index, value)
    }

    /// Takes the map at `index` out, if there is one.
    ///
    /// # Errors
    /// [`MapError::OutOfRange`]
    pub fn clear(&self, index: u32) -> Result<(), MapError> {
        self.put(index, 0)
    }

    fn put(&self, index: u32, value: u32) -> Result<(), MapError> {
        let word = self.arena.memory().half(self.place(index)?).ok_or(MapError::Damaged)?;
        word.store(value, Release);
        Ok(())
    }

    fn place(&self, index: u32) -> Result<u64, MapError> {
        Ok(self.placement.data_offset + element_offset(&self.placement, index)?)
    }
}

impl HashOfMaps {
    pub(crate) fn new(arena: Arena, placement: MapPlacement) -> Self {
        Self { arena, placement }
    }

    /// The map of `key`.
    ///
    /// # Errors
    /// [`MapError::KeySize`], [`MapError::Damaged`]
    pub fn lookup(&self, key: &[u8]) -> Result<Option<MapIdx>, MapError> {
        check_key(&self.placement, key)?;
        let table = table(&self.arena, &self.placement)?;
        let Some(node) = table.find(Bytes::from(key)) else { return Ok(None) };
        let word = table.value_half(node).ok_or(MapError::Damaged)?;
        map_of(&self.arena, &self.placement, word.load(Relaxed))
    }

    /// Makes `map` the map of `key`. Programs see it from their next lookup on.
    ///
    /// # Errors
    /// As [`crate::HashMap::update`]; [`MapError::NotLoaded`], [`MapError::WrongShape`].
    pub fn update(&self, key: &[u8], map: MapIdx, mode: Update) -> Result<(), MapError> {
        let value = value_of(&self.arena, &self.placement, map)?;
        update(&self.arena, &self.placement, key, &value.to_le_bytes(), mode.flags())
    }

    /// Takes `key` out.
    ///
    /// # Errors
    /// [`MapError::KeySize`], [`MapError::NotFound`], [`MapError::Busy`]
    pub fn delete(&self, key: &[u8]) -> Result<(), MapError> {
        delete(&self.arena, &self.placement, key)
    }

    /// Every key, in no order.
    pub fn keys(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            next_element(&self.arena, &self.placement, &mut next, &mut []).map(|(_, key)| key)
        })
    }
}

/// What is written for `map`.
fn value_of(arena: &Arena, outer: &MapPlacement, map: MapIdx) -> Result<u32, MapError> {
    let maps = &arena.plan().maps;
    let found = maps.get(to_usize(u64::from(map.0))).filter(|found| !found.template);
    let found = found.ok_or(MapError::NotLoaded { index: map, n_maps: maps.len() })?;
    if !fits(arena, outer, found) {
        return Err(MapError::WrongShape { index: map });
    }
    u32::try_from(found.header_offset).map_err(|_| MapError::WrongShape { index: map })
}

/// Which map `value` means. The target may have written it: a map of another shape is none.
fn map_of(arena: &Arena, outer: &MapPlacement, value: u32) -> Result<Option<MapIdx>, MapError> {
    if value == 0 {
        return Ok(None);
    }
    let from_first = u64::from(value).checked_sub(MAP_HEADERS_OFFSET).ok_or(MapError::Damaged)?;
    let index = from_first / MAP_HEADER_BYTES;
    let found = arena.plan().maps.get(to_usize(index)).filter(|found| {
        found.header_offset == u64::from(value) && !found.template && fits(arena, outer, found)
    });
    let index = u32::try_from(index).map_err(|_| MapError::Damaged)?;
    found.map(|_| Some(MapIdx(index))).ok_or(MapError::Damaged)
}

fn fits(arena: &Arena, outer: &MapPlacement, map: &MapPlacement) -> bool {
    let template = outer.inner.and_then(|t| arena.plan().maps.get(to_usize(u64::from(t.0))));
    template.is_some_and(|template| map.shape().fits(template.shape()))
}
