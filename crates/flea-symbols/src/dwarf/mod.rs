//! A module's DWARF, read lazily: unit ranges first, then the subprograms of the units that
//! are asked for. Start at [`DebugInfo::subprogram_at`]; signatures are in [`signature`],
//! types in [`types`] and [`spelling`], what the ABIs make of them in [`c_abi`] and
//! [`rust_abi`], what speaks for and against it in [`evidence`]. Knows nothing of
//! instructions.

pub(crate) mod c_abi;
mod copies;
pub(crate) mod dies;
pub(crate) mod evidence;
pub(crate) mod graph;
mod members;
mod names;
pub(crate) mod place;
mod rust_abi;
pub(crate) mod signature;
pub(crate) mod spelling;
mod type_index;
pub(crate) mod types;

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use gimli::{
    AttributeValue, DebugInfoOffset, DwarfSections, EndianSlice, EntriesRaw, LittleEndian,
    UnitOffset, constants as dw,
};
use object::{Object as _, ObjectSection as _};

use crate::addr::Svma;
use crate::module::{Elf, Module};
use dies::Dies;
use type_index::TypeIndex;

pub(crate) type Slice<'a> = EndianSlice<'a, LittleEndian>;
pub(crate) type Dwarf<'a> = gimli::Dwarf<Slice<'a>>;
pub(crate) type Unit<'a> = gimli::Unit<Slice<'a>>;
type Sections<'data> = DwarfSections<Cow<'data, [u8]>>;

/// The debug information of one module.
pub(crate) struct DebugInfo<'data> {
    sections: Sections<'data>,
    supplement: Option<Sections<'data>>,
    ranges: OnceLock<UnitRanges>,
    /// Subprograms by unit.
    units: Mutex<HashMap<usize, Arc<Vec<Subprogram>>>>,
    type_index: OnceLock<TypeIndex>,
}

/// Which unit has the code at an address.
#[derive(Default)]
struct UnitRanges {
    /// start, end, unit; sorted by start.
    ranges: Vec<(u64, u64, usize)>,
    /// Units that do not say where their code is.
    unplaced: Vec<usize>,
    /// All units.
    all: Vec<usize>,
}

/// A function with code, as DWARF describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Subprogram {
    pub(crate) address: Svma,
    pub(crate) size_bytes: u64,
    /// Offset of its unit in `.debug_info`.
    pub(crate) unit: usize,
    die: UnitOffset,
    /// Its unit describes parameters at all. With line tables only (`-g1`,
    /// `-gline-tables-only`, Rust's own library) every function looks as if it had none.
    unit_has_parameters: bool,
}

impl<'data> DebugInfo<'data> {
    pub(crate) fn read(module: &Module<'data>) -> Self {
        let has_info = |elf: &&Elf<'data>| {
            elf.section_by_name(".debug_info").is_some_and(|section| section.size() > 0)
        };
        let elf = module.debug_elf.as_ref().filter(has_info).unwrap_or(&module.elf);
        let supplement = module.files.alt_debug.and_then(|bytes| Elf::parse(bytes).ok());
        Self {
            sections: load(elf),
            supplement: supplement.as_ref().map(load),
            ranges: OnceLock::new(),
            units: Mutex::new(HashMap::new()),
            type_index: OnceLock::new(),
        }
    }

    /// A view of the sections; cheap.
    pub(crate) fn dwarf(&self) -> Dwarf<'_> {
        self.sections.borrow_with_sup(self.supplement.as_ref(), |bytes| {
            EndianSlice::new(bytes, LittleEndian)
        })
    }

    /// The subprogram that starts at `address`.
    pub(crate) fn subprogram_at(&self, address: Svma) -> Option<Subprogram> {
        let ranges = self.ranges();
        let after = ranges.ranges.partition_point(|(start, ..)| *start <= address.0);
        let near = ranges.ranges.get(..after).unwrap_or_default().iter().rev().take(4);
        let holds = near.filter(|(_, end, _)| address.0 < *end).map(|(.., unit)| *unit);
        holds.chain(ranges.unplaced.iter().copied()).find_map(|unit| {
            let subprograms = self.subprograms_of(unit);
            let at = subprograms.binary_search_by_key(&address, |sub| sub.address).ok()?;
            subprograms.get(at).copied()
        })
    }

    /// All subprograms with code. Reads all units.
    pub(crate) fn subprograms(&self) -> Vec<Subprogram> {
        let units = self.ranges().all.iter();
        units.flat_map(|unit| self.subprograms_of(*unit).as_ref().clone()).collect()
    }

    pub(crate) fn has_units(&self) -> bool {
        matches!(self.dwarf().units().next(), Ok(Some(_)))
    }

    /// Where its types are defined. Reads all units.
    pub(crate) fn type_index(&self) -> &TypeIndex {
        self.type_index.get_or_init(|| TypeIndex::read(&Dies::new(&self.dwarf())))
    }

    fn ranges(&self) -> &UnitRanges {
        self.ranges.get_or_init(|| {
            let mut found = UnitRanges::default();
            let dwarf = self.dwarf();
            let mut headers = dwarf.units();
            while let Ok(Some(header)) = headers.next() {
                let Some(offset) = header.debug_info_offset() else { continue };
                let Ok(unit) = dwarf.unit(header) else { continue };
                found.all.push(offset.0);
                let before = found.ranges.len();
                if let Ok(mut ranges) = dwarf.unit_ranges(&unit) {
                    while let Ok(Some(range)) = ranges.next() {
                        if range.begin < range.end {
                            found.ranges.push((range.begin, range.end, offset.0));
                        }
                    }
                }
                if found.ranges.len() == before {
                    found.unplaced.push(offset.0);
                }
            }
            found.ranges.sort_unstable();
            found
        })
    }

    fn subprograms_of(&self, unit: usize) -> Arc<Vec<Subprogram>> {
        let mut units = self.units.lock().unwrap_or_else(PoisonError::into_inner);
        let list = units.entry(unit).or_insert_with(|| {
            let mut found = read_subprograms(&self.dwarf(), unit).unwrap_or_default();
            found.sort_by_key(|sub| sub.address);
            Arc::new(found)
        });
        Arc::clone(list)
    }
}

fn load<'data>(elf: &Elf<'data>) -> Sections<'data> {
    let load = |id: gimli::SectionId| -> Result<Cow<'data, [u8]>, std::convert::Infallible> {
        let section = elf.section_by_name(id.name());
        let data = section.and_then(|section| section.uncompressed_data().ok());
        Ok(data.unwrap_or_default())
    };
    match DwarfSections::load(load) {
        Ok(sections) => sections,
        Err(never) => match never {},
    }
}

fn read_subprograms(dwarf: &Dwarf<'_>, offset: usize) -> gimli::Result<Vec<Subprogram>> {
    let unit = dwarf.unit(dwarf.unit_header(DebugInfoOffset(offset))?)?;
    let mut found = Vec::new();
    let mut unit_has_parameters = false;
    let mut entries = unit.entries_raw(None)?;
    while !entries.is_empty() {
        let die = entries.next_offset();
        let Some(abbreviation) = entries.read_abbreviation()? else { continue };
        unit_has_parameters |= abbreviation.tag() == dw::DW_TAG_formal_parameter;
        if abbreviation.tag() == dw::DW_TAG_subprogram {
            let specs = abbreviation.attributes();
            if let Some((low, high)) = read_code_range(dwarf, &unit, &mut entries, specs)?
                && low < high
            {
                let (address, size_bytes) = (Svma(low), high - low);
                found.push(Subprogram {
                    address,
                    size_bytes,
                    unit: offset,
                    die,
                    unit_has_parameters: false,
                });
            }
        } else {
            entries.skip_attributes(abbreviation.attributes())?;
        }
    }
    for subprogram in &mut found {
        subprogram.unit_has_parameters = unit_has_parameters;
    }
    Ok(found)
}

/// Where the function's entry is: its low_pc, or the first of its ranges.
fn read_code_range(
    dwarf: &Dwarf<'_>,
    unit: &Unit<'_>,
    entries: &mut EntriesRaw<'_, Slice<'_>>,
    specs: &[gimli::AttributeSpecification],
) -> gimli::Result<Option<(u64, u64)>> {
    let (mut low, mut high, mut size, mut first) = (None, None, None, None);
    for spec in specs {
        let attr = entries.read_attribute(*spec)?;
        match attr.name() {
            dw::DW_AT_low_pc => low = dwarf.attr_address(unit, attr.value())?,
            dw::DW_AT_high_pc => {
                size = attr.udata_value();
                high = dwarf.attr_address(unit, attr.value())?;
            }
            dw::DW_AT_ranges => {
                if let Some(mut ranges) = dwarf.attr_ranges(unit, attr.value())? {
                    first = ranges.next()?.map(|range| (range.begin, range.end));
                }
            }
            _ => {}
        }
    }
    let Some(low) = low else { return Ok(first) };
    let end = high.or(size.and_then(|size| low.checked_add(size)));
    Ok(end.map(|end| (low, end)).or(first))
}

/// A DIE's attribute as text.
pub(crate) fn text(
    dwarf: &Dwarf<'_>,
    unit: &Unit<'_>,
    value: AttributeValue<Slice<'_>>,
) -> Option<String> {
    let bytes = dwarf.attr_string(unit, value).ok()?;
    Some(String::from_utf8_lossy(bytes.slice()).into_owned())
}
