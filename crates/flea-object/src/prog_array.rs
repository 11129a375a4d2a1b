//! Program arrays that are filled where they are declared:
//!
//! ```c
//!   struct {
//!       __uint(type, BPF_MAP_TYPE_PROG_ARRAY);
//!       __uint(max_entries, 2);
//!       __type(key, u32);
//!       __array(values, int (void *));
//!   } jump_table SEC(".maps") = { .values = { [1] = (void *)&second } };
//! ```
//!
//! `values` has no bytes of its own in the type: the variable goes on behind the structure, with
//! an address for each program, of which the file has the relocations.

use std::ops::Range;

use crate::btf::{Btf, Kind};
use crate::elf::{Elf, R_BPF_64_ABS64, Relocation};
use crate::error::ObjectError;
use crate::maps::{MapError, MapFault};
use crate::spec::{MapIdx, Program, ProgramSlot};

/// Bytes of an address.
const POINTER_BYTES: u64 = 8;

/// An array with `values`.
#[derive(Debug)]
pub(crate) struct FilledArray {
    pub map: MapIdx,
    pub name: String,
    pub max_entries: u32,
    /// Its variable in `.maps`.
    pub place: Range<u64>,
    /// Where in it the values begin.
    pub values_offset: u64,
}

/// An element whose program is known by name alone.
pub(crate) struct NamedSlot<'a> {
    map: MapIdx,
    map_name: String,
    index: u32,
    symbol: &'a str,
}

/// `__array(values, int (void *))` is `int (*values[])(void *)`.
pub(crate) fn are_program_pointers(btf: &Btf<'_>, type_id: u32) -> Result<bool, ObjectError> {
    let Kind::Array { of, .. } = btf.resolve(type_id)?.kind else { return Ok(false) };
    let Kind::Ptr { to } = btf.resolve(of)?.kind else { return Ok(false) };
    Ok(matches!(btf.resolve(to)?.kind, Kind::Proto { .. }))
}

/// The elements that `arrays` name.
pub(crate) fn named_slots<'a>(
    elf: &'a Elf<'_>,
    arrays: &[FilledArray],
) -> Result<Vec<NamedSlot<'a>>, MapError> {
    let Some(section) = elf.section_named(".maps") else { return Ok(Vec::new()) };
    let mut slots = Vec::new();
    for array in arrays {
        for relocation in section.relocations.iter().filter(|r| array.place.contains(&r.offset)) {
            slots.push(named_slot(elf, array, *relocation)?);
        }
    }
    Ok(slots)
}

fn named_slot<'a>(
    elf: &'a Elf<'_>,
    array: &FilledArray,
    relocation: Relocation,
) -> Result<NamedSlot<'a>, MapError> {
    let symbol = &elf.symbols[relocation.symbol];
    let fault = |fault: MapFault| Err(fault.of(&array.name));
    let offset = relocation.offset - array.place.start;
    let index = offset
        .checked_sub(array.values_offset)
        .filter(|at| relocation.r_type == R_BPF_64_ABS64 && at.is_multiple_of(POINTER_BYTES))
        .and_then(|at| u32::try_from(at / POINTER_BYTES).ok());
    let Some(index) = index else {
        return fault(MapFault::AddressInDefinition { offset, symbol: symbol.name.clone() });
    };
    let max_entries = array.max_entries;
    if index >= max_entries {
        return fault(MapFault::TooManyValues { index, max_entries });
    }
    if !symbol.function || symbol.local {
        return fault(MapFault::NotAProgram { index, symbol: symbol.name.clone() });
    }
    Ok(NamedSlot { map: array.map, map_name: array.name.clone(), index, symbol: &symbol.name })
}

impl NamedSlot<'_> {
    /// The same with the program's number.
    pub(crate) fn resolve(&self, programs: &[Program]) -> Result<ProgramSlot, MapError> {
        let Self { map, index, symbol, .. } = *self;
        let program = programs.iter().position(|program| program.name == symbol);
        let program = program.ok_or_else(|| {
            MapFault::NotAProgram { index, symbol: symbol.to_owned() }.of(&self.map_name)
        })?;
        Ok(ProgramSlot { map, index, program })
    }
}
