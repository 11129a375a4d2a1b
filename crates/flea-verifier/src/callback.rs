//! Calls through the address of a function: `callx`, and helpers that call a function of the
//! program in rounds (`bpf_loop`, `bpf_for_each_map_elem`).
//!
//! A helper's call is verified as what it is, a loop around the call instruction:
//!
//! ```text
//!   call:  either  r0 = how many rounds; go on behind the call
//!          or      r1.. = the round's arguments; run the function; back to `call`
//! ```
//! The machine comes back with the helper's own arguments still in place, so each round is
//! checked against them again. That this ends, for any number of rounds, is
//! [`crate::explore`]'s part.

use flea_object::helper::Helper;
use flea_object::spec::MapIdx;

use crate::call::mismatch;
use crate::cfg::MAX_CALL_DEPTH;
use crate::machine::{Flow, Machine};
use crate::number::scalar::Scalar;
use crate::op::{Reg, unknown_opcode};
use crate::proto::Arg;
use crate::report::Fault;
use crate::state::{Rounds, State};
use crate::value::{Pointer, PointerKind, Value};

/// Rounds of a `bpf_loop` (Linux: BPF_MAX_LOOPS); with more it does nothing at all.
const MAX_LOOPS: u64 = 1 << 23;

/// A helper's function about to run once more.
pub(crate) struct Round {
    pub(crate) start: usize,
    pub(crate) state: Box<State>,
}

/// The function in `value`, for a helper's argument.
pub(crate) fn function(reg: Reg, value: &Value) -> Result<usize, Fault> {
    match value {
        Value::Pointer(Pointer { kind: PointerKind::Function(function), .. }) => Ok(*function),
        _ => Err(mismatch(reg, value, Arg::Callback)
            .hint("pass the name of a static function of this program")),
    }
}

/// What a helper's function is given as its context: an address in a frame, or NULL.
pub(crate) fn context(reg: Reg, value: &Value) -> Result<(), Fault> {
    let on_stack = matches!(
        value,
        Value::Pointer(Pointer { kind: PointerKind::Stack { .. }, or_null: None, .. })
    );
    if on_stack || value.as_const() == Some(0) {
        return Ok(());
    }
    Err(mismatch(reg, value, Arg::CallbackCtx)
        .hint("a callback's context is the address of a local variable, or NULL"))
}

impl Machine<'_> {
    /// One more round of `helper`, called at `idx`. `None` where there is none to come. In
    /// `state` nothing is a round's any more.
    pub(crate) fn round(
        &mut self,
        idx: usize,
        helper: Helper,
        function: usize,
        map: Option<MapIdx>,
        state: &mut State,
    ) -> Result<Option<Round>, Fault> {
        let so_far = state.rounds().unwrap_or(Rounds { root: 0, n_done: 0, n_seen: 0 });
        let [count, context] = [1, 3].map(|n| *state.reg(Reg::arg(n - 1)));
        // Linux inlines the helper so that all 64 bits count.
        let limit = match (helper, count.as_scalar()) {
            (Helper::Loop, Some(count)) => Some(count.wide.umax.min(MAX_LOOPS)),
            _ => None,
        };
        let callback_state = limit.is_none_or(|limit| so_far.n_done < limit).then(|| state.clone());
        state.set_rounds(None);
        let Some(mut inside) = callback_state else { return Ok(None) };
        self.deeper(&inside, function)?;
        self.facts.callback(idx, function);
        let n_done = if limit.is_some() { so_far.n_done + 1 } else { 0 };
        let n_seen = so_far.n_seen.saturating_add(1);
        inside.set_rounds(Some(Rounds { n_done, n_seen, ..so_far }));
        let args = match (helper, map) {
            (Helper::ForEachMapElem, Some(map)) => {
                let element = self.fresh_id();
                [
                    Value::pointer(PointerKind::Map(map)),
                    Value::pointer(PointerKind::MapKey(map)),
                    Value::pointer(self.value_of(map, Some(element))?),
                    context,
                    Value::NotInit,
                ]
            }
            _ => {
                // The number of this round is below the number of rounds.
                let last = i64::try_from(limit.unwrap_or(MAX_LOOPS)).unwrap_or(i64::MAX) - 1;
                let number = Value::scalar(Scalar::signed(0, last));
                [number, context, Value::NotInit, Value::NotInit, Value::NotInit]
            }
        };
        inside.enter_callback(function, idx, args);
        let start = self.cfg.functions[function].start;
        Ok(Some(Round { start, state: Box::new(inside) }))
    }

    /// `callx`: a call if the register holds a function, else no instruction at all.
    pub(crate) fn call_pointer(
        &mut self,
        idx: usize,
        callee: Reg,
        state: &mut State,
    ) -> Result<Flow, Fault> {
        let Value::Pointer(Pointer { kind: PointerKind::Function(function), .. }) =
            *state.reg(callee)
        else {
            return Err(unknown_opcode(flea_object::opcode::CALLX_OP).hint(
                "a call through a register works where it holds a function of this program",
            ));
        };
        self.facts.call_pointer(idx, function);
        self.deeper(state, function)?;
        state.enter(function, idx);
        Ok(Flow::To(self.cfg.functions[function].start))
    }

    /// The current function calls `function`: may it, and who calls whom.
    pub(crate) fn deeper(&mut self, state: &State, function: usize) -> Result<(), Fault> {
        // Where functions have addresses, the shape alone does not say how deep calls go.
        if state.depth() + 1 >= MAX_CALL_DEPTH {
            let frames = MAX_CALL_DEPTH + 1;
            let fault = Fault::new(format!("the call stack of {frames} frames is too deep !"));
            return Err(fault.hint("recursion is not possible; nest fewer calls"));
        }
        self.calls.insert((state.frame().function, function));
        Ok(())
    }
}

/// A helper's function returns: to the call once more.
pub(crate) fn exit(state: &mut State) -> Result<Flow, Fault> {
    let result = state.reg(Reg::R0);
    if *result == Value::NotInit {
        return Err(Fault::not_readable(Reg::R0));
    }
    let Some(set) = result.as_scalar() else {
        return Err(Fault::new("R0 not a scalar value"));
    };
    let (min, max) = (set.wide.smin, set.wide.smax);
    if min < 0 || max > 1 {
        let mut text = String::from("At callback return the register R0 has");
        if min > i64::MIN {
            text.push_str(&format!(" smin={min}"));
        }
        if max < i64::MAX {
            text.push_str(&format!(" smax={max}"));
        }
        if min == i64::MIN && max == i64::MAX {
            text.push_str(" unknown scalar value");
        }
        text.push_str(" should have been in [0, 1]");
        return Err(Fault::new(text).hint("return 0 to go on, 1 to stop"));
    }
    if state.lock().is_some() {
        return Err(Fault::new("bpf_spin_unlock is missing")
            .hint("a callback gives back the lock that it took, in each round"));
    }
    let own = state.references().iter().find(|r| r.callback == state.depth());
    if let Some(held) = own {
        return Err(
            Fault::new(held.unreleased()).hint("a callback gives back what it took, in each round")
        );
    }
    Ok(state.leave().map_or(Flow::End, Flow::To))
}
