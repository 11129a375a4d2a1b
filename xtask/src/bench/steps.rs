//! Counts the instructions of one call by single-stepping it: slow, simple and exact, where
//! the machine has no counters. Counts user space only; a system call is one instruction.

use anyhow::{Context, Result, bail, ensure};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::site::RemoteAddr;

/// From the harness's int3 to the entry it is a handful.
const MAX_TO_ENTRY: u32 = 1000;
/// Far above any trampoline that could be called fast.
const MAX_PER_CALL: u32 = 1_000_000;

/// Detaches on every way out; the target then runs on.
struct Traced(Pid);

impl Drop for Traced {
    fn drop(&mut self) {
        // Fails only when it is gone, or runs: then the error that got us here says more.
        let _ = ptrace::detach(self.0, None);
    }
}

impl Traced {
    fn wait_for_trap(&self) -> Result<()> {
        match waitpid(self.0, Some(WaitPidFlag::__WALL)).context("waiting for a trap")? {
            WaitStatus::Stopped(_, Signal::SIGTRAP) => Ok(()),
            other => bail!("expected a trap, got {other:?}"),
        }
    }

    /// One instruction; returns the registers behind it.
    fn step(&self) -> Result<(u64, u64)> {
        ptrace::step(self.0, None).context("single-stepping")?;
        self.wait_for_trap()?;
        self.registers()
    }

    /// (rip, rsp)
    fn registers(&self) -> Result<(u64, u64)> {
        let registers = ptrace::getregs(self.0).context("reading the registers")?;
        Ok((registers.rip, registers.rsp))
    }
}

/// Instructions from `entry` to the return from it, both included. `trigger` makes the
/// process execute int3 and call the function soon after.
pub fn count(pid: u32, entry: RemoteAddr, trigger: impl FnOnce() -> Result<()>) -> Result<u32> {
    let pid = Pid::from_raw(i32::try_from(pid)?);
    ptrace::seize(pid, ptrace::Options::empty()).context("tracing the harness")?;
    let traced = Traced(pid);
    trigger()?;
    traced.wait_for_trap()?;
    let mut at = traced.registers()?;
    for _ in 0..MAX_TO_ENTRY {
        if at.0 == entry.0 {
            break;
        }
        at = traced.step()?;
    }
    ensure!(at.0 == entry.0, "{:#x} was not reached from the int3", entry.0);
    let stack = at.1;
    // The word at rsp is the return address: an image may jump about, the call is over when
    // that is popped and reached.
    #[allow(clippy::cast_sign_loss, reason = "ptrace's long is a word of memory")]
    let back = ptrace::read(pid, std::ptr::with_exposed_provenance_mut(usize::try_from(stack)?))
        .context("reading the return address")? as u64;
    for n_insns in 1..=MAX_PER_CALL {
        let (rip, rsp) = traced.step()?;
        if rip == back && rsp == stack + 8 {
            return Ok(n_insns);
        }
    }
    bail!("no return within {MAX_PER_CALL} instructions")
}
