//! Where in a map's value its `struct bpf_spin_lock` is: the value's type says so, as in Linux
//! (`btf_parse_fields` in `kernel/bpf/btf.c`, 6.18).

use std::collections::HashMap;

use super::{MapError, MapFault};
use crate::btf::{Btf, BtfError, Kind};
use crate::elf::{Elf, SectionIdx};
use crate::error::ObjectError;
use crate::spec::{MapKind, MapSpec};

/// `sizeof(struct bpf_spin_lock)`
pub const LOCK_BYTES: u32 = 4;
const LOCK_NAME: &str = "bpf_spin_lock";
/// Structures and arrays around a lock; deeper down it is bytes like others (Linux: 4).
const MAX_DEPTH: u32 = 8;

/// The lock in a value of type `type_id`, which `map` is to have.
pub(super) fn find(btf: &Btf<'_>, type_id: u32, map: &str) -> Result<Option<u32>, ObjectError> {
    let found = Search::new(btf).offsets(type_id, 0)?;
    Ok(only_one(&found).map_err(|fault| fault.of(map))?)
}

/// The locks among the variables of each global data section.
pub(super) fn find_in_data(
    elf: &Elf<'_>,
    btf: &Btf<'_>,
) -> Result<HashMap<SectionIdx, u32>, ObjectError> {
    let mut locks = HashMap::new();
    let mut search = Search::new(btf);
    for section in elf.sections.iter().filter(|s| super::is_global_data(&s.name)) {
        let in_section = elf.symbols.iter().filter(|s| s.section == Some(section.idx));
        // The compiler leaves a variable's offset to the linker: symbols have it already.
        let offsets: HashMap<&str, u64> = in_section.map(|s| (s.name.as_str(), s.value)).collect();
        let mut found = Vec::new();
        for (name, type_id) in btf.data_section(&section.name)? {
            let start = offsets.get(name).and_then(|start| u32::try_from(*start).ok());
            let Some(start) = start else { continue };
            found
                .extend(search.offsets(type_id, 0)?.iter().filter_map(|at| start.checked_add(*at)));
        }
        let only = only_one(&found).map_err(|fault| fault.of(&section.name))?;
        locks.extend(only.map(|offset| (section.idx, offset)));
    }
    Ok(locks)
}

fn only_one(offsets: &[u32]) -> Result<Option<u32>, MapFault> {
    match *offsets {
        [] => Ok(None),
        [offset] => Ok(Some(offset)),
        [first, second, ..] => Err(MapFault::TwoLocks { first, second }),
    }
}

/// Whether `spec`'s lock is where one may be.
pub(super) fn check(spec: &MapSpec) -> Result<(), MapFault> {
    let Some(offset) = spec.lock_offset else { return Ok(()) };
    let fits = offset.checked_add(LOCK_BYTES).is_some_and(|end| end <= spec.value_size_bytes);
    if !fits || !offset.is_multiple_of(LOCK_BYTES) {
        return Err(MapFault::BadLock { offset });
    }
    if !matches!(spec.kind, MapKind::Hash | MapKind::Array) || spec.read_only {
        return Err(MapFault::LockHere);
    }
    Ok(())
}

/// Offsets of locks by type, at most two of each: one is right, and two are as wrong as more.
struct Search<'b, 'a> {
    btf: &'b Btf<'a>,
    known: HashMap<u32, Vec<u32>>,
}

impl<'b, 'a> Search<'b, 'a> {
    fn new(btf: &'b Btf<'a>) -> Self {
        Self { btf, known: HashMap::new() }
    }

    /// Each type is looked through once, so this ends, however types refer to each other.
    fn offsets(&mut self, type_id: u32, depth: u32) -> Result<Vec<u32>, BtfError> {
        if let Some(known) = self.known.get(&type_id) {
            return Ok(known.clone());
        }
        if depth > MAX_DEPTH {
            return Ok(Vec::new());
        }
        self.known.insert(type_id, Vec::new());
        let btf = self.btf;
        let ty = btf.resolve(type_id)?;
        let mut found = Vec::new();
        match &ty.kind {
            Kind::Struct { is_union: false, .. } if ty.name == LOCK_NAME => found.push(0),
            Kind::Struct { is_union: false, members, .. } => {
                for member in members.iter().filter(|m| m.bit_size == 0) {
                    let at = member.bit_offset / 8;
                    found.extend(
                        self.offsets(member.type_id, depth + 1)?
                            .iter()
                            .filter_map(|o| at.checked_add(*o)),
                    );
                    if found.len() >= 2 {
                        break;
                    }
                }
            }
            Kind::Array { of, n_elements } if *n_elements > 0 => {
                found = self.offsets(*of, depth + 1)?;
                if let ([first], true) = (&*found, *n_elements > 1) {
                    let second = first.saturating_add(btf.size_bytes(*of)?);
                    found.push(second);
                }
            }
            _ => {}
        }
        found.truncate(2);
        self.known.insert(type_id, found.clone());
        Ok(found)
    }
}

impl MapFault {
    pub(crate) fn of(self, map: &str) -> MapError {
        MapError { map: map.to_owned(), fault: self }
    }
}
