//! What bodies and skeletons look like. `UPDATE_EXPECT=1 cargo test` blesses changes.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use expect_test::{Expect, expect};
use flea_image::{
    BODY_FRAMES_OFFSET, Body, BodyRef, BodyRequest, Code, ProgramUse, SiteKind, SkeletonBody,
    SkeletonRequest, StackCopy, check_body, compile_body, link_skeleton,
};
use flea_object::helper::Helper;
use flea_object::spec::{MapKind, MapSpec, Program, ProgramKind};
use flea_symbols::addr::RemoteAddr;
use flea_symbols::signature::Signature;
use flea_verifier::facts::Region;
use flea_verifier::{Context, Verified, verify};
use support::programs::{counter, ints, map, plan, record};
use support::{access, call, insn, plain, program};

fn compile(signature: &Signature, maps: &[MapSpec], programs: &[(&Verified, ProgramKind)]) -> Body {
    let plan = plan(maps);
    let programs: Vec<ProgramUse<'_>> = (0u32..)
        .zip(programs)
        .map(|(i, (verified, kind))| ProgramUse {
            verified,
            kind: *kind,
            cookie: 7,
            state_index: i,
        })
        .collect();
    let body = compile_body(&BodyRequest {
        signature,
        programs: &programs,
        maps,
        plan: &plan,
        function_address: RemoteAddr(0x40_1000),
        frame_offset: BODY_FRAMES_OFFSET,
        printk_map: None,
    })
    .unwrap();
    for code in [&body.entry, &body.session, &body.modify, &body.exit].into_iter().flatten() {
        check_body(&code.bytes).unwrap();
        check_body(&code.resolve(|_| 0x7000_0000_0000)).unwrap();
    }
    body
}

fn check(code: Option<&Code>, expect: &Expect) {
    expect.assert_eq(&code.unwrap().listing());
}

#[test]
fn counter_per_cpu() {
    let maps = [map(MapKind::PerCpuArray, 8, 1)];
    let body = compile(&ints(2), &maps, &[(&counter(0), ProgramKind::Fentry)]);
    check(
        body.entry.as_ref(),
        &expect![[r#"
            0000  sub $0x30,%rsp
            0004  mov %rax,(%rsp)
            0008  mov %r8,0x10(%rsp)
            000d  mov %r9,0x18(%rsp)
            0012  mov %r10,0x20(%rsp)
            0017  movabs $0,%r9    # arena - 0x10000
            0021  movabs $0,%r10    # thread pointer
            002b  mov %r10,%r8
            002e  shr $8,%r8
            0032  and $0xFFF0,%r8
            0039  mov 8(%r9,%r8),%rax
            003e  mov (%r9,%r8),%r9
            0042  cmp %r10,%r9
            0045  jne +0x6c
            0047  test %rax,%rax
            004a  je +0x6c
            004c  addq $1,0x80(%rax)
            0054  mov (%rsp),%rax
            0058  mov 0x10(%rsp),%r8
            005d  mov 0x18(%rsp),%r9
            0062  mov 0x20(%rsp),%r10
            0067  add $0x30,%rsp
            006b  ret
            006c  push %rdi
            006d  movabs $0,%rdi    # arena + 0x0
            0077  movabs $0,%rax    # flea_thread_slot
            0081  call *%rax
            0083  pop %rdi
            0084  test %rax,%rax
            0087  jne +0x4c
            0089  jmp +0x54
        "#]],
    );
}

#[test]
fn counter_at_exit() {
    let maps = [map(MapKind::PerCpuArray, 8, 1)];
    let body = compile(&ints(2), &maps, &[(&counter(0), ProgramKind::Fexit)]);
    check(
        body.exit.as_ref(),
        &expect![[r#"
        0000  sub $0x30,%rsp
        0004  mov %rax,(%rsp)
        0008  mov %r8,0x10(%rsp)
        000d  mov %r9,0x18(%rsp)
        0012  mov %r10,0x20(%rsp)
        0017  movabs $0,%r9    # arena - 0x10000
        0021  movabs $0,%r10    # thread pointer
        002b  mov %r10,%r8
        002e  shr $8,%r8
        0032  and $0xFFF0,%r8
        0039  mov 8(%r9,%r8),%rax
        003e  mov (%r9,%r8),%r9
        0042  cmp %r10,%r9
        0045  jne +0x6c
        0047  test %rax,%rax
        004a  je +0x6c
        004c  addq $1,0x80(%rax)
        0054  mov (%rsp),%rax
        0058  mov 0x10(%rsp),%r8
        005d  mov 0x18(%rsp),%r9
        0062  mov 0x20(%rsp),%r10
        0067  add $0x30,%rsp
        006b  ret
        006c  push %rdi
        006d  movabs $0,%rdi    # arena + 0x0
        0077  movabs $0,%rax    # flea_thread_slot
        0081  call *%rax
        0083  pop %rdi
        0084  test %rax,%rax
        0087  jne +0x4c
        0089  jmp +0x54
    "#]],
    );
}

/// The facts written by hand in these tests are those that the verifier finds.
#[test]
fn the_verifier_leads_to_the_same_code() {
    let maps = [map(MapKind::PerCpuArray, 8, 1), map(MapKind::Array, 64, 1)];
    for (by_hand, kind) in [(counter(0), ProgramKind::Fentry), (record(1, 3), ProgramKind::Fexit)] {
        let program = Program {
            name: "p".into(),
            section: String::new(),
            kind,
            target: None,
            insns: by_hand.insns().to_vec(),
            lines: vec![],
            ..Program::default()
        };
        let n_results = u8::from(kind == ProgramKind::Fexit);
        let context = Context::Tracing { n_args: 2, n_results, session: false };
        let verified = verify(&program, &maps, context).unwrap();
        let compile = |v| compile(&ints(2), &maps, &[(v, kind)]);
        assert_eq!(compile(&verified), compile(&by_hand));
    }
}

#[test]
fn two_counters_share_one_slot_lookup() {
    let maps = [map(MapKind::PerCpuArray, 8, 1), map(MapKind::PerCpuArray, 8, 4)];
    let programs = [(&counter(0), ProgramKind::Fentry), (&counter(1), ProgramKind::Fentry)];
    let body = compile(&ints(2), &maps, &programs);
    check(
        body.entry.as_ref(),
        &expect![[r#"
            0000  sub $0x30,%rsp
            0004  mov %rax,(%rsp)
            0008  mov %r8,0x10(%rsp)
            000d  mov %r9,0x18(%rsp)
            0012  mov %r10,0x20(%rsp)
            0017  movabs $0,%r9    # arena - 0x10000
            0021  movabs $0,%r10    # thread pointer
            002b  mov %r10,%r8
            002e  shr $8,%r8
            0032  and $0xFFF0,%r8
            0039  mov 8(%r9,%r8),%rax
            003e  mov (%r9,%r8),%r9
            0042  cmp %r10,%r9
            0045  jne +0x74
            0047  test %rax,%rax
            004a  je +0x74
            004c  addq $1,0x80(%rax)
            0054  addq $1,0x88(%rax)
            005c  mov (%rsp),%rax
            0060  mov 0x10(%rsp),%r8
            0065  mov 0x18(%rsp),%r9
            006a  mov 0x20(%rsp),%r10
            006f  add $0x30,%rsp
            0073  ret
            0074  push %rdi
            0075  movabs $0,%rdi    # arena + 0x0
            007f  movabs $0,%rax    # flea_thread_slot
            0089  call *%rax
            008b  pop %rdi
            008c  test %rax,%rax
            008f  jne +0x4c
            0091  jmp +0x5c
        "#]],
    );
}

#[test]
fn exit_saves_only_what_is_read() {
    let maps = [map(MapKind::Array, 64, 1)];
    let body = compile(&ints(2), &maps, &[(&record(0, 3), ProgramKind::Fexit)]);
    check(
        body.exit.as_ref(),
        &expect![[r#"
            0000  push %rbp
            0001  mov %rsp,%rbp
            0004  sub $0x30,%rsp
            0008  mov %rax,(%rsp)
            000c  mov %rcx,8(%rsp)
            0011  mov %rdx,0x10(%rsp)
            0016  mov %rsi,0x18(%rsp)
            001b  movabs $0,%rcx    # arena - 0x10000
            0025  movabs $0,%rdx    # thread pointer
            002f  mov %rdx,%rsi
            0032  shr $8,%rsi
            0036  and $0xFFF0,%rsi
            003d  mov 8(%rcx,%rsi),%rax
            0042  mov (%rcx,%rsi),%rcx
            0046  cmp %rdx,%rcx
            0049  jne +0xab
            004b  test %rax,%rax
            004e  je +0xab
            0050  mov 0x40(%rax),%rdx
            0054  mov %rsp,%rcx
            0057  cmp %rcx,%rdx
            005a  ja +0xca
            005c  mov %rcx,0x40(%rax)
            0060  mov %rbp,%rcx
            0063  mov (%rcx),%rcx
            0066  mov -0x28(%rcx),%rsi
            006a  movabs $0,%rdx    # arena + 0x21000
            0074  mov %rsi,(%rdx)
            0077  mov -0x30(%rcx),%rsi
            007b  mov %rsi,8(%rdx)
            007f  mov -8(%rcx),%rcx
            0083  mov %rcx,0x10(%rdx)
            0087  movq $0,0x40(%rax)
            008f  mov (%rsp),%rax
            0093  mov 8(%rsp),%rcx
            0098  mov 0x10(%rsp),%rdx
            009d  mov 0x18(%rsp),%rsi
            00a2  add $0x30,%rsp
            00a6  mov %rbp,%rsp
            00a9  pop %rbp
            00aa  ret
            00ab  push %rdi
            00ac  movabs $0,%rdi    # arena + 0x0
            00b6  movabs $0,%rax    # flea_thread_slot
            00c0  call *%rax
            00c2  pop %rdi
            00c3  test %rax,%rax
            00c6  jne +0x50
            00c8  jmp +0x8f
            00ca  addq $1,0x48(%rax)
            00cf  jmp +0x8f
        "#]],
    );
    expect![[r#"
        Reads {
            args: [
                Gpr(
                    0,
                ),
                Gpr(
                    1,
                ),
            ],
            results: [
                Rax,
            ],
        }
    "#]]
    .assert_debug_eq(&body.reads);
}

/// `u64 *c = bpf_session_cookie(ctx); if (is_return) total += now - *c; else *c = now;`
fn latency() -> Verified {
    let cookie = Region::SessionCookie;
    let mut p = vec![
        plain(insn(0xbf, 6, 1, 0, 0)),
        call(Helper::KtimeGetNs, None),
        plain(insn(0xbf, 7, 0, 0, 0)),
        plain(insn(0xbf, 1, 6, 0, 0)),
        call(Helper::SessionCookie, None),
        plain(insn(0xbf, 8, 0, 0, 0)),
        plain(insn(0xbf, 1, 6, 0, 0)),
        call(Helper::SessionIsReturn, None),
        plain(insn(0x55, 0, 0, 2, 0)),
        access(insn(0x7b, 8, 7, 0, 0), cookie),
        plain(insn(0x05, 0, 0, 6, 0)),
        access(insn(0x79, 1, 8, 0, 0), cookie),
        plain(insn(0x1f, 7, 1, 0, 0)),
    ];
    p.extend(support::programs::lddw_value(2, 0, 0));
    p.extend([
        access(insn(0xdb, 2, 7, 0, 0), support::programs::value(0)),
        plain(insn(0x05, 0, 0, 0, 0)),
        plain(insn(0xb7, 0, 0, 0, 0)),
        plain(insn(0x95, 0, 0, 0, 0)),
    ]);
    program(&p)
}

#[test]
fn session_carries_a_cookie() {
    let maps = [map(MapKind::Array, 8, 1)];
    let body = compile(&ints(1), &maps, &[(&latency(), ProgramKind::Fsession)]);
    assert_eq!(body.frame_words, 1);
    check(
        body.session.as_ref(),
        &expect![[r#"
            0000  push %rbp
            0001  mov %rsp,%rbp
            0004  sub $0x30,%rsp
            0008  mov %rax,(%rsp)
            000c  mov %rcx,8(%rsp)
            0011  mov %rdx,0x10(%rsp)
            0016  mov %rsi,0x18(%rsp)
            001b  mov %rdi,0x20(%rsp)
            0020  mov %rbp,%rax
            0023  mov (%rax),%rcx
            0026  movq $0,-0x98(%rcx)
            0031  movabs $0,%rdx    # arena - 0x10000
            003b  movabs $0,%rsi    # thread pointer
            0045  mov %rsi,%rdi
            0048  shr $8,%rdi
            004c  and $0xFFF0,%rdi
            0053  mov 8(%rdx,%rdi),%rax
            0058  mov (%rdx,%rdi),%rdx
            005c  cmp %rsi,%rdx
            005f  jne +0xd3
            0065  test %rax,%rax
            0068  je +0xd3
            006e  mov 0x40(%rax),%rsi
            0072  mov %rsp,%rdx
            0075  cmp %rdx,%rsi
            0078  ja +0xf7
            007e  mov %rdx,0x40(%rax)
            0082  mov %rax,%rdx
            0085  movabs $0,%rdi    # VdsoClockGettime
            008f  mov $1,%esi
            0094  movabs $0,%rax    # flea_clock_ns
            009e  call *%rax
            00a0  mov %rax,-0x98(%rcx)
            00a7  mov %rdx,%rax
            00aa  movq $0,0x40(%rax)
            00b2  mov (%rsp),%rax
            00b6  mov 8(%rsp),%rcx
            00bb  mov 0x10(%rsp),%rdx
            00c0  mov 0x18(%rsp),%rsi
            00c5  mov 0x20(%rsp),%rdi
            00ca  add $0x30,%rsp
            00ce  mov %rbp,%rsp
            00d1  pop %rbp
            00d2  ret
            00d3  movabs $0,%rdi    # arena + 0x0
            00dd  movabs $0,%rax    # flea_thread_slot
            00e7  call *%rax
            00e9  test %rax,%rax
            00ec  jne +0x6e
            00f2  jmp +0xb2
            00f7  addq $1,0x48(%rax)
            00fc  jmp +0xb2
        "#]],
    );
    check(
        body.exit.as_ref(),
        &expect![[r#"
            0000  push %rbp
            0001  mov %rsp,%rbp
            0004  sub $0x30,%rsp
            0008  mov %rax,(%rsp)
            000c  mov %rcx,8(%rsp)
            0011  mov %rdx,0x10(%rsp)
            0016  mov %rsi,0x18(%rsp)
            001b  mov %rdi,0x20(%rsp)
            0020  mov %r8,0x28(%rsp)
            0025  movabs $0,%rcx    # arena - 0x10000
            002f  movabs $0,%rdx    # thread pointer
            0039  mov %rdx,%rsi
            003c  shr $8,%rsi
            0040  and $0xFFF0,%rsi
            0047  mov 8(%rcx,%rsi),%rax
            004c  mov (%rcx,%rsi),%rcx
            0050  cmp %rdx,%rcx
            0053  jne +0xe0
            0059  test %rax,%rax
            005c  je +0xe0
            0062  mov 0x40(%rax),%rdx
            0066  mov %rsp,%rcx
            0069  cmp %rcx,%rdx
            006c  ja +0x104
            0072  mov %rcx,0x40(%rax)
            0076  mov %rax,%r8
            0079  movabs $0,%rdi    # VdsoClockGettime
            0083  mov $1,%esi
            0088  movabs $0,%rax    # flea_clock_ns
            0092  call *%rax
            0094  mov %rbp,%rcx
            0097  mov (%rcx),%rcx
            009a  movabs $0,%rdx    # arena + 0x21000
            00a4  sub -0x98(%rcx),%rax
            00ab  lock add %rax,(%rdx)
            00af  mov %r8,%rax
            00b2  movq $0,0x40(%rax)
            00ba  mov (%rsp),%rax
            00be  mov 8(%rsp),%rcx
            00c3  mov 0x10(%rsp),%rdx
            00c8  mov 0x18(%rsp),%rsi
            00cd  mov 0x20(%rsp),%rdi
            00d2  mov 0x28(%rsp),%r8
            00d7  add $0x30,%rsp
            00db  mov %rbp,%rsp
            00de  pop %rbp
            00df  ret
            00e0  movabs $0,%rdi    # arena + 0x0
            00ea  movabs $0,%rax    # flea_thread_slot
            00f4  call *%rax
            00f6  test %rax,%rax
            00f9  jne +0x62
            00ff  jmp +0xba
            0104  addq $1,0x48(%rax)
            0109  jmp +0xba
        "#]],
    );
}

#[test]
fn skeletons() {
    let maps = [map(MapKind::PerCpuArray, 8, 1), map(MapKind::Array, 64, 1)];
    let programs = [(&counter(0), ProgramKind::Fentry), (&record(1, 3), ProgramKind::Fexit)];
    let body = compile(&ints(2), &maps, &programs);
    let exit = body.exit.unwrap().resolve(|_| 0x7000_0000_0000);
    let link = |exit: Option<BodyRef<'_>>| {
        let bodies = [SkeletonBody {
            entry: Some(BodyRef::Call(RemoteAddr(0x50_0000))),
            session: None,
            modify: None,
            exit,
            reads: &body.reads,
            saves: &body.saves,
            frame_words: 0,
            frame_offset: 0,
        }];
        link_skeleton(&SkeletonRequest {
            site: RemoteAddr(0x40_1000),
            // push rbp; mov rbp, rsp; lea rax, [rip + 0x100]
            replaced: &[0x55, 0x48, 0x89, 0xe5, 0x48, 0x8d, 0x05, 0, 1, 0, 0],
            kind: SiteKind::Relocated,
            image_address: RemoteAddr(0x60_0000),
            bodies: &bodies,
            skip: None,
            stack_copy: StackCopy::Exactly(3),
            stack_align_bytes: 16,
        })
        .unwrap()
    };
    expect![[r#"
        0000  call 0x0000000000500000
        0005  push %rbp
        0006  mov %rsp,%rbp
        0009  lea 0x40110B,%rax
        0010  jmp 0x000000000040100B
    "#]]
    .assert_eq(&link(None).listing());
    let skeleton = link(Some(BodyRef::Inline(&exit)));
    expect![[r#"
        0000  call 0x0000000000500000
        0005  push %rbp
        0006  mov %rsp,%rbp
        0009  lea -0x98(%rsp),%rsp
        0011  mov %rdi,-0x28(%rbp)
        0015  mov %rsi,-0x30(%rbp)
        0019  pushq 0x20(%rbp)
        001c  pushq 0x18(%rbp)
        001f  pushq 0x10(%rbp)
        0022  call 0x0000000000600113
        0027  mov %rbp,-8(%rsp)
        002c  mov %rax,-8(%rbp)
        0030  push %rbp
        0031  mov %rsp,%rbp
        0034  sub $0x30,%rsp
        0038  mov %rax,(%rsp)
        003c  mov %rcx,8(%rsp)
        0041  mov %rdx,0x10(%rsp)
        0046  mov %rsi,0x18(%rsp)
        004b  movabs $0x700000000000,%rcx
        0055  mov %fs:0,%rdx
        005e  nop
        005f  mov %rdx,%rsi
        0062  shr $8,%rsi
        0066  and $0xFFF0,%rsi
        006d  mov 8(%rcx,%rsi),%rax
        0072  mov (%rcx,%rsi),%rcx
        0076  cmp %rdx,%rcx
        0079  jne +0xdc
        007b  test %rax,%rax
        007e  je +0xdc
        0080  mov 0x50(%rax),%rdx
        0084  mov %rsp,%rcx
        0087  cmp %rcx,%rdx
        008a  ja +0xfb
        008c  mov %rcx,0x50(%rax)
        0090  mov %rbp,%rcx
        0093  mov (%rcx),%rcx
        0096  mov -0x28(%rcx),%rsi
        009a  movabs $0x700000000000,%rdx
        00a4  mov %rsi,(%rdx)
        00a7  mov -0x30(%rcx),%rsi
        00ab  mov %rsi,8(%rdx)
        00af  mov -8(%rcx),%rcx
        00b3  mov %rcx,0x10(%rdx)
        00b7  movq $0,0x50(%rax)
        00bf  mov (%rsp),%rax
        00c3  mov 8(%rsp),%rcx
        00c8  mov 0x10(%rsp),%rdx
        00cd  mov 0x18(%rsp),%rsi
        00d2  add $0x30,%rsp
        00d6  mov %rbp,%rsp
        00d9  pop %rbp
        00da  jmp +0x102
        00dc  push %rdi
        00dd  movabs $0x700000000000,%rdi
        00e7  movabs $0x700000000000,%rax
        00f1  call *%rax
        00f3  pop %rdi
        00f4  test %rax,%rax
        00f7  jne +0x80
        00f9  jmp +0xbf
        00fb  addq $1,0x58(%rax)
        0100  jmp +0xbf
        0102  leave
        0103  ret
        0104  mov %rbp,-8(%rsp)
        0109  leave
        010a  ret
        010b  nopl 0x61656C66(%rax,%rax)
        0113  push %rbp
        0114  mov %rsp,%rbp
        0117  lea 0x40110B,%rax
        011e  jmp 0x000000000040100B
    "#]]
    .assert_eq(&skeleton.listing());
    expect![[r#"
        (
            [
                UnwindRow {
                    offset: 0,
                    rule: Entry,
                },
                UnwindRow {
                    offset: 9,
                    rule: Frame,
                },
                UnwindRow {
                    offset: 275,
                    rule: Original,
                },
            ],
            [
                (
                    0x401000,
                    0x600113,
                ),
                (
                    0x401001,
                    0x600114,
                ),
                (
                    0x401004,
                    0x600117,
                ),
            ],
            0x600113,
        )
    "#]]
    .assert_debug_eq(&(skeleton.rows, skeleton.moves, skeleton.original_entry));
}
