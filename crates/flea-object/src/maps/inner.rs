//! Maps of maps: what `__array(values, struct inner)` says of the maps that may be put in, and
//! which of them `.values = { [0] = &inner }` puts in at the start.

use std::collections::HashMap;

use super::{Declared, Definition, MapFault, read_definition};
use crate::btf::{Btf, Kind};
use crate::elf::{Elf, R_BPF_64_ABS64, Relocation, Section};
use crate::error::ObjectError;
use crate::spec::{InnerMaps, MapIdx, MapKind, MapSpec};

/// Bytes of one of `values`: an address.
const SLOT_BYTES: u64 = 8;
/// The size of an initial key, which is an index.
const INDEX_BYTES: u32 = 4;

/// The member `values` of a definition.
#[derive(Clone, Copy)]
pub(super) struct Values {
    /// The structure that defines the inner map.
    definition: u32,
    /// Where in the outer definition the values begin.
    offset: u64,
}

impl Values {
    /// `struct inner *values[]`, at `bit_offset`; `None` where it is something else.
    pub(super) fn read(
        btf: &Btf<'_>,
        type_id: u32,
        bit_offset: u32,
    ) -> Result<Option<Self>, ObjectError> {
        let Kind::Array { of, .. } = btf.resolve(type_id)?.kind else { return Ok(None) };
        let Kind::Ptr { to } = btf.resolve(of)?.kind else { return Ok(None) };
        let is_definition = matches!(btf.resolve(to)?.kind, Kind::Struct { is_union: false, .. });
        let offset = u64::from(bit_offset / 8);
        Ok(is_definition.then_some(Self { definition: to, offset }))
    }
}

/// An outer map whose values are still to be looked at.
pub(super) struct Outer {
    pub map: usize,
    /// Where its variable begins and ends in `.maps`.
    pub start: u64,
    pub end: u64,
    pub values: Values,
}

/// Gives each outer map its template, behind the maps that have variables, and its initial
/// contents.
pub(super) fn complete(
    elf: &Elf<'_>,
    btf: &Btf<'_>,
    section: &Section<'_>,
    outers: &[Outer],
    declared: &mut Declared,
) -> Result<(), ObjectError> {
    for outer in outers {
        let template = template(btf, outer, &declared.maps[outer.map].name)?;
        let init = initial(elf, section, outer, declared, &template)?;
        let idx =
            MapIdx(u32::try_from(declared.maps.len()).expect("a map takes bytes of the file"));
        declared.maps.push(template);
        declared.maps[outer.map].inner = Some(InnerMaps { template: idx, init });
    }
    Ok(())
}

/// libbpf's name for it.
fn template(btf: &Btf<'_>, outer: &Outer, name: &str) -> Result<MapSpec, ObjectError> {
    let inner_name = format!("{name}.inner");
    let definition = read_definition(btf, &inner_name, outer.values.definition)?;
    let Definition { mut spec, values, .. } = definition;
    if values.is_some() || spec.kind.holds_maps() {
        return Err(MapFault::Nested.of(&inner_name).into());
    }
    if spec.kind == MapKind::ProgArray {
        return Err(MapFault::ProgramsInside.of(&inner_name).into());
    }
    spec.template = true;
    Ok(spec)
}

fn initial(
    elf: &Elf<'_>,
    section: &Section<'_>,
    outer: &Outer,
    declared: &Declared,
    template: &MapSpec,
) -> Result<Vec<(u32, MapIdx)>, ObjectError> {
    let spec = &declared.maps[outer.map];
    let mut init = Vec::new();
    for relocation in &section.relocations {
        if !(outer.start..outer.end).contains(&relocation.offset) {
            continue;
        }
        let into = relocation.offset - outer.start;
        let bad = || MapFault::BadInit { offset: into }.of(&spec.name);
        let slot = into.checked_sub(outer.values.offset).filter(|at| at.is_multiple_of(SLOT_BYTES));
        let slot = slot.and_then(|at| u32::try_from(at / SLOT_BYTES).ok()).ok_or_else(bad)?;
        let map = target(elf, section, *relocation, &declared.at).ok_or_else(bad)?;
        let inner = &declared.maps[map.0 as usize];
        if !inner.shape().fits(template.shape()) {
            let inner = inner.name.clone();
            return Err(MapFault::WrongInner { slot, inner }.of(&spec.name).into());
        }
        let max = usize::try_from(spec.max_entries).unwrap_or(usize::MAX);
        let has_place = match spec.kind {
            MapKind::ArrayOfMaps => slot < spec.max_entries,
            _ => init.len() < max,
        };
        if !has_place || spec.key_size_bytes != INDEX_BYTES {
            return Err(MapFault::NoSuchSlot { slot, inner: inner.name.clone() }
                .of(&spec.name)
                .into());
        }
        init.push((slot, map));
    }
    init.sort_unstable_by_key(|(slot, _)| *slot);
    Ok(init)
}

/// The map whose address the relocation asks for: its own symbol; or, of a static one, the
/// section's, with the offset where the address is to be written.
fn target(
    elf: &Elf<'_>,
    section: &Section<'_>,
    relocation: Relocation,
    at: &HashMap<i64, u32>,
) -> Option<MapIdx> {
    let symbol = elf.symbols.get(relocation.symbol)?;
    if relocation.r_type != R_BPF_64_ABS64 || symbol.section != Some(section.idx) {
        return None;
    }
    let place = usize::try_from(relocation.offset).ok()?;
    let addend = section.data.get(place..)?.first_chunk::<8>().copied().map(i64::from_le_bytes)?;
    let offset = i64::try_from(symbol.value).ok()?.checked_add(addend)?;
    at.get(&offset).copied().map(MapIdx)
}
