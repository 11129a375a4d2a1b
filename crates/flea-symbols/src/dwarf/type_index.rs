//! Where a module's types are defined, by name. Start at [`TypeIndex::read`]: one pass over
//! all units, made when the first name is looked up. Names themselves are not kept, only their
//! hashes: who finds a place reads the name there.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use flea_object::types::key;
use gimli::UnitOffset;

use super::dies::{Dies, File};
use super::names::{NameKind, Named, scan};

/// Types of one name that differ; more of them are one name for too many things.
const MAX_PLACES: usize = 64;

/// Where types are defined.
pub(crate) struct TypeIndex {
    places: HashMap<u64, Vec<Place>>,
}

/// Where a type is defined. Of those that are alike, the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) file: File,
    pub(crate) unit: usize,
    pub(crate) die: UnitOffset,
    pub(crate) kind: NameKind,
}

impl TypeIndex {
    pub(crate) fn read(dies: &Dies<'_>) -> Self {
        let mut places: HashMap<u64, Vec<Place>> = HashMap::new();
        let mut seen = HashSet::new();
        for (file, unit) in all_units(dies) {
            for named in names_of(dies, file, unit) {
                let key = hash_of(&named.name);
                let is_defined = named.kind != NameKind::Declaration;
                if !is_defined || !seen.insert((key, named.kind, named.fingerprint)) {
                    continue;
                }
                let of_name = places.entry(key).or_default();
                if of_name.len() < MAX_PLACES {
                    of_name.push(Place { file, unit, die: named.offset, kind: named.kind });
                }
            }
        }
        Self { places }
    }

    /// The definitions of `name`, and perhaps of others with its hash.
    pub(crate) fn find(&self, name: &str) -> &[Place] {
        self.places.get(&hash_of(name)).map_or(&[], Vec::as_slice)
    }
}

/// Every unit that may have types.
pub(crate) fn all_units(dies: &Dies<'_>) -> Vec<(File, usize)> {
    let mut units = Vec::new();
    for file in [File::Main, File::Types, File::Supplement] {
        let starts = dies.starts(file).unwrap_or_default();
        units.extend(starts.iter().map(|start| (file, *start)));
    }
    units
}

/// The types of one unit that have names.
pub(crate) fn names_of(dies: &Dies<'_>, file: File, unit: usize) -> Vec<Named> {
    let dwarf = dies.dwarf_of(file);
    let unit = dies.read_unit(file, unit);
    dwarf.zip(unit).map(|(dwarf, unit)| scan(dwarf, &unit)).unwrap_or_default()
}

/// What programs may call `name` has the same.
fn hash_of(name: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    key(name).hash(&mut hasher);
    hasher.finish()
}
