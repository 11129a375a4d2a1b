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
    check(body.entry.as_ref(), &expect![[""]]);
}

#[test]
fn two_counters_share_one_slot_lookup() {
    let maps = [map(MapKind::PerCpuArray, 8, 1), map(MapKind::PerCpuArray, 8, 4)];
    let programs = [(&counter(0), ProgramKind::Fentry), (&counter(1), ProgramKind::Fentry)];
    let body = compile(&ints(2), &maps, &programs);
    check(body.entry.as_ref(), &expect![[""]]);
}

#[test]
fn exit_saves_only_what_is_read() {
    let maps = [map(MapKind::Array, 64, 1)];
    let body = compile(&ints(2), &maps, &[(&record(0, 3), ProgramKind::Fexit)]);
    check(body.exit.as_ref(), &expect![[""]]);
    expect![[""]].assert_debug_eq(&body.reads);
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
    check(body.session.as_ref(), &expect![[""]]);
    check(body.exit.as_ref(), &expect![[""]]);
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
    expect![[""]].assert_eq(&link(None).listing());
    let skeleton = link(Some(BodyRef::Inline(&exit)));
    expect![[""]].assert_eq(&skeleton.listing());
    expect![[""]].assert_debug_eq(&(skeleton.rows, skeleton.moves, skeleton.original_entry));
}
