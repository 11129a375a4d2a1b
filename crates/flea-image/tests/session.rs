//! The two halves of fsession programs: each side's body holds its own half, and only what that
//! needs.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use flea_image::{BODY_FRAMES_OFFSET, BodyRequest, Cpu, ProgramUse, SiteKind, compile_body};
use flea_layout::shared::THREAD_TABLE_BYTES;
use flea_object::helper::Helper;
use flea_object::insn::Insn;
use flea_object::spec::{MapKind, ProgramKind};
use flea_symbols::addr::RemoteAddr;
use flea_verifier::Verified;
use flea_verifier::facts::{Fact, Region};
use support::programs::{lddw_value, map, plan, value};
use support::rig::{Placing, Registers, Rig, signature, untraced};
use support::{access, call, ctx, insn, plain, program};

type Part = (Insn, Fact);

/// `if (!bpf_session_is_return(ctx)) *cookie = now; else { *last = now - *cookie; sum += *last }`
///
/// The store of `last` is plain, so the exit side needs its guard.
fn duration() -> Verified {
    let cookie = Region::SessionCookie;
    let mut p = vec![
        plain(insn(0xbf, 6, 1, 0, 0)),
        call(Helper::SessionIsReturn, None),
        plain(insn(0x55, 0, 0, 6, 0)),
        plain(insn(0xbf, 1, 6, 0, 0)),
        call(Helper::SessionCookie, None),
        plain(insn(0xbf, 7, 0, 0, 0)),
        call(Helper::KtimeGetNs, None),
        access(insn(0x7b, 7, 0, 0, 0), cookie),
        plain(insn(0x05, 0, 0, 10, 0)),
        call(Helper::KtimeGetNs, None),
        plain(insn(0xbf, 7, 0, 0, 0)),
        plain(insn(0xbf, 1, 6, 0, 0)),
        call(Helper::SessionCookie, None),
        access(insn(0x79, 1, 0, 0, 0), cookie),
        plain(insn(0x1f, 7, 1, 0, 0)),
    ];
    p.extend(lddw_value(2, 0, 0));
    p.push(access(insn(0x7b, 2, 7, 8, 0), value(0)));
    p.push(access(insn(0xdb, 2, 7, 0, 0), value(0)));
    p.push(plain(insn(0x95, 0, 0, 0, 0)));
    program(&p)
}

/// The listings of both bodies.
fn bodies(verified: &Verified) -> [String; 2] {
    let maps = [map(MapKind::Array, 16, 1)];
    let program = ProgramUse { verified, kind: ProgramKind::Fsession, cookie: 0, state_index: 0 };
    let body = compile_body(&BodyRequest {
        programs: &[program],
        maps: &maps,
        plan: &plan(&maps),
        signature: &signature(),
        function_address: RemoteAddr(0),
        frame_offset: BODY_FRAMES_OFFSET,
        printk_map: None,
        cpu: Cpu::default(),
    });
    let body = body.unwrap();
    [body.session, body.exit].map(|code| code.unwrap().listing())
}

#[test]
fn a_side_pays_for_its_own_half_only() {
    let [entry, exit] = bodies(&duration());
    let count = |listing: &str, what: &str| listing.matches(what).count();
    let clock = "flea_clock_ns";
    assert_eq!((count(&entry, clock), count(&exit, clock)), (1, 1), "{entry}{exit}");
    assert!(exit.contains("thread pointer"), "its guard is in the slot: {exit}");
    assert!(!entry.contains("thread pointer") && !entry.contains("arena"), "{entry}");
}

/// A signal handler that runs while the exit side does: the call that it makes has its time
/// noted, its exit is skipped, counted once, and writes nothing.
#[test]
fn a_session_entered_again_misses_its_exit_once() {
    let input = Registers::pattern();
    for placing in [Placing::Called, Placing::Inline] {
        let rig = Rig::new(&[map(MapKind::Array, 16, 1)], true);
        let duration = duration();
        let programs = [(&duration, ProgramKind::Fsession)];
        rig.attach(&signature(), &programs, SiteKind::Nops, placing, 5);
        let state = rig.plan.program_state_offset(0);
        let active = THREAD_TABLE_BYTES + (rig.plan.slots_offset + state) as usize;
        let written = || (rig.array(0, 0), rig.array(0, 1));
        let call = || assert!(rig.call(&input) == untraced(SiteKind::Nops, &input), "{placing:?}");

        call();
        // The clock steps by 5 at each look.
        assert_eq!((written(), rig.slot_word(state + 8)), ((5, 5), 0), "{placing:?}");
        rig.data.write(active, &u64::MAX.to_le_bytes());
        call();
        assert_eq!((written(), rig.slot_word(state + 8)), ((5, 5), 1), "{placing:?}");
        assert_eq!(rig.slot_word(state), u64::MAX, "the other run is still going");
        rig.data.write(active, &0u64.to_le_bytes());
        call();
        assert_eq!((written(), rig.slot_word(state + 8)), ((10, 5), 1), "{placing:?}");
        assert_eq!(rig.slot_word(state), 0, "free again");
    }
}

/// `r0 = 1; if (arg0 != 77) r0 = bpf_session_is_return(ctx); array[r0] += 1`, with a jump between
/// the question and the test of its answer: then both ways stay on both sides.
#[test]
fn an_answer_that_something_else_may_have_given_decides_nothing() {
    let add: fn(i16) -> [Part; 4] = |at| {
        let [low, high] = lddw_value(2, 0, 0);
        let add = access(insn(0xdb, 2, 3, at, 0), value(0));
        [plain(insn(0xb7, 3, 0, 0, 1)), low, high, add]
    };
    let mut p = vec![
        ctx(3, 0),
        plain(insn(0xb7, 0, 0, 0, 1)),
        plain(insn(0x15, 3, 0, 1, 77)),
        call(Helper::SessionIsReturn, None),
        plain(insn(0x55, 0, 0, 5, 0)),
    ];
    p.extend(add(0));
    p.push(plain(insn(0x05, 0, 0, 4, 0)));
    p.extend(add(8));
    p.push(plain(insn(0x95, 0, 0, 0, 0)));
    let verified = program(&p);
    let rig = Rig::new(&[map(MapKind::Array, 16, 1)], true);
    let programs = [(&verified, ProgramKind::Fsession)];
    rig.attach(&signature(), &programs, SiteKind::Nops, Placing::Inline, 5);
    let mut input = Registers::pattern();
    for (arg, counts) in [(1, (1, 1)), (77, (1, 3)), (1, (2, 4))] {
        input.gpr[7] = arg;
        assert!(rig.call(&input) == untraced(SiteKind::Nops, &input));
        assert_eq!((rig.array(0, 0), rig.array(0, 1)), counts, "{arg}");
    }
}
