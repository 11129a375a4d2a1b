//! `struct pt_regs` of uprobes and uretprobes: all 21 registers are what they were, and stay
//! so. Modelled on Linux's uprobe_syscall test.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use flea_image::{
    BODY_FRAMES_OFFSET, Body, BodyRequest, CompileError, Cpu, ProgramUse, SiteKind, compile_body,
};
use flea_object::helper::Helper;
use flea_object::insn::Insn;
use flea_object::spec::{MapKind, ProgramKind};
use flea_symbols::addr::RemoteAddr;
use flea_verifier::facts::{Fact, Region};
use flea_verifier::{Context, PT_REGS_BYTES, Verified};
use iced_x86::code_asm::*;
use support::programs::{counter, ints, lddw_value, map, plan, record, value};
use support::rig::{FUNCTION, GPRS, HARNESS, Placing, Rig, assemble};
use support::{access, call, insn, plain, program};

/// By hardware number; 4, rsp, is what it is behind the call.
type Gprs = [u64; 16];

/// Registers of `struct pt_regs` by hardware number.
const LAYOUT: [Word; 21] = {
    use Word::*;
    [
        Gpr(15),
        Gpr(14),
        Gpr(13),
        Gpr(12),
        Gpr(5),
        Gpr(3),
        Gpr(11),
        Gpr(10),
        Gpr(9),
        Gpr(8),
        Gpr(0),
        Gpr(1),
        Gpr(2),
        Gpr(6),
        Gpr(7),
        Is(u64::MAX),
        Rip,
        Is(0x33),
        Is(0x202),
        Rsp,
        Is(0x2b),
    ]
};

#[derive(Clone, Copy)]
enum Word {
    Gpr(usize),
    Rip,
    Rsp,
    Is(u64),
}

/// What a probe must see: registers, and rsp and rip there.
fn pt_regs(gprs: &Gprs, stack: u64, code: u64) -> Vec<u64> {
    LAYOUT
        .iter()
        .map(|word| match *word {
            Word::Gpr(i) => gprs[i],
            Word::Rip => code,
            Word::Rsp => stack,
            Word::Is(value) => value,
        })
        .collect()
}

fn pattern() -> Gprs {
    std::array::from_fn(|i| 0x0123_4567_89ab_cdef_u64.rotate_left(4 * i as u32) ^ i as u64)
}

/// `fn(in: &Gprs, out: &mut Gprs, target)`, and where the call in it returns to.
fn harness(at: u64) -> (Vec<u8>, u64) {
    let mut before = assemble(at, |a| {
        for r in [rbx, rbp, r12, r13, r14, r15, rsi, rdx] {
            a.push(r)?;
        }
        a.sub(rsp, 8)?;
        for (i, r) in (0..).zip(GPRS) {
            if r != rsp && r != rdi {
                a.mov(r, ptr(rdi + 8 * i))?;
            }
        }
        a.mov(rdi, ptr(rdi + 56))?;
        a.call(qword_ptr(rsp + 8))
    });
    let returns_to = at + before.len() as u64;
    before.extend(assemble(returns_to, |a| {
        a.mov(ptr(rsp), rax)?;
        a.mov(rax, ptr(rsp + 16))?;
        for (i, r) in (1..).zip(&GPRS[1..]) {
            a.mov(ptr(rax + 8 * i), *r)?;
        }
        a.mov(rcx, ptr(rsp))?;
        a.mov(ptr(rax), rcx)?;
        a.add(rsp, 24)?;
        for r in [r15, r14, r13, r12, rbp, rbx] {
            a.pop(r)?;
        }
        a.ret()
    }));
    (before, returns_to)
}

/// Changes all registers that it may.
fn function(at: u64, kind: SiteKind) -> (Vec<u8>, usize) {
    let bytes = assemble(at, |a| {
        if kind == SiteKind::Nops {
            a.db(&[0x0f, 0x1f, 0x44, 0x00, 0x00])?;
        }
        a.lea(rax, ptr(rdi + rsi * 2 + 7))?;
        a.not(rdx)?;
        for r in [rcx, rsi, rdi, r8, r9, r10, r11] {
            a.add(r, 0x1234)?;
        }
        a.ret()
    });
    // lea (5 bytes)
    (bytes, 5)
}

fn call_function(rig: &Rig, input: &Gprs) -> Gprs {
    let mut output = [0; 16];
    // SAFETY: the harness has this very type and keeps what the ABI says.
    let harness: extern "sysv64" fn(*const Gprs, *mut Gprs, u64) =
        unsafe { std::mem::transmute(rig.code.address() + HARNESS as u64) };
    harness(input, &raw mut output, rig.code.address());
    output
}

fn new_rig(n_maps: usize) -> (Rig, u64) {
    let rig = Rig::new(&vec![map(MapKind::Array, 256, 1); n_maps], true);
    let (bytes, returns_to) = harness(rig.code.address() + HARNESS as u64);
    rig.code.write(HARNESS, &bytes);
    (rig, returns_to)
}

/// The registers behind an untraced call, but for rsp: the caller's frame may be elsewhere.
fn untraced(kind: SiteKind, input: &Gprs) -> Gprs {
    let (rig, _) = new_rig(0);
    rig.code.write(FUNCTION, &function(rig.code.address(), kind).0);
    rig.code.executable();
    call_function(&rig, input)
}

/// Attaches, calls, and checks that the caller finds every register as without tracing.
fn run(
    rig: &Rig,
    programs: &[(&Verified, ProgramKind)],
    kind: SiteKind,
    placing: Placing,
) -> (Gprs, Body) {
    let function = function(rig.code.address(), kind);
    let body = rig.attach_to(&function, &ints(2), programs, kind, placing, 2);
    let output = call_function(rig, &pattern());
    let expected = untraced(kind, &pattern());
    assert_eq!(output[..4], expected[..4], "{kind:?} {placing:?}");
    assert_eq!(output[5..], expected[5..], "{kind:?} {placing:?}");
    (output, body)
}

fn seen(rig: &Rig, map: usize) -> Vec<u64> {
    (0..LAYOUT.len()).map(|i| rig.array(map, i)).collect()
}

const PLACES: [(SiteKind, Placing); 4] = [
    (SiteKind::Nops, Placing::Inline),
    (SiteKind::Nops, Placing::Called),
    (SiteKind::Relocated, Placing::Inline),
    (SiteKind::Relocated, Placing::Called),
];

#[test]
fn all_registers_at_both_ends() {
    for (kind, placing) in PLACES {
        let (rig, returns_to) = new_rig(2);
        let (at_entry, at_exit) = (record(0, 21), record(1, 21));
        let programs = [(&at_entry, ProgramKind::Uprobe), (&at_exit, ProgramKind::Uretprobe)];
        let (output, body) = run(&rig, &programs, kind, placing);
        assert!(body.entry.is_none(), "rax and rbx are no parameters of an entry body");
        let stack = output[4];
        let function = rig.code.address();
        assert_eq!(seen(&rig, 0), pt_regs(&pattern(), stack - 8, function), "{kind:?} {placing:?}");
        assert_eq!(seen(&rig, 1), pt_regs(&output, stack, returns_to), "{kind:?} {placing:?}");
    }
}

/// `*(u64 *)(r9 + 8 * word) = r3`, where r9 is array 0's element 0.
fn out(word: i16) -> (Insn, Fact) {
    access(insn(0x7b, 9, 3, word * 8, 0), value(0))
}

fn load(opcode: u8, offset: i16) -> (Insn, Fact) {
    let region = Region::Ctx { offset_bytes: offset.into() };
    access(insn(opcode, 3, 1, offset, 0), region)
}

/// Stores what `loads` (opcode, offset) load, one after another.
fn loads(loads: &[(u8, i16)]) -> Verified {
    let mut p = lddw_value(9, 0, 0).to_vec();
    for (i, (opcode, offset)) in (0..).zip(loads) {
        p.extend([load(*opcode, *offset), out(i)]);
    }
    p.extend([plain(insn(0xb7, 0, 0, 0, 0)), plain(insn(0x95, 0, 0, 0, 0))]);
    program(&p)
}

const LDX_DW: u8 = 0x79;

/// What a plain uprobe reads is there without a frame: arguments, whatever the signature says,
/// stack and frame pointer, the function's address, and what is always the same.
#[test]
fn registers_of_an_entry_body() {
    let words = [4, 8, 9, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20];
    let program = loads(&words.map(|word| (LDX_DW, 8 * word)));
    let direct = (SiteKind::Nops, Placing::Direct);
    for (kind, placing) in PLACES.into_iter().chain([direct]) {
        let (rig, _) = new_rig(1);
        let programs = [(&program, ProgramKind::Uprobe)];
        let (output, body) = run(&rig, &programs, kind, placing);
        assert!(body.entry.is_some() && body.session.is_none() && body.saves.is_empty());
        let all = pt_regs(&pattern(), output[4] - 8, rig.code.address());
        let expected: Vec<u64> = words.iter().map(|word| all[*word as usize]).collect();
        assert_eq!(seen(&rig, 0)[..words.len()], expected, "{kind:?} {placing:?}");
    }
}

/// Each register by itself, so that none is right by chance, and only what is read is stored.
#[test]
fn one_register_at_a_time() {
    for word in 0..21 {
        let program = loads(&[(LDX_DW, 8 * word)]);
        for kind in [ProgramKind::Uprobe, ProgramKind::Uretprobe] {
            let (rig, returns_to) = new_rig(1);
            let programs = [(&program, kind)];
            let (output, body) = run(&rig, &programs, SiteKind::Nops, Placing::Inline);
            let all = match kind {
                ProgramKind::Uprobe => pt_regs(&pattern(), output[4] - 8, rig.code.address()),
                _ => pt_regs(&output, output[4], returns_to),
            };
            assert_eq!(seen(&rig, 0)[0], all[word as usize], "{kind:?} word {word}");
            assert!(body.saves.len() <= 1);
            assert_eq!(
                body.session.is_some(),
                !body.saves.is_empty() && kind == ProgramKind::Uprobe
            );
        }
    }
}

#[test]
fn parts_of_registers() {
    // ldxw, ldxh, ldxb and the sign-extending ones; rdi is at 112, ss at 160.
    let parts = [
        (0x61, 112),
        (0x61, 116),
        (0x69, 114),
        (0x69, 118),
        (0x71, 119),
        (0x81, 116),
        (0x91, 113),
        (0x61, 160),
        (0x61, 124),
        (0x71, 120),
    ];
    let first = pattern()[7];
    let expected = [
        first & 0xffff_ffff,
        first >> 32,
        first >> 16 & 0xffff,
        first >> 48,
        first >> 56,
        (first as i64 >> 32) as u64,
        i64::from((first >> 8) as i8) as u64,
        0x2b,
        0xffff_ffff,
        0xff,
    ];
    for kind in [ProgramKind::Uprobe, ProgramKind::Uretprobe] {
        let (rig, _) = new_rig(1);
        let program = loads(&parts);
        let (output, _) = run(&rig, &[(&program, kind)], SiteKind::Relocated, Placing::Inline);
        let seen = seen(&rig, 0);
        if kind == ProgramKind::Uprobe {
            assert_eq!(seen[..parts.len()], expected);
        } else {
            assert_eq!(seen[..2], [output[7] & 0xffff_ffff, output[7] >> 32]);
            assert_eq!(seen[7..10], expected[7..]);
        }
    }
}

/// Appends `id` to the list in array 0, whose first word is its length; reads the register at
/// `offset` before, if there is one.
fn append(id: i32, offset: Option<i16>) -> Verified {
    let mut p: Vec<_> = offset.map(|offset| load(LDX_DW, offset)).into_iter().collect();
    p.extend(lddw_value(9, 0, 0));
    p.extend([
        access(insn(0x79, 3, 9, 0, 0), value(0)),
        plain(insn(0x07, 3, 0, 0, 1)),
        access(insn(0x7b, 9, 3, 0, 0), value(0)),
        plain(insn(0x67, 3, 0, 0, 3)),
        plain(insn(0x0f, 9, 3, 0, 0)),
        access(insn(0x7a, 9, 0, 0, id), value(0)),
        // What a probe returns is nobody's business.
        plain(insn(0xb7, 0, 0, 0, 1)),
        plain(insn(0x95, 0, 0, 0, 0)),
    ]);
    program(&p)
}

/// fentry before uprobe, which is before fsession only if it needs the frame as well; uretprobe
/// after fexit and fsession; the newest first within a kind.
#[test]
fn order_on_one_function() {
    use ProgramKind::{Fentry, Fexit, Fsession, Uprobe, Uretprobe};
    const RBX: Option<i16> = Some(40);
    const RDI: Option<i16> = Some(112);
    // Four at a time: the rig's arena has states for no more.
    for (programs, expected) in [
        ([(Uprobe, RDI), (Fentry, None), (Uprobe, None), (Fentry, None)], vec![1, 3, 0, 2]),
        (
            [(Uretprobe, RDI), (Fsession, None), (Uretprobe, RBX), (Fexit, None)],
            vec![1, 1, 3, 0, 2],
        ),
        ([(Uprobe, RBX), (Fsession, None), (Uprobe, RDI), (Fentry, None)], vec![3, 2, 0, 1, 1]),
        ([(Uretprobe, None), (Fexit, None), (Uprobe, RBX), (Fentry, None)], vec![3, 2, 1, 0]),
    ] {
        let verified: Vec<Verified> =
            (0..).zip(&programs).map(|(id, (_, offset))| append(id, *offset)).collect();
        let attached: Vec<_> = verified.iter().zip(programs.map(|(kind, _)| kind)).collect();
        for (kind, placing) in PLACES {
            let (rig, _) = new_rig(1);
            run(&rig, &attached, kind, placing);
            let list: Vec<u64> = (1..=rig.array(0, 0) as usize).map(|i| rig.array(0, i)).collect();
            assert_eq!(list, expected, "{programs:?} {kind:?} {placing:?}");
        }
    }
}

/// What a program does not look at costs nothing: a counting probe is a counting fentry, and
/// one that reads its first argument is an fentry that does.
#[test]
fn a_probe_costs_what_it_reads() {
    let maps = [map(MapKind::PerCpuArray, 8, 1), map(MapKind::Array, 64, 1)];
    let compile = |verified: &Verified, kind| {
        let program = ProgramUse { verified, kind, cookie: 0, state_index: 0 };
        compile_body(&BodyRequest {
            signature: &ints(6),
            programs: &[program],
            maps: &maps,
            plan: &plan(&maps),
            function_address: RemoteAddr(0x40_1000),
            frame_offset: BODY_FRAMES_OFFSET,
            printk_map: None,
            cpu: Cpu::default(),
        })
        .unwrap()
    };
    let count = counter(0);
    for (probe, tracing) in
        [(ProgramKind::Uprobe, ProgramKind::Fentry), (ProgramKind::Uretprobe, ProgramKind::Fexit)]
    {
        assert_eq!(compile(&count, probe), compile(&count, tracing));
    }
    let reads = |region| {
        let mut p = lddw_value(9, 1, 0).to_vec();
        let offset =
            if let Region::Ctx { offset_bytes } = region { offset_bytes as i16 } else { 0 };
        p.push(access(insn(LDX_DW, 3, 1, offset, 0), region));
        p.push(access(insn(0x7b, 9, 3, 0, 0), value(1)));
        p.extend([plain(insn(0xb7, 0, 0, 0, 0)), plain(insn(0x95, 0, 0, 0, 0))]);
        program(&p)
    };
    let first_register = reads(Region::Ctx { offset_bytes: 112 });
    let first = reads(Region::Ctx { offset_bytes: 0 });
    assert_eq!(compile(&first_register, ProgramKind::Uprobe), compile(&first, ProgramKind::Fentry));
    // The result, behind six arguments.
    let result_register = reads(Region::Ctx { offset_bytes: 80 });
    let result = reads(Region::Ctx { offset_bytes: 48 });
    assert_eq!(
        compile(&result_register, ProgramKind::Uretprobe),
        compile(&result, ProgramKind::Fexit)
    );
}

/// The facts written by hand here are those that the verifier finds.
#[test]
fn the_verifier_finds_the_same_facts() {
    let maps = vec![map(MapKind::Array, 256, 1)];
    let by_hand = record(0, 21);
    assert_eq!(8 * LAYOUT.len(), PT_REGS_BYTES as usize);
    let program = flea_object::spec::Program {
        kind: ProgramKind::Uprobe,
        insns: by_hand.insns().to_vec(),
        ..Default::default()
    };
    let verified = flea_verifier::verify(&program, &maps, Context::PtRegs).unwrap();
    assert_eq!(verified.facts(), by_hand.facts());
}

/// Argument words have no meaning for a probe: the verifier refuses, and so does the compiler.
#[test]
fn helpers_of_other_kinds() {
    let maps = [map(MapKind::Array, 64, 1)];
    for helper in [Helper::GetFuncArg, Helper::GetFuncArgCnt, Helper::GetFuncRet] {
        let verified = program(&[
            call(helper, None),
            plain(insn(0xb7, 0, 0, 0, 0)),
            plain(insn(0x95, 0, 0, 0, 0)),
        ]);
        for kind in [ProgramKind::Uprobe, ProgramKind::Uretprobe] {
            let used = ProgramUse { verified: &verified, kind, cookie: 0, state_index: 0 };
            let error = compile_body(&BodyRequest {
                signature: &ints(1),
                programs: &[used],
                maps: &maps,
                plan: &plan(&maps),
                function_address: RemoteAddr(0x40_1000),
                frame_offset: BODY_FRAMES_OFFSET,
                printk_map: None,
                cpu: Cpu::default(),
            })
            .unwrap_err();
            assert_eq!(error, CompileError::HelperNotHere { insn_idx: 0, helper });
        }
    }
}
