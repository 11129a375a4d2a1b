//! The gate: while sites change, the target's dynamic loader neither unmaps a library nor hands
//! over one that it has mapped.
//!
//! Protected: that the bytes which a batch writes go to where its sites were compared. A library
//! that is closed and opened again in between, at the same address, has the file's bytes: tails
//! would be written that no breakpoint stands in front of. By: a breakpoint at the function that
//! loaders call for debuggers (`r_brk`, `_dl_debug_state`), at which threads wait.
//!
//! # Why that is enough
//!
//! glibc, under one lock for all threads and namespaces:
//!
//! - dlclose: `r_state = RT_DELETE`, call, unmap everything, `RT_CONSISTENT`, call.
//! - dlopen: `RT_ADD`, call, map, relocate, `RT_CONSISTENT`, call. Since 2.35 the first library is
//!   mapped before the first of these calls, and only then.
//!
//! 1. Once the breakpoint is there and synced, whoever has passed it has a state that is not
//!    consistent, and we see that: the store is older than the call. Such a thread is waited for.
//!    It comes back to the gate, and then stands there.
//! 2. So with a thread at the gate, which has the lock, or with all states consistent, no library
//!    is being unmapped, nor will be.
//! 3. What is being mapped meanwhile lies where nothing was. A site may be in it only if its
//!    library has been closed since it was found, and is just being opened at the same address:
//!    its text is not executable then, or is there for good. So both are looked at.
//!
//! What remains: a library whose loading fails between its mapping and the first call; other
//! loaders (uClibc-ng calls when it has unmapped already), and programs that unmap by themselves.
//! musl unmaps no library that was loaded, and leaves its state consistent.

use flea_process::Trap;
use flea_symbols::addr::RemoteAddr;

use crate::commit::INT3;
use crate::plan::Plan;
use crate::target::Target;

/// Offsets in `struct r_debug` and, behind it, `struct r_debug_extended` (<link.h>).
const R_STATE_OFFSET: i64 = 24;
const R_NEXT_OFFSET: i64 = 40;
/// `RT_CONSISTENT`
const CONSISTENT: u32 = 0;
/// `r_version` of one that has `r_next`: there are other namespaces (dlmopen).
const EXTENDED_VERSION: u32 = 2;
/// glibc has sixteen.
const MAX_NAMESPACES: usize = 64;
/// First bytes of instructions that nobody falls from to the byte behind them: `ret`, and
/// `endbr64`, which is longer.
const RET: u8 = 0xc3;
const ENDBR: u8 = 0xf3;

/// Where the target's dynamic loader says what it is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gate {
    /// The function that it calls: `r_brk`. The start of an instruction.
    pub stop: RemoteAddr,
    /// Its `struct r_debug`.
    pub r_debug: RemoteAddr,
}

/// How far a gate is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    Shut,
    /// The breakpoint has been overwritten; threads may still wait.
    Unlocked,
}

/// A gate that can be shut.
#[derive(Debug)]
pub(crate) struct Barrier {
    gate: Gate,
    first_byte: u8,
    state: State,
}

impl Barrier {
    /// None where the plan changes that place, or where somebody else's breakpoint is.
    pub(crate) fn new<T: Target>(
        target: &mut T,
        gate: Gate,
        plan: &Plan,
    ) -> Result<Option<Self>, T::Error> {
        if plan.pokes.iter().any(|poke| poke.contains(gate.stop)) {
            return Ok(None);
        }
        let mut first = [0];
        target.read(gate.stop, &mut first)?;
        let [first_byte] = first;
        Ok((first_byte != INT3).then_some(Self { gate, first_byte, state: State::Open }))
    }

    pub(crate) fn stop(&self) -> RemoteAddr {
        self.gate.stop
    }

    pub(crate) fn is_shut(&self) -> bool {
        self.state == State::Shut
    }

    pub(crate) fn trap(&self) -> Trap {
        let starts_behind = !matches!(self.first_byte, RET | ENDBR);
        Trap { site: self.gate.stop, goes_to: self.gate.stop, starts_behind }
    }

    /// From now on nobody gets through. Who did is seen by [`Barrier::is_quiet`].
    pub(crate) fn shut<T: Target>(&mut self, target: &mut T) -> Result<(), T::Error> {
        self.state = State::Shut;
        target.write_text(self.gate.stop, &[INT3])?;
        target.sync_core()
    }

    /// Takes the breakpoint away. From now on threads may go through.
    pub(crate) fn unlock<T: Target>(&mut self, target: &mut T) -> Result<(), T::Error> {
        if self.state == State::Shut {
            target.write_text(self.gate.stop, &[self.first_byte])?;
            self.state = State::Unlocked;
        }
        Ok(())
    }

    /// Has all threads go through again.
    pub(crate) fn open<T: Target>(&mut self, target: &mut T) -> Result<(), T::Error> {
        self.unlock(target)?;
        if self.state == State::Unlocked {
            target.sync_core()?;
            target.open_gate()?;
            self.state = State::Open;
        }
        Ok(())
    }

    /// Whether nobody is on the other side of the gate, which is shut.
    pub(crate) fn is_quiet<T: Target>(&self, target: &mut T) -> Result<bool, T::Error> {
        Ok(target.is_gate_taken()? || self.is_consistent(target)?)
    }

    fn is_consistent<T: Target>(&self, target: &mut T) -> Result<bool, T::Error> {
        let mut at = self.gate.r_debug;
        for _ in 0..MAX_NAMESPACES {
            if read_u32(target, at.offset(R_STATE_OFFSET))? != CONSISTENT {
                return Ok(false);
            }
            if read_u32(target, at)? < EXTENDED_VERSION {
                break;
            }
            let mut next = [0; 8];
            target.read(at.offset(R_NEXT_OFFSET), &mut next)?;
            at = RemoteAddr(u64::from_le_bytes(next));
            if at.0 == 0 {
                break;
            }
        }
        Ok(true)
    }
}

fn read_u32<T: Target>(target: &mut T, at: RemoteAddr) -> Result<u32, T::Error> {
    let mut word = [0; 4];
    target.read(at, &mut word)?;
    Ok(u32::from_le_bytes(word))
}
