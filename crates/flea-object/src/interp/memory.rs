//! The interpreter's memory: byte vectors at made-up addresses with gaps between them, and
//! the stack. Little-endian. Every access is checked against one region.

use super::MAX_CALL_FRAMES;
use crate::opcode::STACK_BYTES;

const FRAME_BYTES: usize = STACK_BYTES as usize;
const STACK_BYTES_ALL: usize = FRAME_BYTES * MAX_CALL_FRAMES;
/// Top of the stack; far above every other region.
const STACK_TOP: u64 = 0x7fff_ffff_0000;
/// Where the first region goes: above 32 bits, so that truncated pointers are caught, and above
/// the numbers that vectors have for arguments, which are bad addresses everywhere else.
const FIRST_BASE: u64 = 0x1234_0000_0000;
/// Distance kept between regions: further than an `off` reaches.
const GAP: u64 = 0x1_0000;

/// What may be done with a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Loads only.
    ReadOnly,
    /// Loads, stores and atomics.
    ReadWrite,
}

/// An access that is not inside one region, or writes a read-only one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} of {size_bytes} bytes at {address:#x} is not in the program's memory")]
pub struct BadAccess {
    /// First byte.
    pub address: u64,
    /// Bytes.
    pub size_bytes: u64,
    /// `load` or `store`.
    pub kind: &'static str,
}

/// All the memory that a program can reach.
#[derive(Clone, Debug)]
pub struct Memory {
    regions: Vec<Region>,
    stack: Vec<u8>,
    n_frames: usize,
    next_base: u64,
}

#[derive(Clone, Debug)]
struct Region {
    base: u64,
    bytes: Vec<u8>,
    protection: Protection,
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

impl Memory {
    /// A stack and nothing else.
    #[must_use]
    pub fn new() -> Self {
        Self {
            regions: Vec::new(),
            stack: vec![0; STACK_BYTES_ALL],
            n_frames: 1,
            next_base: FIRST_BASE,
        }
    }

    /// Adds a region, and returns its address, a multiple of 64 KiB that no region had before.
    pub fn add(&mut self, bytes: Vec<u8>, protection: Protection) -> u64 {
        let base = self.next_base;
        self.next_base += (bytes.len() as u64).next_multiple_of(GAP) + GAP;
        self.regions.push(Region { base, bytes, protection });
        base
    }

    /// Takes the region at `base` out again; its bytes, if there is one.
    pub fn remove(&mut self, base: u64) -> Option<Vec<u8>> {
        let i = self.regions.iter().position(|region| region.base == base)?;
        Some(self.regions.swap_remove(i).bytes)
    }

    /// The bytes of the region at `base`.
    #[must_use]
    pub fn bytes(&self, base: u64) -> Option<&[u8]> {
        self.regions.iter().find(|region| region.base == base).map(|r| r.bytes.as_slice())
    }

    /// `size_bytes` bytes from `address`, which must be in one region.
    ///
    /// # Errors
    /// [`BadAccess`]
    pub fn read(&self, address: u64, size_bytes: u64) -> Result<&[u8], BadAccess> {
        let bad = BadAccess { address, size_bytes, kind: "load" };
        let stack_floor = self.stack_floor();
        if address >= stack_floor {
            return slice(stack_floor, self.stack_bytes(), address, size_bytes).ok_or(bad);
        }
        self.regions.iter().find_map(|r| slice(r.base, &r.bytes, address, size_bytes)).ok_or(bad)
    }

    /// The same to be written.
    ///
    /// # Errors
    /// [`BadAccess`]
    pub fn write(&mut self, address: u64, size_bytes: u64) -> Result<&mut [u8], BadAccess> {
        let bad = BadAccess { address, size_bytes, kind: "store" };
        let stack_floor = self.stack_floor();
        if address >= stack_floor {
            let unused = STACK_BYTES_ALL - self.n_frames * FRAME_BYTES;
            return slice_mut(stack_floor, &mut self.stack[unused..], address, size_bytes)
                .ok_or(bad);
        }
        self.regions
            .iter_mut()
            .filter(|r| r.protection == Protection::ReadWrite)
            .find_map(|r| slice_mut(r.base, &mut r.bytes, address, size_bytes))
            .ok_or(bad)
    }

    /// The number in `size_bytes` (1, 2, 4 or 8) bytes at `address`, zero-extended.
    ///
    /// # Errors
    /// [`BadAccess`]
    pub fn load(&self, address: u64, size_bytes: u32) -> Result<u64, BadAccess> {
        let bytes = self.read(address, u64::from(size_bytes))?;
        let mut value = [0; 8];
        value[..bytes.len()].copy_from_slice(bytes);
        Ok(u64::from_le_bytes(value))
    }

    /// Puts the low `size_bytes` (1, 2, 4 or 8) bytes of `value` at `address`.
    ///
    /// # Errors
    /// [`BadAccess`]
    pub fn store(&mut self, address: u64, size_bytes: u32, value: u64) -> Result<(), BadAccess> {
        let bytes = self.write(address, u64::from(size_bytes))?;
        let n = bytes.len();
        bytes.copy_from_slice(&value.to_le_bytes()[..n]);
        Ok(())
    }

    pub(super) fn stack_top(&self) -> u64 {
        STACK_TOP
    }

    /// One frame, filled.
    pub(super) fn start_stack(&mut self, fill: u8) {
        self.n_frames = 0;
        let _ = self.push_frame(fill);
    }

    /// The new frame's `r10`.
    pub(super) fn push_frame(&mut self, fill: u8) -> u64 {
        let top = self.stack_floor();
        self.n_frames += 1;
        let unused = STACK_BYTES_ALL - self.n_frames * FRAME_BYTES;
        self.stack[unused..unused + FRAME_BYTES].fill(fill);
        top
    }

    pub(super) fn pop_frame(&mut self) {
        self.n_frames -= 1;
    }

    fn stack_floor(&self) -> u64 {
        STACK_TOP - (self.n_frames * FRAME_BYTES) as u64
    }

    fn stack_bytes(&self) -> &[u8] {
        &self.stack[STACK_BYTES_ALL - self.n_frames * FRAME_BYTES..]
    }
}

/// Where `address..address + size_bytes` is in `len` bytes at `base`, if it is.
fn range(base: u64, len: usize, address: u64, size_bytes: u64) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(address.checked_sub(base)?).ok()?;
    let end = start.checked_add(usize::try_from(size_bytes).ok()?)?;
    (start < len && end <= len).then_some(start..end)
}

fn slice(base: u64, bytes: &[u8], address: u64, size_bytes: u64) -> Option<&[u8]> {
    Some(&bytes[range(base, bytes.len(), address, size_bytes)?])
}

fn slice_mut(base: u64, bytes: &mut [u8], address: u64, size_bytes: u64) -> Option<&mut [u8]> {
    let range = range(base, bytes.len(), address, size_bytes)?;
    Some(&mut bytes[range])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_end_where_they_end() {
        let mut memory = Memory::new();
        let a = memory.add(vec![1, 2, 3, 4], Protection::ReadOnly);
        let b = memory.add(vec![0; 8], Protection::ReadWrite);
        assert_eq!(memory.load(a, 4), Ok(0x0403_0201));
        assert!(memory.load(a + 1, 4).is_err());
        assert!(memory.load(a.wrapping_sub(1), 1).is_err());
        assert!(memory.load(u64::MAX, 8).is_err());
        assert!(memory.read(a, u64::MAX).is_err());
        assert!(memory.store(a, 1, 0).is_err());
        memory.store(b + 4, 4, u64::MAX).unwrap();
        assert_eq!(memory.remove(b), Some(vec![0, 0, 0, 0, 255, 255, 255, 255]));
        assert!(memory.load(b, 1).is_err());
    }
}
