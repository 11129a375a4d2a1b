//! A file that code arenas can be mapped from, so that a profiler which has nothing but files
//! finds the unwind row of exit skeletons: perf copies stacks, and walks through them later.
//!
//! It is an ELF file with an empty `.text` as large as the largest arena, the one row of
//! [`crate::unwind`] for all of that, and one symbol. Code goes into the private mapping and
//! never reaches the file, so that one file serves all processes. Its first page:
//!
//! ```text
//!      0  ELF header
//!     64  program headers: PT_LOAD of everything, PT_GNU_EH_FRAME
//!    176  .eh_frame_hdr
//!    200  .eh_frame
//!         .symtab, .strtab, .shstrtab, section headers
//!   4096  .text
//! ```
//!
//! The row is exact at the return address of `call original`, as in [`crate::unwind`]. Where
//! code that runs before the original was interrupted, it is not.

use crate::unwind::{
    DW_CFA_DEF_CFA, DW_CFA_OFFSET, DW_EH_PE_DATAREL, DW_EH_PE_PCREL, DW_EH_PE_SDATA4,
    DW_EH_PE_UDATA4, RBP, RETURN_ADDRESS, push_entry,
};

/// Bytes of the file, of which only the first page is not empty: the largest code arena.
pub const FILE_BYTES: u64 = 256 << 20;
/// Bytes at the start that are not for code.
pub const HEAD_BYTES: u64 = 4096;

const TEXT_BYTES: u64 = FILE_BYTES - HEAD_BYTES;
const PROGRAM_HEADERS_AT: u64 = 64;
const EH_FRAME_HDR_AT: u64 = 176;
const EH_FRAME_HDR_BYTES: u64 = 20;
const EH_FRAME_AT: u64 = 200;

/// Numbers of the ELF specification.
const PT_LOAD: u32 = 1;
const PT_GNU_EH_FRAME: u32 = 0x6474_e550;
const PF_X: u32 = 1;
const PF_R: u32 = 4;
const SHT_PROGBITS: u32 = 1;
const SHT_SYMTAB: u32 = 2;
const SHT_STRTAB: u32 = 3;
const SHF_ALLOC: u64 = 2;
const SHF_EXECINSTR: u64 = 4;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
/// A global function.
const STB_GLOBAL_STT_FUNC: u8 = 0x12;

/// Indices in the list of sections.
const TEXT_SECTION: u16 = 3;
const STRTAB_SECTION: u32 = 5;

/// The file's first [`HEAD_BYTES`]; all that follows is zero.
#[must_use]
pub fn head() -> Vec<u8> {
    let rows = Rows::new();
    let mut out = Bytes::default();
    let mut sections = vec![Section::default()];

    out.resize(EH_FRAME_HDR_AT);
    sections.push(out.section(".eh_frame_hdr", SHT_PROGBITS, SHF_ALLOC, &rows.header()));
    out.resize(EH_FRAME_AT);
    sections.push(out.section(".eh_frame", SHT_PROGBITS, SHF_ALLOC, &rows.bytes));
    sections.push(Section {
        name: ".text",
        kind: SHT_PROGBITS,
        flags: SHF_ALLOC | SHF_EXECINSTR,
        at: HEAD_BYTES,
        bytes: TEXT_BYTES,
        ..Section::default()
    });
    let symbols = out.section(".symtab", SHT_SYMTAB, 0, &symbols());
    sections.push(Section { link: STRTAB_SECTION, first_global: 1, entry_bytes: 24, ..symbols });
    sections.push(out.section(".strtab", SHT_STRTAB, 0, b"\0flea\0"));
    let mut names = b"\0".to_vec();
    let mut name_of: Vec<u32> = sections.iter().map(|s| push_name(&mut names, s.name)).collect();
    name_of.push(push_name(&mut names, ".shstrtab"));
    sections.push(out.section(".shstrtab", SHT_STRTAB, 0, &names));

    out.align();
    let section_headers_at = out.len();
    for (section, name) in sections.iter().zip(name_of) {
        section.push_header(&mut out, name);
    }
    out.overwrite_start(&file_headers(section_headers_at, sections.len()));
    assert!(out.len() <= HEAD_BYTES, "a few hundred bytes");
    out.resize(HEAD_BYTES);
    out.0
}

/// `.eh_frame`.
struct Rows {
    bytes: Vec<u8>,
    fde_at: u64,
}

impl Rows {
    fn new() -> Self {
        let mut cie = vec![0, 0, 0, 0]; // "this is a CIE"
        cie.push(1); // version
        cie.extend(b"zR\0"); // augmentation: the encoding of addresses
        cie.push(1); // code alignment factor
        cie.push(0x78); // data alignment factor -8, SLEB128
        cie.push(RETURN_ADDRESS);
        cie.extend([1, DW_EH_PE_PCREL | DW_EH_PE_SDATA4]);
        cie.extend([DW_CFA_DEF_CFA, RBP, 16]);
        cie.extend([DW_CFA_OFFSET | RETURN_ADDRESS, 1]);
        cie.extend([DW_CFA_OFFSET | RBP, 2]);
        let mut bytes = Vec::new();
        push_entry(&mut bytes, cie);

        let fde_at = EH_FRAME_AT + bytes.len() as u64;
        let cie_pointer = u32::try_from(bytes.len() + 4).expect("the CIE is small");
        let mut fde = cie_pointer.to_le_bytes().to_vec();
        fde.extend(distance(fde_at + 8, HEAD_BYTES));
        fde.extend(u32::try_from(TEXT_BYTES).expect("it is below 4 GiB").to_le_bytes());
        fde.push(0); // no augmentation data
        push_entry(&mut bytes, fde);
        bytes.extend([0; 4]);
        Self { bytes, fde_at }
    }

    /// `.eh_frame_hdr`: a table of one FDE.
    fn header(&self) -> Vec<u8> {
        let here = EH_FRAME_HDR_AT;
        let mut out = vec![1]; // version
        out.push(DW_EH_PE_PCREL | DW_EH_PE_SDATA4); // of the address of the rows
        out.push(DW_EH_PE_UDATA4); // of the number of FDEs
        out.push(DW_EH_PE_DATAREL | DW_EH_PE_SDATA4); // of the table
        out.extend(distance(here + 4, EH_FRAME_AT));
        out.extend(1u32.to_le_bytes());
        out.extend(distance(here, HEAD_BYTES));
        out.extend(distance(here, self.fde_at));
        out
    }
}

fn distance(from: u64, to: u64) -> [u8; 4] {
    let bytes = to.wrapping_sub(from).cast_signed();
    i32::try_from(bytes).expect("both are in the first page or at its end").to_le_bytes()
}

/// The undefined symbol, and `flea` for all of the text.
fn symbols() -> Vec<u8> {
    let mut out = vec![0; 24];
    out.extend(1u32.to_le_bytes()); // name
    out.extend([STB_GLOBAL_STT_FUNC, 0]);
    out.extend(TEXT_SECTION.to_le_bytes());
    out.extend([HEAD_BYTES, TEXT_BYTES].map(u64::to_le_bytes).concat());
    out
}

/// Appends a name, and returns where; the empty one is at 0.
fn push_name(names: &mut Vec<u8>, name: &str) -> u32 {
    if name.is_empty() {
        return 0;
    }
    let at = u32::try_from(names.len()).expect("a handful of names");
    names.extend(name.bytes().chain([0]));
    at
}

/// The ELF header and the program headers.
fn file_headers(section_headers_at: u64, n_sections: usize) -> Vec<u8> {
    let n_sections = u16::try_from(n_sections).expect("a handful of sections");
    let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    out.extend([ET_DYN, EM_X86_64].map(u16::to_le_bytes).concat());
    out.extend(1u32.to_le_bytes()); // version
    out.extend([0, PROGRAM_HEADERS_AT, section_headers_at].map(u64::to_le_bytes).concat());
    out.extend(0u32.to_le_bytes()); // flags
    out.extend([64, 56, 2, 64, n_sections, n_sections - 1].map(u16::to_le_bytes).concat());
    let mut segment = |kind: u32, flags: u32, at: u64, bytes: u64, align: u64| {
        out.extend([kind, flags].map(u32::to_le_bytes).concat());
        out.extend([at, at, at, bytes, bytes, align].map(u64::to_le_bytes).concat());
    };
    segment(PT_LOAD, PF_R | PF_X, 0, FILE_BYTES, HEAD_BYTES);
    segment(PT_GNU_EH_FRAME, PF_R, EH_FRAME_HDR_AT, EH_FRAME_HDR_BYTES, 4);
    out
}

/// A section header.
#[derive(Default)]
struct Section {
    name: &'static str,
    kind: u32,
    flags: u64,
    at: u64,
    bytes: u64,
    link: u32,
    first_global: u32,
    entry_bytes: u64,
}

impl Section {
    fn push_header(&self, out: &mut Bytes, name: u32) {
        let address = if self.flags & SHF_ALLOC != 0 { self.at } else { 0 };
        out.0.extend([name, self.kind].map(u32::to_le_bytes).concat());
        out.0.extend([self.flags, address, self.at, self.bytes].map(u64::to_le_bytes).concat());
        out.0.extend([self.link, self.first_global].map(u32::to_le_bytes).concat());
        out.0.extend([8, self.entry_bytes].map(u64::to_le_bytes).concat());
    }
}

/// The file so far.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn resize(&mut self, len: u64) {
        self.0.resize(usize::try_from(len).expect("a page"), 0);
    }

    fn align(&mut self) {
        self.resize(self.len().next_multiple_of(8));
    }

    fn overwrite_start(&mut self, bytes: &[u8]) {
        self.0[..bytes.len()].copy_from_slice(bytes);
    }

    /// Appends `bytes` as a section.
    fn section(&mut self, name: &'static str, kind: u32, flags: u64, bytes: &[u8]) -> Section {
        self.align();
        let at = self.len();
        self.0.extend(bytes);
        Section { name, kind, flags, at, bytes: bytes.len() as u64, ..Section::default() }
    }
}
