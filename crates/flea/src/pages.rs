//! Which pages of a process exist at all: most of a stack or an arena never was touched. Reading
//! those that do not would take as long as reading the others, and have the kernel make tables for
//! them.

use std::{fs::File, ops::Range, os::unix::fs::FileExt as _};

use flea_process::{Mapping, Pid};

const PAGE: u64 = 4096;
/// Entries of /proc/PID/pagemap: in memory, or swapped out.
const PAGE_EXISTS: u64 = 0b11 << 62;

/// The tables of one process, where they may be read.
#[derive(Debug)]
pub(crate) struct Pages {
    pagemap: Option<File>,
}

impl Pages {
    pub(crate) fn open(pid: Pid) -> Self {
        Self { pagemap: File::open(format!("/proc/{}/pagemap", flea_process::stand_in(pid))).ok() }
    }

    /// The stretches of `range` that can hold something that was written. Of a shared mapping
    /// all: its pages may be in the file alone.
    pub(crate) fn existing(&self, mapping: &Mapping, range: Range<u64>) -> Vec<Range<u64>> {
        let everything = vec![range.clone()];
        let (false, Some(pagemap)) = (mapping.perms.shared, &self.pagemap) else {
            return everything;
        };
        let n_pages = (range.end - range.start).div_ceil(PAGE);
        let mut entries = vec![0; usize::try_from(n_pages * 8).unwrap_or(0)];
        if pagemap.read_exact_at(&mut entries, range.start / PAGE * 8).is_err() {
            return everything;
        }
        let entries = entries.as_chunks().0.iter().map(|entry| u64::from_le_bytes(*entry));
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (at, entry) in (range.start..).step_by(4096).zip(entries) {
            if entry & PAGE_EXISTS == 0 {
                continue;
            }
            match runs.last_mut() {
                Some(last) if last.end == at => last.end = at + PAGE,
                _ => runs.push(at..at + PAGE),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use flea_process::parse_maps;

    use super::*;

    #[test]
    fn untouched_pages_are_left_out() {
        let len = 64 * 4096;
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        let flags = flags | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, wherever there is room, touches no memory that exists.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        // SAFETY: the kernel may not make large pages of it.
        let advised = unsafe { libc::madvise(base, len, libc::MADV_NOHUGEPAGE) };
        assert!(advised == 0 || advised == -1, "there may be none");
        let start = base.addr() as u64;
        for page in [3, 4, 63] {
            let byte = base.wrapping_byte_add(page * 4096 + 17).cast::<u8>();
            // SAFETY: it is in the mapping.
            unsafe { byte.write_volatile(1) };
        }
        let end = start + len as u64;
        let of = |kind| {
            let maps = parse_maps(&format!("{start:x}-{end:x} rw-{kind} 00000000 00:00 0 \n"));
            let pages = Pages::open(std::process::id().cast_signed());
            let runs = pages.existing(&maps[0], start..end);
            runs.iter().map(|run| (run.start - start) / 4096..(run.end - start) / 4096).collect()
        };
        let (private, shared): (Vec<_>, Vec<_>) = (of('p'), of('s'));
        // SAFETY: the mapping is ours, and nobody uses it any more.
        unsafe { libc::munmap(base, len) };
        assert_eq!(private, [3..5, 63..64]);
        assert_eq!(shared, vec![0..64]);
    }
}
