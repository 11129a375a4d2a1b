//! Which number a place in a graph of types stands for. Start at [`answer`].

use super::spec::{Spec, Step};
use super::{CoreFault, CoreKind};
use crate::types::{Type, TypeId, Types};

/// What a graph of types says to a relocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// `None`: nothing that a program could use.
    pub(super) value: Option<u64>,
    /// The type and size of a field that one load reads, where an offset was asked for.
    pub(super) field: Option<(TypeId, u64)>,
    /// Compilers agree on it: the instruction must hold it already.
    pub(super) is_certain: bool,
}

impl Answer {
    /// Whether instructions become the same by both.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let size = |answer: &Self| answer.field.map(|(_, size_bytes)| size_bytes);
        self.value == other.value && size(self) == size(other)
    }
}

/// What the object's and the target's types say, and what that means.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    pub(super) original: Answer,
    pub(super) answer: Answer,
    /// The field's size is not the same, and a load of the other size reads the same value.
    pub(super) is_adjustable: bool,
    pub(super) is_offset: bool,
    /// Why there is no answer, if there is none.
    pub(super) reason: String,
}

/// Where a field is, in bytes that can be loaded at once.
struct Field {
    ty: TypeId,
    byte_offset: u64,
    size_bytes: u64,
    bit_offset: u64,
    bit_size: u64,
    is_bit_field: bool,
}

/// What `types` say at `spec`; without one, that they have no such place.
pub(super) fn answer(
    kind: CoreKind,
    types: &Types,
    spec: Option<&Spec>,
) -> Result<Answer, CoreFault> {
    let plain = |value| Answer { value, field: None, is_certain: true };
    let exists = u64::from(spec.is_some());
    let Some(spec) = spec else {
        let value = match kind {
            CoreKind::FieldExists
            | CoreKind::TypeExists
            | CoreKind::TypeMatches
            | CoreKind::EnumvalExists
            // Linux: type relocations are 0 where there is no such type.
            | CoreKind::TypeSize
            | CoreKind::TypeIdTarget => Some(0),
            _ => None,
        };
        return Ok(plain(value));
    };
    Ok(match kind {
        CoreKind::FieldExists
        | CoreKind::TypeExists
        | CoreKind::TypeMatches
        | CoreKind::EnumvalExists => plain(Some(exists)),
        // Numbers in two graphs have nothing to do with each other.
        CoreKind::TypeIdLocal | CoreKind::TypeIdTarget => {
            Answer { value: Some(spec.root.index() as u64), field: None, is_certain: false }
        }
        CoreKind::TypeSize => plain(Some(types.size_bytes(spec.root).unwrap_or(0))),
        CoreKind::EnumvalValue => {
            let Type::Enum { values, .. } = types.get(spec.root) else { return Ok(plain(None)) };
            let value = spec.enumerator.and_then(|index| values.get(index));
            plain(value.map(|(_, value)| *value))
        }
        _ => of_field(kind, types, &field(types, spec)?),
    })
}

fn of_field(kind: CoreKind, types: &Types, field: &Field) -> Answer {
    let end = field.bit_offset + field.bit_size - field.byte_offset * 8;
    let (value, is_certain) = match kind {
        CoreKind::FieldByteOffset => (field.byte_offset, !field.is_bit_field),
        CoreKind::FieldByteSize => (field.size_bytes, !field.is_bit_field),
        CoreKind::FieldSigned => (u64::from(is_signed(types.get(field.ty))), true),
        CoreKind::FieldLshiftU64 => (64u64.wrapping_sub(end), false),
        _ => (64u64.wrapping_sub(field.bit_size), true),
    };
    let is_load = kind == CoreKind::FieldByteOffset && !field.is_bit_field;
    Answer {
        value: Some(value),
        field: is_load.then_some((field.ty, field.size_bytes)),
        is_certain,
    }
}

fn field(types: &Types, spec: &Spec) -> Result<Field, CoreFault> {
    let bit_offset = spec.bit_offset;
    let (ty, bit_size) = match spec.steps.last() {
        Some(Step::Member { owner, index }) => match types.get(*owner) {
            Type::Struct { members, .. } => {
                let member = members.get(*index).ok_or(CoreFault::Damaged("no such member"))?;
                (member.ty, member.bit_size)
            }
            _ => return Err(CoreFault::Damaged("a member of what has none")),
        },
        Some(Step::Element { of, .. }) => (*of, None),
        None => return Err(CoreFault::Damaged("no steps")),
    };
    // A flexible array has no bytes of its own.
    let type_bytes = types.size_bytes(ty).unwrap_or(0);
    let Some(bit_size) = bit_size else {
        let bit_size =
            type_bytes.checked_mul(8).ok_or(CoreFault::Damaged("a size without bounds"))?;
        let byte_offset = bit_offset / 8;
        bit_offset.checked_add(bit_size).ok_or(CoreFault::Damaged("an offset without bounds"))?;
        return Ok(Field {
            ty,
            byte_offset,
            size_bytes: type_bytes,
            bit_offset: byte_offset * 8,
            bit_size,
            is_bit_field: false,
        });
    };
    let bit_size = u64::from(bit_size);
    let end = bit_offset.checked_add(bit_size).ok_or(CoreFault::WideBitField)?;
    let mut size_bytes = type_bytes.clamp(1, 8).next_power_of_two();
    loop {
        // The smallest aligned word that has all its bits.
        let byte_offset = bit_offset / 8 / size_bytes * size_bytes;
        if end <= (byte_offset + size_bytes) * 8 {
            let is_bit_field = true;
            return Ok(Field { ty, byte_offset, size_bytes, bit_offset, bit_size, is_bit_field });
        }
        if size_bytes >= 8 {
            return Err(CoreFault::WideBitField);
        }
        size_bytes *= 2;
    }
}

fn is_signed(ty: &Type) -> bool {
    matches!(ty, Type::Int { signed: true, .. } | Type::Enum { signed: true, .. })
}

/// Whether a load of the object's field may become one of the target's, which has another size:
/// the program sees zeros above it, as in Linux.
pub(super) fn may_change_size(
    local: &Types,
    original: &Answer,
    target: &Types,
    answer: &Answer,
) -> bool {
    let (Some((local_ty, _)), Some((target_ty, _))) = (original.field, answer.field) else {
        return false;
    };
    matches!(
        (local.get(local_ty), target.get(target_ty)),
        (Type::Pointer { .. }, Type::Pointer { .. })
            | (Type::Int { signed: false, .. }, Type::Int { signed: false, .. })
    )
}
