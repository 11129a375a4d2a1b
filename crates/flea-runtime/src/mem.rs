//! Two views of memory that let the rest of this crate be safe Rust: [`Shared`], which
//! others may change at any time, and [`Bytes`], which a caller hands in to be read.
//!
//! **Invariant**: an offset read from shared memory is worth nothing until [`Shared`] has
//! checked it. Every access is an atomic word within the bounds given at construction, so
//! scribbled memory yields wrong answers and never a stray access.

use core::marker::PhantomData;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// Memory that other threads and processes read and write meanwhile.
#[derive(Clone, Copy)]
pub struct Shared<'a> {
    base: *mut u8,
    size_bytes: u64,
    memory: PhantomData<&'a AtomicU64>,
}

// SAFETY: all access goes through atomics; `new`'s contract holds for every thread.
unsafe impl Send for Shared<'_> {}
// SAFETY: as for `Send`.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    /// # Safety
    /// `base` is aligned to 8, and `size_bytes` from it stay mapped, readable and writable,
    /// for `'a`. No Rust reference other than to atomics points there.
    #[must_use]
    pub const unsafe fn new(base: *mut u8, size_bytes: u64) -> Self {
        Self { base, size_bytes, memory: PhantomData }
    }

    /// How many bytes there are.
    #[must_use]
    pub const fn size_bytes(self) -> u64 {
        self.size_bytes
    }

    /// The address of `offset`, whether or not it is inside.
    #[must_use]
    pub fn address(self, offset: u64) -> u64 {
        (self.base as u64).wrapping_add(offset)
    }

    /// The offset of `address`, if it is inside.
    #[must_use]
    pub fn offset_of(self, address: u64) -> Option<u64> {
        let offset = address.wrapping_sub(self.base as u64);
        (offset < self.size_bytes).then_some(offset)
    }

    /// The part of `size_bytes` at `offset`, a multiple of 8.
    #[must_use]
    pub fn part(self, offset: u64, size_bytes: u64) -> Option<Self> {
        let base = self.check(offset, size_bytes, 8)?;
        Some(Self { base, size_bytes, memory: PhantomData })
    }

    /// The aligned u64 at `offset`.
    #[must_use]
    pub fn word(self, offset: u64) -> Option<&'a AtomicU64> {
        let at = self.check(offset, 8, 8)?;
        // SAFETY: `check` has shown it inside and aligned; `new` promised the rest.
        Some(unsafe { AtomicU64::from_ptr(at.cast()) })
    }

    /// The aligned u32 at `offset`.
    #[must_use]
    pub fn half(self, offset: u64) -> Option<&'a AtomicU32> {
        let at = self.check(offset, 4, 4)?;
        // SAFETY: `check` has shown it inside and aligned; `new` promised the rest.
        Some(unsafe { AtomicU32::from_ptr(at.cast()) })
    }

    /// Writes `bytes` at `offset`, a multiple of 8, word by word; the last word is filled up
    /// with zeros. Objects in shared memory are padded to whole words.
    pub fn store(self, offset: u64, bytes: Bytes<'_>) -> Option<()> {
        let to = self.part(offset, round_up_8(bytes.len()))?;
        let mut at = 0;
        while at < bytes.len() {
            to.word(at)?.store(bytes.word(at), Relaxed);
            at += 8;
        }
        Some(())
    }

    /// As [`Shared::store`], but for the 4 bytes at `hole`, which stay as they are.
    pub fn store_around(self, offset: u64, bytes: Bytes<'_>, hole: Option<u32>) -> Option<()> {
        let Some(hole) = hole else { return self.store(offset, bytes) };
        let hole = u64::from(hole);
        let to = self.part(offset, round_up_8(bytes.len()))?;
        let mut at = 0;
        while at < bytes.len() {
            let word = bytes.word(at);
            match hole.wrapping_sub(at) {
                0 => to.half(at + 4)?.store(low_half(word >> 32), Relaxed),
                4 => to.half(at)?.store(low_half(word), Relaxed),
                _ => to.word(at)?.store(word, Relaxed),
            }
            at += 8;
        }
        Some(())
    }

    /// Reads `out.len()` bytes at `offset`, a multiple of 8, word by word.
    pub fn load(self, offset: u64, out: &mut [u8]) -> Option<()> {
        let from = self.part(offset, round_up_8(out.len() as u64))?;
        let mut at = 0;
        for chunk in out.chunks_mut(8) {
            let word = from.word(at)?.load(Relaxed).to_le_bytes();
            for (to, byte) in chunk.iter_mut().zip(word) {
                *to = byte;
            }
            at += 8;
        }
        Some(())
    }

    /// Clears `size_bytes`, rounded up to 8, at `offset`, a multiple of 8.
    pub fn zero(self, offset: u64, size_bytes: u64) -> Option<()> {
        let to = self.part(offset, round_up_8(size_bytes))?;
        let mut at = 0;
        while at < to.size_bytes {
            to.word(at)?.store(0, Relaxed);
            at += 8;
        }
        Some(())
    }

    /// Whether the words at `offset`, as [`Shared::store`] writes them, are `bytes`.
    #[must_use]
    pub fn equals(self, offset: u64, bytes: Bytes<'_>) -> bool {
        let Some(from) = self.part(offset, round_up_8(bytes.len())) else { return false };
        let mut at = 0;
        while at < bytes.len() {
            match from.word(at) {
                Some(word) if word.load(Relaxed) == bytes.word(at) => at += 8,
                _ => return false,
            }
        }
        true
    }

    fn check(self, offset: u64, size_bytes: u64, align: u64) -> Option<*mut u8> {
        let end = offset.checked_add(size_bytes)?;
        if end > self.size_bytes || offset & (align - 1) != 0 {
            return None;
        }
        // SAFETY: `offset` is inside the allocation that `new` was promised.
        Some(unsafe { self.base.add(to_usize(offset)) })
    }
}

/// Bytes to read: a key, a value, a format. A program's pointer may lead into a map that
/// others write meanwhile, so this is no `&[u8]`.
#[derive(Clone, Copy)]
pub struct Bytes<'a> {
    base: *const u8,
    len: u64,
    memory: PhantomData<&'a u8>,
}

impl<'a> Bytes<'a> {
    /// # Safety
    /// `len` bytes at `base` are readable for `'a`.
    #[must_use]
    pub const unsafe fn new(base: *const u8, len: u64) -> Self {
        Self { base, len, memory: PhantomData }
    }

    /// How many.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The byte at `at`.
    #[must_use]
    pub fn byte(self, at: u64) -> Option<u8> {
        if at >= self.len {
            return None;
        }
        // SAFETY: inside what `new` was promised.
        let from = unsafe { self.base.add(to_usize(at)) };
        // SAFETY: as above; volatile, as the byte may change meanwhile.
        Some(unsafe { from.read_volatile() })
    }

    /// The eight bytes at `at`, first byte lowest; those past the end are 0.
    #[must_use]
    pub fn word(self, at: u64) -> u64 {
        if self.len >= 8 && at <= self.len - 8 {
            // SAFETY: at + 8 <= len, inside what `new` was promised.
            let from = unsafe { self.base.add(to_usize(at)) };
            // SAFETY: as above; a program's pointers need not be aligned.
            return unsafe { from.cast::<u64>().read_unaligned() };
        }
        let mut word = 0;
        let mut i = 0;
        while i < 8 {
            if let Some(byte) = self.byte(at.wrapping_add(i)) {
                word |= u64::from(byte) << (8 * i);
            }
            i += 1;
        }
        word
    }
}

impl<'a> From<&'a [u8]> for Bytes<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self { base: bytes.as_ptr(), len: bytes.len() as u64, memory: PhantomData }
    }
}

/// `n` rounded up to a multiple of 8, or the largest one: no memory is that large.
#[must_use]
pub const fn round_up_8(n: u64) -> u64 {
    n.saturating_add(7) & !7
}

/// The same number: this crate is for 64-bit machines alone.
#[must_use]
#[allow(clippy::cast_possible_truncation, reason = "usize has 64 bits, asserted below")]
pub const fn to_usize(n: u64) -> usize {
    n as usize
}

/// The low 32 bits.
#[must_use]
#[allow(clippy::cast_possible_truncation, reason = "that is what it is for")]
pub const fn low_half(n: u64) -> u32 {
    n as u32
}

const _: () = assert!(size_of::<usize>() == 8);
