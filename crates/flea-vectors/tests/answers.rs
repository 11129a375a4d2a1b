//! Lines in, answers out: the conformance vectors, programs with maps and helpers, and programs
//! that no verifier saw.
#![allow(clippy::unwrap_used, reason = "a test")]

use flea_vectors::{Answer, Vector, Verdict, answer};
use serde_json::{Value, json};

fn run(line: Value) -> Answer {
    answer(&serde_json::from_value::<Vector>(line).unwrap())
}

fn insn(opcode: u8, dst: u8, src: u8, off: i16, imm: i32) -> String {
    let [a, b] = off.to_le_bytes();
    let [c, d, e, f] = imm.to_le_bytes();
    let bytes = [opcode, dst | src << 4, a, b, c, d, e, f];
    bytes.map(|byte| format!("{byte:02x}")).concat()
}

fn exit() -> String {
    insn(0x95, 0, 0, 0, 0)
}

/// Accepted, and both ways of running it found `r0`.
fn accepted(answer: &Answer, r0: u64) {
    let hex = Some(format!("{r0:#x}"));
    assert_eq!(answer.verdict, Verdict::Accept, "{}", answer.message);
    assert_eq!((&answer.r0_interpreted, &answer.r0_compiled), (&hex, &hex), "{}", answer.message);
    assert_eq!(answer.message, "");
}

#[test]
fn conformance_vectors_without_the_verifier() {
    let text = include_str!("../../flea-object/tests/vectors/conformance.tsv");
    let (mut passed, mut refused) = (0, Vec::new());
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        let fields: Vec<&str> = line.split('\t').collect();
        let mem = if fields[3] == "-" { "" } else { fields[3] };
        let answer = run(json!({"id": fields[0], "insns": fields[4], "mem": mem, "check": false}));
        assert_eq!((&answer.id, answer.verdict), (&json!(fields[0]), Verdict::Skipped));
        let expected = u64::from_str_radix(fields[5].trim_start_matches("0x"), 16).unwrap();
        let hex = Some(format!("{expected:#x}"));
        if answer.r0_interpreted == hex && answer.r0_compiled == hex {
            passed += 1;
        } else {
            assert_ne!(answer.message, "", "{}: a wrong result", fields[0]);
            refused.push(fields[0].to_owned());
        }
    }
    // Twelve shifts by a constant that is too large, callx, and a helper.
    println!("{passed} right, refused: {refused:?}");
    assert!(passed >= 299, "{passed} right, refused: {refused:?}");
}

#[test]
fn the_context_has_twelve_words() {
    let slot = |n: i16| format!("{}{}", insn(0x79, 0, 1, 8 * n, 0), exit());
    accepted(&run(json!({"id": 1, "insns": slot(0)})), 1 << 36 | 1);
    accepted(&run(json!({"id": 1, "insns": slot(11)})), 12 << 36 | 12);
    let beyond = run(json!({"id": [1, "x"], "insns": slot(12)}));
    assert_eq!((beyond.verdict, beyond.id), (Verdict::Reject, json!([1, "x"])));
    assert!(beyond.message.contains("invalid bpf_context access"), "{}", beyond.message);
    let store = format!("{}{}", insn(0x7b, 1, 1, 0, 0), exit());
    assert_eq!(run(json!({"insns": store})).verdict, Verdict::Reject);
}

#[test]
fn memory_is_writable() {
    // r0 = *(u8 *)(r1 + 2); *(u16 *)(r1 + 0) = 7; r0 += *(u16 *)(r1 + 0); r0 += r2; exit
    let insns = [
        insn(0x71, 0, 1, 2, 0),
        insn(0x6a, 1, 0, 0, 7),
        insn(0x69, 3, 1, 0, 0),
        insn(0x0f, 0, 3, 0, 0),
        insn(0x0f, 0, 2, 0, 0),
        exit(),
    ];
    accepted(&run(json!({"insns": insns.concat(), "mem": "00010203"})), 2 + 7 + 4);
    let outside = format!("{}{}", insn(0x71, 0, 1, 4, 0), exit());
    assert_eq!(run(json!({"insns": outside, "mem": "00010203"})).verdict, Verdict::Reject);
}

#[test]
fn a_refusal_has_its_report() {
    // r2 = *(u64 *)(r1 + 0); r0 = *(u8 *)(r2 + 3); exit
    let insns = [insn(0x79, 2, 1, 0, 0), insn(0x71, 0, 2, 3, 0), exit()];
    let answer = run(json!({"insns": insns.concat()}));
    assert_eq!(answer.message, "R2 invalid mem access 'scalar'");
    let report = answer.report.unwrap();
    assert_eq!(report["message"], json!(answer.message));
    assert_eq!(report["place"]["insn"], "r0 = *(u8 *)(r2 +3)");
    assert_eq!(report["story"][0]["what"], "loaded");
    assert_eq!(report["story"][0]["place"]["insn_idx"], 0);
    assert_eq!(report["story"][0]["known"]["number"]["umax"], u64::MAX);
    assert!(report["hint"].as_str().unwrap().contains("bpf_probe_read_user"), "{report}");
    let accepted = run(json!({"insns": format!("{}{}", insn(0xb7, 0, 0, 0, 0), exit())}));
    assert_eq!(accepted.report, None);
}

/// r0 = lookup(map 0, key 0) ? *value + 1 : 9, the sum written back
fn lookup_and_add() -> String {
    [
        insn(0x7a, 10, 0, -8, 0),
        insn(0x18, 1, 1, 0, 0),
        insn(0, 0, 0, 0, 0),
        insn(0xbf, 2, 10, 0, 0),
        insn(0x07, 2, 0, 0, -8),
        insn(0x85, 0, 0, 0, 1),
        insn(0x55, 0, 0, 2, 0),
        insn(0xb7, 0, 0, 0, 9),
        exit(),
        insn(0x79, 1, 0, 0, 0),
        insn(0x07, 1, 0, 0, 1),
        insn(0x7b, 0, 1, 0, 0),
        insn(0x79, 0, 0, 0, 0),
        exit(),
    ]
    .concat()
}

#[test]
fn maps_of_each_kind() {
    let with = |kind: u32, key: u32, init: Option<&str>| {
        let map = json!({"type": kind, "key": key, "value": 8, "max": 4, "init": init});
        run(json!({"insns": lookup_and_add(), "maps": [map]}))
    };
    accepted(&with(2, 4, Some("2a00000000000000")), 43);
    accepted(&with(2, 4, None), 1);
    accepted(&with(6, 4, None), 1);
    accepted(&with(1, 8, None), 9);
    accepted(&with(5, 8, None), 9);
    // map_value[0]+4 of an array with an initial element.
    let value = [insn(0x18, 1, 2, 0, 0), insn(0, 0, 0, 0, 4), insn(0x61, 0, 1, 0, 0), exit()];
    let map = json!({"type": 2, "key": 4, "value": 8, "max": 1, "init": "0000000005000000"});
    accepted(&run(json!({"insns": value.concat(), "maps": [map]})), 5);
    let unknown = json!({"type": 9999, "key": 4, "value": 8, "max": 1});
    let unknown = run(json!({"insns": lookup_and_add(), "maps": [unknown]}));
    assert_eq!(unknown.verdict, Verdict::Skipped);
    assert!(unknown.message.contains("9999"), "{}", unknown.message);
    for kind in [12, 13] {
        let of_maps = json!({"type": kind, "key": 4, "value": 4, "max": 1});
        let of_maps = run(json!({"insns": lookup_and_add(), "maps": [of_maps]}));
        assert_eq!(of_maps.verdict, Verdict::Skipped);
        assert!(of_maps.message.contains("which maps"), "{}", of_maps.message);
    }
}

/// The interpreter once had its first memory at the address that argument 1 is.
#[test]
fn arguments_are_bad_addresses() {
    let insns = |helper: i32| {
        [
            insn(0x79, 3, 1, 0, 0),
            insn(0xbf, 1, 10, 0, 0),
            insn(0x07, 1, 0, 0, -16),
            insn(0xb7, 2, 0, 0, 15),
            insn(0x85, 0, 0, 0, helper),
            exit(),
        ]
    };
    let efault = (-14i64).cast_unsigned();
    let (read_user, read_user_str) = (112, 114);
    accepted(&run(json!({"insns": insns(read_user).concat()})), efault);
    accepted(&run(json!({"insns": insns(read_user_str).concat()})), efault);
}

#[test]
fn a_ring_buffer_record_is_reserved_and_submitted() {
    let insns = [
        insn(0x18, 1, 1, 0, 0),
        insn(0, 0, 0, 0, 0),
        insn(0xb7, 2, 0, 0, 16),
        insn(0xb7, 3, 0, 0, 0),
        insn(0x85, 0, 0, 0, 131),
        insn(0x55, 0, 0, 2, 0),
        insn(0xb7, 0, 0, 0, 1),
        exit(),
        insn(0x7a, 0, 0, 8, 77),
        insn(0x79, 6, 0, 8, 0),
        insn(0xbf, 1, 0, 0, 0),
        insn(0xb7, 2, 0, 0, 0),
        insn(0x85, 0, 0, 0, 132),
        insn(0xbf, 0, 6, 0, 0),
        exit(),
    ];
    let map = json!({"type": 27, "key": 0, "value": 0, "max": 4096});
    accepted(&run(json!({"insns": insns.concat(), "maps": [map]})), 77);
}

/// A vector is one program, so its program arrays are empty.
#[test]
fn tail_calls_miss() {
    let jump = |index: [String; 2]| {
        let map = [insn(0x18, 2, 1, 0, 0), insn(0, 0, 0, 0, 0)];
        let call = [insn(0x85, 0, 0, 0, 12), insn(0xb7, 0, 0, 0, 7), exit()];
        [map.concat(), index.concat(), call.concat()].concat()
    };
    let with = |index, check| {
        let map = json!({"type": 3, "key": 4, "value": 4, "max": 4});
        run(json!({"insns": jump(index), "maps": [map], "check": check}))
    };
    let known = [insn(0xb7, 3, 0, 0, 1), insn(0xb7, 4, 0, 0, 0)];
    let unknown = [insn(0x79, 3, 1, 0, 0), insn(0x57, 3, 0, 0, 7)];
    let pointer = [insn(0xbf, 3, 10, 0, 0), insn(0xb7, 4, 0, 0, 0)];
    accepted(&with(known.clone(), true), 7);
    accepted(&with(unknown, true), 7);
    let unchecked = with(known, false);
    let seven = Some("0x7".to_owned());
    assert_eq!((unchecked.r0_interpreted, unchecked.r0_compiled), (seven.clone(), seven));
    let refused = with(pointer, true);
    assert_eq!(refused.verdict, Verdict::Reject);
    assert_eq!(refused.message, "R3 leaks addr into helper function");
}

#[test]
fn what_is_no_program_is_refused() {
    for (insns, part) in [("95", "whole"), ("zz", "hex"), ("", "no instructions"), ("é", "hex")] {
        let answer = run(json!({"insns": insns}));
        assert_eq!(answer.verdict, Verdict::Reject, "{insns}");
        assert!(answer.message.contains(part), "{insns}: {}", answer.message);
    }
    let answer = run(json!({"insns": "ff00000000000000", "check": false}));
    assert_eq!(answer.verdict, Verdict::Skipped);
    assert!(answer.message.contains("unknown opcode ff"), "{}", answer.message);
}
