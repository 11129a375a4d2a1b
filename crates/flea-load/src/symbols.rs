//! The dynamic section, and the symbols that relocations refer to. A symbol is looked up by
//! its number only: names are for the caller, who finds what the object does not define.

use std::collections::HashMap;

use flea_symbols::addr::Svma;

use crate::error::ParseError;
use crate::file::{File, PT_DYNAMIC, damaged, read_u16, read_u32, read_u64, slice};

const DT_STRTAB: u64 = 5;
const DT_SYMTAB: u64 = 6;
const DT_STRSZ: u64 = 10;
const DT_VERSYM: u64 = 0x6fff_fff0;
const DT_VERNEED: u64 = 0x6fff_fffe;
const DT_VERNEEDNUM: u64 = 0x6fff_ffff;

const SYMBOL_BYTES: u64 = 24;
const STB_WEAK: u8 = 2;
const STT_TLS: u8 = 6;
const STT_GNU_IFUNC: u8 = 10;
const SHN_UNDEF: u16 = 0;
const SHN_ABS: u16 = 0xfff1;
/// Above any real one.
const MAX_NAME_BYTES: usize = 1 << 16;
/// As every one may be followed by itself.
const MAX_NEEDED_FILES: u64 = 1 << 12;

/// What an object's dynamic section says.
#[derive(Debug)]
pub(crate) struct Dynamic<'a> {
    file: &'a File<'a>,
    entries: Vec<(u64, u64)>,
    strings: &'a [u8],
    versions: HashMap<u16, String>,
}

/// A symbol that a relocation refers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Symbol {
    /// Symbol 0: no symbol at all.
    None,
    /// Of the object itself.
    Own(Svma),
    /// A number, not an address.
    Absolute(u64),
    /// Defined elsewhere.
    Import { name: String, version: Option<String>, weak: bool },
}

impl<'a> Dynamic<'a> {
    pub(crate) fn read(file: &'a File<'a>) -> Result<Self, ParseError> {
        let mut entries = Vec::new();
        if let Some(header) = file.of_kind(PT_DYNAMIC).next() {
            let bytes = slice(file.bytes, header.offset, header.file_size_bytes)
                .ok_or(damaged("its dynamic section is outside the file"))?;
            let pairs = bytes
                .chunks_exact(16)
                .filter_map(|entry| Some((read_u64(entry, 0)?, read_u64(entry, 8)?)));
            entries = pairs.take_while(|(tag, _)| *tag != 0).collect();
        }
        let mut dynamic = Self { file, entries, strings: &[], versions: HashMap::new() };
        if let Some(at) = dynamic.value(DT_STRTAB) {
            let size_bytes = dynamic.value(DT_STRSZ).unwrap_or(0);
            dynamic.strings = file
                .at(Svma(at), size_bytes)
                .ok_or(damaged("its string table is outside the file"))?;
        }
        dynamic.versions = dynamic.read_versions().unwrap_or_default();
        Ok(dynamic)
    }

    /// The value of the first entry with this tag.
    pub(crate) fn value(&self, tag: u64) -> Option<u64> {
        self.entries.iter().find(|entry| entry.0 == tag).map(|entry| entry.1)
    }

    /// The table that one entry locates and another one measures; empty without them.
    pub(crate) fn table(&self, at: u64, size: u64) -> Result<&'a [u8], ParseError> {
        let size_bytes = self.value(size).unwrap_or(0);
        match self.value(at) {
            Some(address) if size_bytes > 0 => self
                .file
                .at(Svma(address), size_bytes)
                .ok_or(damaged("a table of its dynamic section is outside the file")),
            _ => Ok(&[]),
        }
    }

    /// Symbol number `index`.
    pub(crate) fn symbol(&self, index: u32) -> Result<Symbol, ParseError> {
        if index == 0 {
            return Ok(Symbol::None);
        }
        let entry = self
            .value(DT_SYMTAB)
            .and_then(|table| table.checked_add(u64::from(index) * SYMBOL_BYTES))
            .and_then(|at| self.file.at(Svma(at), SYMBOL_BYTES))
            .ok_or(damaged("a relocation refers to a symbol outside the file"))?;
        let name = self.name(read_u32(entry, 0).unwrap_or(0))?;
        let info = entry[4];
        let section = read_u16(entry, 6).unwrap_or(SHN_UNDEF);
        let value = read_u64(entry, 8).unwrap_or(0);
        match (info & 15, section) {
            (STT_TLS, _) => Err(ParseError::ThreadLocal { symbol: Some(name) }),
            (_, SHN_UNDEF) => {
                let version = self.version(index);
                Ok(Symbol::Import { name, version, weak: info >> 4 == STB_WEAK })
            }
            (STT_GNU_IFUNC, _) => Err(ParseError::IndirectFunction { symbol: name }),
            (_, SHN_ABS) => Ok(Symbol::Absolute(value)),
            _ => Ok(Symbol::Own(Svma(value))),
        }
    }

    /// The name of symbol number `index`, for messages.
    pub(crate) fn name_of(&self, index: u32) -> Option<String> {
        let at = self.value(DT_SYMTAB)?.checked_add(u64::from(index) * SYMBOL_BYTES)?;
        let entry = self.file.at(Svma(at), SYMBOL_BYTES)?;
        self.name(read_u32(entry, 0)?).ok().filter(|name| !name.is_empty())
    }

    fn name(&self, at: u32) -> Result<String, ParseError> {
        let rest = usize::try_from(at).ok().and_then(|at| self.strings.get(at..));
        let rest = rest.ok_or(damaged("a name is outside the string table"))?;
        let len = rest.iter().take(MAX_NAME_BYTES).position(|byte| *byte == 0);
        let len = len.ok_or(damaged("a name does not end"))?;
        Ok(String::from_utf8_lossy(&rest[..len]).into_owned())
    }

    /// Which version of it the object was linked against.
    fn version(&self, index: u32) -> Option<String> {
        let at = self.value(DT_VERSYM)?.checked_add(2 * u64::from(index))?;
        let wanted = read_u16(self.file.at(Svma(at), 2)?, 0)? & 0x7fff;
        self.versions.get(&wanted).cloned()
    }

    /// The names of the versions that it needs, by their numbers in DT_VERSYM.
    fn read_versions(&self) -> Option<HashMap<u16, String>> {
        let mut names = HashMap::new();
        let mut need_at = self.value(DT_VERNEED)?;
        for _ in 0..self.value(DT_VERNEEDNUM)?.min(MAX_NEEDED_FILES) {
            // struct Verneed: version, number of auxiliaries, file, offset of these, next.
            let need = self.file.at(Svma(need_at), 16)?;
            let mut aux_at = need_at.checked_add(u64::from(read_u32(need, 8)?))?;
            for _ in 0..read_u16(need, 2)? {
                // struct Vernaux: hash, flags, number, name, next.
                let aux = self.file.at(Svma(aux_at), 16)?;
                let name = self.name(read_u32(aux, 8)?).ok()?;
                // A number twice is a chain that bites its tail.
                if names.insert(read_u16(aux, 6)? & 0x7fff, name).is_some() {
                    return None;
                }
                aux_at = aux_at.checked_add(u64::from(read_u32(aux, 12)?))?;
            }
            need_at = need_at.checked_add(u64::from(read_u32(need, 12)?))?;
        }
        Some(names)
    }
}
