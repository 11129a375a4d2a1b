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
        0000  push %rbp
        0001  mov %rsp,%rbp
        0004  sub $0x30,%rsp
        0008  mov %rax,(%rsp)
        000c  mov %rcx,8(%rsp)
        0011  mov %rdi,0x10(%rsp)
        0016  mov %r10,0x18(%rsp)
        001b  mov %r11,0x20(%rsp)
        0020  movabs $0,%r11    # arena - 0x10000
        002a  movabs $0,%rcx    # thread pointer
        0034  mov %rcx,%r10
        0037  shr $8,%r10
        003b  and $0xFFF0,%r10
        0042  mov 8(%r11,%r10),%rax
        0047  mov (%r11,%r10),%r11
        004b  cmp %rcx,%r11
        004e  jne +0x7d
        0054  addq $1,0x80(%rax)
        005c  mov (%rsp),%rax
        0060  mov 8(%rsp),%rcx
        0065  mov 0x10(%rsp),%rdi
        006a  mov 0x18(%rsp),%r10
        006f  mov 0x20(%rsp),%r11
        0074  add $0x30,%rsp
        0078  mov %rbp,%rsp
        007b  pop %rbp
        007c  ret
        007d  movabs $0,%rdi    # arena + 0x0
        0087  movabs $0,%rax    # flea_thread_slot
        0091  call *%rax
        0093  test %rax,%rax
        0096  jne +0x54
        009c  movabs $0,%rax    # arena + 0x28
        00a6  mov $1,%ecx
        00ab  lock add %rcx,(%rax)
        00af  jmp +0x5c
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
        0000  push %rbp
        0001  mov %rsp,%rbp
        0004  sub $0x30,%rsp
        0008  mov %rax,(%rsp)
        000c  mov %rcx,8(%rsp)
        0011  mov %rdi,0x10(%rsp)
        0016  mov %r10,0x18(%rsp)
        001b  mov %r11,0x20(%rsp)
        0020  movabs $0,%r11    # arena - 0x10000
        002a  movabs $0,%rcx    # thread pointer
        0034  mov %rcx,%r10
        0037  shr $8,%r10
        003b  and $0xFFF0,%r10
        0042  mov 8(%r11,%r10),%rax
        0047  mov (%r11,%r10),%r11
        004b  cmp %rcx,%r11
        004e  jne +0x85
        0054  addq $1,0x80(%rax)
        005c  addq $1,0x88(%rax)
        0064  mov (%rsp),%rax
        0068  mov 8(%rsp),%rcx
        006d  mov 0x10(%rsp),%rdi
        0072  mov 0x18(%rsp),%r10
        0077  mov 0x20(%rsp),%r11
        007c  add $0x30,%rsp
        0080  mov %rbp,%rsp
        0083  pop %rbp
        0084  ret
        0085  movabs $0,%rdi    # arena + 0x0
        008f  movabs $0,%rax    # flea_thread_slot
        0099  call *%rax
        009b  test %rax,%rax
        009e  jne +0x54
        00a4  movabs $0,%rax    # arena + 0x28
        00ae  mov $1,%ecx
        00b3  lock add %rcx,(%rax)
        00b7  jmp +0x64
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
        0054  jne +0xb9
        005a  mov 0x40(%rax),%rdx
        005e  test %rdx,%rdx
        0061  jne +0xf0
        0067  movq $1,0x40(%rax)
        006f  mov -0x28(%rcx),%rsi
        0073  movabs $0,%rdx    # arena + 0x21000
        007d  mov %rsi,(%rdx)
        0080  mov -0x30(%rcx),%rsi
        0084  mov %rsi,8(%rdx)
        0088  mov -8(%rcx),%rcx
        008c  mov %rcx,0x10(%rdx)
        0090  movq $0,0x40(%rax)
        0098  mov (%rsp),%rax
        009c  mov 8(%rsp),%rcx
        00a1  mov 0x10(%rsp),%rdx
        00a6  mov 0x18(%rsp),%rsi
        00ab  mov 0x20(%rsp),%rdi
        00b0  add $0x30,%rsp
        00b4  mov %rbp,%rsp
        00b7  pop %rbp
        00b8  ret
        00b9  movabs $0,%rdi    # arena + 0x0
        00c3  movabs $0,%rax    # flea_thread_slot
        00cd  call *%rax
        00cf  test %rax,%rax
        00d2  jne +0x5a
        00d8  movabs $0,%rax    # arena + 0x28
        00e2  mov $1,%ecx
        00e7  lock add %rcx,(%rax)
        00eb  jmp +0x98
        00f0  addq $1,0x48(%rax)
        00f5  jmp +0x98
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
        005f  jne +0xcb
        0065  mov 0x40(%rax),%rdx
        0069  test %rdx,%rdx
        006c  jne +0x102
        0072  mov $1,%esi
        0077  movq $1,0x40(%rax)
        007f  mov %rax,%rdx
        0082  movabs $0,%rdi    # VdsoClockGettime
        008c  movabs $0,%rax    # flea_clock_ns
        0096  call *%rax
        0098  mov %rax,-0x98(%rcx)
        009f  mov %rdx,%rax
        00a2  movq $0,0x40(%rax)
        00aa  mov (%rsp),%rax
        00ae  mov 8(%rsp),%rcx
        00b3  mov 0x10(%rsp),%rdx
        00b8  mov 0x18(%rsp),%rsi
        00bd  mov 0x20(%rsp),%rdi
        00c2  add $0x30,%rsp
        00c6  mov %rbp,%rsp
        00c9  pop %rbp
        00ca  ret
        00cb  movabs $0,%rdi    # arena + 0x0
        00d5  movabs $0,%rax    # flea_thread_slot
        00df  call *%rax
        00e1  test %rax,%rax
        00e4  jne +0x65
        00ea  movabs $0,%rax    # arena + 0x28
        00f4  mov $1,%ecx
        00f9  lock add %rcx,(%rax)
        00fd  jmp +0xaa
        0102  addq $1,0x48(%rax)
        0107  jmp +0xaa
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
        0059  jne +0xd8
        005f  mov 0x40(%rax),%rdx
        0063  test %rdx,%rdx
        0066  jne +0x10f
        006c  mov $1,%esi
        0071  movq $1,0x40(%rax)
        0079  mov %rax,%r8
        007c  movabs $0,%rdi    # VdsoClockGettime
        0086  movabs $0,%rax    # flea_clock_ns
        0090  call *%rax
        0092  movabs $0,%rdx    # arena + 0x21000
        009c  sub -0x98(%rcx),%rax
        00a3  lock add %rax,(%rdx)
        00a7  mov %r8,%rax
        00aa  movq $0,0x40(%rax)
        00b2  mov (%rsp),%rax
        00b6  mov 8(%rsp),%rcx
        00bb  mov 0x10(%rsp),%rdx
        00c0  mov 0x18(%rsp),%rsi
        00c5  mov 0x20(%rsp),%rdi
        00ca  mov 0x28(%rsp),%r8
        00cf  add $0x30,%rsp
        00d3  mov %rbp,%rsp
        00d6  pop %rbp
        00d7  ret
        00d8  movabs $0,%rdi    # arena + 0x0
        00e2  movabs $0,%rax    # flea_thread_slot
        00ec  call *%rax
        00ee  test %rax,%rax
        00f1  jne +0x5f
        00f7  movabs $0,%rax    # arena + 0x28
        0101  mov $1,%ecx
        0106  lock add %rcx,(%rax)
        010a  jmp +0xb2
        010f  addq $1,0x48(%rax)
        0114  jmp +0xb2
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
        0022  call 0x000000000060011A
        0027  mov %rax,-8(%rbp)
        002b  push %rbp
        002c  mov %rsp,%rbp
        002f  sub $0x30,%rsp
        0033  mov %rax,(%rsp)
        0037  mov %rcx,8(%rsp)
        003c  mov %rdx,0x10(%rsp)
        0041  mov %rsi,0x18(%rsp)
        0046  mov %rdi,0x20(%rsp)
        004b  mov %rbp,%rax
        004e  mov (%rax),%rcx
        0051  movabs $0x700000000000,%rdx
        005b  mov %fs:0,%rsi
        0064  nop
        0065  mov %rsi,%rdi
        0068  shr $8,%rdi
        006c  and $0xFFF0,%rdi
        0073  mov 8(%rdx,%rdi),%rax
        0078  mov (%rdx,%rdi),%rdx
        007c  cmp %rsi,%rdx
        007f  jne +0xe1
        0081  mov 0x50(%rax),%rdx
        0085  test %rdx,%rdx
        0088  jne +0x111
        008e  movq $1,0x50(%rax)
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
        00d2  mov 0x20(%rsp),%rdi
        00d7  add $0x30,%rsp
        00db  mov %rbp,%rsp
        00de  pop %rbp
        00df  jmp +0x118
        00e1  movabs $0x700000000000,%rdi
        00eb  movabs $0x700000000000,%rax
        00f5  call *%rax
        00f7  test %rax,%rax
        00fa  jne +0x81
        00fc  movabs $0x700000000000,%rax
        0106  mov $1,%ecx
        010b  lock add %rcx,(%rax)
        010f  jmp +0xbf
        0111  addq $1,0x58(%rax)
        0116  jmp +0xbf
        0118  leave
        0119  ret
        011a  push %rbp
        011b  mov %rsp,%rbp
        011e  lea 0x40110B,%rax
        0125  jmp 0x000000000040100B
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
                    offset: 282,
                    rule: Original,
                },
            ],
            [
                (
                    0x401000,
                    0x60011a,
                ),
                (
                    0x401001,
                    0x60011b,
                ),
                (
                    0x401004,
                    0x60011e,
                ),
            ],
            0x60011a,
        )
    "#]]
    .assert_debug_eq(&(skeleton.rows, skeleton.moves, skeleton.original_entry));
}
