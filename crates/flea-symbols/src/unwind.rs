//! `.eh_frame`: which stretches of code are one function, the exception landing pads, and
//! the CFA at each instruction. Knows nothing of instructions.

use gimli::{
    BaseAddresses, CfaRule, CieOrFde, DW_EH_PE_omit, DwEhPe, EhFrame, EndianSlice, LittleEndian,
    Pointer, Reader as _, UnwindContext, UnwindSection as _,
};

use crate::addr::Svma;
use crate::module::Module;

type Bytes<'a> = EndianSlice<'a, LittleEndian>;

/// What `.eh_frame` says, by address.
#[derive(Debug, Default)]
pub(crate) struct UnwindIndex {
    entries: Vec<UnwindEntry>,
    /// Exception landing pads with the function they belong to, by address.
    pub(crate) landing_pads: Vec<LandingPad>,
}

/// One frame description entry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UnwindEntry {
    pub(crate) start: u64,
    pub(crate) end: u64,
    offset: usize,
}

/// Where an exception continues.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LandingPad {
    pub(crate) address: u64,
    pub(crate) function: u64,
}

/// The canonical frame address from `start` on, as register + offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CfaRow {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// `None` where it is an expression.
    pub(crate) cfa: Option<(CfaRegister, i64)>,
}

/// A register that CFA rules name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CfaRegister {
    Rsp,
    Rbp,
    Other,
}

impl UnwindIndex {
    pub(crate) fn read(module: &Module<'_>) -> Self {
        let mut index = Self::default();
        let Some((frame, bases)) = eh_frame(module) else { return index };
        let mut entries = frame.entries(&bases);
        while let Ok(Some(entry)) = entries.next() {
            let CieOrFde::Fde(partial) = entry else { continue };
            let Ok(fde) = partial.parse(EhFrame::cie_from_offset) else { continue };
            if fde.is_empty_range() {
                continue;
            }
            index.entries.push(UnwindEntry {
                start: fde.initial_address(),
                end: fde.end_address(),
                offset: fde.offset(),
            });
            if let Some(Pointer::Direct(lsda)) = fde.lsda() {
                let function = fde.initial_address();
                landing_pads(module, lsda, function, &mut index.landing_pads);
            }
        }
        index.entries.sort_by_key(|entry| entry.start);
        index.landing_pads.sort_by_key(|pad| pad.address);
        index
    }

    /// The entry that covers `address`.
    pub(crate) fn entry_at(&self, address: u64) -> Option<&UnwindEntry> {
        let after = self.entries.partition_point(|entry| entry.start <= address);
        self.entries.get(after.checked_sub(1)?).filter(|entry| address < entry.end)
    }

    /// The first start after `address`.
    pub(crate) fn next_start(&self, address: u64) -> Option<u64> {
        let after = self.entries.partition_point(|entry| entry.start <= address);
        self.entries.get(after).map(|entry| entry.start)
    }

    pub(crate) fn starts(&self) -> impl Iterator<Item = u64> + '_ {
        self.entries.iter().map(|entry| entry.start)
    }
}

/// The CFA rows of the entry that covers `address`.
pub(crate) fn cfa_rows(module: &Module<'_>, address: u64) -> Option<Vec<CfaRow>> {
    let entry = module.unwind().entry_at(address)?;
    let (frame, bases) = eh_frame(module)?;
    let fde = frame.fde_from_offset(&bases, entry.offset.into(), EhFrame::cie_from_offset).ok()?;
    let mut context = UnwindContext::new();
    let mut table = fde.rows(&frame, &bases, &mut context).ok()?;
    let mut rows = Vec::new();
    while let Some(row) = table.next_row().ok()? {
        let cfa = match row.cfa() {
            CfaRule::RegisterAndOffset { register, offset } => {
                let register = match register.0 {
                    7 => CfaRegister::Rsp,
                    6 => CfaRegister::Rbp,
                    _ => CfaRegister::Other,
                };
                Some((register, *offset))
            }
            CfaRule::Expression(_) => None,
        };
        rows.push(CfaRow { start: row.start_address(), end: row.end_address(), cfa });
    }
    Some(rows)
}

trait IsEmptyRange {
    fn is_empty_range(&self) -> bool;
}

impl<R: gimli::Reader> IsEmptyRange for gimli::FrameDescriptionEntry<R> {
    fn is_empty_range(&self) -> bool {
        self.end_address() <= self.initial_address()
    }
}

fn eh_frame<'data>(module: &Module<'data>) -> Option<(EhFrame<Bytes<'data>>, BaseAddresses)> {
    let (address, bytes) = module.section(".eh_frame")?;
    let mut bases = BaseAddresses::default().set_eh_frame(address);
    if let Some((address, _)) = module.section(".text") {
        bases = bases.set_text(address);
    }
    if let Some((address, _)) = module.section(".got") {
        bases = bases.set_got(address);
    }
    let mut frame = EhFrame::new(bytes, LittleEndian);
    frame.set_address_size(8);
    Some((frame, bases))
}

/// The landing pads of one LSDA (Itanium C++ ABI, "exception handling tables"). Damaged
/// tables yield what precedes the damage: the unwinder itself would get no further.
fn landing_pads(module: &Module<'_>, lsda: u64, function: u64, out: &mut Vec<LandingPad>) {
    let Some(bytes) = module.bytes_from(Svma(lsda)) else { return };
    let mut reader = EndianSlice::new(bytes, LittleEndian);
    let at = |reader: &Bytes<'_>| lsda + (bytes.len() - reader.len()) as u64;
    let mut walk = || -> gimli::Result<()> {
        let mut base = function;
        let encoding = DwEhPe(reader.read_u8()?);
        if encoding != DW_EH_PE_omit {
            let here = at(&reader);
            base = read_encoded(&mut reader, encoding, here)?;
        }
        if DwEhPe(reader.read_u8()?) != DW_EH_PE_omit {
            reader.read_uleb128()?;
        }
        let encoding = DwEhPe(reader.read_u8()?);
        let len = usize::try_from(reader.read_uleb128()?).unwrap_or(usize::MAX);
        let mut table = reader.split(len)?;
        while !table.is_empty() {
            read_encoded(&mut table, encoding, 0)?;
            read_encoded(&mut table, encoding, 0)?;
            let pad = read_encoded(&mut table, encoding, 0)?;
            table.read_uleb128()?;
            if pad != 0 {
                out.push(LandingPad { address: base.wrapping_add(pad), function });
            }
        }
        Ok(())
    };
    // An error ends the table; see above.
    let _ = walk();
}

fn read_encoded(reader: &mut Bytes<'_>, encoding: DwEhPe, here: u64) -> gimli::Result<u64> {
    let value = match encoding.0 & 0x0f {
        0x0 | 0x4 | 0xc => reader.read_u64()?,
        0x1 => reader.read_uleb128()?,
        0x2 => u64::from(reader.read_u16()?),
        0x3 => u64::from(reader.read_u32()?),
        0x9 => reader.read_sleb128()?.cast_unsigned(),
        0xa => i64::from(reader.read_i16()?).cast_unsigned(),
        0xb => i64::from(reader.read_i32()?).cast_unsigned(),
        _ => return Err(gimli::Error::UnknownPointerEncoding(encoding)),
    };
    Ok(if encoding.0 & 0x70 == 0x10 { value.wrapping_add(here) } else { value })
}
