//! Reading and writing the target's memory through `/proc/PID/mem`.
//!
//! A write there goes through to text that is mapped `r-x` (the kernel's FOLL_FORCE makes a
//! private copy of the page), so that no page of the target is ever writable and executable.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use flea_symbols::addr::RemoteAddr;

use crate::proc::Tid;

/// Bytes in between that are cheaper to read than a second call is.
const NEAR_BYTES: u64 = 2048;
/// Bounds what one call reads.
const MOST_IN_A_RUN: usize = 64;

/// Why memory of the target could not be read or written. Nothing is half reported: a short
/// transfer is an error that says where it ended.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The address range is not (wholly) mapped.
    #[error("{doing} {size_bytes} bytes at {at} of the process failed at {stopped_at}: {reason}")]
    Unmapped {
        /// "reading" or "writing"
        doing: &'static str,
        /// First byte asked for.
        at: RemoteAddr,
        /// Bytes asked for.
        size_bytes: usize,
        /// First byte that could not be transferred.
        stopped_at: RemoteAddr,
        /// The system's word for it.
        reason: io::Error,
    },
    /// The process has ended or replaced its program.
    #[error("{doing} {size_bytes} bytes at {at}: the process has ended")]
    Gone {
        /// "reading" or "writing"
        doing: &'static str,
        /// First byte asked for.
        at: RemoteAddr,
        /// Bytes asked for.
        size_bytes: usize,
    },
    /// `/proc/TID/mem` could not be opened.
    #[error("opening the memory of thread {tid}: {reason}")]
    Open {
        /// The thread.
        tid: Tid,
        /// The system's word for it.
        reason: io::Error,
    },
}

/// The memory of one process, as long as it runs its present program: after an exec, every
/// access says [`MemoryError::Gone`].
#[derive(Debug)]
pub struct Memory {
    file: File,
}

impl Memory {
    /// Opens the memory that thread `tid` runs in. Any live thread serves; the first one of a
    /// process may have ended before the others.
    pub fn open(tid: Tid) -> Result<Self, MemoryError> {
        File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{tid}/mem"))
            .map(|file| Self { file })
            .map_err(|reason| MemoryError::Open { tid, reason })
    }

    /// Fills `into` from `at`.
    pub fn read(&self, at: RemoteAddr, into: &mut [u8]) -> Result<(), MemoryError> {
        let size_bytes = into.len();
        let done = self.read_part(at, into);
        finish("reading", at, size_bytes, done)
    }

    /// Fills as much of `into` as is mapped without a hole, and says how much.
    pub fn read_prefix(&self, at: RemoteAddr, into: &mut [u8]) -> usize {
        self.read_part(at, into).0
    }

    /// As [`Memory::read_prefix`], but only a hole may end it early: for one who has to know what
    /// is not there.
    pub fn read_to_hole(&self, at: RemoteAddr, into: &mut [u8]) -> Result<usize, MemoryError> {
        let size_bytes = into.len();
        match self.read_part(at, into) {
            (done, Some(reason)) if reason.raw_os_error() == Some(libc::EIO) => Ok(done),
            part => finish("reading", at, size_bytes, part).map(|()| size_bytes),
        }
    }

    /// A vector of `size_bytes` bytes from `at`.
    pub fn read_vec(&self, at: RemoteAddr, size_bytes: usize) -> Result<Vec<u8>, MemoryError> {
        let mut bytes = vec![0; size_bytes];
        self.read(at, &mut bytes)?;
        Ok(bytes)
    }

    /// Each of these addresses' bytes, as many as said. Those close to each other are read
    /// together.
    pub fn read_each(&self, parts: &[(RemoteAddr, usize)]) -> Vec<Result<Vec<u8>, MemoryError>> {
        let mut order: Vec<usize> = (0..parts.len()).collect();
        order.sort_unstable_by_key(|&i| parts[i]);
        let mut found: Vec<_> = parts.iter().map(|_| Ok(Vec::new())).collect();
        let end_of = |i: usize| parts[i].0.0.saturating_add(parts[i].1 as u64);
        let is_near = |&a: &usize, &b: &usize| parts[b].0.0.saturating_sub(end_of(a)) <= NEAR_BYTES;
        for run in order.chunk_by(is_near).flat_map(|run| run.chunks(MOST_IN_A_RUN)) {
            let start = run.first().map_or(RemoteAddr(0), |&i| parts[i].0);
            let end = run.iter().map(|&i| end_of(i)).max().unwrap_or(start.0);
            let mut text = vec![0; usize::try_from(end - start.0).unwrap_or(0)];
            let n_read = self.read_prefix(start, &mut text);
            for &i in run {
                let (at, n_bytes) = parts[i];
                let from = usize::try_from(at.0 - start.0).unwrap_or(usize::MAX);
                found[i] = match text[..n_read].get(from..from.saturating_add(n_bytes)) {
                    Some(bytes) => Ok(bytes.to_vec()),
                    // Behind a hole in between, or in it.
                    None => self.read_vec(at, n_bytes),
                };
            }
        }
        found
    }

    /// A little-endian word at `at`.
    pub fn read_u64(&self, at: RemoteAddr) -> Result<u64, MemoryError> {
        let mut word = [0; 8];
        self.read(at, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    /// Writes all of `bytes` at `at`, whatever the page's permissions.
    pub fn write(&self, at: RemoteAddr, bytes: &[u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        let outcome = loop {
            if done == bytes.len() {
                break (done, None);
            }
            match self.file.write_at(&bytes[done..], at.0.wrapping_add(done as u64)) {
                Ok(0) => break (done, None),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => break (done, Some(e)),
            }
        };
        finish("writing", at, bytes.len(), outcome)
    }

    fn read_part(&self, at: RemoteAddr, into: &mut [u8]) -> (usize, Option<io::Error>) {
        let mut done = 0;
        while done < into.len() {
            match self.file.read_at(&mut into[done..], at.0.wrapping_add(done as u64)) {
                Ok(0) => return (done, None),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return (done, Some(e)),
            }
        }
        (done, None)
    }
}

fn finish(
    doing: &'static str,
    at: RemoteAddr,
    size_bytes: usize,
    (done, reason): (usize, Option<io::Error>),
) -> Result<(), MemoryError> {
    match reason {
        None if done == size_bytes => Ok(()),
        // A file of /proc/PID/mem whose address space has been torn down reads as empty.
        None => Err(MemoryError::Gone { doing, at, size_bytes }),
        Some(reason) => Err(MemoryError::Unmapped {
            doing,
            at,
            size_bytes,
            stopped_at: RemoteAddr(at.0.wrapping_add(done as u64)),
            reason,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_is_read() {
        let memory = Memory::open(nix::unistd::gettid().as_raw()).expect("our own");
        let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
        let at = |offset: usize| RemoteAddr(bytes.as_ptr() as u64 + offset as u64);
        let offsets = [70_000, 5, 90_000, 0, 6, 2, 4_000, 70_001];
        let mut parts: Vec<_> = offsets.iter().map(|&offset| (at(offset), 7)).collect();
        parts.insert(3, (RemoteAddr(16), 4));
        let mut found = memory.read_each(&parts);
        assert!(found.remove(3).is_err(), "nothing is mapped there");
        for (offset, found) in offsets.iter().zip(found) {
            assert_eq!(found.expect("mapped"), bytes[*offset..offset + 7]);
        }
        assert!(memory.read_each(&[]).is_empty());
    }
}
