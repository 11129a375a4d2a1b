//! What is put in front of an unwinder's `_Unwind_Find_FDE`, so that exceptions pass through
//! the frames of exit skeletons.
//!
//! libgcc asks `const fde *_Unwind_Find_FDE(void *pc, struct dwarf_eh_bases *bases)` for every
//! frame (gcc, libgcc/unwind-dw2.c, `uw_frame_state_for`), with the return address less one,
//! so `pc` is the last byte of a call. Where that call is a skeleton's `call original`, the
//! answer is the one row that all skeletons have ([`crate::unwind`]); all else is the
//! original's to answer. It has to be exact: anywhere else in our code `rbp` is whatever the
//! traced program keeps in it, and an unwinder that took it for a frame would read from there.
//!
//! A `call original` is known by the word in front of its target, `MARKER`, which nothing
//! else has and nobody executes. No list of call sites is needed, and skeletons come and go
//! without touching the unwinder again; only a new code arena does.
//!
//! ```text
//!   for each arena:                          rdi = pc, rsi = bases
//!     mov  r11, arena's start + 8
//!     cmp  rdi, r11
//!     jb   next
//!     mov  r11, arena's end
//!     cmp  rdi, r11
//!     jae  next
//!     cmp  byte [rdi-4], 0xe8                a call whose last byte is at pc ...
//!     jne  next
//!     movsxd rax, dword [rdi-3]
//!     lea  rax, [rdi+rax+1]                  ... leads to rax ...
//!     cmp  rax, r11
//!     jae  next
//!     mov  r11, arena's start + 8
//!     cmp  rax, r11
//!     jb   next
//!     mov  r11, MARKER                       ... which is an original
//!     cmp  [rax-8], r11
//!     jne  next
//!     mov  rax, arena's start
//!     mov  [rsi+16], rax                     bases->func
//!     xor  eax, eax
//!     mov  [rsi], rax                        bases->tbase
//!     mov  [rsi+8], rax                      bases->dbase
//!     mov  rax, fde
//!     ret
//!   next:
//! ```
//!
//! Where no libgcc is loaded yet, the loader is told instead, which a libgcc that comes later
//! asks: `int _dl_find_object(void *pc, struct dl_find_object *result)` of glibc 2.35, with the
//! same `pc`. Then the answer is
//!
//! ```text
//!     xor  eax, eax                          found
//!     mov  [rsi], rax                        result->dlfo_flags
//!     mov  r11, arena's start
//!     mov  [rsi+8], r11                      result->dlfo_map_start
//!     mov  r11, arena's end
//!     mov  [rsi+16], r11                     result->dlfo_map_end
//!     mov  [rsi+24], rax                     result->dlfo_link_map: there is none
//!     mov  r11, header
//!     mov  [rsi+32], r11                     result->dlfo_eh_frame
//!     ret
//! ```
//!
//! It changes `rax`, `r11` and flags, which a callee may. Every byte it reads is in the arena.

use flea_symbols::addr::RemoteAddr;
use iced_x86::code_asm::{
    CodeAssembler, byte_ptr, dword_ptr, eax, ptr, qword_ptr, r11, rax, rdi, rsi,
};
use iced_x86::{Code, IcedError};

use super::assemble::Assembly;
use crate::unwind::{FDE_OFFSET, HEADER_OFFSET};

/// An 8-byte nop in front of what an exit skeleton calls: `nopl "flea"(%rax,%rax)`.
pub(crate) const MARKER: [u8; 8] = *b"\x0f\x1f\x84\x00flea";

/// A code arena and the row for its exit skeletons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameArena {
    /// Its first byte.
    pub start: RemoteAddr,
    /// One past its last byte.
    pub end: RemoteAddr,
    /// Where [`crate::unwind::frame_arena_rows`] was placed.
    pub rows: RemoteAddr,
}

/// What a function is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// The row of an address: libgcc's `_Unwind_Find_FDE`.
    Row,
    /// The object that an address lies in: glibc's `_dl_find_object`.
    Object,
}

/// Appends the answers for `arenas`. Behind them goes what answers for everything else.
pub(crate) fn emit(
    out: &mut Assembly,
    question: Question,
    arenas: &[FrameArena],
) -> Result<(), IcedError> {
    for arena in arenas {
        let mut block = Block { out, to_next: Vec::new() };
        let lowest = arena.start.0.saturating_add(8);
        block.code(|a| a.mov(r11, lowest).and_then(|()| a.cmp(rdi, r11)))?;
        block.next_if(Code::Jb_rel32_64)?;
        block.code(|a| a.mov(r11, arena.end.0).and_then(|()| a.cmp(rdi, r11)))?;
        block.next_if(Code::Jae_rel32_64)?;
        block.code(|a| a.cmp(byte_ptr(rdi - 4), 0xe8u32))?;
        block.next_if(Code::Jne_rel32_64)?;
        block.code(|a| {
            a.movsxd(rax, dword_ptr(rdi - 3))?;
            a.lea(rax, ptr(rdi + rax + 1))?;
            a.cmp(rax, r11)
        })?;
        block.next_if(Code::Jae_rel32_64)?;
        block.code(|a| a.mov(r11, lowest).and_then(|()| a.cmp(rax, r11)))?;
        block.next_if(Code::Jb_rel32_64)?;
        block.code(|a| {
            a.mov(r11, u64::from_le_bytes(MARKER))?;
            a.cmp(qword_ptr(rax - 8), r11)
        })?;
        block.next_if(Code::Jne_rel32_64)?;
        block.code(|a| match question {
            Question::Row => answer_row(a, *arena),
            Question::Object => answer_object(a, *arena),
        })?;
        block.end();
    }
    Ok(())
}

fn answer_row(a: &mut CodeAssembler, arena: FrameArena) -> Result<(), IcedError> {
    a.mov(rax, arena.start.0)?;
    a.mov(qword_ptr(rsi + 16), rax)?;
    a.xor(eax, eax)?;
    a.mov(qword_ptr(rsi), rax)?;
    a.mov(qword_ptr(rsi + 8), rax)?;
    a.mov(rax, arena.rows.0 + FDE_OFFSET as u64)?;
    a.ret()
}

fn answer_object(a: &mut CodeAssembler, arena: FrameArena) -> Result<(), IcedError> {
    a.xor(eax, eax)?;
    a.mov(qword_ptr(rsi), rax)?;
    a.mov(r11, arena.start.0)?;
    a.mov(qword_ptr(rsi + 8), r11)?;
    a.mov(r11, arena.end.0)?;
    a.mov(qword_ptr(rsi + 16), r11)?;
    a.mov(qword_ptr(rsi + 24), rax)?;
    a.mov(r11, arena.rows.0 + HEADER_OFFSET as u64)?;
    a.mov(qword_ptr(rsi + 32), r11)?;
    a.ret()
}

/// One arena's instructions.
struct Block<'a> {
    out: &'a mut Assembly,
    to_next: Vec<super::assemble::Place>,
}

impl Block<'_> {
    fn code(
        &mut self,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Result<(), IcedError> {
        let mut assembler = CodeAssembler::new(64)?;
        write(&mut assembler)?;
        assembler.take_instructions().into_iter().for_each(|insn| self.out.push(insn));
        Ok(())
    }

    fn next_if(&mut self, code: Code) -> Result<(), IcedError> {
        self.to_next.push(self.out.here());
        self.out.branch(code, 0)
    }

    fn end(self) {
        let next = self.out.here().address();
        for place in self.to_next {
            self.out.retarget(place, next);
        }
    }
}
