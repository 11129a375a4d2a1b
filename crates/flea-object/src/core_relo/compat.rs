//! Which types of the target stand for which of the object's. Linux knows three relations:
//! fields that may be read as one another, types of which one is the other's version, and types
//! that match member by member.

use crate::types::{Type, TypeId, Types, c_name, essential_name};

/// Pointers, arrays and members nested deeper than this are not compared.
const MAX_DEPTH: u32 = 32;

/// Whether `target` may be what the object calls `local`, by its kind alone.
pub(super) fn is_same_kind(local: &Type, target: &Type) -> bool {
    match (local, target) {
        (Type::Struct { is_union: a, .. }, Type::Struct { is_union: b, .. }) => a == b,
        (Type::Opaque { .. }, Type::Struct { .. }) => true,
        (Type::Struct { .. }, Type::Opaque { .. }) => false,
        _ => std::mem::discriminant(local) == std::mem::discriminant(target),
    }
}

/// Whether a field of type `target_id` can be read as one of type `local_id`: structures always,
/// integers and pointers always, enumerations of the same name.
pub(super) fn are_fields_compatible(
    local: &Types,
    local_id: TypeId,
    target: &Types,
    target_id: TypeId,
) -> bool {
    let (mut local_id, mut target_id) = (local_id, target_id);
    for _ in 0..MAX_DEPTH {
        match (local.get(local_id), target.get(target_id)) {
            (Type::Struct { .. }, Type::Struct { .. })
            | (Type::Int { .. }, Type::Int { .. })
            | (Type::Float { .. }, Type::Float { .. })
            | (Type::Pointer { .. }, Type::Pointer { .. }) => return true,
            (Type::Enum { name: a, .. }, Type::Enum { name: b, .. })
            | (Type::Opaque { name: a }, Type::Opaque { name: b }) => {
                return a.is_empty() || b.is_empty() || have_same_name(a, b);
            }
            (Type::Array { of: a, .. }, Type::Array { of: b, .. }) => {
                (local_id, target_id) = (*a, *b);
            }
            _ => return false,
        }
    }
    false
}

/// Whether one is a version of the other: of the same kind, what they point to included.
pub(super) fn are_compatible(
    local: &Types,
    local_id: TypeId,
    target: &Types,
    target_id: TypeId,
) -> bool {
    let (mut local_id, mut target_id) = (local_id, target_id);
    for _ in 0..MAX_DEPTH {
        match (local.get(local_id), target.get(target_id)) {
            (Type::Pointer { to: a }, Type::Pointer { to: b })
            | (Type::Array { of: a, .. }, Type::Array { of: b, .. }) => {
                (local_id, target_id) = (*a, *b);
            }
            (a, b) => return is_same_kind(a, b),
        }
    }
    false
}

/// Whether the target's type has all that the object's has: members, enumerators, sizes.
pub(super) fn matches(local: &Types, local_id: TypeId, target: &Types, target_id: TypeId) -> bool {
    Matcher { local, target, steps_left: 1 << 16 }.matches(local_id, target_id, false, 0)
}

struct Matcher<'t> {
    local: &'t Types,
    target: &'t Types,
    /// Each member is compared with each, so a bound besides the depth's is needed.
    steps_left: u32,
}

impl Matcher<'_> {
    /// What is behind a pointer is compared by kind and name alone.
    fn matches(
        &mut self,
        local_id: TypeId,
        target_id: TypeId,
        is_behind: bool,
        depth: u32,
    ) -> bool {
        self.steps_left = self.steps_left.saturating_sub(1);
        if depth > MAX_DEPTH || self.steps_left == 0 {
            return false;
        }
        let (local, target) = (self.local.get(local_id), self.target.get(target_id));
        if !have_same_name(name_of(local), name_of(target)) {
            return false;
        }
        match (local, target) {
            (Type::Pointer { to: a }, Type::Pointer { to: b }) => {
                self.matches(*a, *b, true, depth + 1)
            }
            (Type::Array { of: a, n_elements: n }, Type::Array { of: b, n_elements: m }) => {
                n == m && self.matches(*a, *b, is_behind, depth + 1)
            }
            (
                Type::Int { size_bytes: a, signed: s, .. },
                Type::Int { size_bytes: b, signed: t, .. },
            ) => a == b && s == t,
            (Type::Float { size_bytes: a, .. }, Type::Float { size_bytes: b, .. }) => a == b,
            (Type::Enum { .. }, Type::Enum { .. }) => enums_match(local, target),
            (Type::Struct { is_union: a, .. }, Type::Struct { is_union: b, .. }) => {
                a == b && (is_behind || self.members_match(local, target, depth))
            }
            (Type::Struct { .. }, Type::Opaque { .. })
            | (Type::Opaque { .. }, Type::Struct { .. }) => is_behind,
            (Type::Void, Type::Void)
            | (Type::Function, Type::Function)
            | (Type::Opaque { .. }, Type::Opaque { .. }) => true,
            _ => false,
        }
    }

    fn members_match(&mut self, local: &Type, target: &Type, depth: u32) -> bool {
        let (Type::Struct { members: own, .. }, Type::Struct { members: theirs, .. }) =
            (local, target)
        else {
            return false;
        };
        own.iter().all(|a| {
            theirs.iter().any(|b| {
                have_same_name(&a.name, &b.name) && self.matches(a.ty, b.ty, false, depth + 1)
            })
        })
    }
}

fn enums_match(local: &Type, target: &Type) -> bool {
    let (
        Type::Enum { size_bytes: a, values: own, .. },
        Type::Enum { size_bytes: b, values: theirs, .. },
    ) = (local, target)
    else {
        return false;
    };
    let has = |name: &str| theirs.iter().any(|(theirs, _)| have_same_name(name, theirs));
    a == b && own.iter().all(|(name, _)| has(name))
}

/// Integers are told apart by what they are: C and DWARF spell `unsigned long` in two ways.
fn name_of(ty: &Type) -> &str {
    match ty {
        Type::Struct { name, .. } | Type::Enum { name, .. } | Type::Opaque { name } => name,
        _ => "",
    }
}

fn have_same_name(local: &str, target: &str) -> bool {
    essential_name(local) == essential_name(&c_name(target))
}
