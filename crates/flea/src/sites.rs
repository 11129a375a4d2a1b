//! What stands at many sites, in few reads.

use flea_process::MemoryError;
use flea_symbols::addr::RemoteAddr;

use crate::host::Bytes;

const SITE_BYTES: u64 = 5;
/// Sites with less than this between them are read in one go: it takes less than another read.
const MAX_GAP_BYTES: u64 = 4096;
/// What is read at once, at most.
const MAX_RUN_BYTES: u64 = 1 << 20;

/// The five bytes at each of `sites`, in their order. Each by itself where several cannot be
/// read: what lies between two functions need not be mapped.
pub(crate) fn read(memory: &impl Bytes, sites: &[RemoteAddr]) -> Vec<Result<[u8; 5], MemoryError>> {
    let mut order: Vec<usize> = (0..sites.len()).collect();
    order.sort_unstable_by_key(|i| sites[*i]);
    let mut found: Vec<Option<[u8; 5]>> = vec![None; sites.len()];
    let mut rest = order.as_slice();
    while let Some(first) = rest.first().map(|i| sites[*i]) {
        let belong = |pair: &&[usize]| {
            let (one, next) = (sites[pair[0]], sites[pair[1]]);
            next.0 - one.0 < MAX_GAP_BYTES && next.0 - first.0 < MAX_RUN_BYTES
        };
        let n_sites = 1 + rest.windows(2).take_while(belong).count();
        let (run, behind) = rest.split_at(n_sites);
        rest = behind;
        let n_bytes = sites[run[run.len() - 1]].0 - first.0 + SITE_BYTES;
        let n_bytes = usize::try_from(n_bytes).expect("about a megabyte at most");
        let mut bytes = vec![0; n_bytes];
        if memory.read(first, &mut bytes).is_err() {
            continue;
        }
        for &i in run {
            let into = usize::try_from(sites[i].0 - first.0).expect("inside the run");
            found[i] = bytes.get(into..).and_then(|rest| rest.first_chunk().copied());
        }
    }
    let one_by_one = |(site, known): (&RemoteAddr, Option<[u8; 5]>)| match known {
        Some(bytes) => Ok(bytes),
        None => {
            let mut bytes = [0; 5];
            memory.read(*site, &mut bytes).map(|()| bytes)
        }
    };
    sites.iter().zip(found).map(one_by_one).collect()
}

#[cfg(test)]
mod tests {
    use flea_process::Memory;

    use super::*;

    /// In any order, twice the same, and with one in between that is not mapped.
    #[test]
    fn each_site_has_its_own_bytes() {
        let text: Vec<u8> = (0..20_000u32).map(|i| (i % 251) as u8).collect();
        let base = text.as_ptr().expose_provenance() as u64;
        let memory = Memory::open(std::process::id().cast_signed()).unwrap();
        let offsets = [19_995u64, 0, 3, 9000, 4094, 3, 12_000, 8];
        let mut sites: Vec<_> = offsets.iter().map(|at| RemoteAddr(base + at)).collect();
        sites.push(RemoteAddr(16));
        let found = read(&memory, &sites);
        for (at, bytes) in offsets.iter().zip(&found) {
            let at = usize::try_from(*at).unwrap();
            assert_eq!(bytes.as_ref().unwrap(), &text[at..at + 5], "{at}");
        }
        assert!(matches!(found[offsets.len()], Err(MemoryError::Unmapped { .. })));
    }

    #[test]
    fn a_hole_between_two_sites_does_not_matter() {
        let page = 4096usize;
        // SAFETY: fresh memory, which nobody else knows of.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                3 * page,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        let base = at.expose_provenance();
        // SAFETY: the middle of it.
        let unmapped = unsafe { libc::munmap(at.wrapping_byte_add(page), page) };
        assert_eq!(unmapped, 0);
        let sites = [base + page - 5, base + page + 8, base + 2 * page];
        let sites = sites.map(|site| RemoteAddr(site as u64));
        let memory = Memory::open(std::process::id().cast_signed()).unwrap();
        let found = read(&memory, &sites);
        assert_eq!(found.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false, true]);
        for part in [0, 2 * page] {
            // SAFETY: what is left of it.
            let unmapped = unsafe { libc::munmap(at.wrapping_byte_add(part), page) };
            assert_eq!(unmapped, 0);
        }
    }
}
