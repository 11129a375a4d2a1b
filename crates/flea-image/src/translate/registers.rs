//! `struct pt_regs` as uprobe and uretprobe programs see it. No such structure exists in memory:
//! as with `ctx` words, each register is a value made where it is read.
//!
//! ```text
//!   side      rdi..r9        rax, rdx           rsp            rbp          rip        others
//!   entry     parameters     rdx: parameter     body_rbp + 16  [body_rbp]   function   -
//!   session   parameters     rdx: parameter     rbp + 8        [rbp]        function   saves
//!   exit      saves          [rbp-8], [rbp-16]  rbp + 16       [rbp]        [rbp+8]    saves
//! ```
//! At entry they are as at the function's first instruction, at exit as behind its `ret`, where
//! Linux has them. What a user program cannot change, or no calling convention passes to a
//! callee or back, is a constant.

use cranelift_codegen::ir::{InstBuilder, Value};
use flea_symbols::signature::RetWord;

use super::{Side, Translator};
use crate::changes::Changed;
use crate::request::{Saved, When};

/// One word of the structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    /// A general register by its hardware number, neither rsp nor rbp.
    General(u8),
    Rsp,
    Rbp,
    Rip,
    Constant(i64),
}

const RAX: u8 = 0;
const RDX: u8 = 2;
/// Integer argument registers in order: rdi, rsi, rdx, rcx, r8, r9.
pub(crate) const ARGUMENTS: [u8; 6] = [7, 6, RDX, 1, 8, 9];

/// `struct pt_regs` (arch/x86/include/uapi/asm/ptrace.h): r15 r14 r13 r12 rbp rbx r11 r10 r9 r8
/// rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss.
const LAYOUT: [Register; 21] = [
    Register::General(15),
    Register::General(14),
    Register::General(13),
    Register::General(12),
    Register::Rbp,
    Register::General(3),
    Register::General(11),
    Register::General(10),
    Register::General(9),
    Register::General(8),
    Register::General(RAX),
    Register::General(1),
    Register::General(RDX),
    Register::General(6),
    Register::General(7),
    // No system call.
    Register::Constant(-1),
    Register::Rip,
    // 64-bit user code.
    Register::Constant(0x33),
    // IF, and the bit that is always 1: what is set where a program has set nothing.
    Register::Constant(0x202),
    Register::Rsp,
    // User data.
    Register::Constant(0x2b),
];
const _: () = assert!(8 * LAYOUT.len() == flea_verifier::PT_REGS_BYTES as usize);

/// Whether what stands `offset_bytes` into the structure can be known at entry only in the
/// skeleton's frame: a register that is no parameter of the body.
pub(crate) fn is_saved_at_entry(offset_bytes: i32) -> bool {
    match register(offset_bytes.div_euclid(8)) {
        Some(Register::General(reg)) => !ARGUMENTS.contains(&reg),
        _ => false,
    }
}

/// What word `word` of the structure is to a probe that changes it.
pub(crate) fn probed(word: i32) -> Option<Changed> {
    match register(word)? {
        Register::General(RAX) => Some(Changed::Result),
        Register::General(reg) => {
            let i = ARGUMENTS.iter().position(|argument| *argument == reg)?;
            u8::try_from(i).ok().map(Changed::Argument)
        }
        _ => None,
    }
}

fn register(word: i32) -> Option<Register> {
    LAYOUT.get(usize::try_from(word).ok()?).copied()
}

impl Translator<'_, '_> {
    /// Word `word` of `struct pt_regs`. `None` if there is none, or none on this side.
    pub(super) fn register_word(&mut self, word: i32) -> Option<Value> {
        let args = &self.env.args;
        let (side, body_rbp) = (args.side, args.body_rbp()?);
        let rbp = args.skeleton_rbp();
        match register(word)? {
            Register::Constant(value) => Some(self.iconst(value)),
            Register::Rip if side == Side::Exit => self.frame_word(8),
            Register::Rip => Some(self.number(self.env.function_address)),
            Register::Rbp => Some(self.fixed_word(rbp.unwrap_or(body_rbp), 0)),
            Register::Rsp => {
                let (base, offset) = match (side, rbp) {
                    (Side::Exit, Some(rbp)) => (rbp, 16),
                    (_, Some(rbp)) => (rbp, 8),
                    (_, None) => (body_rbp, 16),
                };
                Some(self.b.ins().iadd_imm_s(base, offset))
            }
            Register::General(reg) => self.general(side, reg),
        }
    }

    fn general(&mut self, side: Side, reg: u8) -> Option<Value> {
        match (side, reg) {
            (Side::Exit, RAX) => self.result_word(RetWord::Rax),
            (Side::Exit, RDX) => self.result_word(RetWord::Rdx),
            (Side::Exit, _) => self.saved(When::Exit, Saved::Gpr(reg), 0),
            (Side::Entry | Side::Session, _) => {
                match ARGUMENTS.iter().position(|argument| *argument == reg) {
                    Some(i) => self.integer_argument(i),
                    None => self.saved(When::Entry, Saved::Gpr(reg), 0),
                }
            }
            (Side::Modify | Side::Plain, _) => None,
        }
    }
}
