//! A module's BTF, for functions that its DWARF does not describe. Start at
//! [`TypeInfo::signature`]; a prototype's signature is in [`signature`], types in [`types`].
//! Knows nothing of instructions.
//!
//! BTF names functions and has no addresses. A name is believed where one function of the
//! module has it and all its prototypes agree.

mod signature;
mod types;

use std::collections::{HashMap, HashSet};

use flea_object::btf::{Btf, BtfError, Kind};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};

use crate::dwarf::c_abi;
use crate::dwarf::signature::Code;
use crate::function::{Function, FunctionKind};
use crate::module::{Elf, Module};
use crate::signature::{Doubt, Signature};
use crate::x86_64::classify::Compiler;

const STB_LOCAL: u8 = 0;
/// How its compilers' `.comment`s begin. A linker's is no compiler's.
const COMPILER_MARKS: [&str; 3] = ["GCC: ", "clang version ", "rustc version "];
/// An LLVM that knows no later rule, and one that knows all.
const OLDEST_AND_NEWEST_LLVM: [Compiler; 2] = [Compiler::Llvm(0), Compiler::Llvm(u32::MAX)];

/// More objects than a module has do not declare one function.
const MAX_PROTOTYPES: usize = 1 << 14;

/// The type information of one module.
pub(crate) struct TypeInfo<'data> {
    /// One for each object that was linked, or why none can be read.
    parts: Result<Vec<Btf<'data>>, BtfError>,
    /// Part and prototype of each function by its name.
    prototypes: HashMap<&'data str, Vec<(usize, u32)>>,
    context: Context,
}

/// What the rest of the module tells of its functions.
struct Context {
    /// Every compiler that may have made one.
    compilers: Vec<Compiler>,
    /// It has code whose classes may be passed by address, and BTF does not say which.
    has_other_languages: bool,
    /// Names that only one object knows: LLVM may have changed such functions' parameters.
    local_names: HashSet<String>,
    /// Names of more than one function.
    shared_names: HashSet<String>,
}

impl<'data> TypeInfo<'data> {
    pub(crate) fn read(module: &Module<'data>) -> Self {
        let elfs = || std::iter::once(&module.elf).chain(&module.debug_elf);
        let section = elfs().find_map(|elf| section_of(elf, ".BTF")).unwrap_or_default();
        let parts = Btf::parse_linked(section);
        let mut prototypes: HashMap<&str, Vec<(usize, u32)>> = HashMap::new();
        for (i, part) in parts.iter().flatten().enumerate() {
            for (_, ty) in part.types() {
                if let Kind::Func { proto } = ty.kind {
                    prototypes.entry(ty.name).or_default().push((i, proto));
                }
            }
        }
        // Nothing is asked of the context of a module without BTF.
        let context =
            if prototypes.is_empty() { Context::nothing() } else { Context::read(module) };
        Self { parts, prototypes, context }
    }

    /// The signature of `function`. Its code is read where BTF mentions it.
    ///
    /// # Errors
    /// Why there is none; [`Doubt::NoDebugInfo`] where BTF does not mention it.
    pub(crate) fn signature(
        &self,
        function: &Function,
        read_code: impl FnOnce() -> Code,
    ) -> Result<Signature, Doubt> {
        let parts = self.parts.as_ref().map_err(|error| Doubt::UnreadableBtf(error.clone()))?;
        // At an ifunc's address is its resolver, which has another type.
        if function.kind == FunctionKind::Ifunc {
            return Err(Doubt::NoDebugInfo);
        }
        let names = || std::iter::once(&function.name).chain(&function.aliases);
        let known = names().find_map(|name| Some((name, self.prototypes.get(name.as_str())?)));
        let (name, prototypes) = known.ok_or(Doubt::NoDebugInfo)?;
        if self.context.shared_names.contains(name) || prototypes.len() > MAX_PROTOTYPES {
            return Err(Doubt::SharedName);
        }
        if self.context.may_be_changed(names()) {
            return Err(Doubt::Private);
        }
        let code = read_code();
        let mut found: Option<Signature> = None;
        for (part, proto) in prototypes {
            let part = parts.get(*part).ok_or(Doubt::NoDebugInfo)?;
            let one = signature::read(part, *proto, &self.context, &code)?;
            found = Some(match found {
                None => one,
                Some(before) => same(before, one).ok_or(Doubt::Prototypes)?,
            });
        }
        found.ok_or(Doubt::NoDebugInfo)
    }
}

impl<'data> TypeInfo<'data> {
    /// The types of each object that was linked; nothing where they cannot be read.
    pub(crate) fn parts(&self) -> &[Btf<'data>] {
        self.parts.as_deref().unwrap_or_default()
    }

    /// Part, parameters and result of `function`, whose signature is from here.
    pub(crate) fn prototype(&self, function: &Function) -> Option<(usize, Vec<u32>, u32)> {
        let mut names = std::iter::once(&function.name).chain(&function.aliases);
        let known = names.find_map(|name| self.prototypes.get(name.as_str()));
        let (part, proto) = *known?.first()?;
        let Kind::Proto { ret, params } = &self.parts().get(part)?.get(proto).ok()?.kind else {
            return None;
        };
        Some((part, params.iter().map(|param| param.type_id).collect(), *ret))
    }
}

impl Context {
    fn nothing() -> Self {
        Self {
            compilers: Vec::new(),
            has_other_languages: false,
            local_names: HashSet::new(),
            shared_names: HashSet::new(),
        }
    }

    fn read(module: &Module<'_>) -> Self {
        let comment = section_of(&module.elf, ".comment").unwrap_or_default();
        let (mut seen, mut shared_names) = (HashSet::new(), HashSet::new());
        let mut has_other_languages = false;
        for function in module.functions() {
            for name in std::iter::once(&function.name).chain(&function.aliases) {
                has_other_languages |= name.starts_with("_Z") || name.starts_with("_R");
                if !seen.insert(name) {
                    shared_names.insert(name.clone());
                }
            }
        }
        let elfs = std::iter::once(&module.elf).chain(&module.debug_elf);
        let local_names = elfs.flat_map(local_names).collect();
        let compilers = compilers(comment);
        Self { compilers, has_other_languages, local_names, shared_names }
    }

    /// Whether a function of these names may take other parameters than its source says,
    /// because LLVM knew all its callers. gcc gives what it changes another name.
    fn may_be_changed<'n>(&self, mut names: impl Iterator<Item = &'n String>) -> bool {
        let is_llvm = self.compilers.iter().any(|one| *one != Compiler::Gcc);
        is_llvm && names.all(|name| self.local_names.contains(name))
    }
}

/// `.BTF` is not loaded and is not compressed.
fn section_of<'data>(elf: &Elf<'data>, name: &str) -> Option<&'data [u8]> {
    let bytes = elf.section_by_name(name)?.data().ok()?;
    (!bytes.is_empty()).then_some(bytes)
}

fn local_names(elf: &Elf<'_>) -> Vec<String> {
    let is_local = |bind: object::elf::SymbolBind| bind.0 == STB_LOCAL;
    let symbols = elf.symbols().filter(|symbol| is_local(symbol.elf_symbol().st_bind()));
    symbols.filter_map(|symbol| Some(symbol.name().ok()?.to_owned())).collect()
}

/// The compilers that `.comment` names; all there are where it names none.
fn compilers(comment: &[u8]) -> Vec<Compiler> {
    let mut found = Vec::new();
    for text in comment.split(|byte| *byte == 0) {
        let text = String::from_utf8_lossy(text);
        if COMPILER_MARKS.iter().any(|mark| text.contains(mark)) {
            let compiler = c_abi::compiler_of(&text);
            if !found.contains(&compiler) {
                found.push(compiler);
            }
        }
    }
    if found.is_empty() {
        found.push(Compiler::Gcc);
        found.extend(OLDEST_AND_NEWEST_LLVM);
    }
    found
}

/// One signature for two prototypes that differ in names of parameters at most. A declaration
/// has none.
fn same(a: Signature, b: Signature) -> Option<Signature> {
    let without_names = |signature: &Signature| {
        let mut plain = signature.clone();
        plain.params.iter_mut().for_each(|param| param.name = None);
        plain
    };
    let n_names = |signature: &Signature| signature.params.iter().flat_map(|p| &p.name).count();
    if without_names(&a) != without_names(&b) {
        return None;
    }
    Some(if n_names(&b) > n_names(&a) { b } else { a })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compilers_of_comments() {
        let check = |comment: &[u8], expect: &[Compiler]| {
            assert_eq!(compilers(comment), expect, "{}", comment.escape_ascii());
        };
        check(
            b"GCC: (Debian 12.2.0-14) 12.2.0\0GCC: (Debian 12.2.0-14) 12.2.0\0",
            &[Compiler::Gcc],
        );
        check(
            b"\0GCC: (GNU) 12\0Debian clang version 14.0.6\0Linker: Debian LLD 14.0.6\0",
            &[Compiler::Gcc, Compiler::Llvm(14)],
        );
        let any = [Compiler::Gcc, Compiler::Llvm(0), Compiler::Llvm(u32::MAX)];
        check(b"", &any);
        check(b"Linker: LLD 19.1.0\0", &any);
    }
}
