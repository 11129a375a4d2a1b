//! x86-64 Linux: system calls and the few instructions that have no name in Rust. Touches
//! no vector register and no errno. Start with `syscall`.

use core::arch::asm;

use crate::errno::Errno;
use crate::mem::low_half;

/// A Linux thread id, as the calling process sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tid(pub u32);

/// CLOCK_MONOTONIC
pub const CLOCK_MONOTONIC: u32 = 1;

/// `struct timespec`
#[repr(C)]
#[derive(Default)]
struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

/// `struct iovec`
#[repr(C)]
struct Iovec {
    base: u64,
    size_bytes: u64,
}

mod number {
    pub const SCHED_YIELD: u64 = 24;
    pub const GETPID: u64 = 39;
    pub const KILL: u64 = 62;
    pub const GETUID: u64 = 102;
    pub const GETGID: u64 = 104;
    pub const PRCTL: u64 = 157;
    pub const GETTID: u64 = 186;
    pub const TKILL: u64 = 200;
    pub const CLOCK_GETTIME: u64 = 228;
    pub const TGKILL: u64 = 234;
    pub const GETCPU: u64 = 309;
    pub const PROCESS_VM_READV: u64 = 310;
    pub const PROCESS_VM_WRITEV: u64 = 311;
}

/// The kernel, asked directly. Returns what it returns: `-errno` where it fails.
///
/// # Safety
/// As the call that is made.
#[inline(always)]
unsafe fn syscall(number: u64, args: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = args;
    let result: i64;
    // SAFETY: the caller answers for the call; the kernel keeps all registers but these.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            in("r8") e,
            in("r9") f,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// A call that takes numbers only and touches no memory of ours.
#[inline(always)]
fn ask(number: u64, a: u64, b: u64, c: u64) -> i64 {
    // SAFETY: only this module's functions call it, with calls that pass no address.
    unsafe { syscall(number, [a, b, c, 0, 0, 0]) }
}

/// The calling thread.
#[must_use]
pub fn gettid() -> Tid {
    Tid(low_half(ask(number::GETTID, 0, 0, 0).cast_unsigned()))
}

/// The calling process (Linux: tgid).
#[must_use]
pub fn getpid() -> u32 {
    low_half(ask(number::GETPID, 0, 0, 0).cast_unsigned())
}

/// The real user id.
#[must_use]
pub fn getuid() -> u32 {
    low_half(ask(number::GETUID, 0, 0, 0).cast_unsigned())
}

/// The real group id.
#[must_use]
pub fn getgid() -> u32 {
    low_half(ask(number::GETGID, 0, 0, 0).cast_unsigned())
}

/// Lets others run.
pub fn sched_yield() {
    ask(number::SCHED_YIELD, 0, 0, 0);
}

/// Whether there is no such thread any more. A zombie counts as there.
#[must_use]
pub fn is_thread_dead(tid: Tid) -> bool {
    ask(number::TKILL, u64::from(tid.0), 0, 0) == Errno::ESRCH.to_return()
}

/// Whether process `tgid` has no thread `tid` any more.
#[must_use]
pub fn is_thread_of_process_dead(tgid: u32, tid: Tid) -> bool {
    ask(number::TGKILL, u64::from(tgid), u64::from(tid.0), 0) == Errno::ESRCH.to_return()
}

/// Whether there is no such process any more. A zombie counts as there.
#[must_use]
pub fn is_process_dead(tgid: u32) -> bool {
    ask(number::KILL, u64::from(tgid), 0, 0) == Errno::ESRCH.to_return()
}

/// The thread's name, NUL-terminated.
#[must_use]
pub fn thread_name() -> Option<[u8; 16]> {
    const PR_GET_NAME: u64 = 16;
    let mut name = [0u8; 16];
    let args = [PR_GET_NAME, &raw mut name as u64, 0, 0, 0, 0];
    // SAFETY: the kernel writes at most 16 bytes at `name`.
    let result = unsafe { syscall(number::PRCTL, args) };
    (result == 0).then_some(name)
}

/// A clock's time in ns, by the system call; 0 for a clock that the kernel does not know.
#[must_use]
pub fn clock_ns(clock_id: u32) -> u64 {
    let mut time = Timespec::default();
    let args = [u64::from(clock_id), &raw mut time as u64, 0, 0, 0, 0];
    // SAFETY: the kernel writes one `struct timespec`.
    let result = unsafe { syscall(number::CLOCK_GETTIME, args) };
    if result == 0 { time.ns() } else { 0 }
}

impl Timespec {
    fn ns(&self) -> u64 {
        let seconds = self.seconds.cast_unsigned();
        seconds.wrapping_mul(1_000_000_000).wrapping_add(self.nanoseconds.cast_unsigned())
    }
}

/// Copies `size_bytes` from `from` in this process, wherever that points, to `to`. Returns
/// how many bytes could be read; the kernel checks every page, so nothing can fault.
///
/// # Safety
/// `size_bytes` at `to` are writable.
#[must_use]
pub unsafe fn read_own_memory(to: *mut u8, size_bytes: u64, from: u64) -> u64 {
    // SAFETY: the kernel writes to `to` only, as the caller allows.
    unsafe { copy_own_memory(number::PROCESS_VM_READV, to as u64, from, size_bytes) }
}

/// Copies `size_bytes` from `from` to `to` in this process, wherever that points. Returns how
/// many bytes could be written; the kernel checks every page and what may be done to it, so
/// nothing can fault.
///
/// # Safety
/// `size_bytes` at `from` are readable, and nobody minds that memory at `to` changes.
#[must_use]
pub unsafe fn write_own_memory(to: u64, from: *const u8, size_bytes: u64) -> u64 {
    // SAFETY: the kernel reads at `from` and writes to `to` only, as the caller allows.
    unsafe { copy_own_memory(number::PROCESS_VM_WRITEV, from as u64, to, size_bytes) }
}

/// # Safety
/// As the call that is made.
unsafe fn copy_own_memory(number: u64, ours: u64, other: u64, size_bytes: u64) -> u64 {
    let local = Iovec { base: ours, size_bytes };
    let remote = Iovec { base: other, size_bytes };
    let (local, remote) = (&raw const local as u64, &raw const remote as u64);
    let args = [u64::from(getpid()), local, 1, remote, 1, 0];
    // SAFETY: as the caller says.
    let result = unsafe { syscall(number, args) };
    u64::try_from(result).unwrap_or(0)
}

/// The CPU that the calling thread runs on.
#[must_use]
pub fn current_cpu() -> u32 {
    // Linux keeps `node << 12 | cpu` as the limit of this segment for its own vDSO. A
    // selector that does not exist clears ZF and faults nothing.
    const CPU_NODE_SELECTOR: u32 = 0x7b;
    let mut limit: u32 = 0;
    let valid: u8;
    // SAFETY: `lsl` reads a descriptor's limit and changes the named registers only.
    unsafe {
        asm!(
            "lsl {limit:e}, {selector:e}",
            "sete {valid}",
            limit = inout(reg) limit,
            selector = in(reg) CPU_NODE_SELECTOR,
            valid = lateout(reg_byte) valid,
            options(nomem, nostack),
        );
    }
    if valid != 0 { limit & 0xfff } else { getcpu() }
}

fn getcpu() -> u32 {
    let mut cpu: u32 = 0;
    // SAFETY: the kernel writes one u32.
    let _ = unsafe { syscall(number::GETCPU, [&raw mut cpu as u64, 0, 0, 0, 0, 0]) };
    cpu
}

/// The thread pointer: what is at `fs:0`.
#[must_use]
pub fn thread_pointer() -> u64 {
    let pointer: u64;
    // SAFETY: compiled code has read the same word before it calls the runtime.
    unsafe {
        asm!("mov {}, fs:[0]", out(reg) pointer, options(nostack, readonly, preserves_flags));
    }
    pointer
}
