//! Sites before the entry, for functions that have no room behind it.
//!
//! `-fpatchable-function-entry=N,M` leaves M bytes of nops before a function's entry, which
//! nobody executes, and N-M behind it:
//!
//! ```text
//!   area:   nop x M                    area:   nop x (M-5)
//!                                              jmp rel32       the site's five bytes
//!   entry:  [endbr64]                  entry:  [endbr64]
//!           nop nop            ->      door:   jmp rel8        back to those
//!           the function                       the function
//! ```
//!
//! The section `__patchable_function_entries` says where each area begins; other nops before a
//! function may be padding that another site has taken.

use iced_x86::{Decoder, DecoderOptions};

use crate::addr::Svma;
use crate::function::Function;
use crate::module::Module;
use crate::site::{ReferenceKind, Site, SiteKind};
use crate::x86_64::nops::{PATCH_BYTES, is_nop};
use crate::x86_64::site::{no_loop_to_entry, nothing_leads_into, own_jumps_are_known};

/// Bytes of the short jump.
const DOOR_BYTES: usize = 2;
/// An area longer than this is not looked for: the jump back would not reach far beyond.
const MAX_AREA_BYTES: u64 = 64;
const ENTRIES_SECTION: &str = "__patchable_function_entries";

/// The site of `function` whose code behind `endbr64` is `code`, at `door`. `None` where it has
/// none of this kind: then the reason why it has no other counts.
pub(super) fn find(
    module: &Module<'_>,
    function: &Function,
    door: Svma,
    code: &[u8],
) -> Option<Site> {
    let entry = function.address.0;
    let at_door = nops_of(code, DOOR_BYTES)?;
    let n_at_door = at_door.last().map_or(0, |&(start, len)| start + len);
    let address = entry.checked_sub(PATCH_BYTES as u64)?;
    let area = area_before(module, entry).filter(|area| *area <= address)?;
    let before = module.bytes_of(area..entry)?;
    let is_whole = |nops: &[(usize, usize)]| {
        nops.last().is_some_and(|&(start, len)| start + len == PATCH_BYTES)
    };
    nops_of(before, before.len())?;
    let landing = nops_of(&before[before.len() - PATCH_BYTES..], PATCH_BYTES)?;
    if !is_whole(&landing) {
        return None;
    }
    let resume = door.0 + n_at_door as u64;
    for bytes in [address + 1..entry, entry + 1..door.0, door.0 + 1..resume] {
        nothing_leads_into(module, bytes).ok()?;
    }
    own_jumps_are_known(module, function).ok()?;
    no_loop_to_entry(module, function, door).ok()?;
    let to_door = usize::try_from(door.0 - address).ok()?;
    let mut starts: Vec<usize> = landing.iter().map(|&(start, _)| start).collect();
    starts.extend((to_door > PATCH_BYTES).then_some(PATCH_BYTES));
    starts.extend(at_door.iter().map(|&(start, _)| to_door + start));
    Some(Site {
        kind: SiteKind::Nop5,
        function: function.address,
        address: Svma(address),
        door: Some(door),
        original: module.bytes_of(address..resume)?.to_vec(),
        boundaries: starts.into_iter().map(u8::try_from).collect::<Result<_, _>>().ok()?,
    })
}

/// Where the compiler says that the nops before the function at `entry` begin.
fn area_before(module: &Module<'_>, entry: u64) -> Option<u64> {
    let (start, bytes) = module.section(ENTRIES_SECTION)?;
    let section = start..start + bytes.len() as u64;
    let named = module.sweep().references(entry.saturating_sub(MAX_AREA_BYTES), entry);
    let is_entry = |r: &&crate::x86_64::sweep::Reference| {
        r.kind == ReferenceKind::Pointer && section.contains(&r.from)
    };
    named.iter().rfind(is_entry).map(|reference| reference.target)
}

/// The nops at the start of `code` that cover its first `n_bytes`, as (start, length).
fn nops_of(code: &[u8], n_bytes: usize) -> Option<Vec<(usize, usize)>> {
    let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
    let mut nops = Vec::new();
    while decoder.position() < n_bytes {
        let start = decoder.position();
        let instruction = decoder.can_decode().then(|| decoder.decode())?;
        if !is_nop(&instruction) {
            return None;
        }
        nops.push((start, instruction.len()));
    }
    Some(nops)
}
