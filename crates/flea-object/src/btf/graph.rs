//! A graph of types out of BTF. Start at [`Graph::id_of`].

use std::cell::OnceCell;
use std::collections::HashMap;

use super::{Btf, Kind, Word};
use crate::types::{Member, Type, TypeId, Types};

/// Arrays and pointers nested deeper than this are taken for a loop.
const MAX_DEPTH: u32 = 32;

/// Reads types out of the parts of one module, or the one of an object.
pub struct Graph<'g, 'data> {
    parts: &'g [Btf<'data>],
    types: Types,
    ids: HashMap<(usize, u32), TypeId>,
    interned: HashMap<Type, TypeId>,
    /// Structs, unions and enums that are still to be read.
    todo: Vec<Promise>,
    /// Definitions by name and whether they are unions, by part.
    definitions: OnceCell<Definitions<'data>>,
}

type Definitions<'data> = HashMap<(&'data str, bool), Vec<(usize, u32)>>;

/// What is read when everything that may name it has an id.
struct Promise {
    id: TypeId,
    part: usize,
    btf_id: u32,
    name: String,
}

impl<'g, 'data> Graph<'g, 'data> {
    /// Adds to `types`. Members stay in the source's order.
    #[must_use]
    pub fn new(parts: &'g [Btf<'data>], types: Types) -> Self {
        Self {
            parts,
            types,
            ids: HashMap::new(),
            interned: HashMap::new(),
            todo: Vec::new(),
            definitions: OnceCell::new(),
        }
    }

    /// The graph, complete.
    #[must_use]
    pub fn into_types(mut self) -> Types {
        self.finish();
        self.types
    }

    /// The graph as far as it is.
    pub fn types_so_far(&mut self) -> &mut Types {
        self.finish();
        &mut self.types
    }

    fn finish(&mut self) {
        while let Some(promise) = self.todo.pop() {
            let id = promise.id;
            let ty = self.tagged(promise);
            self.types.set(id, ty);
        }
    }

    /// Adds the types whose names `is_wanted`.
    pub fn add_named(&mut self, is_wanted: impl Fn(&str) -> bool) {
        let parts = self.parts;
        for (i, part) in parts.iter().enumerate() {
            for (btf_id, ty) in part.types() {
                let is_type = !matches!(
                    ty.kind,
                    Kind::Var { .. }
                        | Kind::DataSec { .. }
                        | Kind::Func { .. }
                        | Kind::DeclTag { .. }
                );
                if is_type && !ty.name.is_empty() && is_wanted(ty.name) {
                    self.id_of(i, btf_id);
                }
            }
        }
    }

    /// The type with the BTF id `btf_id`, typedefs and qualifiers taken off.
    pub fn id_of(&mut self, part: usize, btf_id: u32) -> TypeId {
        self.id_at(part, btf_id, None, 0)
    }

    /// `given`: the name by a typedef of what may have none.
    fn id_at(&mut self, part: usize, btf_id: u32, given: Option<&'data str>, depth: u32) -> TypeId {
        let parts = self.parts;
        let Some(ty) = parts.get(part).and_then(|part| part.get(btf_id).ok()) else {
            return TypeId::VOID;
        };
        if depth > MAX_DEPTH {
            return TypeId::VOID;
        }
        if let Kind::Alias { of, .. } | Kind::Var { of } = ty.kind {
            let is_typedef = matches!(ty.kind, Kind::Alias { word: Word::Typedef, .. });
            let name = Some(ty.name).filter(|name| is_typedef && !name.is_empty());
            let id = self.id_at(part, of, name.or(given), depth + 1);
            if let Some(name) = name {
                self.types.add_typedef(name, id);
            }
            return id;
        }
        if let Some(id) = self.ids.get(&(part, btf_id)) {
            return *id;
        }
        let id = match &ty.kind {
            Kind::Struct { .. } | Kind::Enum { .. } => {
                let id = self.types.add(Type::Void);
                let name = if ty.name.is_empty() { given.unwrap_or_default() } else { ty.name };
                if !name.is_empty() {
                    self.types.add_name(name, id);
                }
                self.todo.push(Promise { id, part, btf_id, name: name.to_owned() });
                id
            }
            Kind::Ptr { to } => {
                let to = self.id_at(part, *to, None, depth + 1);
                self.intern(Type::Pointer { to })
            }
            Kind::Array { of, n_elements } => {
                let of = self.id_at(part, *of, None, depth + 1);
                self.intern(Type::Array { of, n_elements: *n_elements })
            }
            Kind::Int(int) => {
                // Encoders mark `char` as an encoding of its own, or not at all.
                let is_char = matches!(ty.name, "char" | "signed char");
                let (name, size_bytes) = (ty.name.to_owned(), int.size_bytes);
                let (signed, is_bool) = (int.signed || is_char, int.is_bool);
                self.intern(Type::Int { name, size_bytes, signed, is_bool })
            }
            Kind::Float { size_bytes } => {
                self.intern(Type::Float { name: ty.name.to_owned(), size_bytes: *size_bytes })
            }
            Kind::Forward { is_union } => self.forward(part, ty.name, *is_union),
            Kind::Proto { .. } | Kind::Func { .. } => self.intern(Type::Function),
            _ => TypeId::VOID,
        };
        self.ids.insert((part, btf_id), id);
        id
    }

    /// The definition of what is declared, where the module has one alone.
    fn forward(&mut self, part: usize, name: &'data str, is_union: bool) -> TypeId {
        let definitions = self.definitions.get_or_init(|| definitions(self.parts));
        let mut found = definitions.get(&(name, is_union)).cloned().unwrap_or_default();
        // Parts describe the types of their headers again.
        if found.iter().any(|(i, _)| *i == part) {
            found.retain(|(i, _)| *i == part);
        }
        match found.as_slice() {
            [(part, btf_id)] => self.id_at(*part, *btf_id, None, 1),
            _ => self.intern(Type::Opaque { name: name.to_owned() }),
        }
    }

    fn tagged(&mut self, Promise { part, btf_id, name, .. }: Promise) -> Type {
        let parts = self.parts;
        let Some(ty) = parts.get(part).and_then(|part| part.get(btf_id).ok()) else {
            return Type::Void;
        };
        match &ty.kind {
            Kind::Enum { size_bytes, signed, values } => {
                let values = values.iter().map(|(name, value)| ((*name).to_owned(), *value));
                let (size_bytes, signed) = (*size_bytes, *signed);
                Type::Enum { name, size_bytes, signed, values: values.collect() }
            }
            Kind::Struct { size_bytes, members, is_union } => {
                let read = |member: &super::Member<'data>| Member {
                    name: member.name.to_owned(),
                    ty: self.id_of(part, member.type_id),
                    bit_offset: member.bit_offset.into(),
                    bit_size: Some(member.bit_size).filter(|bits| *bits > 0),
                };
                let members: Vec<Member> = members.iter().map(read).collect();
                Type::Struct { name, is_union: *is_union, size_bytes: *size_bytes, members }
            }
            _ => Type::Void,
        }
    }

    fn intern(&mut self, ty: Type) -> TypeId {
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

fn definitions<'data>(parts: &[Btf<'data>]) -> Definitions<'data> {
    let mut found: HashMap<_, Vec<_>> = HashMap::new();
    for (i, part) in parts.iter().enumerate() {
        for (btf_id, ty) in part.types() {
            if let Kind::Struct { is_union, .. } = ty.kind {
                found.entry((ty.name, is_union)).or_default().push((i, btf_id));
            }
        }
    }
    found
}
