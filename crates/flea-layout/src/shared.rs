//! Structures in memory that the target's code, the runtime and the controller all touch.
//! Plain `core`, no dependency: `flea-runtime`'s blob includes this very file.
//!
//! ```text
//!   thread table   64 KiB, private to the process, MADV_WIPEONFORK: a forked child starts
//!                  with an empty one and so takes slots of its own
//!   -------------- arena base: everything from here on is one memfd, shared ---------------
//!   ArenaHeader    one page
//!   MapHeader[n]
//!   slots          n_slots x slot_stride: one per thread, see SlotHeader
//!   map data       arrays, hash tables, ring buffers; each starts on a page
//! ```
//! Everything in it is untrusted input to the controller: the target can write it.

use core::sync::atomic::{AtomicU32, AtomicU64};

/// First word of an [`ArenaHeader`]: "fleaarna".
pub const ARENA_MAGIC: u64 = u64::from_le_bytes(*b"fleaarna");

/// Entries of the thread table.
pub const THREAD_TABLE_ENTRIES: usize = 4096;
/// Bytes of the thread table, which ends where the arena begins.
pub const THREAD_TABLE_BYTES: usize = THREAD_TABLE_ENTRIES * 16;
/// A thread's home entry is `(thread_pointer >> THREAD_TABLE_SHIFT) % THREAD_TABLE_ENTRIES`:
/// default glibc stacks are 0x801 pages apart, so the first 4096 threads do not collide.
pub const THREAD_TABLE_SHIFT: u32 = 12;

/// One entry of the thread table. Compiled code looks at the home entry only; the runtime's
/// `thread_slot` probes on, and inserts.
#[repr(C)]
pub struct ThreadEntry {
    /// Value of `fs:0`; 0 where free.
    pub thread_pointer: AtomicU64,
    /// Address of the thread's slot.
    pub slot: AtomicU64,
}

/// Start of an arena.
#[repr(C)]
pub struct ArenaHeader {
    /// [`ARENA_MAGIC`]
    pub magic: u64,
    /// Bytes of the whole arena.
    pub size_bytes: u64,
    /// Offset of slot 0 from the arena's base.
    pub slots_offset: u64,
    /// Bytes from one slot to the next, a multiple of 128.
    pub slot_stride: u64,
    /// How many slots there are.
    pub n_slots: u32,
    /// How many have been handed out.
    pub used_slots: AtomicU32,
    /// Hits that found no slot and ran no program.
    pub no_slot: AtomicU64,
    /// Programs that keep a [`ProgramState`] in every slot.
    pub n_programs: u32,
    /// Maps that follow.
    pub n_maps: u32,
    /// Where the next search for a dead thread's slot begins, once all are handed out.
    pub scan_cursor: AtomicU32,
    /// Which `bpf_spin_lock` is suspected of having a dead owner: offset / 4, low bits << 32 |
    /// its word.
    pub lock_suspect: AtomicU64,
    /// Since when (CLOCK_MONOTONIC, ns).
    pub lock_suspect_since_ns: AtomicU64,
}

/// Offset of the first [`MapHeader`] from the arena's base.
pub const MAP_HEADERS_OFFSET: u64 = 256;
/// Bytes of a [`MapHeader`].
pub const MAP_HEADER_BYTES: u64 = 256;

/// Start of a slot: what one thread owns. Programs' states follow, then the values of
/// per-CPU maps, which Flea keeps per thread.
#[repr(C)]
pub struct SlotHeader {
    /// tgid << 32 | tid of the thread that claimed it; may be stale when a thread pointer is
    /// reused. 0 where free.
    pub owner: AtomicU64,
    /// State of `bpf_get_prandom_u32`, private to the owner.
    pub random: u64,
    /// When the slot was taken from a dead thread (CLOCK_MONOTONIC, ns); 0 where it was not,
    /// or where nobody can still be using it. Counts while `owner` is [`SLOT_VACANT`].
    pub vacated_ns: AtomicU64,
    /// The stack pointer of the run that is going on on this thread of a program that takes
    /// locks, or 0: a recursion guard that all such programs share, as one of them could wait
    /// for a lock that another holds further up the same stack.
    pub locking: u64,
    /// The offset of the `bpf_spin_lock` that this thread took last and has not given back, or
    /// is waiting for; 0 for none.
    pub held_lock: AtomicU64,
    /// Room to grow.
    pub reserved: [u64; 3],
}

/// [`SlotHeader::owner`] of a slot that was handed out once and is free again.
pub const SLOT_VACANT: u64 = u64::MAX;

/// [`ThreadEntry::thread_pointer`] of an entry whose thread is dead: anybody's.
pub const ENTRY_TOMBSTONE: u64 = 1;
/// [`ThreadEntry::thread_pointer`] while the entry's slot is being written.
pub const ENTRY_CLAIMING: u64 = 2;

/// Offset of the first [`ProgramState`] in a slot.
pub const PROGRAM_STATES_OFFSET: u64 = 64;

/// One program's state in one slot.
#[repr(C)]
pub struct ProgramState {
    /// The stack pointer of the run that is going on on this thread, or 0: the recursion guard.
    pub active: u64,
    /// Runs skipped because it was active.
    pub misses: u64,
}

/// A map's control block. What each kind keeps in `state` is defined beside its code in
/// `flea-runtime`.
#[repr(C)]
pub struct MapHeader {
    /// Linux's number of the map type.
    pub kind: u32,
    /// Bytes per key.
    pub key_size_bytes: u32,
    /// Bytes per value.
    pub value_size_bytes: u32,
    /// Bytes from one value to the next, a multiple of 8.
    pub value_stride: u32,
    /// Elements, or bytes of a ring buffer.
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub flags: u32,
    /// Offset of the map's data from the arena's base (0 for `PERCPU_ARRAY`).
    pub data_offset: u64,
    /// Offset of its per-thread values in every slot (per-CPU kinds only).
    pub slot_offset: u64,
    /// Whatever the kind needs: lock words, free lists, producer and consumer positions.
    pub state: [AtomicU64; 16],
    /// One more than the offset of the lock in a value; 0 where there is none.
    pub lock_offset_plus_1: u32,
    /// Room to grow.
    pub reserved: u32,
    /// Maps of maps: offset from the arena's base of the header that those of inner maps must
    /// be like.
    pub template_offset: u64,
}

/// Bytes of one hash bucket: `{ first node: u32, lock: u32 }`.
pub const HASH_BUCKET_BYTES: u64 = 8;
/// Bytes before a hash node's key.
pub const HASH_NODE_HEADER_BYTES: u64 = 16;

/// Buckets of a hash map of `max_entries`; a power of two.
#[must_use]
pub const fn hash_bucket_count(max_entries: u32) -> u64 {
    let entries = if max_entries == 0 { 1 } else { max_entries as u64 };
    1 << (u64::BITS - (entries - 1).leading_zeros())
}

/// Bytes of one hash node: its header, the key and the value, each rounded up to 8.
/// `value_stride` is 0 for per-CPU kinds, whose values are in the slots.
#[must_use]
pub const fn hash_node_bytes(key_size: u32, value_stride: u32) -> u64 {
    HASH_NODE_HEADER_BYTES + ((key_size as u64 + 7) & !7) + value_stride as u64
}

const _: () = assert!(size_of::<ArenaHeader>() as u64 <= MAP_HEADERS_OFFSET);
const _: () = assert!(size_of::<MapHeader>() as u64 <= MAP_HEADER_BYTES);
const _: () = assert!(size_of::<SlotHeader>() as u64 == PROGRAM_STATES_OFFSET);
const _: () = assert!(size_of::<ThreadEntry>() * THREAD_TABLE_ENTRIES == THREAD_TABLE_BYTES);

/// The runtime's functions, as the blob exports them.
///
/// Called with System V integer arguments (at most six), result in rax. Every other
/// register, vector registers included, comes back as it was: compiled code calls them with
/// Cranelift's `PreserveAll`. `arena` is the arena's address, `map` a [`MapHeader`]'s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RuntimeFn {
    /// `(arena) -> slot address, or 0`: finds or claims the calling thread's slot. Where it
    /// returns 0 it has counted that in [`ArenaHeader::no_slot`]; the caller runs no program.
    ThreadSlot,
    /// `(vdso_clock_gettime or 0, clock_id) -> ns`
    ClockNs,
    /// `(arena, map, key, slot) -> value address or 0`, all kinds with elements. Compiled code
    /// looks into arrays itself where it knows which. The slot may be 0 but for per-CPU kinds.
    HashLookup,
    /// `(arena, map, cursor, key, key_bytes, slot) -> value address or 0`, hash kinds: the next
    /// element from the number at `cursor` on, which goes up; its key is copied to `key`.
    HashNext,
    /// `(arena, map, key) -> address of an inner map's header or 0`, maps of maps.
    InnerMap,
    /// `(arena, lock, slot) -> 0 or -errno`: takes a value's lock, or gives up after a bounded
    /// wait.
    SpinLock,
    /// `(arena, lock, slot) -> 0`
    SpinUnlock,
    /// `(arena, map, key, value, flags, slot) -> 0 or -errno`, all kinds with elements.
    MapUpdate,
    /// `(arena, map, key) -> 0 or -errno`
    MapDelete,
    /// `(arena, map, size_bytes) -> record address or 0`
    RingbufReserve,
    /// `(record, flags) -> 0`
    RingbufSubmit,
    /// `(record, flags) -> 0`
    RingbufDiscard,
    /// `(arena, map, data, size_bytes, flags) -> 0 or -errno`
    RingbufOutput,
    /// `(map, flags) -> u64`
    RingbufQuery,
    /// `(dst, size_bytes, src) -> 0 or -errno`; fills with zeros on error, never faults.
    ProbeReadUser,
    /// `(dst, size_bytes, src) -> length with the NUL, or -errno`
    ProbeReadUserStr,
    /// `(dst, src, size_bytes) -> 0 or -errno`; writes nothing that the target itself could not
    /// write, never faults.
    ProbeWriteUser,
    /// `() -> tgid << 32 | tid`
    PidTgid,
    /// `() -> gid << 32 | uid`
    UidGid,
    /// `(buf, size_bytes) -> 0 or -errno`
    Comm,
    /// `() -> the CPU it runs on`
    ProcessorId,
    /// `(slot) -> u32`
    Prandom,
    /// `(arena, printk_map, fmt, fmt_size, args, n_args) -> length or -errno`: formats into
    /// the session's own ring buffer.
    Printk,
}

impl RuntimeFn {
    /// All of them.
    pub const ALL: [RuntimeFn; 23] = [
        RuntimeFn::ThreadSlot,
        RuntimeFn::ClockNs,
        RuntimeFn::HashLookup,
        RuntimeFn::HashNext,
        RuntimeFn::InnerMap,
        RuntimeFn::SpinLock,
        RuntimeFn::SpinUnlock,
        RuntimeFn::MapUpdate,
        RuntimeFn::MapDelete,
        RuntimeFn::RingbufReserve,
        RuntimeFn::RingbufSubmit,
        RuntimeFn::RingbufDiscard,
        RuntimeFn::RingbufOutput,
        RuntimeFn::RingbufQuery,
        RuntimeFn::ProbeReadUser,
        RuntimeFn::ProbeReadUserStr,
        RuntimeFn::ProbeWriteUser,
        RuntimeFn::PidTgid,
        RuntimeFn::UidGid,
        RuntimeFn::Comm,
        RuntimeFn::ProcessorId,
        RuntimeFn::Prandom,
        RuntimeFn::Printk,
    ];

    /// The symbol in the blob.
    #[must_use]
    pub const fn symbol(self) -> &'static str {
        match self {
            RuntimeFn::ThreadSlot => "flea_thread_slot",
            RuntimeFn::ClockNs => "flea_clock_ns",
            RuntimeFn::HashLookup => "flea_hash_lookup",
            RuntimeFn::HashNext => "flea_hash_next",
            RuntimeFn::InnerMap => "flea_inner_map",
            RuntimeFn::SpinLock => "flea_spin_lock",
            RuntimeFn::SpinUnlock => "flea_spin_unlock",
            RuntimeFn::MapUpdate => "flea_map_update",
            RuntimeFn::MapDelete => "flea_map_delete",
            RuntimeFn::RingbufReserve => "flea_ringbuf_reserve",
            RuntimeFn::RingbufSubmit => "flea_ringbuf_submit",
            RuntimeFn::RingbufDiscard => "flea_ringbuf_discard",
            RuntimeFn::RingbufOutput => "flea_ringbuf_output",
            RuntimeFn::RingbufQuery => "flea_ringbuf_query",
            RuntimeFn::ProbeReadUser => "flea_probe_read_user",
            RuntimeFn::ProbeReadUserStr => "flea_probe_read_user_str",
            RuntimeFn::ProbeWriteUser => "flea_probe_write_user",
            RuntimeFn::PidTgid => "flea_pid_tgid",
            RuntimeFn::UidGid => "flea_uid_gid",
            RuntimeFn::Comm => "flea_comm",
            RuntimeFn::ProcessorId => "flea_processor_id",
            RuntimeFn::Prandom => "flea_prandom",
            RuntimeFn::Printk => "flea_printk",
        }
    }
}
