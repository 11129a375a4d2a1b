//! The types of the target's data, as C sees them: what typed pointers walk through and what
//! CO-RE relocations are resolved against.
//!
//! Made from DWARF or BTF by whoever reads modules; plain data here. Typedefs and qualifiers
//! are gone: an id stands for the type itself. A graph may have cycles, through pointers alone.

/// Index into a [`Types`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TypeId(u32);

/// A graph of types. Type 0 is void.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Types {
    types: Vec<Type>,
}

/// One type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Type {
    /// `void`, and whatever the debug information does not describe.
    Void,
    /// An integer, character or bool.
    Int {
        /// Its name, e.g. `unsigned int`.
        name: String,
        /// Its size, 1 to 16.
        size_bytes: u32,
        /// Two's complement.
        signed: bool,
        /// `_Bool`
        is_bool: bool,
    },
    /// A floating-point number.
    Float {
        /// Its name.
        name: String,
        /// Its size.
        size_bytes: u32,
    },
    /// An enumeration.
    Enum {
        /// Its tag; empty where it has none.
        name: String,
        /// Its size.
        size_bytes: u32,
        /// Its values are signed.
        signed: bool,
        /// Names and values, signed ones sign-extended.
        values: Vec<(String, u64)>,
    },
    /// A pointer, or a C++ reference.
    Pointer {
        /// What it points to.
        to: TypeId,
    },
    /// An array.
    Array {
        /// Its elements' type.
        of: TypeId,
        /// How many; 0 for a flexible array.
        n_elements: u32,
    },
    /// A structure, class or union.
    Struct {
        /// Its tag, or the typedef's name where it has none of its own; empty without either.
        name: String,
        /// A union: all members begin at 0.
        is_union: bool,
        /// Its size.
        size_bytes: u32,
        /// By position; base classes are members without a name.
        members: Vec<Member>,
    },
    /// A structure that is declared and not defined.
    Opaque {
        /// Its tag.
        name: String,
    },
    /// A function: pointers to it are numbers to a program.
    Function,
}

/// A member of a [`Type::Struct`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name; empty for an anonymous structure or union, whose members count as the outer
    /// one's.
    pub name: String,
    /// Its type.
    pub ty: TypeId,
    /// Where it begins.
    pub bit_offset: u64,
    /// How wide a bit-field is; `None` for others.
    pub bit_size: Option<u32>,
}

impl TypeId {
    /// `void`, which every graph has.
    pub const VOID: Self = Self(0);

    /// Its number.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl Default for Types {
    fn default() -> Self {
        Self { types: vec![Type::Void] }
    }
}

impl Types {
    /// Adds `ty`, which may name types that are added or [`Self::set`] later.
    ///
    /// # Panics
    /// At 2^32 types.
    pub fn add(&mut self, ty: Type) -> TypeId {
        let id = u32::try_from(self.types.len()).expect("fewer than 2^32 types fit into memory");
        self.types.push(ty);
        TypeId(id)
    }

    /// Puts `ty` in the place of `id`: for types that name themselves.
    pub fn set(&mut self, id: TypeId, ty: Type) {
        self.types[id.index()] = ty;
    }

    /// The type with this id; void where there is none.
    #[must_use]
    pub fn get(&self, id: TypeId) -> &Type {
        self.types.get(id.index()).unwrap_or(&Type::Void)
    }

    /// All types with their ids, void first.
    pub fn iter(&self) -> impl Iterator<Item = (TypeId, &Type)> {
        (0..).map(TypeId).zip(&self.types)
    }

    /// Bytes that a value of this type takes; `None` for void, functions, types that are not
    /// defined, flexible arrays, and arrays of such.
    #[must_use]
    pub fn size_bytes(&self, id: TypeId) -> Option<u64> {
        // Arrays of arrays nest as deep as the source says: a bound, should a graph be made
        // with a cycle of them.
        const MAX_DIMENSIONS: u32 = 64;
        let (mut id, mut n) = (id, 1u64);
        for _ in 0..MAX_DIMENSIONS {
            let one = match self.get(id) {
                Type::Array { of, n_elements } => {
                    n = n.checked_mul(u64::from(*n_elements)).filter(|n| *n > 0)?;
                    id = *of;
                    continue;
                }
                Type::Int { size_bytes, .. }
                | Type::Float { size_bytes, .. }
                | Type::Enum { size_bytes, .. }
                | Type::Struct { size_bytes, .. } => u64::from(*size_bytes),
                Type::Pointer { .. } => 8,
                Type::Void | Type::Opaque { .. } | Type::Function => return None,
            };
            return n.checked_mul(one);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_arrays_and_of_what_has_none() {
        let mut types = Types::default();
        let int = types.add(Type::Int {
            name: "int".into(),
            size_bytes: 4,
            signed: true,
            is_bool: false,
        });
        let row = types.add(Type::Array { of: int, n_elements: 3 });
        let table = types.add(Type::Array { of: row, n_elements: 5 });
        let flexible = types.add(Type::Array { of: int, n_elements: 0 });
        assert_eq!(types.size_bytes(table), Some(60));
        assert_eq!(types.size_bytes(flexible), None);
        assert_eq!(types.size_bytes(TypeId::VOID), None);
    }

    #[test]
    fn a_cycle_of_arrays_has_no_size() {
        let mut types = Types::default();
        let a = types.add(Type::Void);
        let b = types.add(Type::Array { of: a, n_elements: 1 });
        types.set(a, Type::Array { of: b, n_elements: 1 });
        assert_eq!(types.size_bytes(a), None);
    }
}
