//! Where everything of one arena goes: computed once when an object is loaded, used by the
//! compiler (offsets become immediates) and by the controller (it lays the arena out).

use flea_object::spec::{MapIdx, MapKind, MapSpec, Shape};

pub use crate::shared::hash_node_bytes;
use crate::shared::{
    HASH_BUCKET_BYTES, MAP_HEADER_BYTES, MAP_HEADERS_OFFSET, PROGRAM_STATES_OFFSET, ProgramState,
    hash_bucket_count,
};

const PAGE: u64 = 4096;
/// Slots are whole pairs of cache lines: two threads never share one.
const SLOT_ALIGN: u64 = 128;
/// Objects come from strangers: sizes stop growing here, far above what can be mapped, so
/// that sums of them cannot overflow. Whoever maps the arena refuses it.
const ENOUGH: u64 = 1 << 48;
/// Threads that can have a slot at a time.
const MAX_SLOTS: u64 = 1024;
/// Fewer slots where per-thread values are large: address space, not memory.
const MAX_SLOTS_BYTES: u64 = 4 << 30;

/// The layout of one arena. All offsets are from the arena's base unless they say otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaPlan {
    /// One per map, in order.
    pub maps: Vec<MapPlacement>,
    /// Programs with a state in every slot.
    pub n_programs: u32,
    /// Offset of slot 0.
    pub slots_offset: u64,
    /// Bytes between slots.
    pub slot_stride: u64,
    /// Number of slots.
    pub n_slots: u32,
    /// Bytes of the whole arena, whole pages; sparse until touched.
    pub size_bytes: u64,
}

/// Where one map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapPlacement {
    /// Its type.
    pub kind: MapKind,
    /// Bytes per key.
    pub key_size_bytes: u32,
    /// Bytes per value.
    pub value_size_bytes: u32,
    /// Elements, or bytes of a ring buffer.
    pub max_entries: u32,
    /// Its [`crate::shared::MapHeader`].
    pub header_offset: u64,
    /// Its data; 0 for `PERCPU_ARRAY` and `PROG_ARRAY`.
    pub data_offset: u64,
    /// Bytes of its data.
    pub data_size_bytes: u64,
    /// Its values *in a slot* (per-CPU kinds).
    pub slot_offset: u64,
    /// Bytes between values.
    pub value_stride: u32,
    /// `BPF_F_*`
    pub flags: u32,
    /// Where in a value its lock is.
    pub lock_offset: Option<u32>,
    /// It has a header and nothing else: compiled code finds the map that it stands for when it
    /// runs.
    pub template: bool,
    /// The template of a map of maps. Such a map's values are offsets of headers, 0 where there
    /// is no map.
    pub inner: Option<MapIdx>,
}

impl MapPlacement {
    /// What programs count on.
    #[must_use]
    pub fn shape(&self) -> Shape {
        Shape {
            kind: self.kind,
            key_size_bytes: self.key_size_bytes,
            value_size_bytes: self.value_size_bytes,
            max_entries: self.max_entries,
            flags: self.flags,
            lock_offset: self.lock_offset,
        }
    }
}

/// Bytes of table and node memory that a hash map of this shape needs; see
/// `flea-runtime`'s hash map for the layout inside.
#[must_use]
pub fn hash_data_bytes(key_size: u32, value_stride: u32, max_entries: u32) -> u64 {
    let nodes = hash_node_bytes(key_size, value_stride).saturating_mul(u64::from(max_entries));
    nodes.saturating_add(hash_bucket_count(max_entries) * HASH_BUCKET_BYTES)
}

impl ArenaPlan {
    /// Lays out `maps` and the states of `n_programs` programs.
    #[must_use]
    pub fn new(maps: &[MapSpec], n_programs: u32) -> Self {
        let mut slot_bytes =
            PROGRAM_STATES_OFFSET + u64::from(n_programs) * size_of::<ProgramState>() as u64;
        let mut placed = Vec::with_capacity(maps.len());
        for (i, m) in (0u64..).zip(maps) {
            let value_stride = m.value_size_bytes.checked_next_multiple_of(8).unwrap_or(!7);
            let values = (u64::from(value_stride) * u64::from(m.max_entries)).min(ENOUGH);
            let (data_size_bytes, per_thread) = match m.kind {
                _ if m.template => (0, 0),
                MapKind::Array | MapKind::ArrayOfMaps => (values, 0),
                MapKind::PerCpuArray => (0, values),
                MapKind::Hash | MapKind::HashOfMaps => {
                    (hash_data_bytes(m.key_size_bytes, value_stride, m.max_entries), 0)
                }
                MapKind::PerCpuHash => {
                    (hash_data_bytes(m.key_size_bytes, 0, m.max_entries), values)
                }
                MapKind::RingBuf => (u64::from(m.max_entries), 0),
                // Its programs are part of the code.
                MapKind::ProgArray => (0, 0),
            };
            let data_size_bytes = data_size_bytes.min(ENOUGH);
            placed.push(MapPlacement {
                kind: m.kind,
                key_size_bytes: m.key_size_bytes,
                value_size_bytes: m.value_size_bytes,
                max_entries: m.max_entries,
                header_offset: MAP_HEADERS_OFFSET + i * MAP_HEADER_BYTES,
                data_offset: 0,
                data_size_bytes,
                slot_offset: if per_thread > 0 { slot_bytes } else { 0 },
                value_stride,
                flags: m.flags,
                lock_offset: m.lock_offset,
                template: m.template,
                inner: m.inner.as_ref().map(|inner| inner.template),
            });
            slot_bytes = (slot_bytes + per_thread).min(ENOUGH);
        }
        let headers = MAP_HEADERS_OFFSET + maps.len() as u64 * MAP_HEADER_BYTES;
        let slots_offset = headers.next_multiple_of(PAGE);
        let slot_stride = slot_bytes.next_multiple_of(SLOT_ALIGN);
        let n_slots = (MAX_SLOTS_BYTES / slot_stride).clamp(16, MAX_SLOTS);
        let mut end = (slots_offset + n_slots * slot_stride).next_multiple_of(PAGE);
        for m in &mut placed {
            if m.data_size_bytes > 0 {
                m.data_offset = end;
                end = (end + m.data_size_bytes).next_multiple_of(PAGE);
            }
        }
        Self {
            maps: placed,
            n_programs,
            slots_offset,
            slot_stride,
            n_slots: u32::try_from(n_slots).expect("clamped to MAX_SLOTS"),
            size_bytes: end,
        }
    }

    /// Offset *in a slot* of program `index`'s [`ProgramState`].
    #[must_use]
    pub fn program_state_offset(&self, index: u32) -> u64 {
        PROGRAM_STATES_OFFSET + u64::from(index) * size_of::<ProgramState>() as u64
    }
}
