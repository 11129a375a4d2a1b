//! The personality of exit skeletons' frames: what an unwinder calls when an exception leaves
//! one, after it was caught further up.
//!
//! A skeleton overwrites the return address that its `call original` pushed, because whoever
//! wants to free the skeleton looks for that word in the target's memory. A frame that an
//! exception leaves has no chance to, so this does it:
//!
//! ```text
//!   endbr64
//!   mov   eax, 8                   _URC_CONTINUE_UNWIND: there is no handler here
//!   mov   r9, [r8+152]             context->ra: where we are
//!   mov   r11, arena's start
//!   cmp   r9, r11
//!   jb    done
//!   mov   r11, arena's end
//!   cmp   r9, r11
//!   jae   done
//!   and   qword [r8+152], 0        of which `uw_update_context` would leave a copy
//!   test  esi, 2                   _UA_CLEANUP_PHASE: the frame is being left
//!   je    done
//!   mov   r10, [r8+144]            context->cfa: the original's frame begins here
//!   cmp   [r10-8], r9              its return address
//!   jne   done
//!   and   qword [r10-8], 0
//! done:
//!   ret
//! ```
//!
//! `struct _Unwind_Context` is libgcc's own (libgcc/unwind-dw2.c), the same on x86-64 since gcc
//! 4: `void *reg[18]; void *cfa; void *ra; ...`. The personality is called for frames in the
//! arena alone, so where `ra` is not found to be in it, the layout is another one, and nothing
//! is touched: then the skeleton is kept for longer than is needed. After a personality has
//! said to go on, libgcc sets `ra` to the next frame's without looking at it, in both phases.

use flea_symbols::addr::RemoteAddr;
use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, eax, esi, qword_ptr, r8, r9, r10, r11};

/// `offsetof(struct _Unwind_Context, cfa)`
const CONTEXT_CFA: u32 = 144;
/// `offsetof(struct _Unwind_Context, ra)`
const CONTEXT_RA: u32 = 152;
/// `_URC_CONTINUE_UNWIND`
const CONTINUE_UNWIND: u32 = 8;
/// `_UA_CLEANUP_PHASE`
const CLEANUP_PHASE: u32 = 2;

/// For an arena; can be placed anywhere.
pub(crate) fn code(start: RemoteAddr, end: RemoteAddr) -> Vec<u8> {
    assemble(start, end).expect("fixed instructions encode")
}

fn assemble(start: RemoteAddr, end: RemoteAddr) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut done = a.create_label();
    a.endbr64()?;
    a.mov(eax, CONTINUE_UNWIND)?;
    a.mov(r9, qword_ptr(r8 + CONTEXT_RA))?;
    a.mov(r11, start.0)?;
    a.cmp(r9, r11)?;
    a.jb(done)?;
    a.mov(r11, end.0)?;
    a.cmp(r9, r11)?;
    a.jae(done)?;
    a.and(qword_ptr(r8 + CONTEXT_RA), 0)?;
    a.test(esi, CLEANUP_PHASE)?;
    a.je(done)?;
    a.mov(r10, qword_ptr(r8 + CONTEXT_CFA))?;
    a.cmp(qword_ptr(r10 - 8), r9)?;
    a.jne(done)?;
    a.and(qword_ptr(r10 - 8), 0)?;
    a.set_label(&mut done)?;
    a.ret()?;
    a.assemble(0)
}
