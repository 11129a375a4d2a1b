//! How C spells a type and its members. Start at [`Printer::body`].

use std::collections::HashSet;

use super::plan::{Item, MAX_DEPTH, Plan};
use super::{Printer, unused};
use crate::types::{Member, Type, TypeId, base_name, c_name, key};

/// What is between the braces, and what is behind.
#[derive(Debug, Default)]
pub(super) struct Body {
    pub(super) lines: Vec<String>,
    pub(super) attributes: String,
}

/// Names of one struct's members, those of anonymous ones included.
#[derive(Default)]
struct Names {
    used: HashSet<String>,
    n_pads: u32,
}

impl Names {
    fn take(&mut self, name: &str) -> String {
        unused(&mut self.used, name)
    }

    fn take_pad(&mut self) -> String {
        self.n_pads += 1;
        self.take(&format!("__pad{}", self.n_pads))
    }
}

impl Printer<'_> {
    /// The body of the struct or union `id`.
    pub(super) fn body(&mut self, id: TypeId) -> Body {
        self.body_at(id, &mut Names::default(), 0)
    }

    fn body_at(&mut self, id: TypeId, names: &mut Names, depth: u32) -> Body {
        let Plan { lanes, is_packed, align } = self.plan(id, depth);
        let attributes = match (is_packed, align) {
            (false, _) => String::new(),
            (true, 1) => " __attribute__((packed))".into(),
            (true, align) => format!(" __attribute__((packed, aligned({align})))"),
        };
        let mut lines = Vec::new();
        match lanes.as_slice() {
            [one] => lines.extend(self.lines(one, names, depth)),
            lanes => {
                lines.push("union {".into());
                for lane in lanes {
                    lines.push("\tstruct {".into());
                    let inner = self.lines(lane, names, depth + 1);
                    lines.extend(inner.into_iter().map(|line| format!("\t\t{line}")));
                    lines.push(format!("\t}}{attributes};"));
                }
                lines.push("};".into());
            }
        }
        Body { lines, attributes }
    }

    fn lines(&mut self, items: &[Item], names: &mut Names, depth: u32) -> Vec<String> {
        let mut lines = Vec::new();
        for item in items {
            match item {
                Item::Bytes(n) => {
                    let name = names.take_pad();
                    lines.push(format!("unsigned char {name}[{n}];"));
                }
                Item::Bits(n) => lines.push(format!("unsigned char : {n};")),
                Item::Member(member) => lines.extend(self.member(member, names, depth)),
            }
        }
        lines
    }

    fn member(&mut self, member: &Member, names: &mut Names, depth: u32) -> Vec<String> {
        let name = match self.types.get(member.ty) {
            Type::Struct { name, .. } if member.name.is_empty() && !name.is_empty() => {
                names.take(&base_name(name))
            }
            _ if member.name.is_empty() => String::new(),
            _ => names.take(&c_name(&member.name)),
        };
        if let Some(bits) = member.bit_size {
            let ty = self.bit_field_type(member.ty, bits).map(|(ty, _)| ty).unwrap_or_default();
            return vec![format!("{ty} {name} : {bits};")];
        }
        // Arrays of anonymous structures are written in place, as these are.
        let (element, dimensions) = self.element(member.ty);
        let is_nameless =
            matches!(self.types.get(element), Type::Struct { name, .. } if name.is_empty());
        if !is_nameless {
            return vec![format!("{};", self.declare(member.ty, &name))];
        }
        self.lines_left = self.lines_left.saturating_sub(1);
        if depth >= MAX_DEPTH || self.lines_left == 0 {
            let size = self.size_of(member.ty).unwrap_or(0);
            let name = if name.is_empty() { names.take_pad() } else { name };
            return vec![format!("unsigned char {name}[{size}];")];
        }
        let is_union = matches!(self.types.get(element), Type::Struct { is_union: true, .. });
        let keyword = if is_union { "union" } else { "struct" };
        // Members of one with a name are its own.
        let mut own = Names::default();
        let inner_names = if name.is_empty() { names } else { &mut own };
        let body = self.body_at(element, inner_names, depth + 1);
        let mut lines = vec![format!("{keyword} {{")];
        lines.extend(body.lines.into_iter().map(|line| format!("\t{line}")));
        let space = if name.is_empty() { "" } else { " " };
        lines.push(format!("}}{}{space}{name}{dimensions};", body.attributes));
        lines
    }

    /// What an array has, and its dimensions; the type itself where it is none.
    fn element(&self, id: TypeId) -> (TypeId, String) {
        let (mut id, mut dimensions) = (id, String::new());
        for _ in 0..MAX_DEPTH {
            let Type::Array { of, n_elements } = self.types.get(id) else { break };
            dimensions += &format!("[{n_elements}]");
            id = *of;
        }
        (id, dimensions)
    }

    /// A declaration of `name` with this type.
    fn declare(&self, id: TypeId, name: &str) -> String {
        let (mut id, mut declarator) = (id, name.to_owned());
        for _ in 0..=MAX_DEPTH {
            match self.types.get(id) {
                Type::Array { of, n_elements } => {
                    let has_size = self.size_of(*of).is_some();
                    let n = if has_size { *n_elements } else { 0 };
                    declarator += &format!("[{n}]");
                    if !has_size {
                        return format!("unsigned char {declarator}");
                    }
                    id = *of;
                }
                Type::Pointer { to } => match self.types.get(*to) {
                    Type::Function => return format!("void (*{declarator})(void)"),
                    Type::Array { of, .. } if self.size_of(*of).is_none() => {
                        return format!("void *{declarator}");
                    }
                    Type::Array { .. } => match self.element(*to).0 {
                        // Which C wants to be complete there: a pointer to the first one.
                        element if self.is_struct(element) => {
                            return self.pointer(element, &declarator);
                        }
                        _ => {
                            declarator = format!("(*{declarator})");
                            id = *to;
                        }
                    },
                    Type::Struct { .. } => return self.pointer(*to, &declarator),
                    ty if is_array_in_c(ty) => return format!("void *{declarator}"),
                    _ => {
                        declarator = format!("*{declarator}");
                        id = *to;
                    }
                },
                ty => return self.declare_plain(id, ty, &declarator),
            }
        }
        format!("void *{declarator}")
    }

    fn is_struct(&self, id: TypeId) -> bool {
        matches!(self.types.get(id), Type::Struct { .. })
    }

    /// A pointer to a struct or union. What has no tag cannot be named.
    fn pointer(&self, id: TypeId, declarator: &str) -> String {
        let tag = self.tags.get(&id).map_or("void", String::as_str);
        format!("{tag} *{declarator}")
    }

    fn declare_plain(&self, id: TypeId, ty: &Type, declarator: &str) -> String {
        let space = if declarator.is_empty() { "" } else { " " };
        if let Some(tag) = self.tags.get(&id) {
            return format!("{tag}{space}{declarator}");
        }
        match number(ty) {
            Some((word, None)) => format!("{word}{space}{declarator}"),
            Some((word, Some(n))) => format!("{word}{space}{declarator}[{n}]"),
            None => format!("void{space}{declarator}"),
        }
    }

    /// The type of a bit-field, and its size; `None` for what C has none of.
    pub(super) fn bit_field_type(&self, id: TypeId, bits: u32) -> Option<(String, u64)> {
        let ty = self.types.get(id);
        let (word, size) = match ty {
            Type::Enum { size_bytes, .. } => (self.tags.get(&id)?.clone(), *size_bytes),
            Type::Int { size_bytes: 16, signed, .. } => {
                (if *signed { "long" } else { "unsigned long" }.into(), 8)
            }
            Type::Int { is_bool: true, size_bytes: 1, .. } if bits > 1 => {
                ("unsigned char".into(), 1)
            }
            Type::Int { size_bytes: size @ (1 | 2 | 4 | 8), .. } => (number(ty)?.0.into(), *size),
            _ => return None,
        };
        (bits <= size * 8).then_some((word, size.into()))
    }
}

/// Whether C has no type for it, so that it is written as an array.
pub(super) fn is_array_in_c(ty: &Type) -> bool {
    matches!(number(ty), Some((_, Some(_))))
}

/// How C spells a number: a type, and how many of them. BPF has no `long double`.
pub(super) fn number(ty: &Type) -> Option<(&'static str, Option<u32>)> {
    const BYTE: &str = "unsigned char";
    match ty {
        Type::Float { name, size_bytes } if name.contains("omplex") => {
            Some((BYTE, Some(*size_bytes)))
        }
        Type::Float { size_bytes: 4, .. } => Some(("float", None)),
        Type::Float { size_bytes: 8, .. } => Some(("double", None)),
        Type::Float { size_bytes, .. } => Some((BYTE, Some(*size_bytes))),
        Type::Int { size_bytes: 1, is_bool: true, .. } => Some(("_Bool", None)),
        Type::Int { name, size_bytes, signed, .. } => {
            let own =
                INTEGERS.iter().find(|(word, size, _)| key(name) == *word && size == size_bytes);
            let same = || {
                let mut all = INTEGERS.iter().rev();
                all.find(|(_, size, sign)| size == size_bytes && sign == signed)
            };
            match own.or_else(same) {
                Some((word, ..)) => Some((word, None)),
                None => Some((BYTE, Some(*size_bytes))),
            }
        }
        _ => None,
    }
}

/// Sizes and signs on both x86-64 and BPF. Of those that are alike, the last is the usual one.
const INTEGERS: [(&str, u32, bool); 13] = [
    ("char", 1, true),
    ("signed char", 1, true),
    ("unsigned char", 1, false),
    ("short", 2, true),
    ("unsigned short", 2, false),
    ("int", 4, true),
    ("unsigned int", 4, false),
    ("long long", 8, true),
    ("unsigned long long", 8, false),
    ("long", 8, true),
    ("unsigned long", 8, false),
    ("__int128", 16, true),
    ("unsigned __int128", 16, false),
];

/// An enumerator's value. C has no negative literals.
pub(super) fn enumerator(value: u64, signed: bool) -> String {
    match (signed, value.cast_signed()) {
        (true, i64::MIN) => "-0x7fffffffffffffffLL - 1".into(),
        (true, value) if i32::try_from(value).is_ok() => value.to_string(),
        (true, value) => format!("{value}LL"),
        (false, _) if u32::try_from(value).is_ok() => value.to_string(),
        (false, _) => format!("{value}ULL"),
    }
}
