//! A target in this very process: thread table, arena and blob mapped as a target has them.
#![allow(dead_code, reason = "each test file uses its part")]

use std::os::fd::AsRawFd;

use flea_layout::plan::ArenaPlan;
use flea_layout::shared::{RuntimeFn, THREAD_TABLE_BYTES};
use flea_maps::Arena;
use flea_object::spec::{MapKind, MapSpec};
use flea_runtime::{BLOB, offset_of};

pub type Entry = extern "C" fn(u64, u64, u64, u64, u64, u64) -> u64;

pub struct Target {
    pub arena: Arena,
    /// Where the target sees the arena.
    pub base: u64,
    code: u64,
}

// SAFETY: the blob's functions may be called from any thread.
unsafe impl Sync for Target {}
// SAFETY: as above.
unsafe impl Send for Target {}

pub fn spec(kind: MapKind, key: u32, value: u32, max_entries: u32) -> MapSpec {
    MapSpec {
        name: format!("{kind:?}"),
        kind,
        key_size_bytes: key,
        value_size_bytes: value,
        max_entries,
        flags: 0,
        init: None,
        read_only: false,
        ..MapSpec::default()
    }
}

impl Target {
    pub fn new(maps: &[MapSpec]) -> Self {
        let plan = ArenaPlan::new(maps, 2);
        Self::with(Arena::create(&plan, maps).unwrap())
    }

    pub fn with(arena: Arena) -> Self {
        let size = usize::try_from(arena.plan().size_bytes).unwrap();
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let null = std::ptr::null_mut();
        let all = THREAD_TABLE_BYTES + size;
        // SAFETY: a new mapping.
        let table = unsafe { libc::mmap(null, all, rw, private, -1, 0) };
        assert_ne!(table, libc::MAP_FAILED);
        // SAFETY: our own mapping.
        let wiped = unsafe { libc::madvise(table, THREAD_TABLE_BYTES, libc::MADV_WIPEONFORK) };
        assert_eq!(wiped, 0);
        let shared = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: inside the mapping above.
        let at = unsafe { table.byte_add(THREAD_TABLE_BYTES) };
        let fd = arena.fd().as_raw_fd();
        // SAFETY: replaces our own mapping.
        let base = unsafe { libc::mmap(at, size, rw, shared, fd, 0) };
        assert_eq!(base, at);
        // SAFETY: a new mapping.
        let code = unsafe { libc::mmap(null, BLOB.len(), rw, private, -1, 0) };
        assert_ne!(code, libc::MAP_FAILED);
        // SAFETY: as long as the blob, just mapped.
        unsafe { std::ptr::copy_nonoverlapping(BLOB.as_ptr(), code.cast(), BLOB.len()) };
        let rx = libc::PROT_READ | libc::PROT_EXEC;
        // SAFETY: our own mapping.
        assert_eq!(unsafe { libc::mprotect(code, BLOB.len(), rx) }, 0);
        Self { arena, base: base as u64, code: code as u64 }
    }

    pub fn address_of(&self, function: RuntimeFn) -> u64 {
        self.code + u64::from(offset_of(function))
    }

    pub fn call(&self, function: RuntimeFn, args: &[u64]) -> u64 {
        let mut a = [0u64; 6];
        a[..args.len()].copy_from_slice(args);
        // SAFETY: the blob's entries have this shape.
        let entry = unsafe { std::mem::transmute::<u64, Entry>(self.address_of(function)) };
        entry(a[0], a[1], a[2], a[3], a[4], a[5])
    }

    pub fn map(&self, index: usize) -> u64 {
        self.base + self.arena.plan().maps[index].header_offset
    }

    pub fn slot(&self) -> u64 {
        self.call(RuntimeFn::ThreadSlot, &[self.base])
    }

    pub fn lookup(&self, map: usize, key: &[u8], slot: u64) -> u64 {
        self.call(RuntimeFn::HashLookup, &[self.base, self.map(map), key.as_ptr() as u64, slot])
    }

    pub fn update(&self, map: usize, key: &[u8], value: &[u8], flags: u64, slot: u64) -> i64 {
        let (key, value) = (key.as_ptr() as u64, value.as_ptr() as u64);
        let args = [self.base, self.map(map), key, value, flags, slot];
        self.call(RuntimeFn::MapUpdate, &args).cast_signed()
    }

    pub fn delete(&self, map: usize, key: &[u8]) -> i64 {
        let args = [self.base, self.map(map), key.as_ptr() as u64];
        self.call(RuntimeFn::MapDelete, &args).cast_signed()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let table = self.base - THREAD_TABLE_BYTES as u64;
        let size = usize::try_from(self.arena.plan().size_bytes).unwrap() + THREAD_TABLE_BYTES;
        // SAFETY: mapped by `with`, and nobody uses it any more.
        unsafe { libc::munmap(table as *mut libc::c_void, size) };
        // SAFETY: as above.
        unsafe { libc::munmap(self.code as *mut libc::c_void, BLOB.len()) };
    }
}

/// Adds `n` to the u64 at `address`, as a compiled program does: no lock.
pub fn add(address: u64, n: u64) {
    let at = address as *mut u64;
    // SAFETY: the address of a value, from the runtime.
    let before = unsafe { at.read_volatile() };
    // SAFETY: as above.
    unsafe { at.write_volatile(before.wrapping_add(n)) };
}

pub fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().unwrap())
}

/// xorshift64*, for tests that must not share a generator.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}
