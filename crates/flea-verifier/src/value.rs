//! What a register holds: nothing yet, a number, or a pointer.

use flea_object::spec::MapIdx;
use flea_object::types::TypeId;

use crate::number::scalar::{AluOp, Scalar, Width};

/// Identifies numbers that are equal, pointers that are null together, and references.
pub(crate) type Id = std::num::NonZeroU32;

/// A register's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// Must not be read.
    NotInit,
    /// A number.
    Scalar(Number),
    /// An address.
    Pointer(Pointer),
}

/// A number, possibly linked to others: all with the same `id` are one and the same number, each
/// plus its own `delta` (wrapping around), so that what is learnt of one holds for all. What
/// 32-bit arithmetic made is the lower half of such a sum, zero-extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Number {
    pub(crate) set: Scalar,
    pub(crate) id: Option<Id>,
    /// 0 where there is no id.
    pub(crate) delta: u64,
    /// How much of the sum this is; all of it where there is no id.
    pub(crate) part: Width,
}

impl Number {
    /// A number that is linked to none.
    pub(crate) const fn unlinked(set: Scalar) -> Self {
        Self { set, id: None, delta: 0, part: Width::W64 }
    }

    /// What is known of this number now that `other`, which has the same id, is known better.
    pub(crate) fn told(&self, other: &Self) -> Self {
        let by = Scalar::constant(self.delta.wrapping_sub(other.delta));
        let set = match (other.part, self.part) {
            (Width::W64, Width::W64) => Scalar::alu(AluOp::Add, Width::W64, &other.set, &by),
            (_, Width::W32) => Scalar::alu(AluOp::Add, Width::W32, &other.set, &by),
            // The upper half of the sum is not known.
            (Width::W32, Width::W64) => {
                Scalar::alu(AluOp::Add, Width::W32, &other.set, &by).lower_half()
            }
        };
        // No common member: this path describes no machine, so anything may be said of it.
        Self { set: self.set.intersect(&set).unwrap_or(set), ..*self }
    }
}

/// A pointer: where it points, and how far from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pointer {
    pub(crate) kind: PointerKind,
    /// Bytes from the start of the object; from the top of the frame for the stack (so
    /// negative there).
    pub(crate) off: Scalar,
    /// May be null: all with the same id are null together. `off` is 0.
    pub(crate) or_null: Option<Id>,
}

/// The object that a pointer points into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PointerKind {
    /// The stack of call frame `frame`, 0 being the main function's.
    Stack { frame: usize },
    /// The context.
    Ctx,
    /// A map itself, not its values; of a template, some map of its shape.
    Map(MapIdx),
    /// A value of a map.
    MapValue(MapIdx),
    /// A value of a map whose values have a lock. `element` says which lookup gave it: values of
    /// two lookups count as different. `None`: the map's only one.
    LockValue { map: MapIdx, element: Option<Id> },
    /// A ring buffer record that must be submitted or discarded.
    Record { size_bytes: u32, reference: Id },
    /// A key of a map, as `bpf_for_each_map_elem` passes it: to be read alone.
    MapKey(MapIdx),
    /// A function of the program, by index.
    Function(usize),
    /// The u64 of `bpf_session_cookie`.
    Cookie,
    /// The bytes of `Context::Memory`.
    Memory { size_bytes: u32 },
    /// What a global function was given the address of: whose it is, its caller knows.
    Argument { size_bytes: u32, align_bytes: u32 },
    /// A value of this type in the target's own data, or anything else, NULL too: nobody has
    /// proved the address, and loads cannot fault. It is a number as well, and no secret.
    Target { ty: TypeId },
}

impl Value {
    pub(crate) const UNKNOWN: Self = Self::scalar(Scalar::UNKNOWN);

    pub(crate) const fn scalar(set: Scalar) -> Self {
        Self::Scalar(Number::unlinked(set))
    }

    pub(crate) const fn pointer(kind: PointerKind) -> Self {
        Self::Pointer(Pointer { kind, off: Scalar::constant(0), or_null: None })
    }

    /// The set of numbers, if it is a number.
    pub(crate) const fn as_scalar(&self) -> Option<&Scalar> {
        match self {
            Self::Scalar(n) => Some(&n.set),
            _ => None,
        }
    }

    /// The number, if it is a known one.
    pub(crate) fn as_const(&self) -> Option<u64> {
        self.as_scalar().and_then(Scalar::as_const)
    }

    /// Linux's name for this type of register.
    pub(crate) fn type_name(&self) -> String {
        match self {
            Self::NotInit => "?".into(),
            Self::Scalar(_) => "scalar".into(),
            Self::Pointer(p) => p.type_name(),
        }
    }

    /// The pointer's [`PointerKind::is_abstract`].
    pub(crate) const fn is_abstract(&self) -> bool {
        matches!(self, Self::Pointer(p) if p.kind.is_abstract())
    }

    /// A pointer into the target's data.
    pub(crate) const fn is_target(&self) -> bool {
        matches!(self, Self::Pointer(Pointer { kind: PointerKind::Target { .. }, .. }))
    }
}

impl Pointer {
    /// Linux's name for this type of register.
    pub(crate) fn type_name(&self) -> String {
        let null = if self.or_null.is_some() { "_or_null" } else { "" };
        if let (PointerKind::Map(_), Some(_)) = (self.kind, self.or_null) {
            // What a lookup in a map of maps gives is a value until it is known not to be null.
            return "map_value_or_null".into();
        }
        format!("{}{null}", self.kind.name())
    }
}

impl PointerKind {
    /// Whether compiled code has no address for it, so that it must not become a number. The
    /// context's words are in registers, and functions are inlined where they are called.
    pub(crate) const fn is_abstract(self) -> bool {
        matches!(self, Self::Ctx | Self::Function(_))
    }

    /// Linux's name, without `_or_null`.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Stack { .. } => "fp",
            Self::Ctx => "ctx",
            Self::Map(_) => "map_ptr",
            Self::MapValue(_) | Self::LockValue { .. } => "map_value",
            Self::MapKey(_) => "map_key",
            Self::Function(_) => "func",
            Self::Record { .. } => "ringbuf_mem",
            Self::Cookie | Self::Memory { .. } | Self::Argument { .. } => "mem",
            Self::Target { .. } => "ptr_",
        }
    }
}
