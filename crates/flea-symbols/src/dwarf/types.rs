//! What a type's bytes are: sizes, alignments, members. Start at [`Dies::type_of`]. Names are
//! in [`super::spelling`].

use gimli::{AttributeValue, constants as dw};

use super::copies::MustRun;
use super::dies::{Die, Dies, MAX_DEPTH, is_pointer, is_transparent};
use crate::signature::Type;

/// A type as the classification needs it, typedefs and qualifiers taken off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Void,
    /// Integers, enumerations, pointers: size.
    Integer(u64),
    /// `float`, `double`, `__float128`: size.
    Float(u64),
    /// 80 bits in 16 bytes.
    LongDouble,
    /// Of this many bytes in all; two parts.
    Complex(u64),
    /// `_Complex long double`.
    ComplexLongDouble,
    /// Vector of this many bytes.
    Vector(u64),
    /// Vector of this many bytes that is one `float` or `double`.
    LoneFloatVector(u64),
    Aggregate(Record),
    /// Nothing but, perhaps, a size is known.
    Unknown {
        size: u64,
    },
}

/// A struct, union, class or array, by value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) size: u64,
    pub(crate) align: u64,
    /// C++: has a copy constructor or destructor that must run, so it is passed by address.
    pub(crate) by_address: bool,
    /// C++: it has them, and nothing tells whether they are the compiler's own.
    pub(crate) may_be_by_address: bool,
    /// The alignment is DWARF's, not its members'.
    pub(crate) align_is_stated: bool,
    /// Offset and shape of each member.
    pub(crate) fields: Vec<(u64, Shape)>,
    /// A bit field, by its byte offset: of class INTEGER whatever its type.
    pub(crate) bit_fields: Vec<u64>,
    /// Eightbytes with bytes that neither members nor their alignment account for.
    pub(crate) unexplained: Vec<u64>,
    /// Rust: what an `enum` with data has instead of `fields`.
    pub(crate) variants: Option<Variants>,
    /// Ends with an array that has no size.
    pub(crate) flexible: bool,
    pub(crate) kind: RecordKind,
}

/// What the members of a record are to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RecordKind {
    Struct,
    Union,
    Array,
}

/// The variants of a Rust `enum` with data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Variants {
    /// Offset and shape of what tells them apart; `None` where there is only one.
    pub(crate) tag: Option<(u64, Box<Shape>)>,
    pub(crate) arms: Vec<Arm>,
}

/// One variant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Arm {
    /// The tag has a value for it. The variant without one is told by a value of its own data
    /// that is none of the others' ("niche").
    pub(crate) has_value: bool,
    /// Its data, a record as large as the whole `enum`.
    pub(crate) data: Box<Shape>,
}

impl Record {
    pub(crate) fn new(kind: RecordKind, size: u64, align: u64) -> Self {
        Self {
            size,
            align,
            by_address: false,
            may_be_by_address: false,
            align_is_stated: false,
            fields: Vec::new(),
            bit_fields: Vec::new(),
            unexplained: Vec::new(),
            variants: None,
            flexible: false,
            kind,
        }
    }
}

impl Shape {
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Void => 0,
            Self::Integer(size)
            | Self::Float(size)
            | Self::Complex(size)
            | Self::Vector(size)
            | Self::LoneFloatVector(size)
            | Self::Unknown { size } => *size,
            Self::LongDouble => 16,
            Self::ComplexLongDouble => 32,
            Self::Aggregate(record) => record.size,
        }
    }

    pub(crate) fn align(&self) -> u64 {
        match self {
            Self::Complex(size) => (*size / 2).max(1),
            Self::ComplexLongDouble => 16,
            Self::Aggregate(record) => record.align,
            _ => self.size().max(1),
        }
    }
}

/// DW_AT_calling_convention of a class.
const CC_PASS_BY_REFERENCE: u64 = 4;
const CC_PASS_BY_VALUE: u64 = 5;

/// No bit-field is wider: `__int128`.
const MAX_BIT_FIELD_BYTES: u64 = 17;

/// `_BitInt(65)` and up: as a struct of words.
pub(crate) fn is_wide_bit_int(name: &str, size: u64) -> bool {
    size > 8 && (name.contains("_BitInt(") || name.contains("_ExtInt("))
}

/// A struct of integer words.
pub(crate) fn wide_bit_int(size: u64) -> Shape {
    let mut record = Record::new(RecordKind::Struct, size, 8);
    record.fields = (0..(size / 8).min(8)).map(|i| (i * 8, Shape::Integer(8))).collect();
    Shape::Aggregate(record)
}

/// Finds the bytes of a record that neither a member nor a member's alignment accounts for.
#[derive(Default)]
pub(crate) struct Gaps {
    /// Where the members so far end.
    end: u64,
    pub(crate) eightbytes: Vec<u64>,
}

impl Gaps {
    pub(crate) fn add(&mut self, offset: u64, size: u64, align: u64) {
        self.up_to(offset, align);
        self.end = self.end.max(offset.saturating_add(size));
    }

    pub(crate) fn finish(mut self, size: u64, align: u64) -> Vec<u64> {
        if self.end > 0 {
            self.up_to(size, align);
        }
        self.eightbytes
    }

    fn up_to(&mut self, offset: u64, align: u64) {
        let expected = self.end.checked_next_multiple_of(align.max(1)).unwrap_or(u64::MAX);
        // Nothing larger than 64 bytes is in registers.
        if offset > expected && offset <= 64 {
            self.eightbytes.extend((expected / 8..offset.div_ceil(8)).map(|i| i * 8));
        }
    }
}

impl<'a> Dies<'a> {
    /// The type that `die`'s DW_AT_type names, as people spell it; `Type::Void` without one.
    pub(crate) fn type_of(&self, die: &Die<'a>) -> (Type, Shape) {
        let Some((owner, _)) = self.inherited(die, dw::DW_AT_type) else {
            return (Type::Void, Shape::Void);
        };
        let Some(target) = self.follow(&owner, dw::DW_AT_type) else {
            return (Type::Unknown, Shape::Unknown { size: 0 });
        };
        let unknown = || Shape::Unknown {
            size: self.bare(&target).and_then(|die| self.byte_size(&die)).unwrap_or(0),
        };
        let shape = self.shape(&target, 0).unwrap_or_else(unknown);
        let name = self.spelling(&target, 0);
        (self.c_type(&target, name, &shape), shape)
    }

    fn byte_size(&self, die: &Die<'a>) -> Option<u64> {
        self.number(die, dw::DW_AT_byte_size)
    }

    fn c_type(&self, target: &Die<'a>, name: String, shape: &Shape) -> Type {
        let size_bytes = u32::try_from(shape.size()).unwrap_or(u32::MAX);
        let bare = self.bare(target);
        match shape {
            Shape::Void => Type::Void,
            Shape::Float(_) | Shape::LongDouble => Type::Float { name, size_bytes },
            Shape::Complex(_)
            | Shape::ComplexLongDouble
            | Shape::Vector(_)
            | Shape::LoneFloatVector(_)
            | Shape::Aggregate(_)
            | Shape::Unknown { .. } => Type::Aggregate { name, size_bytes },
            Shape::Integer(_) => match &bare {
                Some(bare) if is_pointer(bare.entry.tag()) => {
                    Type::Pointer { name, to_char: self.points_to_char(bare) }
                }
                Some(bare) => Type::Int { name, size_bytes, signed: self.is_signed(bare) },
                None => Type::Unknown,
            },
        }
    }

    fn points_to_char(&self, pointer: &Die<'a>) -> bool {
        let target = self.follow(pointer, dw::DW_AT_type).and_then(|die| self.bare(&die));
        target.is_some_and(|die| {
            die.entry.tag() == dw::DW_TAG_base_type
                && self.number(&die, dw::DW_AT_byte_size) == Some(1)
                && self.name(&die).as_deref() == Some("char")
        })
    }

    fn is_signed(&self, die: &Die<'a>) -> bool {
        if die.entry.tag() == dw::DW_TAG_enumeration_type {
            let under = self.follow(die, dw::DW_AT_type).and_then(|die| self.bare(&die));
            return under.is_some_and(|under| self.is_signed(&under));
        }
        matches!(
            die.entry.attr_value(dw::DW_AT_encoding),
            Some(AttributeValue::Encoding(dw::DW_ATE_signed | dw::DW_ATE_signed_char))
        )
    }

    /// `None` for what cannot be told: incomplete types, missing files, loops.
    fn shape(&self, die: &Die<'a>, depth: u32) -> Option<Shape> {
        if depth > MAX_DEPTH {
            return None;
        }
        let tag = die.entry.tag();
        let size = || self.byte_size(die);
        match tag {
            _ if is_transparent(tag) => match die.entry.attr(dw::DW_AT_type) {
                None => Some(Shape::Void),
                Some(_) => self.shape(&self.follow(die, dw::DW_AT_type)?, depth + 1),
            },
            dw::DW_TAG_unspecified_type => Some(Shape::Integer(8)), // decltype(nullptr)
            _ if is_pointer(tag) => Some(Shape::Integer(size().unwrap_or(8))),
            dw::DW_TAG_ptr_to_member_type => self.member_pointer(die),
            dw::DW_TAG_enumeration_type => match size() {
                Some(size) => Some(Shape::Integer(size)),
                None => self.shape(&self.follow(die, dw::DW_AT_type)?, depth + 1),
            },
            dw::DW_TAG_base_type => self.base_shape(die, size()?),
            dw::DW_TAG_array_type => self.array_shape(die, depth),
            dw::DW_TAG_structure_type | dw::DW_TAG_class_type | dw::DW_TAG_union_type => {
                self.record_shape(die, size()?, depth)
            }
            _ => None,
        }
    }

    fn base_shape(&self, die: &Die<'a>, size: u64) -> Option<Shape> {
        let Some(AttributeValue::Encoding(encoding)) = die.entry.attr_value(dw::DW_AT_encoding)
        else {
            return None;
        };
        match encoding {
            // gcc and clang give both 16-byte formats the same encoding; the name tells.
            dw::DW_ATE_float if size == 16 => match self.name(die)?.as_str() {
                "long double" => Some(Shape::LongDouble),
                "_Float64x" => Some(Shape::LongDouble),
                "_Float128" | "__float128" | "f128" => Some(Shape::Float(16)),
                _ => None,
            },
            dw::DW_ATE_float | dw::DW_ATE_decimal_float if matches!(size, 2 | 4 | 8) => {
                Some(Shape::Float(size))
            }
            dw::DW_ATE_decimal_float if size == 16 => Some(Shape::Float(16)),
            dw::DW_ATE_complex_float if size == 32 => {
                let name = self.name(die)?;
                let is_128 = name.contains("loat128");
                Some(if is_128 { Shape::Complex(32) } else { Shape::ComplexLongDouble })
            }
            dw::DW_ATE_complex_float if matches!(size, 4 | 8 | 16) => Some(Shape::Complex(size)),
            _ if self.name(die).is_some_and(|name| is_wide_bit_int(&name, size)) => {
                Some(wide_bit_int(size))
            }
            dw::DW_ATE_signed
            | dw::DW_ATE_unsigned
            | dw::DW_ATE_signed_char
            | dw::DW_ATE_unsigned_char
            | dw::DW_ATE_boolean
            | dw::DW_ATE_address
            | dw::DW_ATE_UTF
            | dw::DW_ATE_UCS
            | dw::DW_ATE_ASCII => match size {
                0 => Some(Shape::Void),
                1 | 2 | 4 | 8 | 16 => Some(Shape::Integer(size)),
                _ => None,
            },
            _ => None,
        }
    }

    /// A pointer to a member function is two words, to data one.
    fn member_pointer(&self, die: &Die<'a>) -> Option<Shape> {
        let target = self.bare(&self.follow(die, dw::DW_AT_type)?)?;
        if target.entry.tag() != dw::DW_TAG_subroutine_type {
            return Some(Shape::Integer(8));
        }
        Some(wide_bit_int(16)) // two words
    }

    fn array_shape(&self, die: &Die<'a>, depth: u32) -> Option<Shape> {
        let element = self.shape(&self.follow(die, dw::DW_AT_type)?, depth + 1)?;
        let (mut count, mut flexible) = (1_u64, false);
        for child in self.children(die) {
            if child.entry.tag() == dw::DW_TAG_subrange_type {
                let upper = || self.number(&child, dw::DW_AT_upper_bound)?.checked_add(1);
                // A flexible array member has neither, and no bytes.
                let n = self.number(&child, dw::DW_AT_count).or_else(upper);
                flexible |= n.is_none();
                count = count.checked_mul(n.unwrap_or(0))?;
            }
        }
        let size = element.size().checked_mul(count)?;
        if die.entry.attr(dw::DW_AT_GNU_vector).is_some() {
            let is_lone = matches!(element, Shape::Float(_)) && count == 1;
            return Some(if is_lone { Shape::LoneFloatVector(size) } else { Shape::Vector(size) });
        }
        // Only what may be in registers is looked at element by element.
        let n = if size <= 64 { count.min(64) } else { 0 };
        let mut record = Record::new(RecordKind::Array, size, element.align());
        if let Shape::Aggregate(inner) = &element {
            record.by_address = inner.by_address;
            record.may_be_by_address = inner.may_be_by_address;
            record.align_is_stated = inner.align_is_stated;
        }
        record.flexible = flexible;
        record.fields = (0..n).map(|i| (i * element.size(), element.clone())).collect();
        Some(Shape::Aggregate(record))
    }

    fn record_shape(&self, die: &Die<'a>, size: u64, depth: u32) -> Option<Shape> {
        if die.entry.attr(dw::DW_AT_declaration).is_some() {
            return None;
        }
        let is_union = die.entry.tag() == dw::DW_TAG_union_type;
        let kind = if is_union { RecordKind::Union } else { RecordKind::Struct };
        let mut record = Record::new(kind, size, 1);
        let mut gaps = Gaps::default();
        let stated = self.number(die, dw::DW_AT_calling_convention);
        for child in self.children(die) {
            match child.entry.tag() {
                dw::DW_TAG_member | dw::DW_TAG_inheritance => {
                    self.add_field(&mut record, &mut gaps, &child, depth)?;
                }
                dw::DW_TAG_subprogram => match self.must_run(&child, die) {
                    MustRun::Yes => record.by_address = true,
                    MustRun::Perhaps => record.may_be_by_address = true,
                    MustRun::No => {}
                },
                dw::DW_TAG_variant_part => {
                    record.variants = Some(self.variants(&child, depth)?);
                }
                _ => {}
            }
        }
        match stated {
            Some(CC_PASS_BY_REFERENCE) => record.by_address = true,
            Some(CC_PASS_BY_VALUE) => {
                (record.by_address, record.may_be_by_address) = (false, false);
            }
            // gcc always marks what the source only declares; clang marks the class, or nothing.
            _ if record.may_be_by_address && !self.is_llvm(die) => record.by_address = true,
            _ => {}
        }
        if let Some(align) = self.number(die, dw::DW_AT_alignment) {
            (record.align, record.align_is_stated) = (align.max(1), true);
        } else if size > 0 && !size.is_multiple_of(record.align) {
            record.align = 1 << size.trailing_zeros().min(6); // packed
        }
        record.unexplained = gaps.finish(size, record.align);
        Some(Shape::Aggregate(record))
    }

    fn variants(&self, part: &Die<'a>, depth: u32) -> Option<Variants> {
        let member_of = |die: &Die<'a>| {
            let offset = self.number(die, dw::DW_AT_data_member_location).unwrap_or(0);
            let shape = self.shape(&self.follow(die, dw::DW_AT_type)?, depth + 1)?;
            Some((offset, Box::new(shape)))
        };
        let tag = match self.follow(part, dw::DW_AT_discr) {
            Some(tag) => Some(member_of(&tag)?),
            None => None,
        };
        let mut arms = Vec::new();
        for variant in self.children(part) {
            if variant.entry.tag() != dw::DW_TAG_variant {
                continue;
            }
            let members = self.children(&variant);
            let member = members.iter().find(|die| die.entry.tag() == dw::DW_TAG_member)?;
            let (_, data) = member_of(member)?;
            let has_value = variant.entry.attr(dw::DW_AT_discr_value).is_some();
            arms.push(Arm { has_value, data });
        }
        Some(Variants { tag, arms })
    }

    /// The alignment that a member has by its declaration or by that of its type's name.
    fn stated_align(&self, member: &Die<'a>) -> u64 {
        let mut align = self.number(member, dw::DW_AT_alignment).unwrap_or(1);
        let mut next = self.follow(member, dw::DW_AT_type);
        for _ in 0..MAX_DEPTH {
            let Some(die) = next.filter(|die| is_transparent(die.entry.tag())) else { break };
            align = align.max(self.number(&die, dw::DW_AT_alignment).unwrap_or(1));
            next = self.follow(&die, dw::DW_AT_type);
        }
        align
    }

    fn add_field(
        &self,
        record: &mut Record,
        gaps: &mut Gaps,
        member: &Die<'a>,
        depth: u32,
    ) -> Option<()> {
        let is_static = member.entry.attr(dw::DW_AT_external).is_some()
            || member.entry.attr(dw::DW_AT_declaration).is_some();
        if is_static {
            return Some(());
        }
        if member.entry.attr(dw::DW_AT_virtuality).is_some() {
            record.by_address = true; // a virtual base
            return Some(());
        }
        let shape = self.shape(&self.follow(member, dw::DW_AT_type)?, depth + 1)?;
        let align = shape.align().max(self.stated_align(member));
        record.align = record.align.max(align);
        if let Some(bit_size) = self.number(member, dw::DW_AT_bit_size) {
            let offset = match self.number(member, dw::DW_AT_data_bit_offset) {
                Some(bits) => bits / 8,
                None => self.number(member, dw::DW_AT_data_member_location)?,
            };
            // DWARF 4 states the storage unit's offset and counts bits from its far end.
            let from_end = member.entry.attr(dw::DW_AT_bit_offset).is_some();
            let first_bit = self.number(member, dw::DW_AT_data_bit_offset).unwrap_or(0) % 8;
            let bytes = first_bit.checked_add(bit_size)?.div_ceil(8).min(MAX_BIT_FIELD_BYTES);
            let bytes = if from_end { shape.size() } else { bytes };
            let last = offset.checked_add(bytes.saturating_sub(1))?;
            record.bit_fields.extend((offset..=last).step_by(8).chain([last]));
            gaps.add(offset, bytes, align);
            return Some(());
        }
        let offset = match member.entry.attr(dw::DW_AT_data_member_location) {
            Some(_) => self.number(member, dw::DW_AT_data_member_location)?,
            None => 0,
        };
        gaps.add(offset, shape.size(), align);
        if let Shape::Aggregate(inner) = &shape {
            record.by_address |= inner.by_address;
            record.may_be_by_address |= inner.may_be_by_address;
            record.flexible |= inner.flexible;
            let eightbyte = |at: &u64| offset.saturating_add(*at) / 8 * 8;
            gaps.eightbytes.extend(inner.unexplained.iter().map(eightbyte));
        }
        record.fields.push((offset, shape));
        Some(())
    }

    fn is_llvm(&self, die: &Die<'a>) -> bool {
        let producer =
            self.root(die).and_then(|root| self.inherited_text(&root, dw::DW_AT_producer));
        producer.is_some_and(|producer| !producer.starts_with("GNU "))
    }
}
