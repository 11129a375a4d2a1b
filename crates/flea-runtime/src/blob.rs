//! The blob's root: what `build.rs` compiles, apart from the crate. Each function is entered
//! through a naked wrapper that keeps every register but rax:
//!
//! ```text
//!   flea_xxx:  endbr64
//!              push rbp; mov rbp, rsp
//!              push rcx, rdx, rsi, rdi, r8, r9, r10, r11     [rbp-8] .. [rbp-64]
//!              and rsp, -16
//!              call the Rust function                        (keeps rbx, rbp, r12-r15)
//!              lea rsp, [rbp-64]
//!              pop  r11 .. rcx, rbp
//!              ret
//! ```
//! Vector registers need nothing: none of this code uses them. The clock's wrapper calls the vDSO
//! itself: [`flea_clock_ns`].
#![no_std]
#![allow(missing_docs, reason = "compiled by build.rs; the functions are RuntimeFn's")]
#![allow(dead_code, reason = "the crate's other users need the rest")]

mod errno;
mod hash;
mod lock;
mod map;
mod mem;
mod printk;
mod probe;
mod ringbuf;
mod spin;
#[path = "../../flea-layout/src/shared.rs"]
mod shared;
#[path = "x86_64/mod.rs"]
mod sys;
mod task;
mod thread;

use core::sync::atomic::AtomicU64;

use errno::{Errno, status};
use map::Map;
use mem::{Bytes, Shared};
use shared::THREAD_TABLE_BYTES;

/// How every entry begins: `rbp` is its frame, and what a Rust or C function may change is saved.
macro_rules! enter {
    () => {
        concat!(
            "endbr64\n",
            "push rbp\n",
            "mov rbp, rsp\n",
            "push rcx\n",
            "push rdx\n",
            "push rsi\n",
            "push rdi\n",
            "push r8\n",
            "push r9\n",
            "push r10\n",
            "push r11\n",
        )
    };
}

/// How every entry ends, wherever `rsp` is.
macro_rules! leave {
    () => {
        concat!(
            "lea rsp, [rbp - 64]\n",
            "pop r11\n",
            "pop r10\n",
            "pop r9\n",
            "pop r8\n",
            "pop rdi\n",
            "pop rsi\n",
            "pop rdx\n",
            "pop rcx\n",
            "pop rbp\n",
            "ret\n",
        )
    };
}

macro_rules! entries {
    ($($symbol:ident => $function:path;)*) => {$(
        /// # Safety
        /// As the `RuntimeFn` of this name demands of its arguments.
        #[unsafe(naked)]
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $symbol() {
            core::arch::naked_asm!(
                enter!(),
                "and rsp, -16",
                "call {function}",
                leave!(),
                function = sym $function,
            )
        }
    )*};
}

entries! {
    flea_thread_slot => thread_slot;
    flea_hash_lookup => hash_lookup;
    flea_hash_next => hash_next;
    flea_inner_map => inner_map;
    flea_spin_lock => spin_lock;
    flea_spin_unlock => spin_unlock;
    flea_map_update => map_update;
    flea_map_delete => map_delete;
    flea_ringbuf_reserve => ringbuf_reserve;
    flea_ringbuf_submit => ringbuf_submit;
    flea_ringbuf_discard => ringbuf_discard;
    flea_ringbuf_output => ringbuf_output;
    flea_ringbuf_query => ringbuf_query;
    flea_probe_read_user => probe_read_user;
    flea_probe_read_user_str => probe_read_user_str;
    flea_probe_write_user => probe_write_user;
    flea_pid_tgid => pid_tgid;
    flea_uid_gid => uid_gid;
    flea_comm => comm;
    flea_processor_id => processor_id;
    flea_prandom => prandom;
    flea_printk => printk_entry;
}

// Every function below is called by its wrapper alone, which compiled programs call with
// arguments that the verifier has proved and the compiler has put in place: that is the
// fact behind each SAFETY comment here.

unsafe extern "C" fn thread_slot(arena: u64) -> u64 {
    let table_base = arena.wrapping_sub(THREAD_TABLE_BYTES as u64) as *mut u8;
    // SAFETY: the thread table ends where the arena begins.
    let table = unsafe { Shared::new(table_base, THREAD_TABLE_BYTES as u64) };
    let thread_pointer = sys::thread_pointer();
    if let Some(slot) = thread::find(table, thread_pointer) {
        return slot;
    }
    // SAFETY: `arena` is an arena.
    let arena = unsafe { map::arena(arena) };
    thread::claim(arena, table, thread::Asking::current(thread_pointer)).unwrap_or(0)
}

/// A clock's time in ns, from the vDSO's `clock_gettime` in rdi, for the clock in esi. Whatever
/// measures durations reads the clock twice per call, so the usual way is written out:
///
/// ```text
///   [rbp-8] .. [rbp-64]  rcx, rdx, rsi, rdi, r8 .. r11, which a C function may change
///   [rsp], [rsp+8]       struct timespec: seconds, nanoseconds; rsp is a multiple of 16
/// ```
/// The vDSO is kernel code, built without vector registers; the controller looks through its
/// instructions before it passes one, else 0. Then, and where the vDSO answers with an error,
/// the system call is asked.
///
/// # Safety
/// rdi is 0 or the address of the vDSO's `clock_gettime`.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_clock_ns() {
    core::arch::naked_asm!(
        enter!(),
        "sub rsp, 16",
        "and rsp, -16",
        "mov rax, rdi",
        "test rax, rax",
        "jz 3f",
        "mov edi, esi",
        "mov rsi, rsp",
        "call rax",
        "test eax, eax",
        "jnz 3f",
        "imul rax, [rsp], 1000000000",
        "add rax, [rsp + 8]",
        "2:",
        leave!(),
        "3:",
        "mov edi, [rbp - 24]",
        "call {by_system_call}",
        "jmp 2b",
        by_system_call = sym clock_ns,
    )
}

extern "C" fn clock_ns(clock_id: u32) -> u64 {
    sys::clock_ns(clock_id)
}

unsafe extern "C" fn hash_lookup(arena: u64, map: u64, key: u64, slot: u64) -> u64 {
    // SAFETY: `arena` is an arena.
    let Some(map) = Map::new(unsafe { map::arena(arena) }, map) else { return 0 };
    // SAFETY: `key` and `slot` are what they are called.
    unsafe { map.lookup(key, slot) }.unwrap_or(0)
}

unsafe extern "C" fn hash_next(
    arena: u64,
    map: u64,
    cursor: u64,
    key: u64,
    key_bytes: u64,
    slot: u64,
) -> u64 {
    // SAFETY: `arena` is an arena.
    let Some(map) = Map::new(unsafe { map::arena(arena) }, map) else { return 0 };
    let Ok(key_bytes) = usize::try_from(key_bytes) else { return 0 };
    // SAFETY: `cursor` is a word of the program's own stack.
    let cursor = unsafe { &mut *(cursor as *mut u64) };
    // SAFETY: `key` is `key_bytes` bytes of the program's own stack.
    let key = unsafe { core::slice::from_raw_parts_mut(key as *mut u8, key_bytes) };
    map.next(cursor, key, slot).unwrap_or(0)
}

unsafe extern "C" fn inner_map(arena: u64, map: u64, key: u64) -> u64 {
    // SAFETY: `arena` is an arena.
    let Some(map) = Map::new(unsafe { map::arena(arena) }, map) else { return 0 };
    // SAFETY: `key` is what it is called.
    unsafe { map.inner(key) }.unwrap_or(0)
}

unsafe extern "C" fn spin_lock(arena: u64, lock: u64, slot: u64) -> i64 {
    // SAFETY: `arena` is an arena.
    status(map::spin_lock(unsafe { map::arena(arena) }, lock, slot))
}

unsafe extern "C" fn spin_unlock(arena: u64, lock: u64, slot: u64) -> i64 {
    // SAFETY: `arena` is an arena.
    map::spin_unlock(unsafe { map::arena(arena) }, lock, slot);
    0
}

unsafe extern "C" fn map_update(
    arena: u64,
    map: u64,
    key: u64,
    value: u64,
    flags: u64,
    slot: u64,
) -> i64 {
    // SAFETY: `arena` is an arena.
    let Some(map) = Map::new(unsafe { map::arena(arena) }, map) else {
        return Errno::EINVAL.to_return();
    };
    // SAFETY: `key`, `value` and `slot` are what they are called.
    status(unsafe { map.update(key, value, flags, slot) })
}

unsafe extern "C" fn map_delete(arena: u64, map: u64, key: u64) -> i64 {
    // SAFETY: as here. A program that runs has its slot already: this finds it.
    let slot = unsafe { thread_slot(arena) };
    // SAFETY: `arena` is an arena.
    let Some(map) = Map::new(unsafe { map::arena(arena) }, map) else {
        return Errno::EINVAL.to_return();
    };
    // SAFETY: `key` is the address of a key, and the slot is this thread's.
    status(unsafe { map.delete(key, slot) })
}

unsafe fn ring<'a>(arena: u64, map: u64) -> Option<ringbuf::Ring<'a>> {
    // SAFETY: `arena` is an arena.
    Map::new(unsafe { map::arena(arena) }, map)?.ring()
}

unsafe extern "C" fn ringbuf_reserve(arena: u64, map: u64, size_bytes: u64) -> u64 {
    // SAFETY: as here.
    let Some(ring) = (unsafe { ring(arena, map) }) else { return 0 };
    ring.reserve(size_bytes).map_or(0, |record| ring.address(record))
}

/// # Safety
/// `record` came from `ringbuf_reserve` and was not given back yet.
unsafe fn finish(record: u64, extra: u64) -> i64 {
    let header = record.wrapping_sub(ringbuf::HEADER_BYTES) as *mut u64;
    // SAFETY: every record has its header before it, aligned to 8.
    ringbuf::finish(unsafe { AtomicU64::from_ptr(header) }, extra);
    0
}

unsafe extern "C" fn ringbuf_submit(record: u64, _flags: u64) -> i64 {
    // SAFETY: the verifier tracks records.
    unsafe { finish(record, 0) }
}

unsafe extern "C" fn ringbuf_discard(record: u64, _flags: u64) -> i64 {
    // SAFETY: the verifier tracks records.
    unsafe { finish(record, ringbuf::DISCARD) }
}

unsafe extern "C" fn ringbuf_output(
    arena: u64,
    map: u64,
    data: u64,
    size_bytes: u64,
    flags: u64,
) -> i64 {
    // BPF_RB_NO_WAKEUP and BPF_RB_FORCE_WAKEUP: there is nobody to wake.
    if flags > 3 {
        return Errno::EINVAL.to_return();
    }
    // SAFETY: as here.
    let Some(ring) = (unsafe { ring(arena, map) }) else { return Errno::EINVAL.to_return() };
    // SAFETY: `data` is readable for `size_bytes`.
    status(ring.output(unsafe { Bytes::new(data as *const u8, size_bytes) }))
}

unsafe extern "C" fn ringbuf_query(map: u64, flags: u64) -> u64 {
    // SAFETY: `map` is a map's header.
    let header = unsafe { Shared::new(map as *mut u8, shared::MAP_HEADER_BYTES) };
    map::ring_query(header, flags).unwrap_or(0)
}

unsafe extern "C" fn probe_read_user(to: u64, size_bytes: u32, from: u64) -> i64 {
    // SAFETY: `to` is writable for `size_bytes`.
    status(unsafe { probe::read(to as *mut u8, size_bytes, from) })
}

unsafe extern "C" fn probe_read_user_str(to: u64, size_bytes: u32, from: u64) -> i64 {
    // SAFETY: `to` is writable for `size_bytes`.
    match unsafe { probe::read_str::<{ probe::CHUNK }>(to as *mut u8, size_bytes, from) } {
        Ok(length) => i64::from(length),
        Err(errno) => errno.to_return(),
    }
}

unsafe extern "C" fn probe_write_user(to: u64, from: u64, size_bytes: u32) -> i64 {
    // SAFETY: `from` is readable for `size_bytes`, and the user of this program has allowed it to
    // change what it likes.
    status(unsafe { probe::write(to, from as *const u8, size_bytes) })
}

unsafe extern "C" fn pid_tgid() -> u64 {
    task::pid_tgid()
}

unsafe extern "C" fn uid_gid() -> u64 {
    task::uid_gid()
}

unsafe extern "C" fn comm(buffer: u64, size_bytes: u32) -> i64 {
    // SAFETY: `buffer` is writable for `size_bytes`.
    status(unsafe { task::comm(buffer as *mut u8, size_bytes) })
}

unsafe extern "C" fn processor_id() -> u64 {
    u64::from(sys::current_cpu())
}

unsafe extern "C" fn prandom(slot: u64) -> u64 {
    // SAFETY: `slot` is the calling thread's slot.
    u64::from(unsafe { task::prandom(slot) })
}

unsafe extern "C" fn printk_entry(
    arena: u64,
    map: u64,
    format: u64,
    format_size: u32,
    args: u64,
    n_args: u32,
) -> i64 {
    // SAFETY: as here.
    let Some(ring) = (unsafe { ring(arena, map) }) else { return Errno::EINVAL.to_return() };
    // SAFETY: `format` is readable for `format_size`.
    let format = unsafe { Bytes::new(format as *const u8, u64::from(format_size)) };
    // SAFETY: `args` are `n_args` u64s.
    let args = unsafe { Bytes::new(args as *const u8, u64::from(n_args) * 8) };
    match printk::print(&ring, format, args) {
        Ok(length) => i64::from(length),
        Err(errno) => errno.to_return(),
    }
}

/// What rustc calls to clear the larger arrays on the stack.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, n: usize) -> *mut u8 {
    // SAFETY: `n` bytes at `to` are writable, says the caller; the direction flag is clear
    // wherever the ABI holds.
    unsafe {
        core::arch::asm!(
            "rep stosb",
            inout("rcx") n => _,
            inout("rdi") to => _,
            in("al") byte.to_le_bytes()[0],
            options(nostack, preserves_flags),
        );
    }
    to
}
