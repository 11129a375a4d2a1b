//! What an exit skeleton hands on of its caller's stack, on stacks that end wherever they like.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use flea_image::{
    BodyRef, Changes, Reads, SiteKind, SkeletonBody, SkeletonRequest, StackCopy, link_skeleton,
};
use flea_symbols::addr::RemoteAddr;
use iced_x86::code_asm::*;
use support::Pages;
use support::rig::assemble;

const PAGE: usize = 4096;
const IMAGE: usize = PAGE;
const BODY: usize = 2 * PAGE;
const PROBE: usize = 2 * PAGE + 256;
const HARNESS: usize = 2 * PAGE + 1024;
const CODE_BYTES: usize = 3 * PAGE;
/// Two pages of stack for the skeleton below the page that the caller's words are in.
const STACK_PAGES: usize = 3;
/// With the page behind the end.
const STACK_BYTES: usize = (STACK_PAGES + 1) * PAGE;
/// Registers that the callee stores in front of the stack words.
const SEEN: [AsmRegister64; 8] = [rax, rcx, rdx, rsi, r8, r9, r10, r11];
const N_SEEN: usize = SEEN.len();

/// What the callee sees, and what the skeleton did for it.
#[repr(C)]
struct Out {
    registers: [u64; N_SEEN],
    words: [u64; 512],
    callee_rsp: u64,
    n_probes: u64,
    back: [u64; 3],
}

/// `fn(out, rsp, target)`: calls `target(out)` on another stack, all registers known.
fn harness(at: u64) -> Vec<u8> {
    assemble(at, |a| {
        for r in [rbx, rbp, r12, r13] {
            a.push(r)?;
        }
        a.mov(rbx, rsp)?;
        a.mov(r12, rdx)?;
        a.mov(r13, rdi)?;
        a.mov(rsp, rsi)?;
        for (i, r) in (1u64..).zip(SEEN) {
            a.mov(r, 0x1111_0000_0000 * i)?;
        }
        a.mov(rbp, 0x2222_0000u64)?;
        a.call(r12)?;
        let back = std::mem::offset_of!(Out, back) as u64;
        for (i, r) in (0..).zip([rax, rbp, rsp]) {
            a.mov(qword_ptr(r13 + back + 8 * i), r)?;
        }
        a.mov(rsp, rbx)?;
        for r in [r13, r12, rbp, rbx] {
            a.pop(r)?;
        }
        a.ret()
    })
}

/// `fn(out)`: stores what it sees, returns 77.
fn callee(at: u64, n_words: u32) -> Vec<u8> {
    assemble(at, |a| {
        a.db(&[0x0f, 0x1f, 0x44, 0x00, 0x00])?;
        for (i, r) in (0..).zip(SEEN) {
            a.mov(qword_ptr(rdi + 8 * i), r)?;
        }
        a.mov(qword_ptr(rdi + std::mem::offset_of!(Out, callee_rsp) as u64), rsp)?;
        a.lea(rsi, ptr(rsp + 8))?;
        a.add(rdi, 8 * N_SEEN as i32)?;
        a.mov(ecx, n_words)?;
        a.rep().movsq()?;
        a.mov(eax, 77)?;
        a.ret()
    })
}

/// `flea_probe_read_user`: keeps all registers but rax, zeros where nothing can be read. Counts
/// in `n_probes`.
fn probe(at: u64, n_probes: u64) -> Vec<u8> {
    assemble(at, |a| {
        let kept = [rcx, rdx, rsi, rdi, r8, r9, r10, r11];
        kept.iter().try_for_each(|&r| a.push(r))?;
        let mut done = a.create_label();
        a.mov(rax, n_probes)?;
        a.inc(qword_ptr(rax))?;
        a.push(rsi)?;
        a.push(rdx)?;
        a.push(rsi)?;
        a.push(rdi)?;
        a.mov(rdi, u64::from(std::process::id()))?;
        a.mov(rsi, rsp)?;
        a.mov(edx, 1)?;
        a.lea(r10, ptr(rsp + 16))?;
        a.mov(r8d, 1)?;
        a.xor(r9d, r9d)?;
        a.mov(eax, libc::SYS_process_vm_readv as i32)?;
        a.syscall()?;
        a.pop(rdi)?;
        a.pop(rcx)?;
        a.add(rsp, 16)?;
        a.cmp(rax, rcx)?;
        a.je(done)?;
        a.xor(eax, eax)?;
        a.rep().stosb()?;
        a.set_label(&mut done)?;
        kept.iter().rev().try_for_each(|&r| a.pop(r))?;
        a.ret()
    })
}

struct Rig {
    code: Pages,
    stack: Pages,
    out: Box<Out>,
}

impl Rig {
    fn new(n_words: u32, up_to: bool, align_bytes: u32) -> Self {
        let (code, stack) = (Pages::new(CODE_BYTES), Pages::new(STACK_BYTES));
        let zero = Out {
            registers: [0; N_SEEN],
            words: [0; 512],
            callee_rsp: 0,
            n_probes: 0,
            back: [0; 3],
        };
        let mut out = Box::new(zero);
        let at = |offset: usize| RemoteAddr(code.address() + offset as u64);
        let function = callee(at(0).0, n_words);
        let stack_copy = match up_to {
            true => StackCopy::UpTo { n_words, probe_read_user: at(PROBE) },
            false => StackCopy::Exactly(n_words),
        };
        let bodies = [SkeletonBody {
            entry: None,
            session: Some(BodyRef::Call(at(BODY))),
            modify: None,
            exit: Some(BodyRef::Call(at(BODY))),
            reads: &Reads::default(),
            saves: &[],
            changes: Changes::NONE,
            frame_words: 0,
            frame_offset: 0,
        }];
        let skeleton = link_skeleton(&SkeletonRequest {
            site: at(0),
            replaced: &function[..5],
            kind: SiteKind::Nops,
            image_address: at(IMAGE),
            bodies: &bodies,
            skip: None,
            stack_copy,
            stack_align_bytes: align_bytes,
            replacement: None,
        })
        .unwrap();
        assert!(skeleton.bytes.len() <= BODY - IMAGE);
        code.write(0, &function);
        code.write(0, &skeleton.site_patch);
        code.write(IMAGE, &skeleton.bytes);
        code.write(BODY, &[0xc3]);
        code.write(PROBE, &probe(at(PROBE).0, &raw mut out.n_probes as u64));
        code.write(HARNESS, &harness(at(HARNESS).0));
        code.executable();
        Self { code, stack, out }
    }

    /// Every word of so many bytes of the stack says where it is: a call has written there.
    fn fill(&self, n_bytes: usize) {
        for offset in (0..n_bytes).step_by(8) {
            self.stack.write(offset, &word(offset).to_le_bytes());
        }
    }

    fn end(&self) -> u64 {
        self.stack.address() + (STACK_PAGES * PAGE) as u64
    }

    /// The page behind the end is there, or is not.
    fn map_behind(&self, mapped: bool) {
        let rights = if mapped { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_NONE };
        // SAFETY: the last page of our own mapping.
        let failed = unsafe { libc::mprotect(self.end() as *mut _, PAGE, rights) };
        assert_eq!(failed, 0);
    }

    /// Calls with the first stack argument at `cfa`.
    fn call(&mut self, cfa: u64) {
        // SAFETY: the harness has this type, keeps what the ABI says and runs on our stack.
        let harness: extern "sysv64" fn(*mut Out, u64, u64) =
            unsafe { std::mem::transmute(self.code.address() + HARNESS as u64) };
        harness(&raw mut *self.out, cfa, self.code.address());
        assert_eq!(self.out.back, [77, 0x2222_0000, cfa], "rax, rbp, rsp behind the call");
        let expected: Vec<u64> = (1..=N_SEEN as u64).map(|i| 0x1111_0000_0000 * i).collect();
        assert_eq!(self.out.registers, *expected, "registers in the callee");
    }
}

/// What stands at this offset of the stack.
fn word(offset: usize) -> u64 {
    0xabc0_0000_0000 + offset as u64
}

fn expected(n_words: u32, cfa_offset: usize, n_mapped: usize) -> Vec<u64> {
    let at = (0..n_words as usize).map(|i| cfa_offset + 8 * i);
    at.map(|offset| if offset < n_mapped { word(offset) } else { 0 }).collect()
}

/// At each position in a page: words up to the end of the stack arrive, none is read behind it.
#[test]
fn a_stack_may_end_at_any_word() {
    for n_words in [128, 1, 300, 511] {
        let mut rig = Rig::new(n_words, true, 16);
        for mapped in [true, false] {
            rig.map_behind(mapped);
            let n_mapped = (STACK_PAGES + usize::from(mapped)) * PAGE;
            let mut n_probes = 0;
            // From the first position of the last page to none left of it.
            for cfa in (rig.end() - PAGE as u64..=rig.end()).step_by(16) {
                rig.fill(n_mapped);
                rig.call(cfa);
                let cfa_offset = (cfa - rig.stack.address()) as usize;
                let words = &rig.out.words[..n_words as usize];
                assert_eq!(words, expected(n_words, cfa_offset, n_mapped), "{cfa_offset:#x}");
                let return_address = (cfa - 8) as usize % PAGE;
                n_probes += u64::from(return_address + 8 + 8 * n_words as usize > PAGE);
                assert_eq!(rig.out.n_probes, n_probes, "{n_words} words at {cfa_offset:#x}");
            }
            assert!(n_probes > 0);
            rig.out.n_probes = 0;
        }
    }
}

/// A caller that has its stack at odd addresses gets what it had without us: no fault.
#[test]
fn misaligned_stacks_are_no_worse() {
    let mut rig = Rig::new(128, true, 16);
    for mapped in [true, false] {
        rig.map_behind(mapped);
        let n_mapped = (STACK_PAGES + usize::from(mapped)) * PAGE;
        for distance in (0..2048).step_by(8) {
            rig.fill(n_mapped);
            let cfa = rig.end() - distance;
            rig.call(cfa);
            let cfa_offset = (cfa - rig.stack.address()) as usize;
            assert_eq!(rig.out.words[..128], expected(128, cfa_offset, n_mapped));
        }
    }
}

/// The copy is aligned as the caller's words are, whatever their number.
#[test]
fn over_aligned_words_stay_aligned() {
    for align_bytes in [16, 32, 64] {
        for (n_words, up_to) in [(0, false), (1, false), (4, false), (7, false), (128, true)] {
            let mut rig = Rig::new(n_words, up_to, align_bytes);
            for cfa in (rig.end() - PAGE as u64..=rig.end() - 256).step_by(align_bytes as usize) {
                rig.fill(STACK_BYTES);
                rig.call(cfa);
                let at = format!("{n_words} words, {align_bytes}");
                assert_eq!((rig.out.callee_rsp + 8) % u64::from(align_bytes), 0, "{at}");
                let cfa_offset = (cfa - rig.stack.address()) as usize;
                let words = expected(n_words, cfa_offset, STACK_BYTES);
                assert_eq!(rig.out.words[..n_words as usize], words, "{at}");
            }
        }
    }
}
