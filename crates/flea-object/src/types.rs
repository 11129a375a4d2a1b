//! The types of the target's data, as C sees them: what typed pointers walk through and what
//! CO-RE relocations are resolved against.
//!
//! Made from DWARF or BTF by whoever reads modules; plain data here. Typedefs and qualifiers
//! are gone: an id stands for the type itself. A graph may have cycles, through pointers alone.

use std::borrow::Cow;
use std::collections::BTreeMap;

/// Index into a [`Types`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TypeId(u32);

/// A graph of types. Type 0 is void.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Types {
    types: Vec<Type>,
    /// By [`essential_name`] of their [`c_name`]s.
    names: BTreeMap<String, Vec<TypeId>>,
}

/// One type.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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
        Self { types: vec![Type::Void], names: BTreeMap::new() }
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

    /// Lets `id` be found by `name`: its tag, or a typedef's. Several types may have one name.
    pub fn add_name(&mut self, name: &str, id: TypeId) {
        let name = c_name(name);
        let ids = self.names.entry(essential_name(&name).to_owned()).or_default();
        if !ids.contains(&id) {
            ids.push(id);
        }
    }

    /// The types that `name` may mean, a flavour (`name___2`) taken off.
    #[must_use]
    pub fn named(&self, name: &str) -> &[TypeId] {
        self.names.get(essential_name(&c_name(name))).map_or(&[], Vec::as_slice)
    }

    /// The type with this id; void where there is none.
    #[must_use]
    pub fn get(&self, id: TypeId) -> &Type {
        self.types.get(id.index()).unwrap_or(&Type::Void)
    }

    /// How many types there are, void included.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "void is always there")]
    pub fn len(&self) -> usize {
        self.types.len()
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

/// What C cannot use as a name, and what compilers for it define.
const RESERVED: &[&str] = &[
    "alignas",
    "alignof",
    "asm",
    "auto",
    "bool",
    "break",
    "case",
    "char",
    "const",
    "constexpr",
    "continue",
    "default",
    "do",
    "double",
    "else",
    "enum",
    "extern",
    "false",
    "float",
    "for",
    "goto",
    "if",
    "inline",
    "int",
    "long",
    "nullptr",
    "register",
    "restrict",
    "return",
    "short",
    "signed",
    "sizeof",
    "static",
    "static_assert",
    "struct",
    "switch",
    "thread_local",
    "true",
    "typedef",
    "typeof",
    "union",
    "unsigned",
    "void",
    "volatile",
    "while",
    "_Bool",
    "_Atomic",
    "_Alignas",
    "_Alignof",
    "_Complex",
    "_Generic",
    "_Imaginary",
    "_Noreturn",
    "_Static_assert",
    "_Thread_local",
    "linux",
    "unix",
];

/// How C headers for programs spell a name of the target: `std::vector<int*>` becomes
/// `std__vector_int_ptr`. What C can spell stays as it is. Never makes a flavour of a name
/// that is none.
#[must_use]
pub fn c_name(name: &str) -> Cow<'_, str> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if RESERVED.contains(&name) {
        return format!("{name}_").into();
    }
    if name.chars().all(is_word) && !name.starts_with(|c: char| c.is_ascii_digit()) {
        return name.into();
    }
    let mut spelled = String::new();
    let mut rest = name.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            _ if is_word(c) => spelled.push(c),
            '*' => spelled.push_str("_ptr_"),
            '&' => spelled.push_str("_ref_"),
            ':' if rest.next_if_eq(&':').is_some() => spelled.push_str("::"),
            '-' if rest.peek().is_some_and(char::is_ascii_digit) => spelled.push_str("_minus_"),
            _ => spelled.push('_'),
        }
    }
    // One underscore between words, two between scopes; three would be a flavour.
    let words = |scope: &str| {
        let words: Vec<&str> = scope.split('_').filter(|word| !word.is_empty()).collect();
        words.join("_")
    };
    let scopes: Vec<String> = spelled.split("::").map(words).filter(|s| !s.is_empty()).collect();
    let spelled = scopes.join("__");
    let needs_start = spelled.is_empty() || spelled.starts_with(|c: char| c.is_ascii_digit());
    if needs_start { format!("_{spelled}").into() } else { spelled.into() }
}

/// A name without its flavour: programs may declare several versions of a type, `task` and
/// `task___old`, which all mean the target's `task`.
#[must_use]
pub fn essential_name(name: &str) -> &str {
    let bytes = name.as_bytes();
    let is_separator = |at: &usize| matches!(&bytes[*at..at + 5], [a, b'_', b'_', b'_', b] if *a != b'_' && *b != b'_');
    match (0..bytes.len().saturating_sub(4)).rev().find(is_separator) {
        Some(at) => name.get(..=at).unwrap_or(name),
        None => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_as_c_spells_them() {
        let check = |name: &str, expect: &str| assert_eq!(c_name(name), expect, "{name}");
        check("redisObject", "redisObject");
        check("__va_list_tag", "__va_list_tag");
        check("struct", "struct_");
        check("std::vector<int, std::allocator<int> >", "std__vector_int_std__allocator_int");
        check("Foo<char*>", "Foo_char_ptr");
        check("Foo<-1>", "Foo_minus_1");
        check("(anonymous namespace)::S", "anonymous_namespace__S");
        check("core::option::Option<&str>", "core__option__Option_ref_str");
        check("0", "_0");
        check("_vptr.Base", "vptr_Base");
        check("größe", "gr_e");
        check("", "");
    }

    #[test]
    fn names_without_their_flavours() {
        let check = |name: &str, expect: &str| assert_eq!(essential_name(name), expect, "{name}");
        check("task___old", "task");
        check("task___old___older", "task___old");
        check("task__old", "task__old");
        check("___task", "___task");
        check("task___", "task___");
        check("task____old", "task____old");
        check("t___o", "t");
        check("", "");
        check("ä___ö", "ä");
    }

    #[test]
    fn types_by_name() {
        let mut types = Types::default();
        let (a, b) = (types.add(Type::Function), types.add(Type::Function));
        types.add_name("ns::S", a);
        types.add_name("ns::S", a);
        types.add_name("ns__S___2", b);
        assert_eq!(types.named("ns__S___mine"), [a, b]);
        assert_eq!(types.named("S"), []);
    }

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
