//! The names of a unit's types, with their scopes, in one pass over its DIEs. Start at
//! [`scan`]. Goes into namespaces and classes, not into functions.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use gimli::{
    AttributeSpecification, AttributeValue, DwTag, EntriesRaw, UnitOffset, constants as dw,
};

use super::{Dwarf, Slice, Unit, text};

/// Scopes nested deeper than this many bytes of names are not gone into: no source has them.
const MAX_PATH_BYTES: usize = 1 << 14;

/// A type that has a name, or is given one by a typedef.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) offset: UnitOffset,
    pub(crate) kind: NameKind,
    /// With its scopes: `std::string`.
    pub(crate) name: String,
    /// Equal for two types of a kind and name that have the same size, and members of the same
    /// names in the same places.
    pub(crate) fingerprint: u64,
}

/// What has a name. A class is a struct.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum NameKind {
    Struct,
    Union,
    Enum,
    /// A struct, union or enum that is not defined here.
    Declaration,
    Typedef,
    Base,
}

/// Something that has an end: a namespace or a type.
struct Open {
    depth: isize,
    /// The path around it.
    outer: String,
    ty: Option<OpenType>,
}

struct OpenType {
    offset: UnitOffset,
    kind: NameKind,
    /// Empty where it has none of its own.
    name: String,
    hasher: DefaultHasher,
}

/// What is read of a DIE.
#[derive(Default)]
struct Attributes<'a> {
    name: Option<AttributeValue<Slice<'a>>>,
    is_declaration: bool,
    ty: Option<UnitOffset>,
    specification: Option<UnitOffset>,
    /// Size, places, values: for the fingerprint.
    numbers: Vec<(u16, u64)>,
}

struct Scan<'s, 'a> {
    dwarf: &'s Dwarf<'a>,
    unit: &'s Unit<'a>,
    path: String,
    open: Vec<Open>,
    found: Vec<Named>,
    /// Types without names, by place, with their kinds and fingerprints.
    nameless: HashMap<UnitOffset, (NameKind, u64)>,
    /// Names of types that are declared and not defined.
    declared: HashMap<UnitOffset, String>,
    /// Typedefs, and what they stand for.
    typedefs: Vec<(UnitOffset, String, Option<UnitOffset>)>,
}

/// All types of `unit` that have a name. What is damaged ends the pass.
pub(crate) fn scan<'a>(dwarf: &Dwarf<'a>, unit: &Unit<'a>) -> Vec<Named> {
    let mut scan = Scan {
        dwarf,
        unit,
        path: String::new(),
        open: Vec::new(),
        found: Vec::new(),
        nameless: HashMap::new(),
        declared: HashMap::new(),
        typedefs: Vec::new(),
    };
    // What was found up to the damage is found.
    let _ = scan.run();
    scan.close(isize::MIN);
    scan.finish()
}

impl<'a> Scan<'_, 'a> {
    fn run(&mut self) -> gimli::Result<()> {
        let mut entries = self.unit.entries_raw(None)?;
        while !entries.is_empty() {
            let (offset, depth) = (entries.next_offset(), entries.next_depth());
            let Some(abbreviation) = entries.read_abbreviation()? else { continue };
            self.close(depth);
            let is_root = depth == 0;
            let is_inside = is_root || self.open.last().is_some_and(|o| o.depth + 1 == depth);
            if !is_inside || !is_wanted(abbreviation.tag()) {
                entries.skip_attributes(abbreviation.attributes())?;
                if is_root {
                    self.open(depth, None);
                }
                continue;
            }
            let attributes = read(&mut entries, abbreviation.attributes())?;
            self.visit(offset, depth, abbreviation.tag(), &attributes);
        }
        Ok(())
    }

    fn visit(&mut self, offset: UnitOffset, depth: isize, tag: DwTag, attributes: &Attributes<'a>) {
        match tag {
            dw::DW_TAG_namespace => {
                let name = self.text(attributes).unwrap_or("(anonymous namespace)".into());
                self.open(depth, None);
                self.enter(&name);
            }
            dw::DW_TAG_member | dw::DW_TAG_enumerator | dw::DW_TAG_inheritance => {
                let name = self.text(attributes);
                if let Some(ty) = self.open.last_mut().and_then(|open| open.ty.as_mut()) {
                    (tag.0, name, &attributes.numbers).hash(&mut ty.hasher);
                }
            }
            dw::DW_TAG_typedef => {
                if let Some(name) = self.text(attributes) {
                    self.typedefs.push((offset, self.scoped(&name), attributes.ty));
                }
            }
            _ => self.visit_type(offset, depth, tag, attributes),
        }
    }

    fn visit_type(
        &mut self,
        offset: UnitOffset,
        depth: isize,
        tag: DwTag,
        attributes: &Attributes<'a>,
    ) {
        let kind = match tag {
            _ if attributes.is_declaration => NameKind::Declaration,
            dw::DW_TAG_union_type => NameKind::Union,
            dw::DW_TAG_enumeration_type => NameKind::Enum,
            dw::DW_TAG_base_type => NameKind::Base,
            _ => NameKind::Struct,
        };
        // What completes a declaration of another scope has that one's name, with its scopes.
        let own = || self.text(attributes).map(|name| self.scoped(&name));
        let name = self.specified(attributes).or_else(own).unwrap_or_default();
        if kind == NameKind::Declaration {
            self.declared.insert(offset, name.clone());
        }
        let mut hasher = DefaultHasher::new();
        attributes.numbers.hash(&mut hasher);
        let ty = OpenType { offset, kind, name: name.clone(), hasher };
        self.open(depth, Some(ty));
        // A definition outside of its scope names it by its declaration alone.
        if !name.is_empty() {
            self.path = name;
        }
    }

    /// The name of the declaration that a type completes.
    fn specified(&self, attributes: &Attributes<'a>) -> Option<String> {
        let at = attributes.specification?;
        self.declared.get(&at).cloned()
    }

    fn text(&self, attributes: &Attributes<'a>) -> Option<String> {
        text(self.dwarf, self.unit, attributes.name?).filter(|name| !name.is_empty())
    }

    fn scoped(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}::{name}", self.path) }
    }

    fn enter(&mut self, name: &str) {
        self.path = self.scoped(name);
    }

    fn open(&mut self, depth: isize, ty: Option<OpenType>) {
        if self.path.len() > MAX_PATH_BYTES {
            return;
        }
        self.open.push(Open { depth, outer: self.path.clone(), ty });
    }

    /// Ends all that a DIE at `depth` is not in.
    fn close(&mut self, depth: isize) {
        while let Some(open) = self.open.pop_if(|open| open.depth >= depth) {
            self.path = open.outer;
            let Some(OpenType { offset, kind, name, hasher }) = open.ty else { continue };
            let fingerprint = hasher.finish();
            if name.is_empty() {
                self.nameless.insert(offset, (kind, fingerprint));
            } else {
                self.found.push(Named { offset, kind, name, fingerprint });
            }
        }
    }

    /// Gives those without a name their typedef's.
    fn finish(mut self) -> Vec<Named> {
        let mut known: HashMap<UnitOffset, u64> =
            self.found.iter().map(|named| (named.offset, named.fingerprint)).collect();
        for (offset, name, target) in self.typedefs {
            let nameless = target.and_then(|target| Some((target, self.nameless.remove(&target)?)));
            if let Some((offset, (kind, fingerprint))) = nameless {
                known.insert(offset, fingerprint);
                self.found.push(Named { offset, kind, name, fingerprint });
                continue;
            }
            let fingerprint = target.and_then(|target| known.get(&target).copied()).unwrap_or(0);
            known.insert(offset, fingerprint);
            self.found.push(Named { offset, kind: NameKind::Typedef, name, fingerprint });
        }
        self.found
    }
}

fn is_wanted(tag: DwTag) -> bool {
    matches!(
        tag,
        dw::DW_TAG_namespace
            | dw::DW_TAG_member
            | dw::DW_TAG_inheritance
            | dw::DW_TAG_enumerator
            | dw::DW_TAG_typedef
            | dw::DW_TAG_structure_type
            | dw::DW_TAG_class_type
            | dw::DW_TAG_union_type
            | dw::DW_TAG_enumeration_type
            | dw::DW_TAG_base_type
    )
}

fn read<'a>(
    entries: &mut EntriesRaw<'_, Slice<'a>>,
    specs: &[AttributeSpecification],
) -> gimli::Result<Attributes<'a>> {
    let mut found = Attributes::default();
    for spec in specs {
        let attribute = entries.read_attribute(*spec)?;
        let place = |value| match value {
            AttributeValue::UnitRef(offset) => Some(offset),
            _ => None,
        };
        match attribute.name() {
            dw::DW_AT_name => found.name = Some(attribute.value()),
            dw::DW_AT_declaration => found.is_declaration = true,
            dw::DW_AT_type => found.ty = place(attribute.value()),
            dw::DW_AT_specification => found.specification = place(attribute.value()),
            dw::DW_AT_byte_size
            | dw::DW_AT_encoding
            | dw::DW_AT_bit_size
            | dw::DW_AT_data_bit_offset
            | dw::DW_AT_bit_offset
            | dw::DW_AT_data_member_location
            | dw::DW_AT_const_value => {
                let value = attribute.udata_value();
                let value = value.or(attribute.sdata_value().map(i64::cast_unsigned));
                found.numbers.extend(value.map(|value| (attribute.name().0, value)));
            }
            _ => {}
        }
    }
    Ok(found)
}
