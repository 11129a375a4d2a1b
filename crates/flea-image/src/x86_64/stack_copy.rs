//! How an exit skeleton hands the caller's stack arguments to the original.
//!
//! Where their number is known, each is pushed again. Of a variadic function nobody knows it:
//! as many as C allows in a call are copied, and where there are fewer, words of the caller's
//! own frame come with them, which the original does not look at. Reading them must not fault,
//! and the stack may end anywhere above the return address (a coroutine's first function, an
//! unmapped page above its stack). The page that holds the return address is there for
//! certain; only if the words go on into the next page, the slow path reads those by a system
//! call, with zeros where there is nothing:
//!
//! ```text
//!   mov [rbp-8], rax                 slow:  mov [rbp-40], rdi      so rsi, rdx, rcx
//!   lea rax, [rbp+8]                        lea rsp, [rsp-8*N]
//!   and eax, 4095                           lea rsi, [rbp+16]
//!   cmp eax, 4088-8*N                       mov rdi, rsp
//!   mov rax, [rbp-8]                        mov ecx, esi
//!   ja  slow                                neg ecx
//!   push [rbp+16+8*i]   N times             and ecx, 4095          up to the page's end
//! copied:                                   mov edx, 8*N             (0 if it ends there)
//!                                           sub edx, ecx           behind it
//!                                           rep movsb
//!                                           xchg rsi, rdx
//!                                           mov rax, flea_probe_read_user
//!                                           call rax               (to, size, from)
//!                                           mov rdi, [rbp-40]      so rsi, rdx, rcx, rax
//!                                           jmp copied
//! ```
//!
//! The frame's words for results and argument registers hold what the slow path changes: the
//! former are not used yet, the latter are those very registers' own.

use flea_symbols::addr::RemoteAddr;
use iced_x86::code_asm::registers::gpr32::{eax, ecx, edx, esi};
use iced_x86::code_asm::{CodeAssembler, ptr, qword_ptr, rax, rbp, rcx, rdi, rdx, rsi, rsp};
use iced_x86::{Code, IcedError};

use super::assemble::{Assembly, Place};

/// Stack words that an exit skeleton copies at most. With the return address below them they
/// are in two pages at most.
pub(crate) const MAX_STACK_WORDS: u32 = PAGE_BYTES / 8 - 1;
const PAGE_BYTES: u32 = 4096;

/// The words of stack arguments that the original is to find above its return address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StackCopy {
    /// So many are there.
    Exactly(u32),
    /// At most so many are there, and what is above them need not be mapped.
    UpTo {
        /// How many are copied. Further ones do not reach the original.
        n_words: u32,
        /// The runtime's `ProbeReadUser`.
        probe_read_user: RemoteAddr,
    },
}

impl StackCopy {
    /// How many words are copied.
    #[must_use]
    pub fn n_words(self) -> u32 {
        match self {
            Self::Exactly(n_words) | Self::UpTo { n_words, .. } => n_words,
        }
    }
}

/// The slow path's ends, before it is emitted.
pub(super) struct Slow {
    n_words: u32,
    probe_read_user: RemoteAddr,
    /// The jump there.
    from: Place,
    /// Where it goes on.
    back: Place,
}

/// Appends the copy. What it returns is for [`emit_slow`], out of the way.
pub(super) fn emit(out: &mut Assembly, copy: StackCopy) -> Result<Option<Slow>, IcedError> {
    let n_words = copy.n_words();
    let mut from = None;
    if let StackCopy::UpTo { .. } = copy {
        code(out, |a| {
            a.mov(qword_ptr(rbp - 8), rax)?;
            a.lea(rax, ptr(rbp + 8))?;
            a.and(eax, (PAGE_BYTES - 1).cast_signed())?;
            a.cmp(eax, (8 * (MAX_STACK_WORDS - n_words)).cast_signed())?;
            a.mov(rax, qword_ptr(rbp - 8))
        })?;
        from = Some(out.here());
        out.branch(Code::Ja_rel32_64, out.here().address())?;
    }
    code(out, |a| (0..n_words).rev().try_for_each(|i| a.push(qword_ptr(rbp + (16 + 8 * i)))))?;
    let StackCopy::UpTo { n_words, probe_read_user } = copy else { return Ok(None) };
    Ok(from.map(|from| Slow { n_words, probe_read_user, from, back: out.here() }))
}

/// Appends the slow path, which nothing runs into.
pub(super) fn emit_slow(out: &mut Assembly, slow: &Slow) -> Result<(), IcedError> {
    let start = out.here().address();
    out.retarget(slow.from, start);
    let n_bytes = 8 * slow.n_words;
    let changed = [(rdi, 40), (rsi, 48), (rdx, 56), (rcx, 64)];
    code(out, |a| {
        changed.iter().try_for_each(|&(r, at)| a.mov(qword_ptr(rbp - at), r))?;
        a.lea(rsp, ptr(rsp - n_bytes))?;
        a.lea(rsi, ptr(rbp + 16))?;
        a.mov(rdi, rsp)?;
        a.mov(ecx, esi)?;
        a.neg(ecx)?;
        a.and(ecx, (PAGE_BYTES - 1).cast_signed())?;
        a.mov(edx, n_bytes)?;
        a.sub(edx, ecx)?;
        a.rep().movsb()?;
        a.xchg(rsi, rdx)?;
        a.mov(rax, slow.probe_read_user.0)?;
        a.call(rax)?;
        changed.iter().try_for_each(|&(r, at)| a.mov(r, qword_ptr(rbp - at)))?;
        a.mov(rax, qword_ptr(rbp - 8))
    })?;
    out.branch(Code::Jmp_rel32_64, slow.back.address())
}

fn code(
    out: &mut Assembly,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut a = CodeAssembler::new(64)?;
    write(&mut a)?;
    a.take_instructions().into_iter().for_each(|insn| out.push(insn));
    Ok(())
}
