//! Types of a target for tests, one line each, in any order.
//!
//! ```text
//! struct foo 24 a:u32@0 next:*foo@8 name:char[8]@16      size, members, offsets in bytes
//! struct bits 4 x:u32@0+3 y:u32@3+5                      bit-fields: offset in bits, width
//! union either 8 p:*foo@0 n:u64@0
//! opaque hidden
//! ```
//! A type is `void`, `fn`, a number (`u8` to `u64`, `s8` to `s64`, `char`, `f64`), a name, `*` and
//! a type, a type and `[n]`, or a type in parentheses. `*u8[4]` points to an array.

use std::collections::HashMap;

use flea_object::types::{Member, Type, TypeId, Types};

/// A graph in the making.
#[derive(Clone, Default)]
pub struct Graph {
    pub types: Types,
    names: HashMap<String, TypeId>,
}

impl Graph {
    /// The types that `lines` declare; panics with the line on a mistake.
    pub fn parse<'a>(lines: impl Iterator<Item = &'a str> + Clone) -> Self {
        let mut graph = Self::default();
        for line in lines.clone() {
            let name = line.split(' ').nth(1).unwrap_or_else(|| panic!("no name: {line}"));
            let id = graph.types.add(Type::Opaque { name: name.to_owned() });
            graph.names.insert(name.to_owned(), id);
        }
        for line in lines {
            let words: Vec<&str> = line.split(' ').collect();
            let is_union = match words[0] {
                "struct" => false,
                "union" => true,
                _ => continue,
            };
            let name = words[1].to_owned();
            let id = graph.names[&name];
            let size_bytes = words[2].parse().unwrap_or_else(|_| panic!("size: {line}"));
            let members = words[3..].iter().map(|m| graph.member(m)).collect();
            // Those with such a name have none.
            let name = if name.starts_with("anon") { String::new() } else { name };
            graph.types.set(id, Type::Struct { name, is_union, size_bytes, members });
        }
        graph
    }

    fn member(&mut self, text: &str) -> Member {
        let parts = text.split_once(':').and_then(|(name, rest)| {
            let (ty, place) = rest.split_once('@')?;
            Some((name, ty, place))
        });
        let (name, ty, place) = parts.unwrap_or_else(|| panic!("member: {text}"));
        let ty = self.ty(ty);
        let (bit_offset, bit_size) = match place.split_once('+') {
            Some((bit, width)) => (bit.parse().unwrap(), Some(width.parse().unwrap())),
            None => (8 * place.parse::<u64>().unwrap(), None),
        };
        Member { name: name.to_owned(), ty, bit_offset, bit_size }
    }

    /// The type that `text` spells.
    pub fn ty(&mut self, text: &str) -> TypeId {
        if let Some(&known) = self.names.get(text) {
            return known;
        }
        if let Some(inner) = text.strip_prefix('(').and_then(|t| t.strip_suffix(')')) {
            return self.ty(inner);
        }
        if let Some(to) = text.strip_prefix('*') {
            let to = self.ty(to);
            return self.types.add(Type::Pointer { to });
        }
        if let Some((of, n)) = text.strip_suffix(']').and_then(|t| t.rsplit_once('[')) {
            let of = self.ty(of);
            return self.types.add(Type::Array { of, n_elements: n.parse().unwrap() });
        }
        let name = text.to_owned();
        let ty = match text {
            "void" => Type::Void,
            "fn" => Type::Function,
            "f64" => Type::Float { name, size_bytes: 8 },
            "char" => Type::Int { name, size_bytes: 1, signed: true, is_bool: false },
            _ => {
                let bits: u32 = text[1..].parse().unwrap_or_else(|_| panic!("type: {text}"));
                let signed = text.starts_with('s');
                Type::Int { name, size_bytes: bits / 8, signed, is_bool: false }
            }
        };
        let id = self.types.add(ty);
        self.names.insert(text.to_owned(), id);
        id
    }

    /// Types of context words: `*foo -`, `-` for one that is not known.
    pub fn slots(&mut self, text: &str) -> Vec<Option<TypeId>> {
        text.split(' ').map(|word| (word != "-").then(|| self.ty(word))).collect()
    }
}
