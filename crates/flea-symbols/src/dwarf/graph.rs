//! A graph of types out of DWARF: what is reachable from the types that are asked for, and no
//! more. Start at [`Graph::id_of`]. Members are in [`super::members`], names of the whole
//! module in [`super::type_index`].
//!
//! Each unit describes the types of its headers again. Those of one name and kind are one type
//! if their sizes and their members' names and places are the same.

use std::collections::HashMap;
use std::rc::Rc;

use flea_object::types::{Type, TypeId, Types};
use gimli::{AttributeValue, UnitOffset, constants as dw};

use super::dies::{Die, Dies, File, MAX_DEPTH, is_pointer, is_transparent};
use super::names::NameKind;
use super::type_index::{Place, TypeIndex, all_units, names_of};

/// A graph has no more types than this; the rest are void.
const MAX_TYPES: usize = 1 << 21;
/// Of so many units what was read is kept.
const MAX_KEPT_UNITS: usize = 256;
/// A pointer to a member function has two words.
const MEMBER_FUNCTION_WORDS: u32 = 2;

/// Builds the graph.
pub(crate) struct Graph<'g, 'a> {
    pub(super) dies: &'g Dies<'a>,
    index: &'g dyn Fn() -> &'g TypeIndex,
    pub(super) types: Types,
    ids: HashMap<DieKey, TypeId>,
    /// Types that are equal if their parts are.
    interned: HashMap<Type, TypeId>,
    /// Types with names, by name, kind and fingerprint.
    known: HashMap<(Rc<str>, NameKind, u64), TypeId>,
    names: HashMap<(File, usize), Rc<UnitNames>>,
    todo: Vec<Promise<'a>>,
}

/// What is read when everything that may name it has an id.
struct Promise<'a> {
    id: TypeId,
    die: Die<'a>,
    name: String,
}

type DieKey = (File, usize, UnitOffset);
type UnitNames = HashMap<UnitOffset, UnitName>;

/// What a type of a unit is called.
#[derive(Clone)]
struct UnitName {
    name: Rc<str>,
    kind: NameKind,
    fingerprint: u64,
}

impl<'g, 'a> Graph<'g, 'a> {
    pub(crate) fn new(dies: &'g Dies<'a>, index: &'g dyn Fn() -> &'g TypeIndex) -> Self {
        Self {
            dies,
            index,
            types: Types::default(),
            ids: HashMap::new(),
            interned: HashMap::new(),
            known: HashMap::new(),
            names: HashMap::new(),
            todo: Vec::new(),
        }
    }

    /// The graph, complete.
    pub(crate) fn into_types(mut self) -> Types {
        self.finish();
        self.types
    }

    /// The graph as far as it is.
    pub(crate) fn types_so_far(&mut self) -> &mut Types {
        self.finish();
        &mut self.types
    }

    /// Adds the types that `name` may mean.
    pub(crate) fn add_named(&mut self, name: &str) {
        for place in (self.index)().find(name) {
            if let Some(die) = self.dies.at(place.file, place.unit, place.die) {
                self.id_of(&die);
            }
        }
    }

    /// Adds all types that have names.
    pub(crate) fn add_all(&mut self) {
        for (file, unit) in all_units(self.dies) {
            let names = self.names_of(file, unit);
            let mut offsets: Vec<UnitOffset> =
                names.iter().filter(|(_, n)| is_definition(n.kind)).map(|(at, _)| *at).collect();
            offsets.sort_unstable();
            for offset in offsets {
                if let Some(die) = self.dies.at(file, unit, offset) {
                    self.id_of(&die);
                }
            }
            self.finish();
        }
    }

    /// The type that `die`'s DW_AT_type names; void without one.
    pub(crate) fn type_of(&mut self, die: &Die<'a>) -> TypeId {
        self.target_of(die, 0, None)
    }

    /// The type that `die` is.
    pub(crate) fn id_of(&mut self, die: &Die<'a>) -> TypeId {
        self.id_at(die, 0, None)
    }

    fn target_of(&mut self, die: &Die<'a>, depth: u32, given: Option<Rc<str>>) -> TypeId {
        let Some((owner, _)) = self.dies.inherited(die, dw::DW_AT_type) else {
            return TypeId::VOID;
        };
        match self.dies.follow(&owner, dw::DW_AT_type) {
            Some(target) => self.id_at(&target, depth, given),
            None => TypeId::VOID,
        }
    }

    /// `given`: the name by a typedef of what may have none. Where both are in one unit, the
    /// unit's names say it already.
    fn id_at(&mut self, die: &Die<'a>, depth: u32, given: Option<Rc<str>>) -> TypeId {
        if depth > MAX_DEPTH {
            return TypeId::VOID;
        }
        let tag = die.entry.tag();
        if is_transparent(tag) {
            let is_typedef = tag == dw::DW_TAG_typedef;
            let own = is_typedef.then(|| self.name_of(die)).flatten().map(|named| named.name);
            let id = self.target_of(die, depth + 1, own.clone().or(given));
            if let Some(name) = own {
                self.types.add_typedef(&name, id);
            }
            return id;
        }
        let key = key_of(die);
        if let Some(id) = self.ids.get(&key) {
            return *id;
        }
        let id = match tag {
            dw::DW_TAG_structure_type
            | dw::DW_TAG_class_type
            | dw::DW_TAG_union_type
            | dw::DW_TAG_enumeration_type => self.tagged(die, depth, given),
            dw::DW_TAG_array_type => self.array(die, depth),
            _ => {
                let ty = self.simple(die, depth);
                self.intern(ty)
            }
        };
        self.ids.insert(key, id);
        id
    }

    /// Types that name no members.
    fn simple(&mut self, die: &Die<'a>, depth: u32) -> Type {
        match die.entry.tag() {
            tag if is_pointer(tag) => Type::Pointer { to: self.target_of(die, depth + 1, None) },
            dw::DW_TAG_unspecified_type => Type::Pointer { to: TypeId::VOID }, // decltype(nullptr)
            dw::DW_TAG_ptr_to_member_type => self.member_pointer(die),
            dw::DW_TAG_subroutine_type | dw::DW_TAG_subprogram => Type::Function,
            dw::DW_TAG_base_type => self.base(die),
            _ => Type::Void,
        }
    }

    fn member_pointer(&mut self, die: &Die<'a>) -> Type {
        let word = Type::Int { name: "long".into(), size_bytes: 8, signed: true, is_bool: false };
        let target = self.dies.follow(die, dw::DW_AT_type).and_then(|die| self.dies.bare(&die));
        if target.is_some_and(|die| die.entry.tag() == dw::DW_TAG_subroutine_type) {
            return Type::Array { of: self.intern(word), n_elements: MEMBER_FUNCTION_WORDS };
        }
        word
    }

    fn base(&mut self, die: &Die<'a>) -> Type {
        let Some(AttributeValue::Encoding(encoding)) = die.entry.attr_value(dw::DW_AT_encoding)
        else {
            return Type::Void;
        };
        let Some(size_bytes) = self.size_of(die).filter(|size| *size > 0) else {
            return Type::Void;
        };
        let name = self.dies.name(die).unwrap_or_default();
        let is_float = matches!(
            encoding,
            dw::DW_ATE_float
                | dw::DW_ATE_complex_float
                | dw::DW_ATE_imaginary_float
                | dw::DW_ATE_decimal_float
        );
        if is_float {
            return Type::Float { name, size_bytes };
        }
        let signed = matches!(encoding, dw::DW_ATE_signed | dw::DW_ATE_signed_char);
        let is_bool = encoding == dw::DW_ATE_boolean;
        if size_bytes <= 16 {
            return Type::Int { name, size_bytes, signed, is_bool };
        }
        // A wide `_BitInt`.
        let byte = Type::Int {
            name: "unsigned char".into(),
            size_bytes: 1,
            signed: false,
            is_bool: false,
        };
        Type::Array { of: self.intern(byte), n_elements: size_bytes }
    }

    fn array(&mut self, die: &Die<'a>, depth: u32) -> TypeId {
        let mut id = self.target_of(die, depth + 1, None);
        let children = self.dies.children(die);
        let ranges = children.iter().filter(|c| c.entry.tag() == dw::DW_TAG_subrange_type);
        for range in ranges.rev().take(MAX_DEPTH as usize) {
            let upper = || self.dies.number(range, dw::DW_AT_upper_bound)?.checked_add(1);
            let n = self.dies.number(range, dw::DW_AT_count).or_else(upper).unwrap_or(0);
            let n_elements = u32::try_from(n).unwrap_or(u32::MAX);
            id = self.intern(Type::Array { of: id, n_elements });
        }
        id
    }

    /// A struct, class, union or enum: its members are read later, so that they may lead back.
    fn tagged(&mut self, die: &Die<'a>, depth: u32, given: Option<Rc<str>>) -> TypeId {
        if let Some(definition) = self.dies.follow(die, dw::DW_AT_signature) {
            return self.id_at(&definition, depth + 1, given);
        }
        let named = self.name_of(die).or_else(|| Some(only_here(die, given?)));
        if die.entry.attr(dw::DW_AT_declaration).is_some() {
            return self.declared(die, named, depth);
        }
        if self.types.len() >= MAX_TYPES {
            return TypeId::VOID;
        }
        let Some(UnitName { name, kind, fingerprint }) = named else {
            return self.promise(die, String::new());
        };
        let known = (name, kind, fingerprint);
        if let Some(id) = self.known.get(&known) {
            return *id;
        }
        let id = self.promise(die, known.0.to_string());
        self.types.add_name(&known.0, id);
        self.known.insert(known, id);
        id
    }

    fn promise(&mut self, die: &Die<'a>, name: String) -> TypeId {
        let id = self.types.add(Type::Void);
        self.todo.push(Promise { id, die: die.clone(), name });
        id
    }

    /// The definition of what `die` declares: the only one of its name and kind that the module
    /// has.
    fn declared(&mut self, die: &Die<'a>, named: Option<UnitName>, depth: u32) -> TypeId {
        let Some(UnitName { name, .. }) = named else { return TypeId::VOID };
        let wanted = match die.entry.tag() {
            dw::DW_TAG_union_type => NameKind::Union,
            dw::DW_TAG_enumeration_type => NameKind::Enum,
            _ => NameKind::Struct,
        };
        let places = (self.index)().find(&name).iter();
        let places: Vec<Place> = places.filter(|p| p.kind == wanted).copied().collect();
        let mut definitions = Vec::new();
        for place in places {
            let names = self.names_of(place.file, place.unit);
            if names.get(&place.die).is_some_and(|named| named.name == name) {
                definitions.extend(self.dies.at(place.file, place.unit, place.die));
            }
        }
        match definitions.as_slice() {
            [one] => self.id_at(one, depth + 1, None),
            // Of several it may be any.
            _ => self.intern(Type::Opaque { name: name.to_string() }),
        }
    }

    fn name_of(&mut self, die: &Die<'a>) -> Option<UnitName> {
        let (file, unit, offset) = key_of(die);
        let known = self.names_of(file, unit).get(&offset).cloned();
        // Types in functions are not among the unit's.
        known.or_else(|| Some(only_here(die, self.dies.name(die)?.into())))
    }

    fn names_of(&mut self, file: File, unit: usize) -> Rc<UnitNames> {
        if let Some(names) = self.names.get(&(file, unit)) {
            return Rc::clone(names);
        }
        if self.names.len() >= MAX_KEPT_UNITS {
            self.names.clear();
            self.dies.forget_units();
        }
        let named = names_of(self.dies, file, unit).into_iter().map(|named| {
            let (kind, fingerprint) = (named.kind, named.fingerprint);
            (named.offset, UnitName { name: named.name.into(), kind, fingerprint })
        });
        let names = Rc::new(named.collect::<UnitNames>());
        self.names.insert((file, unit), Rc::clone(&names));
        names
    }

    /// Reads what has been promised.
    fn finish(&mut self) {
        while let Some(Promise { id, die, name }) = self.todo.pop() {
            let ty = match die.entry.tag() {
                dw::DW_TAG_enumeration_type => self.enumeration(&die, name),
                _ => self.record(&die, name),
            };
            self.types.set(id, ty);
        }
    }

    fn enumeration(&mut self, die: &Die<'a>, name: String) -> Type {
        let under = self.type_of(die);
        let (under_size, mut signed) = match self.types.get(under) {
            Type::Int { size_bytes, signed, .. } => (Some(*size_bytes), *signed),
            _ => (None, false),
        };
        let size_bytes = self.size_of(die).or(under_size).unwrap_or(4);
        let children = self.dies.children(die);
        let enumerators = children.iter().filter(|c| c.entry.tag() == dw::DW_TAG_enumerator);
        let mut values = Vec::new();
        for enumerator in enumerators {
            let Some(value) = enumerator.entry.attr_value(dw::DW_AT_const_value) else { continue };
            // Only this form has a sign: the others say 255 with a byte of ones.
            let value = match value {
                AttributeValue::Sdata(value) => {
                    signed |= value < 0;
                    Some(value.cast_unsigned())
                }
                value => value.udata_value(),
            };
            values.extend(self.dies.name(enumerator).zip(value));
        }
        Type::Enum { name, size_bytes, signed, values }
    }

    pub(super) fn size_of(&self, die: &Die<'a>) -> Option<u32> {
        u32::try_from(self.dies.number(die, dw::DW_AT_byte_size)?).ok()
    }

    pub(super) fn add_nameless(&mut self, ty: Type) -> TypeId {
        self.types.add(ty)
    }

    pub(super) fn intern(&mut self, ty: Type) -> TypeId {
        if ty == Type::Void {
            return TypeId::VOID;
        }
        if let Some(id) = self.interned.get(&ty) {
            return *id;
        }
        let id = self.types.add(ty.clone());
        if let Type::Int { name, .. } | Type::Float { name, .. } = &ty {
            self.types.add_name(name, id);
        }
        self.interned.insert(ty, id);
        id
    }
}

fn is_definition(kind: NameKind) -> bool {
    !matches!(kind, NameKind::Declaration | NameKind::Base)
}

/// The name of a type that no other unit has: its place tells it from others.
fn only_here(die: &Die<'_>, name: Rc<str>) -> UnitName {
    let (_, unit, offset) = key_of(die);
    let fingerprint = (offset.0 as u64) << 32 ^ unit as u64;
    UnitName { name, kind: NameKind::Declaration, fingerprint }
}

fn key_of(die: &Die<'_>) -> DieKey {
    (die.file, die.unit.header.offset().0, die.entry.offset())
}
