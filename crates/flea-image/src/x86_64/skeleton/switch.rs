//! How a skeleton that nobody enters any more is made to jump over the exit bodies of a
//! controller that has gone, while calls are still inside the original.
//!
//! They may be there for hours, and when they return, the programs and their maps are not there
//! any more. Each exit body has five bytes that can be swapped for a jump, as at a site:
//!
//! ```text
//!   one exit body                           several
//!     call original                           call original
//!     mov  [rsp-8], rbp    jmp drained        mov  [rsp-8], rbp
//!     mov  [rbp-8], rax...                    mov  [rbp-8], rax...
//!     exit body                               nop5                   jmp 1f
//!     leave                                   exit body
//!     ret                                   1:
//!   drained:                                  nop5                   jmp 2f
//!     mov  [rsp-8], rbp                       exit body
//!     leave                                 2:
//!     ret                                     leave
//!                                             ret
//! ```
//!
//! With one body, the instruction at the return address serves, which is five bytes long: it
//! costs nothing. With several, the others' programs still run.

use flea_symbols::addr::RemoteAddr;
use iced_x86::code_asm::{qword_ptr, rbp, rsp};

use super::super::assemble::{Encoded, Place};
use super::super::relocate;
use super::{BodyRef, Emitter, LinkError, PATCH_BYTES, SkeletonBody, rel32};
use crate::changes::Changes;

const NOP5: [u8; PATCH_BYTES] = [0x0f, 0x1f, 0x44, 0x00, 0x00];
const RET: u8 = 0xc3;

/// The change that makes a skeleton jump over one exit body: one for `flea_patch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switch {
    /// Whose, an index into [`super::SkeletonRequest::bodies`].
    pub body: usize,
    /// Where: one instruction.
    pub at: RemoteAddr,
    /// What is there.
    pub expected: [u8; PATCH_BYTES],
    /// The jump.
    pub new: [u8; PATCH_BYTES],
    /// Where a thread goes on that arrives while the bytes change.
    pub trap_to: RemoteAddr,
}

/// A [`Switch`] before its addresses are known.
#[derive(Clone, Copy)]
pub(super) struct SwitchPlaces {
    body: usize,
    at: Place,
    to: Place,
    trap_to: Place,
}

impl Emitter<'_> {
    /// The exit bodies, newest first. Returns the one whose switch is at the return address, if
    /// it is the only one.
    pub(super) fn exit_bodies(&mut self) -> Result<Option<usize>, LinkError> {
        let bodies = self.request.bodies;
        let with_switch = |body: &SkeletonBody<'_>| body.exit.is_some_and(|exit| !is_empty(exit));
        let alone = bodies.iter().filter(|body| with_switch(body)).count() == 1;
        for (i, body) in bodies.iter().enumerate() {
            if alone || !with_switch(body) {
                self.exit_body(body)?;
                continue;
            }
            let at = self.asm.here();
            let nop = relocate::decode(&NOP5, 0).map_err(LinkError::Inline)?;
            nop.into_iter().for_each(|insn| self.asm.push(insn));
            let trap_to = self.asm.here();
            self.exit_body(body)?;
            // A thread that arrives meanwhile may run it once more: what is behind it may be
            // about to change as well.
            self.switches.push(SwitchPlaces { body: i, at, to: self.asm.here(), trap_to });
        }
        Ok(bodies.iter().position(with_switch).filter(|_| alone))
    }

    fn exit_body(&mut self, body: &SkeletonBody<'_>) -> Result<(), LinkError> {
        let changes = Changes { args: 0, ..body.changes };
        self.changing_body(body.exit, changes)?;
        self.changed_result(changes)
    }

    /// What the only exit body's switch leads to.
    pub(super) fn drained(&mut self, body: Option<usize>) -> Result<(), LinkError> {
        let (Some(body), Some(at)) = (body, self.returns_to) else { return Ok(()) };
        let to = self.asm.here();
        self.switches.push(SwitchPlaces { body, at, to, trap_to: to });
        self.code(|a| a.mov(qword_ptr(rsp - 8), rbp))?;
        self.give_back()?;
        self.code(|a| {
            a.leave()?;
            a.ret()
        })
    }

    pub(super) fn switches(&self, encoded: &Encoded) -> Result<Vec<Switch>, LinkError> {
        self.switches.iter().map(|places| self.switch(encoded, places)).collect()
    }

    fn switch(&self, encoded: &Encoded, places: &SwitchPlaces) -> Result<Switch, LinkError> {
        let address = self.request.image_address;
        let offset = |place| self.offset(encoded, place);
        let (from, behind) = (offset(places.at)?, offset(places.at.later(1))?);
        let addr = |offset: u32| address.offset(i64::from(offset));
        let (at, to) = (addr(from), addr(offset(places.to)?));
        let bytes = encoded.bytes.get(from as usize..behind as usize);
        let expected = bytes.and_then(|bytes| bytes.try_into().ok());
        let new = rel32(0xe9, at, to).ok_or(LinkError::OutOfReach { from: at, to })?;
        Ok(Switch {
            body: places.body,
            at,
            expected: expected.ok_or_else(|| LinkError::Encode {
                image_address: address,
                message: format!("the instruction at {at} is not as long as a jump"),
            })?,
            new,
            trap_to: addr(offset(places.trap_to)?),
        })
    }
}

/// A body that does nothing leaves no instruction to jump over.
fn is_empty(exit: BodyRef<'_>) -> bool {
    matches!(exit, BodyRef::Inline([RET]))
}
