//! The discipline of `bpf_spin_lock`, in Linux's words (`process_spin_lock` in
//! `kernel/bpf/verifier.c`, 6.18): one lock at a time, taken and released by a pointer to the
//! same value, no helper in between, released before the program ends.
//!
//! Which value a pointer is of: each lookup in a map with locks gives an element of its own
//! ([`PointerKind::LockValue`]), even if it is the one that another lookup gave. So a lock of
//! one inner map's value is never released by way of another's.
//!
//! Beyond Linux: where a lock is taken, at most one record of each `bpf_ringbuf_reserve` is held.
//! Linux waits for the lock as long as it takes; here a program that does not get it ends there,
//! and compiled code gives back what it holds: it keeps one record for each such call.

use flea_object::helper::Helper;
use flea_object::spec::MapIdx;

use crate::machine::Machine;
use crate::op::{Op, Reg};
use crate::proto::Arg;
use crate::report::Fault;
use crate::state::State;
use crate::value::{Id, Pointer, PointerKind, Value};

/// The lock in one value of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lock {
    pub(crate) map: MapIdx,
    /// Which lookup gave the value; `None` for the only element of a map.
    pub(crate) element: Option<Id>,
}

impl Machine<'_> {
    /// What a pointer to a value of `map` is; `element` says which lookup gives it.
    pub(crate) fn value_of(&self, map: MapIdx, element: Option<Id>) -> Result<PointerKind, Fault> {
        Ok(match self.map(map)?.lock_offset {
            Some(_) => PointerKind::LockValue { map, element },
            None => PointerKind::MapValue(map),
        })
    }

    /// The lock that `value`, in `reg`, points to.
    pub(crate) fn lock_arg(&self, reg: Reg, value: &Value) -> Result<Lock, Fault> {
        let r = reg.index();
        let (p, map, element) = match value {
            Value::Pointer(p @ Pointer { or_null: None, .. }) => match p.kind {
                PointerKind::LockValue { map, element } => (p, map, element),
                PointerKind::MapValue(map) => (p, map, None),
                _ => return Err(mismatch(reg, value)),
            },
            _ => return Err(mismatch(reg, value)),
        };
        let Some(off) = p.off.as_const() else {
            let text = format!(
                "R{r} doesn't have constant offset. bpf_spin_lock has to be at the constant offset"
            );
            return Err(Fault::new(text));
        };
        let spec = self.map(map)?;
        let Some(lock_offset) = spec.lock_offset else {
            return Err(Fault::new(format!("map '{}' has no valid bpf_spin_lock", spec.name))
                .hint("the lock is a member of the value's type, which __type(value, ...) names"));
        };
        if off != u64::from(lock_offset) {
            let off = off.cast_signed();
            return Err(Fault::new(format!(
                "off {off} doesn't point to 'struct bpf_spin_lock' that is at {lock_offset}"
            )));
        }
        Ok(Lock { map, element })
    }
}

/// Whether `helper` may be called now.
pub(crate) fn check_call(state: &State, helper: Option<Helper>) -> Result<(), Fault> {
    if state.lock().is_some() && helper != Some(Helper::SpinUnlock) {
        return Err(Fault::new("function calls are not allowed while holding a lock")
            .hint("call the helper before bpf_spin_lock or behind bpf_spin_unlock"));
    }
    Ok(())
}

/// `bpf_spin_lock` or `bpf_spin_unlock` of `lock`.
pub(crate) fn apply(helper: Helper, lock: Lock, state: &mut State) -> Result<(), Fault> {
    if helper == Helper::SpinLock {
        check_records(state, helper)?;
        state.set_lock(Some(lock));
        return Ok(());
    }
    match state.lock() {
        None => Err(Fault::new("bpf_spin_unlock without taking a lock")),
        Some(held) if held != lock => Err(Fault::new("bpf_spin_unlock of different lock")
            .hint("keep the pointer that the lock was taken by")),
        Some(_) => {
            state.set_lock(None);
            Ok(())
        }
    }
}

/// At most one record of each `bpf_ringbuf_reserve` is held.
pub(crate) fn check_records(state: &State, helper: Helper) -> Result<(), Fault> {
    let held = state.references();
    let is_second =
        |(n, insn_idx): &(usize, usize)| held[..*n].iter().any(|other| other.insn_idx == *insn_idx);
    let twice = held.iter().map(|r| r.insn_idx).enumerate().find(is_second);
    let Some((_, insn_idx)) = twice else { return Ok(()) };
    let name = helper.name();
    let text = format!("{name} while holding two references of insn {insn_idx}");
    Err(Fault::new(text).hint(
        "submit the first record before the second is reserved in the loop, or behind \
         bpf_spin_unlock",
    ))
}

/// Whether a global function may be called now: it is verified alone, as if no lock were held,
/// and may take one.
pub(crate) fn check_global_call(state: &State, ops: &[Op]) -> Result<(), Fault> {
    if state.lock().is_some() {
        let text = "global function calls are not allowed while holding a lock, \
                    use static function instead";
        return Err(Fault::new(text));
    }
    // What a tail call leads to may take one as well.
    for helper in [Helper::SpinLock, Helper::TailCall] {
        let id = (helper as u32).cast_signed();
        if ops.iter().any(|op| matches!(op, Op::CallHelper { id: called } if *called == id)) {
            check_records(state, helper)?;
        }
    }
    Ok(())
}

/// The program ends.
pub(crate) fn check_exit(state: &State) -> Result<(), Fault> {
    if state.lock().is_some() {
        let text =
            "BPF_EXIT instruction in main prog cannot be used inside bpf_spin_lock-ed region";
        return Err(Fault::new(text).hint("call bpf_spin_unlock on every path"));
    }
    Ok(())
}

fn mismatch(reg: Reg, value: &Value) -> Fault {
    let (r, found, expected) = (reg.index(), value.type_name(), Arg::Lock.expected());
    Fault::new(format!("R{r} type={found} expected={expected}"))
}
