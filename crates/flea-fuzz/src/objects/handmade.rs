//! The smallest object with everything in it that an ELF reader looks at, and where its parts
//! are: an fentry program that calls a function in `.text`.
#![allow(clippy::cast_possible_truncation, reason = "numbers of sections, of which there are 8")]

/// Bytes, and the offsets of the headers in them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handmade {
    /// The file.
    pub bytes: Vec<u8>,
    /// The section headers.
    pub section_headers: usize,
    /// The first symbol, which is the null one.
    pub symbols: usize,
    /// The relocation of the call.
    pub relocation: usize,
}

/// Section numbers of the file.
pub mod section {
    /// The called function.
    pub const TEXT: usize = 1;
    /// The program.
    pub const PROGRAM: usize = 2;
    /// Its relocations.
    pub const RELOCATIONS: usize = 3;
    /// The symbols.
    pub const SYMBOLS: usize = 4;
    /// The symbols' names.
    pub const NAMES: usize = 5;
    /// How many there are.
    pub const COUNT: usize = 8;
}

/// Symbol numbers of the file.
pub mod symbol {
    /// The program.
    pub const PROGRAM: usize = 1;
    /// The called function.
    pub const FUNCTION: usize = 2;
}

/// Bytes of a section header.
pub const SECTION_HEADER_BYTES: usize = 64;
/// Bytes of a symbol.
pub const SYMBOL_BYTES: usize = 24;

const PROGBITS: u32 = 1;
const SYMTAB: u32 = 2;
const STRTAB: u32 = 3;
const REL: u32 = 9;
const ALLOC: u64 = 2;
const EXEC: u64 = 4;
/// `STB_GLOBAL`, `STT_FUNC`
const GLOBAL_FUNCTION: u8 = 0x12;
const R_BPF_64_32: u64 = 10;

#[derive(Clone, Copy, Default)]
struct Section<'a> {
    name: &'a str,
    kind: u32,
    flags: u64,
    data: &'a [u8],
    link: usize,
    info: usize,
    entry: usize,
}

/// Where a string begins among others.
fn name(strings: &[u8], wanted: &str) -> u32 {
    let wanted = [wanted.as_bytes(), b"\0"].concat();
    let found = strings.windows(wanted.len()).position(|w| w == wanted);
    found.and_then(|at| u32::try_from(at).ok()).unwrap_or(0)
}

fn put(bytes: &mut Vec<u8>, part: &[u8]) -> usize {
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let at = bytes.len();
    bytes.extend_from_slice(part);
    at
}

fn symbols(names: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; SYMBOL_BYTES];
    for (text, section) in [("prog", section::PROGRAM), ("sqrti", section::TEXT)] {
        bytes.extend(name(names, text).to_le_bytes());
        bytes.extend([GLOBAL_FUNCTION, 0, section as u8, 0]);
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(16u64.to_le_bytes());
    }
    bytes
}

fn header(section_headers: usize) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    for half in [1u16, 247] {
        bytes.extend(half.to_le_bytes());
    }
    bytes.extend(1u32.to_le_bytes());
    for word in [0, 0, section_headers as u64] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(0u32.to_le_bytes());
    for half in [64u16, 0, 0, 64, section::COUNT as u16, section::COUNT as u16 - 1] {
        bytes.extend(half.to_le_bytes());
    }
    bytes
}

fn section_header(s: &Section<'_>, offset: usize, section_names: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(name(section_names, s.name).to_le_bytes());
    bytes.extend(s.kind.to_le_bytes());
    for word in [s.flags, 0, offset as u64, s.data.len() as u64] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend((s.link as u32).to_le_bytes());
    bytes.extend((s.info as u32).to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend((s.entry as u64).to_le_bytes());
    bytes
}

/// The object: `SEC("fentry/f") prog` returns what `sqrti` returns, 42.
#[must_use]
pub fn object() -> Handmade {
    let names = b"\0prog\0sqrti\0";
    let section_names = b"\0.text\0fentry/f\0.relfentry/f\0.symtab\0.strtab\0license\0.shstrtab\0";
    let function = [0xb7, 0, 0, 0, 42, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0];
    let program = [0x85, 0x10, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x95, 0, 0, 0, 0, 0, 0, 0];
    let relocation = ((symbol::FUNCTION as u64) << 32 | R_BPF_64_32).to_le_bytes();
    let relocations = [[0; 8], relocation].concat();
    let symbol_table = symbols(names);
    let part = |name, kind, data| Section { name, kind, data, ..Section::default() };
    let code = |name, data| Section { flags: ALLOC | EXEC, ..part(name, PROGBITS, data) };
    let sections: [Section<'_>; section::COUNT] = [
        Section::default(),
        code(".text", &function),
        code("fentry/f", &program),
        Section {
            link: section::SYMBOLS,
            info: section::PROGRAM,
            entry: 16,
            ..part(".relfentry/f", REL, &relocations)
        },
        Section {
            link: section::NAMES,
            info: 1,
            entry: SYMBOL_BYTES,
            ..part(".symtab", SYMTAB, &symbol_table)
        },
        part(".strtab", STRTAB, names),
        Section { flags: ALLOC, ..part("license", PROGBITS, b"GPL\0") },
        part(".shstrtab", STRTAB, section_names),
    ];
    let mut bytes = vec![0; 64];
    let offsets = sections.map(|s| put(&mut bytes, s.data));
    let headers = sections.iter().zip(offsets);
    let table: Vec<u8> =
        headers.flat_map(|(s, offset)| section_header(s, offset, section_names)).collect();
    let section_headers = put(&mut bytes, &table);
    bytes[..64].copy_from_slice(&header(section_headers));
    Handmade {
        bytes,
        section_headers,
        symbols: offsets[section::SYMBOLS],
        relocation: offsets[section::RELOCATIONS],
    }
}
