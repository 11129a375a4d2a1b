//! RFC 9669's conformance vectors, run through the compiler on this processor.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use flea_image::{CompileError, compile_plain};
use flea_object::insn::Insn;
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

fn run(insns: &[Insn], memory: &[u8]) -> Result<u64, CompileError> {
    let code = compile_plain(&unverified(insns, &|_, _| None))?;
    assert!(code.relocs.is_empty());
    let pages = Pages::new(code.bytes.len().next_multiple_of(4096));
    pages.write(0, &code.bytes);
    pages.executable();
    let mut memory = memory.to_vec();
    let at = if memory.is_empty() { 0 } else { memory.as_mut_ptr() as u64 };
    // SAFETY: the page holds a function of exactly this type, and the vector is one that
    // only touches its own stack and memory.
    let function: extern "sysv64" fn(u64, u64) -> u64 =
        unsafe { std::mem::transmute(pages.address()) };
    Ok(function(at, memory.len() as u64))
}

#[test]
fn vectors() {
    let text = include_str!("../../flea-object/tests/vectors/conformance.tsv");
    let (mut passed, mut failed) = (0, vec![]);
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        let fields: Vec<&str> = line.split('\t').collect();
        let (name, expected) = (fields[0], fields[5]);
        let insns: Vec<Insn> =
            hex(fields[4]).chunks_exact(8).map(|c| Insn::decode(c.try_into().unwrap())).collect();
        if REFUSED.contains(&name) {
            let refused = run(&insns, &[]).unwrap_err();
            let named = matches!(
                refused,
                CompileError::BadFacts { insn_idx: 1, .. }
                    | CompileError::Unsupported { insn_idx: 2, opcode: 0x8d }
            );
            assert!(named, "{refused}");
            continue;
        }
        let expected = u64::from_str_radix(expected.trim_start_matches("0x"), 16).unwrap();
        match run(&insns, &hex(fields[3])) {
            Ok(found) if found == expected => passed += 1,
            other => failed.push(format!("{name}: expected {expected:#x}, found {other:x?}")),
        }
    }
    assert!(failed.is_empty(), "{passed} passed\n{}", failed.join("\n"));
    assert!(passed > 300, "{passed}");
}
