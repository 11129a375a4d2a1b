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
    /// By [`key`].
    names: BTreeMap<String, Vec<TypeId>>,
    /// Names by typedefs, as C headers spell them.
    typedefs: BTreeMap<String, Vec<TypeId>>,
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
        /// Of the target's types by position, of an object's in the source's order. Base
        /// classes are members without a name.
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
        Self { types: vec![Type::Void], names: BTreeMap::new(), typedefs: BTreeMap::new() }
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
        let ids = self.names.entry(key(name)).or_default();
        if !ids.contains(&id) {
            ids.push(id);
        }
    }

    /// Lets `id` be found by `name`, which a typedef gives it.
    pub fn add_typedef(&mut self, name: &str, id: TypeId) {
        self.add_name(name, id);
        let ids = self.typedefs.entry(c_name(name).into_owned()).or_default();
        if !ids.contains(&id) {
            ids.push(id);
        }
    }

    /// Names that typedefs give, as C headers spell them, and what each may mean.
    pub fn typedefs(&self) -> impl Iterator<Item = (&str, &[TypeId])> {
        self.typedefs.iter().map(|(name, ids)| (name.as_str(), ids.as_slice()))
    }

    /// The types that `name` may mean, a flavour (`name___2`) taken off.
    #[must_use]
    pub fn named(&self, name: &str) -> &[TypeId] {
        self.names.get(&key(name)).map_or(&[], Vec::as_slice)
    }

    /// Puts all members in the order of their positions.
    pub fn sort_members(&mut self) {
        for ty in &mut self.types {
            if let Type::Struct { members, .. } = ty {
                members.sort_by_key(|member| member.bit_offset);
            }
        }
    }

    /// Adds all of `other`'s types behind those that are here, which keep their ids; `ids` of
    /// `other` as they are then. Names are not taken along.
    pub fn append(&mut self, other: &Self, ids: &[Option<TypeId>]) -> Vec<Option<TypeId>> {
        // Void is there already.
        let n = u32::try_from(self.types.len() - 1).expect("fewer than 2^32 types");
        let moved = |id: TypeId| if id == TypeId::VOID { id } else { TypeId(id.0 + n) };
        self.types.extend(other.types.iter().skip(1).map(|ty| {
            let mut ty = ty.clone();
            match &mut ty {
                Type::Pointer { to } => *to = moved(*to),
                Type::Array { of, .. } => *of = moved(*of),
                Type::Struct { members, .. } => members.iter_mut().for_each(|m| m.ty = moved(m.ty)),
                _ => {}
            }
            ty
        }));
        ids.iter().map(|id| id.map(moved)).collect()
    }

    /// The id with this number, as [`TypeId::index`] gives it.
    #[must_use]
    pub fn id(&self, index: u64) -> Option<TypeId> {
        let index = u32::try_from(index).ok()?;
        ((index as usize) < self.types.len()).then_some(TypeId(index))
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

/// What programs may call `name` has the same key.
#[must_use]
pub fn key(name: &str) -> String {
    const SIZES: [&str; 3] = ["char", "short", "long"];
    let words: Vec<&str> = name.split(' ').collect();
    let is_number =
        |word: &&str| matches!(*word, "signed" | "unsigned" | "int") || SIZES.contains(word);
    if !words.iter().all(is_number) {
        return essential_name(&c_name(name)).to_owned();
    }
    // `long unsigned int`, `unsigned long`: each compiler spells it its own way.
    let mut sizes: Vec<&str> = words.iter().copied().filter(|w| SIZES.contains(w)).collect();
    let is_char = sizes == ["char"];
    if sizes.is_empty() {
        sizes.push("int");
    }
    let sign = match () {
        () if words.contains(&"unsigned") => "unsigned ",
        () if words.contains(&"signed") && is_char => "signed ",
        () => "",
    };
    format!("{sign}{}", sizes.join(" "))
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
    match spelled {
        _ if needs_start => format!("_{spelled}").into(),
        _ if RESERVED.contains(&spelled.as_str()) => format!("{spelled}_").into(),
        _ => spelled.into(),
    }
}

/// What C headers for programs call the base class `tag` in a class: it has no name there.
#[must_use]
pub fn base_name(tag: &str) -> String {
    format!("base_{}", c_name(tag))
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
        check("(char)", "char_");
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
        types.add_name("long unsigned int", a);
        assert_eq!(types.named("unsigned long"), [a]);
        for (name, same) in [("unsigned", "unsigned int"), ("short int", "short")] {
            assert_eq!(key(name), key(same));
        }
        assert_ne!(key("signed char"), key("char"));
        assert_ne!(key("long long int"), key("long int"));
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
    fn graphs_one_behind_the_other() {
        let graph = |name: &str| {
            let mut types = Types::default();
            let own = types.add(Type::Void);
            let to_own = types.add(Type::Pointer { to: own });
            let to_void = types.add(Type::Pointer { to: TypeId::VOID });
            let member = |ty| Member { name: "m".into(), ty, bit_offset: 0, bit_size: None };
            let members = vec![member(to_own), member(to_void)];
            let name = name.to_owned();
            types.set(own, Type::Struct { name, is_union: true, size_bytes: 8, members });
            (types, own)
        };
        let ((mut all, first), (second, other)) = (graph("first"), graph("second"));
        let ids = all.append(&second, &[Some(other), None, Some(TypeId::VOID)]);
        let [Some(moved), None, Some(TypeId::VOID)] = ids[..] else { panic!("{ids:?}") };
        for (id, expected) in [(first, "first"), (moved, "second")] {
            let Type::Struct { name, members, .. } = all.get(id) else { panic!("no structure") };
            assert_eq!(name, expected);
            assert_eq!(*all.get(members[0].ty), Type::Pointer { to: id });
            assert_eq!(*all.get(members[1].ty), Type::Pointer { to: TypeId::VOID });
        }
        assert_eq!(all.id(moved.index() as u64), Some(moved));
        assert_eq!(all.id(7), None);
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
