//! Patches functions of this process with real skeletons and calls them: arguments, results,
//! every register, the stack's alignment.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use flea_image::SiteKind;
use flea_layout::shared::THREAD_TABLE_BYTES;
use flea_object::helper::Helper;
use flea_object::spec::{MapKind, ProgramKind};
use flea_verifier::Verified;
use flea_verifier::facts::Region;
use support::programs::{counter, lddw_value, map, record, value};
use support::rig::{Placing, Registers, Rig, signature, untraced};
use support::{access, call, insn, plain, program};

const ALL_KINDS: [SiteKind; 2] = [SiteKind::Nops, SiteKind::Relocated];

#[test]
fn arguments_at_entry() {
    let input = Registers::pattern();
    for (kind, placing) in [
        (SiteKind::Nops, Placing::Direct),
        (SiteKind::Nops, Placing::Called),
        (SiteKind::Nops, Placing::Inline),
        (SiteKind::Relocated, Placing::Called),
        (SiteKind::Relocated, Placing::Inline),
    ] {
        let rig = Rig::new(&[map(MapKind::Array, 64, 1)], true);
        let record = record(0, 5);
        rig.attach(&signature(), &[(&record, ProgramKind::Fentry)], kind, placing, 0);
        let output = rig.call(&input);
        assert!(output == untraced(kind, &input), "{placing:?}");
        let seen: Vec<u64> = (0..5).map(|i| rig.array(0, i)).collect();
        let expected = [input.gpr[7], input.gpr[9], input.xmm[7][0], 0x64, 0x65];
        assert_eq!(seen, expected, "{kind:?} {placing:?}");
    }
}

#[test]
fn arguments_and_result_at_exit() {
    let input = Registers::pattern();
    for stack_words in 4..8 {
        for (kind, placing) in
            ALL_KINDS.into_iter().flat_map(|k| [(k, Placing::Called), (k, Placing::Inline)])
        {
            let rig = Rig::new(&[map(MapKind::Array, 64, 1)], true);
            let record = record(0, 6);
            rig.attach(&signature(), &[(&record, ProgramKind::Fexit)], kind, placing, stack_words);
            let output = rig.call(&input);
            assert!(output == untraced(kind, &input), "{kind:?} {placing:?} {stack_words}");
            let seen: Vec<u64> = (0..6).map(|i| rig.array(0, i)).collect();
            let result = input.gpr[7] + input.gpr[6] + 0x64 + 0x67;
            let expected = [input.gpr[7], input.gpr[9], input.xmm[7][0], 0x64, 0x65, result];
            assert_eq!(seen, expected, "{kind:?} {placing:?} {stack_words}");
            assert_eq!(output.gpr[0], result);
        }
    }
}

/// `u64 *c = bpf_session_cookie(ctx), now = bpf_ktime_get_ns();
/// if (bpf_session_is_return(ctx)) *total += now - *c; else { *first = *c; *c = now; }`
fn latency() -> Verified {
    let cookie = Region::SessionCookie;
    let mut p = vec![
        plain(insn(0xbf, 6, 1, 0, 0)),
        call(Helper::KtimeGetNs, None),
        plain(insn(0xbf, 7, 0, 0, 0)),
        plain(insn(0xbf, 1, 6, 0, 0)),
        call(Helper::SessionCookie, None),
        plain(insn(0xbf, 8, 0, 0, 0)),
    ];
    p.extend(lddw_value(2, 0, 0));
    p.extend([
        plain(insn(0xbf, 1, 6, 0, 0)),
        call(Helper::SessionIsReturn, None),
        access(insn(0x79, 1, 8, 0, 0), cookie),
        plain(insn(0x55, 0, 0, 3, 0)),
        access(insn(0x7b, 2, 1, 8, 0), value(0)),
        access(insn(0x7b, 8, 7, 0, 0), cookie),
        plain(insn(0x05, 0, 0, 2, 0)),
        plain(insn(0x1f, 7, 1, 0, 0)),
        access(insn(0xdb, 2, 7, 0, 0), value(0)),
        plain(insn(0x95, 0, 0, 0, 0)),
    ]);
    // Lookups leave r2 alone only in this test: the verifier would not allow it.
    program(&p)
}

#[test]
fn session_cookie_lives_from_entry_to_exit() {
    let input = Registers::pattern();
    for (kind, placing) in
        ALL_KINDS.into_iter().flat_map(|k| [(k, Placing::Called), (k, Placing::Inline)])
    {
        let rig = Rig::new(&[map(MapKind::Array, 16, 1)], true);
        let latency = latency();
        let programs = [(&latency, ProgramKind::Fsession), (&latency, ProgramKind::Fsession)];
        rig.attach(&signature(), &programs, kind, placing, 5);
        for calls in 1..=3 {
            let output = rig.call(&input);
            assert!(output == untraced(kind, &input), "{kind:?} {placing:?}");
            // The clock steps by 5 at each look: entry of both, exit of both, so 10 each.
            assert_eq!(rig.array(0, 0), calls * 20, "{kind:?} {placing:?}");
            assert_eq!(rig.array(0, 1), 0, "the cookie starts at 0");
        }
    }
}

#[test]
fn fentry_fexit_and_fsession_together() {
    let input = Registers::pattern();
    let maps =
        [map(MapKind::Array, 64, 1), map(MapKind::PerCpuArray, 8, 1), map(MapKind::Array, 64, 1)];
    for (kind, placing) in
        ALL_KINDS.into_iter().flat_map(|k| [(k, Placing::Called), (k, Placing::Inline)])
    {
        let rig = Rig::new(&maps, true);
        let (latency, counter, record) = (latency(), counter(1), record(2, 6));
        let programs = [
            (&counter, ProgramKind::Fentry),
            (&latency, ProgramKind::Fsession),
            (&record, ProgramKind::Fexit),
            (&counter, ProgramKind::Fexit),
        ];
        rig.attach(&signature(), &programs, kind, placing, 4);
        for calls in 1..=3 {
            assert!(rig.call(&input) == untraced(kind, &input), "{kind:?} {placing:?}");
            assert_eq!(rig.array(0, 0), calls * 5);
            assert_eq!(rig.slot_word(rig.plan.maps[1].slot_offset), 2 * calls);
            assert_eq!(rig.array(2, 4), 0x65);
        }
    }
}

#[test]
fn a_thread_in_the_table_does_not_call_the_runtime() {
    let maps = [map(MapKind::PerCpuArray, 8, 1)];
    // No slot from the runtime: only the table can give one.
    let rig = Rig::new(&maps, false);
    // SAFETY: no conditions.
    let tp = unsafe { libc::pthread_self() };
    let entry = ((tp >> 12) % 4096 * 16) as usize;
    rig.data.write(entry, &tp.to_le_bytes());
    rig.data.write(entry + 8, &rig.slot_address().to_le_bytes());
    let counter = counter(0);
    let programs = [(&counter, ProgramKind::Fentry)];
    rig.attach(&signature(), &programs, SiteKind::Nops, Placing::Inline, 0);
    rig.call(&Registers::pattern());
    rig.call(&Registers::pattern());
    assert_eq!(rig.slot_word(rig.plan.maps[0].slot_offset), 2);
    assert_eq!(rig.data.read(THREAD_TABLE_BYTES + 40), 0, "no_slot");
}

#[test]
fn a_thread_without_slot_is_counted() {
    let maps = [map(MapKind::PerCpuArray, 8, 1)];
    let rig = Rig::new(&maps, false);
    let counter = counter(0);
    let programs = [(&counter, ProgramKind::Fentry)];
    rig.attach(&signature(), &programs, SiteKind::Nops, Placing::Inline, 0);
    let input = Registers::pattern();
    assert!(rig.call(&input) == untraced(SiteKind::Nops, &input));
    rig.call(&input);
    assert_eq!(rig.slot_word(rig.plan.maps[0].slot_offset), 0);
    assert_eq!(rig.data.read(THREAD_TABLE_BYTES + 40), 2, "no_slot");
}

#[test]
fn a_running_program_is_skipped_and_counted() {
    let rig = Rig::new(&[map(MapKind::Array, 64, 1)], true);
    let record = record(0, 5);
    let programs = [(&record, ProgramKind::Fentry), (&record, ProgramKind::Fentry)];
    let state = rig.plan.program_state_offset(0);
    let at = THREAD_TABLE_BYTES + (rig.plan.slots_offset + state) as usize;
    rig.data.write(at, &u64::MAX.to_le_bytes());
    rig.attach(&signature(), &programs[..1], SiteKind::Nops, Placing::Inline, 0);
    let input = Registers::pattern();
    assert!(rig.call(&input) == untraced(SiteKind::Nops, &input));
    assert_eq!((rig.array(0, 0), rig.slot_word(state + 8)), (0, 1), "skipped");
    // One that was left half done is not above this one on the stack.
    rig.data.write(at, &1u64.to_le_bytes());
    rig.call(&input);
    assert_eq!((rig.array(0, 0), rig.slot_word(state + 8)), (input.gpr[7], 1), "run");
    assert_eq!(rig.slot_word(state), 0, "free again");
    rig.data.write(at, &0u64.to_le_bytes());
    rig.call(&input);
    assert_eq!((rig.array(0, 0), rig.slot_word(state + 8)), (input.gpr[7], 1), "run");
    assert_eq!(rig.slot_word(state), 0, "free again");
}
