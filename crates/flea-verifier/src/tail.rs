//! Tail calls. A program that stands at the index takes the place of the function that calls: a
//! main function's call ends the program, another function's comes back to its caller with the
//! target's result. Where none stands there, the next instruction runs.
//!
//! Which programs there are is not known here, and may change: both ways are followed. A target
//! is verified by itself, with the same context; it sees nothing of the frames below it.

use flea_object::helper::Helper;

use crate::cfg::Cfg;
use crate::lock;
use crate::machine::{Flow, Machine};
use crate::op::{Op, Reg};
use crate::report::Fault;
use crate::state::State;
use crate::value::Value;

/// Stack that the callers of a function with a tail call may have in use: each of 33 tail calls
/// may leave as much behind (Linux: `check_max_stack_depth`).
const MAX_CALLERS_BYTES: u32 = 256;

/// The number of `bpf_tail_call` in an instruction.
pub(crate) const TAIL_CALL: i32 = Helper::TailCall as i32;

impl Machine<'_> {
    /// The tail call at `idx`; `state` becomes that of a call that misses.
    pub(crate) fn tail_call(&mut self, idx: usize, state: &mut State) -> Result<Flow, Fault> {
        if state.innermost_callback() > 0 {
            return Err(Fault::new("tail_call is not allowed in a callback")
                .hint("return 1 from the callback, and make the tail call behind the loop"));
        }
        let mut hit = state.clone();
        self.call_helper(idx, TAIL_CALL, state)?;
        if hit.depth() == 0 {
            if !hit.references().is_empty() {
                return Err(Fault::new("tail_call would lead to reference leak")
                    .hint("submit or discard the record before the call"));
            }
            // A global function's callers take it to return any number as it is.
            if hit.frame().function == 0 {
                self.returns_anything();
            }
            return Ok(Flow::To(idx + 1));
        }
        // The target may take a lock.
        lock::check_records(&hit, Helper::TailCall)?;
        hit.set_reg(Reg::R0, Value::UNKNOWN);
        Ok(match hit.leave() {
            Some(call_idx) => {
                Flow::Both { next: idx + 1, jump: call_idx + 1, jump_state: Box::new(hit) }
            }
            None => Flow::To(idx + 1),
        })
    }
}

/// The callers of functions with tail calls must leave room for what those lead to.
/// `frame_bytes` has each function's own stack.
pub(crate) fn check_callers(
    cfg: &Cfg,
    ops: &[Op],
    frame_bytes: impl Fn(usize) -> u32,
) -> Result<(), (usize, Fault)> {
    let mut callers_bytes = vec![0; cfg.functions.len()];
    for &function in cfg.callees_first.iter().rev() {
        let span = cfg.functions[function];
        let of_callers = callers_bytes[function];
        for op in &ops[span.start..span.end] {
            match op {
                // Who takes a function's address is taken to call it.
                Op::CallLocal { target } | Op::FunctionAddress { target, .. } => {
                    let callee = &mut callers_bytes[cfg.function_at(*target)];
                    *callee = (*callee).max(of_callers + frame_bytes(function));
                }
                Op::CallHelper { id: TAIL_CALL } if of_callers >= MAX_CALLERS_BYTES => {
                    let text = format!(
                        "tail_calls are not allowed when call stack of previous frames is \
                         {of_callers} bytes. Too large"
                    );
                    let fault = Fault::new(text).hint("make the tail call in the main function");
                    return Err((span.start, fault));
                }
                _ => {}
            }
        }
    }
    Ok(())
}
