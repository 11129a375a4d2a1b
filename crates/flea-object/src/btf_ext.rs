//! `.BTF.ext`: what belongs to instructions rather than types. Source lines, the types of
//! functions, and where the compiler left a CO-RE relocation for the loader.
//!
//! ```text
//!   header | func_info | line_info | core_relo
//!   each:    record size, then per code section: name, count, records
//! ```

use crate::btf::{Btf, BtfError, Reader, part};

const MAGIC: u16 = 0xeb9f;
const VERSION: u8 = 1;
/// Bytes of a header that has a `core_relo` part.
const HEADER_WITH_CORE_BYTES: u32 = 32;
const INSN_BYTES: u32 = 8;

/// All of a section.
#[derive(Clone, Debug, Default)]
pub(crate) struct BtfExt<'a> {
    pub lines: Vec<LineInfo<'a>>,
    pub functions: Vec<FunctionInfo<'a>>,
    pub core_relocations: Vec<CoreRelocation<'a>>,
}

/// The source line of an instruction and those after it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LineInfo<'a> {
    /// Name of the code section.
    pub section: &'a str,
    /// Index into the section's instructions.
    pub insn_idx: usize,
    pub file: &'a str,
    pub line: u32,
    pub text: &'a str,
}

/// The type of the function that begins at an instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FunctionInfo<'a> {
    /// Name of the code section.
    pub section: &'a str,
    /// Index into the section's instructions.
    pub insn_idx: usize,
    /// Of a `Kind::Func`.
    pub type_id: u32,
}

/// An instruction whose constant depends on the target's types.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CoreRelocation<'a> {
    /// Name of the code section.
    pub section: &'a str,
    /// Index into the section's instructions.
    pub insn_idx: usize,
    /// The type it is about.
    pub type_id: u32,
    /// `0:1:2`, the way to a field.
    pub access: &'a str,
    /// `enum bpf_core_relo_kind`
    pub kind: u32,
}

impl<'a> BtfExt<'a> {
    /// Reads a `.BTF.ext` section.
    pub(crate) fn parse(section: &'a [u8], btf: &Btf<'a>) -> Result<Self, BtfError> {
        let mut header = Reader::new(section, "the .BTF.ext header");
        let (magic, version, _flags) = (header.u16()?, header.u8()?, header.u8()?);
        if (magic, version) != (MAGIC, VERSION) {
            return Err(BtfError::BadHeader { magic, version });
        }
        let header_bytes = header.u32()?;
        let (func_offset, func_bytes) = (header.u32()?, header.u32()?);
        let (line_offset, line_bytes) = (header.u32()?, header.u32()?);
        let (core_offset, core_bytes) = if header_bytes >= HEADER_WITH_CORE_BYTES {
            (header.u32()?, header.u32()?)
        } else {
            (0, 0)
        };
        let body = part(section, header_bytes, u32::MAX, "the .BTF.ext header")?;
        let mut ext = Self::default();
        let functions = part(body, func_offset, func_bytes, "func_info")?;
        for_each_record(functions, btf, "func_info", |section, record| {
            let insn_idx = (record.u32()? / INSN_BYTES) as usize;
            let type_id = record.u32()?;
            ext.functions.push(FunctionInfo { section, insn_idx, type_id });
            Ok(())
        })?;
        let lines = part(body, line_offset, line_bytes, "line_info")?;
        for_each_record(lines, btf, "line_info", |section, record| {
            let insn_idx = (record.u32()? / INSN_BYTES) as usize;
            let file = btf.string(record.u32()?)?;
            let text = btf.string(record.u32()?)?.trim();
            let line = record.u32()? >> 10;
            // Line 0 is clang's word for "no place in the source".
            if line > 0 {
                ext.lines.push(LineInfo { section, insn_idx, file, line, text });
            }
            Ok(())
        })?;
        let core = part(body, core_offset, core_bytes, "core_relo")?;
        for_each_record(core, btf, "core_relo", |section, record| {
            let insn_idx = (record.u32()? / INSN_BYTES) as usize;
            let (type_id, access, kind) = (record.u32()?, record.u32()?, record.u32()?);
            btf.get(type_id)?;
            let access = btf.string(access)?;
            ext.core_relocations.push(CoreRelocation { section, insn_idx, type_id, access, kind });
            Ok(())
        })?;
        Ok(ext)
    }
}

/// Calls `each` with the code section's name and the fields of every record.
fn for_each_record<'a>(
    bytes: &'a [u8],
    btf: &Btf<'a>,
    what: &'static str,
    mut each: impl FnMut(&'a str, &mut Reader<'a>) -> Result<(), BtfError>,
) -> Result<(), BtfError> {
    if bytes.is_empty() {
        return Ok(());
    }
    let mut reader = Reader::new(bytes, what);
    let record_bytes = reader.u32()?;
    while !reader.is_empty() {
        let section = btf.string(reader.u32()?)?;
        let n_records = reader.u32()?;
        for _ in 0..n_records {
            // Records may grow at their end; an empty one is cut off, so this loop is
            // bounded by the bytes there are.
            let mut record = Reader::new(reader.take(record_bytes)?, what);
            each(section, &mut record)?;
        }
    }
    Ok(())
}
