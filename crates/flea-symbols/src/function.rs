//! Which functions a module has: symbol tables first, DWARF where there are none. Knows
//! nothing of instructions.

use std::collections::BTreeMap;

use object::read::elf::Sym as _;
use object::{LittleEndian, Object as _, ObjectSymbol as _};

use crate::addr::Svma;
use crate::demangle;
use crate::dwarf;
use crate::module::{Elf, Module};

const STT_NOTYPE: u8 = 0;
const STT_FUNC: u8 = 2;
const STT_GNU_IFUNC: u8 = 10;
const STB_LOCAL: u8 = 0;

/// One function of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// The linker's name, without a version suffix.
    pub name: String,
    /// Other names of the same address.
    pub aliases: Vec<String>,
    /// Its first byte.
    pub address: Svma,
    /// Its length; where the symbol does not say, up to the next function or the end of its
    /// unwind entry.
    pub size_bytes: u64,
    /// What is at its address.
    pub kind: FunctionKind,
}

/// What is at a function's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FunctionKind {
    /// The function.
    Func,
    /// STT_GNU_IFUNC: a resolver that returns the function's address.
    Ifunc,
}

impl Function {
    /// As people write it: C++ with its parameter list, Rust without the hash. `None` for
    /// names that are not mangled.
    #[must_use]
    pub fn demangled(&self) -> Option<String> {
        demangle::full(&self.name)
    }

    /// As [`Function::demangled`], without parameter list and return type.
    #[must_use]
    pub fn demangled_short(&self) -> Option<String> {
        demangle::short(&self.name)
    }

    /// The best name for people.
    #[must_use]
    pub fn display_name(&self) -> String {
        self.demangled().unwrap_or_else(|| self.name.clone())
    }

    /// A part that the compiler split off another function (`foo.cold`): entered by jumps,
    /// in the middle of that function's frame.
    #[must_use]
    pub fn is_cold_part(&self) -> bool {
        self.name.split('.').skip(1).any(|suffix| suffix == "cold")
    }

    /// First address past its end.
    #[must_use]
    pub fn end(&self) -> Svma {
        Svma(self.address.0.saturating_add(self.size_bytes))
    }
}

/// One name at an address, before names are merged.
struct Named {
    name: String,
    size_bytes: u64,
    is_ifunc: bool,
    is_local: bool,
    has_type: bool,
}

/// All functions of `module`, by address.
pub(crate) fn collect(module: &Module<'_>) -> Vec<Function> {
    let mut found: BTreeMap<u64, Vec<Named>> = BTreeMap::new();
    let mut has_symtab = false;
    for elf in std::iter::once(&module.elf).chain(&module.debug_elf) {
        has_symtab |= elf.elf_symbol_table().iter().next().is_some();
        collect_from_elf(module, elf, &mut found);
    }
    if !has_symtab {
        let info = module.debug_info();
        let view = info.dwarf();
        let dies = dwarf::dies::Dies::new(&view);
        for subprogram in info.subprograms() {
            let known = found.contains_key(&subprogram.address.0);
            if known || !is_function_address(module, subprogram.address.0) {
                continue;
            }
            if let Some(name) = dwarf::signature::linkage_name(&dies, &subprogram) {
                found.entry(subprogram.address.0).or_default().push(Named {
                    name,
                    size_bytes: subprogram.size_bytes,
                    is_ifunc: false,
                    is_local: true,
                    has_type: true,
                });
            }
        }
    }
    drop_labels(module, &mut found);
    let starts: Vec<u64> = found.keys().copied().collect();
    let mut functions: Vec<Function> =
        found.into_iter().map(|(address, names)| merge(address, names)).collect();
    for (i, function) in functions.iter_mut().enumerate() {
        if function.size_bytes == 0 {
            function.size_bytes = missing_size(module, function.address.0, starts.get(i + 1));
        }
    }
    functions
}

fn is_function_address(module: &Module<'_>, address: u64) -> bool {
    module.code_range(address).is_some_and(|range| !range.is_plt)
}

fn collect_from_elf(module: &Module<'_>, elf: &Elf<'_>, found: &mut BTreeMap<u64, Vec<Named>>) {
    for symbol in elf.symbols().chain(elf.dynamic_symbols()) {
        let raw = symbol.elf_symbol();
        let (st_type, bind) = (raw.st_type().0, raw.st_bind().0);
        let wanted = matches!(st_type, STT_FUNC | STT_GNU_IFUNC)
            || (st_type == STT_NOTYPE && bind != STB_LOCAL);
        let address = symbol.address();
        if !wanted || raw.is_undefined(LittleEndian) || !is_function_address(module, address) {
            continue;
        }
        let Ok(name) = symbol.name_bytes() else { continue };
        let name = String::from_utf8_lossy(name);
        let name = name.split('@').next().unwrap_or_default();
        if name.is_empty() {
            continue;
        }
        found.entry(address).or_default().push(Named {
            name: name.to_owned(),
            size_bytes: symbol.size(),
            is_ifunc: st_type == STT_GNU_IFUNC,
            is_local: bind == STB_LOCAL,
            has_type: st_type != STT_NOTYPE,
        });
    }
}

/// A symbol without a type is a function only where no other function's bytes hold it:
/// inside one it is a label. (The site proof sees such labels through the symbol table.)
fn drop_labels(module: &Module<'_>, found: &mut BTreeMap<u64, Vec<Named>>) {
    let mut end_of_typed = 0;
    found.retain(|address, names| {
        if let Some(size) = names.iter().filter(|n| n.has_type).map(|n| n.size_bytes).max() {
            end_of_typed = end_of_typed.max(address.saturating_add(size));
            return true;
        }
        let fde = module.unwind().entry_at(*address);
        *address >= end_of_typed && fde.is_none_or(|fde| fde.start == *address)
    });
}

fn merge(address: u64, mut names: Vec<Named>) -> Function {
    names.sort_by(|a, b| preference(a).cmp(&preference(b)));
    names.dedup_by(|a, b| a.name == b.name);
    let kind = if names.iter().any(|name| name.is_ifunc) {
        FunctionKind::Ifunc
    } else {
        FunctionKind::Func
    };
    let size_bytes = names.iter().map(|name| name.size_bytes).max().unwrap_or(0);
    let mut names = names.into_iter().map(|name| name.name);
    Function {
        name: names.next().unwrap_or_default(),
        aliases: names.collect(),
        address: Svma(address),
        size_bytes,
        kind,
    }
}

/// Global before local, few leading underscores, short, then by the alphabet: the order does
/// not depend on the symbol table's.
fn preference(named: &Named) -> (bool, usize, usize, &str) {
    let name = named.name.as_str();
    let mangled = name.starts_with("_Z") || name.starts_with("_R");
    let underscores = if mangled { 0 } else { name.len() - name.trim_start_matches('_').len() };
    (named.is_local, underscores, name.len(), name)
}

fn missing_size(module: &Module<'_>, address: u64, next: Option<&u64>) -> u64 {
    let section_end = module.code_range(address).map_or(address, |range| range.end);
    let mut end = next.map_or(section_end, |next| section_end.min(*next));
    match module.unwind().entry_at(address) {
        Some(fde) => end = end.min(fde.end),
        None => end = module.unwind().next_start(address).map_or(end, |start| end.min(start)),
    }
    end.saturating_sub(address)
}
