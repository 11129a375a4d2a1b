//! The part of a skeleton that skips the original where an fmod_ret program says so.
//!
//! ```text
//!   mov  qword [rbp-8], 0
//!   modify body                    leaves 0 or the result at [rbp-8]
//!   cmp  qword [rbp-8], 0
//!   jne  skipped
//!   ...                            the other controllers' bodies, then `call original`
//! returned:
//!   ...                            exit bodies, which see the result as usual
//! skipped:                         out of line
//!   mov  rax, [rbp-8]              movq xmm0, [rbp-8]; nothing where nothing is returned
//!   jmp  returned
//! ```
//!
//! The word is that of the result rax, which has its value only later. On both ways the result is
//! in its registers at `returned`, so the common way loads nothing. `rsp` is the same on both.

use iced_x86::Code;
use iced_x86::code_asm::{qword_ptr, rax, rbp, xmm0};

use super::super::assemble::Place;
use super::{Emitter, LinkError};
use crate::skip::SkipResult;

impl Emitter<'_> {
    /// The modify bodies, newest first. Returns the jumps that are to lead to `skipped`.
    pub(super) fn modify_bodies(&mut self) -> Result<Vec<Place>, LinkError> {
        let mut jumps = Vec::new();
        let request = self.request;
        if request.bodies.iter().all(|body| body.modify.is_none()) {
            return Ok(jumps);
        }
        self.code(|a| a.mov(qword_ptr(rbp - 8), 0))?;
        for modify in request.bodies.iter().map(|body| body.modify).filter(Option::is_some) {
            self.framed_body(modify)?;
            if request.skip.is_some() {
                self.code(|a| a.cmp(qword_ptr(rbp - 8), 0))?;
                jumps.push(self.asm.here());
                self.branch(Code::Jne_rel32_64, 0)?;
            }
        }
        Ok(jumps)
    }

    /// Where `jumps` lead: loads the result and goes to `returned`.
    pub(super) fn skipped(&mut self, jumps: &[Place], returned: Place) -> Result<(), LinkError> {
        let (Some(result), false) = (self.request.skip, jumps.is_empty()) else { return Ok(()) };
        let here = self.asm.here().address();
        jumps.iter().for_each(|jump| self.asm.retarget(*jump, here));
        match result {
            SkipResult::Nowhere => {}
            SkipResult::Rax => self.code(|a| a.mov(rax, qword_ptr(rbp - 8)))?,
            SkipResult::Xmm0 => self.code(|a| a.movq(xmm0, qword_ptr(rbp - 8)))?,
        }
        self.branch(Code::Jmp_rel32_64, returned.address())
    }
}
