//! What has been written to the target's text since the window opened, and what was there
//! before: for children that were forked meanwhile, whose copies have some of it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use flea_symbols::addr::RemoteAddr;

use crate::memory::{Memory, MemoryError};

const PAGE_BYTES: usize = 4096;

/// The bytes that were written, by page.
#[derive(Debug, Default)]
pub(crate) struct TextLog {
    pages: BTreeMap<RemoteAddr, Page>,
}

#[derive(Debug)]
struct Page {
    original: Vec<u8>,
    /// One for each byte.
    is_written: Vec<bool>,
}

impl Page {
    fn written(&self) -> impl Iterator<Item = usize> {
        (0..PAGE_BYTES).filter(|&at| self.is_written[at])
    }
}

impl TextLog {
    /// To be called before these bytes are written.
    pub(crate) fn note(
        &mut self,
        memory: &Memory,
        at: RemoteAddr,
        n_bytes: usize,
    ) -> Result<(), MemoryError> {
        for byte in at.0..at.0.saturating_add(n_bytes as u64) {
            let offset = usize::try_from(byte % PAGE_BYTES as u64).unwrap_or(0);
            let start = RemoteAddr(byte - offset as u64);
            let page = match self.pages.entry(start) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    let original = memory.read_vec(start, PAGE_BYTES)?;
                    new.insert(Page { original, is_written: vec![false; PAGE_BYTES] })
                }
            };
            page.is_written[offset] = true;
        }
        Ok(())
    }

    pub(crate) fn clear(&mut self) {
        self.pages.clear();
    }

    /// Gives `copy`, the memory of a forked child, the bytes that `parent` has now, or, where that
    /// has them no more (it has ended, or executed another program), those from before. Not where
    /// it has none that were written: it was forked before the first write, though we hear of
    /// it only now, and perhaps before the memory was there that new bytes lead to.
    pub(crate) fn mirror(&self, parent: &Memory, copy: &Memory) {
        let is_original = |(&start, page): (&RemoteAddr, &Page)| {
            let bytes = copy.read_vec(start, PAGE_BYTES);
            bytes.is_ok_and(|bytes| page.written().all(|at| bytes[at] == page.original[at]))
        };
        if self.pages.iter().all(is_original) {
            return;
        }
        for (&start, page) in &self.pages {
            // A page that it has not mapped (any more) is not executed.
            let Ok(found) = copy.read_vec(start, PAGE_BYTES) else { continue };
            let now = parent.read_vec(start, PAGE_BYTES);
            let wanted = now.as_ref().unwrap_or(&page.original);
            for at in page.written().filter(|&at| wanted[at] != found[at]) {
                let at_byte = RemoteAddr(start.0 + at as u64);
                drop(copy.write(at_byte, &wanted[at..=at]));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn originals_are_kept_by_page() {
        let memory = Memory::open(nix::unistd::gettid().as_raw()).expect("our own");
        let mut page = vec![7u8; 3 * PAGE_BYTES];
        let at = RemoteAddr((page.as_mut_ptr() as u64).next_multiple_of(PAGE_BYTES as u64) + 10);
        let mut log = TextLog::default();
        log.note(&memory, at, 3).expect("it is ours");
        memory.write(at, &[1, 2, 3]).expect("it is ours");
        log.note(&memory, at, 2).expect("noted already");
        let start = RemoteAddr(at.0 - 10);
        let noted = &log.pages[&start];
        assert_eq!(noted.original[10..13], [7, 7, 7]);
        assert_eq!(noted.written().collect::<Vec<_>>(), [10, 11, 12]);
        log.note(&memory, RemoteAddr(start.0 + 4094), 4).expect("over the end");
        assert_eq!(log.pages.len(), 2);
        log.clear();
        assert!(log.pages.is_empty());
    }
}
