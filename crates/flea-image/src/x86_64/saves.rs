//! Stores machine state into the frame words of the body that asked for it.
//!
//! ```text
//!   Gpr(3)                      mov [rbp-152-8*word], rbx
//!   Vector { reg: 1, 2 words }  movups [rbp-152-8*word], xmm1
//!   Vector { reg: 1, 4 or 8 }   vmovups [rbp-152-8*word], ymm1 or zmm1
//!   X87 { reg: 0 }              mov qword [rbp-152-8*(word-1)], 0
//!                               fld st0
//!                               fstp tbyte [rbp-152-8*word]
//! ```
//! Stores only: no register, no flag, and the x87 stack is as deep as before. `fld` needs a
//! free x87 register; at a function's return at most two are taken.

use iced_x86::IcedError;
use iced_x86::code_asm::{
    AsmRegister64, AsmRegisterXmm, AsmRegisterYmm, AsmRegisterZmm, CodeAssembler, ptr, qword_ptr,
    r8, r9, r10, r11, r12, r13, r14, r15, rax, rbp, rbx, rcx, rdi, rdx, rsi, rsp, st0, st1,
    tbyte_ptr, xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7, ymm0, ymm1, ymm2, ymm3, ymm4, ymm5,
    ymm6, ymm7, zmm0, zmm1, zmm2, zmm3, zmm4, zmm5, zmm6, zmm7,
};

use crate::request::{Save, Saved};

/// By hardware number.
const GPRS: [AsmRegister64; 16] =
    [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
const XMMS: [AsmRegisterXmm; 8] = [xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7];
const YMMS: [AsmRegisterYmm; 8] = [ymm0, ymm1, ymm2, ymm3, ymm4, ymm5, ymm6, ymm7];
const ZMMS: [AsmRegisterZmm; 8] = [zmm0, zmm1, zmm2, zmm3, zmm4, zmm5, zmm6, zmm7];

/// Stores `save`, which [`Save::fits`], for a body whose words start at `frame_offset`.
pub(super) fn emit(a: &mut CodeAssembler, save: Save, frame_offset: u32) -> Result<(), IcedError> {
    let below_rbp = frame_offset + 8 * save.word;
    let at = rbp - below_rbp;
    match save.what {
        Saved::Gpr(reg) => a.mov(ptr(at), GPRS[usize::from(reg & 15)]),
        Saved::Vector { reg, n_words } => {
            let reg = usize::from(reg & 7);
            match n_words {
                2 => a.movups(ptr(at), XMMS[reg]),
                4 => a.vmovups(ptr(at), YMMS[reg]),
                _ => a.vmovups(ptr(at), ZMMS[reg]),
            }
        }
        Saved::X87 { reg } => {
            a.mov(qword_ptr(rbp - (below_rbp - 8)), 0)?;
            a.fld(if reg == 0 { st0 } else { st1 })?;
            a.fstp(tbyte_ptr(at))
        }
    }
}
