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
            0049  jne +0xac
            004b  test %rax,%rax
            004e  je +0xac
            0050  mov 0x40(%rax),%rcx
            0054  test %rcx,%rcx
            0057  jne +0xcb
            0059  movq $1,0x40(%rax)
            0061  mov %rbp,%rcx
            0064  mov (%rcx),%rcx
            0067  mov -0x28(%rcx),%rsi
            006b  movabs $0,%rdx    # arena + 0x21000
            0075  mov %rsi,(%rdx)
            0078  mov -0x30(%rcx),%rsi
            007c  mov %rsi,8(%rdx)
            0080  mov -8(%rcx),%rcx
            0084  mov %rcx,0x10(%rdx)
            0088  movq $0,0x40(%rax)
            0090  mov (%rsp),%rax
            0094  mov 8(%rsp),%rcx
            0099  mov 0x10(%rsp),%rdx
            009e  mov 0x18(%rsp),%rsi
            00a3  add $0x30,%rsp
            00a7  mov %rbp,%rsp
            00aa  pop %rbp
            00ab  ret
            00ac  push %rdi
            00ad  movabs $0,%rdi    # arena + 0x0
            00b7  movabs $0,%rax    # flea_thread_slot
            00c1  call *%rax
            00c3  pop %rdi
            00c4  test %rax,%rax
            00c7  jne +0x50
            00c9  jmp +0x90
            00cb  addq $1,0x48(%rax)
            00d0  jmp +0x90
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
            005f  jne +0xd4
            0065  test %rax,%rax
            0068  je +0xd4
            006e  mov 0x40(%rax),%rdx
            0072  test %rdx,%rdx
            0075  jne +0xf8
            007b  mov $1,%esi
            0080  movq $1,0x40(%rax)
            0088  mov %rax,%rdx
            008b  movabs $0,%rdi    # VdsoClockGettime
            0095  movabs $0,%rax    # flea_clock_ns
            009f  call *%rax
            00a1  mov %rax,-0x98(%rcx)
            00a8  mov %rdx,%rax
            00ab  movq $0,0x40(%rax)
            00b3  mov (%rsp),%rax
            00b7  mov 8(%rsp),%rcx
            00bc  mov 0x10(%rsp),%rdx
            00c1  mov 0x18(%rsp),%rsi
            00c6  mov 0x20(%rsp),%rdi
            00cb  add $0x30,%rsp
            00cf  mov %rbp,%rsp
            00d2  pop %rbp
            00d3  ret
            00d4  movabs $0,%rdi    # arena + 0x0
            00de  movabs $0,%rax    # flea_thread_slot
            00e8  call *%rax
            00ea  test %rax,%rax
            00ed  jne +0x6e
            00f3  jmp +0xb3
            00f8  addq $1,0x48(%rax)
            00fd  jmp +0xb3
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
            0053  jne +0xe1
            0059  test %rax,%rax
            005c  je +0xe1
            0062  mov 0x40(%rax),%rcx
            0066  test %rcx,%rcx
            0069  jne +0x105
            006f  mov $1,%esi
            0074  movq $1,0x40(%rax)
            007c  mov %rax,%r8
            007f  movabs $0,%rdi    # VdsoClockGettime
            0089  movabs $0,%rax    # flea_clock_ns
            0093  call *%rax
            0095  mov %rbp,%rcx
            0098  mov (%rcx),%rcx
            009b  movabs $0,%rdx    # arena + 0x21000
            00a5  sub -0x98(%rcx),%rax
            00ac  lock add %rax,(%rdx)
            00b0  mov %r8,%rax
            00b3  movq $0,0x40(%rax)
            00bb  mov (%rsp),%rax
            00bf  mov 8(%rsp),%rcx
            00c4  mov 0x10(%rsp),%rdx
            00c9  mov 0x18(%rsp),%rsi
            00ce  mov 0x20(%rsp),%rdi
            00d3  mov 0x28(%rsp),%r8
            00d8  add $0x30,%rsp
            00dc  mov %rbp,%rsp
            00df  pop %rbp
            00e0  ret
            00e1  movabs $0,%rdi    # arena + 0x0
            00eb  movabs $0,%rax    # flea_thread_slot
            00f5  call *%rax
            00f7  test %rax,%rax
            00fa  jne +0x62
            0100  jmp +0xbb
            0105  addq $1,0x48(%rax)
            010a  jmp +0xbb
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
        0022  call 0x0000000000600114
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
        0079  jne +0xdd
        007b  test %rax,%rax
        007e  je +0xdd
        0080  mov 0x50(%rax),%rcx
        0084  test %rcx,%rcx
        0087  jne +0xfc
        0089  movq $1,0x50(%rax)
        0091  mov %rbp,%rcx
        0094  mov (%rcx),%rcx
        0097  mov -0x28(%rcx),%rsi
        009b  movabs $0x700000000000,%rdx
        00a5  mov %rsi,(%rdx)
        00a8  mov -0x30(%rcx),%rsi
        00ac  mov %rsi,8(%rdx)
        00b0  mov -8(%rcx),%rcx
        00b4  mov %rcx,0x10(%rdx)
        00b8  movq $0,0x50(%rax)
        00c0  mov (%rsp),%rax
        00c4  mov 8(%rsp),%rcx
        00c9  mov 0x10(%rsp),%rdx
        00ce  mov 0x18(%rsp),%rsi
        00d3  add $0x30,%rsp
        00d7  mov %rbp,%rsp
        00da  pop %rbp
        00db  jmp +0x103
        00dd  push %rdi
        00de  movabs $0x700000000000,%rdi
        00e8  movabs $0x700000000000,%rax
        00f2  call *%rax
        00f4  pop %rdi
        00f5  test %rax,%rax
        00f8  jne +0x80
        00fa  jmp +0xc0
        00fc  addq $1,0x58(%rax)
        0101  jmp +0xc0
        0103  leave
        0104  ret
        0105  mov %rbp,-8(%rsp)
        010a  leave
        010b  ret
        010c  nopl 0x61656C66(%rax,%rax)
        0114  push %rbp
        0115  mov %rsp,%rbp
        0118  lea 0x40110B,%rax
        011f  jmp 0x000000000040100B
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
                    offset: 276,
                    rule: Original,
                },
            ],
            [
                (
                    0x401000,
                    0x600114,
                ),
                (
                    0x401001,
                    0x600115,
                ),
                (
                    0x401004,
                    0x600118,
                ),
            ],
            0x600114,
        )
    "#]]
    .assert_debug_eq(&(skeleton.rows, skeleton.moves, skeleton.original_entry));
}
