//! A system call that begins again with less time to wait.
//!
//! Most calls that we interrupt are begun again by the kernel, which knows when they are to end.
//! Some give up with `EINTR`; [`Tracer::rewind`] begins them again, and a relative timeout would
//! start anew: interrupted often enough, it would never end. So the time that the thread has slept
//! is taken off.
//!
//! *How long it has slept* is what [`crate::sleep`] finds out. What is not known is 0, and the call
//! then waits longer than it was told, never shorter.
//!
//! *Where the new timeout goes*: into the argument's register, or into memory below the stack,
//! where nothing lives that outlasts a signal. The register is changed only where the code behind
//! the call does not read it any more (`x86_64::dead`).
//!
//! Not here: a socket's own timeout (`SO_RCVTIMEO`) is no argument, and begins anew.

use std::time::Duration;

use flea_symbols::addr::RemoteAddr;

use crate::memory::Memory;
use crate::proc::Tid;
use crate::tracer::Tracer;
use crate::x86_64::{Argument, Registers, SYS_IO_PGETEVENTS, is_dead_behind, red_zone_end};

/// Room for a `struct timespec` and a `struct io_uring_getevents_arg`.
const SCRATCH_BYTES: u64 = 48;
const SCRATCH_ARG_OFFSET: i64 = 16;
const PAGE_BYTES: u64 = 4096;
const URING_ARG_BYTES: usize = 24;
const URING_TIMEOUT_OFFSET: usize = 16;
/// `IORING_ENTER_EXT_ARG`, `IORING_ENTER_ABS_TIMER` (<linux/io_uring.h>).
const URING_EXT_ARG: u64 = 1 << 3;
const URING_ABS_TIMER: u64 = 1 << 5;
/// Go's goroutine stacks: nothing says that there is room below the stack pointer.
const GO_HEAP: std::ops::Range<u64> = 0xc0_0000_0000..0xe0_0000_0000;
const NS_PER_S: u64 = 1_000_000_000;

/// Where a system call that answers `EINTR` has its relative timeout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Timeout {
    /// Milliseconds in a register; negative for ever.
    Millis(Argument),
    /// Seconds and fractions of this many nanoseconds in memory; no address for ever.
    Memory(Argument, u64),
    /// In what io_uring_enter's fifth argument points to.
    Uring,
}

fn timeout_of(number: u64) -> Option<Timeout> {
    Some(match i64::try_from(number).ok()? {
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => Timeout::Millis(Argument::Fourth),
        libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => Timeout::Memory(Argument::Fourth, 1),
        libc::SYS_rt_sigtimedwait => Timeout::Memory(Argument::Third, 1),
        libc::SYS_io_getevents | SYS_IO_PGETEVENTS => Timeout::Memory(Argument::Fifth, 1),
        // Only where the time that is left cannot be written back to the caller.
        libc::SYS_ppoll => Timeout::Memory(Argument::Third, 1),
        libc::SYS_pselect6 => Timeout::Memory(Argument::Fifth, 1),
        libc::SYS_select => Timeout::Memory(Argument::Fifth, 1000),
        libc::SYS_io_uring_enter => Timeout::Uring,
        _ => return None,
    })
}

/// Whether a system call of this number may give up with `EINTR` and take a timeout.
pub(crate) fn has_timeout(number: u64) -> bool {
    timeout_of(number).is_some()
}

impl Tracer {
    /// `regs` rewound to before the system call, with as much less to wait as it has waited.
    pub(crate) fn begun_again(&mut self, tid: Tid, regs: &Registers) -> Registers {
        let task = self.tasks.get_mut(&tid);
        let since = task.and_then(|task| task.asleep_since.take());
        let shorter = since.and_then(|since| shortened(&self.memory, regs, since.elapsed()));
        self.counts.shortened += u64::from(shorter.is_some());
        shorter.unwrap_or(*regs).rewound()
    }
}

fn shortened(memory: &Memory, regs: &Registers, slept: Duration) -> Option<Registers> {
    let timeout = timeout_of(regs.interrupted_syscall()?)?;
    let register = match timeout {
        Timeout::Millis(argument) | Timeout::Memory(argument, _) => argument,
        Timeout::Uring => Argument::Fifth,
    };
    if !is_dead_behind(memory, regs.pc(), register) {
        return None;
    }
    match timeout {
        Timeout::Millis(argument) => {
            let millis = millis(regs.argument(argument))?;
            let slept = u64::try_from(slept.as_millis()).unwrap_or(u64::MAX);
            Some(regs.with_argument(argument, millis.saturating_sub(slept)))
        }
        Timeout::Memory(argument, unit_ns) => {
            let left = left_of(memory, RemoteAddr(regs.argument(argument)), unit_ns, slept)?;
            let scratch = scratch(regs)?;
            memory.write(scratch, &left).ok()?;
            Some(regs.with_argument(argument, scratch.0))
        }
        Timeout::Uring => shortened_uring(memory, regs, slept),
    }
}

/// A timeout of milliseconds is an `int`, of which the register's upper half is no part.
fn millis(register: u64) -> Option<u64> {
    let millis = i64::from_ne_bytes((register << 32).to_ne_bytes()) >> 32;
    u64::try_from(millis).ok()
}

fn shortened_uring(memory: &Memory, regs: &Registers, slept: Duration) -> Option<Registers> {
    let flags = regs.argument(Argument::Fourth);
    let size_bytes = regs.argument(Argument::Sixth);
    if flags & (URING_EXT_ARG | URING_ABS_TIMER) != URING_EXT_ARG
        || size_bytes != URING_ARG_BYTES as u64
    {
        return None;
    }
    let given = RemoteAddr(regs.argument(Argument::Fifth));
    let mut arg = memory.read_vec(given, URING_ARG_BYTES).ok()?;
    let timeout = word(&arg, URING_TIMEOUT_OFFSET)?;
    let left = left_of(memory, RemoteAddr(timeout), 1, slept)?;
    let at = scratch(regs)?;
    arg[URING_TIMEOUT_OFFSET..].copy_from_slice(&at.0.to_le_bytes());
    memory.write(at, &left).ok()?;
    memory.write(at.offset(SCRATCH_ARG_OFFSET), &arg).ok()?;
    Some(regs.with_argument(Argument::Fifth, at.offset(SCRATCH_ARG_OFFSET).0))
}

/// What is left of the time at `at`, in the same form. None where there is no time.
fn left_of(memory: &Memory, at: RemoteAddr, unit_ns: u64, slept: Duration) -> Option<[u8; 16]> {
    if at.0 == 0 {
        return None;
    }
    let given = memory.read_vec(at, 16).ok()?;
    let fraction_ns = word(&given, 8)?.checked_mul(unit_ns)?;
    let nanos = word(&given, 0)?.checked_mul(NS_PER_S)?.checked_add(fraction_ns)?;
    let slept = u64::try_from(slept.as_nanos()).unwrap_or(u64::MAX);
    let left = nanos.saturating_sub(slept);
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&(left / NS_PER_S).to_le_bytes());
    bytes[8..].copy_from_slice(&(left % NS_PER_S / unit_ns).to_le_bytes());
    Some(bytes)
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// Memory below everything that the thread has on its stack, in the page that it is in: what is
/// below may be a guard.
fn scratch(regs: &Registers) -> Option<RemoteAddr> {
    let end = red_zone_end(regs.sp());
    let start = end.0.checked_sub(SCRATCH_BYTES)? & !15;
    let in_page = start / PAGE_BYTES == regs.sp().0 / PAGE_BYTES;
    (in_page && !GO_HEAP.contains(&start)).then_some(RemoteAddr(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milliseconds_are_an_int() {
        assert_eq!(millis(600), Some(600));
        assert_eq!(millis(0xdead_beef_0000_0258), Some(600));
        assert_eq!(millis(0xffff_ffff), None);
        assert_eq!(millis(u64::MAX), None);
    }
}
