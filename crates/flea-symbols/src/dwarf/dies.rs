//! DIEs across units and files: references followed, attributes inherited. Start at
//! [`Dies`]. Knows nothing of what a type's bytes are.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use gimli::{
    AttributeValue, DebugInfoOffset, DebuggingInformationEntry, UnitOffset, UnitType,
    constants as dw,
};

use super::{Dwarf, Slice, Unit, text};

type UnitHeader<'a> = gimli::UnitHeader<Slice<'a>>;

/// Typedefs, pointers and members nested deeper than this are taken for a loop.
pub(crate) const MAX_DEPTH: u32 = 64;

/// Follows references between DIEs.
pub(crate) struct Dies<'a> {
    dwarf: &'a Dwarf<'a>,
    units: RefCell<HashMap<(File, usize), Rc<Unit<'a>>>>,
    /// Where units start, by file: a reference may lead into any.
    starts: RefCell<HashMap<File, Rc<Vec<usize>>>>,
    type_units: OnceCell<TypeUnits<'a>>,
}

/// Units that hold one type each, which others name by a signature.
#[derive(Default)]
struct TypeUnits<'a> {
    /// Those of `.debug_types`, by their offset there.
    headers: HashMap<usize, UnitHeader<'a>>,
    by_signature: HashMap<u64, (File, usize, UnitOffset)>,
}

/// Which file's `.debug_info`, or which other section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum File {
    Main,
    Supplement,
    /// The main file's `.debug_types` (DWARF 4).
    Types,
}

/// One DIE, read.
#[derive(Clone)]
pub(crate) struct Die<'a> {
    pub(crate) file: File,
    pub(crate) unit: Rc<Unit<'a>>,
    pub(crate) entry: DebuggingInformationEntry<Slice<'a>>,
}

impl<'a> Dies<'a> {
    pub(crate) fn new(dwarf: &'a Dwarf<'a>) -> Self {
        Self {
            dwarf,
            units: RefCell::default(),
            starts: RefCell::default(),
            type_units: OnceCell::new(),
        }
    }

    pub(crate) fn at(&self, file: File, unit: usize, offset: UnitOffset) -> Option<Die<'a>> {
        let unit = self.unit(file, unit)?;
        let entry = unit.entry(offset).ok()?;
        Some(Die { file, unit, entry })
    }

    /// The unit's first DIE.
    pub(crate) fn root(&self, die: &Die<'a>) -> Option<Die<'a>> {
        let entry = die.unit.entry(die.unit.header.root_offset()).ok()?;
        Some(Die { file: die.file, unit: Rc::clone(&die.unit), entry })
    }

    /// The DIE that `name` refers to. `None` also where it is in a file that was not given.
    pub(crate) fn follow(&self, die: &Die<'a>, name: gimli::DwAt) -> Option<Die<'a>> {
        match die.entry.attr_value(name)? {
            AttributeValue::UnitRef(offset) => {
                let entry = die.unit.entry(offset).ok()?;
                Some(Die { file: die.file, unit: Rc::clone(&die.unit), entry })
            }
            AttributeValue::DebugInfoRef(offset) => {
                let file = if die.file == File::Types { File::Main } else { die.file };
                self.anywhere(file, offset.0)
            }
            AttributeValue::DebugTypesRef(signature) => self.by_signature(signature.0),
            AttributeValue::DebugInfoRefSup(offset) => self.anywhere(File::Supplement, offset.0),
            _ => None,
        }
    }

    /// A DIE's own attribute, or that of the DIE it completes.
    pub(crate) fn inherited(
        &self,
        die: &Die<'a>,
        name: gimli::DwAt,
    ) -> Option<(Die<'a>, AttributeValue<Slice<'a>>)> {
        let mut die = die.clone();
        for _ in 0..4 {
            if let Some(value) = die.entry.attr_value(name) {
                return Some((die, value));
            }
            die = self
                .follow(&die, dw::DW_AT_abstract_origin)
                .or_else(|| self.follow(&die, dw::DW_AT_specification))?;
        }
        None
    }

    pub(crate) fn name(&self, die: &Die<'a>) -> Option<String> {
        self.inherited_text(die, dw::DW_AT_name)
    }

    pub(crate) fn inherited_text(&self, die: &Die<'a>, name: gimli::DwAt) -> Option<String> {
        let (owner, value) = self.inherited(die, name)?;
        text(self.dwarf_of(owner.file)?, &owner.unit, value)
    }

    pub(crate) fn children(&self, die: &Die<'a>) -> Vec<Die<'a>> {
        let mut found = Vec::new();
        let Ok(mut tree) = die.unit.entries_tree(Some(die.entry.offset())) else { return found };
        let Ok(root) = tree.root() else { return found };
        let mut children = root.children();
        while let Ok(Some(child)) = children.next() {
            found.push(Die {
                file: die.file,
                unit: Rc::clone(&die.unit),
                entry: child.entry().clone(),
            });
        }
        found
    }

    pub(crate) fn dwarf_of(&self, file: File) -> Option<&'a Dwarf<'a>> {
        match file {
            File::Main | File::Types => Some(self.dwarf),
            File::Supplement => self.dwarf.sup(),
        }
    }

    /// The unit that starts at `offset`.
    pub(crate) fn unit(&self, file: File, offset: usize) -> Option<Rc<Unit<'a>>> {
        if let Some(unit) = self.units.borrow().get(&(file, offset)) {
            return Some(Rc::clone(unit));
        }
        let unit = Rc::new(self.read_unit(file, offset)?);
        self.units.borrow_mut().insert((file, offset), Rc::clone(&unit));
        Some(unit)
    }

    /// As [`Self::unit`], and does not keep it.
    pub(crate) fn read_unit(&self, file: File, offset: usize) -> Option<Unit<'a>> {
        let dwarf = self.dwarf_of(file)?;
        let header = match file {
            File::Types => *self.type_units().headers.get(&offset)?,
            File::Main | File::Supplement => dwarf.unit_header(DebugInfoOffset(offset)).ok()?,
        };
        dwarf.unit(header).ok()
    }

    /// Gives back what is kept of units.
    pub(crate) fn forget_units(&self) {
        self.units.borrow_mut().clear();
    }

    fn anywhere(&self, file: File, offset: usize) -> Option<Die<'a>> {
        let starts = self.starts(file)?;
        let after = starts.partition_point(|start| *start <= offset);
        let start = *starts.get(after.checked_sub(1)?)?;
        self.at(file, start, UnitOffset(offset - start))
    }

    fn by_signature(&self, signature: u64) -> Option<Die<'a>> {
        let (file, unit, offset) = *self.type_units().by_signature.get(&signature)?;
        self.at(file, unit, offset)
    }

    fn type_units(&self) -> &TypeUnits<'a> {
        self.type_units.get_or_init(|| {
            let mut found = TypeUnits::default();
            let mut note = |header: &UnitHeader<'a>, file, offset: usize| {
                if let UnitType::Type { type_signature, type_offset } = header.type_() {
                    let place = (file, offset, type_offset);
                    found.by_signature.entry(type_signature.0).or_insert(place);
                }
            };
            let mut headers = self.dwarf.type_units();
            while let Ok(Some(header)) = headers.next() {
                let Some(offset) = header.debug_types_offset() else { continue };
                note(&header, File::Types, offset.0);
                found.headers.insert(offset.0, header);
            }
            let mut headers = self.dwarf.units();
            while let Ok(Some(header)) = headers.next() {
                let Some(offset) = header.debug_info_offset() else { continue };
                note(&header, File::Main, offset.0);
            }
            found
        })
    }

    /// Where the units of a file start, sorted.
    pub(crate) fn starts(&self, file: File) -> Option<Rc<Vec<usize>>> {
        if let Some(starts) = self.starts.borrow().get(&file) {
            return Some(Rc::clone(starts));
        }
        if file == File::Types {
            let mut starts: Vec<usize> = self.type_units().headers.keys().copied().collect();
            starts.sort_unstable();
            return Some(Rc::new(starts));
        }
        let mut starts = Vec::new();
        let mut headers = self.dwarf_of(file)?.units();
        while let Ok(Some(header)) = headers.next() {
            starts.extend(header.debug_info_offset().map(|offset| offset.0));
        }
        let starts = Rc::new(starts);
        self.starts.borrow_mut().insert(file, Rc::clone(&starts));
        Some(starts)
    }

    pub(crate) fn number(&self, die: &Die<'a>, name: gimli::DwAt) -> Option<u64> {
        match die.entry.attr_value(name)? {
            AttributeValue::CallingConvention(convention) => Some(convention.0.into()),
            value => value.udata_value(),
        }
    }

    /// Without typedefs and qualifiers.
    pub(crate) fn bare(&self, die: &Die<'a>) -> Option<Die<'a>> {
        let mut die = die.clone();
        for _ in 0..MAX_DEPTH {
            if !is_transparent(die.entry.tag()) {
                return Some(die);
            }
            die = self.follow(&die, dw::DW_AT_type)?;
        }
        None
    }

    pub(crate) fn language(&self, root: &Die<'a>) -> Option<gimli::DwLang> {
        match root.entry.attr_value(dw::DW_AT_language)? {
            AttributeValue::Language(language) => Some(language),
            _ => None,
        }
    }
}

pub(crate) fn is_c(language: gimli::DwLang) -> bool {
    matches!(
        language,
        dw::DW_LANG_C | dw::DW_LANG_C89 | dw::DW_LANG_C99 | dw::DW_LANG_C11 | dw::DW_LANG_C17
    )
}

pub(crate) fn is_transparent(tag: gimli::DwTag) -> bool {
    matches!(
        tag,
        dw::DW_TAG_typedef
            | dw::DW_TAG_const_type
            | dw::DW_TAG_volatile_type
            | dw::DW_TAG_restrict_type
            | dw::DW_TAG_atomic_type
            | dw::DW_TAG_immutable_type
    )
}

pub(crate) fn is_pointer(tag: gimli::DwTag) -> bool {
    matches!(
        tag,
        dw::DW_TAG_pointer_type | dw::DW_TAG_reference_type | dw::DW_TAG_rvalue_reference_type
    )
}
