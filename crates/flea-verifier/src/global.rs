//! Global functions: verified once, for whatever their prototype allows, and not walked into by
//! those who call them, whose arguments are checked against the prototype instead.
//!
//! Why this is sound: a walk of the function alone starts with a state that describes every
//! machine a caller may bring ([`Machine::global_entry`] against `check_param`):
//!
//! 1. a number is any number;
//! 2. memory has the size and alignment of its type, all of it is written, and may be read and
//!    written; that it may be NULL is part of the type unless the callee says it never is;
//! 3. nothing else of the caller can be reached: no other register is set, the frame is new.
//!
//! And the state with which the caller goes on describes every machine that the function may
//! leave: `r0` is any number, `r1` to `r5` are unset, bytes of the stack that were handed over may
//! hold anything. Other memory's content was not known before either. What the function acquires,
//! it has to release, as the main function does: both end at frame 0.

use flea_object::spec::{Param, Prototype};

use crate::access::{self, Access, Given, Request, check_aligned, followable, stack_window};
use crate::lock;
use crate::machine::Machine;
use crate::number::scalar::Scalar;
use crate::op::Reg;
use crate::report::Fault;
use crate::state::State;
use crate::story::Path;
use crate::value::{Pointer, PointerKind, Value};

/// Says of a fault in a global function that it stands alone.
pub(crate) fn with_advice(path: Path<'_>, hint: Option<String>) -> Option<String> {
    let in_global = path.visits.last().is_some_and(|v| v.state.frame_at(0).function > 0);
    if !in_global {
        return hint;
    }
    let alone = "the function is global and so verified for any caller: as a static one it is \
                 verified with what its callers pass";
    Some(hint.map_or_else(|| alone.to_owned(), |hint| format!("{hint}; {alone}")))
}

/// Memory that a global function is handed.
#[derive(Clone, Copy)]
struct Memory {
    size_bytes: u32,
    align_bytes: u32,
    nonnull: bool,
}

impl Machine<'_> {
    /// What global function number `function` starts with.
    pub(crate) fn global_entry(&mut self, function: usize) -> State {
        let mut state = State::of_function(function);
        let params = self.cfg.prototype(function).map_or(&[][..], |p| &p.params);
        for (reg, param) in (0..5).map(Reg::arg).zip(params) {
            let value = match *param {
                Param::Number => Value::UNKNOWN,
                Param::Context => Value::pointer(PointerKind::Ctx),
                Param::Memory { size_bytes, align_bytes, nonnull } => {
                    let kind = PointerKind::Argument { size_bytes, align_bytes };
                    let or_null = (!nonnull).then(|| self.fresh_id());
                    Value::Pointer(Pointer { kind, off: Scalar::constant(0), or_null })
                }
                // No caller gets past its check.
                Param::Unsupported { .. } => Value::NotInit,
            };
            state.set_reg(reg, value);
        }
        state
    }

    /// A call of global function number `function`.
    pub(crate) fn call_global(
        &mut self,
        function: usize,
        prototype: &Prototype,
        state: &mut State,
    ) -> Result<(), Fault> {
        if let Some(result) = &prototype.bad_result {
            let name = self.cfg.global_name(function);
            let text = format!(
                "Global function {name}() doesn't return scalar. Only those are supported."
            );
            return Err(Fault::new(text).hint(format!(
                "it returns {result}; a static function may return anything, as it is verified \
                 with each of its callers"
            )));
        }
        lock::check_global_call(state, self.ops)?;
        self.called.insert(function);
        for (n, param) in prototype.params.iter().enumerate().take(5) {
            let checked = self.check_param(state, n, param);
            checked.map_err(|fault| {
                fault.and_hint(
                    "a global function is verified alone, by the types of its parameters: make it \
                     static to have it verified with what this caller passes",
                )
            })?;
        }
        for reg in (0..5).map(Reg::arg) {
            state.set_reg(reg, Value::NotInit);
        }
        state.set_reg(Reg::R0, Value::UNKNOWN);
        Ok(())
    }

    fn check_param(&mut self, state: &mut State, n: usize, param: &Param) -> Result<(), Fault> {
        let reg = Reg::arg(n);
        let value = *state.reg(reg);
        if value == Value::NotInit {
            return Err(Fault::not_readable(reg));
        }
        match *param {
            Param::Number if value.as_scalar().is_some() => Ok(()),
            Param::Number => Err(Fault::new(format!("R{} is not a scalar", reg.index()))),
            Param::Context => match value {
                Value::Pointer(p) if p.kind == PointerKind::Ctx && p.off.as_const() == Some(0) => {
                    Ok(())
                }
                _ => {
                    let name = value.type_name();
                    let text = format!("arg#{n} expected pointer to ctx, but got {name}");
                    Err(Fault::new(text))
                }
            },
            Param::Memory { size_bytes, align_bytes, nonnull } => {
                let memory = Memory { size_bytes, align_bytes, nonnull };
                self.check_memory(state, n, memory, value)
            }
            Param::Unsupported { ref what } => {
                let text = format!("Arg#{n} type {what} is not supported yet.");
                Err(Fault::new(text).hint("make the function static, or give the argument a type"))
            }
        }
    }

    fn check_memory(
        &mut self,
        state: &mut State,
        n: usize,
        memory: Memory,
        value: Value,
    ) -> Result<(), Fault> {
        let reg = Reg::arg(n);
        // Whether a number is NULL decides.
        self.trail.need(reg);
        let is_null = value.as_const() == Some(0);
        let may_be_null = is_null || matches!(value, Value::Pointer(p) if p.or_null.is_some());
        if may_be_null && memory.nonnull {
            let text = format!("arg#{n} is expected to be non-NULL");
            return Err(Fault::new(text).hint("compare the pointer with NULL first"));
        }
        if is_null {
            return Ok(());
        }
        let value = match value {
            Value::Pointer(p) => Value::Pointer(Pointer { or_null: None, ..p }),
            other => other,
        };
        let p = followable(reg, &value)?;
        if p.kind == PointerKind::Ctx {
            return Err(Fault::new(format!(
                "R{} type=ctx expected=fp, map_value, mem",
                reg.index()
            )));
        }
        check_aligned(&p.off, 0, memory.align_bytes)?;
        if let PointerKind::Argument { align_bytes, .. } = p.kind
            && align_bytes < memory.align_bytes
        {
            let text = format!("misaligned value access size {}", memory.size_bytes);
            return Err(Fault::new(text).hint("its own type says that it may not be aligned"));
        }
        let request = |access| Request { reg, off: 0, size_bytes: memory.size_bytes, access };
        if let PointerKind::Stack { frame } = p.kind {
            let span = stack_window(request(Access::Write), p)?;
            self.touch(state, frame, span);
            let stack = &mut state.frame_at_mut(frame).stack;
            if let Some(spilled) = stack.abstract_pointer(span) {
                let name = spilled.type_name();
                return Err(Fault::new(format!("R{} leaks addr of {name}", reg.index())));
            }
            stack.check_written(span)?;
            return match p.off.as_const() {
                Some(_) => stack.store_anything(span),
                None => stack.store_somewhere(span, None),
            };
        }
        for access in [Access::Read, Access::Write] {
            // Memory of the target's own is never written, so it fails here.
            access::check(
                request(access),
                p,
                self.maps,
                Given::read_only(self.context),
                self.types(),
            )?;
        }
        Ok(())
    }
}
