//! The functions of an object: symbols that cover whole instructions of a code section, and
//! do not overlap.

use super::fault::{ProgramError, ProgramFault};
use crate::elf::{Elf, Section, SectionIdx, Symbol};
use crate::insn::{INSN_BYTES, Insn};

/// A function: a symbol and its instructions.
pub(super) struct Function<'a> {
    pub name: &'a str,
    pub section: SectionIdx,
    /// Its first instruction, an index into the section's.
    pub start: usize,
    pub insns: Vec<Insn>,
    /// `static` in the source.
    pub local: bool,
    /// Not static, and yet for this object alone.
    pub hidden: bool,
}

/// All of them, by section and place.
pub(super) fn find_functions<'a>(elf: &'a Elf<'_>) -> Result<Vec<Function<'a>>, ProgramError> {
    let mut found = Vec::new();
    for symbol in elf.symbols.iter().filter(|s| s.function) {
        let section = symbol.section.and_then(|idx| elf.section(idx));
        let Some(section) = section.filter(|s| s.executable) else { continue };
        let (offset, size_bytes) = (symbol.value, symbol.size_bytes);
        let code = function_bytes(section, symbol).ok_or_else(|| {
            let section = section.name.clone();
            ProgramFault::BadSymbol { section, offset, size_bytes }.of(&symbol.name)
        })?;
        found.push((section.idx, symbol, code));
    }
    found.sort_by_key(|(section, symbol, _)| (*section, symbol.value));
    for pair in found.windows(2) {
        let ((a_section, a, a_code), (b_section, b, _)) = (&pair[0], &pair[1]);
        if a_section == b_section && a.value + a_code.len() as u64 > b.value {
            return Err(ProgramFault::Overlap { other: a.name.clone() }.of(&b.name));
        }
    }
    // Decoded only now: what does not overlap is no larger than the file.
    let decode = |code: &[u8]| code.as_chunks::<8>().0.iter().map(|&b| Insn::decode(b)).collect();
    Ok(found
        .into_iter()
        .map(|(section, symbol, code)| Function {
            name: &symbol.name,
            section,
            start: usize::try_from(symbol.value / INSN_BYTES).expect("inside the section"),
            insns: decode(code),
            local: symbol.local,
            hidden: symbol.hidden,
        })
        .collect())
}

fn function_bytes<'a>(section: &Section<'a>, symbol: &Symbol) -> Option<&'a [u8]> {
    let whole = |bytes: u64| bytes.is_multiple_of(INSN_BYTES);
    if symbol.size_bytes == 0 || !whole(symbol.size_bytes) || !whole(symbol.value) {
        return None;
    }
    let start = usize::try_from(symbol.value).ok()?;
    let end = start.checked_add(usize::try_from(symbol.size_bytes).ok()?)?;
    section.data.get(start..end)
}

/// Functions that are no programs; `-ffunction-sections` makes `.text.name` of them.
pub(super) fn is_text(section: &str) -> bool {
    section == ".text" || section.starts_with(".text.")
}
