//! The file's bytes by the addresses that they are loaded at. All reading of tables goes
//! through here: a range that is not in the file is an error, never a panic.

use flea_symbols::addr::Svma;

use crate::error::ParseError;

/// What the kernel protects as a whole.
pub(crate) const PAGE: u64 = 4096;
const EHDR_BYTES: usize = 64;
const PHDR_BYTES: usize = 56;
/// More than any linker makes.
const MAX_PROGRAM_HEADERS: usize = 256;

pub(crate) const PT_LOAD: u32 = 1;
pub(crate) const PT_DYNAMIC: u32 = 2;
pub(crate) const PT_TLS: u32 = 7;
pub(crate) const PT_GNU_STACK: u32 = 0x6474_e551;
pub(crate) const PT_GNU_RELRO: u32 = 0x6474_e552;
pub(crate) const PF_X: u32 = 1;
pub(crate) const PF_W: u32 = 2;
pub(crate) const PF_R: u32 = 4;

/// One program header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProgramHeader {
    pub(crate) kind: u32,
    pub(crate) flags: u32,
    pub(crate) offset: u64,
    pub(crate) address: u64,
    pub(crate) file_size_bytes: u64,
    pub(crate) size_bytes: u64,
}

impl ProgramHeader {
    /// One past its last byte in memory.
    pub(crate) fn end(&self) -> Option<u64> {
        self.address.checked_add(self.size_bytes)
    }
}

/// A shared object's bytes and program headers.
#[derive(Clone, Debug)]
pub(crate) struct File<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) headers: Vec<ProgramHeader>,
}

impl<'a> File<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, ParseError> {
        if !bytes.starts_with(b"\x7fELF") {
            return Err(ParseError::NotElf);
        }
        let header = bytes.get(..EHDR_BYTES).ok_or(damaged("it ends within the ELF header"))?;
        let found = match (header[4], header[5], read_u16(header, 18), read_u16(header, 16)) {
            (1, ..) => Some("a 32-bit ELF file"),
            (2, 1, Some(62), Some(3)) => None,
            (2, 1, Some(62), Some(1)) => Some("an object file that was not linked"),
            (2, 1, Some(62), Some(2)) => Some("an executable"),
            (2, 1, Some(62), Some(4)) => Some("a core dump"),
            _ => Some("an ELF file for another machine"),
        };
        if let Some(found) = found {
            return Err(ParseError::NotSharedObject { found });
        }
        let entry_bytes = read_u16(header, 54).map(usize::from);
        let n = read_u16(header, 56).map_or(0, usize::from);
        if entry_bytes != Some(PHDR_BYTES) || n > MAX_PROGRAM_HEADERS {
            return Err(damaged("its program headers have an unknown size"));
        }
        let table = read_u64(header, 32)
            .and_then(|at| slice(bytes, at, (n * PHDR_BYTES) as u64))
            .ok_or(damaged("its program headers are outside the file"))?;
        let headers: Option<Vec<_>> = table.chunks_exact(PHDR_BYTES).map(program_header).collect();
        let headers = headers.ok_or(damaged("its program headers are cut short"))?;
        Ok(Self { bytes, headers })
    }

    /// Program headers of a kind.
    pub(crate) fn of_kind(&self, kind: u32) -> impl Iterator<Item = &ProgramHeader> + '_ {
        self.headers.iter().filter(move |header| header.kind == kind)
    }

    /// The file's bytes from `address` to the end of its segment's file part.
    pub(crate) fn bytes_from(&self, address: u64) -> Option<&'a [u8]> {
        self.of_kind(PT_LOAD).find_map(|segment| {
            let into = address.checked_sub(segment.address)?;
            let left = segment.file_size_bytes.checked_sub(into).filter(|left| *left > 0)?;
            slice(self.bytes, segment.offset.checked_add(into)?, left)
        })
    }

    /// `size_bytes` bytes at `address`.
    pub(crate) fn at(&self, address: Svma, size_bytes: u64) -> Option<&'a [u8]> {
        self.bytes_from(address.0)?.get(..usize::try_from(size_bytes).ok()?)
    }
}

fn program_header(bytes: &[u8]) -> Option<ProgramHeader> {
    Some(ProgramHeader {
        kind: read_u32(bytes, 0)?,
        flags: read_u32(bytes, 4)?,
        offset: read_u64(bytes, 8)?,
        address: read_u64(bytes, 16)?,
        file_size_bytes: read_u64(bytes, 32)?,
        size_bytes: read_u64(bytes, 40)?,
    })
}

pub(crate) fn damaged(what: &'static str) -> ParseError {
    ParseError::Damaged { what }
}

/// A part of the file.
pub(crate) fn slice(bytes: &[u8], offset: u64, len: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    bytes.get(start..start.checked_add(usize::try_from(len).ok()?)?)
}

pub(crate) fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|chunk| u16::from_le_bytes(*chunk))
}

pub(crate) fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|chunk| u32::from_le_bytes(*chunk))
}

pub(crate) fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|chunk| u64::from_le_bytes(*chunk))
}
