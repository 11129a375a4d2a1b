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

use crate::elf::{Elf, R_BPF_64_ABS64, Relocation, Section};
use crate::maps::{DeclaredMap, MapError, MapFault};
use crate::spec::{MapIdx, Program, ProgramSlot};

/// Bytes of an address.
const POINTER_BYTES: u64 = 8;

/// An element whose program is known by name alone.
pub(crate) struct NamedSlot<'a> {
    map: MapIdx,
    map_name: &'a str,
    index: u32,
    symbol: &'a str,
}

/// The elements that the definitions in `.maps` name.
pub(crate) fn named_slots<'a>(
    elf: &'a Elf<'_>,
    declared: &'a [DeclaredMap],
) -> Result<Vec<NamedSlot<'a>>, MapError> {
    let Some(section) = elf.section_named(".maps") else { return Ok(Vec::new()) };
    section
        .relocations
        .iter()
        .map(|relocation| named_slot(elf, section, declared, relocation))
        .collect()
}

fn named_slot<'a>(
    elf: &'a Elf<'_>,
    section: &Section<'_>,
    declared: &'a [DeclaredMap],
    relocation: &Relocation,
) -> Result<NamedSlot<'a>, MapError> {
    let symbol = &elf.symbols[relocation.symbol];
    // Sorted by offset.
    let behind = declared.partition_point(|map| map.offset <= relocation.offset);
    let Some(at) = behind.checked_sub(1) else {
        let fault = MapFault::AddressInDefinition {
            offset: relocation.offset,
            symbol: symbol.name.clone(),
        };
        return Err(fault.of(&section.name));
    };
    let map = &declared[at];
    let fault = |fault: MapFault| Err(fault.of(&map.spec.name));
    let into_values = map.values_at.and_then(|values| relocation.offset.checked_sub(values));
    let index = into_values
        .filter(|offset| relocation.r_type == R_BPF_64_ABS64 && offset % POINTER_BYTES == 0)
        .and_then(|offset| u32::try_from(offset / POINTER_BYTES).ok());
    let Some(index) = index else {
        let (offset, symbol) = (relocation.offset - map.offset, symbol.name.clone());
        return fault(MapFault::AddressInDefinition { offset, symbol });
    };
    let max_entries = map.spec.max_entries;
    if index >= max_entries {
        return fault(MapFault::TooManyValues { index, max_entries });
    }
    if !symbol.function || symbol.local {
        return fault(MapFault::NotAProgram { index, symbol: symbol.name.clone() });
    }
    let map_idx = MapIdx(u32::try_from(at).expect("a map takes bytes of the file"));
    Ok(NamedSlot { map: map_idx, map_name: &map.spec.name, index, symbol: &symbol.name })
}

impl NamedSlot<'_> {
    /// The same with the program's number.
    pub(crate) fn resolve(&self, programs: &[Program]) -> Result<ProgramSlot, MapError> {
        let Self { map, index, symbol, .. } = *self;
        let program = programs.iter().position(|program| program.name == symbol);
        let program = program.ok_or_else(|| {
            MapFault::NotAProgram { index, symbol: symbol.to_owned() }.of(self.map_name)
        })?;
        Ok(ProgramSlot { map, index, program })
    }
}
