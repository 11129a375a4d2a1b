//! The checker finds what it is there for: each mutation of a good body is refused.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use flea_image::{BODY_FRAMES_OFFSET, BodyRequest, Cpu, ProgramUse, check_body, compile_body};
use flea_object::spec::{MapKind, ProgramKind};
use flea_symbols::addr::RemoteAddr;
use iced_x86::code_asm::*;
use iced_x86::{Decoder, DecoderOptions, IcedError, Mnemonic, OpKind};
use support::programs::{counter, ints, lddw_value, map, plan, value};
use support::{access, ctx, insn, plain, program};

fn good_body() -> Vec<u8> {
    let maps = [map(MapKind::PerCpuArray, 8, 1)];
    let body = compile_body(&BodyRequest {
        signature: &ints(2),
        programs: &[ProgramUse {
            verified: &counter(0),
            kind: ProgramKind::Fentry,
            cookie: 0,
            state_index: 0,
        }],
        maps: &maps,
        plan: &plan(&maps),
        function_address: RemoteAddr(0),
        frame_offset: BODY_FRAMES_OFFSET,
        printk_map: None,
        cpu: Cpu::default(),
    })
    .unwrap();
    body.entry.unwrap().resolve(|_| 0)
}

#[test]
fn a_body_is_good() {
    check_body(&good_body()).unwrap();
}

#[test]
fn a_missing_save_restore_or_frame_is_found() {
    let good = good_body();
    let mut n_mutants = 0;
    for insn in &mut Decoder::with_ip(64, &good, 0, DecoderOptions::NONE) {
        let on_stack = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory)
            && insn.memory_base() == iced_x86::Register::RSP;
        let of_frame = matches!(
            insn.mnemonic(),
            Mnemonic::Push | Mnemonic::Pop | Mnemonic::Ret | Mnemonic::Sub
        );
        if !on_stack && !of_frame {
            continue;
        }
        let mut mutant = good.clone();
        let at = usize::try_from(insn.ip()).unwrap();
        mutant[at..at + insn.len()].fill(0x90);
        assert!(check_body(&mutant).is_err(), "not found: {insn}");
        n_mutants += 1;
    }
    assert!(n_mutants > 10);
}

/// Cranelift leaves a trap beside each division, for a divisor of zero that was ruled out before.
#[test]
fn a_program_may_divide() {
    let maps = [map(MapKind::Array, 64, 1)];
    for (opcode, off) in [(0x3f, 0), (0x3f, 1), (0x3c, 0), (0x3c, 1), (0x9f, 0), (0x9f, 1)] {
        let mut parts = vec![ctx(2, 0), ctx(3, 1), plain(insn(opcode, 2, 3, off, 0))];
        parts.extend(lddw_value(4, 0, 0));
        parts.extend([
            access(insn(0x7b, 4, 2, 0, 0), value(0)),
            plain(insn(0xb7, 0, 0, 0, 0)),
            plain(insn(0x95, 0, 0, 0, 0)),
        ]);
        compile_body(&BodyRequest {
            signature: &ints(2),
            programs: &[ProgramUse {
                verified: &program(&parts),
                kind: ProgramKind::Fentry,
                cookie: 0,
                state_index: 0,
            }],
            maps: &maps,
            plan: &plan(&maps),
            function_address: RemoteAddr(0),
            frame_offset: BODY_FRAMES_OFFSET,
            printk_map: None,
            cpu: Cpu::default(),
        })
        .unwrap();
    }
}

/// A body around what `write` assembles, with rax saved.
fn around(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let build = || {
        let mut a = CodeAssembler::new(64)?;
        a.push(rbp)?;
        a.mov(rbp, rsp)?;
        a.sub(rsp, 32)?;
        a.mov(ptr(rsp + 16), rax)?;
        write(&mut a)?;
        a.mov(rax, ptr(rsp + 16))?;
        a.add(rsp, 32)?;
        a.mov(rsp, rbp)?;
        a.pop(rbp)?;
        a.ret()?;
        a.assemble(0)
    };
    build().unwrap()
}

#[test]
fn bad_instructions_are_found() {
    check_body(&around(|a| a.mov(rax, qword_ptr(rdi)))).unwrap();
    check_body(&around(|a| a.mov(qword_ptr(rsp + 8), rdi))).unwrap();
    check_body(&around(|a| a.mov(qword_ptr(rsi), rdi))).unwrap();
    let bad: Vec<(&str, Vec<u8>)> = vec![
        ("unsaved register", around(|a| a.mov(rcx, rax))),
        ("part of an unsaved register", around(|a| a.mov(cl, al))),
        ("unsaved vector register", around(|a| a.movq(xmm3, rax))),
        ("frame pointer", around(|a| a.mov(rbp, rax))),
        ("stack pointer", around(|a| a.lea(rsp, ptr(rsp - 8)))),
        ("push", around(|a| a.push(rdi))),
        ("over a save", around(|a| a.mov(dword_ptr(rsp + 20), edi))),
        ("above the frame", around(|a| a.mov(qword_ptr(rsp + 32), rdi))),
        ("half above the frame", around(|a| a.mov(qword_ptr(rsp + 28), rdi))),
        ("by the frame pointer", around(|a| a.mov(qword_ptr(rbp + 8), rdi))),
        ("aligned vector store", around(|a| a.movaps(xmmword_ptr(rdi), xmm0))),
        ("direction flag", around(CodeAssembler::std)),
        ("x87", around(|a| a.fld1())),
        ("MMX", around(|a| a.movd(mm0, eax))),
        ("AVX", around(|a| a.vpxor(xmm0, xmm0, xmm0))),
        ("system call", around(CodeAssembler::syscall)),
        ("string store", around(CodeAssembler::stosb)),
        ("jump out", around(|a| a.jmp(0x9999))),
        ("jump by register", around(|a| a.jmp(rax))),
        ("call away", around(|a| a.call(0x9999))),
        ("early return", around(|a| a.ret())),
        ("thread-local store", around(|a| a.mov(qword_ptr(0).fs(), rax))),
        ("no restore before the second exit", {
            let mut code = around(|a| a.nop());
            let exit = code[code.len() - 8..].to_vec();
            code.extend(&exit[exit.len() - 5..]);
            code
        }),
    ];
    for (what, code) in bad {
        assert!(check_body(&code).is_err(), "not found: {what}");
    }
}
