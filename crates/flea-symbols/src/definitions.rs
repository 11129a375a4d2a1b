//! What a module defines for others to link with, and where it keeps what it was linked with
//! itself. For a loader that binds a new object to a process that runs already.

use std::collections::HashSet;

use object::read::elf::{ProgramHeader as _, SectionHeader as _, Sym as _, VersionTable};
use object::{LittleEndian, Object as _, ObjectSymbol as _, ReadRef as _, elf};

use crate::addr::Svma;
use crate::module::{Module, read_u64};

const STT_TLS: u8 = 6;
const STT_SECTION: u8 = 3;
const STT_FILE: u8 = 4;
const STT_GNU_IFUNC: u8 = 10;
const STB_LOCAL: u8 = 0;
const R_X86_64_GLOB_DAT: u32 = 6;
const R_X86_64_JUMP_SLOT: u32 = 7;
const R_X86_64_IRELATIVE: u32 = 37;
const DT_NULL: u64 = 0;
const DT_DEBUG: u64 = 21;

/// A symbol that a module defines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Definition {
    /// Its name.
    pub name: String,
    /// Its address; for an ifunc, its resolver's.
    pub address: Svma,
    /// What it is.
    pub kind: DefinitionKind,
    /// The version, where it has one.
    pub version: Option<String>,
    /// Who asks for no version gets this one (`name@@VERSION`).
    pub is_default: bool,
    /// Known to one source file only.
    pub is_local: bool,
}

/// What a symbol stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DefinitionKind {
    /// A function or a variable.
    Plain,
    /// STT_GNU_IFUNC: the address is known once the resolver has run.
    Ifunc,
    /// An offset in each thread's storage.
    ThreadLocal,
}

/// A word that the loader filled with the address of a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The word.
    pub at: Svma,
    /// Of what.
    pub of: SlotOf,
}

/// Which function a [`Slot`] is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SlotOf {
    /// An import, by name. Until its first call it may lead back into the module's own PLT.
    Import(String),
    /// The module's own ifunc with this resolver.
    Resolver(Svma),
}

impl Module<'_> {
    /// What the module exports under one of the names `wanted`.
    #[must_use]
    pub fn exports(&self, wanted: &HashSet<&str>) -> Vec<Definition> {
        let sections = self.elf.elf_section_table();
        let versions = sections.versions(LittleEndian, self.files.image).ok().flatten();
        let mut found = Vec::new();
        for symbol in self.elf.dynamic_symbols() {
            let Some(mut definition) = definition(&symbol, wanted) else { continue };
            if definition.is_local {
                continue;
            }
            if let Some(versions) = &versions {
                add_version(&mut definition, versions, symbol.index());
            }
            found.push(definition);
        }
        found
    }

    /// What the full symbol table, or that of the separate debug file, has under these names:
    /// also what is local to one source file.
    #[must_use]
    pub fn private_definitions(&self, wanted: &HashSet<&str>) -> Vec<Definition> {
        let mut found: Vec<Definition> = Vec::new();
        for elf in std::iter::once(&self.elf).chain(&self.debug_elf) {
            for definition in elf.symbols().filter_map(|symbol| definition(&symbol, wanted)) {
                let same =
                    |d: &Definition| d.name == definition.name && d.address == definition.address;
                if !found.iter().any(same) {
                    found.push(definition);
                }
            }
        }
        found
    }

    /// The slots for imports of these names, and all for ifuncs of its own.
    #[must_use]
    pub fn slots(&self, wanted: &HashSet<&str>) -> Vec<Slot> {
        let image = self.files.image;
        let symbols = self.elf.elf_dynamic_symbol_table();
        let mut found = Vec::new();
        for section in self.elf.elf_section_table().iter() {
            if section.sh_flags(LittleEndian).0 & elf::SHF_ALLOC.0 == 0 {
                continue;
            }
            let Ok(Some((relocations, _))) = section.rela(LittleEndian, image) else { continue };
            for relocation in relocations {
                let at = Svma(relocation.r_offset.get(LittleEndian));
                let info = relocation.r_info.get(LittleEndian);
                let kind = u32::try_from(info & 0xffff_ffff).unwrap_or_default();
                let of = match kind {
                    R_X86_64_IRELATIVE => {
                        let resolver = relocation.r_addend.get(LittleEndian).cast_unsigned();
                        Some(SlotOf::Resolver(Svma(resolver)))
                    }
                    R_X86_64_GLOB_DAT | R_X86_64_JUMP_SLOT => {
                        let index = usize::try_from(info >> 32).unwrap_or(usize::MAX);
                        let symbol = symbols.symbol(object::SymbolIndex(index)).ok();
                        let name = symbol.and_then(|s| symbols.symbol_name(LittleEndian, s).ok());
                        let name = name.and_then(|name| std::str::from_utf8(name).ok());
                        name.filter(|name| wanted.contains(name))
                            .map(|name| SlotOf::Import(name.to_owned()))
                    }
                    _ => None,
                };
                found.extend(of.map(|of| Slot { at, of }));
            }
        }
        found
    }

    /// Where its dynamic section is in memory.
    #[must_use]
    pub fn dynamic_address(&self) -> Option<Svma> {
        self.dynamic_segment().map(|(address, _)| address)
    }

    /// The word of its dynamic section in which the loader leaves the address of its `r_debug`
    /// for debuggers.
    #[must_use]
    pub fn debug_slot(&self) -> Option<Svma> {
        let (address, bytes) = self.dynamic_segment()?;
        let tags = bytes.chunks_exact(16).map(|entry| read_u64(entry, 0));
        let mut tags = tags.take_while(|tag| tag.is_some_and(|tag| tag != DT_NULL));
        let index = tags.position(|tag| tag == Some(DT_DEBUG))?;
        Some(Svma(address.0.wrapping_add(16 * index as u64 + 8)))
    }

    /// Whether `address` is in a table of stubs (`.plt`), which lead elsewhere.
    #[must_use]
    pub fn is_stub(&self, address: Svma) -> bool {
        self.code_range(address.0).is_some_and(|range| range.is_plt)
    }

    fn dynamic_segment(&self) -> Option<(Svma, &[u8])> {
        let header = self
            .elf
            .elf_program_headers()
            .iter()
            .find(|header| header.p_type(LittleEndian) == elf::PT_DYNAMIC)?;
        let (offset, size_bytes) = (header.p_offset(LittleEndian), header.p_filesz(LittleEndian));
        let bytes = self.files.image.read_bytes_at(offset, size_bytes).ok()?;
        Some((Svma(header.p_vaddr(LittleEndian)), bytes))
    }
}

fn definition<'data, 'file>(
    symbol: &object::read::elf::ElfSymbol64<'data, 'file, LittleEndian>,
    wanted: &HashSet<&str>,
) -> Option<Definition> {
    let raw = symbol.elf_symbol();
    if raw.is_undefined(LittleEndian) {
        return None;
    }
    let name = std::str::from_utf8(symbol.name_bytes().ok()?).ok()?;
    // A full symbol table has the version in the name.
    let name = name.split('@').next().unwrap_or_default();
    if !wanted.contains(name) {
        return None;
    }
    let kind = match raw.st_type().0 {
        STT_SECTION | STT_FILE => return None,
        STT_TLS => DefinitionKind::ThreadLocal,
        STT_GNU_IFUNC => DefinitionKind::Ifunc,
        _ => DefinitionKind::Plain,
    };
    Some(Definition {
        name: name.to_owned(),
        address: Svma(symbol.address()),
        kind,
        version: None,
        is_default: true,
        is_local: raw.st_bind().0 == STB_LOCAL,
    })
}

fn add_version(
    definition: &mut Definition,
    versions: &VersionTable<'_, elf::FileHeader64<LittleEndian>>,
    index: object::SymbolIndex,
) {
    let number = versions.version_index(LittleEndian, index);
    definition.is_default = !number.is_hidden();
    let version = versions.version(number.index()).ok().flatten();
    definition.version = version.map(|v| String::from_utf8_lossy(v.name()).into_owned());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The test's own executable: it exports little, defines a lot and imports from libc.
    #[test]
    fn of_this_very_program() {
        let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let module = Module::parse(&bytes, None).unwrap();
        let wanted = HashSet::from(["main", "memcpy", "no such symbol"]);
        let private = module.private_definitions(&wanted);
        let main: Vec<_> = private.iter().filter(|d| d.name == "main").collect();
        assert_eq!(main.len(), 1, "{private:?}");
        assert_eq!(main[0].kind, DefinitionKind::Plain);
        assert!(module.function_at(main[0].address).is_some());
        let slots = module.slots(&wanted);
        let of_memcpy = |slot: &&Slot| slot.of == SlotOf::Import("memcpy".to_owned());
        let slot = slots.iter().find(of_memcpy).unwrap();
        assert!(module.segments().iter().any(|s| {
            s.writable && (s.address..Svma(s.address.0 + s.size_bytes)).contains(&slot.at)
        }));
        assert!(module.debug_slot().unwrap() > module.dynamic_address().unwrap());
    }
}
