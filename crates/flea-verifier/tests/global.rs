//! Global functions: verified alone, their callers against their prototypes.
#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a test's assembler: a wrong number or a mistake in a case fails the test"
)]

mod asm;

use flea_object::spec::{MapKind, MapSpec, Param, Program, ProgramFunction, Prototype};
use flea_verifier::facts::{Fact, Region};
use flea_verifier::{Context, Rejection, Verified, Verifier, verify};

const CONTEXT: Context = Context::Tracing { n_args: 2, n_results: 0, session: false };
const MEMORY: Param = Param::Memory { size_bytes: 16, align_bytes: 8, nonnull: false };
const NONNULL: Param = Param::Memory { size_bytes: 16, align_bytes: 8, nonnull: true };

/// A map of one value of 16 bytes, and one that is read-only.
fn maps() -> Vec<MapSpec> {
    let map = |name: &str, read_only| MapSpec {
        name: name.into(),
        kind: MapKind::Array,
        key_size_bytes: 4,
        value_size_bytes: 16,
        max_entries: 1,
        flags: 0,
        init: None,
        read_only,
        inner: None,
        lock_offset: None,
        template: false,
    };
    vec![map("values", false), map("constants", true)]
}

/// A main function and `f`, which is global and has these parameters.
fn program(params: &[Param], lines: &[&str]) -> Program {
    let f = lines.iter().position(|line| *line == "f:").unwrap();
    let function = |insn_idx, name: &str, prototype| ProgramFunction {
        insn_idx,
        name: name.to_owned(),
        prototype,
    };
    let prototype = Prototype { params: params.to_vec(), bad_result: None };
    let start = asm::assemble(lines).len() - asm::assemble(&lines[f..]).len();
    Program {
        insns: asm::assemble(lines),
        functions: vec![
            function(0, "main", None),
            function(u32::try_from(start).unwrap(), "f", Some(prototype)),
        ],
        ..Program::default()
    }
}

fn check(params: &[Param], lines: &[&str]) -> Result<Verified, Rejection> {
    verify(&program(params, lines), &maps(), CONTEXT)
}

#[track_caller]
fn refused(params: &[Param], lines: &[&str], message: &str) -> Rejection {
    let rejection = check(params, lines).unwrap_err();
    let found = format!("@{} {}", rejection.insn_idx, rejection.message);
    assert_eq!(found, message, "{}", rejection.log.join("\n"));
    rejection
}

const RETURN_0: [&str; 3] = ["f:", "r0 = 0", "exit"];

#[test]
fn a_result_is_any_number_and_a_number_is_given() {
    let double = ["f:", "r0 = r1", "r0 += r0", "exit"];
    let call = ["r1 = 5", "call f", "exit"];
    let verified = check(&[Param::Number], &[&call[..], &double].concat()).unwrap();
    assert_eq!(verified.facts()[1], Fact::CallLocal { function: 1 });
    // The caller may not count on it.
    let index = ["r1 = 0", "call f", "r2 = value 0 0", "r2 += r0", "r0 = *(u8 *)(r2 + 0)", "exit"];
    let text = "@4 math between map_value pointer and register with unbounded min value is not \
                allowed";
    refused(&[Param::Number], &[&index[..], &RETURN_0].concat(), text);
    // Nor the function on the number that it is given.
    let index = ["r1 = 0", "call f", "exit"];
    let body = ["f:", "r2 = value 0 0", "r2 += r1", "r0 = *(u8 *)(r2 + 0)", "exit"];
    let text = "@5 math between map_value pointer and register with unbounded min value is not \
                allowed";
    let rejection = refused(&[Param::Number], &[&index[..], &body].concat(), text);
    assert!(rejection.hint.unwrap().contains("static"));
    let pointer = ["r1 = r10", "call f", "exit"];
    refused(&[Param::Number], &[&pointer[..], &RETURN_0].concat(), "@1 R1 is not a scalar");
    let unset = ["r1 = 0", "call f", "exit"];
    refused(&[Param::Number, Param::Number], &[&unset[..], &RETURN_0].concat(), "@1 R2 !read_ok");
    let pointer = ["r1 = 0", "call f", "exit", "f:", "r0 = r10", "exit"];
    let text = "@4 At subprogram exit the register R0 is not a scalar value (fp)";
    refused(&[Param::Number], &pointer, text);
    let lost = ["r1 = 0", "r6 = r1", "call f", "r0 = r1", "exit"];
    refused(&[Param::Number], &[&lost[..], &RETURN_0].concat(), "@3 R1 !read_ok");
}

#[test]
fn the_context_is_handed_on() {
    let read = ["call f", "exit", "f:", "r0 = *(u64 *)(r1 + 8)", "exit"];
    let verified = check(&[Param::Context], &read).unwrap();
    assert_eq!(verified.facts()[2], Fact::Access(Region::Ctx { offset_bytes: 8 }));
    let other = ["r1 = r10", "call f", "exit"];
    let text = "@1 arg#0 expected pointer to ctx, but got fp";
    refused(&[Param::Context], &[&other[..], &RETURN_0].concat(), text);
    let as_memory = ["call f", "exit"];
    let text = "@0 R1 type=ctx expected=fp, map_value, mem";
    refused(&[MEMORY], &[&as_memory[..], &RETURN_0].concat(), text);
}

const STACK: [&str; 4] =
    ["*(u64 *)(r10 - 16) = 0", "*(u64 *)(r10 - 8) = 5", "r1 = r10", "r1 += -16"];

#[test]
fn memory_may_be_null_and_has_its_size() {
    let call = [&STACK[..], &["call f", "r0 = 0", "exit"]].concat();
    let with = |body: &[&'static str]| [&call[..], &["f:"], body].concat();
    let checked = with(&["r0 = 0", "if r1 == 0 goto +1", "r0 = *(u64 *)(r1 + 8)", "exit"]);
    let checked: Vec<&str> =
        checked.into_iter().map(|l| l.replace("+1", "out").leak() as &str).collect();
    let n = checked.len();
    let checked = [&checked[..n - 1], &["out:", "exit"]].concat();
    let verified = check(&[MEMORY], &checked).unwrap();
    assert_eq!(verified.facts()[9], Fact::Access(Region::Memory));
    let unchecked = with(&["r0 = *(u64 *)(r1 + 8)", "exit"]);
    let text = "@7 R1 invalid mem access 'mem_or_null'";
    let rejection = refused(&[MEMORY], &unchecked, text);
    assert!(rejection.hint.unwrap().contains("NULL"));
    check(&[NONNULL], &unchecked).unwrap();
    let beyond = with(&["r0 = *(u64 *)(r1 + 9)", "exit"]);
    refused(&[NONNULL], &beyond, "@7 invalid access to memory, mem_size=16 off=9 size=8");
}

#[test]
fn who_brings_memory_has_it_checked() {
    let with = |lines: &[&'static str]| [lines, &["call f", "r0 = 0", "exit"], &RETURN_0].concat();
    check(&[MEMORY], &with(&["r1 = 0"])).unwrap();
    refused(&[NONNULL], &with(&["r1 = 0"]), "@1 arg#0 is expected to be non-NULL");
    refused(&[MEMORY], &with(&["r1 = 8"]), "@1 R1 invalid mem access 'scalar'");
    check(&[MEMORY], &with(&["r1 = value 0 0"])).unwrap();
    let text = "@2 invalid access to map value, value_size=16 off=8 size=16";
    refused(&[MEMORY], &with(&["r1 = value 0 8"]), text);
    let text = "@2 write into map forbidden, value_size=16 off=0 size=16";
    refused(&[MEMORY], &with(&["r1 = value 1 0"]), text);
    refused(
        &[MEMORY],
        &with(&["*(u64 *)(r10 - 16) = 0", "r1 = r10", "r1 += -16"]),
        "@3 invalid read from stack off -16+8 size 16",
    );
    let text = "@3 misaligned value access off 0 size 8";
    let unaligned = ["*(u64 *)(r10 - 16) = 0", "r1 = r10", "r1 += -20"];
    refused(&[MEMORY], &with(&unaligned), text);
    let lookup =
        ["*(u32 *)(r10 - 4) = 9", "r2 = r10", "r2 += -4", "r1 = map 0", "call #1", "r1 = r0"];
    check(&[MEMORY], &with(&lookup)).unwrap();
    refused(&[NONNULL], &with(&lookup), "@7 arg#0 is expected to be non-NULL");
    let unknown = Param::Unsupported { what: "`double`".into() };
    refused(&[unknown], &with(&["r1 = 0"]), "@1 Arg#0 type `double` is not supported yet.");
}

/// The function may have written all of what it was given.
#[test]
fn the_stack_that_was_handed_over_is_not_known_afterwards() {
    let lines = [
        &STACK[..],
        &["call f", "r2 = *(u64 *)(r10 - 8)", "r1 = value 0 0", "r1 += r2"],
        &["r0 = *(u8 *)(r1 + 0)", "exit", "f:", "r0 = 0", "exit"],
    ]
    .concat();
    let text = "@8 math between map_value pointer and register with unbounded min value is not \
                allowed";
    refused(&[MEMORY], &lines, text);
    // A spilled pointer in it is none any more.
    let lines =
        [
            &[
                "*(u64 *)(r10 - 16) = 0",
                "*(u64 *)(r10 - 8) = r10",
                "r1 = r10",
                "r1 += -16",
                "call f",
            ][..],
            &["r2 = *(u64 *)(r10 - 8)", "r0 = *(u64 *)(r2 - 16)", "exit"],
            &RETURN_0,
        ]
        .concat();
    refused(&[MEMORY], &lines, "@6 R2 invalid mem access 'scalar'");
    // The context's address must stay unknown to all.
    let lines =
        [
            &[
                "*(u64 *)(r10 - 16) = 0",
                "*(u64 *)(r10 - 8) = r1",
                "r1 = r10",
                "r1 += -16",
                "call f",
            ][..],
            &["r0 = 0", "exit"],
            &RETURN_0,
        ]
        .concat();
    refused(&[MEMORY], &lines, "@4 R1 leaks addr of ctx");
}

#[test]
fn atomics_need_what_the_type_says_of_alignment() {
    let lines = [
        &STACK[..],
        &[
            "call f",
            "r0 = 0",
            "exit",
            "f:",
            "r2 = 1",
            "lock *(u64 *)(r1 + 8) += r2",
            "r0 = 0",
            "exit",
        ],
    ]
    .concat();
    check(&[NONNULL], &lines).unwrap();
    let bytes = Param::Memory { size_bytes: 16, align_bytes: 1, nonnull: true };
    refused(&[bytes], &lines, "@8 misaligned value access size 8");
}

#[test]
fn records_are_not_left_behind() {
    let ring = MapSpec {
        name: "ring".into(),
        kind: MapKind::RingBuf,
        key_size_bytes: 0,
        value_size_bytes: 0,
        max_entries: 4096,
        flags: 0,
        init: None,
        read_only: false,
        inner: None,
        lock_offset: None,
        template: false,
    };
    let lines =
        ["call f", "exit", "f:", "r1 = map 0", "r2 = 8", "r3 = 0", "call #131", "r0 = 0", "exit"];
    let rejection = verify(&program(&[], &lines), &[ring], CONTEXT).unwrap_err();
    assert_eq!(rejection.message, "Unreleased reference id=1 alloc_insn=6");
}

/// A function that is called from many places counts once, and its callers' branches do not
/// multiply.
#[test]
fn it_is_verified_once() {
    let body: Vec<String> = (0..200).map(|_| "r1 ^= 1".to_owned()).collect();
    let mut lines = vec!["r6 = 0".to_owned()];
    for _ in 0..50 {
        lines.extend(["r1 = r6", "call f", "r6 += r0"].map(str::to_owned));
    }
    lines.extend(["r0 = 0", "exit", "f:"].map(str::to_owned));
    lines.extend(body);
    lines.extend(["r0 = r1", "exit"].map(str::to_owned));
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    let visited = |program: &Program| {
        let mut last = String::new();
        let verifier = Verifier::new(program, &[], CONTEXT);
        verifier.verify_logged(&mut |line| line.clone_into(&mut last)).unwrap();
        last.split(' ').nth(1).unwrap().parse::<usize>().unwrap()
    };
    let global = program(&[Param::Number], &lines);
    assert_eq!(visited(&global), 1 + 3 * 50 + 2 + 202);
    let inlined = Program { functions: Vec::new(), ..global };
    assert_eq!(visited(&inlined), 1 + 3 * 50 + 2 + 50 * 202);
}

/// One that no path calls need not be safe; one that a global function calls is looked at.
#[test]
fn those_that_are_called_are_verified() {
    let wild = ["f:", "r0 = *(u64 *)(r1 + 0)", "exit"];
    let dead = ["r0 = 0", "if r0 == 0 goto out", "r1 = 0", "call f", "out:", "r0 = 0", "exit"];
    let verified = check(&[Param::Number], &[&dead[..], &wild].concat()).unwrap();
    assert_eq!(verified.facts()[6], Fact::Unreachable);
    let alive = ["r1 = 0", "call f", "exit"];
    let text = "@3 R1 invalid mem access 'scalar'";
    refused(&[Param::Number], &[&alive[..], &wild].concat(), text);
}

/// What it leads to comes back to the function's caller, who takes any number from it.
#[test]
fn a_tail_call_of_a_global_function() {
    let jumps = MapSpec {
        name: "jumps".into(),
        kind: MapKind::ProgArray,
        value_size_bytes: 4,
        ..maps().remove(0)
    };
    let maps = [maps(), vec![jumps]].concat();
    let tail = ["f:", "r2 = map 2", "r3 = 0", "call bpf_tail_call", "r0 = 1", "exit"];
    let check = |main: &[&str]| {
        verify(&program(&[Param::Context], &[main, &tail].concat()), &maps, CONTEXT)
    };
    let verified = check(&["call f", "r0 = 0", "exit"]).unwrap();
    assert_eq!(verified.return_range(), 0..=0);
    assert_eq!(verified.tail_calls().count(), 1);
    let verified = check(&["call f", "exit"]).unwrap();
    assert_eq!(verified.return_range(), i64::MIN..=i64::MAX);
    let main = ["call f", "r2 = value 0 0", "r2 += r0", "r0 = *(u8 *)(r2 + 0)", "exit"];
    let message = check(&main).unwrap_err().message;
    assert!(message.contains("register with unbounded min value"), "{message}");
}
