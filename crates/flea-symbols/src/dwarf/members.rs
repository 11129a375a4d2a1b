//! Members of structs, classes, unions and Rust's `enum`s with data. Start at
//! [`Graph::record`].

use flea_object::types::{Member, Type, TypeId};
use gimli::{AttributeValue, Operation, constants as dw};

use super::dies::Die;
use super::graph::Graph;

/// What DWARF leaves without a name: what tells the variants of an `enum` with data apart.
const DISCRIMINANT: &str = "discriminant";

impl<'a> Graph<'_, 'a> {
    /// The type that `die` defines.
    pub(super) fn record(&mut self, die: &Die<'a>, name: String) -> Type {
        let Some(size_bytes) = self.size_of(die) else { return Type::Opaque { name } };
        let mut members = Vec::new();
        for child in self.dies.children(die) {
            match child.entry.tag() {
                dw::DW_TAG_member | dw::DW_TAG_inheritance => members.extend(self.member(&child)),
                dw::DW_TAG_variant_part => {
                    let variants = self.variants(&child, size_bytes);
                    let ty = self.add_nameless(variants);
                    members.push(Member { name: String::new(), ty, bit_offset: 0, bit_size: None });
                }
                _ => {}
            }
        }
        let is_union = die.entry.tag() == dw::DW_TAG_union_type;
        Type::Struct { name, is_union, size_bytes, members }
    }

    /// `None` for what has no place in each value: static members, virtual bases.
    fn member(&mut self, die: &Die<'a>) -> Option<Member> {
        let is_static = die.entry.attr(dw::DW_AT_external).is_some()
            || die.entry.attr(dw::DW_AT_declaration).is_some();
        let is_base = die.entry.tag() == dw::DW_TAG_inheritance;
        let is_virtual = is_base && die.entry.attr(dw::DW_AT_virtuality).is_some();
        if is_static || is_virtual {
            return None;
        }
        let ty = self.type_of(die);
        let name = if is_base { None } else { self.dies.name(die) }.unwrap_or_default();
        let bit_size = self.dies.number(die, dw::DW_AT_bit_size);
        let bit_size = bit_size.and_then(|bits| u32::try_from(bits).ok());
        let bit_offset = self.bit_offset(die, ty, bit_size)?;
        Some(Member { name, ty, bit_offset, bit_size })
    }

    fn bit_offset(&self, die: &Die<'a>, ty: TypeId, bit_size: Option<u32>) -> Option<u64> {
        if let Some(bits) = self.dies.number(die, dw::DW_AT_data_bit_offset) {
            return Some(bits);
        }
        let bits = self.byte_offset(die)?.checked_mul(8)?;
        let Some(from_end) = self.dies.number(die, dw::DW_AT_bit_offset) else {
            return Some(bits);
        };
        // DWARF 3: counted from the end of the storage unit.
        let unit_bytes = self.size_of(die).map(u64::from).or_else(|| self.types.size_bytes(ty))?;
        let behind = from_end.checked_add(bit_size?.into())?;
        bits.checked_add(unit_bytes.checked_mul(8)?.checked_sub(behind)?)
    }

    /// 0 where DWARF does not say, as in unions.
    fn byte_offset(&self, die: &Die<'a>) -> Option<u64> {
        let Some(attribute) = die.entry.attr(dw::DW_AT_data_member_location) else {
            return Some(0);
        };
        if let Some(offset) = attribute.udata_value() {
            return Some(offset);
        }
        // DWARF 2: an expression, which adds to the address of the whole.
        let AttributeValue::Exprloc(expression) = attribute.value() else { return None };
        let mut operations = expression.operations(die.unit.encoding());
        match (operations.next(), operations.next()) {
            (Ok(Some(Operation::PlusConstant { value })), Ok(None)) => Some(value),
            _ => None,
        }
    }

    /// The union of all variants, and of what tells them apart.
    fn variants(&mut self, part: &Die<'a>, size_bytes: u32) -> Type {
        let mut members = Vec::new();
        let tag = self.dies.follow(part, dw::DW_AT_discr);
        if let Some(mut tag) = tag.and_then(|tag| self.member(&tag)) {
            if tag.name.is_empty() {
                tag.name = DISCRIMINANT.into();
            }
            // A union's members begin at its start.
            let lone = Type::Struct {
                name: String::new(),
                is_union: false,
                size_bytes,
                members: vec![tag],
            };
            let ty = self.add_nameless(lone);
            members.push(Member { name: String::new(), ty, bit_offset: 0, bit_size: None });
        }
        for variant in self.dies.children(part) {
            if variant.entry.tag() != dw::DW_TAG_variant {
                continue;
            }
            let children = self.dies.children(&variant);
            let in_variant = children.iter().filter(|die| die.entry.tag() == dw::DW_TAG_member);
            for member in in_variant {
                members.extend(self.member(member).filter(|member| member.bit_offset == 0));
            }
        }
        Type::Struct { name: String::new(), is_union: true, size_bytes, members }
    }
}
