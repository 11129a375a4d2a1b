//! A C header of the target's types, for programs that are compiled against it: the user-space
//! `vmlinux.h`. Start at [`header`].
//!
//! Every type has the size and the offsets that it has in the target, in clang's code for BPF
//! and in gcc's: what C would not lay out by itself gets padding, or is packed (`plan`). Names
//! that C cannot spell are spelled by [`crate::types::c_name`], by which relocations find them
//! again; several types of one name are flavours (`name`, `name___2`).

mod plan;
mod spell;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;

use crate::types::{Type, TypeId, Types, c_name};

/// A header has no more members of anonymous structures.
const MAX_LINES: u32 = 1 << 18;
const TOP: &str = "\
#ifndef FLEA_TYPES_H
#define FLEA_TYPES_H

/* What gcc defines in its own dialect of C. */
#undef linux
#undef unix
";
const RECORDS_TOP: &str = "
#if defined(__bpf__) && defined(__clang__)
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
#endif
";
const RECORDS_BOTTOM: &str = "
#if defined(__bpf__) && defined(__clang__)
#pragma clang attribute pop
#endif
";
const BOTTOM: &str = "
#endif
";

/// Prints one header.
struct Printer<'t> {
    types: &'t Types,
    /// What each type with members or values is called: `struct node`.
    tags: HashMap<TypeId, String>,
    /// As the compiler of the header sees them.
    aligns: HashMap<TypeId, u64>,
    /// Typedefs and enumerators, which have to differ.
    ordinary: HashSet<String>,
    text: String,
    /// Of members of anonymous structures. Damage may have them by the billion.
    lines_left: u32,
}

/// A header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// C.
    pub text: String,
    /// What each type is called there, e.g. `struct node`.
    pub tags: HashMap<TypeId, String>,
}

/// A C header of `roots` and all that they lead to, each type once.
#[must_use]
pub fn header(types: &Types, roots: &[TypeId]) -> Header {
    let reached = reach(types, roots);
    let mut printer = Printer {
        types,
        tags: tags(types, &reached),
        aligns: HashMap::new(),
        ordinary: HashSet::new(),
        text: TOP.to_owned(),
        lines_left: MAX_LINES,
    };
    for id in &reached {
        if let Type::Enum { .. } = types.get(*id) {
            printer.print_enum(*id);
        }
    }
    printer.print_typedefs(&reached);
    let records = in_order(types, &reached);
    if !records.is_empty() {
        printer.text += RECORDS_TOP;
        records.into_iter().for_each(|id| printer.print_record(id));
        printer.text += RECORDS_BOTTOM;
    }
    Header { text: printer.text + BOTTOM, tags: printer.tags }
}

/// All that `roots` lead to, by number.
fn reach(types: &Types, roots: &[TypeId]) -> Vec<TypeId> {
    let mut seen = HashSet::new();
    let mut todo = roots.to_vec();
    while let Some(id) = todo.pop() {
        if !seen.insert(id) {
            continue;
        }
        match types.get(id) {
            Type::Pointer { to } | Type::Array { of: to, .. } => todo.push(*to),
            Type::Struct { members, .. } => todo.extend(members.iter().map(|m| m.ty)),
            _ => {}
        }
    }
    let mut reached: Vec<TypeId> = seen.into_iter().collect();
    reached.sort_unstable();
    reached
}

/// A tag for each type that needs one. C has one space of tags for structs, unions and enums.
fn tags(types: &Types, reached: &[TypeId]) -> HashMap<TypeId, String> {
    let mut used = HashSet::new();
    let mut tags = HashMap::new();
    let is_declared = |id: &&TypeId| matches!(types.get(**id), Type::Opaque { .. });
    // Definitions take the plain names.
    let (declared, defined): (Vec<&TypeId>, Vec<&TypeId>) = reached.iter().partition(is_declared);
    for id in defined.into_iter().chain(declared) {
        let (keyword, name) = match types.get(*id) {
            Type::Struct { name, .. } if name.is_empty() => continue, // printed where it is used
            Type::Struct { name, is_union: true, .. } => ("union", name.as_str()),
            Type::Struct { name, .. } | Type::Opaque { name } => ("struct", name.as_str()),
            Type::Enum { name, .. } if name.is_empty() => ("enum", "anonymous"),
            Type::Enum { name, .. } => ("enum", name.as_str()),
            _ => continue,
        };
        tags.insert(*id, format!("{keyword} {}", unused(&mut used, &c_name(name))));
    }
    tags
}

/// `name`, or a flavour of it that is not used yet.
fn unused(used: &mut HashSet<String>, name: &str) -> String {
    let flavours = (2u64..).map(|n| format!("{name}___{n}"));
    let mut names = std::iter::once(name.to_owned()).chain(flavours);
    let name = names.find(|name| !used.contains(name)).unwrap_or_default();
    used.insert(name.clone());
    name
}

/// Structs and unions with tags, each behind those that it has by value.
fn in_order(types: &Types, reached: &[TypeId]) -> Vec<TypeId> {
    enum Step {
        Enter(TypeId),
        Leave(TypeId),
    }
    let (mut order, mut seen) = (Vec::new(), HashSet::new());
    for root in reached {
        let mut steps = vec![Step::Enter(*root)];
        while let Some(step) = steps.pop() {
            let id = match step {
                Step::Leave(id) => {
                    order.push(id);
                    continue;
                }
                Step::Enter(id) => id,
            };
            if !seen.insert(id) {
                continue;
            }
            match types.get(id) {
                Type::Array { of, .. } => steps.push(Step::Enter(*of)),
                Type::Struct { name, members, .. } => {
                    if !name.is_empty() {
                        steps.push(Step::Leave(id));
                    }
                    steps.extend(members.iter().rev().map(|member| Step::Enter(member.ty)));
                }
                _ => {}
            }
        }
    }
    order
}

impl Printer<'_> {
    fn print_enum(&mut self, id: TypeId) {
        let Type::Enum { name, size_bytes, signed, values } = self.types.get(id) else { return };
        let tag = self.tags.get(&id).cloned().unwrap_or_default();
        let _ = writeln!(self.text, "\n{tag} {{{}", comment(name));
        for (name, value) in values {
            let name = unused(&mut self.ordinary, &c_name(name));
            let _ = writeln!(self.text, "\t{name} = {},", spell::enumerator(*value, *signed));
        }
        if values.is_empty() {
            // C wants one.
            let none = unused(&mut self.ordinary, &format!("{}_none", tag.replace(' ', "_")));
            let _ = writeln!(self.text, "\t{none},");
        }
        let mode = match size_bytes {
            1 => " __attribute__((mode(QI)))",
            2 => " __attribute__((mode(HI)))",
            8 => " __attribute__((mode(DI)))",
            _ => "",
        };
        let _ = writeln!(self.text, "}}{mode};");
    }

    /// The names that the source uses. One that may mean several types means none here.
    fn print_typedefs(&mut self, reached: &[TypeId]) {
        self.text.push('\n');
        for (name, ids) in self.types.typedefs() {
            let mut meant = ids.iter().filter(|id| reached.binary_search(id).is_ok());
            let (Some(id), None) = (meant.next(), meant.next()) else { continue };
            let Some(tag) = self.tags.get(id) else { continue };
            if self.ordinary.insert(name.to_owned()) {
                let _ = writeln!(self.text, "typedef {tag} {name};");
            }
        }
    }

    fn print_record(&mut self, id: TypeId) {
        let Type::Struct { name, .. } = self.types.get(id) else { return };
        let Some(tag) = self.tags.get(&id).cloned() else { return };
        let comment = comment(name);
        let body = self.body(id);
        let _ = writeln!(self.text, "\n{tag} {{{comment}");
        for line in body.lines {
            let _ = writeln!(self.text, "\t{line}");
        }
        let _ = writeln!(self.text, "}}{};", body.attributes);
    }
}

/// What C could not spell.
fn comment(name: &str) -> String {
    if name.is_empty() || c_name(name) == name {
        return String::new();
    }
    format!(" /* {} */", name.replace("*/", "* /").replace(['\n', '\r'], " "))
}
