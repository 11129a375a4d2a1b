//! Helpers about the current thread: ids, name, CPU, time, random numbers.

use core::mem::offset_of;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::errno::Errno;
use crate::mem::Shared;
use crate::shared::SlotHeader;
use crate::sys;

/// `bpf_get_current_pid_tgid`: tgid << 32 | tid.
#[must_use]
pub fn pid_tgid() -> u64 {
    (u64::from(sys::getpid()) << 32) | u64::from(sys::gettid().0)
}

/// `bpf_get_current_uid_gid`: gid << 32 | uid.
#[must_use]
pub fn uid_gid() -> u64 {
    (u64::from(sys::getgid()) << 32) | u64::from(sys::getuid())
}

/// `bpf_get_current_comm`: the name, a NUL, and zeros up to the end.
///
/// # Errors
/// EINVAL: no room at all.
///
/// # Safety
/// `size_bytes` at `buffer` are writable.
pub unsafe fn comm(buffer: *mut u8, size_bytes: u32) -> Result<(), Errno> {
    if size_bytes == 0 {
        return Err(Errno::EINVAL);
    }
    let name = sys::thread_name().unwrap_or_default();
    let mut ended = false;
    for at in 0..size_bytes {
        let byte = name.get(at as usize).copied().unwrap_or(0);
        ended |= byte == 0 || at == size_bytes - 1;
        // SAFETY: at < size_bytes, which the caller says are there.
        let to = unsafe { buffer.add(at as usize) };
        // SAFETY: as above; volatile, so that no call of memset comes of it.
        unsafe { to.write_volatile(if ended { 0 } else { byte }) };
    }
    Ok(())
}

/// `bpf_get_prandom_u32` (xorshift64*), from the slot's own state.
///
/// # Safety
/// `slot` is the address of the calling thread's slot.
#[must_use]
pub unsafe fn prandom(slot: u64) -> u32 {
    let base = slot as *mut u8;
    // SAFETY: a slot begins with its header.
    let header = unsafe { Shared::new(base, size_of::<SlotHeader>() as u64) };
    header.word(offset_of!(SlotHeader, random) as u64).map_or(0, next_random)
}

fn next_random(state: &AtomicU64) -> u32 {
    let mut x = state.load(Relaxed);
    if x == 0 {
        x = sys::clock_ns(sys::CLOCK_MONOTONIC) | 1;
    }
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    state.store(x, Relaxed);
    crate::mem::low_half(x.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32)
}
