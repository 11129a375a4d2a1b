//! The unwind information of all exit skeletons: one row.
//!
//! Every exit skeleton keeps `rbp` as frame pointer and never changes it between prologue and
//! `leave`, so an arena full of them needs one FDE, whatever comes and goes in it:
//!
//! ```text
//!   CFA = rbp + 16     return address at CFA - 8     rbp at CFA - 16
//! ```
//!
//! The row is exact where an unwinder can stand: at the return address of `call original`, and
//! for that alone it is given out (`x86_64::find_fde`). In the few instructions before `mov
//! rbp, rsp`, in entry bodies and in relocated copies it is not; only a signal handler could
//! look from there.

//!
//! The row has a personality, [`crate::x86_64::personality`], which notes that an exception
//! leaves the frame.

use flea_symbols::addr::RemoteAddr;

use crate::x86_64::personality;

/// DWARF's numbers of the registers.
pub(crate) const RBP: u8 = 6;
pub(crate) const RETURN_ADDRESS: u8 = 16;

pub(crate) const DW_CFA_DEF_CFA: u8 = 0x0c;
pub(crate) const DW_CFA_OFFSET: u8 = 0x80;
const DW_EH_PE_ABSPTR: u8 = 0x00;

/// Offset of the FDE in what [`frame_arena_rows`] returns: what `_Unwind_Find_FDE` points at.
pub const FDE_OFFSET: usize = 40;

/// Offset of the header in what [`frame_arena_rows`] returns: what `_dl_find_object` points at.
pub const HEADER_OFFSET: usize = 76;

pub(crate) const DW_EH_PE_UDATA4: u8 = 0x03;
pub(crate) const DW_EH_PE_SDATA4: u8 = 0x0b;
pub(crate) const DW_EH_PE_PCREL: u8 = 0x10;
pub(crate) const DW_EH_PE_DATAREL: u8 = 0x30;
const HEADER_BYTES: usize = 20;

/// What an unwinder has to have for an arena: `.eh_frame` bytes, that is a CIE, an FDE at
/// [`FDE_OFFSET`] for the `len_bytes` from `start` on, and a terminating zero word (as
/// `__register_frame` wants it); behind them, at [`HEADER_OFFSET`], what linkers make of these
/// as `.eh_frame_hdr`, and the personality. To be placed at `at`, which is a multiple of 8, in
/// executable memory less than 2 GiB from `start`; the length does not depend on the addresses.
#[must_use]
pub fn frame_arena_rows(at: RemoteAddr, start: RemoteAddr, len_bytes: u64) -> Vec<u8> {
    let personality = at.0 + (HEADER_OFFSET + HEADER_BYTES) as u64;
    let mut out = rows(start, len_bytes, RemoteAddr(personality));
    debug_assert_eq!(out.len(), HEADER_OFFSET);
    out.extend(header(at, start));
    out.extend(personality::code(start, RemoteAddr(start.0.saturating_add(len_bytes))));
    out
}

/// The table of one FDE, for a binary search.
fn header(rows: RemoteAddr, start: RemoteAddr) -> Vec<u8> {
    let offset = |offset: usize| i32::try_from(offset).expect("rows are a few bytes");
    let table_base = rows.0 + HEADER_OFFSET as u64;
    let to_start = start.0.wrapping_sub(table_base).cast_signed();
    let mut out = vec![1]; // version
    out.push(DW_EH_PE_PCREL | DW_EH_PE_SDATA4); // of the address of the rows
    out.push(DW_EH_PE_UDATA4); // of the number of FDEs
    out.push(DW_EH_PE_DATAREL | DW_EH_PE_SDATA4); // of the table
    out.extend((-offset(HEADER_OFFSET + out.len())).to_le_bytes());
    out.extend(1u32.to_le_bytes());
    out.extend(i32::try_from(to_start).expect("rows are placed near their code").to_le_bytes());
    out.extend((offset(FDE_OFFSET) - offset(HEADER_OFFSET)).to_le_bytes());
    debug_assert_eq!(out.len(), HEADER_BYTES);
    out
}

fn rows(start: RemoteAddr, len_bytes: u64, personality: RemoteAddr) -> Vec<u8> {
    let mut cie = vec![0, 0, 0, 0]; // "this is a CIE"
    cie.push(1); // version
    cie.extend(b"zPR\0"); // augmentations: the personality, the encoding of addresses
    cie.push(1); // code alignment factor
    cie.push(0x78); // data alignment factor -8, SLEB128
    cie.push(RETURN_ADDRESS);
    cie.extend([10, DW_EH_PE_ABSPTR]);
    cie.extend(personality.0.to_le_bytes());
    cie.push(DW_EH_PE_ABSPTR);
    cie.extend([DW_CFA_DEF_CFA, RBP, 16]);
    cie.extend([DW_CFA_OFFSET | RETURN_ADDRESS, 1]);
    cie.extend([DW_CFA_OFFSET | RBP, 2]);
    let mut out = Vec::new();
    push_entry(&mut out, cie);
    debug_assert_eq!(out.len(), FDE_OFFSET);

    // The distance from this very field back to the CIE at 0.
    let cie_pointer = u32::try_from(out.len() + 4).expect("the CIE is small");
    let mut fde = cie_pointer.to_le_bytes().to_vec();
    fde.extend(start.0.to_le_bytes());
    fde.extend(len_bytes.to_le_bytes());
    fde.push(0); // no augmentation data
    push_entry(&mut out, fde);
    out.extend([0; 4]);
    out
}

/// Appends an entry's length and body, padded with `DW_CFA_nop` (0) to a multiple of 8.
pub(crate) fn push_entry(out: &mut Vec<u8>, mut body: Vec<u8>) {
    let padded = (body.len() + 4).next_multiple_of(8) - 4;
    body.resize(padded, 0);
    let length = u32::try_from(padded).expect("entries are small");
    out.extend(length.to_le_bytes());
    out.extend(body);
}
