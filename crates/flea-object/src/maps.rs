//! Map definitions: structures of pointers in the section `.maps`, whose types say it all.
//!
//! ```c
//!   struct {
//!       __uint(type, BPF_MAP_TYPE_HASH);     // int (*type)[1]: the array's length is the value
//!       __uint(max_entries, 100);
//!       __type(key, u64);                    // u64 *key: the pointer's target is the type
//!       __type(value, struct event);
//!   } events SEC(".maps");
//! ```
//!
//! Limits are Linux's (`kernel/bpf/{arraymap,hashtab,ringbuf}.c`, 6.18), so that what is
//! accepted here would be there.

mod inner;
mod lock;

use std::collections::HashMap;

use crate::btf::{Btf, Kind};
use crate::elf::{Elf, Section, SectionIdx};
use crate::error::ObjectError;
use crate::spec::{MapIdx, MapKind, MapSpec};

use crate::prog_array::{self, FilledArray};
use inner::{Outer, Values};

pub use lock::LOCK_BYTES;

const PAGE_BYTES: u32 = 4096;
/// An element of a program array: in Linux, a file descriptor.
const PROGRAM_BYTES: u32 = 4;
/// Bytes of a map of maps' value, as user space sees it: a file descriptor in Linux.
const MAP_VALUE_BYTES: u32 = 4;
/// A hash key is on the program's stack (Linux: `MAX_BPF_STACK`).
const MAX_HASH_KEY_BYTES: u32 = 512;
/// Linux: `KMALLOC_MAX_SIZE` less the element's header.
const MAX_HASH_VALUE_BYTES: u32 = (4 << 20) - 1024;
/// Linux: `INT_MAX`.
const MAX_ARRAY_VALUE_BYTES: u32 = i32::MAX.cast_unsigned();
/// Linux: `PCPU_MIN_UNIT_SIZE`.
const MAX_PER_CPU_VALUE_BYTES: u32 = 32 << 10;
/// The largest `.data`, `.rodata` or `.bss`.
pub(crate) const MAX_GLOBAL_DATA_BYTES: u64 = 64 << 20;

const BPF_F_NO_PREALLOC: u32 = 1 << 0;
const BPF_F_ZERO_SEED: u32 = 1 << 6;
/// Programs may only read the map.
pub(crate) const BPF_F_RDONLY_PROG: u32 = 1 << 7;
const BPF_F_MMAPABLE: u32 = 1 << 10;
/// Arrays with it may be put into a map of maps whatever their number of elements.
pub(crate) const BPF_F_INNER_MAP: u32 = 1 << 12;

/// A map that cannot be had, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("map '{map}': {fault}")]
pub struct MapError {
    /// Its name; the section's name where the whole section is at fault.
    pub map: String,
    /// Why.
    pub fault: MapFault,
}

/// What can be wrong with a map.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapFault {
    /// Maps as they were before BTF.
    #[error(
        "section '{section}' holds legacy map definitions; declare maps in SEC(\".maps\") with __uint and __type"
    )]
    Legacy {
        /// The section.
        section: String,
    },
    /// No type information.
    #[error("there are no types to read the definition from; compile with -g")]
    NoBtf,
    /// The variable is not a structure as above, or has no symbol in `.maps`.
    #[error("is not a structure of __uint and __type members in SEC(\".maps\")")]
    NotADefinition,
    /// A member that has no meaning, or none here.
    #[error(
        "member '{member}' is not supported; type, max_entries, map_flags, key, value, key_size and value_size are, and values for a PROG_ARRAY"
    )]
    UnsupportedMember {
        /// Its name.
        member: String,
    },
    /// A member is no `__uint` or `__type`.
    #[error("member '{member}' is not of the form that __uint or __type gives it")]
    BadMember {
        /// Its name.
        member: String,
    },
    /// `key` and `key_size`, or `value` and `value_size`, disagree.
    #[error("'{member}' says {first} bytes and its size member {second}")]
    Conflict {
        /// `key` or `value`.
        member: &'static str,
        /// The size seen first.
        first: u32,
        /// And then.
        second: u32,
    },
    /// A type that this build does not have.
    #[error(
        "map type {kind} ({name}) is not supported; HASH, ARRAY, PERCPU_HASH, PERCPU_ARRAY, PROG_ARRAY, ARRAY_OF_MAPS, HASH_OF_MAPS and RINGBUF are"
    )]
    UnsupportedKind {
        /// Linux's number.
        kind: u32,
        /// Linux's name.
        name: &'static str,
    },
    /// A size that the type does not allow.
    #[error("{what} is {value}; {expected}")]
    BadSize {
        /// `key_size`, `value_size` or `max_entries`.
        what: &'static str,
        /// As given.
        value: u32,
        /// What the type allows.
        expected: &'static str,
    },
    /// Flags that the type does not know.
    #[error("map_flags {flags:#x}: the bits {unknown:#x} are not supported for this map type")]
    UnsupportedFlags {
        /// As given.
        flags: u32,
        /// The bits at fault.
        unknown: u32,
    },
    /// A value with more than one lock.
    #[error(
        "the value has a struct bpf_spin_lock at {first} and one at {second}; there may be one"
    )]
    TwoLocks {
        /// Offset of one of them.
        first: u32,
        /// And of another.
        second: u32,
    },
    /// A lock that is no whole, aligned part of the value.
    #[error("the struct bpf_spin_lock at {offset} is not aligned to 4, or not inside the value")]
    BadLock {
        /// Its offset.
        offset: u32,
    },
    /// A lock where there can be none.
    #[error(
        "the value has a struct bpf_spin_lock, which only HASH and ARRAY maps that programs may write can have"
    )]
    LockHere,
    /// A map of maps that does not say of which.
    #[error("is a map of maps: __array(values, struct ...) has to say of which maps")]
    NoInner,
    /// A map of maps of maps.
    #[error("is a map of maps inside one, which there cannot be")]
    Nested,
    /// A map of program arrays.
    #[error("is a program array inside a map of maps, where there cannot be one")]
    ProgramsInside,
    /// Something else than a map's address among the initial values.
    #[error(
        "its initial value at offset {offset} is not the address of a map: write .values = {{ [0] = &map }}"
    )]
    BadInit {
        /// From the start of the variable.
        offset: u64,
    },
    /// An initial value of another shape.
    #[error(
        "values[{slot}] is '{inner}', which is not as `values` declares: type, key_size, value_size, map_flags and the place of a lock must be the same, and an array's max_entries unless its map_flags have BPF_F_INNER_MAP"
    )]
    WrongInner {
        /// Its index.
        slot: u32,
        /// The map.
        inner: String,
    },
    /// An initial value that has no place.
    #[error(
        "values[{slot}] = &{inner} has no place: an index is below max_entries, a hash has room for so many maps, and its keys have 4 bytes"
    )]
    NoSuchSlot {
        /// Its index.
        slot: u32,
        /// The map.
        inner: String,
    },
    /// A data section that is too large, or too large beside others.
    #[error("{size_bytes} bytes of global data; at most {MAX_GLOBAL_DATA_BYTES} are allowed")]
    TooMuchData {
        /// How large.
        size_bytes: u64,
    },
    /// A data section whose contents depend on addresses.
    #[error(
        "global data at offset {offset:#x} holds the address of '{symbol}', which is not supported; set it in code"
    )]
    AddressInData {
        /// Where.
        offset: u64,
        /// What of.
        symbol: String,
    },
    /// An address in a definition, at a place that holds none.
    #[error(
        "its definition holds the address of '{symbol}' at offset {offset}; only values of a PROG_ARRAY hold some"
    )]
    AddressInDefinition {
        /// From the definition's start.
        offset: u64,
        /// What of.
        symbol: String,
    },
    /// A value of a program array that is something else.
    #[error("values[{index}] is '{symbol}', which is no program: a global function with a SEC is")]
    NotAProgram {
        /// Which.
        index: u32,
        /// Its name.
        symbol: String,
    },
    /// More values than elements.
    #[error("values[{index}] is past its end: max_entries is {max_entries}")]
    TooManyValues {
        /// Which.
        index: u32,
        /// How many there can be.
        max_entries: u32,
    },
}

/// The maps of `.maps`.
#[derive(Debug, Default)]
pub(crate) struct Declared {
    /// In the order of the section, then the templates of maps of maps.
    pub maps: Vec<MapSpec>,
    /// Where a map's variable is in the section, and its index.
    pub at: HashMap<i64, u32>,
    /// Program arrays that are filled where they are declared.
    pub program_arrays: Vec<FilledArray>,
    /// Where global data sections have a lock.
    pub data_locks: HashMap<SectionIdx, u32>,
}

/// Reads every map of `.maps`.
pub(crate) fn read_declared(elf: &Elf<'_>, btf: Option<&Btf<'_>>) -> Result<Declared, ObjectError> {
    let legacy = |s: &&Section<'_>| s.name == "maps" || s.name.starts_with("maps/");
    if let Some(section) = elf.sections.iter().find(legacy) {
        let fault = MapFault::Legacy { section: section.name.clone() };
        return Err(fault.of(&section.name).into());
    }
    let mut declared = Declared::default();
    if let Some(btf) = btf {
        declared.data_locks = lock::find_in_data(elf, btf)?;
    }
    let Some(section) = elf.section_named(".maps") else {
        return Ok(declared);
    };
    let btf = btf.ok_or_else(|| MapFault::NoBtf.of(".maps"))?;
    let in_section = elf.symbols.iter().filter(|s| s.section == Some(section.idx));
    let places: HashMap<&str, _> =
        in_section.map(|s| (s.name.as_str(), (s.value, s.size_bytes))).collect();
    let mut found = Vec::new();
    for (name, type_id) in btf.data_section(".maps")? {
        let place = *places.get(name).ok_or_else(|| MapFault::NotADefinition.of(name))?;
        found.push((place, read_definition(btf, name, type_id)?));
    }
    found.sort_by_key(|(place, _)| *place);
    let mut outers = Vec::new();
    for ((start, size_bytes), Definition { spec, values, programs_offset }) in found {
        let map = declared.maps.len();
        let end = start.saturating_add(size_bytes);
        outers.extend(values.map(|values| Outer { map, start, end, values }));
        let index = u32::try_from(map).expect("a map takes bytes of the file");
        let (name, max_entries) = (&spec.name, spec.max_entries);
        declared.program_arrays.extend(programs_offset.map(|values_offset| FilledArray {
            map: MapIdx(index),
            name: name.clone(),
            max_entries,
            place: start..end,
            values_offset,
        }));
        declared.at.insert(i64::try_from(start).unwrap_or(i64::MAX), index);
        declared.maps.push(spec);
    }
    inner::complete(elf, btf, section, &outers, &mut declared)?;
    Ok(declared)
}

/// The map that a `.data`, `.rodata` or `.bss` section becomes, beside `held_bytes` of others: a
/// small file can have any number of large sections of zeros.
pub(crate) fn global_data(
    elf: &Elf<'_>,
    section: &Section<'_>,
    held_bytes: u64,
    lock_offset: Option<u32>,
) -> Result<MapSpec, MapError> {
    let name = section.name.as_str();
    if let Some(relocation) = section.relocations.first() {
        let symbol = elf.symbols.get(relocation.symbol).map_or("", |s| s.name.as_str());
        let fault =
            MapFault::AddressInData { offset: relocation.offset, symbol: symbol.to_owned() };
        return Err(fault.of(name));
    }
    let size_bytes = section.size_bytes;
    let all_bytes = held_bytes.saturating_add(size_bytes);
    if all_bytes > MAX_GLOBAL_DATA_BYTES {
        return Err(MapFault::TooMuchData { size_bytes: all_bytes }.of(name));
    }
    let value_size_bytes =
        u32::try_from(size_bytes).expect("MAX_GLOBAL_DATA_BYTES is far below u32::MAX");
    // `.bss` has no bytes in the file; its memory is zeros.
    let mut bytes = section.data.to_vec();
    bytes.resize(value_size_bytes as usize, 0);
    let read_only = name == ".rodata" || name.starts_with(".rodata.");
    let spec = MapSpec {
        name: name.to_owned(),
        kind: MapKind::Array,
        key_size_bytes: 4,
        value_size_bytes,
        max_entries: 1,
        flags: if read_only { BPF_F_RDONLY_PROG } else { 0 },
        init: Some(bytes),
        read_only,
        lock_offset,
        ..MapSpec::default()
    };
    lock::check(&spec).map_err(|fault| fault.of(name))?;
    Ok(spec)
}

/// Whether a section of this name becomes a map.
pub(crate) fn is_global_data(name: &str) -> bool {
    [".data", ".rodata", ".bss"].iter().any(|base| {
        name.strip_prefix(base).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    })
}

/// A map, and what its definition says of what is in it.
struct Definition {
    spec: MapSpec,
    /// Of a map of maps.
    values: Option<Values>,
    /// Where in the structure those of a program array begin.
    programs_offset: Option<u64>,
}

/// What the members of a definition say, before it is known whether they fit together.
#[derive(Default)]
struct Members {
    kind: Option<u32>,
    max_entries: u32,
    flags: u32,
    key_size_bytes: Option<u32>,
    value_size_bytes: Option<u32>,
    lock_offset: Option<u32>,
}

/// The map that the structure `type_id` defines, and what it says of the maps inside.
fn read_definition(btf: &Btf<'_>, map: &str, type_id: u32) -> Result<Definition, ObjectError> {
    let Kind::Struct { members, .. } = &btf.resolve(type_id)?.kind else {
        return Err(MapFault::NotADefinition.of(map).into());
    };
    let mut definition = Members::default();
    let (mut values, mut programs_offset) = (None, None);
    for member in members {
        let bad = || MapFault::BadMember { member: member.name.to_owned() }.of(map);
        let unsupported = || MapFault::UnsupportedMember { member: member.name.to_owned() };
        let uint = || read_uint(btf, member.type_id)?.ok_or_else(|| ObjectError::from(bad()));
        match member.name {
            "type" => definition.kind = Some(uint()?),
            "max_entries" => definition.max_entries = uint()?,
            "map_flags" => definition.flags = uint()?,
            "key_size" => set_size(&mut definition.key_size_bytes, "key", uint()?, map)?,
            "value_size" => set_size(&mut definition.value_size_bytes, "value", uint()?, map)?,
            "key" | "value" => {
                let Kind::Ptr { to } = btf.resolve(member.type_id)?.kind else {
                    return Err(bad().into());
                };
                let size = btf.size_bytes(to)?;
                if member.name == "key" {
                    set_size(&mut definition.key_size_bytes, "key", size, map)?;
                } else {
                    set_size(&mut definition.value_size_bytes, "value", size, map)?;
                    definition.lock_offset = lock::find(btf, to, map)?;
                }
            }
            // Behind the others, as libbpf wants it: the type is known by now.
            "values" if definition.kind == Some(MapKind::ProgArray as u32) => {
                if !prog_array::are_program_pointers(btf, member.type_id)? {
                    return Err(bad().into());
                }
                set_size(&mut definition.value_size_bytes, "value", PROGRAM_BYTES, map)?;
                programs_offset = Some(u64::from(member.bit_offset / 8));
            }
            "values" => {
                let read = Values::read(btf, member.type_id, member.bit_offset)?;
                values = Some(read.ok_or_else(|| unsupported().of(map))?);
            }
            // Harmless where they ask for nothing: no pinning, no node, no extra.
            "pinning" | "numa_node" | "map_extra" if uint()? == 0 => {}
            _ => return Err(unsupported().of(map).into()),
        }
    }
    let holds_maps = definition.kind.and_then(kind_from_number).is_some_and(MapKind::holds_maps);
    match values {
        Some(_) if !holds_maps => {
            Err(MapFault::UnsupportedMember { member: "values".to_owned() }.of(map).into())
        }
        None if holds_maps => Err(MapFault::NoInner.of(map).into()),
        _ => Ok(Definition { spec: definition.into_spec(map)?, values, programs_offset }),
    }
}

/// `__uint(x, N)` is `int (*x)[N]`.
fn read_uint(btf: &Btf<'_>, type_id: u32) -> Result<Option<u32>, ObjectError> {
    let Kind::Ptr { to } = btf.resolve(type_id)?.kind else {
        return Ok(None);
    };
    match btf.resolve(to)?.kind {
        Kind::Array { n_elements, .. } => Ok(Some(n_elements)),
        _ => Ok(None),
    }
}

fn set_size(
    size: &mut Option<u32>,
    member: &'static str,
    bytes: u32,
    map: &str,
) -> Result<(), MapError> {
    match *size {
        Some(first) if first != bytes => {
            Err(MapFault::Conflict { member, first, second: bytes }.of(map))
        }
        _ => {
            *size = Some(bytes);
            Ok(())
        }
    }
}

impl Members {
    fn into_spec(self, name: &str) -> Result<MapSpec, MapError> {
        let number = self.kind.unwrap_or(0);
        let kind = kind_from_number(number).ok_or_else(|| {
            MapFault::UnsupportedKind { kind: number, name: kind_name(number) }.of(name)
        })?;
        let default_value_size = if kind.holds_maps() { MAP_VALUE_BYTES } else { 0 };
        let spec = MapSpec {
            name: name.to_owned(),
            kind,
            key_size_bytes: self.key_size_bytes.unwrap_or(0),
            value_size_bytes: self.value_size_bytes.unwrap_or(default_value_size),
            max_entries: self.max_entries,
            flags: self.flags,
            init: None,
            read_only: self.flags & BPF_F_RDONLY_PROG != 0,
            lock_offset: self.lock_offset,
            ..MapSpec::default()
        };
        spec.check()?;
        Ok(spec)
    }
}

impl MapSpec {
    /// Whether sizes and flags are such as the map's type allows. Maps from [`crate::parse`]
    /// have passed; those made in code should.
    ///
    /// # Errors
    /// [`MapError`] with the first thing that Linux would not take either.
    pub fn check(&self) -> Result<(), MapError> {
        check_sizes(self).and_then(|()| lock::check(self)).map_err(|fault| fault.of(&self.name))?;
        let allowed = match self.kind {
            MapKind::Array => BPF_F_RDONLY_PROG | BPF_F_MMAPABLE | BPF_F_INNER_MAP,
            MapKind::PerCpuArray => BPF_F_RDONLY_PROG,
            MapKind::Hash | MapKind::PerCpuHash => {
                BPF_F_NO_PREALLOC | BPF_F_ZERO_SEED | BPF_F_RDONLY_PROG
            }
            MapKind::HashOfMaps => BPF_F_NO_PREALLOC | BPF_F_ZERO_SEED,
            MapKind::ArrayOfMaps | MapKind::RingBuf | MapKind::ProgArray => 0,
        };
        let (flags, unknown) = (self.flags, self.flags & !allowed);
        if unknown != 0 {
            return Err(MapFault::UnsupportedFlags { flags, unknown }.of(&self.name));
        }
        Ok(())
    }
}

fn check_sizes(spec: &MapSpec) -> Result<(), MapFault> {
    let size = |what, value, ok: bool, expected| {
        if ok { Ok(()) } else { Err(MapFault::BadSize { what, value, expected }) }
    };
    let (key, value, n) = (spec.key_size_bytes, spec.value_size_bytes, spec.max_entries);
    match spec.kind {
        MapKind::Array | MapKind::PerCpuArray | MapKind::ArrayOfMaps => {
            size("key_size", key, key == 4, "an array's key is 4 bytes")?;
        }
        MapKind::ProgArray => {
            size("key_size", key, key == 4, "an array's key is 4 bytes")?;
            let expected = "a program array's value is 4 bytes";
            size("value_size", value, value == PROGRAM_BYTES, expected)?;
        }
        MapKind::Hash | MapKind::PerCpuHash | MapKind::HashOfMaps => {
            let ok = (1..=MAX_HASH_KEY_BYTES).contains(&key);
            size("key_size", key, ok, "a hash key is 1 to 512 bytes")?;
        }
        MapKind::RingBuf => {
            size("key_size", key, key == 0, "a ring buffer has no keys")?;
            size("value_size", value, value == 0, "a ring buffer has no values")?;
            let ok = n.is_power_of_two() && n >= PAGE_BYTES;
            let expected = "a ring buffer's bytes are a power of two, at least 4096";
            return size("max_entries", n, ok, expected);
        }
    }
    if spec.kind.holds_maps() {
        let expected = "a map in a map of maps takes 4 bytes";
        size("value_size", value, value == MAP_VALUE_BYTES, expected)?;
    }
    let (max, expected) = match spec.kind {
        MapKind::Array => (MAX_ARRAY_VALUE_BYTES, "an array's value is 1 to 2147483647 bytes"),
        MapKind::Hash => (MAX_HASH_VALUE_BYTES, "a hash value is 1 to 4193280 bytes"),
        _ => (MAX_PER_CPU_VALUE_BYTES, "a per-CPU value is 1 to 32768 bytes"),
    };
    size("value_size", value, (1..=max).contains(&value), expected)?;
    size("max_entries", n, n > 0, "a map has at least one element")
}

fn kind_from_number(number: u32) -> Option<MapKind> {
    MapKind::ALL.iter().copied().find(|k| *k as u32 == number)
}

/// `BPF_MAP_TYPE_*` without the prefix.
fn kind_name(number: u32) -> &'static str {
    #[rustfmt::skip]
    const NAMES: [&str; 35] = [
        "no type", "HASH", "ARRAY", "PROG_ARRAY", "PERF_EVENT_ARRAY", "PERCPU_HASH",
        "PERCPU_ARRAY", "STACK_TRACE", "CGROUP_ARRAY", "LRU_HASH", "LRU_PERCPU_HASH", "LPM_TRIE",
        "ARRAY_OF_MAPS", "HASH_OF_MAPS", "DEVMAP", "SOCKMAP", "CPUMAP", "XSKMAP", "SOCKHASH",
        "CGROUP_STORAGE", "REUSEPORT_SOCKARRAY", "PERCPU_CGROUP_STORAGE", "QUEUE", "STACK",
        "SK_STORAGE", "DEVMAP_HASH", "STRUCT_OPS", "RINGBUF", "INODE_STORAGE", "TASK_STORAGE",
        "BLOOM_FILTER", "USER_RINGBUF", "CGRP_STORAGE", "ARENA", "INSN_ARRAY",
    ];
    NAMES.get(number as usize).copied().unwrap_or("unknown")
}
