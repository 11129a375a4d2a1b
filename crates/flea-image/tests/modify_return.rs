//! fmod_ret: the first value other than 0 is the function's result, the function and the
//! remaining such programs do not run, programs at exit see the value, and no other register
//! changes.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use expect_test::{Expect, expect};
use flea_image::{
    BODY_FRAMES_OFFSET, BodyRef, BodyRequest, Changes, CompileError, Cpu, NoSkip, ProgramUse,
    Reads, SiteKind, SkeletonBody, SkeletonRequest, SkipResult, compile_body, link_skeleton,
};
use flea_layout::shared::THREAD_TABLE_BYTES;
use flea_object::helper::Helper;
use flea_object::spec::{MapKind, Program, ProgramKind};
use flea_symbols::addr::RemoteAddr;
use flea_symbols::signature::{ArgWord, RetWord, Signature};
use flea_verifier::{Context, Verified, verify};
use support::programs::{ints, lddw_value, map, plan, record, value, words};
use support::rig::{Placing, Registers, Rig, signature, untraced};
use support::{access, call_with, ctx, insn, plain, program};

const ALL: [(SiteKind, Placing); 4] = [
    (SiteKind::Nops, Placing::Called),
    (SiteKind::Nops, Placing::Inline),
    (SiteKind::Relocated, Placing::Called),
    (SiteKind::Relocated, Placing::Inline),
];

/// `n = seq[0]++; seq[1 + n] = id; return result;` where `seq` is array map 0.
fn step(id: i32, result: i32) -> Verified {
    let mut p = vec![];
    p.extend(lddw_value(2, 0, 0));
    p.extend([
        access(insn(0x79, 3, 2, 0, 0), value(0)),
        plain(insn(0xbf, 4, 3, 0, 0)),
        plain(insn(0x67, 4, 0, 0, 3)),
        plain(insn(0x0f, 4, 2, 0, 0)),
        access(insn(0x7a, 4, 0, 8, id), value(0)),
        plain(insn(0x07, 3, 0, 0, 1)),
        access(insn(0x7b, 2, 3, 0, 0), value(0)),
        plain(insn(0xb7, 0, 0, 0, result)),
        plain(insn(0x95, 0, 0, 0, 0)),
    ]);
    program(&p)
}

fn sequence(rig: &Rig) -> Vec<u64> {
    (0..rig.array(0, 0)).map(|i| rig.array(0, 1 + i as usize)).collect()
}

fn rig() -> Rig {
    Rig::new(&[map(MapKind::Array, 128, 1), map(MapKind::Array, 64, 1)], true)
}

#[test]
fn zero_lets_the_function_run() {
    let input = Registers::pattern();
    for (kind, placing) in ALL {
        let rig = rig();
        let steps = [step(1, 0), step(2, 0), step(3, 0), step(4, 0)];
        let programs = [
            (&steps[0], ProgramKind::FmodRet),
            (&steps[1], ProgramKind::FmodRet),
            (&steps[2], ProgramKind::Fsession),
            (&steps[3], ProgramKind::Fentry),
        ];
        rig.attach(&signature(), &programs, kind, placing, 4);
        assert!(rig.call(&input) == untraced(kind, &input), "{kind:?} {placing:?}");
        assert_eq!(sequence(&rig), [4, 3, 1, 2, 3], "{kind:?} {placing:?}");
    }
}

/// What is left when nothing of the function has run: every register as the caller had it.
fn skipped(input: &Registers) -> Registers {
    let mut output = *input;
    // rsp is not stored.
    output.gpr[4] = 0;
    output
}

#[test]
fn the_first_other_value_skips_the_rest() {
    let input = Registers::pattern();
    let mut expected = skipped(&input);
    expected.gpr[0] = (-12i64).cast_unsigned();
    for (kind, placing) in ALL {
        let rig = rig();
        let (steps, record) = ([step(1, 0), step(2, -12), step(3, 7)], record(1, 6));
        let programs = [
            (&record, ProgramKind::Fexit),
            (&steps[0], ProgramKind::FmodRet),
            (&steps[1], ProgramKind::FmodRet),
            (&steps[2], ProgramKind::FmodRet),
        ];
        rig.attach(&signature(), &programs, kind, placing, 5);
        assert!(rig.call(&input) == expected, "{kind:?} {placing:?}");
        assert_eq!(sequence(&rig), [1, 2], "{kind:?} {placing:?}");
        let seen: Vec<u64> = (0..6).map(|i| rig.array(1, i)).collect();
        let args = [input.gpr[7], input.gpr[9], input.xmm[7][0], 0x64, 0x65];
        assert_eq!(seen[..5], args, "{kind:?} {placing:?}");
        assert_eq!(seen[5].cast_signed(), -12, "the program at exit sees the value");
    }
}

/// `seq[1] = ctx[n_args]; bpf_get_func_ret(ctx, &seq[2]); return result;`
fn looks_at_result(slot: i16, result: i32) -> Verified {
    let mut p = vec![];
    p.extend(lddw_value(2, 0, 8));
    p.extend([
        ctx(3, slot),
        access(insn(0x7b, 2, 3, 0, 0), value(0)),
        plain(insn(0x07, 2, 0, 0, 8)),
        call_with(Helper::GetFuncRet, None, [None; 5]),
        plain(insn(0xb7, 0, 0, 0, result)),
        plain(insn(0x95, 0, 0, 0, 0)),
    ]);
    program(&p)
}

#[test]
fn an_earlier_value_is_always_zero() {
    let rig = rig();
    rig.data.write(THREAD_TABLE_BYTES + rig.plan.maps[0].data_offset as usize + 8, &[1; 16]);
    let (first, second) = (step(1, 0), looks_at_result(5, 3));
    let programs = [(&first, ProgramKind::FmodRet), (&second, ProgramKind::FmodRet)];
    rig.attach(&signature(), &programs, SiteKind::Relocated, Placing::Inline, 4);
    let output = rig.call(&Registers::pattern());
    assert_eq!((output.gpr[0], rig.array(0, 1), rig.array(0, 2)), (3, 0, 0));
}

#[test]
fn results_in_vector_registers_and_none_at_all() {
    let input = Registers::pattern();
    let args = || [ArgWord::Gpr(0), ArgWord::Xmm(0)].into_iter();
    for (kind, placing) in ALL {
        for ret in [&[RetWord::Xmm0][..], &[]] {
            let rig = rig();
            let (skips, record) = (step(1, -5), record(1, 3));
            let programs = [(&skips, ProgramKind::FmodRet), (&record, ProgramKind::Fexit)];
            rig.attach(&words(args(), ret), &programs, kind, placing, 0);
            let mut expected = skipped(&input);
            if !ret.is_empty() {
                expected.xmm[0] = [(-5i64).cast_unsigned(), 0];
            }
            assert!(rig.call(&input) == expected, "{kind:?} {placing:?} {ret:?}");
            let seen: Vec<u64> = (0..3).map(|i| rig.array(1, i)).collect();
            let result = if ret.is_empty() { 0 } else { (-5i64).cast_unsigned() };
            assert_eq!(seen, [input.gpr[7], input.xmm[0][0], result], "{kind:?} {placing:?}");
        }
    }
}

/// One that is running already is skipped and changes nothing; what comes after it has its say.
#[test]
fn a_running_program_has_no_say() {
    let rig = rig();
    let (busy, next) = (step(1, 7), step(2, 9));
    let state = rig.plan.program_state_offset(0);
    let active = THREAD_TABLE_BYTES + (rig.plan.slots_offset + state) as usize;
    rig.data.write(active, &u64::MAX.to_le_bytes());
    let programs = [(&busy, ProgramKind::FmodRet), (&next, ProgramKind::FmodRet)];
    rig.attach(&signature(), &programs, SiteKind::Nops, Placing::Inline, 4);
    let input = Registers::pattern();
    assert_eq!(rig.call(&input).gpr[0], 9);
    assert_eq!((sequence(&rig), rig.slot_word(state + 8)), (vec![2], 1), "and a miss");
    rig.data.write(active, &0u64.to_le_bytes());
    assert_eq!(rig.call(&input).gpr[0], 7);
    assert_eq!(sequence(&rig), [2, 1]);
    assert_eq!(rig.slot_word(state), 0, "free again");
}

/// Without a slot no program runs: the function does.
#[test]
fn a_thread_without_slot_runs_the_function() {
    let rig = Rig::new(&[map(MapKind::Array, 128, 1)], false);
    let skips = step(1, 7);
    let programs = [(&skips, ProgramKind::FmodRet)];
    rig.attach(&signature(), &programs, SiteKind::Nops, Placing::Inline, 4);
    let input = Registers::pattern();
    assert!(rig.call(&input) == untraced(SiteKind::Nops, &input));
    assert_eq!((sequence(&rig), rig.data.read(THREAD_TABLE_BYTES + 40)), (vec![], 1));
}

fn compile(signature: &Signature, verified: &Verified) -> Result<flea_image::Body, CompileError> {
    let maps = [map(MapKind::Array, 128, 1)];
    let programs = [ProgramUse { verified, kind: ProgramKind::FmodRet, cookie: 0, state_index: 0 }];
    compile_body(&BodyRequest {
        signature,
        programs: &programs,
        maps: &maps,
        plan: &plan(&maps),
        function_address: RemoteAddr(0x40_1000),
        frame_offset: BODY_FRAMES_OFFSET,
        printk_map: None,
        cpu: Cpu::default(),
    })
}

/// `return ctx[0] == 1 ? result : 0;`, verified.
fn decides(result: i32) -> Verified {
    let insns = vec![
        insn(0x79, 6, 1, 0, 0),
        insn(0xb7, 0, 0, 0, 0),
        insn(0x55, 6, 0, 1, 1),
        insn(0xb7, 0, 0, 0, result),
        insn(0x95, 0, 0, 0, 0),
    ];
    let program = Program { name: "p".into(), kind: ProgramKind::FmodRet, insns, ..<_>::default() };
    verify(&program, &[], Context::Tracing { n_args: 1, n_results: 1, session: false }).unwrap()
}

/// Two words cannot be made up: only a program that never tries may be there.
#[test]
fn what_no_program_can_return_is_refused() {
    let wide = words([ArgWord::Gpr(0)].into_iter(), &[RetWord::Rax, RetWord::Rdx]);
    let refused = compile(&wide, &decides(-12)).unwrap_err();
    assert_eq!(refused, CompileError::Result { reason: NoSkip::TooWide });
    assert!(compile(&wide, &decides(0)).unwrap().modify.is_some());
    assert!(compile(&ints(1), &decides(-12)).unwrap().modify.is_some());
}

fn check(listing: &str, expect: &Expect) {
    expect.assert_eq(listing);
}

#[test]
fn the_body_stores_what_is_not_zero() {
    let body = compile(&ints(1), &decides(-12)).unwrap();
    check(
        &body.modify.unwrap().listing(),
        &expect![[r#"
            0000  sub $0x20,%rsp
            0004  mov %rax,(%rsp)
            0008  mov %rdx,8(%rsp)
            000d  mov %rdi,0x10(%rsp)
            0012  xor %rdx,%rdx
            0015  cmp $1,%rdi
            0019  jne +0x22
            001b  mov $0xFFFFFFFFFFFFFFF4,%rdx
            0022  test %rdx,%rdx
            0025  jne +0x3a
            0027  mov (%rsp),%rax
            002b  mov 8(%rsp),%rdx
            0030  mov 0x10(%rsp),%rdi
            0035  add $0x20,%rsp
            0039  ret
            003a  mov %rbp,%rax
            003d  mov %rdx,-8(%rax)
            0041  jmp +0x27
        "#]],
    );
    let never = compile(&ints(1), &decides(0)).unwrap();
    check(
        &never.modify.unwrap().listing(),
        &expect![[r#"
            0000  sub $0x10,%rsp
            0004  mov %rdi,(%rsp)
            0008  cmp $1,%rdi
            000c  mov (%rsp),%rdi
            0010  add $0x10,%rsp
            0014  ret
        "#]],
    );
}

#[test]
fn the_skeleton_asks_each_controller() {
    let reads = Reads { args: vec![], results: vec![RetWord::Rax] };
    let body = |n: u64| SkeletonBody {
        entry: None,
        session: None,
        modify: Some(BodyRef::Call(RemoteAddr(0x50_0000 + n))),
        exit: Some(BodyRef::Call(RemoteAddr(0x50_1000 + n))),
        reads: &reads,
        saves: &[],
        changes: Changes::NONE,
        frame_words: 0,
        frame_offset: 0,
    };
    let link = |skip| {
        let bodies = [body(0), body(0x100)];
        let request = SkeletonRequest {
            site: RemoteAddr(0x40_1000),
            replaced: &[0x0f, 0x1f, 0x44, 0, 0],
            kind: SiteKind::Nops,
            image_address: RemoteAddr(0x60_0000),
            bodies: &bodies,
            stack_copy: flea_image::StackCopy::Exactly(0),
            stack_align_bytes: 16,
            skip,
            replacement: None,
        };
        link_skeleton(&request).unwrap().listing()
    };
    check(
        &link(Some(SkipResult::Rax)),
        &expect![[r#"
            0000  push %rbp
            0001  mov %rsp,%rbp
            0004  lea -0x90(%rsp),%rsp
            000c  movq $0,-8(%rbp)
            0014  call 0x0000000000500000
            0019  cmpq $0,-8(%rbp)
            001e  jne +0x50
            0020  call 0x0000000000500100
            0025  cmpq $0,-8(%rbp)
            002a  jne +0x50
            002c  call 0x000000000060005E
            0031  mov %rbp,-8(%rsp)
            0036  mov %rax,-8(%rbp)
            003a  nopl (%rax,%rax)
            003f  call 0x0000000000501000
            0044  nopl (%rax,%rax)
            0049  call 0x0000000000501100
            004e  leave
            004f  ret
            0050  mov -8(%rbp),%rax
            0054  jmp +0x36
            0056  nopl 0x61656C66(%rax,%rax)
            005e  jmp 0x0000000000401005
        "#]],
    );
    check(
        &link(Some(SkipResult::Xmm0)),
        &expect![[r#"
            0000  push %rbp
            0001  mov %rsp,%rbp
            0004  lea -0x90(%rsp),%rsp
            000c  movq $0,-8(%rbp)
            0014  call 0x0000000000500000
            0019  cmpq $0,-8(%rbp)
            001e  jne +0x50
            0020  call 0x0000000000500100
            0025  cmpq $0,-8(%rbp)
            002a  jne +0x50
            002c  call 0x000000000060005F
            0031  mov %rbp,-8(%rsp)
            0036  mov %rax,-8(%rbp)
            003a  nopl (%rax,%rax)
            003f  call 0x0000000000501000
            0044  nopl (%rax,%rax)
            0049  call 0x0000000000501100
            004e  leave
            004f  ret
            0050  movq -8(%rbp),%xmm0
            0055  jmp +0x36
            0057  nopl 0x61656C66(%rax,%rax)
            005f  jmp 0x0000000000401005
        "#]],
    );
    check(
        &link(Some(SkipResult::Nowhere)),
        &expect![[r#"
            0000  push %rbp
            0001  mov %rsp,%rbp
            0004  lea -0x90(%rsp),%rsp
            000c  movq $0,-8(%rbp)
            0014  call 0x0000000000500000
            0019  cmpq $0,-8(%rbp)
            001e  jne +0x50
            0020  call 0x0000000000500100
            0025  cmpq $0,-8(%rbp)
            002a  jne +0x50
            002c  call 0x000000000060005A
            0031  mov %rbp,-8(%rsp)
            0036  mov %rax,-8(%rbp)
            003a  nopl (%rax,%rax)
            003f  call 0x0000000000501000
            0044  nopl (%rax,%rax)
            0049  call 0x0000000000501100
            004e  leave
            004f  ret
            0050  jmp +0x36
            0052  nopl 0x61656C66(%rax,%rax)
            005a  jmp 0x0000000000401005
        "#]],
    );
    check(
        &link(None),
        &expect![[r#"
            0000  push %rbp
            0001  mov %rsp,%rbp
            0004  lea -0x90(%rsp),%rsp
            000c  movq $0,-8(%rbp)
            0014  call 0x0000000000500000
            0019  call 0x0000000000500100
            001e  call 0x000000000060004A
            0023  mov %rbp,-8(%rsp)
            0028  mov %rax,-8(%rbp)
            002c  nopl (%rax,%rax)
            0031  call 0x0000000000501000
            0036  nopl (%rax,%rax)
            003b  call 0x0000000000501100
            0040  leave
            0041  ret
            0042  nopl 0x61656C66(%rax,%rax)
            004a  jmp 0x0000000000401005
        "#]],
    );
}
