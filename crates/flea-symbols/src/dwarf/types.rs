//! What a type's bytes are: sizes, alignments, members. Start at [`Dies::type_of`]. Names are
//! in [`super::spelling`].

use gimli::{AttributeValue, constants as dw};

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
    /// Vector of this many bytes.
    Vector(u64),
    Aggregate(Record),
}

/// A struct, union, class or array, by value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) size: u64,
    pub(crate) align: u64,
    /// C++: has a copy constructor or destructor that must run, so it is passed by address.
    pub(crate) by_address: bool,
    /// Offset and shape of each member.
    pub(crate) fields: Vec<(u64, Shape)>,
    /// A bit field, by its byte offset: of class INTEGER whatever its type.
    pub(crate) bit_fields: Vec<u64>,
}

impl Shape {
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Void => 0,
            Self::Integer(size) | Self::Float(size) | Self::Complex(size) | Self::Vector(size) => {
                *size
            }
            Self::LongDouble => 16,
            Self::Aggregate(record) => record.size,
        }
    }

    pub(crate) fn align(&self) -> u64 {
        match self {
            Self::Complex(size) => (*size / 2).max(1),
            Self::Aggregate(record) => record.align,
            _ => self.size().max(1),
        }
    }
}

impl<'a> Dies<'a> {
    /// The type that `die`'s DW_AT_type names, as people spell it; `Type::Void` without one.
    pub(crate) fn type_of(&self, die: &Die<'a>) -> Option<(Type, Shape)> {
        let Some((owner, _)) = self.inherited(die, dw::DW_AT_type) else {
            return Some((Type::Void, Shape::Void));
        };
        let target = self.follow(&owner, dw::DW_AT_type)?;
        let shape = self.shape(&target, 0)?;
        let name = self.spelling(&target, 0);
        Some((self.c_type(&target, name, &shape), shape))
    }

    fn c_type(&self, target: &Die<'a>, name: String, shape: &Shape) -> Type {
        let size_bytes = u32::try_from(shape.size()).unwrap_or(u32::MAX);
        let bare = self.bare(target);
        match shape {
            Shape::Void => Type::Void,
            Shape::Float(_) | Shape::LongDouble => Type::Float { name, size_bytes },
            Shape::Complex(_) | Shape::Vector(_) | Shape::Aggregate(_) => {
                Type::Aggregate { name, size_bytes }
            }
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
        let size = || self.number(die, dw::DW_AT_byte_size);
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
                "_Float128" | "__float128" | "_Float64x128" => Some(Shape::Float(16)),
                _ => None,
            },
            dw::DW_ATE_float if matches!(size, 2 | 4 | 8) => Some(Shape::Float(size)),
            dw::DW_ATE_complex_float if matches!(size, 8 | 16 | 32) => Some(Shape::Complex(size)),
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
        let word = Shape::Integer(8);
        Some(Shape::Aggregate(Record {
            size: 16,
            align: 8,
            by_address: false,
            fields: vec![(0, word.clone()), (8, word)],
            bit_fields: Vec::new(),
        }))
    }

    fn array_shape(&self, die: &Die<'a>, depth: u32) -> Option<Shape> {
        let element = self.shape(&self.follow(die, dw::DW_AT_type)?, depth + 1)?;
        let mut count = 1_u64;
        for child in self.children(die) {
            if child.entry.tag() == dw::DW_TAG_subrange_type {
                let upper = || self.number(&child, dw::DW_AT_upper_bound)?.checked_add(1);
                // A flexible array member has neither, and no bytes.
                let n = self.number(&child, dw::DW_AT_count).or_else(upper).unwrap_or(0);
                count = count.checked_mul(n)?;
            }
        }
        let size = element.size().checked_mul(count)?;
        if die.entry.attr(dw::DW_AT_GNU_vector).is_some() {
            return Some(Shape::Vector(size));
        }
        // Only what may be in registers is looked at element by element.
        let n = if size <= 64 { count } else { 0 };
        let fields = (0..n.min(64)).map(|i| (i * element.size(), element.clone())).collect();
        let align = element.align();
        Some(Shape::Aggregate(Record {
            size,
            align,
            by_address: false,
            fields,
            bit_fields: vec![],
        }))
    }

    fn record_shape(&self, die: &Die<'a>, size: u64, depth: u32) -> Option<Shape> {
        if die.entry.attr(dw::DW_AT_declaration).is_some() {
            return None;
        }
        let mut record =
            Record { size, align: 1, by_address: false, fields: vec![], bit_fields: vec![] };
        let stated = self.number(die, dw::DW_AT_calling_convention);
        for child in self.children(die) {
            match child.entry.tag() {
                dw::DW_TAG_member | dw::DW_TAG_inheritance => {
                    self.add_field(&mut record, &child, depth)?;
                }
                dw::DW_TAG_subprogram if self.must_run(&child, die) => record.by_address = true,
                dw::DW_TAG_variant_part => return None,
                _ => {}
            }
        }
        match stated {
            Some(4) => record.by_address = true,  // DW_CC_pass_by_reference
            Some(5) => record.by_address = false, // DW_CC_pass_by_value
            _ => {}
        }
        if let Some(align) = self.number(die, dw::DW_AT_alignment) {
            record.align = align;
        }
        Some(Shape::Aggregate(record))
    }

    fn add_field(&self, record: &mut Record, member: &Die<'a>, depth: u32) -> Option<()> {
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
        record.align = record.align.max(shape.align());
        if member.entry.attr(dw::DW_AT_bit_size).is_some() {
            let offset = match self.number(member, dw::DW_AT_data_bit_offset) {
                Some(bits) => bits / 8,
                None => self.number(member, dw::DW_AT_data_member_location)?,
            };
            // DWARF 4 states the storage unit's offset and counts bits from its far end.
            let from_end = member.entry.attr(dw::DW_AT_bit_offset).is_some();
            let last = offset + if from_end { shape.size().saturating_sub(1) } else { 0 };
            record.bit_fields.extend((offset..=last).step_by(8).chain([last]));
            return Some(());
        }
        let offset = match member.entry.attr(dw::DW_AT_data_member_location) {
            Some(_) => self.number(member, dw::DW_AT_data_member_location)?,
            None => 0,
        };
        record.by_address |= matches!(&shape, Shape::Aggregate(inner) if inner.by_address);
        record.fields.push((offset, shape));
        Some(())
    }

    /// A destructor, copy or move constructor that the source wrote itself.
    fn must_run(&self, method: &Die<'a>, class: &Die<'a>) -> bool {
        let is_trivial_if_defaulted = self.number(method, dw::DW_AT_defaulted) == Some(1);
        if method.entry.attr(dw::DW_AT_virtuality).is_some() {
            return true; // a vtable pointer makes the copy constructor non-trivial
        }
        let implicit = method.entry.attr(dw::DW_AT_artificial).is_some();
        let Some(name) = self.name(method).filter(|_| !is_trivial_if_defaulted && !implicit) else {
            return false;
        };
        if name.starts_with('~') {
            return true;
        }
        let class_name = self.name(class).unwrap_or_default();
        let plain = class_name.split('<').next().unwrap_or_default();
        if name.split('<').next() != Some(plain) || plain.is_empty() {
            return false;
        }
        // A constructor: copies if its first parameter behind `this` refers to the class.
        let children = self.children(method);
        let mut params = children.iter().filter(|die| {
            die.entry.tag() == dw::DW_TAG_formal_parameter
                && die.entry.attr(dw::DW_AT_artificial).is_none()
        });
        let target = params.next().and_then(|param| self.follow(param, dw::DW_AT_type));
        let reference = target.filter(|die| {
            matches!(die.entry.tag(), dw::DW_TAG_reference_type | dw::DW_TAG_rvalue_reference_type)
        });
        let referred = reference
            .and_then(|die| self.follow(&die, dw::DW_AT_type))
            .and_then(|die| self.bare(&die));
        referred.is_some_and(|die| die.entry.offset() == class.entry.offset())
    }
}
