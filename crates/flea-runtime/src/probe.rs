//! Memory that may not be there: `bpf_probe_read_user`, its string form, and writes. The
//! kernel copies and checks, so nothing faults, also in a thread that blocks SIGSEGV.

use crate::errno::Errno;
use crate::mem::to_usize;
use crate::sys;

const PAGE: u64 = 4096;
/// Bytes of a string that are read at a time, onto the stack: a system call each.
pub const CHUNK: usize = 128;

/// Copies `size_bytes` from `from` to `to`; fills `to` with zeros where that fails.
///
/// # Errors
/// EFAULT: not all of it could be read.
///
/// # Safety
/// `size_bytes` at `to` are writable.
pub unsafe fn read(to: *mut u8, size_bytes: u32, from: u64) -> Result<(), Errno> {
    if size_bytes == 0 {
        return Ok(());
    }
    // SAFETY: as the caller says.
    let n = unsafe { sys::read_own_memory(to, u64::from(size_bytes), from) };
    if n == u64::from(size_bytes) {
        return Ok(());
    }
    // SAFETY: as the caller says.
    unsafe { fill(to, size_bytes) };
    Err(Errno::EFAULT)
}

/// Copies the string at `from` with its NUL; a longer one is cut, and still ends with a NUL.
/// Bytes after the NUL stay as they were. Reads `CHUNK` bytes at a time. Returns the length with the NUL.
///
/// # Errors
/// EFAULT, with `to` all zeros: memory ended before the string did.
///
/// # Safety
/// `size_bytes` at `to` are writable.
pub unsafe fn read_str<const CHUNK: usize>(
    to: *mut u8,
    size_bytes: u32,
    from: u64,
) -> Result<u32, Errno> {
    let mut done = 0;
    while done < size_bytes {
        let mut chunk = [0u8; CHUNK];
        let at = from.wrapping_add(u64::from(done));
        // Not across a page: the string may end just before one that is not there.
        let in_page = PAGE - at % PAGE;
        let want = u64::from(size_bytes - done).min(in_page).min(CHUNK as u64);
        // SAFETY: `want` is at most the chunk's size.
        let got = unsafe { sys::read_own_memory(chunk.as_mut_ptr(), want, at) };
        if got != want {
            // SAFETY: as the caller says.
            unsafe { fill(to, size_bytes) };
            return Err(Errno::EFAULT);
        }
        for &byte in chunk.iter().take(to_usize(want)) {
            let last = done == size_bytes - 1;
            // SAFETY: done < size_bytes, which the caller says are there.
            let place = unsafe { to.add(done as usize) };
            // SAFETY: as above.
            unsafe { place.write_volatile(if last { 0 } else { byte }) };
            done += 1;
            if byte == 0 {
                return Ok(done);
            }
        }
    }
    Ok(done)
}

/// Copies `size_bytes` from `from` to `to`, wherever that is. Pages that may not be written stay
/// as they are.
///
/// # Errors
/// EFAULT: not all of it could be written; what comes before the first such page was.
///
/// # Safety
/// `size_bytes` at `from` are readable, and nobody minds that memory at `to` changes.
pub unsafe fn write(to: u64, from: *const u8, size_bytes: u32) -> Result<(), Errno> {
    // SAFETY: as the caller says.
    let n = unsafe { sys::write_own_memory(to, from, u64::from(size_bytes)) };
    if n == u64::from(size_bytes) { Ok(()) } else { Err(Errno::EFAULT) }
}

/// # Safety
/// `size_bytes` at `to` are writable.
unsafe fn fill(to: *mut u8, size_bytes: u32) {
    for at in 0..size_bytes {
        // SAFETY: at < size_bytes, which the caller says are there.
        let place = unsafe { to.add(at as usize) };
        // SAFETY: as above; volatile, so that no call of memset comes of it.
        unsafe { place.write_volatile(0) };
    }
}
