//! The ELF part of an object as plain data: sections, symbols, relocations. Knows nothing of
//! maps or programs. The crate `object` does the reading; here its results are checked and
//! narrowed to what eBPF objects use (`EM_BPF`, 64 bits, little-endian, relocatable).

use object::elf::{SHT_REL, SHT_RELA, SHT_SYMTAB, STV_HIDDEN, STV_INTERNAL};
use object::read::elf::ElfFile64;
use object::read::elf::SectionHeader as _;
use object::{
    LittleEndian, Object as _, ObjectSection as _, ObjectSymbol as _, RelocationFlags,
    RelocationTarget, SectionIndex, SectionKind, SymbolFlags, SymbolKind,
};

const ELF_MAGIC: &[u8] = b"\x7fELF";
const CLASS_64: u8 = 2;
const DATA_LITTLE_ENDIAN: u8 = 1;
const OS_ABI_NONE: u8 = 0;
const TYPE_RELOCATABLE: u16 = 1;
const MACHINE_BPF: u16 = 247;

/// Relocation of a `lddw`.
pub(crate) const R_BPF_64_64: u32 = 1;
/// Relocation of an address in data.
pub(crate) const R_BPF_64_ABS64: u32 = 2;
/// Relocation of a call.
pub(crate) const R_BPF_64_32: u32 = 10;

/// Why a file cannot be read as an eBPF object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// Not an ELF file at all.
    #[error("not an ELF file; an object made by `clang -target bpf -O2 -g -c` is expected")]
    NotElf,
    /// A 32-bit file.
    #[error("ELF class {class} is not 64-bit (2), which eBPF objects are")]
    WrongClass {
        /// `EI_CLASS`
        class: u8,
    },
    /// A big-endian file.
    #[error("ELF byte order {data} is not little-endian (1); compile with -target bpf or bpfel")]
    WrongByteOrder {
        /// `EI_DATA`
        data: u8,
    },
    /// Not an object file.
    #[error("ELF type {elf_type} is not a relocatable object (1); give the .o that clang -c wrote")]
    NotRelocatable {
        /// `e_type`
        elf_type: u16,
    },
    /// An object for another machine.
    #[error("the object is for ELF machine {machine}, not BPF (247); compile with -target bpf")]
    WrongMachine {
        /// `e_machine`
        machine: u16,
    },
    /// An object of a system's own kind, which eBPF objects are not.
    #[error("ELF OS ABI {os_abi} is not 0, which eBPF objects have")]
    WrongOsAbi {
        /// `EI_OSABI`
        os_abi: u8,
    },
    /// Something in it contradicts itself.
    #[error("damaged object: {what}")]
    Damaged {
        /// The contradiction.
        what: String,
    },
}

/// Index into [`Elf::sections`], the section header's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SectionIdx(pub usize);

/// A file's sections and symbols.
#[derive(Debug)]
pub(crate) struct Elf<'a> {
    pub sections: Vec<Section<'a>>,
    pub symbols: Vec<Symbol>,
}

#[derive(Debug)]
pub(crate) struct Section<'a> {
    pub idx: SectionIdx,
    pub name: String,
    /// Holds instructions.
    pub executable: bool,
    pub size_bytes: u64,
    /// Empty where the section is all zeros and not in the file (`.bss`).
    pub data: &'a [u8],
    pub relocations: Vec<Relocation>,
}

#[derive(Debug)]
pub(crate) struct Symbol {
    pub name: String,
    /// `None` for undefined, absolute and common symbols.
    pub section: Option<SectionIdx>,
    pub function: bool,
    pub local: bool,
    /// No other object sees it: `__hidden`, which libbpf takes for static.
    pub hidden: bool,
    pub value: u64,
    pub size_bytes: u64,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Relocation {
    /// From the section's start.
    pub offset: u64,
    /// Index into [`Elf::symbols`].
    pub symbol: usize,
    pub r_type: u32,
}

impl<'a> Elf<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, ElfError> {
        check_header(bytes)?;
        let file = ElfFile64::<LittleEndian>::parse(bytes).map_err(damaged)?;
        check_relocation_sections(&file)?;
        let mut symbols = Vec::new();
        for symbol in file.symbols() {
            // Indices in relocations count the null symbol, which the iterator leaves out.
            symbols.resize_with(symbol.index().0, Symbol::null);
            symbols.push(Symbol {
                name: text(symbol.name_bytes().map_err(damaged)?),
                section: symbol.section_index().map(|i| SectionIdx(i.0)),
                function: symbol.kind() == SymbolKind::Text,
                local: symbol.is_local(),
                hidden: is_hidden(symbol.flags()),
                value: symbol.address(),
                size_bytes: symbol.size(),
            });
        }
        let mut sections = Vec::new();
        for section in file.sections() {
            let name = text(section.name_bytes().map_err(damaged)?);
            let mut relocations = Vec::new();
            for (offset, relocation) in section.relocations() {
                if offset >= section.size() {
                    let what =
                        format!("section '{name}': the relocation at {offset:#x} is outside");
                    return Err(ElfError::Damaged { what });
                }
                relocations.extend(read_relocation(&name, offset, &relocation, symbols.len())?);
            }
            sections.push(Section {
                idx: SectionIdx(section.index().0),
                executable: section.kind() == SectionKind::Text,
                size_bytes: section.size(),
                data: section.data().map_err(damaged)?,
                relocations,
                name,
            });
        }
        let elf = Self { sections, symbols };
        elf.check_functions()?;
        Ok(elf)
    }

    /// A function in a section that holds no instructions would be left out in silence.
    fn check_functions(&self) -> Result<(), ElfError> {
        for symbol in self.symbols.iter().filter(|symbol| symbol.function) {
            let Some(idx) = symbol.section else { continue };
            if !self.section(idx).is_some_and(|section| section.executable) {
                let name = &symbol.name;
                let what =
                    format!("function '{name}' is in section {}, which holds no code", idx.0);
                return Err(ElfError::Damaged { what });
            }
        }
        Ok(())
    }

    /// The section with this name.
    pub(crate) fn section_named(&self, name: &str) -> Option<&Section<'a>> {
        self.sections.iter().find(|section| section.name == name)
    }

    /// The section with this number.
    pub(crate) fn section(&self, idx: SectionIdx) -> Option<&Section<'a>> {
        // Section headers count from 0, which is no section and is not kept.
        self.sections.get(idx.0.checked_sub(1)?).filter(|section| section.idx == idx)
    }
}

impl Symbol {
    fn null() -> Self {
        Self {
            name: String::new(),
            section: None,
            function: false,
            local: true,
            hidden: false,
            value: 0,
            size_bytes: 0,
        }
    }
}

fn is_hidden<S, T>(flags: SymbolFlags<S, T>) -> bool {
    let SymbolFlags::Elf { st_other, .. } = flags else { return false };
    [STV_HIDDEN, STV_INTERNAL].contains(&st_other.visibility())
}

fn check_header(bytes: &[u8]) -> Result<(), ElfError> {
    let header = bytes.get(..20).filter(|h| h.starts_with(ELF_MAGIC)).ok_or(ElfError::NotElf)?;
    let (class, data, os_abi) = (header[4], header[5], header[7]);
    let elf_type = u16::from_le_bytes([header[16], header[17]]);
    let machine = u16::from_le_bytes([header[18], header[19]]);
    if class != CLASS_64 {
        return Err(ElfError::WrongClass { class });
    }
    if data != DATA_LITTLE_ENDIAN {
        return Err(ElfError::WrongByteOrder { data });
    }
    if os_abi != OS_ABI_NONE {
        return Err(ElfError::WrongOsAbi { os_abi });
    }
    if elf_type != TYPE_RELOCATABLE {
        return Err(ElfError::NotRelocatable { elf_type });
    }
    if machine != MACHINE_BPF {
        return Err(ElfError::WrongMachine { machine });
    }
    Ok(())
}

/// Relocations that belong to no symbol table would be left out in silence.
fn check_relocation_sections(file: &ElfFile64<'_, LittleEndian>) -> Result<(), ElfError> {
    let sections = file.elf_section_table();
    let kind = |n: usize| Some(sections.section(SectionIndex(n)).ok()?.sh_type(LittleEndian));
    for (idx, header) in sections.enumerate() {
        let relocates = matches!(header.sh_type(LittleEndian), SHT_REL | SHT_RELA);
        let link = header.sh_link(LittleEndian);
        if relocates && usize::try_from(link).ok().and_then(kind) != Some(SHT_SYMTAB) {
            let what = format!("section {}: its symbol table is said to be section {link}", idx.0);
            return Err(ElfError::Damaged { what });
        }
    }
    Ok(())
}

fn read_relocation(
    section: &str,
    offset: u64,
    relocation: &object::Relocation,
    n_symbols: usize,
) -> Result<Option<Relocation>, ElfError> {
    let RelocationFlags::Elf { r_type } = relocation.flags() else {
        return Ok(None);
    };
    let symbol = match relocation.target() {
        RelocationTarget::Symbol(symbol) if symbol.0 < n_symbols => symbol.0,
        // Symbol 0: nothing to relocate against. Left out here, it is missed, and reported,
        // where the instruction is linked.
        RelocationTarget::Absolute => return Ok(None),
        _ => {
            let what = format!("section '{section}': the relocation at {offset:#x} has no symbol");
            return Err(ElfError::Damaged { what });
        }
    };
    if !relocation.has_implicit_addend() && relocation.addend() != 0 {
        let what = format!("section '{section}': the relocation at {offset:#x} has an addend");
        return Err(ElfError::Damaged { what });
    }
    Ok(Some(Relocation { offset, symbol, r_type: r_type.0 }))
}

fn damaged(error: object::read::Error) -> ElfError {
    ElfError::Damaged { what: error.to_string() }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
