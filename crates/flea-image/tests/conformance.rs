//! RFC 9669's conformance vectors, run through the compiler on this processor.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use flea_image::{CompileError, compile_plain};
use flea_object::insn::Insn;
use flea_object::spec::{Program, ProgramKind};
use flea_verifier::{Context, Verified, verify};
use support::{Pages, unverified};

/// `callx` (a call by register) is in no kernel's instruction set; the other calls helper 5,
/// and a plain function has no helpers.
const REFUSED: [&str; 2] = ["callx", "call_unwind_fail"];

fn hex(text: &str) -> Vec<u8> {
    if text == "-" {
        return vec![];
    }
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

fn run(verified: &Verified, memory: &[u8]) -> Result<u64, CompileError> {
    let bytes = compile_plain(verified)?.resolve(|target| panic!("no {target:?} here"));
    let pages = Pages::new(bytes.len().next_multiple_of(4096));
    pages.write(0, &bytes);
    pages.executable();
    let mut memory = memory.to_vec();
    let at = if memory.is_empty() { 0 } else { memory.as_mut_ptr() as u64 };
    // SAFETY: the page holds a function of exactly this type, and the vector is one that
    // only touches its own stack and memory.
    let function: extern "sysv64" fn(u64, u64) -> u64 =
        unsafe { std::mem::transmute(pages.address()) };
    Ok(function(at, memory.len() as u64))
}

/// One line of the table.
struct Vector {
    name: &'static str,
    memory: Vec<u8>,
    insns: Vec<Insn>,
    expected: u64,
}

fn vectors() -> impl Iterator<Item = Vector> {
    let text = include_str!("../../flea-object/tests/vectors/conformance.tsv");
    text.lines().filter(|l| !l.starts_with('#')).map(|line| {
        let fields: Vec<&str> = line.split('\t').collect();
        let insns =
            hex(fields[4]).chunks_exact(8).map(|c| Insn::decode(c.try_into().unwrap())).collect();
        let expected = u64::from_str_radix(fields[5].trim_start_matches("0x"), 16).unwrap();
        Vector { name: fields[0], memory: hex(fields[3]), insns, expected }
    })
}

#[test]
fn vectors_without_the_verifier() {
    let (mut passed, mut failed) = (0, vec![]);
    for v in vectors() {
        let result = run(&unverified(&v.insns, &|_, _| None), &v.memory);
        if REFUSED.contains(&v.name) {
            let refused = result.unwrap_err();
            // A call of an unknown helper, or through a register with an unknown number.
            let named = matches!(refused, CompileError::BadFacts { insn_idx: 1 | 2, .. });
            assert!(named, "{refused}");
            continue;
        }
        match result {
            Ok(found) if found == v.expected => passed += 1,
            other => {
                failed.push(format!("{}: expected {:#x}, found {other:x?}", v.name, v.expected))
            }
        }
    }
    assert!(failed.is_empty(), "{passed} passed\n{}", failed.join("\n"));
    assert!(passed > 300, "{passed}");
}

/// The same with the verifier's own facts: it must not call reachable code unreachable, nor
/// the stack smaller than it is.
#[test]
fn vectors_with_the_verifier() {
    let mut passed = 0;
    for v in vectors() {
        let size_bytes = u32::try_from(v.memory.len()).unwrap();
        let program = Program {
            name: v.name.into(),
            section: String::new(),
            kind: ProgramKind::Fentry,
            target: None,
            insns: v.insns.clone(),
            lines: vec![],
            ..Program::default()
        };
        let Ok(verified) = verify(&program, &[], Context::Memory { size_bytes }) else { continue };
        match run(&verified, &v.memory) {
            Ok(found) => assert_eq!(found, v.expected, "{}", v.name),
            // `call_unwind_fail`: a helper.
            Err(e) => assert!(REFUSED.contains(&v.name), "{}: {e}", v.name),
        }
        passed += 1;
    }
    println!("{passed} accepted");
    assert!(passed > 250, "{passed}");
}
