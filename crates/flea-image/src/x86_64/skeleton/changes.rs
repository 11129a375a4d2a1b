//! The parts of a skeleton that make true what programs have changed.
//!
//! ```text
//!   session body                   may store to [rbp-40-8*i]
//!   mov   rdi, [rbp-40]            each argument register that it may change
//!   ...                            the next session body, modify bodies, `call original`
//!   exit body                      may store to [rbp-8]
//!   mov   rax, [rbp-8]
//!   ...                            the next exit body
//!   cmp   rdi, [rbp-40]            each argument register that was changed
//!   cmove rdi, [rbp-152-8*w]       what the caller had there: a save of the body
//!   leave
//!   ret
//! ```
//!
//! A caller that was compiled with the function (gcc's -fipa-ra) goes on using argument registers
//! that the function is known to leave alone. So where the original has left what it was given,
//! the caller gets back what it gave; anything else is the original's, which may be of a language
//! that returns values there.

use flea_symbols::signature::ArgWord;
use iced_x86::code_asm::{AsmRegister64, ptr, qword_ptr, r8, r9, rax, rbp, rcx, rdi, rdx, rsi};

use super::{Emitter, LinkError, SkeletonBody};
use crate::changes::Changes;
use crate::request::{Saved, When};
use crate::translate::ARGUMENTS;

/// Integer argument registers in order.
const REGISTERS: [AsmRegister64; 6] = [rdi, rsi, rdx, rcx, r8, r9];
/// rdx, which may be a result.
const RDX_ARGUMENT: u8 = 2;

/// Where the frame has integer argument `i`.
fn below_rbp(i: u8) -> u32 {
    40 + 8 * u32::from(i)
}

/// Where the frame has what the caller passed in integer argument `i`, for a body that changes it.
fn saved_below_rbp(body: &SkeletonBody<'_>, i: u8) -> Option<u32> {
    let what = Saved::Gpr(*ARGUMENTS.get(usize::from(i))?);
    let save = body.saves.iter().find(|s| s.when == When::Entry && s.what == what)?;
    Some(body.frame_offset + 8 * save.word)
}

/// What `body` changes that the skeleton cannot make true, or not take back behind the call.
pub(super) fn check(body: &SkeletonBody<'_>) -> Result<(), LinkError> {
    let Changes { args, result } = body.changes;
    if args >> REGISTERS.len() != 0 {
        return Err(LinkError::NoSuchRegister(ArgWord::Gpr(args.ilog2().try_into().unwrap_or(0))));
    }
    if (args != 0 && body.session.is_none()) || (result && body.exit.is_none()) {
        return Err(LinkError::NobodyChanges(body.changes));
    }
    let is_lost = |i: &u8| *i != RDX_ARGUMENT && saved_below_rbp(body, *i).is_none();
    match body.changes.arguments().find(is_lost) {
        Some(i) => Err(LinkError::NotGivenBack(ArgWord::Gpr(i))),
        None => Ok(()),
    }
}

impl Emitter<'_> {
    /// Behind a session body: the arguments that it may have changed.
    pub(super) fn changed_arguments(&mut self, changes: Changes) -> Result<(), LinkError> {
        for i in changes.arguments() {
            let register = REGISTERS[usize::from(i)];
            self.code(|a| a.mov(register, qword_ptr(rbp - below_rbp(i))))?;
        }
        Ok(())
    }

    /// Behind an exit body: the result, if it may have changed it.
    pub(super) fn changed_result(&mut self, changes: Changes) -> Result<(), LinkError> {
        if changes.result { self.code(|a| a.mov(rax, qword_ptr(rbp - 8))) } else { Ok(()) }
    }

    /// Right before `leave`: the arguments as the caller left them, where the original has not
    /// touched what it was given.
    pub(super) fn give_back(&mut self) -> Result<(), LinkError> {
        for i in 0..6u8 {
            let mut changers = self.request.bodies.iter().filter(|b| b.changes.args >> i & 1 != 0);
            let Some(saved) = changers.find_map(|body| saved_below_rbp(body, i)) else { continue };
            let register = REGISTERS[usize::from(i)];
            self.code(|a| {
                a.cmp(register, qword_ptr(rbp - below_rbp(i)))?;
                a.cmove(register, ptr(rbp - saved))
            })?;
        }
        Ok(())
    }
}
