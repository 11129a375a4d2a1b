//! What an accepted program's facts say, and what a refused one's report looks like.
#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a test's assembler: a wrong number fails the test"
)]

mod asm;
mod graph;

use flea_object::helper::Helper;
use flea_object::spec::{MapIdx, MapKind, MapSpec, Program, ProgramKind, SourceLine};
use flea_verifier::facts::{Branch, Fact, Operands, Region};
use flea_verifier::{Context, Rejection, Target, Verified, Verifier, verify};
use graph::Graph;

fn program(lines: &[&str]) -> Program {
    Program {
        name: "test".into(),
        section: "fexit/test".into(),
        kind: ProgramKind::Fexit,
        target: None,
        insns: asm::assemble(lines),
        lines: vec![
            SourceLine {
                insn_idx: 0,
                file: "a.bpf.c".into(),
                line: 7,
                text: "  int x = 0;".into(),
            },
            SourceLine { insn_idx: 1, file: "a.bpf.c".into(), line: 8, text: "  return x;".into() },
        ],
        ..Program::default()
    }
}

fn check(lines: &[&str]) -> Result<Verified, Rejection> {
    let map = MapSpec {
        name: "counts".into(),
        kind: MapKind::Hash,
        key_size_bytes: 8,
        value_size_bytes: 8,
        max_entries: 16,
        flags: 0,
        init: None,
        read_only: false,
        ..MapSpec::default()
    };
    let context = Context::Tracing { n_args: 2, n_results: 1, session: false };
    verify(&program(lines), &[map], context)
}

#[test]
fn facts_of_a_counter() {
    let verified = check(&[
        "r2 = *(u64 *)(r1 + 16)",
        "*(u64 *)(r10 - 8) = r2",
        "r1 = map 0",
        "r2 = r10",
        "r2 += -8",
        "call bpf_map_lookup_elem",
        "if r0 == 0 goto out",
        "r1 = 1",
        "lock *(u64 *)(r0 + 0) += r1",
        "out:",
        "r0 = 0",
        "exit",
    ])
    .unwrap();
    let call =
        Fact::Call { helper: Helper::MapLookupElem, map: Some(MapIdx(0)), constants: [None; 5] };
    let plain = Fact::Plain;
    let expected = [
        Fact::Access(Region::Ctx { offset_bytes: 16 }),
        Fact::Access(Region::Stack),
        plain,
        Fact::Unreachable,
        plain,
        plain,
        call,
        plain,
        plain,
        Fact::Access(Region::MapValue { map: MapIdx(0) }),
        plain,
        plain,
    ];
    assert_eq!(verified.facts(), expected);
    assert_eq!(verified.functions().len(), 1);
    assert_eq!(verified.functions()[0].stack_bytes, 8);
    assert_eq!(verified.functions()[0].end_insn_idx, 12);
}

#[test]
fn dead_branches_are_unreachable() {
    let verified =
        check(&["r0 = 5", "if r0 == 5 goto out", "r0 = *(u64 *)(r9 + 0)", "out:", "exit"]).unwrap();
    assert_eq!(verified.facts()[2], Fact::Unreachable);
}

#[test]
fn constants_are_those_of_all_paths() {
    let lines = |second: &'static str| {
        [
            "r6 = *(u64 *)(r1 + 0)",
            "r2 = 1",
            "if r6 == 0 goto call",
            second,
            "call:",
            "r3 = r10",
            "r3 += -8",
            "call bpf_get_func_arg",
            "r0 = 0",
            "exit",
        ]
    };
    let constant = |v: &Verified| match v.facts()[6] {
        Fact::Call { constants, .. } => constants[1],
        _ => panic!("not a call"),
    };
    assert_eq!(constant(&check(&lines("r2 = 1")).unwrap()), Some(1));
    assert_eq!(constant(&check(&lines("r2 = 0")).unwrap()), None);
}

#[test]
fn functions_and_their_stacks() {
    let verified = check(&[
        "r1 = r10",
        "r1 += -40",
        "call f",
        "r0 = 0",
        "exit",
        "f:",
        "*(u32 *)(r10 - 12) = 1",
        "*(u64 *)(r1 + 0) = 1",
        "r0 = 0",
        "exit",
    ])
    .unwrap();
    assert_eq!(verified.facts()[2], Fact::CallLocal { function: 1 });
    let stacks: Vec<u32> = verified.functions().iter().map(|f| f.stack_bytes).collect();
    assert_eq!(stacks, [40, 16]);
    assert_eq!(verified.functions()[1].start_insn_idx, 5);
}

#[test]
fn ranges_are_those_of_all_paths() {
    let lines = [
        "r3 = *(u64 *)(r1 + 0)",
        "r4 = *(u64 *)(r1 + 8)",
        "r5 = 3",
        "if r3 == 0 goto out",
        "r5 = 9",
        "out:",
        "r4 /= r5",
        "r4 %= 256",
        "w6 = w4",
        "if r4 > 255 goto dead",
        "if r4 > 7 goto dead",
        "r0 = 0",
        "exit",
        "dead:",
        "w4 /= w3",
        "r0 = 0",
        "exit",
    ];
    let verified = check(&lines).unwrap();
    let range = |idx| (verified.operands(idx).min, verified.operands(idx).max);
    assert_eq!(range(5), (3, 9), "two divisors");
    assert_eq!(range(7), (0, 255), "w6 = w4, of which no instruction says that it is short");
    assert_eq!(verified.operands(8).branch, Some(Branch::Falls));
    assert_eq!(verified.operands(9).branch, None);
    assert_eq!(range(12), (0, 0xffff_ffff), "32 bits of any number");
    assert_eq!(verified.operands(99), Operands::ANY);
}

/// What decides whether a program may skip a function whose result it cannot make up.
#[test]
fn the_range_of_results() {
    let range = |kind, lines: &[&str]| {
        let program = Program { kind, ..program(lines) };
        let context = Context::Tracing { n_args: 2, n_results: 1, session: false };
        verify(&program, &[], context).unwrap().return_range()
    };
    let fmod_ret = |lines: &[&str]| range(ProgramKind::FmodRet, lines);
    assert_eq!(fmod_ret(&["r0 = 0", "exit"]), 0..=0);
    assert_eq!(fmod_ret(&["r0 = -12", "exit"]), -12..=-12);
    // Two results that meet at one exit, and in a local function.
    let branch = ["r6 = *(u64 *)(r1 + 0)", "r0 = 0", "if r6 == 1 goto out"];
    let joined = |result| [&branch[..], &[result, "out:", "exit"]].concat();
    assert_eq!(fmod_ret(&joined("r0 = -12")), -12..=0);
    assert_eq!(fmod_ret(&joined("r0 = 0")), 0..=0);
    let called = ["call f", "r0 &= 7", "exit", "f:", "r0 = *(u64 *)(r1 + 0)", "exit"];
    assert_eq!(fmod_ret(&called), 0..=7);
    assert_eq!(fmod_ret(&["r0 = *(u64 *)(r1 + 0)", "exit"]), i64::MIN..=i64::MAX);
    // 32-bit arithmetic zero-extends: this is 4294967284, not -12.
    assert_eq!(fmod_ret(&["w0 = -12", "exit"]), 0xffff_fff4..=0xffff_fff4);
    // Nobody asks for the result of others, and paths that differ in it alone are one path.
    let other = range(ProgramKind::Fexit, &joined("r0 = -12"));
    assert!(other.contains(&0) && other.contains(&-12));
}

#[test]
fn report_of_a_refused_program() {
    let refused = check(&["r2 = *(u64 *)(r1 + 0)", "r0 = *(u64 *)(r2 + 0)", "exit"]).unwrap_err();
    expect_test::expect![[r#"
        0: R1=ctx() R10=fp0
        ; int x = 0; @ a.bpf.c:7
        0: (79) r2 = *(u64 *)(r1 +0)          ; R2=scalar() R1=ctx()
        ; return x; @ a.bpf.c:8
        1: (79) r0 = *(u64 *)(r2 +0)
        R2 invalid mem access 'scalar'"#]]
    .assert_eq(&refused.log.join("\n"));
    assert_eq!(refused.to_string(), "R2 invalid mem access 'scalar'");
    assert!(refused.hint.is_some_and(|h| h.contains("bpf_probe_read_user")));
}

#[test]
fn log_is_bounded_and_names_the_loop() {
    let refused =
        check(&["r0 = 1", "loop:", "r0 += 1", "if r0 > 0 goto loop", "exit"]).unwrap_err();
    assert!(refused.log.len() <= 200);
    let hint = refused.hint.unwrap();
    let said = [
        "the loop of insns 1 to 2 (a.bpf.c:8: return x;) took 99 % of them in ",
        "what differs from round to round is r0: ",
    ];
    assert!(said.iter().all(|part| hint.contains(part)), "{hint}");
}

#[test]
fn nothing_at_all_is_refused() {
    assert!(check(&[]).is_err());
}

#[test]
fn facts_of_typed_pointers() {
    let mut graph = Graph::parse(["struct foo 16 n:u32@0 next:*foo@8"].into_iter());
    let slots = graph.slots("*foo -");
    let program = program(&[
        "r1 = *(u64 *)(r1 + 0)",
        "r1 = *(u64 *)(r1 + 8)",
        "*(u64 *)(r10 - 8) = r1",
        "r1 = *(u64 *)(r10 - 8)",
        "r0 = *(u32 *)(r1 + 0)",
        "exit",
    ]);
    let context = Context::Tracing { n_args: 2, n_results: 1, session: false };
    let untyped = Verifier::new(&program, &[], context);
    let refused = untyped.verify().unwrap_err();
    assert_eq!(refused.message, "R1 invalid mem access 'scalar'");
    let target = Target { types: &graph.types, slots: &slots };
    let verified = untyped.target(target).verify().unwrap();
    let expected = [
        Fact::Access(Region::Ctx { offset_bytes: 0 }),
        Fact::Access(Region::Target),
        Fact::Access(Region::Stack),
        Fact::Access(Region::Stack),
        Fact::Access(Region::Target),
        Fact::Plain,
    ];
    assert_eq!(verified.facts(), expected);
    // Whatever is loaded may be returned.
    assert_eq!(verified.return_range(), 0..=i64::from(u32::MAX));
}

#[test]
fn the_log_names_what_pointers_lead_to_and_counts_states() {
    let mut graph = Graph::parse(["struct foo 16 n:u32@0 next:*foo@8"].into_iter());
    let slots = graph.slots("*foo -");
    let lines = ["r1 = *(u64 *)(r1 + 0)", "r2 = *(u64 *)(r1 + 8)", "r0 = *(u32 *)(r2 + 0)", "exit"];
    let program = program(&lines);
    let context = Context::Tracing { n_args: 2, n_results: 0, session: false };
    let target = Target { types: &graph.types, slots: &slots };
    let mut log = Vec::new();
    let verifier = Verifier::new(&program, &[], context).target(target);
    verifier.verify_logged(&mut |line| log.push(line.to_owned())).unwrap();
    let text = log.join("\n");
    assert!(text.contains("R1=ptr_foo()") && text.contains("R2=ptr_foo()"), "{text}");

    // A loop whose rounds are remembered, and forgotten again.
    let lines = ["r0 = 0", "again:", "r0 += 1", "r2 = r0", "if r0 < 500 goto again", "exit"];
    let program = self::program(&lines);
    log.clear();
    let verifier = Verifier::new(&program, &[], context);
    verifier.verify_logged(&mut |line| log.push(line.to_owned())).unwrap();
    let summary = log.iter().rev().find(|line| line.contains("peak_states")).unwrap();
    let number = |name: &str| -> usize {
        let mut words = summary.split(' ').skip_while(|word| *word != name);
        words.nth(1).unwrap().parse().unwrap()
    };
    let (peak, total) = (number("peak_states"), number("total_states"));
    assert!(0 < peak && peak < total, "{summary}");
}
