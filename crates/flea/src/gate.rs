//! Finds where the target's dynamic loader says what it is about to do: see [`flea_patch::Gate`].

use flea_patch::Gate;
use flea_process::{Mapping, Memory, Pid};
use flea_symbols::addr::RemoteAddr;

use crate::error::RemoteError;

/// Words of a program header, and which is where in it.
const PHDR_WORDS: usize = 7;
const P_VADDR_WORD: usize = 2;
const P_MEMSZ_WORD: usize = 5;
const PT_DYNAMIC: u64 = 2;
const PT_PHDR: u64 = 6;
/// No linker makes as many.
const MAX_PHDRS: usize = 64;
/// Words of an entry of the dynamic section: a tag and another.
const DYN_WORDS: usize = 2;
const DT_NULL: u64 = 0;
const DT_DEBUG: u64 = 21;
const MAX_DYN: usize = 512;
/// `r_brk` in `struct r_debug` (<link.h>).
const R_BRK_OFFSET: i64 = 16;

/// None where there is no loader, or where what the process says of it cannot be: it is read from
/// memory that the process may write to.
pub(crate) fn find(pid: Pid, memory: &Memory) -> Result<Option<Gate>, RemoteError> {
    let auxv = flea_process::auxv(pid)?;
    let (Some(loader), Some(phdrs)) = (auxv.base, auxv.phdr) else { return Ok(None) };
    let Some(r_debug) = r_debug(memory, phdrs) else { return Ok(None) };
    let Some(&stop) = words(memory, r_debug.offset(R_BRK_OFFSET), 1).first() else {
        return Ok(None);
    };
    let stop = RemoteAddr(stop);
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
    let headers = words(memory, phdrs, MAX_PHDRS * PHDR_WORDS);
    let dynamic = headers.chunks_exact(PHDR_WORDS).find_map(|header| {
        let address = header[P_VADDR_WORD];
        match header[0] & 0xffff_ffff {
            // It comes before all that is loaded.
            PT_PHDR => bias = Some(phdrs.0.wrapping_sub(address)),
            PT_DYNAMIC => return Some((address, header[P_MEMSZ_WORD])),
            _ => {}
        }
        None
    });
    let (address, n_bytes) = dynamic?;
    let start = RemoteAddr(address.wrapping_add(bias?));
    let n_words = usize::try_from(n_bytes / 8).unwrap_or(usize::MAX).min(MAX_DYN * DYN_WORDS);
    let entries = words(memory, start, n_words);
    let entries = entries.chunks_exact(DYN_WORDS).take_while(|entry| entry[0] != DT_NULL);
    let mut debug = entries.filter(|entry| entry[0] == DT_DEBUG);
    debug.next().map(|entry| RemoteAddr(entry[1]))
}

/// The words from `at` on, `n_words` at most, as far as they can be read.
fn words(memory: &Memory, at: RemoteAddr, n_words: usize) -> Vec<u64> {
    let mut bytes = vec![0; n_words * size_of::<u64>()];
    let n_read = memory.read_prefix(at, &mut bytes);
    bytes[..n_read].as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
}
