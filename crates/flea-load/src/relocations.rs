//! Relocations, sorted into the two things that can be written: an address, or a distance.

use std::collections::HashMap;

use flea_symbols::addr::Svma;

use crate::error::ParseError;
use crate::file::{damaged, read_u64};
use crate::parse::Import;
use crate::symbols::{Dynamic, Symbol};

const DT_PLTRELSZ: u64 = 2;
const DT_RELA: u64 = 7;
const DT_RELASZ: u64 = 8;
const DT_REL: u64 = 17;
const DT_PLTREL: u64 = 20;
const DT_JMPREL: u64 = 23;
const DT_RELRSZ: u64 = 35;
const DT_RELR: u64 = 36;
const RELA_BYTES: usize = 24;

// psABI for x86-64, "Relocation Types".
const R_X86_64_NONE: u32 = 0;
const R_X86_64_64: u32 = 1;
const R_X86_64_PC32: u32 = 2;
const R_X86_64_PLT32: u32 = 4;
const R_X86_64_GLOB_DAT: u32 = 6;
const R_X86_64_JUMP_SLOT: u32 = 7;
const R_X86_64_RELATIVE: u32 = 8;
const R_X86_64_DTPMOD64: u32 = 16;
const R_X86_64_DTPOFF64: u32 = 17;
const R_X86_64_TPOFF64: u32 = 18;
const R_X86_64_TPOFF32: u32 = 23;
const R_X86_64_TLSDESC: u32 = 36;
const R_X86_64_IRELATIVE: u32 = 37;

/// One field to fill in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Relocation {
    pub(crate) at: Svma,
    pub(crate) field: Field,
    pub(crate) value: Value,
    pub(crate) addend: i64,
}

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    /// The address, 8 bytes.
    Address,
    /// The distance from the field, 4 bytes.
    Distance,
}

impl Field {
    pub(crate) fn size_bytes(self) -> u64 {
        match self {
            Self::Address => 8,
            Self::Distance => 4,
        }
    }
}

/// Of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// A place in the object.
    Own(Svma),
    /// A number that does not move with the object.
    Absolute(u64),
    /// An import, by its index.
    Import(usize),
}

/// All relocations, and what they import.
#[derive(Debug, Default)]
pub(crate) struct Relocations {
    pub(crate) list: Vec<Relocation>,
    pub(crate) imports: Vec<Import>,
    /// Index of the import by its symbol's number.
    by_symbol: HashMap<u32, usize>,
}

/// Reads every relocation table. `original` gives the 8 bytes that the file has at an address:
/// packed relocations keep their addend there.
pub(crate) fn read(
    dynamic: &Dynamic<'_>,
    original: impl Fn(Svma) -> Option<u64>,
) -> Result<Relocations, ParseError> {
    let is_rela = dynamic.value(DT_PLTREL).is_none_or(|kind| kind == DT_RELA);
    if dynamic.value(DT_REL).is_some() || !is_rela {
        return Err(damaged("it has relocations without addends, which x86-64 does not use"));
    }
    let mut found = Relocations::default();
    for (table, size) in [(DT_RELA, DT_RELASZ), (DT_JMPREL, DT_PLTRELSZ)] {
        for entry in dynamic.table(table, size)?.chunks_exact(RELA_BYTES) {
            found.add(dynamic, entry)?;
        }
    }
    for at in packed(dynamic.table(DT_RELR, DT_RELRSZ)?) {
        let target = original(at).ok_or(damaged("a packed relocation is outside the file"))?;
        found.list.push(relative(at, target));
    }
    Ok(found)
}

fn relative(at: Svma, target: u64) -> Relocation {
    Relocation { at, field: Field::Address, value: Value::Own(Svma(target)), addend: 0 }
}

/// The addresses that a DT_RELR table stands for: an even word is an address, an odd one a
/// bit for each of the 63 words behind the last.
fn packed(table: &[u8]) -> Vec<Svma> {
    let mut places = Vec::new();
    let mut next = 0u64;
    for word in table.chunks_exact(8).filter_map(|chunk| read_u64(chunk, 0)) {
        if word & 1 == 0 {
            places.push(Svma(word));
            next = word.wrapping_add(8);
        } else {
            let set = (0..63u64).filter(|bit| word >> (bit + 1) & 1 != 0);
            places.extend(set.map(|bit| Svma(next.wrapping_add(8 * bit))));
            next = next.wrapping_add(63 * 8);
        }
    }
    places
}

impl Relocations {
    fn add(&mut self, dynamic: &Dynamic<'_>, entry: &[u8]) -> Result<(), ParseError> {
        let word = |at| read_u64(entry, at).ok_or(damaged("a relocation is cut short"));
        let (at, info, addend) = (Svma(word(0)?), word(8)?, word(16)?.cast_signed());
        let kind = u32::try_from(info & 0xffff_ffff).expect("masked");
        let symbol = u32::try_from(info >> 32).expect("shifted");
        let field = match kind {
            R_X86_64_NONE => return Ok(()),
            R_X86_64_RELATIVE => {
                self.list.push(relative(at, addend.cast_unsigned()));
                return Ok(());
            }
            R_X86_64_64 | R_X86_64_GLOB_DAT | R_X86_64_JUMP_SLOT => Field::Address,
            R_X86_64_PC32 | R_X86_64_PLT32 => Field::Distance,
            R_X86_64_DTPMOD64 | R_X86_64_DTPOFF64 | R_X86_64_TPOFF64 | R_X86_64_TPOFF32
            | R_X86_64_TLSDESC => {
                return Err(ParseError::ThreadLocal { symbol: dynamic.name_of(symbol) });
            }
            R_X86_64_IRELATIVE => {
                let symbol = format!("{:#x}", addend.cast_unsigned());
                return Err(ParseError::IndirectFunction { symbol });
            }
            _ => return Err(ParseError::Relocation { at, kind }),
        };
        // The two that fill slots have no addend to heed (psABI).
        let fills_slot = matches!(kind, R_X86_64_GLOB_DAT | R_X86_64_JUMP_SLOT);
        let addend = if fills_slot { 0 } else { addend };
        let value = match dynamic.symbol(symbol)? {
            Symbol::None => Value::Absolute(0),
            Symbol::Own(address) => Value::Own(address),
            Symbol::Absolute(value) => Value::Absolute(value),
            Symbol::Import { name, version, weak } => {
                Value::Import(self.import(symbol, Import { name, version, weak }))
            }
        };
        self.list.push(Relocation { at, field, value, addend });
        Ok(())
    }

    fn import(&mut self, symbol: u32, import: Import) -> usize {
        *self.by_symbol.entry(symbol).or_insert_with(|| {
            self.imports.push(import);
            self.imports.len() - 1
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_addresses() {
        let words = [0x1000u64, 0b1011, 1 << 63 | 1, 0x3000];
        let table: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let behind = 0x1008 + 63 * 8;
        let expected = [0x1000, 0x1008, 0x1018, behind + 62 * 8, 0x3000];
        assert_eq!(packed(&table), expected.map(Svma));
        assert_eq!(packed(&table[..7]), []);
    }
}
