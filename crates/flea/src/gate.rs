//! Finds where the target's dynamic loader says what it is about to do: see [`flea_patch::Gate`].

use flea_patch::Gate;
use flea_process::{Mapping, Memory, Pid};
use flea_symbols::addr::RemoteAddr;

use crate::error::RemoteError;

/// Bytes of a program header, and what is where in it.
const PHDR_BYTES: i64 = 56;
const P_VADDR_OFFSET: i64 = 16;
const P_MEMSZ_OFFSET: i64 = 40;
const PT_DYNAMIC: u64 = 2;
const PT_PHDR: u64 = 6;
/// No linker makes as many.
const MAX_PHDRS: i64 = 64;
/// Bytes of an entry of the dynamic section: a tag and a word.
const DYN_BYTES: u64 = 16;
const DT_NULL: u64 = 0;
const DT_DEBUG: u64 = 21;
const MAX_DYN: u64 = 512;
/// `r_brk` in `struct r_debug` (<link.h>).
const R_BRK_OFFSET: i64 = 16;

/// None where there is no loader, or where what the process says of it cannot be: it is read from
/// memory that the process may write to.
pub(crate) fn find(pid: Pid, memory: &Memory) -> Result<Option<Gate>, RemoteError> {
    let auxv = flea_process::auxv(pid)?;
    let (Some(loader), Some(phdrs)) = (auxv.base, auxv.phdr) else { return Ok(None) };
    let Some(r_debug) = r_debug(memory, phdrs) else { return Ok(None) };
    let Some(stop) = word(memory, r_debug.offset(R_BRK_OFFSET)).map(RemoteAddr) else {
        return Ok(None);
    };
    let maps = flea_process::maps(pid)?;
    Ok(is_code_of(&maps, loader, stop).then_some(Gate { stop, r_debug }))
}

/// Whether the file that is mapped at `base` has code at `at`.
fn is_code_of(maps: &[Mapping], base: RemoteAddr, at: RemoteAddr) -> bool {
    let around = |at| maps.iter().find(|mapping: &&Mapping| mapping.contains(at));
    let (Some(file), Some(code)) = (around(base), around(at)) else { return false };
    code.perms.execute && file.inode != 0 && (code.dev, code.inode) == (file.dev, file.inode)
}

/// The address that the loader has left in the program's dynamic section.
fn r_debug(memory: &Memory, phdrs: RemoteAddr) -> Option<RemoteAddr> {
    let mut bias = None;
    let dynamic = (0..MAX_PHDRS).find_map(|index| {
        let header = phdrs.offset(index * PHDR_BYTES);
        let address = word(memory, header.offset(P_VADDR_OFFSET))?;
        match word(memory, header)? & 0xffff_ffff {
            // It comes before all that is loaded.
            PT_PHDR => bias = Some(phdrs.0.wrapping_sub(address)),
            PT_DYNAMIC => return Some((address, word(memory, header.offset(P_MEMSZ_OFFSET))?)),
            _ => {}
        }
        None
    });
    let (address, n_bytes) = dynamic?;
    let start = address.wrapping_add(bias?);
    for index in 0..(n_bytes / DYN_BYTES).min(MAX_DYN) {
        let entry = RemoteAddr(start.wrapping_add(index * DYN_BYTES));
        match word(memory, entry)? {
            DT_NULL => return None,
            DT_DEBUG => return word(memory, entry.offset(8)).map(RemoteAddr),
            _ => {}
        }
    }
    None
}

fn word(memory: &Memory, at: RemoteAddr) -> Option<u64> {
    memory.read_u64(at).ok().filter(|_| at.0 != 0)
}
