//! Where C puts the members of a struct, and what has to be between them so that each is where
//! the target has it. Start at [`Printer::plan`]. Knows nothing of text.
//!
//! Natural layout first: a member begins at the next multiple of its alignment, a bit-field
//! where the one before ends unless it would cross a word of its type. Where that cannot
//! reproduce the offsets or the size, all is packed: then each begins where the one before ends.
//! What begins before that (a union in disguise: Rust's `enum`s, C++'s reused tail padding) is
//! in a *lane* of its own, all lanes over each other.

use super::Printer;
use super::spell::{is_array_in_c, number};
use crate::types::{Member, Type, TypeId};

/// Anonymous structures nested deeper than this are printed as bytes.
pub(super) const MAX_DEPTH: u32 = 32;
/// No larger alignment is asked for than a word's.
const MAX_ALIGN: u64 = 8;

/// How to write a struct or union.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) lanes: Vec<Vec<Item>>,
    /// Stated where it is packed.
    pub(super) is_packed: bool,
    pub(super) align: u64,
}

/// One line of a struct.
#[derive(Debug)]
pub(super) enum Item {
    Member(Member),
    /// Bytes of nothing.
    Bytes(u64),
    /// Bits of nothing, within a byte.
    Bits(u64),
}

/// Takes members in their order and puts padding between.
struct Placer<'h, 'p> {
    printer: &'h mut Printer<'p>,
    is_packed: bool,
    /// In bits.
    end: u64,
    align: u64,
    items: Vec<Item>,
    depth: u32,
}

impl Printer<'_> {
    /// How to write the struct or union `id`.
    pub(super) fn plan(&mut self, id: TypeId, depth: u32) -> Plan {
        let Type::Struct { is_union, size_bytes, members, .. } = self.types.get(id) else {
            return Plan { lanes: Vec::new(), is_packed: false, align: 1 };
        };
        let (is_union, size) = (*is_union, u64::from(*size_bytes));
        let members: Vec<Member> = members
            .iter()
            .filter(|member| self.end_of(member).is_some_and(|end| end <= size * 8))
            .cloned()
            .collect();
        if is_union {
            self.plan_union(members, size, depth)
        } else {
            self.plan_struct(members, size, depth)
        }
    }

    fn plan_struct(&mut self, members: Vec<Member>, size: u64, depth: u32) -> Plan {
        let mut lanes = self.lanes(members);
        if lanes.is_empty() {
            lanes.push(Vec::new());
        }
        for is_packed in [false, true] {
            let placed: Option<Vec<(Vec<Item>, u64)>> =
                lanes.iter().map(|lane| self.place(lane, size, is_packed, depth)).collect();
            if let Some(placed) = placed {
                let align = placed.iter().map(|(_, align)| *align).max().unwrap_or(1);
                let align = if is_packed { packed_align(align, size) } else { align };
                let lanes = placed.into_iter().map(|(items, _)| items).collect();
                return Plan { lanes, is_packed, align };
            }
        }
        // Damage that no layout has: its bytes.
        Plan { lanes: vec![vec![Item::Bytes(size)]], is_packed: false, align: 1 }
    }

    fn plan_union(&mut self, members: Vec<Member>, size: u64, depth: u32) -> Plan {
        let at_start = members.into_iter().filter(|member| member.bit_offset == 0);
        let (mut items, mut align, mut largest) = (Vec::new(), 1, 0);
        for member in at_start {
            align = align.max(self.align_of_member(&member, depth));
            largest = largest.max(self.end_of(&member).unwrap_or(0).div_ceil(8));
            items.push(Item::Member(member));
        }
        let is_packed = !size.is_multiple_of(align);
        if is_packed {
            align = packed_align(align, size);
        }
        if largest.next_multiple_of(align) < size {
            items.push(Item::Bytes(size));
        }
        Plan { lanes: vec![items], is_packed, align }
    }

    /// Members by position, in as few lanes as they need not to lie over each other.
    fn lanes(&self, mut members: Vec<Member>) -> Vec<Vec<Member>> {
        members.sort_by_key(|member| member.bit_offset);
        let mut lanes: Vec<(u64, Vec<Member>)> = Vec::new();
        for member in members {
            let end = self.end_of(&member).unwrap_or(u64::MAX);
            let is_first = lanes.is_empty();
            let free = lanes.iter_mut().find(|(lane_end, _)| *lane_end <= member.bit_offset);
            match free {
                Some((lane_end, lane)) => {
                    *lane_end = end;
                    lane.push(member);
                }
                // An empty base class lies over the first member.
                None if !is_first && self.is_empty(member.ty) => {}
                None => lanes.push((end, vec![member])),
            }
        }
        lanes.into_iter().map(|(_, lane)| lane).collect()
    }

    fn is_empty(&self, id: TypeId) -> bool {
        matches!(self.types.get(id), Type::Struct { members, .. } if members.is_empty())
    }

    fn place(
        &mut self,
        members: &[Member],
        size: u64,
        is_packed: bool,
        depth: u32,
    ) -> Option<(Vec<Item>, u64)> {
        let mut placer =
            Placer { printer: self, is_packed, end: 0, align: 1, items: Vec::new(), depth };
        for member in members {
            placer.add(member)?;
        }
        placer.finish(size)
    }

    /// The bit behind it; `None` for what cannot be written.
    fn end_of(&self, member: &Member) -> Option<u64> {
        if let Some(bits) = member.bit_size {
            let (_, size) = self.bit_field_type(member.ty, bits)?;
            return member.bit_offset.checked_add(bits.into()).filter(|_| size > 0 && bits > 0);
        }
        if !member.bit_offset.is_multiple_of(8) || !self.can_be_a_member(member) {
            return None;
        }
        let bits = self.size_of(member.ty)?.checked_mul(8)?;
        member.bit_offset.checked_add(bits)
    }

    /// Only structures may have no name.
    fn can_be_a_member(&self, member: &Member) -> bool {
        !member.name.is_empty() || matches!(self.types.get(member.ty), Type::Struct { .. })
    }

    /// Bytes of a member of this type: an array without a length has none.
    pub(super) fn size_of(&self, id: TypeId) -> Option<u64> {
        match self.types.get(id) {
            Type::Array { n_elements: 0, .. } => Some(0),
            _ => self.types.size_bytes(id),
        }
    }

    fn align_of_member(&mut self, member: &Member, depth: u32) -> u64 {
        match member.bit_size.and_then(|bits| self.bit_field_type(member.ty, bits)) {
            Some((_, size)) => size,
            None => self.align_of(member.ty, depth),
        }
    }

    /// As the header spells the type.
    fn align_of(&mut self, id: TypeId, depth: u32) -> u64 {
        if let Some(align) = self.aligns.get(&id) {
            return *align;
        }
        if depth > MAX_DEPTH {
            return 1;
        }
        // For what contains itself, which only damage does.
        self.aligns.insert(id, 1);
        let align = match self.types.get(id) {
            Type::Pointer { .. } => 8,
            Type::Enum { size_bytes, .. } => u64::from(*size_bytes),
            // Without elements that have a size, it is written as bytes.
            Type::Array { of, .. } if self.size_of(*of).is_none() => 1,
            Type::Array { of, .. } => self.align_of(*of, depth + 1),
            Type::Struct { .. } => self.plan(id, depth + 1).align,
            ty => match number(ty) {
                Some(_) if is_array_in_c(ty) => 1,
                Some(_) => self.size_of(id).unwrap_or(1),
                None => 1,
            },
        };
        self.aligns.insert(id, align);
        align
    }
}

impl Placer<'_, '_> {
    fn add(&mut self, member: &Member) -> Option<()> {
        let end = self.printer.end_of(member)?;
        let align = self.printer.align_of_member(member, self.depth);
        if member.bit_size.is_some() {
            self.pad_to_bit(member.bit_offset);
            // It would begin in the next word, and does not.
            let word = align * 8;
            let crosses = member.bit_offset / word != (end - 1) / word;
            if crosses && !self.is_packed {
                return None;
            }
        } else {
            let at = member.bit_offset / 8;
            if !self.is_packed && !at.is_multiple_of(align) {
                return None;
            }
            let natural =
                self.end.div_ceil(8).next_multiple_of(if self.is_packed { 1 } else { align });
            if natural < at {
                self.pad_to_byte(at);
            }
        }
        self.align = self.align.max(align);
        self.end = end;
        self.items.push(Item::Member(member.clone()));
        Some(())
    }

    fn pad_to_byte(&mut self, at: u64) {
        let from = self.end.div_ceil(8);
        if from < at {
            self.items.push(Item::Bytes(at - from));
        }
        self.end = self.end.max(at * 8);
    }

    fn pad_to_bit(&mut self, at: u64) {
        let in_byte = self.end % 8;
        if in_byte != 0 && self.end < at {
            let bits = (8 - in_byte).min(at - self.end);
            self.items.push(Item::Bits(bits));
            self.end += bits;
        }
        if self.end < at {
            self.pad_to_byte(at / 8);
        }
        if self.end < at {
            self.items.push(Item::Bits(at - self.end));
            self.end = at;
        }
    }

    fn finish(mut self, size: u64) -> Option<(Vec<Item>, u64)> {
        let align = if self.is_packed { 1 } else { self.align };
        if !size.is_multiple_of(align) {
            return None;
        }
        if self.end.div_ceil(8).next_multiple_of(align) < size {
            self.pad_to_byte(size);
        }
        Some((self.items, self.align))
    }
}

/// What a packed struct may be aligned to, so that its members can be loaded at once.
fn packed_align(natural: u64, size: u64) -> u64 {
    let of_size = if size == 0 { 1 } else { 1 << size.trailing_zeros().min(63) };
    natural.min(of_size).min(MAX_ALIGN)
}
