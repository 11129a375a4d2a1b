//! What bodies and skeletons look like. `UPDATE_EXPECT=1 cargo test` blesses changes.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use expect_test::{Expect, expect};
use flea_image::{
    BODY_FRAMES_OFFSET, Body, BodyRef, BodyRequest, Code, ProgramUse, SiteKind, SkeletonBody,
    SkeletonRequest, check_body, compile_body, link_skeleton,
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
    for code in [&body.entry, &body.session, &body.exit].into_iter().flatten() {
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
        let context =
            Context::Tracing { n_args: 2, has_result: kind == ProgramKind::Fexit, session: false };
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
            001b  mov %rdi,0x20(%rsp)
            0020  mov %rbp,%rax
            0023  mov (%rax),%rcx
            0026  movabs $0,%rdx    # arena - 0x10000
            0030  movabs $0,%rsi    # thread pointer
            003a  mov %rsi,%rdi
            003d  shr $8,%rdi
            0041  and $0xFFF0,%rdi
            0048  mov 8(%rdx,%rdi),%rax
            004d  mov (%rdx,%rdi),%rdx
            0051  cmp %rsi,%rdx
            0054  jne +0xc2
            005a  test %rax,%rax
            005d  je +0xc2
            0063  mov 0x40(%rax),%rdx
            0067  test %rdx,%rdx
            006a  jne +0xe6
            0070  movq $1,0x40(%rax)
            0078  mov -0x28(%rcx),%rsi
            007c  movabs $0,%rdx    # arena + 0x21000
            0086  mov %rsi,(%rdx)
            0089  mov -0x30(%rcx),%rsi
            008d  mov %rsi,8(%rdx)
            0091  mov -8(%rcx),%rcx
            0095  mov %rcx,0x10(%rdx)
            0099  movq $0,0x40(%rax)
            00a1  mov (%rsp),%rax
            00a5  mov 8(%rsp),%rcx
            00aa  mov 0x10(%rsp),%rdx
            00af  mov 0x18(%rsp),%rsi
            00b4  mov 0x20(%rsp),%rdi
            00b9  add $0x30,%rsp
            00bd  mov %rbp,%rsp
            00c0  pop %rbp
            00c1  ret
            00c2  movabs $0,%rdi    # arena + 0x0
            00cc  movabs $0,%rax    # flea_thread_slot
            00d6  call *%rax
            00d8  test %rax,%rax
            00db  jne +0x63
            00e1  jmp +0xa1
            00e6  addq $1,0x48(%rax)
            00eb  jmp +0xa1
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
            0025  mov %rbp,%rax
            0028  mov (%rax),%rcx
            002b  movabs $0,%rdx    # arena - 0x10000
            0035  movabs $0,%rsi    # thread pointer
            003f  mov %rsi,%rdi
            0042  shr $8,%rdi
            0046  and $0xFFF0,%rdi
            004d  mov 8(%rdx,%rdi),%rax
            0052  mov (%rdx,%rdi),%rdx
            0056  cmp %rsi,%rdx
            0059  jne +0xe1
            005f  test %rax,%rax
            0062  je +0xe1
            0068  mov 0x40(%rax),%rdx
            006c  test %rdx,%rdx
            006f  jne +0x105
            0075  mov $1,%esi
            007a  movq $1,0x40(%rax)
            0082  mov %rax,%r8
            0085  movabs $0,%rdi    # VdsoClockGettime
            008f  movabs $0,%rax    # flea_clock_ns
            0099  call *%rax
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
            00fa  jne +0x68
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
            exit,
            reads: &body.reads,
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
            stack_words: 3,
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
        0022  call 0x0000000000600115
        0027  mov %rbp,-8(%rsp)
        002c  mov %rax,-8(%rbp)
        0030  push %rbp
        0031  mov %rsp,%rbp
        0034  sub $0x30,%rsp
        0038  mov %rax,(%rsp)
        003c  mov %rcx,8(%rsp)
        0041  mov %rdx,0x10(%rsp)
        0046  mov %rsi,0x18(%rsp)
        004b  mov %rdi,0x20(%rsp)
        0050  mov %rbp,%rax
        0053  mov (%rax),%rcx
        0056  movabs $0x700000000000,%rdx
        0060  mov %fs:0,%rsi
        0069  nop
        006a  mov %rsi,%rdi
        006d  shr $8,%rdi
        0071  and $0xFFF0,%rdi
        0078  mov 8(%rdx,%rdi),%rax
        007d  mov (%rdx,%rdi),%rdx
        0081  cmp %rsi,%rdx
        0084  jne +0xe7
        0086  test %rax,%rax
        0089  je +0xe7
        008b  mov 0x50(%rax),%rdx
        008f  test %rdx,%rdx
        0092  jne +0x104
        0094  movq $1,0x50(%rax)
        009c  mov -0x28(%rcx),%rsi
        00a0  movabs $0x700000000000,%rdx
        00aa  mov %rsi,(%rdx)
        00ad  mov -0x30(%rcx),%rsi
        00b1  mov %rsi,8(%rdx)
        00b5  mov -8(%rcx),%rcx
        00b9  mov %rcx,0x10(%rdx)
        00bd  movq $0,0x50(%rax)
        00c5  mov (%rsp),%rax
        00c9  mov 8(%rsp),%rcx
        00ce  mov 0x10(%rsp),%rdx
        00d3  mov 0x18(%rsp),%rsi
        00d8  mov 0x20(%rsp),%rdi
        00dd  add $0x30,%rsp
        00e1  mov %rbp,%rsp
        00e4  pop %rbp
        00e5  jmp +0x10b
        00e7  movabs $0x700000000000,%rdi
        00f1  movabs $0x700000000000,%rax
        00fb  call *%rax
        00fd  test %rax,%rax
        0100  jne +0x8b
        0102  jmp +0xc5
        0104  addq $1,0x58(%rax)
        0109  jmp +0xc5
        010b  leave
        010c  ret
        010d  nopl 0x61656C66(%rax,%rax)
        0115  push %rbp
        0116  mov %rsp,%rbp
        0119  lea 0x40110B,%rax
        0120  jmp 0x000000000040100B
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
                    offset: 277,
                    rule: Original,
                },
            ],
            [
                (
                    0x401000,
                    0x600115,
                ),
                (
                    0x401001,
                    0x600116,
                ),
                (
                    0x401004,
                    0x600119,
                ),
            ],
            0x600115,
        )
    "#]]
    .assert_debug_eq(&(skeleton.rows, skeleton.moves, skeleton.original_entry));
}
