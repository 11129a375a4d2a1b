//! What programs see of their context, and inline helpers, run through real skeletons.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use flea_image::{
    BODY_FRAMES_OFFSET, Body, BodyRequest, CompileError, Cpu, ProgramUse, SiteKind, compile_body,
};
use flea_object::helper::Helper;
use flea_object::insn::Insn;
use flea_object::spec::{MapKind, MapSpec, ProgramKind};
use flea_symbols::addr::RemoteAddr;
use flea_symbols::signature::{ArgWord, RetWord};
use flea_verifier::Verified;
use flea_verifier::facts::{Fact, Region};
use support::programs::{counter, ints, lddw_map, lddw_value, map, plan, value, words};
use support::rig::{Placing, Registers, Rig, signature, untraced};
use support::{access, call, call_with, ctx, insn, plain, program};

type Part = (Insn, Fact);

fn mov_imm(dst: u8, imm: i32) -> Part {
    plain(insn(0xb7, dst, 0, 0, imm))
}

fn exit() -> Part {
    plain(insn(0x95, 0, 0, 0, 0))
}

/// `*(u64 *)(r9 + 8 * word) = reg`, where r9 is array 0's element 0.
fn out(word: i16, reg: u8) -> Part {
    access(insn(0x7b, 9, reg, word * 8, 0), value(0))
}

/// Runs `parts` with r9 at array 0 (of 16 words) and r6 = ctx; returns the array.
fn run(kind: ProgramKind, more_maps: &[MapSpec], parts: &[Part]) -> (Rig, Vec<u64>) {
    run_as(Sharing::One, kind, more_maps, parts)
}

/// For how many functions bodies are compiled.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sharing {
    One,
    Many,
}

fn run_as(
    sharing: Sharing,
    kind: ProgramKind,
    more_maps: &[MapSpec],
    parts: &[Part],
) -> (Rig, Vec<u64>) {
    let mut all = lddw_value(9, 0, 0).to_vec();
    all.push(plain(insn(0xbf, 6, 1, 0, 0)));
    all.extend_from_slice(parts);
    all.push(mov_imm(0, 0));
    all.push(exit());
    let verified = program(&all);
    let mut maps = vec![map(MapKind::Array, 128, 1)];
    maps.extend_from_slice(more_maps);
    let mut rig = Rig::new(&maps, true);
    rig.shared = sharing == Sharing::Many;
    rig.attach(&signature(), &[(&verified, kind)], SiteKind::Relocated, Placing::Inline, 4);
    let input = Registers::pattern();
    assert!(rig.call(&input) == untraced(SiteKind::Relocated, &input));
    let seen = (0..16).map(|i| rig.array(0, i)).collect();
    (rig, seen)
}

fn negative(errno: u64) -> u64 {
    errno.wrapping_neg()
}

#[test]
fn context_words_before_the_first_argument() {
    for (kind, flag) in [(ProgramKind::Fentry, 0), (ProgramKind::Fexit, 1 << 63)] {
        let parts = [ctx(3, -1), out(0, 3), ctx(3, -2), out(1, 3)];
        let (rig, seen) = run(kind, &[], &parts);
        assert_eq!(seen[0], 5 | flag);
        assert_eq!(seen[1], rig.code.address());
    }
}

#[test]
fn parts_of_context_words() {
    let at = |offset_bytes| Fact::Access(Region::Ctx { offset_bytes });
    let parts = [
        (insn(0x61, 3, 1, 0, 0), at(0)),
        out(0, 3),
        (insn(0x61, 3, 1, 4, 0), at(4)),
        out(1, 3),
        (insn(0x71, 3, 1, 1, 0), at(1)),
        out(2, 3),
        (insn(0x91, 3, 1, 7, 0), at(7)),
        out(3, 3),
    ];
    let (_, seen) = run(ProgramKind::Fexit, &[], &parts);
    let arg = Registers::pattern().gpr[7];
    assert_eq!(seen[0], arg & 0xffff_ffff);
    assert_eq!(seen[1], arg >> 32);
    assert_eq!(seen[2], arg >> 8 & 0xff);
    assert_eq!(seen[3], (arg.cast_signed() >> 56).cast_unsigned());
}

/// r1 = ctx, r2 = r10 - 8, both as the helpers want them.
fn helper_args() -> [Part; 4] {
    [
        access(insn(0x7a, 10, 0, -8, 77), Region::Stack),
        plain(insn(0xbf, 1, 6, 0, 0)),
        plain(insn(0xbf, 3, 10, 0, 0)),
        plain(insn(0x07, 3, 0, 0, -8)),
    ]
}

#[test]
fn get_func_arg_by_known_and_unknown_number() {
    let input = Registers::pattern();
    let expected = [input.gpr[7], input.gpr[9], input.xmm[7][0], 0x64, 0x65, 77, 77];
    for known in [true, false] {
        for kind in [ProgramKind::Fentry, ProgramKind::Fexit] {
            for (n, value) in expected.into_iter().enumerate() {
                let mut parts = helper_args().to_vec();
                let number = known.then_some(n as u64);
                parts.extend([
                    mov_imm(2, n as i32),
                    call_with(Helper::GetFuncArg, None, [None, number, None, None, None]),
                    access(insn(0x79, 3, 10, -8, 0), Region::Stack),
                    out(0, 3),
                    out(1, 0),
                ]);
                let (_, seen) = run(kind, &[], &parts);
                let status = if n < 5 { 0 } else { negative(22) };
                assert_eq!(seen[..2], [value, status], "{known} {kind:?} {n}");
            }
        }
    }
}

#[test]
fn facts_about_the_function() {
    let input = Registers::pattern();
    let result = input.gpr[7] + input.gpr[6] + 0x64 + 0x67;
    for (kind, value, status) in
        [(ProgramKind::Fentry, 77, negative(95)), (ProgramKind::Fexit, result, 0)]
    {
        let mut parts = helper_args().to_vec();
        parts.extend([
            plain(insn(0xbf, 2, 3, 0, 0)),
            call(Helper::GetFuncRet, None),
            access(insn(0x79, 3, 10, -8, 0), Region::Stack),
            out(0, 3),
            out(1, 0),
            call(Helper::GetFuncArgCnt, None),
            out(2, 0),
            call(Helper::GetFuncIp, None),
            out(3, 0),
            call(Helper::GetAttachCookie, None),
            out(4, 0),
            call(Helper::TracePrintk, None),
            out(5, 0),
        ]);
        for sharing in [Sharing::One, Sharing::Many] {
            let (rig, seen) = run_as(sharing, kind, &[], &parts);
            assert_eq!(seen[..6], [value, status, 5, rig.code.address(), 7, negative(22)]);
        }
    }
}

#[test]
fn array_lookup_checks_its_key() {
    let maps = [map(MapKind::Array, 12, 3), map(MapKind::PerCpuArray, 8, 3)];
    for (map_idx, stride) in [(1u32, 16), (2, 8)] {
        // The key comes from memory that the compiler knows nothing of: an argument's low bits.
        for (key, inside) in [(0, true), (2, true), (3, false), (-1, false)] {
            for known in [true, false] {
                let mut parts = vec![mov_imm(3, key)];
                if !known {
                    // r3 = argument, turned into the key at run time.
                    parts.extend([
                        ctx(4, 0),
                        plain(insn(0x57, 4, 0, 0, 0)),
                        plain(insn(0x0f, 3, 4, 0, 0)),
                    ]);
                    parts.extend([
                        ctx(5, 1),
                        plain(insn(0xaf, 3, 5, 0, 0)),
                        plain(insn(0xaf, 3, 5, 0, 0)),
                    ]);
                }
                parts.extend([
                    access(insn(0x63, 10, 3, -4, 0), Region::Stack),
                    plain(insn(0xbf, 2, 10, 0, 0)),
                    plain(insn(0x07, 2, 0, 0, -4)),
                ]);
                parts.extend(lddw_map(1, map_idx as i32));
                parts.extend([
                    call(Helper::MapLookupElem, Some(map_idx)),
                    plain(insn(0xbf, 7, 0, 0, 0)),
                    out(0, 7),
                    // 1 if null
                    mov_imm(8, 1),
                    plain(insn(0x15, 7, 0, 1, 0)),
                    mov_imm(8, 2),
                    out(1, 8),
                ]);
                let (rig, seen) = run(ProgramKind::Fentry, &maps, &parts);
                let placed = rig.plan.maps[map_idx as usize];
                let base = match placed.kind {
                    MapKind::Array => rig.arena() + placed.data_offset,
                    _ => rig.slot_address() + placed.slot_offset,
                };
                let address = base + stride * u64::from(key.cast_unsigned());
                let expected = if inside { [address, 2] } else { [0, 1] };
                assert_eq!(seen[..2], expected, "map {map_idx} key {key} known {known}");
            }
        }
    }
}

#[test]
fn results_in_two_registers_and_vectors() {
    // The function leaves rdx = 7 and xmm0 = xmm0 + xmm1.
    let input = Registers::pattern();
    for (words_of_result, expected) in [
        (vec![RetWord::Rax, RetWord::Rdx], [input.gpr[7] + input.gpr[6] + 0x64 + 0x67, 7]),
        (vec![RetWord::Xmm1, RetWord::Rdx], [input.xmm[1][0], 7]),
        (vec![], [0, 0]),
    ] {
        let signature = words([ArgWord::Gpr(0)].into_iter(), &words_of_result);
        let mut parts = lddw_value(9, 0, 0).to_vec();
        parts.extend([ctx(3, 1), out(0, 3)]);
        if words_of_result.len() == 2 {
            parts.extend([ctx(3, 2), out(1, 3)]);
        }
        parts.push(exit());
        let verified = program(&parts);
        let rig = Rig::new(&[map(MapKind::Array, 128, 1)], true);
        let programs = [(&verified, ProgramKind::Fexit)];
        rig.attach(&signature, &programs, SiteKind::Nops, Placing::Inline, 4);
        assert!(rig.call(&input) == untraced(SiteKind::Nops, &input));
        assert_eq!([rig.array(0, 0), rig.array(0, 1)], expected);
    }
}

#[test]
fn stack_cells_in_registers_and_in_memory_agree() {
    // A local variable at -16 is written, read in part or whole, and passed on, so that it is
    // a register in the first form and memory in the others.
    let write = [ctx(3, 0), access(insn(0x7b, 10, 3, -16, 0), Region::Stack)];
    let reads: [&[Part]; 4] = [
        &[access(insn(0x79, 4, 10, -16, 0), Region::Stack)],
        // the upper and the lower half
        &[
            access(insn(0x61, 4, 10, -12, 0), Region::Stack),
            access(insn(0x61, 5, 10, -16, 0), Region::Stack),
            plain(insn(0x67, 4, 0, 0, 32)),
            plain(insn(0x4f, 4, 5, 0, 0)),
        ],
        // through a copy of r10
        &[
            plain(insn(0xbf, 7, 10, 0, 0)),
            plain(insn(0x07, 7, 0, 0, -32)),
            access(insn(0x79, 4, 7, 16, 0), Region::Stack),
        ],
        // through an address that is computed
        &[
            plain(insn(0xbf, 7, 10, 0, 0)),
            mov_imm(8, 16),
            plain(insn(0x1f, 7, 8, 0, 0)),
            access(insn(0x79, 4, 7, 0, 0), Region::Stack),
        ],
    ];
    for read in reads {
        let mut parts = write.to_vec();
        parts.extend_from_slice(read);
        parts.push(out(0, 4));
        let (_, seen) = run(ProgramKind::Fentry, &[], &parts);
        assert_eq!(seen[0], Registers::pattern().gpr[7]);
    }
}

fn compile(verified: &Verified, maps: &[MapSpec], kind: ProgramKind) -> Result<Body, CompileError> {
    compile_body(&BodyRequest {
        signature: &ints(1),
        programs: &[ProgramUse { verified, kind, cookie: 0, state_index: 0 }],
        maps,
        plan: &plan(maps),
        function_address: RemoteAddr(0),
        frame_offset: BODY_FRAMES_OFFSET,
        printk_map: None,
        cpu: Cpu::default(),
    })
}

/// The counter with something more between load and store.
fn unmerged() -> Verified {
    let mut parts = lddw_value(2, 0, 0).to_vec();
    parts.extend([
        access(insn(0x79, 1, 2, 0, 0), value(0)),
        plain(insn(0x07, 1, 0, 0, 1)),
        access(insn(0x7b, 2, 1, 0, 0), value(0)),
        // The sum is used again, so that it must be in a register.
        plain(insn(0x27, 1, 0, 0, 3)),
        access(insn(0xdb, 2, 1, 8, 0), value(0)),
        exit(),
    ]);
    program(&parts)
}

#[test]
fn guards_only_where_needed() {
    let maps = [map(MapKind::PerCpuArray, 16, 1)];
    let state = plan(&maps).program_state_offset(0);
    // The guard's last store: movq $0, state(%slot)
    let guard = format!("movq $0,{state:#x}(");
    let listing =
        |v: &Verified| compile(v, &maps, ProgramKind::Fentry).unwrap().entry.unwrap().listing();
    assert!(!listing(&counter(0)).contains(&guard));
    let unmerged = listing(&unmerged());
    assert!(unmerged.contains(&guard), "{unmerged}");
    // An atomic on a per-CPU map is a plain instruction without lock.
    assert!(unmerged.lines().any(|l| l.contains("add ") && l.contains("(%r")));
    assert!(!unmerged.contains("lock"), "{unmerged}");
    // A call into the runtime needs the guard, but not one that asks for the time.
    assert!(listing(&program(&[call(Helper::GetCurrentComm, None), exit()])).contains(&guard));
    for clock in [Helper::KtimeGetNs, Helper::KtimeGetBootNs] {
        let timed = listing(&program(&[call(clock, None), exit()]));
        assert!(!timed.contains(&guard) && timed.contains("flea_clock_ns"), "{timed}");
    }
    // Nothing that lasts: neither guard nor slot.
    let nothing = compile(&program(&[mov_imm(0, 0), exit()]), &maps, ProgramKind::Fentry).unwrap();
    assert!(!nothing.calls_runtime);
    assert!(nothing.entry.unwrap().relocs.is_empty());
}

#[test]
fn the_number_of_the_highest_bit() {
    // Asked of an argument, which no compiler knows.
    let mut parts = lddw_value(9, 0, 0).to_vec();
    parts.extend([ctx(1, 0), call(Helper::Fls64, None), out(0, 0), mov_imm(0, 0), exit()]);
    let verified = program(&parts);
    let rig = Rig::new(&[map(MapKind::Array, 128, 1)], true);
    let kind = SiteKind::Relocated;
    rig.attach(&signature(), &[(&verified, ProgramKind::Fentry)], kind, Placing::Inline, 4);
    let bounds = (0..64).flat_map(|k| [(1u64 << k) - 1, 1 << k, (1 << k) + 1]);
    for value in bounds.chain([u64::MAX]) {
        let mut input = Registers::pattern();
        input.gpr[7] = value;
        assert!(rig.call(&input) == untraced(kind, &input), "{value:#x}");
        let highest = (0..64).rev().find(|k| value >> k & 1 != 0).map_or(0, |k| k + 1);
        assert_eq!(rig.array(0, 0), highest, "{value:#x}");
    }
}

#[test]
fn what_cannot_be_compiled_says_why() {
    let maps = [map(MapKind::Array, 16, 1)];
    let refuse = |parts: &[Part], kind| compile(&program(parts), &maps, kind).unwrap_err();
    let session = call(Helper::SessionCookie, None);
    let not_here = CompileError::HelperNotHere { insn_idx: 0, helper: Helper::SessionCookie };
    assert_eq!(refuse(&[session, exit()], ProgramKind::Fentry), not_here);

    let nowhere = [(insn(0x8d, 1, 0, 0, 0), Fact::CallPointer), exit()];
    let error = refuse(&nowhere, ProgramKind::Fentry);
    assert_eq!(error, CompileError::BadFacts { insn_idx: 0, what: "call of no function" });

    let mut no_map = lddw_value(1, 9, 0).to_vec();
    no_map.push(exit());
    assert!(matches!(refuse(&no_map, ProgramKind::Fentry), CompileError::NoSuchMap { .. }));

    let beyond = [ctx(1, 2), exit()];
    assert!(matches!(refuse(&beyond, ProgramKind::Fentry), CompileError::BadFacts { .. }));

    let below_stack = [access(insn(0x7a, 10, 0, -520, 0), Region::Stack), exit()];
    assert!(matches!(refuse(&below_stack, ProgramKind::Fentry), CompileError::BadFacts { .. }));

    let recursive = vec![(insn(0x85, 0, 1, 0, -1), Fact::CallLocal { function: 0 }), exit()];
    assert!(matches!(refuse(&recursive, ProgramKind::Fentry), CompileError::TooDeep { .. }));

    let unknown = [plain(insn(0xe5, 0, 0, 0, 0)), exit()];
    assert!(matches!(refuse(&unknown, ProgramKind::Fentry), CompileError::Unsupported { .. }));
}
