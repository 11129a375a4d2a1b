//! Types as the source spells them. Knows nothing of their bytes.

use gimli::constants as dw;

use super::dies::{Die, Dies, MAX_DEPTH, is_c};

impl<'a> Dies<'a> {
    /// As the source spells the type.
    pub(crate) fn spelling(&self, die: &Die<'a>, depth: u32) -> String {
        if depth > MAX_DEPTH {
            return "...".into();
        }
        let inner = || match self.follow(die, dw::DW_AT_type) {
            Some(target) => self.spelling(&target, depth + 1),
            None => "void".into(),
        };
        let name = || self.name(die);
        match die.entry.tag() {
            dw::DW_TAG_const_type => qualified("const", &inner()),
            dw::DW_TAG_volatile_type => qualified("volatile", &inner()),
            dw::DW_TAG_restrict_type => format!("{} restrict", inner()),
            dw::DW_TAG_atomic_type => qualified("_Atomic", &inner()),
            dw::DW_TAG_pointer_type => name().unwrap_or_else(|| pointer_to(&inner(), "*")),
            dw::DW_TAG_reference_type => pointer_to(&inner(), "&"),
            dw::DW_TAG_rvalue_reference_type => pointer_to(&inner(), "&&"),
            dw::DW_TAG_array_type => format!("{}[]", inner()),
            dw::DW_TAG_subroutine_type => self.function_spelling(die, depth),
            dw::DW_TAG_structure_type => self.tagged(die, "struct"),
            dw::DW_TAG_union_type => self.tagged(die, "union"),
            dw::DW_TAG_enumeration_type => self.tagged(die, "enum"),
            dw::DW_TAG_class_type => name().unwrap_or_else(|| "class {...}".into()),
            _ => name().unwrap_or_else(|| "?".into()),
        }
    }

    fn function_spelling(&self, die: &Die<'a>, depth: u32) -> String {
        let of = |die: &Die<'a>| match self.follow(die, dw::DW_AT_type) {
            Some(target) => self.spelling(&target, depth + 1),
            None => "void".into(),
        };
        let params: Vec<String> = self
            .children(die)
            .iter()
            .filter_map(|child| match child.entry.tag() {
                dw::DW_TAG_formal_parameter => Some(of(child)),
                dw::DW_TAG_unspecified_parameters => Some("...".into()),
                _ => None,
            })
            .collect();
        let params = if params.is_empty() { "void".to_owned() } else { params.join(", ") };
        format!("{} ()({params})", of(die))
    }

    fn tagged(&self, die: &Die<'a>, keyword: &str) -> String {
        let name = self.name(die);
        let is_c = self.root(die).and_then(|root| self.language(&root)).is_some_and(is_c);
        match name {
            Some(name) if is_c => format!("{keyword} {name}"),
            Some(name) => name,
            None => format!("{keyword} {{...}}"),
        }
    }
}

pub(crate) fn qualified(word: &str, inner: &str) -> String {
    if inner.ends_with('*') { format!("{inner} {word}") } else { format!("{word} {inner}") }
}

pub(crate) fn pointer_to(inner: &str, mark: &str) -> String {
    // A function's spelling has a place for the name: `int ()(int)`.
    match inner.find("()(") {
        Some(at) => format!("{}({mark}){}", &inner[..at], &inner[at + 2..]),
        None if inner.ends_with(['*', '&']) => format!("{inner}{mark}"),
        None => format!("{inner} {mark}"),
    }
}
