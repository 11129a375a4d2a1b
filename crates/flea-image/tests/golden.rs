//! What bodies and skeletons look like. `UPDATE_EXPECT=1 cargo test` blesses changes.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use expect_test::{Expect, expect};
use flea_image::{
    BODY_FRAMES_OFFSET, Body, BodyRef, BodyRequest, Code, ProgramUse, SiteKind, SkeletonBody,
    SkeletonRequest, check_body, compile_body, link_skeleton,
};
use flea_object::helper::Helper;
use flea_object::spec::{MapKind, MapSpec, ProgramKind};
use flea_symbols::addr::RemoteAddr;
use flea_symbols::signature::Signature;
use flea_verifier::Verified;
use flea_verifier::facts::Region;
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
    check(body.entry.as_ref(), &expect![[r#"
           0  push %rbp
           1  mov %rsp,%rbp
           4  sub $0x30,%rsp
           8  mov %rax,(%rsp)
           c  mov %rcx,8(%rsp)
          11  mov %rdi,0x10(%rsp)
          16  mov %r10,0x18(%rsp)
          1b  mov %r11,0x20(%rsp)
          20  movabs $0,%r11    # arena - 0x10000
          2a  movabs $0,%rcx    # thread pointer
          34  mov %rcx,%r10
          37  shr $8,%r10
          3b  and $0xFFF0,%r10
          42  mov 8(%r11,%r10),%rax
          47  mov (%r11,%r10),%r11
          4b  cmp %rcx,%r11
          4e  jne +0x7d
          54  addq $1,0x80(%rax)
          5c  mov (%rsp),%rax
          60  mov 8(%rsp),%rcx
          65  mov 0x10(%rsp),%rdi
          6a  mov 0x18(%rsp),%r10
          6f  mov 0x20(%rsp),%r11
          74  add $0x30,%rsp
          78  mov %rbp,%rsp
          7b  pop %rbp
          7c  ret
          7d  movabs $0,%rdi    # arena + 0x0
          87  movabs $0,%rax    # flea_thread_slot
          91  call *%rax
          93  test %rax,%rax
          96  jne +0x54
          9c  movabs $0,%rax    # arena + 0x28
          a6  mov $1,%ecx
          ab  lock add %rcx,(%rax)
          af  jmp +0x5c
    "#]]);
}

#[test]
fn two_counters_share_one_slot_lookup() {
    let maps = [map(MapKind::PerCpuArray, 8, 1), map(MapKind::PerCpuArray, 8, 4)];
    let programs = [(&counter(0), ProgramKind::Fentry), (&counter(1), ProgramKind::Fentry)];
    let body = compile(&ints(2), &maps, &programs);
    check(body.entry.as_ref(), &expect![[r#"
           0  push %rbp
           1  mov %rsp,%rbp
           4  sub $0x30,%rsp
           8  mov %rax,(%rsp)
           c  mov %rcx,8(%rsp)
          11  mov %rdi,0x10(%rsp)
          16  mov %r10,0x18(%rsp)
          1b  mov %r11,0x20(%rsp)
          20  movabs $0,%r11    # arena - 0x10000
          2a  movabs $0,%rcx    # thread pointer
          34  mov %rcx,%r10
          37  shr $8,%r10
          3b  and $0xFFF0,%r10
          42  mov 8(%r11,%r10),%rax
          47  mov (%r11,%r10),%r11
          4b  cmp %rcx,%r11
          4e  jne +0x85
          54  addq $1,0x80(%rax)
          5c  addq $1,0x88(%rax)
          64  mov (%rsp),%rax
          68  mov 8(%rsp),%rcx
          6d  mov 0x10(%rsp),%rdi
          72  mov 0x18(%rsp),%r10
          77  mov 0x20(%rsp),%r11
          7c  add $0x30,%rsp
          80  mov %rbp,%rsp
          83  pop %rbp
          84  ret
          85  movabs $0,%rdi    # arena + 0x0
          8f  movabs $0,%rax    # flea_thread_slot
          99  call *%rax
          9b  test %rax,%rax
          9e  jne +0x54
          a4  movabs $0,%rax    # arena + 0x28
          ae  mov $1,%ecx
          b3  lock add %rcx,(%rax)
          b7  jmp +0x64
    "#]]);
}

#[test]
fn exit_saves_only_what_is_read() {
    let maps = [map(MapKind::Array, 64, 1)];
    let body = compile(&ints(2), &maps, &[(&record(0, 3), ProgramKind::Fexit)]);
    check(body.exit.as_ref(), &expect![[r#"
           0  push %rbp
           1  mov %rsp,%rbp
           4  sub $0x30,%rsp
           8  mov %rax,(%rsp)
           c  mov %rcx,8(%rsp)
          11  mov %rdx,0x10(%rsp)
          16  mov %rsi,0x18(%rsp)
          1b  mov %rdi,0x20(%rsp)
          20  mov %rbp,%rax
          23  mov (%rax),%rcx
          26  movabs $0,%rdx    # arena - 0x10000
          30  movabs $0,%rsi    # thread pointer
          3a  mov %rsi,%rdi
          3d  shr $8,%rdi
          41  and $0xFFF0,%rdi
          48  mov 8(%rdx,%rdi),%rax
          4d  mov (%rdx,%rdi),%rdx
          51  cmp %rsi,%rdx
          54  jne +0xb9
          5a  mov 0x40(%rax),%rdx
          5e  test %rdx,%rdx
          61  jne +0xf0
          67  movq $1,0x40(%rax)
          6f  mov -0x28(%rcx),%rsi
          73  movabs $0,%rdx    # arena + 0x21000
          7d  mov %rsi,(%rdx)
          80  mov -0x30(%rcx),%rsi
          84  mov %rsi,8(%rdx)
          88  mov -8(%rcx),%rcx
          8c  mov %rcx,0x10(%rdx)
          90  movq $0,0x40(%rax)
          98  mov (%rsp),%rax
          9c  mov 8(%rsp),%rcx
          a1  mov 0x10(%rsp),%rdx
          a6  mov 0x18(%rsp),%rsi
          ab  mov 0x20(%rsp),%rdi
          b0  add $0x30,%rsp
          b4  mov %rbp,%rsp
          b7  pop %rbp
          b8  ret
          b9  movabs $0,%rdi    # arena + 0x0
          c3  movabs $0,%rax    # flea_thread_slot
          cd  call *%rax
          cf  test %rax,%rax
          d2  jne +0x5a
          d8  movabs $0,%rax    # arena + 0x28
          e2  mov $1,%ecx
          e7  lock add %rcx,(%rax)
          eb  jmp +0x98
          f0  addq $1,0x48(%rax)
          f5  jmp +0x98
    "#]]);
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
    "#]].assert_debug_eq(&body.reads);
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
    check(body.session.as_ref(), &expect![[r#"
           0  push %rbp
           1  mov %rsp,%rbp
           4  sub $0x30,%rsp
           8  mov %rax,(%rsp)
           c  mov %rcx,8(%rsp)
          11  mov %rdx,0x10(%rsp)
          16  mov %rsi,0x18(%rsp)
          1b  mov %rdi,0x20(%rsp)
          20  mov %rbp,%rax
          23  mov (%rax),%rcx
          26  movq $0,-0x98(%rcx)
          31  movabs $0,%rdx    # arena - 0x10000
          3b  movabs $0,%rsi    # thread pointer
          45  mov %rsi,%rdi
          48  shr $8,%rdi
          4c  and $0xFFF0,%rdi
          53  mov 8(%rdx,%rdi),%rax
          58  mov (%rdx,%rdi),%rdx
          5c  cmp %rsi,%rdx
          5f  jne +0xcb
          65  mov 0x40(%rax),%rdx
          69  test %rdx,%rdx
          6c  jne +0x102
          72  mov $1,%esi
          77  movq $1,0x40(%rax)
          7f  mov %rax,%rdx
          82  movabs $0,%rdi    # VdsoClockGettime
          8c  movabs $0,%rax    # flea_clock_ns
          96  call *%rax
          98  mov %rax,-0x98(%rcx)
          9f  mov %rdx,%rax
          a2  movq $0,0x40(%rax)
          aa  mov (%rsp),%rax
          ae  mov 8(%rsp),%rcx
          b3  mov 0x10(%rsp),%rdx
          b8  mov 0x18(%rsp),%rsi
          bd  mov 0x20(%rsp),%rdi
          c2  add $0x30,%rsp
          c6  mov %rbp,%rsp
          c9  pop %rbp
          ca  ret
          cb  movabs $0,%rdi    # arena + 0x0
          d5  movabs $0,%rax    # flea_thread_slot
          df  call *%rax
          e1  test %rax,%rax
          e4  jne +0x65
          ea  movabs $0,%rax    # arena + 0x28
          f4  mov $1,%ecx
          f9  lock add %rcx,(%rax)
          fd  jmp +0xaa
         102  addq $1,0x48(%rax)
         107  jmp +0xaa
    "#]]);
    check(body.exit.as_ref(), &expect![[r#"
           0  push %rbp
           1  mov %rsp,%rbp
           4  sub $0x30,%rsp
           8  mov %rax,(%rsp)
           c  mov %rcx,8(%rsp)
          11  mov %rdx,0x10(%rsp)
          16  mov %rsi,0x18(%rsp)
          1b  mov %rdi,0x20(%rsp)
          20  mov %r8,0x28(%rsp)
          25  mov %rbp,%rax
          28  mov (%rax),%rcx
          2b  movabs $0,%rdx    # arena - 0x10000
          35  movabs $0,%rsi    # thread pointer
          3f  mov %rsi,%rdi
          42  shr $8,%rdi
          46  and $0xFFF0,%rdi
          4d  mov 8(%rdx,%rdi),%rax
          52  mov (%rdx,%rdi),%rdx
          56  cmp %rsi,%rdx
          59  jne +0xd8
          5f  mov 0x40(%rax),%rdx
          63  test %rdx,%rdx
          66  jne +0x10f
          6c  mov $1,%esi
          71  movq $1,0x40(%rax)
          79  mov %rax,%r8
          7c  movabs $0,%rdi    # VdsoClockGettime
          86  movabs $0,%rax    # flea_clock_ns
          90  call *%rax
          92  movabs $0,%rdx    # arena + 0x21000
          9c  sub -0x98(%rcx),%rax
          a3  lock add %rax,(%rdx)
          a7  mov %r8,%rax
          aa  movq $0,0x40(%rax)
          b2  mov (%rsp),%rax
          b6  mov 8(%rsp),%rcx
          bb  mov 0x10(%rsp),%rdx
          c0  mov 0x18(%rsp),%rsi
          c5  mov 0x20(%rsp),%rdi
          ca  mov 0x28(%rsp),%r8
          cf  add $0x30,%rsp
          d3  mov %rbp,%rsp
          d6  pop %rbp
          d7  ret
          d8  movabs $0,%rdi    # arena + 0x0
          e2  movabs $0,%rax    # flea_thread_slot
          ec  call *%rax
          ee  test %rax,%rax
          f1  jne +0x5f
          f7  movabs $0,%rax    # arena + 0x28
         101  mov $1,%ecx
         106  lock add %rcx,(%rax)
         10a  jmp +0xb2
         10f  addq $1,0x48(%rax)
         114  jmp +0xb2
    "#]]);
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
           0  call 0x0000000000500000
           5  push %rbp
           6  mov %rsp,%rbp
           9  lea 0x40110B,%rax
          10  jmp 0x000000000040100B
    "#]].assert_eq(&link(None).listing());
    let skeleton = link(Some(BodyRef::Inline(&exit)));
    expect![[r#"
           0  call 0x0000000000500000
           5  push %rbp
           6  mov %rsp,%rbp
           9  lea -0x98(%rsp),%rsp
          11  mov %rdi,-0x28(%rbp)
          15  mov %rsi,-0x30(%rbp)
          19  pushq 0x20(%rbp)
          1c  pushq 0x18(%rbp)
          1f  pushq 0x10(%rbp)
          22  call 0x000000000060011A
          27  mov %rax,-8(%rbp)
          2b  push %rbp
          2c  mov %rsp,%rbp
          2f  sub $0x30,%rsp
          33  mov %rax,(%rsp)
          37  mov %rcx,8(%rsp)
          3c  mov %rdx,0x10(%rsp)
          41  mov %rsi,0x18(%rsp)
          46  mov %rdi,0x20(%rsp)
          4b  mov %rbp,%rax
          4e  mov (%rax),%rcx
          51  movabs $0x700000000000,%rdx
          5b  mov %fs:0,%rsi
          64  nop
          65  mov %rsi,%rdi
          68  shr $8,%rdi
          6c  and $0xFFF0,%rdi
          73  mov 8(%rdx,%rdi),%rax
          78  mov (%rdx,%rdi),%rdx
          7c  cmp %rsi,%rdx
          7f  jne +0xe1
          81  mov 0x50(%rax),%rdx
          85  test %rdx,%rdx
          88  jne +0x111
          8e  movq $1,0x50(%rax)
          96  mov -0x28(%rcx),%rsi
          9a  movabs $0x700000000000,%rdx
          a4  mov %rsi,(%rdx)
          a7  mov -0x30(%rcx),%rsi
          ab  mov %rsi,8(%rdx)
          af  mov -8(%rcx),%rcx
          b3  mov %rcx,0x10(%rdx)
          b7  movq $0,0x50(%rax)
          bf  mov (%rsp),%rax
          c3  mov 8(%rsp),%rcx
          c8  mov 0x10(%rsp),%rdx
          cd  mov 0x18(%rsp),%rsi
          d2  mov 0x20(%rsp),%rdi
          d7  add $0x30,%rsp
          db  mov %rbp,%rsp
          de  pop %rbp
          df  jmp +0x118
          e1  movabs $0x700000000000,%rdi
          eb  movabs $0x700000000000,%rax
          f5  call *%rax
          f7  test %rax,%rax
          fa  jne +0x81
          fc  movabs $0x700000000000,%rax
         106  mov $1,%ecx
         10b  lock add %rcx,(%rax)
         10f  jmp +0xbf
         111  addq $1,0x58(%rax)
         116  jmp +0xbf
         118  leave
         119  ret
         11a  push %rbp
         11b  mov %rsp,%rbp
         11e  lea 0x40110B,%rax
         125  jmp 0x000000000040100B
    "#]].assert_eq(&skeleton.listing());
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
    "#]].assert_debug_eq(&(skeleton.rows, skeleton.moves, skeleton.original_entry));
}
